"""What each packing costs a store: documents that are cut, and places of rows that predict nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.progress import track
from rich.table import Table

from eurollm_jax.corpus.store import Source, TokenStore
from eurollm_jax.data.best_fit import BestFitPacking
from eurollm_jax.data.packing import ConcatPacking, Packing
from eurollm_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class PackingFigures:
    """One packing of one source, or of several together, for one epoch. A document is cut if more than one row has
    predictions of it."""

    source: str
    packing: str
    rows: int
    places: int  # rows * length
    predictions: int
    padding: int  # places that no token fills
    documents: int
    cut: int  # documents
    cut_that_fit: int  # of these: those that one row could have held

    @property
    def unused(self) -> float:
        """Share of the places that predict nothing: padding, and where one document ends and the next one begins."""
        return 1 - self.predictions / max(self.places, 1)


def pack_store(store: TokenStore, length: int) -> list[PackingFigures]:
    """Makes the best-fit plans of a store that are not there yet, and measures both packings of every source.

    Shows a bar. Raises UserError as `BestFitPacking.open` does.
    """
    if length < 1:
        raise UserError(f"rows of {length} tokens are not possible; give a length of 1 or more")
    figures = []
    for source in track(list(store.sources.values()), f"best-fit rows of {length} tokens"):
        best_fit = BestFitPacking.open(source, length, store.path)
        figures += [measure(source, ConcatPacking(source, length)), measure(source, best_fit)]
    return figures


def measure(source: Source, packing: Packing) -> PackingFigures:
    """The figures of one packing of one source."""
    length = packing.length
    offsets = np.asarray(source.offsets)
    predictions = np.maximum(np.diff(offsets) - 1, 0)
    concat = isinstance(packing, ConcatPacking)
    if concat:
        begin = offsets[:-1]
        cut = (predictions > 0) & (begin // length != (begin + predictions - 1) // length)
        filled = max(source.tokens - 1, 0)
    else:
        cut = predictions > length
        filled = int(predictions.sum())
    return PackingFigures(
        source=source.name,
        packing="concat" if concat else "best-fit",
        rows=packing.rows,
        places=packing.rows * length,
        predictions=int(predictions.sum()),
        padding=packing.rows * length - filled,
        documents=source.documents,
        cut=int(cut.sum()),
        cut_that_fit=int((cut & (predictions <= length)).sum()),
    )


def packing_report(figures: Sequence[PackingFigures], length: int) -> Table:
    """The figures as a table for the terminal: the whole store, then each source."""
    table = Table(
        title=f"Rows of {length} tokens",
        caption="cut: documents in more than one row, and those of them that one row could hold; "
        "unused: places that predict nothing, padding among them",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("source", min_width=8, max_width=28, overflow="ellipsis")  # gives way where there is no room
    table.add_column("packing", no_wrap=True)
    for name in ("rows", "documents", "cut", "needlessly", "unused", "padding"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds = dict.fromkeys(entry.packing for entry in figures)
    for entry in [*(_sum([f for f in figures if f.packing == kind]) for kind in kinds), *figures]:
        table.add_row(
            entry.source,
            entry.packing,
            f"{entry.rows:,}",
            f"{entry.documents:,}",
            f"{entry.cut / max(entry.documents, 1):.2%}",
            f"{entry.cut_that_fit / max(entry.documents, 1):.2%}",
            f"{entry.unused:.3%}",
            f"{entry.padding / max(entry.places, 1):.3%}",
        )
    return table


def _sum(figures: Sequence[PackingFigures]) -> PackingFigures:
    counts = ("rows", "places", "predictions", "padding", "documents", "cut", "cut_that_fit")
    return PackingFigures(
        source="all",
        packing=figures[0].packing,
        **{name: sum(getattr(entry, name) for entry in figures) for name in counts},
    )
