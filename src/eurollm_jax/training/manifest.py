"""The hashes of a checkpoint's files, which tell a sound one from a damaged one.

Orbax loads a file with a flipped bit as wrong weights, without a word. So each checkpoint carries `MANIFEST.sha256`,
one line per file in the format that `sha256sum --check` reads, and a file that it does not name is a fault as well: a
manifest that has lost lines is noticed by the files. Several processes share the reading.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.parallel.messages import collected, process_number, processes, told

MANIFEST = "MANIFEST.sha256"
RESTORED = ("state/", "progress/", "about.json")  # what is read of a checkpoint; people may add files beside it

_DIGITS = 64  # of a hash


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder, a line for each file; empty where it is sound."""
    return _compare(checkpoint, _hashes(checkpoint, _files(checkpoint)))


def agreed_faults(checkpoint: Path, topic: str) -> list[str]:
    """The same, in all processes: each reads some of the files that the first one sees."""
    names = json.loads(told(topic, json.dumps(_files(checkpoint))))
    shares = collected(topic, json.dumps(_hashes(checkpoint, names[process_number() :: processes()])))
    problems = [] if process_number() else _compare(checkpoint, _merged(shares))
    found: list[str] = json.loads(told(topic, json.dumps(problems)))
    return found


def agreed_hashes(folder: Path, topic: str) -> dict[str, str]:
    """File -> hash of all files, for the first process, which writes them down; each has read some."""
    names = json.loads(told(topic, json.dumps(_files(folder))))
    return _merged(collected(topic, json.dumps(_hashes(folder, names[process_number() :: processes()]))))


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """The last file of a checkpoint. Raises OSError where one of the others could not be read."""
    if unread := [f"{name}: {digest}" for name, digest in hashes.items() if len(digest) != _DIGITS]:
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


def _compare(checkpoint: Path, found: Mapping[str, str]) -> list[str]:
    try:
        lines = (checkpoint / MANIFEST).read_text(errors="replace").splitlines()
    except OSError as error:
        return [f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else f"{MANIFEST}: {error.strerror}"]
    problems, named = [], set()
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition("  ")
        named.add(name)
        if not name:
            problems.append(f"{MANIFEST} line {number} is not a hash and a name")
        elif name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != digest:
            problems.append(
                f"{name} is not what was written" if len(found[name]) == _DIGITS else f"{name}: {found[name]}"
            )
    unnamed = sorted(name for name in found.keys() - named if name.startswith(RESTORED))
    problems += [f"{name} is not in {MANIFEST}" for name in unnamed]
    return problems or ([] if found else ["it holds no files"])


def _files(folder: Path) -> list[str]:
    """But for the manifest, and what starts with a dot, as a file system's own leavings do."""
    with suppress(OSError):  # what is not found is missing
        paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)
    return []


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """File -> hash, or what the system says where it cannot be read; without those that are gone."""

    def digest(name: str) -> str | None:
        with suppress(FileNotFoundError):  # a run that trains removes old ones
            try:
                return file_sha256(folder / name)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                return str(error.strerror).lower()
        return None

    with ThreadPoolExecutor() as pool:
        found = zip(names, pool.map(digest, names), strict=True)
        return {name: content for name, content in found if content is not None}


def _merged(shares: Sequence[str]) -> dict[str, str]:
    return {name: digest for share in shares for name, digest in json.loads(share).items()}
