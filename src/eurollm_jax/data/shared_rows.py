"""Batches of several runs that read one store at once: a row that more than one of them needs is laid out once.

The order within a source knows nothing of the mixture, so runs of one seed whose mixtures differ read the same rows of
each source in the same order, some earlier and some later. What was laid out for the first is kept for the others.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.blocks import empty_batch
from eurollm_jax.data.loader import Data
from eurollm_jax.data.packing import lay_out, reads_of
from eurollm_jax.errors import UserError

KEPT_BYTES = 256 << 20
"""Of rows that are kept, 17 for each place of a row: 30,000 rows of 512 tokens."""

_BLOCK = 4096  # rows of each run that are located at once: numpy's overhead per call is then shared by many rows


class SharedRows:
    """The rows of K runs over the same stores, packed alike. `loads` counts the rows that were laid out.

    Rows stay until `kept_bytes` are full, or until the rows of one step are, where these are more; then those that no
    run has read for the longest time make room, and a run that comes to them later has them laid out again.
    """

    def __init__(self, runs: Sequence[Data], *, kept_bytes: int = KEPT_BYTES) -> None:
        self.loads = 0
        self._runs, self._packings = tuple(runs), runs[0].packings
        self._length = runs[0].config.sequence_length
        for data in runs:
            if data.removed:
                raise UserError(
                    "data.removed: several runs that are trained at once share their rows, and what is removed begins "
                    "at a row of each: train them one after the other, or prepare a store without these documents."
                )
            shared = (data.fingerprint, data.source_names, data.config.sequence_length, data.config.packing)
            if shared != (runs[0].fingerprint, runs[0].source_names, self._length, runs[0].config.packing):
                raise ValueError("runs share rows where stores, row length and packing are the same")
        rows = np.array([packing.rows for packing in self._packings], np.int64)
        self._first_key = np.cumsum(rows) - rows  # rows are numbered through all sources: that number is a row's key
        self._room = kept_bytes // (17 * self._length)
        self._kept: Batch | None = None
        self._slot: dict[int, int] = {}  # of each key that is kept
        self._key = self._used = np.empty(0, np.int64)  # of each slot: what it holds, and the step that last read it
        self._step = 0

    def batches(self, sizes: BatchSizes, stop_row: int, ahead: int = 2) -> Generator[tuple[int, Batch]]:
        """(next row, batch [K, B, T]) from row `sizes.start` on: what `Data.batch` gives for each run, stacked.

        A thread reads `ahead` batches ahead. The last batch is the first that reaches `stop_row`. Close the iterator to
        end the thread.
        """
        rows = max(sizes.sizes) * len(self._runs)
        if self._kept is None or len(self._used) < rows:
            self._begin(max(self._room, rows))
        yield from _read_ahead(self._batches(sizes, stop_row), ahead)

    def _begin(self, room: int) -> None:
        """Makes room for so many rows; the memory is the system's until it is written to."""
        tokens, targets, segments, positions = (np.empty((room, self._length), np.int32) for _ in range(4))
        mask = np.empty((room, self._length), np.bool_)
        self._kept = Batch(tokens, targets, segments, positions, mask, np.empty(room, np.int32))
        self._slot, self._key, self._used = {}, np.full(room, -1, np.int64), np.zeros(room, np.int64)

    def _batches(self, sizes: BatchSizes, stop_row: int) -> Iterator[tuple[int, Batch]]:
        begin = end = sizes.start  # of the rows that are located
        keys = np.empty((len(self._runs), 0), np.int64)
        for step in range(sizes.steps(stop_row)):
            first = sizes.row_of_step(step)
            size = sizes.size_at(first)
            if first + size > end:
                begin, end = first, first + max(size, _BLOCK)
                keys = np.stack([self._located(data, begin, end) for data in self._runs])
            places = np.stack([data.order.batch_rows(first, size) - begin for data in self._runs])
            yield first + size, self._batch(np.take_along_axis(keys, places, axis=1))

    def _located(self, data: Data, begin: int, end: int) -> Int64[np.ndarray, " rows"]:
        """The keys of a run's rows from `begin` to `end`."""
        source, _, row = data.order.rows(np.arange(begin, end))
        return self._first_key[source] + row

    def _batch(self, keys: Int64[np.ndarray, "K B"]) -> Batch:
        assert self._kept is not None
        wanted, place = np.unique(keys, return_inverse=True)
        slots = self._slots(wanted)[place.reshape(-1)]
        batch = empty_batch(keys.size, self._length)
        for field, kept in zip(batch, self._kept, strict=True):
            np.take(kept, slots, axis=0, out=field, mode="clip")  # "raise" would copy the field once more
        return Batch(*(field.reshape(*keys.shape, *field.shape[1:]) for field in batch))

    def _slots(self, keys: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Where these rows, all different, are kept; those that are not there yet are laid out."""
        self._step += 1
        slots = np.array([self._slot.get(key, -1) for key in keys.tolist()], np.int64)
        missing = np.flatnonzero(slots < 0)
        self._used[slots[slots >= 0]] = self._step
        if missing.size:
            slots[missing] = self._lay_out(keys[missing])
        return slots

    def _lay_out(self, keys: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Lays rows out in the place of none, or of those that were read the longest ago; where that is."""
        assert self._kept is not None
        source = self._first_key.searchsorted(keys, side="right") - 1
        reads = reads_of(self._packings, source, keys - self._first_key[source])
        rows = lay_out(self._packings, source, reads, self._length)
        if len(self._slot) + len(keys) <= len(self._used):
            slots = np.arange(len(self._slot), len(self._slot) + len(keys))
        else:
            slots = np.argpartition(self._used, len(keys) - 1)[: len(keys)]
            for key in self._key[slots].tolist():
                self._slot.pop(key, None)
        for kept, field in zip(self._kept, rows, strict=True):
            kept[slots] = field
        self._key[slots], self._used[slots] = keys, self._step
        self._slot.update(zip(keys.tolist(), slots.tolist(), strict=True))
        self.loads += len(keys)
        return slots


def _read_ahead[Item](items: Iterator[Item], ahead: int) -> Generator[Item]:
    """The same, fetched by a thread that is so many of them ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(max(ahead, 1)))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, items, None))
                yield item
        finally:
            for future in coming:
                future.cancel()
