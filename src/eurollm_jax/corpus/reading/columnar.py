"""Parquet files, and the arrow files of a folder saved by Hugging Face `datasets`: rows of tables become documents.

Both are read with pyarrow alone, a few megabytes of rows at a time, whatever the size of a row group. Columns are
checked against the schema once, before the first row.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eurollm_jax.corpus.reading.documents import Defaults, Document, Fault, Origin, did_you_mean, document, missing_text
from eurollm_jax.errors import UserError

# Rows are turned into Python objects by about so many bytes at a time.
_BATCH_BYTES = 1 << 23
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# What pyarrow raises for content that is not what its format says. Cython turns a bad length into a ValueError.
_DAMAGE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)


def row_groups(path: Path) -> list[int]:
    """The compressed bytes of each row group of a parquet file."""
    with _naming(path, "parquet"), pq.ParquetFile(path) as file:
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        return [sum(g.column(i).total_compressed_size for i in range(g.num_columns)) for g in groups]


def record_batches(path: Path) -> list[int]:
    """The bytes of each record batch of an arrow file."""
    with _naming(path, "arrow"), _open_arrow(path) as file:
        ends = [0, *(file.tell() for _ in pa.ipc.open_stream(file))]
    return [end - start for start, end in itertools.pairwise(ends)]


def read_parquet(path: Path, first: int, stop: int | None, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The documents of the row groups [first, stop) of a parquet file.

    Raises UserError for a damaged page (with its row group), for columns that are not there, and for a file of no rows.
    """
    # A buffered stream in place of whole column chunks keeps memory flat; checksums are compared where there are any.
    with _naming(path, "parquet"):
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    with file:
        _check(path, file.schema_arrow, origin.defaults, file.metadata.num_rows)
        for group in range(first, file.metadata.num_row_groups if stop is None else stop):
            about = file.metadata.row_group(group)
            size = max(1, min(4096, _BATCH_BYTES * about.num_rows // (about.total_byte_size + 1)))
            batches = file.iter_batches(size, row_groups=[group], use_threads=False)
            row = 0
            while True:
                with _naming(path, "parquet", f", row group {group}"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield from _documents(batch, f"{path}, row group {group}, row", row, origin, fault)
                row += batch.num_rows


def read_arrow(path: Path, first: int, stop: int | None, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The documents of the record batches [first, stop) of an arrow file.

    Raises UserError for a damaged file, for columns that are not there, and for a file of no rows.
    """
    with _naming(path, "arrow"):
        file = _open_arrow(path)
        stream = pa.ipc.open_stream(file)
    with file:
        _check(path, stream.schema, origin.defaults, None)
        row = 0
        index = 0
        while stop is None or index < stop:
            with _naming(path, "arrow", f", record batch {index}"):
                batch = next(stream, None)
                if batch is not None and index >= first:
                    _validate(batch)
            if batch is None:
                break
            if index >= first:
                size = max(1, _BATCH_BYTES * batch.num_rows // (batch.nbytes + 1))
                for at in range(0, batch.num_rows, size):
                    yield from _documents(batch.slice(at, size), f"{path}, row", row + at, origin, fault)
            row += batch.num_rows
            index += 1
    if first == 0 and stop is None and row == 0:
        raise UserError(f"{path} has no documents; remove the file or fill it")


def _documents(batch: pa.RecordBatch, place: str, before: int, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The documents of a batch whose first row is row `before`, counted from 0, of what `place` names."""
    for row, record in enumerate(_records(batch), before):
        where = lambda row=row: f"{place} {row}"  # noqa: E731
        try:
            if record is None:
                raise UserError(f"{where()} holds a string that is not UTF-8; write the file again from UTF-8 text")
            found = document(record, where, origin)
        except UserError as error:
            fault(error)
        else:
            yield found


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one that holds a string which is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _check(path: Path, schema: pa.Schema, defaults: Defaults, rows: int | None) -> None:
    names = list(schema.names)
    if "metadata" in names and pa.types.is_struct(schema.field("metadata").type):
        names += [inner.name for inner in schema.field("metadata").type]
    if wrong := missing_text(names, defaults.names()["text"]):
        raise UserError(f"{path}{wrong}")
    for ours, theirs in defaults.fields.items():
        if theirs and theirs not in names:
            raise UserError(f"{path} has no field {theirs!r} for {ours!r}{_there(theirs, names)}")
    text = next(name for name in defaults.names()["text"] if name in names)
    kind = schema.field(text).type if text in schema.names else pa.string()
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{path}: column {text!r} is of type {kind}; it must hold strings")
    if rows == 0:
        raise UserError(f"{path} has no documents; remove the file or fill it")


def _there(name: str, names: list[str]) -> str:
    return did_you_mean(name, names) or f"; it has {', '.join(map(repr, names[:12]))}"


def _open_arrow(path: Path) -> pa.MemoryMappedFile:
    file = pa.memory_map(str(path))
    if file.read(6) == b"ARROW1":
        raise pa.ArrowInvalid("it is of arrow's file format, not of its stream format")
    size = file.size()
    file.seek(max(0, size - len(_END_OF_STREAM)))
    # A stream that is cut between two batches reads as a shorter one.
    if file.read() != _END_OF_STREAM:
        raise pa.ArrowInvalid("its end is missing")
    file.seek(0)
    return file


def _validate(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid when offsets or lengths point outside the batch, which would end the process if followed."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # which row is not UTF-8 is said when it is read
            raise


@contextmanager
def _naming(path: Path, kind: str, place: str = "") -> Iterator[None]:
    """Turn what pyarrow raises into a UserError that names the file and the place in it."""
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"{path}{place} is not valid {kind} ({reason}); make or fetch the file again") from None
