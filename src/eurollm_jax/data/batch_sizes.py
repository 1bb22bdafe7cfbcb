"""Batch sizes of a run by row: where each batch begins and how many rows it has, as a pure function and its inverse.

The data are numbered by rows, so a batch-size ramp changes where the rows are cut into steps and nothing about the
rows. What a run needs of it is the way between steps and rows.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from eurollm_jax.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """Batches of `first` rows, the first of which begins at row `start`, until `changes` say otherwise.

    A change (row, size) takes effect at the first batch that begins at or after that row. Steps count from 0: step 0 is
    the batch that begins at `start`. Every method takes O(log(changes)).
    """

    first: int
    changes: tuple[tuple[int, int], ...] = ()
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0:
            raise UserError(f"batches cannot begin at row {self.start}; give row 0 or a later one")
        for size in (self.first, *(size for _, size in self.changes)):
            if size < 1:
                raise UserError(f"a batch of {size} rows is not possible; give 1 row or more")
        before = self.start
        for row, size in self.changes:
            if row <= before:
                raise UserError(
                    f"the change to batches of {size} rows at row {row} does not come after row {before}; "
                    "give the changes in the order of their rows"
                )
            before = row

    @cached_property
    def _phases(self) -> tuple[list[int], list[int], list[int]]:
        """For each size in turn: the row at which its first batch begins, that batch's step, and the size.

        A size whose row falls into the same batch as the next one's has no batch.
        """
        rows, steps, sizes = [self.start], [0], [self.first]
        for row, size in self.changes:
            batches = -(-max(row - rows[-1], 0) // sizes[-1])
            rows.append(rows[-1] + batches * sizes[-1])
            steps.append(steps[-1] + batches)
            sizes.append(size)
        return rows, steps, sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that occur, each once, in the order of the run."""
        rows, _, sizes = self._phases
        used = [size for row, following, size in zip(rows, [*rows[1:], None], sizes, strict=True) if row != following]
        return tuple(dict.fromkeys(used))

    def size_at(self, row: int) -> int:
        """Rows of a batch that begins at `row`."""
        self._check_row(row)
        index = bisect_right(self.changes, row, key=lambda change: change[0])
        return self.changes[index - 1][1] if index else self.first

    def row_of_step(self, step: int) -> int:
        """The row at which the batch of `step` begins; the batch before it ends there."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        rows, steps, sizes = self._phases
        phase = bisect_right(steps, step) - 1
        return rows[phase] + (step - steps[phase]) * sizes[phase]

    def step_of_row(self, row: int) -> int:
        """The step whose batch holds `row`."""
        self._check_row(row)
        rows, steps, sizes = self._phases
        phase = bisect_right(rows, row) - 1
        return steps[phase] + (row - rows[phase]) // sizes[phase]

    def steps(self, total_rows: int) -> int:
        """Batches that hold the rows below `total_rows`; the last may run past them."""
        return 0 if total_rows <= self.start else self.step_of_row(total_rows - 1) + 1

    def from_row(self, row: int) -> "BatchSizes":
        """These sizes for batches of which the first begins at `row`, whether one did so before or not."""
        return BatchSizes(self.size_at(row), tuple(change for change in self.changes if change[0] > row), row)

    def until(self, stop_row: int) -> "BatchSizes":
        """These sizes without the changes that no batch before `stop_row` has."""
        begins = self._phases[0][1:]
        kept = tuple(change for change, begin in zip(self.changes, begins, strict=True) if begin < stop_row)
        return BatchSizes(self.first, kept, self.start)

    def _check_row(self, row: int) -> None:
        if row < self.start:
            raise ValueError(f"row {row} lies before the first batch, which begins at {self.start}")
