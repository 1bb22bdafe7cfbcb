"""Best-fit decreasing, against a literal one-by-one packing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eurollm_jax.data.bin_packing import best_fit_decreasing, plan_rows


def one_by_one(sizes, length):
    """Rows as lists of piece numbers: each piece, in turn, goes to the row with the least room that takes it; among
    equals, to the one that came to this room first."""
    rows, rooms, since = [], [], []
    for piece, size in enumerate(sizes):
        fitting = [row for row in range(len(rows)) if rooms[row] >= size]
        if fitting:
            row = min(fitting, key=lambda row: (rooms[row], since[row]))
        else:
            row = len(rows)
            rows.append([])
            rooms.append(length)
            since.append(None)
        rows[row].append(piece)
        rooms[row] -= size
        since[row] = piece
    return rows


@given(st.lists(st.integers(1, 24), max_size=150), st.integers(24, 40))
def test_pieces_go_where_one_by_one_best_fit_puts_them(sizes, length):
    sizes = sorted(sizes, reverse=True)
    row, rank, filled = best_fit_decreasing(np.bincount(sizes, minlength=length + 1), length)
    rows = [[None] * n for n in filled.tolist()]
    for piece, (at, place) in enumerate(zip(row.tolist(), rank.tolist(), strict=True)):
        rows[at][place] = piece
    assert rows == one_by_one(sizes, length)


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 20))
def test_a_plan_holds_each_prediction_of_each_document_once(tokens, length):
    offsets = np.cumsum([0, *tokens])
    plan = plan_rows(offsets, length)
    places = [
        position
        for start, size in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)
        for position in range(start, start + size)
    ]
    expected = [int(o) + i for o, n in zip(offsets[:-1], tokens, strict=True) for i in range(n - 1)]
    assert sorted(places) == expected
    sums = [int(plan.lengths[a:b].sum()) for a, b in zip(plan.row_first[:-1], plan.row_first[1:], strict=True)]
    assert all(0 < used <= length for used in sums)


def test_a_document_is_cut_only_where_it_is_longer_than_a_row():
    lengths = np.random.default_rng(0).integers(2, 100, 2000)
    offsets = np.cumsum([0, *lengths])
    plan = plan_rows(offsets, 32)
    document = np.searchsorted(offsets, plan.starts, side="right") - 1
    np.testing.assert_array_equal(np.bincount(document, minlength=2000), -(-(lengths - 1) // 32))
    places = 32 * (len(plan.row_first) - 1)
    assert places - (lengths - 1).sum() < 0.01 * places


def test_the_same_documents_give_the_same_plan():
    offsets = np.cumsum([0, *np.random.default_rng(1).integers(1, 300, 5000)])
    for one, other in zip(plan_rows(offsets, 128), plan_rows(offsets.copy(), 128), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_document_without_predictions_is_in_no_row():
    plan = plan_rows(np.cumsum([0, 1, 5, 0, 1]), 8)
    assert plan.last_rows.tolist() == [-1, 0, -1, -1]
    assert (plan.starts.tolist(), plan.lengths.tolist()) == ([1], [4])
