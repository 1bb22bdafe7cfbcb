"""Exact duplicates over all of a store that is still in units: which documents have the text of an earlier one.

Two passes over the hashes. The first sorts 8 bytes of each, which finds the few that may be duplicates; the second
compares those in full. Memory: 8 bytes a document, and about 100 for each one that has a duplicate.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

Hashes = Callable[[int], Iterator[tuple[UInt8[np.ndarray, "documents 32"], Int64[np.ndarray, " documents"]]]]
"""Of unit i: for each of its sources the SHA-256 of each document, and the document's position in the unit."""


def later_duplicates(documents: Sequence[int], hashes: Hashes) -> list[Int64[np.ndarray, " found"]]:
    """For each unit the positions, ascending, of the documents whose hash an earlier document has.

    `documents` is how many each unit has. Earlier means in an earlier unit, or at a lower position in the same.
    """
    bases = np.cumsum([0, *documents])
    keys = np.empty(bases[-1], np.uint64)
    filled = 0
    for unit in range(len(documents)):
        for sha256, _ in hashes(unit):
            keys[filled : filled + len(sha256)] = _keys(sha256)
            filled += len(sha256)
    keys.sort()
    repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
    del keys

    rows, numbers = [np.empty((0, 32), np.uint8)], [np.empty(0, np.int64)]
    for unit in range(len(documents)):
        for sha256, positions in hashes(unit):
            places = np.searchsorted(repeated, found := _keys(sha256))
            candidates = places < len(repeated)
            candidates[candidates] = repeated[places[candidates]] == found[candidates]
            rows.append(sha256[candidates])
            numbers.append(bases[unit] + positions[candidates])
    words = np.concatenate(rows).view(np.uint64)
    number = np.concatenate(numbers)
    order = np.lexsort((number, *words.T))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    later = np.sort(number[order[1:][same]])
    borders = np.searchsorted(later, bases)
    return [later[start:stop] - base for start, stop, base in zip(borders, borders[1:], bases, strict=False)]


def _keys(sha256: UInt8[np.ndarray, "documents 32"]) -> UInt64[np.ndarray, " documents"]:
    return np.ascontiguousarray(sha256[:, :8]).view(np.uint64)[:, 0]
