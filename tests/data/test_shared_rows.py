"""Runs that share rows read what each reads alone, and a row that several need is laid out once while it is kept."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import Data, DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.removal import Removed
from eurollm_jax.data.shared_rows import SharedRows
from eurollm_jax.errors import UserError

LENGTH, ROWS, BATCH = 16, 480, 12
ROW_BYTES = 17 * LENGTH
BASE = Mixture.temperature(0.5)
MIXTURES = [BASE, Mixture.proportional(), BASE.without("el"), BASE.scale(ga=20.0, bg=0.05), BASE]


def data_of(store, mixture=BASE, seed=3, length=LENGTH, packing="concat"):
    return Data.from_stores([store], DataConfig("unused", mixture, length, seed, packing), ROWS)


@pytest.fixture(scope="module")
def runs(memory_store):
    return [data_of(memory_store, mixture) for mixture in MIXTURES]


def assert_equal(one, other):
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


def assert_as_alone(shared, runs, sizes, stop_row=ROWS):
    at = sizes.start
    for after, batch in shared.batches(sizes, stop_row):
        size = sizes.size_at(at)
        assert batch.tokens.shape == (len(runs), size, LENGTH)
        for i, data in enumerate(runs):
            assert_equal(Batch(*(field[i] for field in batch)), data.batch(at, size))
        at += size
        assert after == at
    assert at >= stop_row > at - size


def needed(runs, sizes, stop_row=ROWS):
    """The rows (source, row) that each step needs: a set for each."""
    at, found = sizes.start, []
    while at < stop_row:
        rows = np.arange(at, at + sizes.size_at(at))
        step = set()
        for data in runs:
            source, _, row = data.order.rows(rows)
            step.update(zip(source.tolist(), row.tolist(), strict=True))
        found.append(step)
        at += len(rows)
    return found


def test_each_run_reads_what_it_reads_alone(runs):
    assert_as_alone(SharedRows(runs), runs, BatchSizes(BATCH))


def test_also_when_it_goes_on_from_a_row_and_its_batches_grow(runs):
    assert_as_alone(SharedRows(runs), runs, BatchSizes(8, ((100, 24), (300, 7)), start=48))


def test_also_with_other_seeds(memory_store):
    runs = [data_of(memory_store, seed=seed) for seed in (1, 2)]
    assert_as_alone(SharedRows(runs), runs, BatchSizes(BATCH))


def test_also_where_documents_are_packed_whole(store):
    mixtures = (BASE, BASE.without("el"), Mixture.proportional())
    runs = [data_of(store, mixture, packing="best-fit") for mixture in mixtures]
    assert_as_alone(SharedRows(runs), runs, BatchSizes(BATCH))


def test_a_row_is_laid_out_once_for_all_runs_and_steps(runs):
    shared, sizes = SharedRows(runs), BatchSizes(BATCH)
    for _ in shared.batches(sizes, ROWS):
        pass
    steps = needed(runs, sizes)
    assert shared.loads == len(set().union(*steps))
    assert shared.loads < sum(map(len, steps)) < len(runs) * ROWS


@pytest.mark.parametrize("steps_kept", [0, 1, 2, 5])
def test_the_bound_holds_and_what_was_read_the_longest_ago_makes_room(runs, steps_kept):
    """With room for all that some steps read, what the steps before read that are fewer by one is still there."""
    one_step, sizes = BATCH * len(runs), BatchSizes(BATCH)
    shared = SharedRows(runs, kept_bytes=steps_kept * one_step * ROW_BYTES)
    assert_as_alone(shared, runs, sizes)
    assert len(shared._kept.tokens) == max(steps_kept, 1) * one_step >= len(shared._slot)
    steps = needed(runs, sizes)
    at_most = sum(len(step.difference(*steps[max(n + 1 - steps_kept, 0) : n])) for n, step in enumerate(steps))
    assert len(set().union(*steps)) < shared.loads <= at_most <= sum(map(len, steps))


def test_removing_a_language_changes_no_byte_of_the_others(memory_store):
    """The rows of each language in the order in which they come, out of batches that hold them permuted."""
    runs = [data_of(memory_store, mixture) for mixture in (BASE, BASE.without("el"))]
    order = [{name: [] for name in runs[0].source_names} for _ in runs]
    first = 0
    for after, batch in SharedRows(runs).batches(BatchSizes(BATCH), ROWS):
        for i, data in enumerate(runs):
            for place in np.argsort(data.order.batch_rows(first, BATCH)):
                row = Batch(*(field[i, place] for field in batch))
                order[i][data.source_names[row.source]].append(b"".join(np.asarray(field).tobytes() for field in row))
        first = after
    with_it, without_it = order
    assert with_it.pop("el")
    assert not without_it.pop("el")
    for name, rows in with_it.items():
        both = min(len(rows), len(without_it[name]))
        assert both
        assert rows[:both] == without_it[name][:both]
        assert len(without_it[name]) >= len(rows)


def test_the_thread_reads_ahead_and_ends_with_the_iterator(runs):
    shared = SharedRows(runs)
    batches = shared.batches(BatchSizes(BATCH), ROWS, ahead=3)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]
    assert 0 < shared._step <= 5  # the one that was taken, those ahead of it


def test_an_error_of_the_thread_is_the_readers(runs, monkeypatch):
    shared = SharedRows(runs)
    calls = itertools.count()

    def failing(keys):
        if next(calls) == 2:
            raise OSError("the disk is gone")
        return lay_out(keys)

    lay_out = shared._lay_out
    monkeypatch.setattr(shared, "_lay_out", failing)
    batches = shared.batches(BatchSizes(BATCH), ROWS)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches)


def test_what_cannot_be_shared_is_refused(memory_store, runs):
    with pytest.raises(ValueError, match="row length"):
        SharedRows([runs[0], data_of(memory_store, length=8)])
    none = (np.empty(0, np.int64),) * len(runs[0].source_names)
    removing = dataclasses.replace(runs[1], removed=(Removed("f00d", 10, none, none),))
    with pytest.raises(UserError, match=r"data\.removed"):
        SharedRows([runs[0], removing])
