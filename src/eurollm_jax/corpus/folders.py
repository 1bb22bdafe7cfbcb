"""Folders of results that appear only when they are whole, and that say how they differ from what is now asked for.

A killed or failed run leaves what was there untouched, and never something unfinished that looks finished.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eurollm_jax.errors import UserError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it becomes `path`, in one rename, when the block ends without an exception.

    What a killed run left behind is cleared away. Raises UserError when `path` is there already, or when another
    process is writing it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {path}; wait for it or choose another folder") from None
        except OSError:
            pass  # some cluster file systems have no locks
        _clear(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial)
            raise
        _sync_tree(partial)
        partial.rename(path)
        _sync(path.parent)
    finally:
        os.close(handle)


@contextmanager
def raced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, which becomes `path` in one rename; where others write the same, one wins.

    For what any process would write alike: no locks are needed, since each writes under a name of its own, and all but
    the first to end discard what they wrote. What killed processes of this machine left behind is cleared away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells others that we live, where there are locks
        yield partial
        _sync_tree(partial)
        with _unless_taken():
            partial.rename(path)
        _sync(path.parent)
    finally:
        os.close(handle)
        shutil.rmtree(partial, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Delete the folder `path` as a whole: from the first moment on it is gone from its name."""
    discarded = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    with suppress(FileNotFoundError):  # another process discards it too
        path.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def clear_stale(path: Path) -> None:
    """Delete what killed processes of this machine left of `raced_folder(path)` and `discard_folder(path)`.

    The leftovers of other machines are left alone: whether their processes live cannot be known from here.
    """
    for left in path.parent.glob(f".{path.name}.{_HOST}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and (int(process) == os.getpid() or not _lives(int(process))) and not _locked(left):
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


def write_json(path: Path, value: object) -> None:
    """Write `value` for a person to read: indented, letters of every script as they are; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


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


def fingerprints(files: list[Path]) -> dict[str, str]:
    """Name -> SHA-256 of each file: what a result was made from, wherever the files lie."""
    return {file.name: file_sha256(file) for file in files}


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
def _unless_taken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


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
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_tree(folder: Path) -> None:
    # Together rather than one by one: a file system writes its journal once for several that wait.
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(_sync, [*folder.rglob("*"), folder]):
            pass


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)
