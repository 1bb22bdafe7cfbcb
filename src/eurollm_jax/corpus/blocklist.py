"""Block-lists: documents that must not be trained on, named by the hash of their text or by their address.

Applied when a store is prepared, and to a store that is there already, whose documents are then left out from a stated
row on.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.corpus.store import Source
from eurollm_jax.errors import UserError

_AT_ONCE = 1 << 16
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Blocklist:
    """What a block-list file says. `sha256` is that of the file, in hex."""

    hashes: frozenset[bytes]
    urls: frozenset[str]
    sha256: str

    @classmethod
    def load(cls, path: Path) -> "Blocklist":
        """Read a file with one entry a line: a SHA-256 of a text in UTF-8 as 64 hexadecimal digits, or a URL.

        A URL blocks the documents with exactly that URL. What follows a `#` at the start of a line or after a space is
        a comment. Raises UserError for a file that is missing or not UTF-8, and for a line that is neither.
        """
        if not path.is_file():
            raise UserError(f"there is no block-list at {path}; give a file with one SHA-256 or URL a line")
        hashes, urls = set(), set()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {error.start + 1}); convert it to UTF-8") from None
        for number, line in enumerate(lines, 1):
            entry = "" if line.lstrip().startswith("#") else line.split(" #")[0].split("\t#")[0].strip()
            if not entry:
                continue
            if len(entry) == 64 and _HEX.issuperset(entry.lower()):
                hashes.add(bytes.fromhex(entry))
            elif "://" in entry and not any(map(str.isspace, entry)):
                urls.add(entry)
            else:
                reason = f"{entry[:80]!r} is neither a SHA-256 of 64 hexadecimal digits nor a URL"
                raise UserError(f"{path}, line {number}: {reason}; mend or remove the line")
        return cls(frozenset(hashes), frozenset(urls), file_sha256(path))

    def blocks(self, sha256: bytes, url: str) -> bool:
        """Whether the list names a document by the `sha256` of its text, 32 bytes, or by its `url`."""
        return sha256 in self.hashes or url in self.urls

    def find(self, source: Source) -> Int64[np.ndarray, " found"]:
        """The documents of `source` that the list names, by their index in it, ascending.

        Raises UserError for a Megatron source, which says neither hash nor URL of its documents.
        """
        if not source.has_records:
            what = f"source {source.name} says neither hashes nor URLs of its documents"
            raise UserError(f"{what}, so no block-list can be applied to it; prepare its text again")
        found = [np.empty(0, np.int64)]
        if self.hashes:
            wanted = np.unique(np.frombuffer(b"".join(sorted(self.hashes)), np.uint64).reshape(-1, 4)[:, 0])
            keys = np.ascontiguousarray(source.sha256[:, :8]).view(np.uint64)[:, 0]
            likely = np.flatnonzero(_member(keys, wanted))
            found.append(np.array([i for i in likely.tolist() if source.sha256[i].tobytes() in self.hashes], np.int64))
        if self.urls:
            found.append(_with_url(source, self.urls))
        return np.unique(np.concatenate(found))


def _member(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values


def _with_url(source: Source, urls: frozenset[str]) -> Int64[np.ndarray, " found"]:
    wanted = {url.encode() for url in urls}
    lengths = np.unique([len(url) for url in wanted])
    found: list[int] = []
    for first in range(0, source.documents, _AT_ONCE):
        ends, text = source.urls(first, first + _AT_ONCE)
        for i in np.flatnonzero(_member(np.diff(ends), lengths)).tolist():
            if text[ends[i] : ends[i + 1]] in wanted:
                found.append(first + i)
    return np.array(found, np.int64)
