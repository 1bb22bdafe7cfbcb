"""Best-fit decreasing bin packing of documents into rows: the plan that `best_fit.py` stores and reads.

The method is that of Ding et al., "Fewer Truncations Improve Language Modeling" (2024): pieces of documents are placed
in decreasing order of length, each into the row with the least room that still takes it. Pieces of equal length are
placed together, so the work is one step for each pair (length of piece, room) that occurs, not one for each document.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer


class Plan(NamedTuple):
    """Rows of pieces. A piece of n predictions reads n + 1 tokens of the stream; the last of them is a target only.

    Row r holds the pieces `row_first[r]` to `row_first[r + 1]`, side by side. A document longer than a row fills whole
    rows and leaves a rest; the `whole_rows` rows of one whole piece come first, in the order of the stream.
    """

    whole_rows: int
    row_first: Int64[np.ndarray, " rows+1"]
    starts: Int64[np.ndarray, " pieces"]  # first token in the source's stream
    lengths: Integer[np.ndarray, " pieces"]  # predictions, from 1 to the row's length
    last_rows: Int64[np.ndarray, " documents"]  # row of each document's last piece; -1 where nothing is predicted


def plan_rows(offsets: Int64[np.ndarray, " documents+1"], length: int) -> Plan:
    """The rows of `length` places for documents that begin at `offsets` of a stream.

    A document of n tokens has n - 1 predictions: its first token follows nothing. Every prediction is in exactly one
    piece. Takes about 60 bytes of memory a document.
    """
    predictions = np.maximum(np.diff(offsets) - 1, 0)
    small = np.uint16 if length < 1 << 16 else np.uint32
    rest = (predictions % length).astype(small)
    wholes = predictions // length
    del predictions
    whole_rows = int(wholes.sum())

    long = np.flatnonzero(wholes)
    repeats = wholes[long]
    within = np.arange(whole_rows) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    whole_starts = np.repeat(offsets[long], repeats) + within * length

    counts = np.bincount(rest, minlength=length + 1)
    counts[0] = 0
    rests = int(counts.sum())
    documents = np.argsort(small(length) - rest, kind="stable")[:rests]  # in decreasing order of their rests
    row, rank, filled = best_fit_decreasing(counts, length)
    row_first = np.cumsum(np.concatenate([[0], np.ones(whole_rows, np.int64), filled]))
    at = row_first[whole_rows + row] + rank
    del rank

    starts = np.empty(whole_rows + rests, np.int64)
    starts[:whole_rows] = whole_starts
    starts[at] = offsets[documents] + wholes[documents] * length
    lengths = np.empty(whole_rows + rests, small)
    lengths[:whole_rows] = length
    lengths[at] = rest[documents]
    last_rows = np.full(len(rest), -1, np.int64)
    last_rows[long] = np.cumsum(repeats) - 1
    last_rows[documents] = whole_rows + row
    return Plan(whole_rows, row_first, starts, lengths, last_rows)


def best_fit_decreasing(
    counts: Int64[np.ndarray, " length+1"], length: int
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"], Int64[np.ndarray, " rows"]]:
    """Places `counts[s]` pieces of each size s, largest first, into rows of `length` places.

    Returns each piece's row and its rank within that row, in the order of placement, and the pieces of each row. Rows
    are numbered as they are opened. Of the rows with the least sufficient room, the one that has had it longest is
    taken.
    """
    pieces = int(counts.sum())
    row, rank = np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    filled = np.zeros(pieces, np.int64)  # of each row; no more rows than pieces
    rooms = _Rooms(length)
    done = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        for rows, each, room in rooms.fits(size, int(counts[size])):
            stop = done + len(rows) * each
            row[done:stop] = np.repeat(rows, each)
            rank[done:stop] = (filled[rows][:, None] + np.arange(each)).reshape(-1)
            filled[rows] += each
            rooms.put(rows, room - each * size)
            done = stop
    return row, rank, filled[: rooms.opened]


class _Rooms:
    """Rows by the room that they have left; those of equal room in the order in which they came to it."""

    def __init__(self, length: int) -> None:
        self.opened = 0
        self._length = length
        self._counts = np.zeros(length + 1, np.int64)
        self._rows: list[deque[np.ndarray]] = [deque() for _ in range(length + 1)]

    def put(self, rows: Int64[np.ndarray, " n"], room: int) -> None:
        self._counts[room] += len(rows)
        self._rows[room].append(rows)

    def fits(self, size: int, pieces: int) -> Iterator[tuple[Int64[np.ndarray, " n"], int, int]]:
        """(rows, pieces that each of them takes, their room) for best-fit of equal pieces, in order of placement.

        The tightest row is still the tightest after it took a piece, so it takes as many as go in. Rows are taken out.
        """
        for room in (np.flatnonzero(self._counts[size:]) + size).tolist():
            for n, each in _shares(pieces, room // size, int(self._counts[room])):
                yield self._take(room, n), each, room
                pieces -= n * each
            if not pieces:
                return
        for n, each in _shares(pieces, self._length // size, pieces):
            yield np.arange(self.opened, self.opened + n), each, self._length
            self.opened += n

    def _take(self, room: int, n: int) -> Int64[np.ndarray, " n"]:
        """The n rows that have had this room longest."""
        self._counts[room] -= n
        queue, taken = self._rows[room], []
        while n:
            rows = queue.popleft()
            if len(rows) > n:
                queue.appendleft(rows[n:])
                rows = rows[:n]
            taken.append(rows)
            n -= len(rows)
        return np.concatenate(taken) if len(taken) > 1 else taken[0]


def _shares(pieces: int, most: int, rows: int) -> list[tuple[int, int]]:
    """(rows, pieces for each): `pieces` into at most `rows` rows, `most` into each, and what is left into one more."""
    full = min(rows, pieces // most)
    left = pieces - full * most if full < rows else 0
    return [(n, each) for n, each in ((full, most), (1, left)) if n and each]
