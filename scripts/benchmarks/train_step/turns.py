"""Lets a process train a few steps at a time, when it is told to, so that several can take turns on one machine.

A line `FORM COUNT` on the standard input asks for COUNT steps; for each, a line of JSON goes back. What the process
prints besides goes to its standard error. While it waits it takes no processor time.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def case() -> dict[str, Any]:
    """What to train: the shape of the model and of a batch, and the options of this contestant."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def rows(shape: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that everyone trains on, and their successors: [batch, length] int32 each."""
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], (shape["batch"], shape["length"] + 1))
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


class Turns:
    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._form, self._left = "", 0

    def say(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._answers, flush=True)

    def form(self) -> str:
        """Of the next step, once one is asked for. The process ends where none will be."""
        if not self._left:
            _trim()
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            form, count = line.split()
            self._form, self._left = form, int(count)
        return self._form

    def step(self, work: Callable[[], Any], loss: Callable[[Any], float]) -> Any:
        """Runs one step, which ends when all that it computes is there, and answers with what it took."""
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        done = work()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        self._left -= 1
        self.say(
            seconds=seconds,
            cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            peak=after.ru_maxrss / 1000,
            loss=loss(done),
        )
        return done


def _trim() -> None:
    """Freed memory goes back while others have their turn: together the contestants need more than there is."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
