"""Texts between the processes of the doctor, over JAX's key-value service, as parallel/messages.py has them for a run.

Here no wait is long and none ends the process: who does not answer is what the doctor is to tell.
"""

import time
from collections.abc import Callable, Collection
from typing import Any

SLICE = 2.0  # seconds of one wait, after which a thread hears signals
ROUNDS = 5  # of asking for the time
FOLDER = "eurollm_jax/doctor"


class Meeting:
    """`client` is JAX's; None for a process that is alone."""

    def __init__(self, client: Any, process: int, processes: int) -> None:
        self._client, self.process, self.processes = client, process, processes

    def say(self, topic: str, text: str) -> None:
        if self.processes > 1:
            self._client.key_value_set(f"{FOLDER}/{topic}/{self.process}", text)

    def hear(self, topic: str, process: int, until: float) -> str | None:
        """What a process says of it; None where it has not by `until`, of time.monotonic()."""
        while True:
            left = until - time.monotonic()
            try:
                wait = max(1, int(1000 * min(SLICE, left)))
                heard: str = self._client.blocking_key_value_get(f"{FOLDER}/{topic}/{process}", wait)
                return heard
            except Exception as error:  # of jaxlib, which may not be imported at the top
                if "DEADLINE_EXCEEDED" not in str(error) or left <= 0:
                    return None

    def collected(self, topic: str, text: str, until: float, absent: Collection[int] = ()) -> list[str | None]:
        """In process 0: what each says, in their order; nothing of those that are `absent`, who are not waited for. The
        others say theirs, and get an empty list."""
        if self.processes == 1:
            return [text]
        if self.process:
            self.say(topic, text)
            return []
        others = range(1, self.processes)
        return [text, *(None if process in absent else self.hear(topic, process, until) for process in others)]

    def told(self, topic: str, text: str, until: float) -> str | None:
        """What process 0 says; None where it says nothing by `until`."""
        if self.process == 0:
            self.say(topic, text)
            return text
        return self.hear(topic, 0, until)

    def clock(self, until: float, now: Callable[[], float] = time.time) -> tuple[float, float] | None:
        """(seconds that this clock is ahead of process 0's, how far that may be wrong); None where it does not answer.

        The way there and back may differ in time, and half of both is the bound of the error (as for NTP, RFC 5905,
        section 8). Of several rounds the quickest counts.
        """
        if self.process == 0:
            for process in range(1, self.processes):
                for number in range(ROUNDS):
                    if self.hear(f"asks/{number}", process, until) is None:
                        break
                    self.say(f"time/{process}/{number}", repr(now()))
            return 0.0, 0.0
        best: tuple[float, float] | None = None
        for number in range(ROUNDS):
            asked = now()
            self.say(f"asks/{number}", "what time is it")
            answer = self.hear(f"time/{self.process}/{number}", 0, until)
            if answer is None:
                return best
            heard = now()
            measured = (asked + heard) / 2 - float(answer), (heard - asked) / 2
            best = measured if best is None or measured[1] < best[1] else best
        return best
