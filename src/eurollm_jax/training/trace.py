"""A profile of some steps of a run, made by `jax.profiler` for TensorBoard's profile page and for Perfetto."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax

from eurollm_jax.errors import UserError
from eurollm_jax.training.metrics import Clock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """Steps `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From FIRST:LAST, such as 20:23."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--trace {text}: name the first and the last step, counted from 1, such as 20:23.")
        return cls(int(found[1]), int(found[2]))

    def require_within(self, done: int, steps: int) -> None:
        """Raises UserError unless all its steps are still to be trained, of `steps` of which some are `done`."""
        if self.last > steps or self.first <= done:
            left = "none is left" if done >= steps else f"{done + 1} to {steps} are left: name some of those"
            raise UserError(f"--trace {self.first}:{self.last}: the run has {steps} steps, of which {left}.")


class Tracer:
    """Starts and stops the profiler around the steps of a trace, while the clock stands; does nothing without one."""

    def __init__(self, trace: Trace | None, folder: Path, clock: Clock) -> None:
        self._trace, self._folder, self._clock, self._running = trace, folder, clock, False

    def before(self, step: int, state: Any) -> None:
        """To be called before a step is begun from `state`, which is waited for."""
        if self._trace and step == self._trace.first:
            jax.block_until_ready(state)
            with self._clock.stopped():
                jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """To be called once a step is begun that gives `metrics`, which are waited for."""
        if self._trace and step == self._trace.last:
            jax.block_until_ready(metrics)
            with self._clock.stopped():
                self.close()

    def close(self) -> None:
        """Also of a run that fails amid the steps."""
        if self._trace and self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("the profile of steps %d to %d is in %s", self._trace.first, self._trace.last, self._folder)
