"""TokenStore: a corpus as tokens on disk, with an index that says what every document is.

One folder for each source, and a manifest that names each file with its size and hash. The manifest holds nothing but
what follows from the documents and the tokenizer, so its hash, the fingerprint, is the identity of the data.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt32

from eurollm_jax.corpus.folders import read_json
from eurollm_jax.corpus.shards import Shards
from eurollm_jax.errors import UserError

FORMAT = "eurollm token store"
VERSION = 2
MANIFEST_NAME = "manifest.json"

_COMPARED_AT_ONCE = 1 << 16
_HASHED_AT_ONCE = 1 << 22  # bytes


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
    """One source of a store: all its documents back to back, each `[begin, *ids, eos]`, and their index.

    Files are opened when first used; picklable, and opened again after unpickling. The tokens are read, the index is
    mapped into memory.
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
        self._maps: dict[str, np.ndarray] = {}
        self._shards = Shards(folder, name, self.dtype, entry["shards"])

    def __reduce__(self) -> tuple[type["Source"], tuple[Path, str, Mapping[str, Any]]]:
        return Source, (self._folder, self.name, self._entry)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, documents={self.documents}, tokens={self.tokens}, bytes={self.bytes})"

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, " tokens"]:
        """Tokens `start` to `stop` of the stream: all documents one after the other."""
        out = np.empty(max(stop - start, 0), self.dtype)
        self.read_into(out, *np.array([[0], [start], [stop - start]]))
        return out

    def read_into(
        self,
        out: Shaped[np.ndarray, " room"],
        places: Int64[np.ndarray, " n"],
        starts: Int64[np.ndarray, " n"],
        lengths: Int64[np.ndarray, " n"],
        after: Shaped[np.ndarray, " n"] | None = None,
    ) -> None:
        """For each i, `out[places[i] : places[i] + lengths[i]]` becomes the stream from `starts[i]` on, and `after[i]`,
        if it is asked for, the token that follows.

        `out` and `after` are of this source's dtype and contiguous. Raises IndexError for tokens outside of the stream,
        and UserError, with the file's name, when one of the token files is gone, cut short or unreadable.
        """
        last = self.tokens - (after is not None)
        if len(starts) and not (lengths.min() >= 0 and starts.min() >= 0 and (starts + lengths).max() <= last):
            raise IndexError(f"reads outside of the {self.tokens} tokens of source {self.name}")
        if {out.dtype, self.dtype if after is None else after.dtype} != {self.dtype}:
            raise TypeError(f"tokens of source {self.name} are {self.dtype}, and an array is of another type")
        if len(starts):
            self._shards.read_into(out, places, starts, lengths, after)

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

    def urls(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " n+1"], bytes]:
        """The URLs of documents `start` to `stop` as bytes, one after the other, and where in these each ends, 0 first.

        Raises UserError where there are none, as in a Megatron dataset.
        """
        ends = self._load("urls")[start : stop + 1]
        return ends - ends[0], self._mapped("urls.bin")[ends[0] : ends[-1]].tobytes()

    @property
    def has_records(self) -> bool:
        """Whether the documents have ids, hashes, URLs, origins and dates; those of Megatron files have not."""
        return not self._entry.get("megatron", False)

    @property
    def megatron_prefix(self) -> Path | None:
        """The dataset's path without .bin, if this source is one of Megatron's."""
        return None if self.has_records else Path(self._entry["shards"][0]["file"]).with_suffix("")

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
        """`[begin, *ids, eos]` of document `index`."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def find(self, document_id: str) -> Int64[np.ndarray, " found"]:
        """Indices of the documents with this id; none when it is not here."""
        wanted = np.frombuffer(document_id.encode(), np.uint8)
        offsets, blob = self._load("ids"), self._mapped("ids.bin")
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
        if name not in ("offsets", "bytes") and not self.has_records:
            raise UserError(
                f"source {self.name} was taken over from Megatron files, which do not say what their documents are; "
                f"prepare it from text to have its {name}"
            )
        return self._mapped(f"{name}.npy")

    def _mapped(self, file: str) -> np.ndarray:
        """A file of the index, mapped once; its array if it is .npy, else its bytes."""
        if file not in self._maps:
            path = self._folder / file
            if file.endswith(".npy"):
                self._maps[file] = np.load(path, mmap_mode="r").view(np.ndarray)  # slices of a memmap cost more
            else:  # nothing cannot be mapped
                self._maps[file] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        return self._maps[file]

    def _string(self, name: str, index: int) -> str:
        start, end = self._load(name)[index : index + 2]
        return self._mapped(f"{name}.bin")[start:end].tobytes().decode()


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of all that a manifest says beside this hash, which it carries itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class TokenStore:
    """A folder of sources. Open it with `TokenStore.open`; picklable."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        entries = sorted(manifest["sources"].items())
        self.sources = {name: Source(path / name, name, entry) for name, entry in entries}

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> "TokenStore":
        """Open the store in folder `path`, checking that each file is there in its full size, unless `check` is False.

        Raises UserError when it is missing, is no store or of another version, or a file is not in its full size.
        """
        if not path.is_dir():
            raise UserError(f"there is no token store at {path}; make one with 'eurollm corpus prepare'")
        if not (path / MANIFEST_NAME).is_file():
            raise UserError(f"{path} is not a token store: it has no {MANIFEST_NAME}")
        manifest = read_json(path / MANIFEST_NAME)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} is not a token store: its {MANIFEST_NAME} is of something else")
        version = manifest.get("version")
        if version != VERSION and version is not None:
            raise UserError(
                f"{path} is a token store of version {version}, and this program reads version "
                f"{VERSION}; use the program that wrote it, or prepare the store again"
            )
        if manifest.get("sha256") != manifest_sha256(manifest):
            raise UserError(
                f"{path / MANIFEST_NAME} is damaged (its own hash does not fit); restore it or prepare the store again"
            )
        store = cls(path, manifest)
        if check:
            for file, entry in store._files():
                if fault := _size_fault(file, entry["size"]):
                    raise UserError(f"{file} {fault}; prepare the store again")
        return store

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, dict[str, Any]]]:
        return TokenStore, (self.path, self.manifest)

    @property
    def tokenizer_sha256(self) -> str:
        """`Tokenizer.sha256`, in hex."""
        return self.manifest["tokenizer"]["sha256"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def fingerprint(self) -> str:
        """`manifest_sha256` of the manifest. Stores of the same documents and tokenizer have the same."""
        return self.manifest["sha256"]

    def verify(self, report: Callable[[int], None] = lambda _: None, threads: int | None = None) -> None:
        """Read and hash every file.

        Raises UserError that names each file that is missing, cut short or not as it was written. `report` is called
        with the bytes read since it was last called, by one thread at a time; they add up to `size` for a sound store.
        `threads` is every core this process may use unless it is given.
        """
        lock = Lock()

        def locked(count: int) -> None:
            with lock:
                report(count)

        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            faults = [*pool.map(lambda file: _file_fault(file[0], file[1], locked), self._files())]
        found = [
            f"{self._shown(file)} {fault}" for (file, _), fault in zip(self._files(), faults, strict=True) if fault
        ]
        if found:
            raise UserError(
                f"{self.path} is damaged: {'; '.join(found)}. Restore these files or prepare the store again"
            )

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry["size"] for _, entry in self._files())

    def _shown(self, file: Path) -> Path:
        return file.relative_to(self.path) if file.is_relative_to(self.path) else file

    def _files(self) -> list[tuple[Path, dict[str, Any]]]:
        return [
            (self.path / name / file, entry)
            for name, source in self.manifest["sources"].items()
            for file, entry in source["files"].items()
        ]


def _size_fault(file: Path, size: int) -> str | None:
    if not file.is_file():
        return "is missing"
    there = file.stat().st_size
    return None if there == size else f"has {there} bytes and should have {size}"


def _file_fault(file: Path, entry: Mapping[str, Any], report: Callable[[int], None]) -> str | None:
    """What is wrong with a file, as half a sentence."""
    if fault := _size_fault(file, entry["size"]):
        return fault
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as content:
            while piece := content.read(_HASHED_AT_ONCE):
                digest.update(piece)
                report(len(piece))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest.hexdigest() == entry["sha256"] else "is not as it was written"
