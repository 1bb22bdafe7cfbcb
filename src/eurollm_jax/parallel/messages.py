"""Texts that the processes of a run send each other, over the service by which JAX has connected them.

No device takes part and none is started: so a thread may agree on something while the devices train, and a program that
only reads files leaves them alone. All processes call what is here alike, and in the same order within a topic; no two
threads share one. In one process nothing is sent.
"""

import time
from collections import Counter, defaultdict
from typing import Any

import jax
from jax._src import distributed  # it has no public name; tests/training/test_checkpoint_processes.py guards it

from eurollm_jax.errors import LostError

WAIT_SECONDS = 1800.0  # for a word of the others: a file system may hang for minutes
_SLICE = 5.0  # seconds, after which a thread that waits hears signals

_calls: Counter[str] = Counter()
_told: defaultdict[str, list[str]] = defaultdict(list)  # keys that process 0 has set and others may not have read


def processes() -> int:
    return (distributed.global_state.num_processes or 1) if _service() is not None else 1


def process_number() -> int:
    return (distributed.global_state.process_id or 0) if _service() is not None else 0


def told(topic: str, text: str) -> str:
    """What process 0 says."""
    if processes() == 1:
        return text
    key = _key(topic)
    if process_number() == 0:
        _service().key_value_set(key, text)
        _told[topic].append(key)
        return text
    return _word(key, 0, topic)


def collected(topic: str, text: str) -> list[str]:
    """What each process says, in their order, for process 0; nothing for the others, which do not wait."""
    if processes() == 1:
        return [text]
    key = _key(topic)
    if process_number():
        _service().key_value_set(f"{key}/{process_number()}", text)
        return []
    texts = [text, *(_word(f"{key}/{process}", process, topic) for process in range(1, processes()))]
    for read in (key, *_told.pop(topic, ())):  # who has answered here has read all that it was told before
        _service().key_value_delete(f"{read}/" if read == key else read)
    return texts


def _service() -> Any:
    return distributed.global_state.client


def _key(topic: str) -> str:
    _calls[topic] += 1
    return f"eurollm_jax/{topic}/{_calls[topic]}"


def _word(key: str, process: int, topic: str) -> str:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        try:
            word: str = _service().blocking_key_value_get(key, int(1000 * _SLICE))
            return word
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LostError(
                    f"process {process} cannot be heard on {topic} ({str(error).splitlines()[0]})."
                ) from error
    raise LostError(f"process {process} has said nothing on {topic} for {WAIT_SECONDS:g} seconds.")
