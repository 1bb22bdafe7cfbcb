"""Ends a run that makes no progress, with the stacks of all threads: a hang costs as much as the work it holds up."""

import ctypes
import faulthandler
import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Self

import jax

from eurollm_jax.errors import LostError, UserError
from eurollm_jax.parallel.liveness import RollCall

log = logging.getLogger(__name__)
phases = logging.getLogger("eurollm_jax.phases")

LOOK_SECONDS = 5.0  # between two looks at the clock
GRACE_SECONDS = 60.0  # after which a process is ended that does not even let the watchdog look
WRITE_SECONDS = 5.0  # that its stacks may take
STANDARD_ERROR = 2  # by its number: Python's own may be no file
SIGEV_THREAD = 2


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

    def compares_replicas(self, step: int, *, saving: bool) -> bool:
        """Also before every checkpoint: copies that are restored agree, and a wrong one would never be found again."""
        return self.replicas_every is not None and (saving or step % self.replicas_every == 0)


class Watchdog:
    """`with Watchdog(watch, roll) as watchdog:` around the work, which says `phase(...)` as it goes on.

    Without progress for the watch's minutes the stacks of all threads go to standard error and, once there is a run
    directory to `keep` them in, to its logs/stacks-N.txt, in every process; and the run ends with status 76 and a line
    that names where each process stood. Where a library holds the interpreter itself, threads that need none of it
    write the stacks to one of the two a minute later and end the process, with the same status and without the line.
    """

    def __init__(self, watch: Watch, roll: RollCall) -> None:
        self._seconds = None if watch.minutes is None else 60 * watch.minutes
        self._path: Path | None = None
        self._roll = roll
        self._phase, self._since = "starting", time.monotonic()
        self._progress = self._since
        self._ended = threading.Event()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._progress = time.monotonic()
            self._roll.on_hang = self._dump
            self._timer = _Timer(LostError.status)
            self._rely_on_the_library(self._seconds)
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._seconds is None:
            return
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._timer.cancel()
        self._roll.on_hang = lambda: None
        if self._file is not None and self._path is not None:
            with suppress(OSError):  # which would take the place of what ended the run
                self._file.close()
                if self._path.stat().st_size == 0:
                    self._path.unlink()

    def keep(self, run: Path) -> None:
        """From now on the stacks go to the run's logs, too."""
        if self._seconds is None:
            return
        path = run / "logs" / f"stacks-{jax.process_index()}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._path = path.open("a"), path
        self._rely_on_the_library(self._seconds)

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
                where = "in its standard error" if self._path is None else f"in {self._path}"
                self._roll.hang(
                    f"no progress for {limit / 60:g} minutes at: {self._phase}, since {since}; the stacks of its "
                    f"threads are {where}."
                )

    def _rely_on_the_library(self, limit: float) -> None:
        """From now on, in place of what was asked of it before."""
        file = STANDARD_ERROR if self._file is None else self._file
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=not self._timer.works, file=file)
        self._timer.start(limit + GRACE_SECONDS + WRITE_SECONDS)

    def _dump(self) -> None:
        said = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}, at: {self._phase}\n".encode()
        files = [STANDARD_ERROR] if self._file is None else [STANDARD_ERROR, self._file.fileno()]
        for file in files:  # the run's file system may be what hangs
            with suppress(OSError, ValueError):  # a full disk
                os.write(file, said)
                faulthandler.dump_traceback(file, all_threads=True)


class _Event(ctypes.Structure):
    """sigevent(3type), as the C libraries of Linux lay it out."""

    _fields_: ClassVar = [
        ("value", ctypes.c_size_t),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("_rest", ctypes.c_char * 32),
    ]


class _Timer:
    """Ends the process with a status, by a thread of the C library that runs whoever holds the interpreter."""

    def __init__(self, status: int) -> None:
        self._library, self._timer = ctypes.CDLL(None), ctypes.c_void_p()
        if not hasattr(self._library, "timer_create"):
            with suppress(OSError):
                self._library = ctypes.CDLL("librt.so.1")  # which had it before glibc 2.34
        function = ctypes.cast(self._library._exit, ctypes.c_void_p)
        event = _Event(value=status, notify=SIGEV_THREAD, function=function)
        create = getattr(self._library, "timer_create", None)  # of Linux
        self.works = create is not None and not create(
            time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        )

    def start(self, seconds: float) -> None:
        """From now on, in place of what it was set to before."""
        if self.works:
            whole, part = divmod(seconds, 1)
            times = (ctypes.c_long * 4)(0, 0, int(whole), int(1e9 * part))  # struct itimerspec: no repetition
            self._library.timer_settime(self._timer, 0, times, None)

    def cancel(self) -> None:
        if self.works:
            self._library.timer_delete(self._timer)
