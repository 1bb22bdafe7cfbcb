"""Best-fit rows: every prediction of every document once an epoch, from a plan that is the store's own."""

import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.data.best_fit import BestFitPacking, plan_folder, verify_plans
from eurollm_jax.data.packing import pack
from eurollm_jax.errors import UserError

LENGTH = 40


@pytest.fixture
def own_store(store, tmp_path):
    """A store that a test may write to."""
    shutil.copytree(store.path, tmp_path / "store", ignore=shutil.ignore_patterns("packings"))
    return TokenStore.open(tmp_path / "store")


@pytest.fixture
def packing(own_store):
    return BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path)


def test_rows_hold_each_prediction_of_each_document_once(packing):
    """Read off the batch that a step trains on: (input, target) pairs, told apart by document and position."""
    source, rows = packing.source, np.arange(packing.rows)
    batch = pack([packing], np.zeros_like(rows), rows)
    found = Counter()
    for row in rows.tolist():
        for segment, span in enumerate(packing.documents(row), 1):
            at = np.flatnonzero(batch.segments[row] == segment)
            np.testing.assert_array_equal(at, np.arange(span.place, span.place + span.tokens))
            np.testing.assert_array_equal(batch.positions[row, at], np.arange(span.tokens))
            tokens = source.document_tokens(span.document)
            np.testing.assert_array_equal(batch.tokens[row, at], tokens[span.first : span.first + span.tokens])
            np.testing.assert_array_equal(batch.targets[row, at], tokens[span.first + 1 : span.first + 1 + span.tokens])
            assert batch.mask[row, at].all()
            found.update((span.document, span.first + i) for i in range(span.tokens))
        assert not batch.mask[row, batch.segments[row] == 0].any()
    lengths = np.diff(source.offsets).tolist()
    assert found == Counter((document, i) for document, n in enumerate(lengths) for i in range(n - 1))


def test_rows_come_in_any_order_as_they_are_alone(packing):
    chosen = np.array([packing.rows - 1, 3, 0, 3])
    together = pack([packing], np.zeros(4, np.int64), chosen)
    for place, row in enumerate(chosen.tolist()):
        alone = pack([packing], np.zeros(1, np.int64), np.array([row]))
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[place], theirs[0])


def test_documents_and_rows_of_are_each_others_inverse(packing):
    expected = {document: [] for document in range(packing.source.documents)}
    for row in range(packing.rows):
        for span in packing.documents(row):
            expected[span.document].append(row)
    for document, rows in expected.items():
        assert sorted(packing.rows_of(document)) == sorted(rows)
    for outside in (-1, packing.rows):
        with pytest.raises(IndexError):
            packing.lines(np.array([0, outside]))
        with pytest.raises(IndexError):
            packing.documents(outside)
    with pytest.raises(IndexError):
        packing.rows_of(packing.source.documents)


def test_a_packing_travels_to_a_worker_without_its_plan(packing):
    before = pack([packing], np.zeros(2, np.int64), np.arange(2))
    sent = pickle.dumps(packing)
    assert len(sent) < 10_000
    after = pack([pickle.loads(sent)], np.zeros(2, np.int64), np.arange(2))
    np.testing.assert_array_equal(before.tokens, after.tokens)


def test_the_plan_is_made_once_and_says_what_it_is(own_store, packing):
    folder = plan_folder(own_store.path, "el", LENGTH)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert again.describe() == packing.describe()
    shutil.rmtree(folder)
    anew = BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path)
    assert anew.describe() == packing.describe()
    other = BestFitPacking.open(own_store.sources["el"], LENGTH + 1, own_store.path)
    assert other.describe() != packing.describe()


def test_processes_that_start_together_share_one_plan(own_store):
    code = (
        "import sys; from pathlib import Path; from eurollm_jax.corpus.store import TokenStore\n"
        "from eurollm_jax.data.best_fit import BestFitPacking\n"
        "store = TokenStore.open(Path(sys.argv[1]))\n"
        "print([BestFitPacking.open(source, 48, store.path).digest for source in store.sources.values()])\n"
    )
    command = [sys.executable, "-c", code, str(own_store.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(said) == 1


def test_a_store_that_cannot_be_written_to_says_what_to_do(own_store):
    (own_store.path / "packings").write_text("in the way")
    with pytest.raises(UserError, match=r"plan of el for rows of 40 tokens cannot be written .*; run 'eurollm corpus"):
        BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path)


def test_a_plan_of_other_documents_is_refused(own_store, packing):
    shutil.copytree(packing.folder, plan_folder(own_store.path, "de", LENGTH))
    with pytest.raises(UserError, match=r"de\.plan is a plan for other documents: .*offsets differs"):
        BestFitPacking.open(own_store.sources["de"], LENGTH, own_store.path)


@pytest.mark.parametrize("name", ["row_first.npy", "starts.npy", "lengths.npy", "last_rows.npy"])
def test_a_damaged_plan_is_named(own_store, packing, name):
    file = packing.folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{name} has {len(whole) - 1} bytes and should have {len(whole)}"):
        BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"el\.plan is damaged in {name}; delete"):
        verify_plans(own_store.path)
    file.write_bytes(whole)
    assert verify_plans(own_store.path) == 1
