"""Packing: fixed-length rows over a source's token stream, by random access, and which documents lie in which row.

Concatenation: row r reads the stream's tokens from r * length on and predicts the ones from r * length + 1 on, so every
token of an epoch but the first is predicted once. What a row does not predict is each document's first token (its bos):
nothing before it says anything about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int32, Int64


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
        self, out: np.ndarray, places: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> None: ...  # out[place : place + length] = stream[start : start + length], for each of the n


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


class Window(NamedTuple):
    """One row before it is laid out."""

    tokens: np.ndarray  # unsigned integers [length + 1]: the inputs and the last target; fewer in the stream's last row
    starts: Int64[
        np.ndarray, " starts"
    ]  # places from 1 to `length` at which another document starts, or the stream ends


class Rows(NamedTuple):
    """Packed rows; the fields of `Batch` but for the source."""

    tokens: Int32[np.ndarray, "n length"]
    targets: Int32[np.ndarray, "n length"]
    segments: Int32[np.ndarray, "n length"]
    positions: Int32[np.ndarray, "n length"]
    mask: Bool[np.ndarray, "n length"]


@dataclass(frozen=True, slots=True)
class ConcatPacking:
    """A source's documents back to back, cut every `length` tokens; the last row is filled up with `pad_id`."""

    source: TokenSource
    length: int
    pad_id: int = 0

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return -(-max(self.source.tokens - 1, 0) // self.length)

    def gather(self, rows: Int64[np.ndarray, " n"]) -> Rows:
        """The rows, packed."""
        return lay_out(self.read(rows), self.length, self.pad_id)

    def read(self, rows: Int64[np.ndarray, " n"]) -> list[Window]:
        """The rows' tokens and document starts, as views of the source."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all from 0 to {self.rows - 1}")
        offsets, tokens = np.asarray(self.source.offsets), self.source.tokens
        starts = rows * self.length
        first = offsets.searchsorted(starts, side="right")
        last = offsets.searchsorted(starts + self.length, side="right")
        return [
            Window(self.source.read(start, min(start + self.length + 1, tokens)), offsets[a:b] - start)
            for start, a, b in zip(starts.tolist(), first.tolist(), last.tolist(), strict=True)
        ]

    def documents(self, row: int) -> list[Span]:
        """The documents among the row's inputs, in order."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not below {self.rows}")
        offsets, start = self.source.offsets, row * self.length
        stop = min(start + self.length, self.source.tokens)
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
        begin, end = int(self.source.offsets[document]), int(self.source.offsets[document + 1])
        # The stream's very last token may be a target only.
        return range(begin // self.length, min((end - 1) // self.length + 1, self.rows))


def lay_out(windows: Sequence[Window], length: int, pad_id: int) -> Rows:
    """Inputs, targets, segments, positions and mask of the windows, whichever sources they are from."""
    n = len(windows)
    tokens = np.empty((n, length + 1), np.int32)
    for line, window in zip(tokens, windows, strict=True):
        line[: len(window.tokens)] = window.tokens
    row = np.repeat(np.arange(n), [len(window.starts) for window in windows])
    column = np.concatenate([window.starts for window in windows]) if n else np.empty(0, np.int64)
    mask = np.ones((n, length), np.bool_)
    mask[row, column - 1] = False

    # Tokens fall into stretches, each of one document in one row: every row starts one, and every document in it does.
    inside = column < length
    row, column = row[inside], column[inside]
    row_first = np.searchsorted(row, np.arange(n)) + np.arange(n)  # the number of each row's first stretch
    begin = np.empty(n + len(row), np.int64)
    begin[row_first] = np.arange(n) * length
    begin[np.arange(len(row)) + row + 1] = row * length + column
    sizes = np.diff(begin, append=n * length)
    segment = np.arange(1, len(begin) + 1) - row_first[begin // length]
    segments = np.repeat(segment.astype(np.int32), sizes).reshape(n, length)
    positions = np.arange(n * length, dtype=np.int32) - np.repeat(begin.astype(np.int32), sizes)
    positions = positions.reshape(n, length)

    for i, window in enumerate(windows):
        used = len(window.tokens)
        if used <= length:  # the stream ends here, and its last token is an input without a target
            tokens[i, used:] = pad_id
            mask[i, used - 1 :] = False
            segments[i, used:] = 0
            positions[i, used:] = 0
    return Rows(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), segments, positions, mask)
