"""Folders of results that appear only when they are whole, and that say how they differ from what is now asked for.

A killed or failed run leaves what was there untouched, and never something unfinished that looks finished.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eurollm_jax.errors import UserError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it becomes `path`, in one rename, when the block ends without an exception.

    Raises UserError when `path` is there already, or when another process is writing it. On a file system without locks
    the latter is only noticed by the one that ends second, since each writes under a name of its own.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(_locked(left) for left, _, _ in _partials(path)):
        raise UserError(f"another process is writing {path}; wait for it or choose another folder")
    with _partial_folder(path) as partial:
        yield partial
        if not _published(partial, path):
            raise UserError(f"another process has written {path} meanwhile; use that, or delete it")


@contextmanager
def raced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, which becomes `path` in one rename; where others write the same, one wins.

    For what any process would write alike: all but the first to end discard what they wrote. The folder around `path`
    must be there, and stay.
    """
    with _partial_folder(path) as partial:
        yield partial
        _published(partial, path)


def discard_folder(path: Path) -> None:
    """Delete the folder `path` as a whole: from the first moment on it is gone from its name."""
    with suppress(FileNotFoundError):  # another process discards it too
        path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}.discarded"))
    clear_stale(path)


def clear_stale(path: Path) -> None:
    """Delete what killed processes of this machine left of writing `path`, and what any left of discarding it.

    What other machines left of writing it is left alone: whether their processes live cannot be known from here.
    """
    for left, host, process in _partials(path):
        if host == _HOST and (process == os.getpid() or not _lives(process)) and not _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    for left, _ in _beside(path, r"([0-9a-f]{32})\.discarded"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def full_disk_is_named(path: Path, rescue: str) -> Iterator[None]:
    """Turn the errors of a full disk, a spent quota or a file-size limit into a UserError that names `path`.

    `rescue` says what becomes of the work and how to go on.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = (error.strerror or "").lower()
        raise UserError(f"there is no room to write {path} ({reason}); free some space or quota, {rescue}") from None


@contextmanager
def removal_is_named(folder: Path) -> Iterator[None]:
    """Turn the error of a file that is not there into a UserError, if it was in `folder`, which another process may
    have finished with and removed."""
    try:
        yield
    except FileNotFoundError as error:
        if not str(error.filename).startswith(str(folder)):
            raise
        raise UserError(f"{folder} was removed meanwhile, perhaps by another process; run again") from None


def write_json(path: Path, value: object) -> None:
    """Write `value` for a person to read: indented, letters of every script as they are; whole or not at all, and on
    disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync_file(partial)  # a rename may reach the disk before what was written
    partial.replace(path)
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file that we wrote. Raises UserError when it is not JSON any more."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder and make it again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two flat mappings, as half a sentence; "" when they are equal."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        if key not in here:
            found.append(f"{key} is missing now")
        elif key not in there:
            found.append(f"{key} is new")
        elif there[key] != here[key]:
            values = f" ({_short(there[key])} then, {_short(here[key])} now)"
            found.append(f"{key} differs{values}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _short(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return value[:12] if is_hash else json.dumps(value, ensure_ascii=False)


_HOST = socket.gethostname().replace(".", "-")


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, under a name that no other process uses; what is left of it is deleted."""
    clear_stale(path)
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells others that we live, where there are locks
        yield partial
    finally:
        os.close(handle)
        shutil.rmtree(partial, ignore_errors=True)


def _published(partial: Path, path: Path) -> bool:
    """Put what is in `partial` safely on disk and rename it to `path`, unless that is there: then False."""
    _sync_tree(partial)
    try:
        partial.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    _sync_folder(path.parent)
    return True


def _partials(path: Path) -> list[tuple[Path, str, int]]:
    """The folders in which `path` is written, or was until a kill, each with the machine and the process."""
    found = _beside(path, r"([^.]+)\.(\d+)\.partial")
    return [(folder, match[1], int(match[2])) for folder, match in found]


def _beside(path: Path, ending: str) -> list[tuple[Path, re.Match[str]]]:
    """The entries beside `path` whose names are a dot, its own name, another dot and `ending`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{ending}")
    with suppress(FileNotFoundError):
        return [(entry, match) for entry in path.parent.iterdir() if (match := name.fullmatch(entry.name))]
    return []


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _locked(folder: Path) -> bool:
    """Whether a process holds it: numbers of processes are not unique where containers share a machine's name."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _sync_tree(folder: Path) -> None:
    # Together rather than one by one: a file system writes its journal once for several that wait.
    entries = [*folder.rglob("*"), folder]
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda entry: _sync_folder(entry) if entry.is_dir() else _sync_file(entry), entries):
            pass


def _sync_file(path: Path) -> None:
    """Raises OSError where the file system only now finds that there is no room, as network file systems do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder
        _sync_file(path)
