"""The report of a packing says what the rows themselves show."""

import shutil

import numpy as np
import pytest

from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.data.best_fit import BestFitPacking
from eurollm_jax.data.packing import ConcatPacking, pack
from eurollm_jax.data.packing_report import pack_store, packing_report
from eurollm_jax.errors import UserError

LENGTH = 64


@pytest.fixture
def own_store(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("packings"))
    return TokenStore.open(tmp_path / "store")


def test_figures_are_those_of_the_rows(own_store):
    """Counted in the batches of a whole epoch."""
    figures = {(entry.source, entry.packing): entry for entry in pack_store(own_store, LENGTH)}
    for name, source in own_store.sources.items():
        best_fit = BestFitPacking.open(source, LENGTH, own_store.path)
        for kind, packing in (("concat", ConcatPacking(source, LENGTH)), ("best-fit", best_fit)):
            entry = figures[name, kind]
            batch = pack([packing], np.zeros(packing.rows, np.int64), np.arange(packing.rows))
            rows_of = {document: set() for document in range(source.documents)}
            for row in range(packing.rows):
                for span in packing.documents(row):
                    if batch.mask[row, span.place : span.place + span.tokens].any():
                        rows_of[span.document].add(row)
            cut = [document for document, rows in rows_of.items() if len(rows) > 1]
            lengths = np.diff(source.offsets)
            assert (entry.rows, entry.places) == (*batch.mask.shape[:1], batch.mask.size)
            assert entry.predictions == batch.mask.sum()
            assert entry.padding == (batch.segments == 0).sum()
            assert (entry.documents, entry.cut) == (source.documents, len(cut))
            assert entry.cut_that_fit == sum(lengths[document] - 1 <= LENGTH for document in cut)
    assert sum(entry.cut_that_fit for entry in figures.values()) > 0


def test_the_table_sums_the_sources(own_store):
    figures = pack_store(own_store, LENGTH)
    table = packing_report(figures, LENGTH)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["source"][:3] == ["all", "all", "bg"]
    assert columns["packing"][:2] == ["concat", "best-fit"]
    whole = [sum(f.rows for f in figures if f.packing == kind) for kind in ("concat", "best-fit")]
    assert columns["rows"][:2] == [f"{rows:,}" for rows in whole]


def test_an_impossible_length_is_refused(own_store):
    with pytest.raises(UserError, match="rows of 0 tokens are not possible"):
        pack_store(own_store, 0)
