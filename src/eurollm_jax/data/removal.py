"""Removal: documents that are not trained on any more, from a stated row of a run on.

A request to take a document out may come when half of the run is done. The order of the rows must not change then, or
nothing after it could be compared or resumed; so the rows stay what they are, and the documents' tokens in them become
padding.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from eurollm_jax.corpus.store import Source
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.packing import Packing, Reads, blank
from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removal:
    """From global row `from_row` on, the documents that the block list at path `blocklist` names are padding."""

    blocklist: str
    from_row: int


@dataclass(frozen=True, eq=False)
class Removed:
    """The documents that a `Removal` names, found in the sources of a run; picklable.

    `begins[s]` and `ends[s]` are where each of them begins and ends in the stream of source s, ascending.
    """

    sha256: str  # of the block list
    from_row: int
    begins: tuple[Int64[np.ndarray, " removed"], ...]
    ends: tuple[Int64[np.ndarray, " removed"], ...]

    @property
    def documents(self) -> int:
        return sum(map(len, self.begins))

    @property
    def tokens(self) -> int:
        return sum(int((end - begin).sum()) for begin, end in zip(self.begins, self.ends, strict=True))

    def describe(self) -> dict[str, Any]:
        """What decides which tokens are removed, JSON-able."""
        return {"blocklist": self.sha256, "from_row": self.from_row, "documents": self.documents}

    def apply(self, batch: Batch, rows: Int64[np.ndarray, " batch"], reads: Reads) -> None:
        """Blank the removed documents in a batch that lies as `reads` says; `rows` are the global rows.

        An input that belongs to one becomes padding; so does a target that does, at whatever input. All else stays.
        """
        if not len(rows) or int(rows.max()) < self.from_row:
            return
        length = batch.tokens.shape[1]
        row, place, start, size = reads.lines[:4]
        for source, first, last in zip(reads.sources, [0, *reads.ends], reads.ends, strict=False):
            begins, ends = self.begins[source], self.ends[source]
            if not len(begins):
                continue
            some = slice(first, last)
            low = ends.searchsorted(start[some], side="right")  # the first that ends behind the read's first input
            high = begins.searchsorted(start[some] + size[some], side="right")  # those that begin before its end
            for i in (np.flatnonzero(high > low)).tolist():
                read = first + i
                if rows[row[read]] < self.from_row:
                    continue
                for begin, end in zip(begins[low[i] : high[i]].tolist(), ends[low[i] : high[i]].tolist(), strict=True):
                    left = int(row[read]) * length + int(place[read])  # of the read, counted through all rows
                    stop, shift = int(size[read]), int(start[read])
                    a, b = max(begin - shift, 0), min(end - shift, stop)
                    blank(batch, left + a, left + max(a, b), inputs=True, targets=False)
                    a, b = max(begin - 1 - shift, 0), min(end - 1 - shift, stop)
                    blank(batch, left + a, left + max(a, b), inputs=False, targets=True)

    def rows_hit(self, packings: Sequence[Packing], sources: Sequence[Any]) -> int:
        """How many rows of an epoch hold any of the documents."""
        hit = 0
        for packing, source, begins in zip(packings, sources, self.begins, strict=True):
            rows: set[int] = set()
            for document in np.searchsorted(source.offsets, begins, side="right").tolist():
                rows.update(packing.rows_of(document - 1))
            hit += len(rows)
        return hit


def find_removed(
    removal: Removal, sources: Mapping[str, Source], packings: Sequence[Packing], read: Container[str]
) -> Removed:
    """The documents that the removal's block list names in the sources whose names are in `read`, those that the run
    reads; how many, and how much they are, goes to the log.

    Raises UserError for a list that cannot be read, for a negative row, and for a source that cannot be searched: what
    was to be removed might be in it.
    """
    from eurollm_jax.corpus.blocklist import Blocklist

    if removal.from_row < 0:
        raise UserError(
            f"the removal of {removal.blocklist} begins at row {removal.from_row}; give row 0 or a later one"
        )
    blocklist = Blocklist.load(Path(removal.blocklist))
    for name, source in sources.items():
        if name in read and not source.has_records:
            raise UserError(
                f"{removal.blocklist} cannot be applied to source {name}: it is read from Megatron files, which say "
                "neither hashes nor URLs of their documents; prepare its text again, or leave it out of the mixture"
            )
    none = np.empty(0, np.int64)
    found = [blocklist.find(source) if name in read else none for name, source in sources.items()]
    offsets = [source.offsets for source in sources.values()]
    removed = Removed(
        blocklist.sha256,
        removal.from_row,
        tuple(np.asarray(offset[some]) for offset, some in zip(offsets, found, strict=True)),
        tuple(np.asarray(offset[some + 1]) for offset, some in zip(offsets, found, strict=True)),
    )
    if removed.documents:
        log.info(
            "%s: from row %d on, %d documents (%d tokens, in %d rows of an epoch) are not trained on",
            removal.blocklist,
            removal.from_row,
            removed.documents,
            removed.tokens,
            removed.rows_hit(packings, list(sources.values())),
        )
    else:
        log.warning(
            "%s names no document that the run reads: NOTHING IS REMOVED; is it the right list?", removal.blocklist
        )
    return removed


def changed_removals(saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], row: int) -> list[str]:
    """One phrase for each removal that only one of the two has and that takes effect before `row`: rows that were
    trained on would not have been what they now are."""
    phrases = []
    for entry in [entry for entry in saved if entry not in now and entry["from_row"] < row]:
        phrases.append(f"{_named(entry)} took effect and is gone")
    for entry in [entry for entry in now if entry not in saved and entry["from_row"] < row]:
        phrases.append(f"{_named(entry)} is new and would begin before row {row}, at which the run goes on")
    return phrases


def _named(entry: Mapping[str, Any]) -> str:
    return (
        f"the removal of {entry['documents']} documents from row {entry['from_row']} on "
        f"(block list {entry['blocklist'][:12]})"
    )
