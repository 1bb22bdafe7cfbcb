"""Order: global row number <-> (source, epoch, row in source), as a pure function and its inverse.

Nothing is stored and nothing is drawn: every answer is computed from the schedule, the sources' row counts and one
seed, so a run resumes at any row on any number of hosts, and "when was this row seen?" has an exact answer. The order
within a source depends on the source's name, its row count and the seed alone; other sources come and go without
touching it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int64

from eurollm_jax.data.schedule import Schedule

ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run's rows.

    `row_counts` are the rows of each source by name; each source with a share must have at least one. Sources are
    indices into `schedule.names`, epochs count from 0, and j is a row's rank among all rows of its source, epoch
    after epoch.
    """

    schedule: Schedule
    row_counts: Mapping[str, int]
    seed: int

    def __post_init__(self) -> None:
        for source in self.schedule.scheduled:
            if self.row_counts.get(self.schedule.names[source], 0) < 1:
                raise ValueError(f"source {self.schedule.names[source]!r} has a share but no rows")

    @cached_property
    def sizes(self) -> Int64[np.ndarray, " sources"]:
        """Rows in one epoch of each source."""
        return np.array([self.row_counts.get(name, 0) for name in self.schedule.names], np.int64)

    def counts(self, k: int) -> Int64[np.ndarray, " sources"]:
        """Rows of each source among the first k rows."""
        return self.schedule.counts(k)

    def locate(self, k: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(source, j) of each global row."""
        return self.schedule.locate(k)

    def index(self, source: Int64[np.ndarray, " n"], j: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The global row at which row j of the source comes: the inverse of `locate`; -1 if it never comes."""
        return self.schedule.index(source, j)

    def rows(
        self, k: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(source, epoch, row in the source) of each global row."""
        source, j = self.locate(k)
        size = self.sizes[source]
        epoch, position = np.divmod(j, size)
        return source, epoch, permute(position, size, self._keys(source, epoch))

    def index_of_row(
        self, source: Int64[np.ndarray, " n"], row: Int64[np.ndarray, " n"], epoch: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " n"]:
        """The global row that shows the source's row in that epoch: the inverse of `rows`; -1 if it never comes."""
        source, row, epoch = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (source, row, epoch)))
        size = self.sizes[source]
        if row.size and not (row.min() >= 0 and np.all(row < size)):
            raise ValueError("a row lies outside its source")
        return self.index(source, epoch * size + permute(row, size, self._keys(source, epoch), inverse=True))

    def batch_rows(self, first_row: int, batch_size: int) -> Int64[np.ndarray, " batch"]:
        """The rows from `first_row` to `first_row + batch_size`, permuted.

        Hosts take contiguous slices of this. Unpermuted, the schedule is so regular that one host could be given all
        rows of one source, batch after batch.
        """
        key = _hash_key("batch", str(self.seed), str(first_row))[0]
        return first_row + np.argsort(_mix(np.arange(batch_size, dtype=np.uint64) ^ key))

    def _keys(self, source: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """uint64 [n, ROUNDS]: the round keys of each row's source and epoch."""
        sources = len(self.schedule.names)
        pairs, place = np.unique(epoch * sources + source, return_inverse=True)
        names = self.schedule.names
        keys = [
            _hash_key("rows", names[pair % sources], str(self.seed), str(pair // sources)) for pair in pairs.tolist()
        ]
        return np.array(keys, np.uint64).reshape(-1, ROUNDS)[place]


@lru_cache(maxsize=4096)
def _hash_key(*words: str) -> np.ndarray:
    """uint64 [ROUNDS]. Keys are hashed, not added up, so that (seed 3, epoch 1) is unrelated to (seed 4, epoch 0)."""
    text = "\0".join(words).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8")


def permute(
    position: Int64[np.ndarray, " n"], size: Any, keys: np.ndarray, *, inverse: bool = False
) -> Int64[np.ndarray, " n"]:
    """A keyed permutation of range(size), one position at a time; with `inverse`, the way back.

    `size` is int64 [n] or one integer up to 2**52, `keys` uint64 [n, ROUNDS] or [ROUNDS]. A Feistel network over a
    grid of at least `size` places, its sides about equal (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002: the generalised Feistel cipher); a place beyond `size` is enciphered again until it falls inside (cycle
    walking, same source). The grid has at most sqrt(size) places too many, so that is rare.
    """
    shape = np.shape(position)
    position = np.asarray(position, np.int64).reshape(-1)
    size = np.broadcast_to(np.asarray(size, np.int64), shape).reshape(-1)
    keys = np.broadcast_to(keys, (*shape, ROUNDS)).reshape(-1, ROUNDS)
    height = np.ceil(np.sqrt(size)).astype(np.int64)
    width = -(-size // height)
    out = _encipher(position, height, width, keys, inverse)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _encipher(out[outside], height[outside], width[outside], keys[outside], inverse)
        outside = outside[out[outside] >= size[outside]]
    return out.reshape(shape)


def _encipher(x: np.ndarray, height: np.ndarray, width: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """One pass of the cipher over the grid: in turn, each half is shifted, modulo its side, by a hash of the other
    half."""
    sides = (height.astype(np.uint64), width.astype(np.uint64))
    halves = list(np.divmod(x.astype(np.uint64), sides[1]))
    for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        half, side = i % 2, sides[i % 2]
        # The upper 32 bits of the hash, scaled to 0..side-1 (sides are below 2**32).
        shift = ((_mix(halves[1 - half] ^ keys[..., i]) >> np.uint64(32)) * side) >> np.uint64(32)
        moved = halves[half] + (side - shift if inverse else shift)
        halves[half] = np.where(moved >= side, moved - side, moved)
    return (halves[0] * sides[1] + halves[1]).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which each input bit flips each output bit half of the time (the SplitMix64 finaliser:
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
