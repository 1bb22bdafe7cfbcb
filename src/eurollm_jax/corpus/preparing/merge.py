"""One source of a store out of the same source of many units: read once, in sequence, checked and hashed on the way.

The result is what one `StoreWriter` would have written of all documents in order, byte for byte.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from eurollm_jax.corpus.store_writer import COLUMNS, TEXTS, npy_header, shard_name
from eurollm_jax.errors import UserError

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Piece:
    """A source of a unit: its folder, its entry in the unit's manifest, and the positions (see `MERGE_COLUMNS`) of the
    unit's documents to leave out, ascending."""

    folder: Path
    entry: Mapping[str, Any]
    dropped: Int64[np.ndarray, " dropped"]

    def column(self, name: str) -> np.ndarray:
        """A column of the source, checked against the hash in its entry."""
        return np.load(io.BytesIO(self.content(f"{name}.npy")))

    def content(self, file: str) -> bytes:
        """All of a file, checked."""
        return b"".join(self.chunks(file))

    def chunks(self, file: str) -> Iterator[bytes]:
        """A file in pieces. Raises UserError, at its end, when it is not as it was written."""
        digest, path = hashlib.sha256(), self.folder / file
        try:
            with path.open("rb") as opened:
                while chunk := opened.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
        except FileNotFoundError:
            raise UserError(f"{path} is missing; delete its unit's folder and prepare again") from None
        if digest.hexdigest() != self.entry["files"][file]["sha256"]:
            raise UserError(f"{path} is damaged; delete its unit's folder and prepare again")

    def keep(self) -> Bool[np.ndarray, " documents"]:
        """Which documents stay."""
        if not len(self.dropped):
            return np.ones(self.entry["documents"], bool)
        return ~np.isin(self.column("positions"), self.dropped, assume_unique=True)


def merge_source(
    folder: Path, pieces: Sequence[Piece], shard_tokens: int, tick: Callable[[int], None]
) -> dict[str, Any] | None:
    """Write the source made of `pieces`, one after the other, into `folder`; return its entry in the manifest.

    None, and nothing is written, when no document stays. `tick` is called with the bytes of tokens that were copied.
    """
    kept = [piece.keep() for piece in pieces]
    documents = int(sum(keep.sum() for keep in kept))
    if not documents:
        return None
    folder.mkdir(parents=True)
    with ExitStack() as files:
        return _merge_kept(folder, pieces, kept, documents, shard_tokens, tick, files)


def _merge_kept(
    folder: Path,
    pieces: Sequence[Piece],
    kept: Sequence[Bool[np.ndarray, " documents"]],
    documents: int,
    shard_tokens: int,
    tick: Callable[[int], None],
    files: ExitStack,
) -> dict[str, Any]:
    first = pieces[0].entry
    shards = _Shards(folder, np.dtype(first["dtype"]).newbyteorder("<"), shard_tokens, files)
    columns = {
        name: _Output(folder / f"{name}.npy", files, npy_header(dtype, (documents + (name in _ENDS), *shape)))
        for name, (dtype, shape) in COLUMNS.items()
    }
    blobs = {name: _Output(folder / f"{name}.bin", files) for name in TEXTS}
    ends = dict.fromkeys(_ENDS, 0)
    for name in _ENDS:
        columns[name].write(np.zeros(1, "<i8"))
    sums, origins = {"characters": 0, "fallback": 0}, _Origins()
    for piece, keep in zip(pieces, kept, strict=True):
        byte_lengths = piece.column("bytes")[keep]
        columns["bytes"].write(byte_lengths)
        columns["sha256"].write(piece.column("sha256")[keep])
        columns["origins"].write(origins.add(piece.entry["origins"], piece.column("origins")[keep], byte_lengths))
        for name in _ENDS:
            all_ends = piece.column(name)
            lengths = np.diff(all_ends)
            columns[name].write(ends[name] + np.cumsum(lengths[keep]))
            ends[name] += int(lengths[keep].sum())
            if name in blobs:
                content = np.frombuffer(piece.content(f"{name}.bin"), np.uint8)
                blobs[name].write(content if keep.all() else content[np.repeat(keep, lengths)])
            else:
                shards.add(piece, all_ends[:-1][keep], lengths[keep], tick)
        for name in sums:
            sums[name] += piece.entry[name] if keep.all() else int(piece.column(name)[keep].sum())
    outputs = [*columns.values(), *blobs.values(), *shards.outputs]
    return {
        "language": first["language"],
        "dtype": first["dtype"],
        "documents": documents,
        "tokens": ends["offsets"],
        "bytes": sum(origin["bytes"] for origin in origins.table),
        **sums,
        "shards": [
            {"file": output.path.name, "tokens": tokens}
            for output, tokens in zip(shards.outputs, shards.tokens, strict=True)
        ],
        "origins": origins.table,
        "files": {output.path.name: output.close() for output in sorted(outputs, key=lambda output: output.path)},
    }


