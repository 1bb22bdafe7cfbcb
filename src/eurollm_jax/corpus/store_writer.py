"""StoreWriter: writes a token store document by document, in memory that does not grow with the corpus' text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from eurollm_jax.corpus.folders import file_sha256, write_json
from eurollm_jax.corpus.sources import Document
from eurollm_jax.corpus.store import FORMAT, MANIFEST_NAME, VERSION

SHARD_TOKENS = 1 << 32
"""A source's tokens are cut, between documents, into files of about this many: parallel file systems dislike many small
files, and a damaged or lost one should not be the whole source."""

_BUFFERED_TOKENS = 1 << 20


class StoreWriter:
    """Writes into the empty folder `folder`; the store is whole once `close` has returned.

    Token ids are little-endian uint16 where the vocabulary allows it, else uint32.
    """

    def __init__(
        self, folder: Path, *, tokenizer_sha256: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder = folder
        self._tokenizer = {"sha256": tokenizer_sha256, "vocab_size": vocab_size}
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._shard_tokens = shard_tokens
        self._sources: dict[str, _SourceWriter] = {}

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

        `tokens` are the whole of it, `[bos, *ids, eos]`; `byte_length`, `characters` and `sha256` are those of its
        text in UTF-8; `fallback` is how many tokens stand for one byte because no piece covers the character.
        """
        vocab_size = self._tokenizer["vocab_size"]
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"token ids of document {document.id} are outside the vocabulary of {vocab_size}")
        if source not in self._sources:
            self._sources[source] = _SourceWriter(
                self._folder / source, document.language, self._dtype, self._shard_tokens
            )
        self._sources[source].add(document, tokens, byte_length, characters, fallback, sha256)

    def close(self) -> None:
        """Write what is buffered, and the manifest."""
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self._tokenizer,
            "sources": {name: source.close() for name, source in sorted(self._sources.items())},
        }
        write_json(self._folder / MANIFEST_NAME, manifest)


_TEXTS = ("ids", "urls", "collected")  # columns of strings: where each ends in the .npy file, their bytes in the .bin


class _SourceWriter:
    def __init__(self, folder: Path, language: str, dtype: np.dtype, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._language, self._dtype, self._shard_tokens = folder, language, dtype, shard_tokens
        self._columns = {
            "offsets": _Column(folder / "offsets.npy", np.dtype("<i8"), (), [0]),
            "bytes": _Column(folder / "bytes.npy", np.dtype("<i8"), (), []),
            "sha256": _Column(folder / "sha256.npy", np.dtype("u1"), (32,), []),
            "origins": _Column(folder / "origins.npy", np.dtype("<u4"), (), []),
            "ids": _Column(folder / "ids.npy", np.dtype("<i8"), (), [0]),
            **{name: _Column(folder / f"{name}.npy", np.dtype("<i8"), (), [0]) for name in _TEXTS},
        }
        self._pending_tokens: list[np.ndarray] = []
        self._pending_text: dict[str, list[bytes]] = {name: [] for name in _TEXTS}
        self._written = dict.fromkeys(("tokens", *_TEXTS), 0)  # so far, the pending ones included
        self._flushed_tokens = self._characters = self._fallback = 0
        self._shards: list[dict[str, Any]] = []
        self._origins: dict[tuple[str, str], dict[str, Any]] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._flush()

    def add(
        self,
        document: Document,
        tokens: np.ndarray,
        byte_length: int,
        characters: int,
        fallback: int,
        sha256: bytes,
    ) -> None:
        self._characters += characters
        self._fallback += fallback
        key = (document.source, document.licence)
        number = self._numbers.setdefault(key, len(self._numbers))
        origin = self._origins.setdefault(
            key, {"origin": document.source, "licence": document.licence, "documents": 0, "bytes": 0}
        )
        origin["documents"] += 1
        origin["bytes"] += byte_length

        self._pending_tokens.append(tokens.astype(self._dtype))
        self._written["tokens"] += len(tokens)
        self._columns["offsets"].pending.append(self._written["tokens"])
        self._columns["bytes"].pending.append(byte_length)
        self._columns["sha256"].pending.append(np.frombuffer(sha256, np.uint8))
        self._columns["origins"].pending.append(number)
        for name, text in zip(_TEXTS, (document.id, document.url, document.collected), strict=True):
            self._pending_text[name].append(text.encode())
            self._written[name] += len(self._pending_text[name][-1])
            self._columns[name].pending.append(self._written[name])
        if self._written["tokens"] - self._flushed_tokens >= min(_BUFFERED_TOKENS, self._shard_tokens):
            self._flush()

    def close(self) -> Mapping[str, Any]:
        """Write the rest and return this source's entry in the manifest."""
        self._flush()
        for column in self._columns.values():
            column.finish()
        origins = list(self._origins.values())
        return {
            "language": self._language,
            "dtype": self._dtype.name,
            "documents": sum(origin["documents"] for origin in origins),
            "tokens": self._written["tokens"],
            "bytes": sum(origin["bytes"] for origin in origins),
            "characters": self._characters,
            "fallback": self._fallback,
            "shards": self._shards,
            "origins": origins,
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(self._folder.iterdir())
            },
        }

    def _flush(self) -> None:
        # Files are opened for each flush, since a store of many sources would run out of file handles.
        if not self._shards or self._shards[-1]["tokens"] >= self._shard_tokens:
            self._shards.append({"file": f"tokens-{len(self._shards):05}.bin", "tokens": 0})
        with (self._folder / self._shards[-1]["file"]).open("ab") as file:
            file.writelines(tokens.tobytes() for tokens in self._pending_tokens)
        self._shards[-1]["tokens"] += self._written["tokens"] - self._flushed_tokens
        for name, pending in self._pending_text.items():
            with (self._folder / f"{name}.bin").open("ab") as file:
                file.writelines(pending)
            pending.clear()
        for column in self._columns.values():
            column.flush()
        self._pending_tokens.clear()
        self._flushed_tokens = self._written["tokens"]


class _Column:
    """A .npy file that grows along its first axis: numpy leaves room in the header for a larger number of rows."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...], first: list[Any]) -> None:
        self._path, self._dtype, self._row_shape = path, dtype, row_shape
        self.pending: list[Any] = first
        self._rows = 0
        with path.open("wb") as file:
            self._write_header(file)

    def flush(self) -> None:
        with self._path.open("ab") as file:
            rows = np.array(self.pending, self._dtype).reshape(-1, *self._row_shape)
            file.write(rows.tobytes())
        self._rows += len(rows)
        self.pending.clear()

    def finish(self) -> None:
        with self._path.open("r+b") as file:
            self._write_header(file)

    def _write_header(self, file: Any) -> None:
        shape = (self._rows, *self._row_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
