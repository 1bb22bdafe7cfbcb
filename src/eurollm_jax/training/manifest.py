"""The hashes of a checkpoint's files, which tell a sound one from a damaged one.

Orbax loads a file with a flipped bit as wrong weights, without a word. So each checkpoint carries `MANIFEST.sha256`,
one line per file in the format that `sha256sum --check` reads, and a file that it does not name is a fault as well: a
manifest that has lost lines is noticed by the files. Several processes share the reading; the first one reads again
what another finds fault with, since a node may have a stale view of the files, or lose its file server for a while.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.errors import LostError
from eurollm_jax.parallel.messages import collected, process_number, processes, told

log = logging.getLogger(__name__)

type Alive = Callable[[], object]  # called between files: terabytes are read for longer than a watchdog waits

MANIFEST = "MANIFEST.sha256"
RESTORED = ("state/", "progress/", "about.json")  # what is read of a checkpoint; people may add files beside it

_DIGITS = 64  # of a hash
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # also of names in a damaged manifest


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line for each file, also where one cannot be read now; empty where it
    is sound."""
    try:
        named, problems = _named(checkpoint)
    except OSError as error:
        return [f"{MANIFEST} could not be read ({_reason(error)})"]
    return _compare(named, problems, _hashes(checkpoint, _files(checkpoint)))


def agreed_faults(checkpoint: Path, topic: str, alive: Alive = lambda: None) -> list[str]:
    """The same, in all processes: each reads some of the files that the first one sees, which reads again what is not
    as it should be, and decides. Raises LostError in all of them where that one cannot read a file that is there."""
    names = json.loads(told(topic, json.dumps(_files(checkpoint))))
    own = names[process_number() :: processes()]
    shares = collected(topic, json.dumps(_hashes(checkpoint, own, alive)))
    verdict: tuple[str, list[str]] = ("", [])
    if process_number() == 0:
        try:
            verdict = "", _confirmed(checkpoint, names, _merged(shares), alive)
        except OSError as error:
            verdict = f"{error.filename} could not be read ({_reason(error)})", []
    lost, problems = json.loads(told(topic, json.dumps(verdict)))
    if lost:
        raise LostError(
            f"{lost}: nothing was changed, and the same command tries again; if it stays so, mend the file system, or "
            f"move {checkpoint} away to go on from the checkpoint before it."
        )
    found: list[str] = problems
    return found


def agreed_hashes(folder: Path, topic: str, alive: Alive = lambda: None) -> dict[str, str]:
    """File -> hash of all files, for the first process, which writes them down; each has read some. What one cannot
    read, or only the others see, has a reason in place of a hash."""
    listed, refused = list[str](), dict[str, str]()
    if process_number() == 0:
        try:
            listed = _files(folder, strict=True)
        except OSError as error:
            refused = {str(folder): _reason(error)}
    names = json.loads(told(topic, json.dumps(listed)))
    written = {name for name in _files(folder) if f".process_{process_number()}/" in name}
    unseen = dict.fromkeys(written.difference(names), "process 0 does not see it")
    shares = collected(topic, json.dumps(_hashes(folder, names[process_number() :: processes()], alive) | unseen))
    return _merged(shares) | refused


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """The last file of a checkpoint. Raises OSError where one of the others could not be read."""
    if unread := [f"{name}: {digest or 'it is gone'}" for name, digest in hashes.items() if len(digest) != _DIGITS]:
        raise OSError(errno.EIO, unread[0])
    (folder / MANIFEST).write_text("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)))


def seal(folder: Path) -> None:
    """Writes the manifest of a folder that this process alone has written."""
    write_manifest(folder, _hashes(folder, _files(folder)))


def sync_tree(folder: Path) -> None:
    """Until the folder and all in it are on disk. Raises OSError where the file system finds only now that there is no
    room, as network file systems do."""
    with ThreadPoolExecutor() as pool:  # together: a file system writes its journal once for several that wait
        list(pool.map(sync, [*folder.rglob("*"), folder]))


def sync(path: Path) -> None:
    """Until one file, or the list of a folder's entries, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _named(checkpoint: Path) -> tuple[dict[str, str], list[str]]:
    """File -> hash as the manifest says, and what is wrong with that. Raises OSError where it cannot be read."""
    path = checkpoint / MANIFEST
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        if error.errno in _ABSENT:
            return {}, [f"{MANIFEST} is missing"]
        raise OSError(error.errno, error.strerror, str(path)) from None
    entries = [line.partition("  ") for line in lines]
    problems = [f"{MANIFEST} line {i} is not a hash and a name" for i, (*_, name) in enumerate(entries, 1) if not name]
    return {name: digest for digest, _, name in entries if name}, problems


def _compare(named: Mapping[str, str], problems: Sequence[str], found: Mapping[str, str]) -> list[str]:
    """With what is wrong with the files, where there is a manifest."""
    if not named and problems:
        return list(problems)
    wrong = [_wrong(name, found.get(name, "")) for name, digest in named.items() if found.get(name) != digest]
    unnamed = sorted(name for name in found.keys() - named if found[name] and name.startswith(RESTORED))
    wrong += [f"{name} is not in {MANIFEST}" for name in unnamed]
    return [*problems, *wrong] or ([] if found else ["it holds no files"])


def _wrong(name: str, found: str) -> str:
    if len(found) == _DIGITS:
        return f"{name} is not what was written"
    return f"{name} could not be read ({found})" if found else f"{name} is missing"


def _confirmed(checkpoint: Path, names: Sequence[str], found: Mapping[str, str], alive: Alive) -> list[str]:
    """What is wrong as this process sees it too. Raises OSError where it cannot read a file that is there."""
    named, problems = _named(checkpoint)
    doubted = [name for name, digest in named.items() if found.get(name) != digest]
    again = _hashes(checkpoint, doubted, alive, anew=True)
    for name, content in again.items():
        if content and len(content) != _DIGITS:
            raise OSError(errno.EIO, content, str(checkpoint / name))
        if content == named[name]:
            process = names.index(name) % processes() if name in names else 0
            what = _wrong(name, found.get(name, ""))
            log.warning("%s: to process %d %s, but process 0 reads it as it was written", checkpoint, process, what)
    return _compare(named, problems, {**found, **again})


def _files(folder: Path, *, strict: bool = False) -> list[str]:
    """But for the manifest, and what starts with a dot, as a file system's own leavings do. What cannot be listed is
    left out, or is an OSError where that is `strict`."""

    def refuse(error: OSError) -> None:
        if strict:
            raise error

    paths = [Path(top) / name for top, _, names in os.walk(folder, onerror=refuse) for name in names if name[0] != "."]
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _hashes(folder: Path, names: Sequence[str], alive: Alive = lambda: None, *, anew: bool = False) -> dict[str, str]:
    """File -> hash, "" where there is none, or what the system says where it cannot be read. What it has in its memory
    of a file is not asked where it is to be read `anew`."""

    def digest(name: str) -> str:
        try:
            if anew:
                _forget(folder / name)
            return file_sha256(folder / name)
        except OSError as error:
            return "" if error.errno in _ABSENT else _reason(error)
        except ValueError:  # no name of a file, as in a damaged manifest
            return ""

    found = {}
    with ThreadPoolExecutor() as pool:
        for name, content in zip(names, pool.map(digest, names), strict=True):
            found[name] = content
            alive()
    return found


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reason(error: OSError) -> str:
    return str(error.strerror or error).lower()


def _merged(shares: Sequence[str]) -> dict[str, str]:
    return {name: digest for share in shares for name, digest in json.loads(share).items()}
