"""One run in a run directory: a lock, and beside it a lease, for file systems whose locks reach one host or none.

The lease is a file that says who holds the directory, and that its holder changes every few seconds. Nobody compares
the clocks of two hosts: whether a lease is alive is seen by watching it, and where its age is asked for, it is the file
server that dates both the lease and the file that it is compared with.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import jax

from eurollm_jax.errors import LostError, UserError
from eurollm_jax.parallel.liveness import end_process

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0  # after which the holder changes its lease
LEASE_SECONDS = 60.0  # that another host's lease is watched; unchanged, it is a dead process's
OLD_SECONDS = 600.0  # beyond which no clock of a cluster is wrong: a lease of that age need not be watched
SETTLE_SECONDS = 2.0  # where there are no locks: another one that takes the lease at once has shown itself by then


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory."""

    id: str
    host: str
    machine: str  # this boot of the host and its space of process numbers
    pid: int
    started: str  # of the process, by its machine's clock: numbers are used again
    since: str

    @classmethod
    def me(cls) -> "Holder":
        pid = os.getpid()
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _start_of(pid) or "", since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname() and self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Of one that is here."""
        return _start_of(self.pid) == self.started


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run directory; of several processes that are one run, the first does so for all.

    UserError while another process holds it, with its host, number and start. A dead process's is taken over: at once
    on the same host, and after up to a minute of watching on another. Should another process take it in turn, as after
    this one was stopped for minutes, this one ends with status 76.
    """
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        yield
        return
    lease = run / ".lease"
    with (run / ".lock").open("w") as file:
        has_locks = _has_lock(run, file, lease)
        me = Holder.me()
        while not _taken(lease, me):
            _set_aside(lease, _require_dead(run, lease))
        if not has_locks:
            time.sleep(SETTLE_SECONDS)
            if (now := _holder(_read(lease))) != me:
                raise _held(run, now)
        ended = threading.Event()
        beating = threading.Thread(target=_keep, args=(run, lease, me, ended), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            with suppress(OSError):  # which would take the place of what ended the run; the lease runs out
                if _holder(_read(lease)) == me:
                    lease.unlink(missing_ok=True)


def _has_lock(run: Path, file: IO[str], lease: Path) -> bool:
    """Whether there are locks here, and this one is mine; UserError where it is another's."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _holder(_read(lease))
            dying = holder is not None and holder.is_here and not holder.lives
            if not dying or time.monotonic() > end:  # the threads of a process that was killed end one by one
                raise _held(run, holder) from None
            time.sleep(0.05)
        except OSError:
            return False


def _held(run: Path, holder: Holder | None) -> UserError:
    named = f" ({holder})" if holder is not None else ""
    return UserError(f"another process trains in {run}{named}: wait for it, or choose another name.")


def _taken(lease: Path, me: Holder) -> bool:
    """Whether the lease is mine now: it appears whole, and only where there is none."""
    mine = lease.with_name(f".lease.{me.id}")
    try:
        mine.write_text(_content(me, 0))
        try:
            os.link(mine, lease)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with lease.open("x") as file:
                file.write(_content(me, 0))
    except FileExistsError:
        return False
    finally:
        mine.unlink(missing_ok=True)
    return True


def _require_dead(run: Path, lease: Path) -> str | None:
    """The content of the lease, once it is known that its process is dead; UserError once it is known to live."""
    seen = _read(lease)
    holder = _holder(seen)
    if seen is None:
        return None
    if holder is not None and holder.is_here:
        if holder.lives:
            raise _held(run, holder)
        return seen
    if _age(lease) > OLD_SECONDS:
        return seen
    by = f" by {holder}" if holder is not None else ""
    log.warning("%s was held%s: it is taken over in %.0f s unless that lives", run, by, LEASE_SECONDS)
    end = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, LEASE_SECONDS / 10))
        now = _read(lease)
        if now is None:
            return None
        if now != seen:
            raise _held(run, _holder(now))
    return seen


def _set_aside(lease: Path, dead: str | None) -> None:
    """Takes a dead process's lease away, unless a faster one has its own there; of several that do so one succeeds."""
    aside = lease.with_name(f".lease.{uuid.uuid4().hex}")
    if dead is None or _read(lease) != dead:
        return
    with suppress(FileNotFoundError):
        lease.rename(aside)
        aside.unlink()


def _keep(run: Path, lease: Path, me: Holder, ended: threading.Event) -> None:
    """In a thread: changes the lease, and ends this process where it is another's."""
    beat, failing = 0, False
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            now = _read(lease)
            holder = _holder(now)
            if holder is not None and holder != me:
                end_process(f"{run} was taken over by another process ({holder}): this one ends.", LostError.status)
            if now is None:
                _taken(lease, me)
            with lease.open("r+") as file:  # in place, and of the same length: a full disk has room for it
                file.write(_content(me, beat))
                file.truncate()
            failing = False
        except OSError as error:
            if not failing:
                log.warning("%s cannot be kept (%s): another host may take the run for a dead one's", lease, error)
            failing = True


def _content(me: Holder, beat: int) -> str:
    return f"{json.dumps(asdict(me))}\n{beat:012d}\n"


def _read(lease: Path) -> str | None:
    """Opened anew each time: file systems over a network look for changes then."""
    try:
        return lease.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _holder(content: str | None) -> Holder | None:
    """None where it cannot be told."""
    try:
        return Holder(**json.loads((content or "").splitlines()[0]))
    except (ValueError, TypeError, IndexError):
        return None


def _age(lease: Path) -> float:
    """Seconds since it changed, by the clock that dates files there."""
    probe = lease.with_name(f".lease.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - lease.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, as far as that can be told; None where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if not Path("/proc/self").exists() and _answers(pid) else None
    return None if state == "Z" else fields[18]  # proc(5): field 22; what is before it may hold spaces


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
