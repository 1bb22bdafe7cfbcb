"""TokenStore: a corpus as tokens on disk, mapped into memory, with an index that says what every document is.

One folder for each source, and a manifest that names each file with its size and hash. The manifest holds nothing but
what follows from the documents and the tokenizer, so its hash, the fingerprint, is the identity of the data.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt32

from eurollm_jax.corpus.folders import file_sha256, read_json
from eurollm_jax.errors import UserError

FORMAT = "eurollm token store"
VERSION = 2
MANIFEST_NAME = "manifest.json"

_COMPARED_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """What the store knows of one document beside its tokens."""

    id: str
    sha256: str  # of the UTF-8 text, in hex
    origin: str  # the `source` of the Document it came from
    licence: str
    url: str
    collected: str


class Source:
    """One source of a store: all its documents back to back, each `[bos, *ids, eos]`, and their index.

    Files are mapped when first used; picklable, and mapped again after unpickling.
    """

    def __init__(self, folder: Path, name: str, entry: Mapping[str, Any]) -> None:
        self.name = name
        self._folder, self._entry = folder, entry
        self.language: str = entry["language"]
        self.documents: int = entry["documents"]
        self.tokens: int = entry["tokens"]
        self.bytes: int = entry["bytes"]
        self.characters: int = entry["characters"]
        self.fallback: int = entry["fallback"]
        self.dtype = np.dtype(entry["dtype"])

    def __reduce__(self) -> tuple[type["Source"], tuple[Path, str, Mapping[str, Any]]]:
        return Source, (self._folder, self.name, self._entry)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, documents={self.documents}, tokens={self.tokens}, bytes={self.bytes})"

    @cached_property
    def _shards(self) -> tuple[list[np.memmap], np.ndarray]:
        """Each shard's tokens, and where in the stream each begins, and the last ends."""
        shards = [np.memmap(self._folder / shard["file"], self.dtype, mode="r") for shard in self._entry["shards"]]
        return shards, np.cumsum([0, *(shard["tokens"] for shard in self._entry["shards"])])

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, " tokens"]:
        """Tokens `start` to `stop` of the stream: all documents one after the other."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of source {self.name}, which has {self.tokens}")
        shards, begins = self._shards
        first = int(np.searchsorted(begins, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(begins[first + 1]))
            parts.append(shards[first][start - begins[first] : end - begins[first]])
            start, first = end, first + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def read_into(
        self,
        out: Shaped[np.ndarray, " room"],
        places: Int64[np.ndarray, " n"],
        starts: Int64[np.ndarray, " n"],
        lengths: Int64[np.ndarray, " n"],
    ) -> None:
        """For each i, `out[places[i] : places[i] + lengths[i]]` becomes the stream from `starts[i]` on.

        `out` is of this source's dtype and contiguous.
        """
        for place, start, length in zip(places.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            out[place : place + length] = self.read(start, start + length)

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " documents+1"]:
        """Where in the stream each document begins; the last entry is `tokens`."""
        return self._load("offsets")

    @cached_property
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of each document's text."""
        return self._load("bytes")

    @cached_property
    def sha256(self) -> UInt8[np.ndarray, "documents 32"]:
        """SHA-256 of each document's UTF-8 text."""
        return self._load("sha256")

    @cached_property
    def origins(self) -> UInt32[np.ndarray, " documents"]:
        """Index of each document's origin in `origin_table`."""
        return self._load("origins")

    @property
    def origin_table(self) -> list[dict[str, Any]]:
        """The pairs of `origin` and `licence` that occur, with the `documents` and `bytes` of each."""
        return self._entry["origins"]

    @property
    def licences(self) -> dict[str, dict[str, int]]:
        """Licence -> its `documents` and `bytes` in this source."""
        sums: dict[str, dict[str, int]] = {}
        for origin in self.origin_table:
            entry = sums.setdefault(origin["licence"], {"documents": 0, "bytes": 0})
            for key in entry:
                entry[key] += origin[key]
        return dict(sorted(sums.items()))

    def document(self, index: int) -> StoredDocument:
        """What is known of document `index`, from 0 to `documents` - 1; IndexError outside."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of source {self.name}, which has {self.documents}")
        origin = self.origin_table[self.origins[index]]
        return StoredDocument(
            id=self._string("ids", index),
            sha256=self.sha256[index].tobytes().hex(),
            origin=origin["origin"],
            licence=origin["licence"],
            url=self._string("urls", index),
            collected=self._string("collected", index),
        )

    def document_tokens(self, index: int) -> Shaped[np.ndarray, " tokens"]:
        """`[bos, *ids, eos]` of document `index`."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def find(self, document_id: str) -> Int64[np.ndarray, " found"]:
        """Indices of the documents with this id; none when it is not here."""
        wanted = np.frombuffer(document_id.encode(), np.uint8)
        offsets, blob = self._load("ids"), self._blob("ids")
        candidates = np.flatnonzero(np.diff(offsets) == len(wanted))
        found = [np.empty(0, np.int64)]
        for start in range(0, len(candidates), _COMPARED_AT_ONCE):
            some = candidates[start : start + _COMPARED_AT_ONCE]
            same = (blob[offsets[some, None] + np.arange(len(wanted))] == wanted).all(axis=1)
            found.append(some[same])
        return np.concatenate(found)

    def find_sha256(self, sha256: str) -> Int64[np.ndarray, " found"]:
        """Indices of the documents whose UTF-8 text has this SHA-256, in hex. Raises UserError for anything else."""
        try:
            wanted = np.frombuffer(bytes.fromhex(sha256), np.uint8)
        except ValueError:
            wanted = np.empty(0, np.uint8)
        if len(wanted) != 32:
            raise UserError(f"{sha256!r} is not a SHA-256; give its 64 hexadecimal digits")
        candidates = np.flatnonzero(self.sha256.view(np.uint64)[:, 0] == wanted.view(np.uint64)[0])
        return candidates[(self.sha256[candidates] == wanted).all(axis=1)]

    def _load(self, name: str) -> np.ndarray:
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")

    def _blob(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        path = self._folder / f"{name}.bin"
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)

    def _string(self, name: str, index: int) -> str:
        start, end = self._load(name)[index : index + 2]
        return self._blob(name)[start:end].tobytes().decode()


