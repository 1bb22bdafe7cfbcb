"""Whether a folder can hold a run: written to, renamed in, locked and synced as checkpoints and corpora need it."""

import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from eurollm_jax.cluster.doctor.finding import Finding, failed, guarded, passed, unchecked, warned
from eurollm_jax.cluster.site import Site, for_bash

GIB = 1 << 30
LITTLE = 20 * GIB  # free; a checkpoint of a model of 1.7 billion parameters with its optimizer's state is as large
FEW_FILES = 10_000  # that may still be made
SKEW_SECONDS = 1.0  # between this host's clock and the one that dates files
RENAMES = 50
SHELL_SECONDS = 30  # for what a site's folder asks of the system: a group's name may come from the network
CHECKS = ("scratch writable", "scratch room", "scratch renames", "scratch locks", "scratch clock")
ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def scratch_folder(named: Path | None, site: Site | None, environment: Mapping[str, str]) -> Path | Finding:
    """The folder to look at: the named one, else the site's, else where the command runs."""
    if named is not None:
        return named
    if site is None or site.scratch is None:
        return Path.cwd()
    try:
        return Path(expanded(site.scratch, environment))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        why = said[-1].rpartition("line 1: ")[2] if said else "that is no folder"
    except subprocess.TimeoutExpired:
        why = f"bash has not expanded it within {SHELL_SECONDS:g} s"
    except OSError as error:
        why = f"bash, which expands it, cannot be started: {error.strerror}"
    seen = f"the site's folder is {site.scratch}: {why}"
    return Finding("scratch writable", "not checked", seen, "give --scratch DIR, or run inside a job")


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """As job scripts expand it: by bash, between double quotes, where a variable that is not set is an error.

    Raises OSError or subprocess.SubprocessError where that gives no text, or not in time.
    """
    script = f'set -eu; expanded={for_bash(text)}; test "$expanded"; printf %s "$expanded"'
    variables = {name: value for name, value in environment.items() if name != "BASH_ENV"}  # it may print
    shell = ["bash", "-c", script]
    return subprocess.run(
        shell,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SHELL_SECONDS,
        check=True,
    ).stdout


def scratch_findings(folder: Path, probe_bytes: int) -> list[Finding]:
    """All of this module on one folder; `probe_bytes` are written to it and removed again."""
    try:
        with _probe_folder(folder) as probe:
            return [
                *guarded("scratch writable", lambda: writes(probe, probe_bytes)),
                *guarded("scratch room", lambda: room(folder)),
                *guarded("scratch renames", lambda: renames(probe)),
                *guarded("scratch locks", lambda: locks(probe)),
                *guarded("scratch clock", lambda: clock(probe)),
            ]
    except OSError as error:
        found = _refused(folder, error)
        return [found, *(unchecked(check, f"{folder} cannot be written") for check in CHECKS[1:])]


@contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    """A folder of this process's own in it, which is gone afterwards."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "it is not there", str(folder))
    probe = folder / f".eurollm-doctor-{uuid.uuid4().hex}"
    probe.mkdir()
    try:
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _refused(folder: Path, error: OSError) -> Finding:
    why = (error.strerror or str(error)).lower()
    if error.errno in ROOM:
        return failed("scratch writable", f"{folder}: {why}", "free some space or quota, or give another --scratch")
    if error.errno == errno.ENOENT:
        return failed("scratch writable", f"{folder}: {why}", f"mkdir -p {folder}, or give another --scratch")
    return failed("scratch writable", f"{folder}: {why}", "give --scratch a folder that you may write to")


def writes(probe: Path, size: int) -> Finding:
    """A file of so many bytes is written, synced and read again; a spent quota shows only so."""
    content = os.urandom(1 << 20)
    path, parts = probe / "written", max(1, size >> 20)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(parts):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(probe)
    except OSError as error:
        path.unlink(missing_ok=True)
        return _refused(probe.parent, error)
    seconds = time.perf_counter() - began
    with path.open("rb") as file:
        if any(file.read(len(content)) != content for _ in range(parts)):
            return failed("scratch writable", f"{probe.parent}: what is read is not what was written", "do not use it")
    path.unlink()
    rate = f"{parts} MiB written and synced in {seconds:.2g} s"
    return passed("scratch writable", f"{probe.parent}: {rate}")


def room(folder: Path) -> Finding:
    """Free space and free files; a quota shows where the file system counts it as its size."""
    system = os.statvfs(folder)
    free, whole = system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize
    seen = f"{free / GIB:.1f} of {whole / GIB:.1f} GiB free"
    if system.f_files and system.f_favail < FEW_FILES:
        return warned("scratch room", f"{seen}, but room for {system.f_favail} more files only", "remove some files")
    if free < LITTLE:
        return warned("scratch room", seen, "free some space, or give another --scratch: checkpoints are large")
    return passed("scratch room", seen)


def renames(probe: Path) -> Finding:
    """A file that replaces another is seen whole, old or new, at any moment; a folder does not replace a full one."""
    path, partial = probe / "renamed", probe / "partial"
    size, torn, ended = 4096, [], threading.Event()
    path.write_bytes(b"0" * size)

    def read() -> None:
        while not ended.is_set():
            try:
                content = path.read_bytes()
            except OSError as error:
                torn.append(error.strerror or "gone")
                continue
            if len(content) != size or len(set(content)) != 1:
                torn.append("partly written")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for number in range(RENAMES):
        partial.write_bytes(str(number % 10).encode() * size)
        partial.replace(path)
    ended.set()
    reader.join()
    if torn:
        seen = f"a file that is replaced was seen as it should never be ({torn[0]}, {len(torn)} times)"
        return failed("scratch renames", seen, "give another --scratch: a kill here may cost a checkpoint")
    full, other = probe / "full", probe / "other"
    for folder in (full, other):
        folder.mkdir()
        (folder / "file").touch()
    try:
        other.rename(full)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return passed("scratch renames", "atomic over files, refused over folders that hold something")
        raise
    return failed("scratch renames", "a folder has replaced one that holds files", "give another --scratch")


def locks(probe: Path) -> Finding:
    """A lock of one process keeps another one out; where there are none, a run keeps to its lease (docs/runs.md)."""
    path = probe / "locked"
    with path.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            remedy = "runs are safe by their lease; mount it with flock for what writes corpora at once"
            return warned("scratch locks", f"there are none ({why})", remedy)
        with path.open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return passed("scratch locks", "flock keeps others out")
    return warned("scratch locks", "two hold one lock at once", "runs are safe by their lease; mount it with flock")


def clock(probe: Path) -> Finding:
    """The clock that dates files against this host's."""
    path = probe / "dated"
    before = time.time()
    path.touch()
    after = time.time()
    dated = path.stat().st_mtime
    return dated_finding(max(before - dated, dated - after, 0.0))


def dated_finding(skew: float) -> Finding:
    """`skew` is by how many seconds a file's date lies outside of the time in which it was made."""
    if skew > SKEW_SECONDS:
        seen = f"files are dated {skew:.1f} s off this host's clock"
        return warned("scratch clock", seen, "tell the site's operators; make and rsync go by such dates")
    return passed("scratch clock", f"files are dated within {max(skew, 0.01):.2g} s of this host's clock")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
