"""StoreWriter: writes a token store document by document, in memory that does not grow with the corpus' text."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from eurollm_jax.corpus.folders import file_sha256, write_json
from eurollm_jax.corpus.reading.sources import Document
from eurollm_jax.corpus.store import FORMAT, MANIFEST_NAME, VERSION, manifest_sha256

SHARD_TOKENS = 1 << 32
"""A source's tokens are cut, between documents, into files of at most this many, or of one longer document: parallel
file systems dislike many small files, and a damaged or lost one should not be the whole source."""

TEXTS = ("ids", "urls", "collected")
"""Columns of strings: where each ends is in a .npy file, which begins with 0, their bytes are in a .bin file."""

COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "offsets": (np.dtype("<i8"), ()),
    "bytes": (np.dtype("<i8"), ()),
    "sha256": (np.dtype("u1"), (32,)),
    "origins": (np.dtype("<u4"), ()),
    **{name: (np.dtype("<i8"), ()) for name in TEXTS},
}
"""A source's columns, one row a document, with their dtype and the shape of a row."""

MERGE_COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "characters": (np.dtype("<i8"), ()),
    "fallback": (np.dtype("<i8"), ()),
    "positions": (np.dtype("<i8"), ()),
}
"""What a merge of stores needs beside, when it drops documents: their counts, and their place among all sources'."""

_BUFFERED_BYTES = 1 << 23
_DOCUMENT_COST = 512  # bytes that an open document takes in Python's lists, about


class StoreWriter:
    """Writes into the empty folder `folder`; the store is whole once `close` has returned.

    Token ids are little-endian uint16 where the vocabulary allows it, else uint32. `for_merging` adds the
    `MERGE_COLUMNS`. What is buffered is bounded for all sources together, however many there are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
        for_merging: bool = False,
    ) -> None:
        self._folder = folder
        self._tokenizer = {"sha256": tokenizer_sha256, "vocab_size": vocab_size}
        self._columns = COLUMNS | (MERGE_COLUMNS if for_merging else {})
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._sources: dict[str, _SourceWriter] = {}
        self._buffered = self._documents = 0

    def add(
        self,
        source: str,
        document: Document,
        tokens: Integer[np.ndarray, " tokens"],
        *,
        byte_length: int,
        characters: int,
        fallback: int,
        sha256: bytes,
    ) -> None:
        """Append a document to `source`.

        `tokens` are the whole of it, `[begin, *ids, eos]`; `byte_length`, `characters` and `sha256` are those of its
        text in UTF-8; `fallback` is how many tokens stand for one byte because no piece covers the character.
        """
        vocab_size = self._tokenizer["vocab_size"]
        if tokens.max() >= vocab_size or (tokens.dtype.kind != "u" and tokens.min() < 0):
            raise ValueError(f"token ids of document {document.id} are outside the vocabulary of {vocab_size}")
        if source not in self._sources:
            folder = self._folder / source
            self._sources[source] = _SourceWriter(
                folder, document.language, self._dtype, self._shard_tokens, self._columns
            )
        values = {"bytes": byte_length, "characters": characters, "fallback": fallback, "positions": self._documents}
        self._sources[source].add(document, tokens, values, sha256)
        self._documents += 1
        self._buffered += len(tokens) * self._dtype.itemsize + _DOCUMENT_COST
        if self._buffered >= _BUFFERED_BYTES:
            for writer in self._sources.values():
                writer.flush()
            self._buffered = 0

    def close(self) -> None:
        """Write what is buffered, and the manifest."""
        entries = {name: source.close() for name, source in sorted(self._sources.items())}
        write_manifest(self._folder, self._tokenizer, entries)


def write_manifest(folder: Path, tokenizer: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of a store whose files are all there."""
    value = {"format": FORMAT, "version": VERSION, "tokenizer": dict(tokenizer), "sources": dict(sources)}
    write_json(folder / MANIFEST_NAME, value | {"sha256": manifest_sha256(value)})