class TokenStore:
    """A folder of sources. Open it with `TokenStore.open`; picklable."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        entries = sorted(manifest["sources"].items())
        self.sources = {name: Source(path / name, name, entry) for name, entry in entries}

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Open the store in folder `path`, checking that each file is there in its full size.

        Raises UserError when it is missing, is no store or of another version, or a file is not in its full size.
        """
        if not path.is_dir():
            raise UserError(f"there is no token store at {path}; make one with 'eurollm corpus prepare'")
        if not (path / MANIFEST_NAME).is_file():
            raise UserError(f"{path} is not a token store: it has no {MANIFEST_NAME}")
        manifest = read_json(path / MANIFEST_NAME)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} is not a token store: its {MANIFEST_NAME} is of something else")
        if manifest["version"] != VERSION:
            raise UserError(
                f"{path} is a token store of version {manifest['version']}, and this program reads version {VERSION}; "
                "use the program that wrote it, or prepare the store again"
            )
        store = cls(path, manifest)
        for file, entry in store._files():
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise UserError(f"{file} is missing; prepare the store again")
            if size != entry["size"]:
                raise UserError(f"{file} has {size} bytes and should have {entry['size']}; prepare the store again")
        return store

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, dict[str, Any]]]:
        return TokenStore, (self.path, self.manifest)

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer's model file, in hex."""
        return self.manifest["tokenizer"]["sha256"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, in hex. Stores of the same documents and tokenizer have the same."""
        canonical = json.dumps(self.manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def verify(self) -> None:
        """Read and hash every file. Raises UserError naming those that are not as they were written."""
        damaged = [
            str(file.relative_to(self.path)) for file, entry in self._files() if file_sha256(file) != entry["sha256"]
        ]
        if damaged:
            raise UserError(f"{self.path} is damaged in {', '.join(damaged)}; prepare the store again")

    def _files(self) -> list[tuple[Path, dict[str, Any]]]:
        return [
            (self.path / name / file, entry)
            for name, source in self.manifest["sources"].items()
            for file, entry in source["files"].items()
        ]
