"""Packing: fixed-length rows over a source's token stream, by random access, and which documents lie in which row.

A packing says where rows lie (`Lines`); `lay_out` reads them and writes a whole batch at once, whichever sources and
packings its rows are of.

Concatenation: row r reads the stream's tokens from r * length on and predicts the ones from r * length + 1 on, so every
token of an epoch but the first is predicted once. What a row does not predict is each document's first token (its bos):
nothing before it says anything about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.blocks import empty_batch

PAD_ID = 0
"""Stands in `tokens` and `targets` where a row has nothing; its segment is 0 and its mask False."""


class TokenSource(Protocol):
    """What packing reads of a store's source."""

    @property
    def tokens(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...  # of the tokens on disk
    @property
    def offsets(self) -> np.ndarray: ...  # int64 [documents + 1]: first token of each document; last, tokens
    def read(self, start: int, stop: int) -> np.ndarray: ...  # tokens of the stream
    def read_into(
        self, out: np.ndarray, places: np.ndarray, starts: np.ndarray, lengths: np.ndarray, after: np.ndarray
    ) -> None: ...  # out[place : place + length] = stream[start : start + length] for each i, after[i] the next token


class Span(NamedTuple):
    """A stretch of a document within a row."""

    document: int
    first: int  # first token, counted from the document's start
    tokens: int
    place: int  # of that token in the row


class Lines(NamedTuple):
    """Where n rows' tokens lie in a source's stream, and where documents begin in the rows. Rows count from 0 to n - 1.

    Read i copies stream[start : start + length + 1]: its first `length` tokens are the inputs from `place` on, its last
    `length` their targets. Every place that no read fills is padding. Stretch j begins, at a place of a row, the next
    document of that row, or what the row has of one that began before it. A target that belongs to another document
    than its input is listed as untargeted: nothing predicts it.
    """

    read_row: Int64[np.ndarray, " reads"]  # ascending, and so are the places within a row
    read_place: Int64[np.ndarray, " reads"]
    read_start: Int64[np.ndarray, " reads"]
    read_length: Int64[np.ndarray, " reads"]
    stretch_row: Int64[np.ndarray, " stretches"]  # ascending, and so are the places within a row
    stretch_place: Int64[np.ndarray, " stretches"]
    untargeted_row: Int64[np.ndarray, " untargeted"]
    untargeted_place: Int64[np.ndarray, " untargeted"]


class Packing(Protocol):
    """A source cut into rows of `length` predictions; picklable."""

    @property
    def source(self) -> TokenSource: ...
    @property
    def length(self) -> int: ...
    @property
    def rows(self) -> int: ...  # in one epoch
    def lines(self, rows: np.ndarray) -> Lines: ...  # IndexError for a row outside
    def documents(self, row: int) -> list[Span]: ...  # among the row's inputs, in order
    def rows_of(self, document: int) -> Sequence[int]: ...  # the inverse of `documents`
    def describe(self) -> dict[str, Any]: ...  # what decides the rows, JSON-able


@dataclass(frozen=True, slots=True)
class ConcatPacking:
    """A source's documents back to back, cut every `length` tokens; the last row is filled up with padding."""

    source: TokenSource
    length: int

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return -(-max(self.source.tokens - 1, 0) // self.length)

    def lines(self, rows: Int64[np.ndarray, " n"]) -> Lines:
        """One read a row. The stream's last token is a target only."""
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all from 0 to {self.rows - 1}")
        offsets = self.source.offsets
        starts = rows * self.length
        lengths = np.minimum(starts + self.length, self.source.tokens - 1) - starts
        # The documents that begin after the row's first input and not after its last target.
        first = offsets.searchsorted(starts, side="right")
        count = offsets.searchsorted(starts + lengths, side="right") - first
        numbers = np.arange(len(rows))
        row = np.repeat(numbers, count)
        before = np.cumsum(count) - count
        place = offsets[np.arange(len(row)) + np.repeat(first - before, count)] - starts[row]
        # Every row begins a stretch, and every document among its inputs does.
        inside = place < lengths[row]
        stretch_row = np.concatenate([numbers, row[inside]])
        order = np.argsort(stretch_row, kind="stable")
        stretch_place = np.concatenate([np.zeros_like(numbers), place[inside]])[order]
        zeros = np.zeros_like(numbers)
        return Lines(numbers, zeros, starts, lengths, stretch_row[order], stretch_place, row, place - 1)

    def documents(self, row: int) -> list[Span]:
        """The documents among the row's inputs, in order."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not below {self.rows}")
        offsets, start = self.source.offsets, row * self.length
        stop = min(start + self.length, self.source.tokens - 1)
        spans, at = [], start
        document = int(np.searchsorted(offsets, start, side="right")) - 1
        while at < stop:
            begin, end = int(offsets[document]), min(int(offsets[document + 1]), stop)
            spans.append(Span(document, at - begin, end - at, at - start))
            document, at = document + 1, end
        return spans

    def rows_of(self, document: int) -> range:
        """The rows that have any of the document's tokens among their inputs: the inverse of `documents`."""
        if not 0 <= document < len(self.source.offsets) - 1:
            raise IndexError(f"document {document} is not below {len(self.source.offsets) - 1}")
        begin = int(self.source.offsets[document])
        end = min(int(self.source.offsets[document + 1]), self.source.tokens - 1)
        return range(begin // self.length, (end - 1) // self.length + 1) if begin < end else range(0)

    def describe(self) -> dict[str, Any]:
        """What decides the rows."""
        return {"packing": "concat"}


class Reads(NamedTuple):
    """The lines of a batch, source by source: `Lines` with the batch's rows, no longer ascending over all of it."""

    lines: Lines
    sources: list[int]  # that occur
    ends: list[int]  # where the reads of each source end in the arrays of `lines`


def reads_of(packings: Sequence[Packing], source: Int64[np.ndarray, " rows"], row: Int64[np.ndarray, " rows"]) -> Reads:
    """Where row `row[i]` of source `source[i]` lies, for each row i of a batch."""
    order = np.argsort(source, kind="stable")
    grouped = source[order]
    bounds = [0, *(np.flatnonzero(grouped[1:] != grouped[:-1]) + 1).tolist(), len(order)]
    sources, parts, ends = [], [], [0]
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        sources.append(int(grouped[begin]))
        lines = packings[sources[-1]].lines(row[order[begin:end]])
        parts.append(
            lines._replace(
                read_row=lines.read_row + begin,
                stretch_row=lines.stretch_row + begin,
                untargeted_row=lines.untargeted_row + begin,
            )
        )
        ends.append(ends[-1] + len(lines.read_row))
    empty = np.empty(0, np.int64)
    joined = Lines(*(np.concatenate(fields) for fields in zip(*parts, strict=True))) if parts else Lines(*[empty] * 8)
    lines = joined._replace(
        read_row=order[joined.read_row],
        stretch_row=order[joined.stretch_row],
        untargeted_row=order[joined.untargeted_row],
    )
    return Reads(lines, sources, ends[1:])


def lay_out(packings: Sequence[Packing], source: Int64[np.ndarray, " rows"], reads: Reads, length: int) -> Batch:
    """The rows as the batch that a train step reads."""
    n, lines = len(source), reads.lines
    begin = lines.read_row * length + lines.read_place  # in the batch's places, row after row
    batch = empty_batch(n, length)
    batch.source[:] = source
    tokens, targets, segments, positions, mask = (field.reshape(-1) for field in batch[:5])
    after = _read(packings, begin, reads, batch)
    targets[:-1] = tokens[1:]
    targets[begin + lines.read_length - 1] = after
    mask.fill(True)
    mask[lines.untargeted_row * length + lines.untargeted_place] = False

    starts = np.sort(lines.stretch_row * length + lines.stretch_place)
    sizes = np.diff(starts, append=n * length)
    in_row = starts // length
    number = np.arange(1, len(starts) + 1) - np.searchsorted(in_row, np.arange(n))[in_row]
    # A gap between reads belongs to the stretch before it, if there is one, until it is blanked.
    first = int(starts[0]) if len(starts) else n * length
    segments[first:] = np.repeat(number.astype(np.int32), sizes)
    np.subtract(_ramp(n * length)[first:], np.repeat(starts.astype(np.int32), sizes), out=positions[first:])
    for gap_begin, gap_end in _gaps(begin, lines.read_length, n * length):
        blank(batch, gap_begin, gap_end, inputs=True, targets=True)
    return batch


def pack(packings: Sequence[Packing], source: Int64[np.ndarray, " rows"], row: Int64[np.ndarray, " rows"]) -> Batch:
    """Row `row[i]` of source `source[i]`, packed, for each i; all packings have the same length."""
    return lay_out(packings, source, reads_of(packings, source, row), packings[0].length)


def blank(batch: Batch, begin: int, end: int, *, inputs: bool, targets: bool) -> None:
    """Turn the places from `begin` to `end`, counted through all rows, into padding: as inputs, as targets, or both."""
    at = slice(begin, end)
    if inputs:
        batch.tokens.reshape(-1)[at] = PAD_ID
        batch.segments.reshape(-1)[at] = 0
        batch.positions.reshape(-1)[at] = 0
    if targets:
        batch.targets.reshape(-1)[at] = PAD_ID
    batch.mask.reshape(-1)[at] = False


def _read(packings: Sequence[Packing], begin: np.ndarray, reads: Reads, batch: Batch) -> np.ndarray:
    """Fill in `tokens`, of which read i has those from place `begin[i]` on; the token after each read, int32 [reads].

    Places that no read fills hold anything. Tokens are read into the memory of `targets` as they are on disk.
    """
    after = np.empty(len(begin), np.int32)
    parts = [*zip(reads.sources, [0, *reads.ends], reads.ends, strict=False)]
    dtypes = {packings[source].source.dtype for source in reads.sources}  # mostly one
    for dtype in dtypes:
        if dtype.itemsize <= 4:
            raw = batch.targets.reshape(-1).view(dtype)[: batch.tokens.size]
        else:
            raw = np.empty(batch.tokens.size, dtype)
        rows = []
        for source, first, last in parts:
            stream, some = packings[source].source, slice(first, last)
            if stream.dtype == dtype:
                following = np.empty(last - first, dtype)
                start, length = reads.lines.read_start[some], reads.lines.read_length[some]
                stream.read_into(raw, begin[some], start, length, following)
                after[some] = following
                rows.append(reads.lines.read_row[some])
        raw = raw.reshape(batch.tokens.shape)
        if len(dtypes) == 1:
            batch.tokens[...] = raw
        else:
            here = np.unique(np.concatenate(rows))
            batch.tokens[here] = raw[here]
    return after


def _gaps(begin: np.ndarray, lengths: np.ndarray, places: int) -> list[tuple[int, int]]:
    """The places from 0 to `places` that no read fills, as (begin, end), ascending."""
    if int(lengths.sum()) == places:
        return []
    order = np.argsort(begin)
    starts = np.append(begin[order], places)
    ends = np.concatenate([[0], (begin + lengths)[order]])
    return [(a, b) for a, b in zip(ends.tolist(), starts.tolist(), strict=True) if a < b]


@lru_cache(maxsize=8)
def _ramp(size: int) -> Int32[np.ndarray, " size"]:
    return np.arange(size, dtype=np.int32)
