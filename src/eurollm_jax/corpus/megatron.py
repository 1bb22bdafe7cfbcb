"""Megatron-LM's indexed datasets: the .idx file that says where in a .bin file each sequence lies, read and written.

Trillions of tokens are kept so, and other stacks read nothing else. The layout, little-endian throughout: nine bytes
"MMIDIDX\\0\\0"; the version, 1, as uint64; a code for the type of the tokens, uint8; the number of sequences and that
of document marks, uint64 each; then the sequences' lengths in tokens (int32), where they begin in the .bin in bytes
(int64), and the marks (int64): the first sequence of each document, and last the number of sequences. The .bin holds
the tokens and nothing else.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Int64

from eurollm_jax.corpus.store import Source
from eurollm_jax.errors import UserError

_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, document marks
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_AT_ONCE = 1 << 22  # sequences, or tokens


@dataclass(frozen=True)
class Index:
    """What an .idx file says."""

    dtype: np.dtype  # of the tokens in the .bin
    lengths: Int32[np.ndarray, " sequences"]  # in tokens
    documents: Int64[np.ndarray, " documents+1"]  # first sequence of each; last, the number of sequences

    @property
    def offsets(self) -> Int64[np.ndarray, " documents+1"]:
        """The first token of each document; last, the number of tokens."""
        ends = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=ends[1:])
        return ends[self.documents]


def idx_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def bin_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def read_index(prefix: Path) -> Index:
    """The index of `prefix`.idx, checked against `prefix`.bin.

    Raises UserError for a missing file, and for what is not as Megatron writes it: another magic, version or type, a
    truncated file, documents or sequences that do not follow one another, a .bin of another size.
    """
    path, data = idx_file(prefix), bin_file(prefix)
    for file in (path, data):
        if not file.is_file():
            raise UserError(f"there is no {file}; give the path of a .bin and an .idx file without that ending")
    with path.open("rb") as opened:
        head = opened.read(_HEADER.size)
    if head[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{path} is not the index of a Megatron dataset: it does not begin with MMIDIDX; give another")
    if len(head) < _HEADER.size:
        raise UserError(f"{path} is cut off in its header; make or fetch it again")
    _, version, code, sequences, marks = _HEADER.unpack(head)
    if version != _VERSION:
        raise UserError(f"{path} is of version {version}, and this program reads version {_VERSION}; write it again")
    _check_size(path, sequences, marks)
    dtype = _dtype(path, code)

    at = _HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences])
    content = np.memmap(path, np.uint8, mode="r")
    lengths = content[at[0] : at[1]].view("<i4")
    documents = content[at[2] :].view("<i8")
    _check_sequences(path, lengths, content[at[1] : at[2]].view("<i8"), dtype.itemsize)
    if marks == 0 or documents[0] != 0 or documents[-1] != sequences or np.any(documents[1:] < documents[:-1]):
        raise UserError(f"{path}: its documents do not run from sequence 0 to {sequences} in order; write it again")
    size, wanted = data.stat().st_size, int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if size != wanted:
        raise UserError(f"{data} has {size:,} bytes and {path.name} speaks of {wanted:,}; make or fetch both again")
    return Index(dtype, lengths, documents)


def _check_size(path: Path, sequences: int, marks: int) -> None:
    size, wanted = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * marks
    if size == wanted + sequences and sequences:
        raise UserError(f"{path} is of a multimodal dataset, which has no plain text; give another")
    if size != wanted:
        what = "is cut off: it" if size < wanted else "is too long: it"
        raise UserError(f"{path} {what} has {size:,} bytes and its header speaks of {wanted:,}; make or fetch it again")


def _dtype(path: Path, code: int) -> np.dtype:
    dtype = np.dtype(_CODES[code]) if code in _CODES else None
    if dtype is None or dtype.kind == "f":
        what = f"{dtype.name} numbers" if dtype is not None else f"a type of code {code}"
        raise UserError(f"{path} is of {what}, which are no token ids; give a dataset of integers")
    return dtype


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, item: int) -> None:
    """Each sequence must begin where the one before ends, so that the .bin can be read as one stream."""
    expected = 0
    for start in range(0, len(lengths), _AT_ONCE):
        some = lengths[start : start + _AT_ONCE].astype(np.int64)
        ends = expected + np.cumsum(some * item)
        there = pointers[start : start + _AT_ONCE]
        wrong = np.flatnonzero((some < 0) | (there != ends - some * item))
        if len(wrong):
            number = int(wrong[0])
            raise UserError(
                f"{path}: sequence {start + number} of {some[number]} tokens begins at byte {there[number]:,} and "
                f"should at {ends[number] - some[number] * item:,}; write it again"
            )
        expected = int(ends[-1])


def export_megatron(source: Source, prefix: Path) -> None:
    """Write `source` as `prefix`.bin and `prefix`.idx: each document one sequence, with the tokens that the store has.

    Tokens of uint16 stay so and others become int32, the two types that Megatron writes. The .idx appears last, so
    that an export that was stopped is not taken for a whole one. Raises UserError when either file is there already.
    """
    path, data = idx_file(prefix), bin_file(prefix)
    for file in (data, path):
        if file.exists():
            raise UserError(f"{file} is there already; choose another path or delete it")
    dtype = np.dtype("<u2" if source.dtype == np.uint16 else "<i4")
    lengths = np.diff(source.offsets)
    if len(lengths) and lengths.max() >= 1 << 31:
        raise UserError(f"document {lengths.argmax()} of source {source.name} is too long for Megatron's int32; cut it")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = {file: file.with_name(f".{file.name}.partial") for file in (data, path)}
    try:
        with partial[data].open("wb") as out:
            for start in range(0, source.tokens, _AT_ONCE):
                out.write(source.read(start, min(start + _AT_ONCE, source.tokens)).astype(dtype).tobytes())
        with partial[path].open("wb") as out:
            _write_index(out, dtype, lengths)
        for file, written in partial.items():
            written.replace(file)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)


def _write_index(file: BinaryIO, dtype: np.dtype, lengths: Int64[np.ndarray, " documents"]) -> None:
    """The index of documents of one sequence each."""
    code = next(code for code, name in _CODES.items() if np.dtype(name) == dtype)
    file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write(((np.cumsum(lengths) - lengths) * dtype.itemsize).astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
