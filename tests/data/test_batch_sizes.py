"""Batch sizes: steps and rows are each other's inverse, whatever the ramp, and no row is left out or read twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.errors import UserError


@st.composite
def ramps(draw):
    rows = sorted(draw(st.sets(st.integers(1, 300), max_size=6)))
    return BatchSizes(draw(st.integers(1, 50)), tuple((row, draw(st.integers(1, 50))) for row in rows))


def walk(sizes, stop, row=0):
    """(first row, size) of every batch, one after the other, by the definition alone."""
    batches = []
    while row < stop:
        size = sizes.first
        for change, value in sizes.changes:
            if change <= row:
                size = value
        batches.append((row, size))
        row += size
    return batches


@given(ramps())
def test_batches_follow_each_other_as_the_changes_say(sizes):
    batches = walk(sizes, 1000)
    for step, (row, size) in enumerate(batches):
        assert (sizes.row_of_step(step), sizes.size_at(row)) == (row, size)
        assert {sizes.step_of_row(r) for r in range(row, row + size)} == {step}
    assert set(sizes.sizes) == {size for _, size in batches}


@given(ramps(), st.integers(0, 900))
def test_a_run_has_as_many_steps_as_reach_its_last_row(sizes, total_rows):
    assert sizes.steps(total_rows) == len(walk(sizes, total_rows))


@given(ramps(), st.integers(0, 400))
def test_batches_can_begin_anew_at_any_row(sizes, start):
    later = sizes.from_row(start)
    for step, (row, size) in enumerate(walk(sizes, 700, start)):
        assert (later.row_of_step(step), later.size_at(row), later.step_of_row(row)) == (row, size, step)


@given(ramps(), st.integers(1, 40))
def test_changes_after_the_end_of_a_run_are_no_part_of_it(sizes, steps):
    stop = sizes.row_of_step(steps)
    ours = sizes.until(stop)
    assert walk(ours, stop) == walk(sizes, stop)
    assert set(ours.sizes) == {size for _, size in walk(sizes, stop)}


def test_a_ramp_of_a_long_run_needs_no_walk():
    sizes = BatchSizes(512, ((10**9, 1024), (10**12, 4096)))
    assert sizes.row_of_step(sizes.step_of_row(10**15)) <= 10**15 < sizes.row_of_step(sizes.step_of_row(10**15) + 1)
    assert sizes.row_of_step(10**9 // 512) == 10**9
    assert sizes.size_at(10**9 - 1) == 512 != sizes.size_at(10**9) == 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "a batch of 0 rows is not possible"),
        ((8, ((16, -4),)), "a batch of -4 rows is not possible"),
        ((8, ((32, 16), (16, 4))), "batches of 4 rows at row 16 does not come after row 32"),
        ((8, ((16, 4), (16, 2))), "batches of 2 rows at row 16 does not come after row 16"),
        ((8, ((0, 16),)), "batches of 16 rows at row 0 does not come after row 0"),
        ((8, (), -1), "cannot begin at row -1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchSizes(*arguments)
