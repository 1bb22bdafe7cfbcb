"""Ends a run that makes no progress, with the stacks of all threads: a hang costs as much as the work it holds up."""

import faulthandler
import logging
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import jax

from eurollm_jax.errors import UserError
from eurollm_jax.parallel.liveness import RollCall

log = logging.getLogger(__name__)
phases = logging.getLogger("eurollm_jax.phases")

LOOK_SECONDS = 5.0  # between two looks at the clock
GRACE_SECONDS = 60.0  # after which a process is ended that does not even let the watchdog look


@dataclass(frozen=True)
class Watch:
    """How a run looks after itself."""

    minutes: float | None = 30.0  # without progress, after which the run ends; compiling is one stretch. None: never
    replicas_every: int | None = 1000  # steps, after which what several devices hold is compared; None: never

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"watch: minutes={self.minutes} must be above 0, or None for no limit.")
        if self.replicas_every is not None and self.replicas_every < 1:
            raise UserError(f"watch: replicas_every={self.replicas_every} must be 1 or more, or None for never.")

    def compares_replicas(self, step: int, *, permanent: bool) -> bool:
        """Also before a permanent checkpoint, so that none holds what the next comparison would find."""
        return self.replicas_every is not None and (permanent or step % self.replicas_every == 0)


class Watchdog:
    """`with Watchdog(watch, run, roll) as watchdog:` around the work, which says `phase(...)` as it goes on.

    Without progress for the watch's minutes the stacks of all threads go to standard error and to the run's
    logs/stacks-N.txt, in every process, and the run ends with status 76 and a line that names where each process stood.
    Where a library holds the interpreter itself, a thread that needs none of it does the same a minute later, with
    status 1 and without the line.
    """

    def __init__(self, watch: Watch, run: Path, roll: RollCall) -> None:
        self._seconds = None if watch.minutes is None else 60 * watch.minutes
        self._path = run / "logs" / f"stacks-{jax.process_index()}.txt"
        self._roll = roll
        self._phase, self._since = "starting", time.monotonic()
        self._progress = self._since
        self._ended = threading.Event()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
            self._roll.on_hang = self._dump
            self._rely_on_the_library(self._seconds)
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._roll.on_hang = lambda: None
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def phase(self, name: str) -> None:
        """Progress: from now on the process does what `name` says."""
        self._phase = name
        self._since = self._progress = time.monotonic()
        self._roll.phase(name)
        phases.debug("PHASE %s", name)

    def alive(self) -> None:
        """Progress within a phase."""
        self._progress = time.monotonic()

    def _watch(self, limit: float) -> None:
        look = min(LOOK_SECONDS, limit / 4)
        while not self._ended.wait(look):
            self._rely_on_the_library(limit)
            if (now := time.monotonic()) - self._progress > limit:
                since = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - self._since)))
                self._roll.hang(
                    f"no progress for {limit / 60:g} minutes at: {self._phase}, since {since}; the stacks of its "
                    f"threads are in {self._path}."
                )

    def _rely_on_the_library(self, limit: float) -> None:
        """From now on, in place of what was asked of it before."""
        assert self._file is not None
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=self._file)

    def _dump(self) -> None:
        assert self._file is not None
        said = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}, at: {self._phase}\n"
        for file in (self._file, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk; a standard error that is no file
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
