"""Best-fit rows: every prediction of every document once an epoch, from a plan that is the store's own."""

import errno
import fcntl
import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from eurollm_jax.corpus.megatron import export_megatron
from eurollm_jax.corpus.megatron_import import import_megatron
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.data import best_fit
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


def test_a_plan_whose_manifest_is_damaged_or_gone_is_refused(own_store, packing):
    """A flipped digit is valid JSON: the number of rows would be another."""
    manifest = packing.folder / "plan.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace(f'"rows": {packing.rows}', f'"rows": {packing.rows - 1}'))
    for look in (lambda: BestFitPacking.open(packing.source, LENGTH, own_store.path), verify_plans_of(own_store)):
        with pytest.raises(UserError, match=r"el\.plan/plan\.json is damaged \(its own hash does not fit\); delete"):
            look()
    manifest.unlink()
    with pytest.raises(UserError, match=r"el\.plan has no plan\.json; delete that folder to plan anew"):
        BestFitPacking.open(packing.source, LENGTH, own_store.path)


def verify_plans_of(store):
    return lambda: verify_plans(store.path)


def test_a_plan_that_is_there_is_read_without_writing(own_store, packing):
    """`corpus pack` has made it, and now the store may be on a file system that cannot be written to."""

    def touched():
        return {path: path.stat().st_mtime_ns for path in [own_store.path, *own_store.path.rglob("*")]}

    before = touched()
    assert BestFitPacking.open(own_store.sources["el"], LENGTH, own_store.path).describe() == packing.describe()
    assert touched() == before


def test_processes_without_locks_make_one_plan(own_store, monkeypatch):
    """Some cluster file systems have none. The second has planned before it sees that the first has ended."""
    monkeypatch.setattr(fcntl, "flock", no_lock)
    source, planned = own_store.sources["el"], best_fit.plan_rows

    def plan_while_another_does(offsets, length):
        monkeypatch.setattr(best_fit, "plan_rows", planned)
        digests.append(BestFitPacking.open(source, LENGTH, own_store.path).digest)
        return planned(offsets, length)

    digests = []
    monkeypatch.setattr(best_fit, "plan_rows", plan_while_another_does)
    digests.append(BestFitPacking.open(source, LENGTH, own_store.path).digest)
    assert digests[0] == digests[1]
    assert verify_plans(own_store.path) == 1
    folder = plan_folder(own_store.path, "el", LENGTH)
    assert [path for path in folder.parent.iterdir() if path.name != ".lock"] == [folder]


def no_lock(*_):
    raise OSError(errno.ENOTSUP, "no locks here")


def test_the_documents_of_megatron_files_are_packed_too(own_store, tokenizer, tmp_path):
    export_megatron(own_store.sources["el"], tmp_path / "el")
    store = import_megatron([tmp_path / "el"], tokenizer, tmp_path / "megatron", names=["el"], languages=["el"])
    ours, theirs = (BestFitPacking.open(each.sources["el"], LENGTH, each.path) for each in (own_store, store))
    rows = np.arange(ours.rows)
    assert theirs.rows == ours.rows
    for one, other in zip(*(pack([p], np.zeros_like(rows), rows) for p in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(one, other)


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