def token_dtype(vocab_size: int) -> np.dtype:
    """How a store of this vocabulary writes a token: little-endian uint16, or uint32 where that is too small."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(number: int) -> str:
    """The file of a source's shard, counted from 0."""
    return f"tokens-{number:05}.bin"


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file begins with. Of the same length for any number of rows: numpy leaves room for it to grow."""
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


class _SourceWriter:
    """Files are opened for each flush, since a store of many sources would run out of file handles."""

    def __init__(
        self,
        folder: Path,
        language: str,
        dtype: np.dtype,
        shard_tokens: int,
        columns: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._language, self._dtype, self._shard_tokens = folder, language, dtype, shard_tokens
        self._columns = {name: _Column(folder / f"{name}.npy", *kind) for name, kind in columns.items()}
        self._rows: list[tuple[Any, ...]] = []  # of the columns in their order, not yet written
        self._tokens: list[bytes] = []  # of the last shard, not yet written
        self._texts: dict[str, list[bytes]] = {name: [] for name in TEXTS}
        self._written = dict.fromkeys(("offsets", *TEXTS), 0)  # so far, what is buffered included
        self._shards: list[dict[str, Any]] = [{"file": shard_name(0), "tokens": 0}]
        self._sums = {"characters": 0, "fallback": 0}
        self._origins: dict[tuple[str, str], dict[str, Any]] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        for name in self._written:
            self._columns[name].append([0])
        self.flush()

    def add(self, document: Document, tokens: np.ndarray, values: Mapping[str, int], sha256: bytes) -> None:
        for name in self._sums:
            self._sums[name] += values[name]
        key = (document.source, document.licence)
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == len(self._origins):
            self._origins[key] = {"origin": key[0], "licence": key[1], "documents": 0, "bytes": 0}
        self._origins[key]["documents"] += 1
        self._origins[key]["bytes"] += values["bytes"]

        if self._shards[-1]["tokens"] > 0 and self._shards[-1]["tokens"] + len(tokens) > self._shard_tokens:
            self.flush()
            self._shards.append({"file": shard_name(len(self._shards)), "tokens": 0})
        self._shards[-1]["tokens"] += len(tokens)
        self._tokens.append(tokens.astype(self._dtype, copy=False).tobytes())

        self._written["offsets"] += len(tokens)
        for name, text in zip(TEXTS, (document.id, document.url, document.collected), strict=True):
            self._texts[name].append(text.encode())
            self._written[name] += len(self._texts[name][-1])
        row = {**values, "sha256": sha256, "origins": number, **self._written}
        self._rows.append(tuple([row[name] for name in self._columns]))

    def flush(self) -> None:
        with (self._folder / self._shards[-1]["file"]).open("ab") as file:
            file.writelines(self._tokens)
        self._tokens.clear()
        for name, texts in self._texts.items():
            with (self._folder / f"{name}.bin").open("ab") as file:
                file.writelines(texts)
            texts.clear()
        for column, rows in zip(self._columns.values(), zip(*self._rows, strict=True), strict=False):
            column.append(rows)
        self._rows.clear()

    def close(self) -> Mapping[str, Any]:
        """Write the rest and return this source's entry in the manifest."""
        self.flush()
        for column in self._columns.values():
            column.finish()
        origins = list(self._origins.values())
        return {
            "language": self._language,
            "dtype": self._dtype.name,
            "documents": sum(origin["documents"] for origin in origins),
            "tokens": self._written["offsets"],
            "bytes": sum(origin["bytes"] for origin in origins),
            **self._sums,
            "shards": self._shards,
            "origins": origins,
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(self._folder.iterdir())
                if file.is_file()
            },
        }


class _Column:
    """A .npy file that grows along its first axis."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self._path, self._dtype, self._row_shape = path, dtype, row_shape
        self._rows = 0
        path.write_bytes(npy_header(dtype, (0, *row_shape)))

    def append(self, rows: Sequence[Any]) -> None:
        """Rows of numbers, or of bytes that are a row each."""
        with self._path.open("ab") as file:
            file.write(b"".join(rows) if self._row_shape else np.array(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def finish(self) -> None:
        with self._path.open("r+b") as file:
            file.write(npy_header(self._dtype, (self._rows, *self._row_shape)))
