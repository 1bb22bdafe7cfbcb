import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.data import order as order_module
from eurollm_jax.data.order import Order, _hash_key, permute
from eurollm_jax.data.schedule import DEVIATION, SHARE_SUM, Schedule, Stage


def shares_of(weights):
    """Integer shares in proportion to the weights; what rounding leaves goes to the largest."""
    shares = [int(w * SHARE_SUM / sum(weights)) for w in weights]
    shares[shares.index(max(shares))] += SHARE_SUM - sum(shares)
    return tuple(shares)


def schedule_of(*stages):
    """From (start, weights) pairs; the sources are s0, s1, ..."""
    names = tuple(f"s{i}" for i in range(len(stages[0][1])))
    return Schedule(names, tuple(Stage(start, shares_of(weights)) for start, weights in stages))


def order_of(schedule, sizes, seed=0):
    return Order(schedule, dict(zip(schedule.names, sizes, strict=True)), seed)


@st.composite
def orders(draw):
    sources = draw(st.integers(1, 9))
    weight = st.one_of(st.just(0), st.integers(1, 3), st.floats(1e-4, 1e3))
    weights = st.lists(weight, min_size=sources, max_size=sources).filter(any)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 1500), max_size=4)))]
    schedule = schedule_of(*((start, draw(weights)) for start in starts))
    sizes = draw(st.lists(st.integers(1, 120), min_size=sources, max_size=sources))
    return order_of(schedule, sizes, draw(st.integers(0, 5)))


ROWS = 2000


