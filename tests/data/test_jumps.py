"""Rows that are left out: beside a list of rows from which they are cut."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.jumps import NO_JUMPS, Jumps
from eurollm_jax.data.loader import Data, DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError

MIXTURE = Mixture.temperature(0.5).stage(at_row=90, mixture=Mixture.unimax(40).without("fi"))

some_jumps = st.dictionaries(st.integers(0, 60), st.integers(1, 30), max_size=4).map(
    lambda found: Jumps(tuple(sorted(found.items())))
)


def read_rows(jumps, rows):
    """The first data rows that are read, one after the other."""
    left_out, seen, row = dict(jumps.taken), [], 0
    while len(seen) < rows:
        row += left_out.pop(len(seen), 0)
        seen.append(row)
        row += 1
    return seen


@given(some_jumps)
def test_consumed_rows_are_the_data_rows_without_those_left_out(jumps):
    rows = read_rows(jumps, 100)
    assert [jumps.data_row(consumed) for consumed in range(100)] == rows
    place = {row: consumed for consumed, row in enumerate(rows)}
    assert [jumps.consumed_row(row) for row in range(rows[-1] + 1)] == [place.get(row) for row in range(rows[-1] + 1)]


@given(some_jumps, st.integers(0, 60), st.integers(1, 40))
def test_after_going_back_the_stated_row_comes_next_and_the_past_stays(jumps, consumed, further):
    rows = read_rows(jumps, consumed)
    next_row = jumps.data_row(consumed + further)
    after = read_rows(jumps.back(consumed, next_row), consumed + 50)
    assert after == rows + list(range(next_row, next_row + 50))


def test_jumps_that_make_no_sense_are_refused():
    for wrong in [((5, 0),), ((5, 3), (5, 2)), ((9, 1), (5, 1)), ((-1, 4),)]:
        with pytest.raises(ValueError, match="jumps must be of 1 row or more and in the order"):
            Jumps(wrong)


@pytest.fixture(scope="module")
def data(memory_store):
    return Data.from_stores([memory_store], DataConfig("unused", MIXTURE, 16, 3), 3000)


@settings(deadline=None, max_examples=20)
@given(some_jumps)
def test_counts_by_source_are_those_of_the_rows_that_are_read(data, jumps):
    source, _ = data.schedule.locate(np.array(read_rows(jumps, 100)))
    for consumed in (0, 1, 30, 60, 61, 99, 100):
        counted = np.bincount(source[:consumed], minlength=len(data.source_names))
        np.testing.assert_array_equal(jumps.counts(data.schedule, consumed), counted)


def test_the_loader_reads_on_behind_what_is_left_out_and_resumes_anywhere(data):
    sizes, jumps = BatchSizes(8, ((32, 16),)), Jumps(((16, 40), (64, 8)))
    whole = list(data.loader(0, sizes, stop_row=112, jumps=jumps))
    begins = [0, 8, 16 + 40, 24 + 40, 32 + 40, 48 + 40, 64 + 48, 80 + 48, 96 + 48]
    assert [row for row, _ in whole] == [8, 16, 24, 32, 48, 64, 80, 96, 112]
    for (_, batch), begin in zip(whole, begins, strict=True):
        expected = data.batch(begin, len(batch.tokens))
        for name, one, other in zip(batch._fields, batch, expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    for done in range(1, len(whole)):
        row = whole[done - 1][0]
        rest = data.loader(row, sizes, stop_row=112, jumps=jumps)
        for (_, one), (_, other) in zip(rest, whole[done:], strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_jump_within_a_batch_is_refused(data):
    with pytest.raises(UserError, match="40 rows are to be left out once 20 are consumed, and no batch begins there"):
        data.loader(0, 8, jumps=Jumps(((20, 40),)))
    next(data.loader(24, 8, jumps=Jumps(((20, 40),))))  # it is past


def test_only_the_past_of_a_mixture_must_be_the_same(data, memory_store):
    """Row 90 is the first of the second stage."""

    def other(mixture, rows=3000):
        return Data.from_stores([memory_store], DataConfig("unused", mixture, 16, 3), rows)

    saved = json.loads(json.dumps(data.describe()))
    later = other(Mixture.temperature(0.5).stage(at_row=91, mixture=Mixture.unimax(40).without("fi")))
    without = other(Mixture.temperature(0.5))
    for changed in (later, without):
        changed.require_same(saved, 90)
        data.require_same(changed.describe(), 90)
        with pytest.raises(UserError, match=r"other data: schedule\.stages"):
            changed.require_same(saved, 91)
        for row in range(0, 88, 8):
            np.testing.assert_array_equal(changed.batch(row, 8).tokens, data.batch(row, 8).tokens)
    with pytest.raises(UserError, match="seed was 3 and is 4"):
        Data.from_stores([memory_store], DataConfig("unused", MIXTURE, 16, 4), 3000).require_same(saved, 0)
    assert NO_JUMPS.data_row(90) == 90
