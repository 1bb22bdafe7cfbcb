"""Whether input files are still those that were read: by their status where that has not changed, else by content.

Hashing terabytes only to find nothing changed would take hours, and trusting sizes and dates alone would take a changed
file for the one that was read.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eurollm_jax.corpus.reading.sources import Part, part_files
from eurollm_jax.errors import UserError

_CHUNK_BYTES = 1 << 22

Record = dict[str, Any]
"""Of one file: `status` is its size, times of modification and change in ns, and inode; `hashes` are
`[first, stop, SHA-256 in hex]` of ranges of its bytes."""


def file_names(parts: Iterable[Part]) -> dict[Path, str]:
    """Each file of `parts` with its name below the folder that holds them all: the same wherever that folder lies."""
    files = dict.fromkeys(Path(os.path.abspath(file)) for part in parts for file in part_files(part))
    if not files:
        return {}
    folder = os.path.commonpath([file.parent for file in files])
    return {file: str(file.relative_to(folder)) for file in files}


def read_records(parts: Iterable[Part], names: Mapping[Path, str]) -> dict[str, Record]:
    """Name -> record of each file of `parts`, hashed as far as the parts reach. UserError for an unreadable one."""
    records: dict[str, Record] = {}
    for part in parts:
        for file in map(_absolute, part_files(part)):
            try:
                before = status(file)
                first, stop = _range(part, before[0])
                record = records.setdefault(names[file], {"status": before, "hashes": []})
                if [first, stop] not in [found[:2] for found in record["hashes"]]:
                    record["hashes"].append([first, stop, _hashed_once(file, first, stop, *before)])
            except OSError as error:
                why = (error.strerror or "").lower()
                raise UserError(f"{file} cannot be read ({why}); mend that and run the same command again") from None
    return records


def check_still(parts: Iterable[Part], names: Mapping[Path, str], records: Mapping[str, Record]) -> None:
    """Raises UserError when a file has another status than when `records` were made, a moment ago."""
    for file in dict.fromkeys(_absolute(file) for part in parts for file in part_files(part)):
        if status(file) != records[names[file]]["status"]:
            raise UserError(f"{file} changed while it was read; run the same command again once nothing writes to it")


def change(file: Path, record: Record) -> str:
    """What about `file` differs from its `record`, as half a sentence; "" when its content is the same."""
    try:
        now = status(file)
    except FileNotFoundError:
        return f"{file} is missing now"
    if now == record["status"]:
        return ""
    if now[0] != record["status"][0]:
        return f"{file} differs ({record['status'][0]:,} bytes then, {now[0]:,} now)"
    for first, stop, sha256 in record["hashes"]:
        if (found := _sha256(file, first, stop)) != sha256:
            return f"{file} differs ({sha256[:12]} then, {found[:12]} now)"
    return ""


def merged(records: Iterable[Mapping[str, Record]]) -> dict[str, Record]:
    """All hashes of each file, whose content is known to be the same in all `records`; the status is the last one."""
    result: dict[str, Record] = {}
    for each in records:
        for name, record in each.items():
            there = result.get(name, {"hashes": []})["hashes"]
            hashes = there + [found for found in record["hashes"] if found not in there]
            result[name] = {"status": record["status"], "hashes": hashes}
    return result


def status(file: Path) -> list[int]:
    """What changes when a file is written to, touched, copied or replaced."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _range(part: Part, size: int) -> tuple[int, int]:
    """The bytes that the part reads where parts are cut by bytes; of other formats all of the file."""
    if part.input.endswith(".jsonl"):
        return part.first, size if part.stop is None else part.stop
    return 0, size


def _absolute(file: Path) -> Path:
    return Path(os.path.abspath(file))


@functools.lru_cache(maxsize=256)
def _hashed_once(file: Path, first: int, stop: int, *_: int) -> str:
    """`_sha256` of a file of this status: a process that reads it part by part need not hash it for each."""
    return _sha256(file, first, stop)


def _sha256(file: Path, first: int, stop: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(first)
        while first < stop and (chunk := opened.read(min(_CHUNK_BYTES, stop - first))):
            digest.update(chunk)
            first += len(chunk)
    return digest.hexdigest()
