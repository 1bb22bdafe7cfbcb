"""Jumps: rows of the data that a run leaves out for good, as a pure function and its inverse.

A run that went back to a checkpoint goes on with other rows than those it failed with. Its steps, batch sizes and
learning rates stay what they are, numbered by the rows that it consumes; which rows of the data these are moves on.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from eurollm_jax.data.schedule import Schedule


@dataclass(frozen=True)
class Jumps:
    """(consumed, rows): once so many rows are consumed, so many of the data are left out, before the next is read.

    "Consumed" rows are those that a run trains on, counted from 0; "data" rows are the numbers that order, mixture and
    removals go by. Without a jump both are the same.
    """

    taken: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        places = [consumed for consumed, _ in self.taken]
        if any(a >= b for a, b in itertools.pairwise([-1, *places])) or any(rows < 1 for _, rows in self.taken):
            raise ValueError(f"jumps must be of 1 row or more and in the order of their rows, not {self.taken}")

    def data_row(self, consumed: int) -> int:
        """The data row that is read when so many are consumed."""
        return consumed + sum(rows for at, rows in self.taken if at <= consumed)

    def consumed_row(self, data_row: int) -> int | None:
        """When a data row is read: the inverse of `data_row`; None for a row that is left out."""
        consumed, before = data_row, 0
        for at, rows in self.taken:
            if data_row < at + before:
                break
            before += rows
            if data_row < at + before:
                return None
            consumed = data_row - before
        return consumed

    def back(self, consumed: int, data_row: int) -> "Jumps":
        """After going back to where so many rows were consumed, in order to read `data_row` there."""
        kept = Jumps(tuple((at, rows) for at, rows in self.taken if at < consumed))
        return Jumps((*kept.taken, (consumed, data_row - kept.data_row(consumed))))

    def counts(self, schedule: Schedule, consumed: int) -> Int64[np.ndarray, " sources"]:
        """Rows of each source among the first so many that are consumed."""
        counts, before = schedule.counts(self.data_row(consumed)), 0
        for at, rows in self.taken:
            if at <= consumed:
                counts = counts - schedule.counts(at + before + rows) + schedule.counts(at + before)
                before += rows
        return counts


NO_JUMPS = Jumps()
