"""When a run is to save its state or to end: at a signal, before a time limit, and now and then by the clock.

Signals and clocks are of one process; what follows from them is done by all after the same step. So each process says
before every step what it wishes, and after it all know the greatest of the wishes. That is one number for each device,
computed by the devices in turn with the steps: nothing waits for it but the next answer.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property, partial
from types import FrameType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from eurollm_jax.errors import StoppedError
from eurollm_jax.parallel.mesh import Layout

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 5.0  # within which a signal is taken for the same one: Slurm sends it by two ways
SPARE_SECONDS = 30.0  # before a time limit, beside what the run itself has taken


class Wish(IntEnum):
    """What is done after a step."""

    NONE = 0
    SAVE = 1
    STOP = 2


REASONS = {Wish.STOP: "its time limit", 3: "SIGUSR1", 4: "SIGTERM"}  # the number that is agreed on -> why a run ends


class Stopping:
    """`with Stopping(layout, ...) as stopping:` around the loop; `ask()` before each step, and `answer()` after it.

    SIGTERM and SIGUSR1 end the run after the step that is under way or the next; SIGTERM again, later than the
    schedulers' repetition of it, ends the process at once. The limit is in seconds from `began`, of
    time.perf_counter(). The run ends while there is time for three of its slowest steps, two of its longest saves, its
    longest pause between steps (an evaluation), and half a minute: one step is under way and one is to come when the
    processes agree, and a save may take longer than those before. `save_minutes` after the last save one is wished for.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        time_limit: float | None = None,
        began: float | None = None,
        save_minutes: float | None = None,
    ) -> None:
        now = time.perf_counter()
        self.reason = ""
        """What the run ends by, once the answer is STOP."""
        self._mesh = layout.mesh
        self._several = jax.process_count() > 1
        self._first = jax.process_index() == 0
        self._end = None if time_limit is None else (now if began is None else began) + time_limit
        self._save_seconds = None if save_minutes is None else 60 * save_minutes
        self._saved_at = now
        self._answered_at: float | None = None
        self._step_seconds = self._save_took = self._pause = 0.0
        self._signal: signal.Signals | None = None
        self._signalled_at = 0.0
        self._at_once = False
        self._asked: jax.Array | None = None
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not, and a notebook's cell is one
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            # None is a handler that is not Python's, such as the one by which JAX's own service would note SIGTERM.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._handlers = {}

    def ask(self) -> None:
        """Sends off what this process wishes, before a step."""
        if self._answered_at is not None:
            self._pause = max(self._pause, time.perf_counter() - self._answered_at)
        if self._several:
            self._asked = self._greatest(self._said[self._wish()])

    def answer(self) -> Wish:
        """What all processes do after this step; waits at most for the step before it."""
        found = self._wish() if self._asked is None else int(np.asarray(self._asked.addressable_data(0)))
        self._answered_at = time.perf_counter()
        self.reason = REASONS.get(found, "")
        return Wish(min(found, Wish.STOP))

    def stepped(self, seconds: float) -> None:
        """Tells how long a step took."""
        self._step_seconds = max(self._step_seconds, seconds)

    def saved(self, seconds: float) -> None:
        """Tells that the state is being saved, and how long that took."""
        self._saved_at = time.perf_counter()
        self._save_took = max(self._save_took, seconds)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what holds nothing that is not saved: a signal ends a single process there by StoppedError. Several go
        on to the next answer, for one that left alone would have the others wait."""
        self._at_once = not self._several
        if self._at_once and self._signal is not None:
            raise self._stopped()
        try:
            yield
        finally:
            self._at_once = False

    def _stopped(self) -> StoppedError:
        assert self._signal is not None
        return StoppedError(f"stopped by {self._signal.name}; all is saved, and the same command goes on.")

    def _wish(self) -> int:
        now = time.perf_counter()
        if self._signal is not None:
            return 4 if self._signal == signal.SIGTERM else 3
        if self._end is not None and now + self._room > self._end:
            return Wish.STOP
        if self._first and self._save_seconds is not None and now - self._saved_at >= self._save_seconds:
            return Wish.SAVE
        return Wish.NONE

    @property
    def _room(self) -> float:
        """Seconds before the limit in which nothing new is begun."""
        return 3 * self._step_seconds + 2 * self._save_took + self._pause + SPARE_SECONDS

    def _heard(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = signal.Signals(number), now
            if self._at_once:
                raise self._stopped()
            log.warning("%s: the run is saved and ends after this step", self._signal.name)
        elif number == signal.SIGTERM != self._signal:  # the end of a job that was asked by SIGUSR1 before
            self._signal, self._signalled_at = signal.SIGTERM, now
        elif number == signal.SIGTERM and now - self._signalled_at > AGAIN_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    @cached_property
    def _said(self) -> dict[int, jax.Array]:
        """Every wish as an array with one element for each device, ready to be sent."""
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        size = self._mesh.devices.size
        wishes = (int(Wish.NONE), int(Wish.SAVE), *map(int, REASONS))
        told = {wish: np.full(1, wish, np.int32) for wish in wishes}
        return {wish: jax.make_array_from_callback((size,), sharding, partial(_one, told[wish])) for wish in wishes}

    @cached_property
    def _greatest(self) -> jax.stages.Wrapped:
        return jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


def _one(value: np.ndarray, index: object) -> np.ndarray:
    """What each device holds, wherever it stands."""
    return value