@settings(deadline=None, max_examples=60)
@given(orders())
def test_every_row_of_every_source_comes_once_an_epoch_in_any_stage(order):
    k = np.arange(ROWS)
    source, j = order.locate(k)
    same_source, epoch, row = order.rows(k)
    np.testing.assert_array_equal(source, same_source)
    for s, size in enumerate(order.sizes):
        here = source == s
        np.testing.assert_array_equal(j[here], np.arange(here.sum()))
        np.testing.assert_array_equal(epoch[here], j[here] // size)
        for start in range(0, here.sum(), size):
            seen = row[here][start : start + size]
            assert len(set(seen.tolist())) == len(seen)
            assert len(seen) < size or set(seen.tolist()) == set(range(size))
    np.testing.assert_array_equal(order.index(source, j), k)
    np.testing.assert_array_equal(order.index_of_row(source, row, epoch), k)


@settings(deadline=None, max_examples=60)
@given(orders())
def test_counts_are_the_brute_force_counts_and_near_the_exact_shares(order):
    source, _ = order.locate(np.arange(ROWS))
    stages = order.schedule.stages
    for k in range(0, ROWS + 1, 37):
        counts = order.counts(k)
        np.testing.assert_array_equal(counts, np.bincount(source[:k], minlength=len(counts)))
        ends = [stage.start for stage in stages[1:]] + [ROWS]
        exact = [Fraction(0)] * len(counts)
        for stage, end in zip(stages, ends, strict=True):
            within = max(min(k, end) - stage.start, 0)
            exact = [e + Fraction(share * within, SHARE_SUM) for e, share in zip(exact, stage.shares, strict=True)]
        begun = sum(stage.start < k for stage in stages)
        assert all(abs(count - e) <= DEVIATION * begun for count, e in zip(counts.tolist(), exact, strict=True))


def test_the_deviation_bound_holds_for_the_tree_that_is_deepest():
    """Fibonacci shares make Huffman's tree a chain, where most roundings lie between a leaf and the root."""
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    schedule = schedule_of((0, fibonacci))
    shares = np.array(schedule.stages[0].shares) / SHARE_SUM
    generator = np.random.default_rng(0)
    worst = max(np.abs(schedule.counts(k) - k * shares).max() for k in generator.integers(0, 10**6, 3000).tolist())
    assert 0.9 < worst <= DEVIATION


@pytest.mark.parametrize("start", [10**7, 10**12 - 500, 2**50, 2**58])
def test_far_rows_are_exact(start):
    """Counts are computed in Python's unbounded integers, rows in int64: they agree however far."""
    weights = np.random.default_rng(1).dirichlet(np.full(30, 0.2)).clip(1e-7).tolist()
    schedule = schedule_of((0, weights), (start // 3, weights[::-1]))
    order = order_of(schedule, range(2**52 - 30, 2**52), seed=3)
    k = np.arange(start, start + 1000)
    source, j = order.locate(k)
    counts = [order.counts(int(x)) for x in (start, start + 500, start + 1000)]
    np.testing.assert_array_equal(counts[1] - counts[0], np.bincount(source[:500], minlength=30))
    np.testing.assert_array_equal(counts[2] - counts[1], np.bincount(source[500:], minlength=30))
    for s in set(source.tolist()):
        np.testing.assert_array_equal(j[source == s], counts[0][s] + np.arange((source == s).sum()))
    np.testing.assert_array_equal(order.index(source, j), k)
    source, epoch, row = order.rows(k)
    np.testing.assert_array_equal(order.index_of_row(source, row, epoch), k)


def test_a_share_of_one_in_a_million_is_honoured():
    schedule = schedule_of((0, [1e-6, 0.3, 0.699989, 1e-5]))
    counts = schedule.counts(10**7)
    assert abs(counts[0] - 10) <= DEVIATION
    assert abs(counts[3] - 100) <= DEVIATION
    first = schedule.index(np.zeros(10, np.int64), np.arange(10))
    np.testing.assert_allclose(np.diff(first), 10**6, rtol=0.01)


def test_rows_that_never_come_have_no_number():
    schedule = schedule_of((0, [1, 1]), (100, [0, 1]))
    assert schedule.index(np.array([0, 0, 1]), np.array([49, 50, 50])).tolist()[1:] == [-1, 100]
    assert schedule.index(np.array([0]), np.array([49])) < 100


def test_the_order_within_a_source_ignores_the_other_sources():
    sizes = {"bg": 500, "fi": 700, "mt": 30}
    three = Schedule(("bg", "fi", "mt"), (Stage(0, shares_of([5, 3, 2])),))
    two = Schedule(("bg", "mt"), (Stage(0, shares_of([1, 9])),))
    k = np.arange(3000)
    for name in ("bg", "mt"):
        seen = []
        for schedule in (three, two):
            order = Order(schedule, {n: sizes[n] for n in schedule.names}, seed=11)
            source, epoch, row = order.rows(k)
            here = source == schedule.names.index(name)
            seen.append(np.stack([epoch[here], row[here]]))
        both = min(seen[0].shape[1], seen[1].shape[1])
        np.testing.assert_array_equal(seen[0][:, :both], seen[1][:, :both])


def test_seeds_epochs_and_names_give_unrelated_orders():
    """Where seeds are added to epochs, seed 3 in epoch 1 is seed 4 in epoch 0."""
    size = 10_000
    orders = {
        (name, seed, epoch): permute(np.arange(size), size, _hash_key("rows", name, str(seed), str(epoch)))
        for name in ("bg", "bgg")
        for seed in (3, 4)
        for epoch in (0, 1)
    }
    correlation = np.corrcoef(list(orders.values())) - np.eye(len(orders))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(size)


@settings(deadline=None)
@given(st.integers(1, 3000), st.text(max_size=3))
def test_permute_is_a_permutation_and_its_inverse_undoes_it(size, word):
    positions, keys = np.arange(size), _hash_key(word)
    rows = permute(positions, size, keys)
    np.testing.assert_array_equal(np.sort(rows), positions)
    np.testing.assert_array_equal(permute(rows, size, keys, inverse=True), positions)


@pytest.mark.parametrize("size", [65_536, 1_000_003])
def test_the_order_within_a_source_is_statistically_random(size):
    rows = permute(np.arange(size), size, _hash_key("rows", "bg", "0", "0"))
    for lag in (1, 2, 3, 4, 256):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 4.5 / np.sqrt(size)
        distance = np.abs(rows[lag:] - rows[:-lag])
        near = (distance < size // 100).mean()  # neighbours within 1 % of the source
        assert abs(near - 0.0199) < 4.5 * np.sqrt(0.0199 / size)
    above = rows >= size // 2
    runs, n1, n2 = 1 + np.count_nonzero(above[1:] != above[:-1]), above.sum(), (~above).sum()
    mean = 1 + 2 * n1 * n2 / size  # Wald and Wolfowitz
    deviation = np.sqrt((mean - 1) * (mean - 2) / (size - 1))
    assert abs(runs - mean) < 4.5 * deviation


@pytest.mark.parametrize("size", [65_536, 100_003, 1_000_000])
def test_rows_a_side_of_the_grid_apart_are_unrelated(size, monkeypatch):
    """Where a Feistel cipher with too few rounds shows: positions that differ in one half alone, one column and the
    next. Chi-square of their rows' distances; five rounds pass it, and four do not, which is seen too."""

    keys = [_hash_key("rows", "et", str(seed), "0") for seed in range(3)]

    def surplus(rounds, bins=1024):
        monkeypatch.setattr(order_module, "ROUNDS", rounds)
        side = -(-size // math.ceil(math.sqrt(size)))
        counts = np.zeros(bins)
        for key in keys:
            rows = permute(np.arange(size), size, key[:rounds])
            counts += np.bincount((rows[side:] - rows[:-side]) % size * bins // size, minlength=bins)
        expected = counts.sum() / bins
        return (((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1))

    whole = order_module.ROUNDS
    assert surplus(4) > 9
    assert abs(surplus(whole)) < 4.5


@pytest.mark.parametrize("size", [2, 3, 6, 10, 31])
def test_small_sources_reach_every_place_equally_often(size):
    epochs = 4000
    table = np.zeros((size, size))
    for epoch in range(epochs):
        table[np.arange(size), permute(np.arange(size), size, _hash_key("rows", "mt", "0", str(epoch)))] += 1
    chi_square, freedom = ((table - epochs / size) ** 2 / (epochs / size)).sum(), (size - 1) ** 2
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom) + 4.5


def test_batches_are_permuted_and_together_are_the_rows():
    order = order_of(schedule_of((0, [1, 2])), [50, 60], seed=1)
    batches = [order.batch_rows(first, 48) for first in range(0, 4800, 48)]
    for i, batch in enumerate(batches):
        assert sorted(batch.tolist()) == list(range(48 * i, 48 * i + 48))
        assert batch.tolist() != sorted(batch.tolist())
    assert len({tuple((batch % 48).tolist()) for batch in batches}) == len(batches)


def test_no_host_of_64_sees_a_skewed_mixture():
    order = order_of(schedule_of((0, [8, 4, 2, 1, 1])), [10**6] * 5, seed=5)
    hosts, per_host, batches = 64, 8, 1000
    table = np.zeros((hosts, 5))
    for first in range(0, batches * hosts * per_host, hosts * per_host):
        source, _ = order.locate(order.batch_rows(first, hosts * per_host))
        np.add.at(table, (np.repeat(np.arange(hosts), per_host), source), 1)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    chi_square, freedom = ((table - expected) ** 2 / expected).sum(), (hosts - 1) * 4
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_single_rows_may_be_asked_for_as_scalars():
    order = order_of(schedule_of((0, [8, 4, 1])), [30, 20, 10])
    source, epoch, row = order.rows(np.array(77))
    assert order.index_of_row(source, row, epoch) == 77
    assert order.index(*order.locate(np.array(77))) == 77


def test_an_order_survives_pickling():
    order = order_of(schedule_of((0, [8, 4, 1]), (500, [0, 1, 1])), [30, 20, 10])
    k = np.arange(1000)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).rows(k), order.rows(k))


def test_a_source_with_a_share_and_no_rows_is_refused():
    with pytest.raises(ValueError, match="'s1' has a share but no rows"):
        order_of(schedule_of((0, [1, 1])), [5, 0])