_ENDS = ("offsets", *TEXTS)


class _Output:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path, files: ExitStack, header: bytes = b"") -> None:
        self.path = path
        self._digest, self._size = hashlib.sha256(), 0
        self._file = files.enter_context(path.open("wb"))
        self.write(np.frombuffer(header, np.uint8))

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self._size += data.nbytes

    def close(self) -> dict[str, Any]:
        """End the file, once or again; what a manifest says of it."""
        self._file.close()
        return {"size": self._size, "sha256": self._digest.hexdigest()}


class _Origins:
    """The pairs of origin and licence, numbered in the order in which they first occur among the documents kept."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def add(self, table: Sequence[Mapping[str, Any]], origins: np.ndarray, byte_lengths: np.ndarray) -> np.ndarray:
        """`origins`, which point into `table`, as they point into ours; documents and bytes are counted."""
        own, places, counts = np.unique(origins, return_index=True, return_counts=True)
        new = np.zeros(len(table), "<u4")
        for i in np.argsort(places).tolist():
            entry = table[own[i]]
            key = (entry["origin"], entry["licence"])
            number = new[own[i]] = self._numbers.setdefault(key, len(self._numbers))
            if number == len(self.table):
                self.table.append({"origin": key[0], "licence": key[1], "documents": 0, "bytes": 0})
            self.table[number]["documents"] += int(counts[i])
            self.table[number]["bytes"] += int(byte_lengths[origins == own[i]].sum())
        return new[origins]


class _Shards:
    """Files of tokens, cut between documents as `StoreWriter` cuts them."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, files: ExitStack) -> None:
        self.outputs = [_Output(folder / shard_name(0), files)]
        self.tokens = [0]
        self._folder, self._dtype, self._shard_tokens, self._files = folder, dtype, shard_tokens, files

    def add(
        self,
        piece: Piece,
        starts: Int64[np.ndarray, " kept"],
        lengths: Int64[np.ndarray, " kept"],
        tick: Callable[[int], None],
    ) -> None:
        """Append the documents of `piece` that begin at `starts` of its stream."""
        runs = self._runs(starts, lengths)
        run = next(runs, None)
        size, at = self._dtype.itemsize, 0
        for shard in piece.entry["shards"]:
            for chunk in piece.chunks(shard["file"]):
                data = np.frombuffer(chunk, np.uint8)
                stop = at + len(data)
                while run is not None:
                    number, begin, end = run
                    if number == len(self.outputs):
                        self.outputs[-1].close()
                        self.outputs.append(_Output(self._folder / shard_name(len(self.outputs)), self._files))
                    self.outputs[number].write(data[max(begin * size - at, 0) : max(end * size - at, 0)])
                    if end * size > stop:
                        break
                    run = next(runs, None)
                at = stop
                tick(len(data))

    def _runs(
        self, starts: Int64[np.ndarray, " kept"], lengths: Int64[np.ndarray, " kept"]
    ) -> Iterator[tuple[int, int, int]]:
        """Shard, first and last token (exclusive) of each run of documents that lie together in piece and shard."""
        ends = np.cumsum(lengths)
        borders = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
        i = 0
        while i < len(starts):
            done = int(ends[i - 1]) if i else 0
            room = self._shard_tokens - self.tokens[-1]
            fits = int(np.searchsorted(ends, done + room, side="right"))
            if fits <= i:
                if self.tokens[-1]:
                    self.tokens.append(0)
                    continue
                fits = i + 1
            after = int(np.searchsorted(borders, i, side="right"))
            j = min(fits, int(borders[after])) if after < len(borders) else fits
            self.tokens[-1] += int(ends[j - 1]) - done
            yield len(self.tokens) - 1, int(starts[i]), int(starts[j - 1] + lengths[j - 1])
            i = j
