"""Floors, epoch caps and ramps against independent solutions: root finding, brute force, and the integral of a line."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from eurollm_jax.data.compile import RAMP_PIECES
from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.schedule import DEVIATION, SHARE_SUM
from eurollm_jax.errors import UserError

names_of = "abcdefgh"


def sizes_of(rows):
    """Sources a, b, ... of these rows, with 512 tokens and 2 kB each."""
    return {name: SourceSize(n * 512, n * 2048, n) for name, n in zip(names_of, rows, strict=False)}


def stage_shares(schedule, stage=0):
    return {n: s / SHARE_SUM for n, s in zip(schedule.names, schedule.stages[stage].shares, strict=True)}


weight_lists = st.lists(st.floats(1e-3, 1), min_size=2, max_size=8)


@settings(deadline=None, max_examples=150)
@given(weight_lists, st.data())
def test_floors_are_the_water_filling_of_a_root_finder(weights, data):
    """max(floor, c * share) for the one c at which all sum to 1."""
    shares = {n: w / sum(weights) for n, w in zip(names_of, weights, strict=False)}
    floors = {n: data.draw(st.floats(0.001, 0.9 / len(shares))) for n in shares if data.draw(st.booleans())}
    mixture = Mixture.shares(shares)
    schedule = (mixture.floor(floors) if floors else mixture).compile(sizes_of([10] * len(shares)), 100)

    def excess(c):
        return sum(max(floors.get(n, 0), c * s) for n, s in shares.items()) - 1

    c = brentq(excess, 0, 1.001, xtol=1e-14)
    expected = {n: max(floors.get(n, 0), c * s) for n, s in shares.items()}
    assert stage_shares(schedule) == pytest.approx(expected, abs=1e-8)


def test_a_floor_of_a_group_lifts_its_sources_by_one_factor_in_the_unit_of_the_rule():
    sizes = {
        "bg": SourceSize(512_000, 3_000_000, 1000, "bg"),
        "fi/a": SourceSize(51_200, 204_800, 100, "fi"),
        "fi/b": SourceSize(51_200, 409_600, 100, "fi"),
        "de": SourceSize(5_120_000, 20_480_000, 10_000, "de"),
    }
    before = stage_shares(Mixture.proportional("bytes").compile(sizes, 100))
    after = stage_shares(Mixture.proportional("bytes").floor({"fi": 0.3}).compile(sizes, 100))
    octets = {n: after[n] * sizes[n].bytes / sizes[n].rows for n in sizes}
    assert (octets["fi/a"] + octets["fi/b"]) / sum(octets.values()) == pytest.approx(0.3, abs=1e-7)
    assert after["fi/a"] / after["fi/b"] == pytest.approx(before["fi/a"] / before["fi/b"], rel=1e-6)
    assert after["bg"] / after["de"] == pytest.approx(before["bg"] / before["de"], rel=1e-6)
    every = stage_shares(Mixture.proportional().floor(0.1, over="language").compile(sizes, 100))
    assert every["bg"] == pytest.approx(0.1, abs=1e-7)
    assert every["fi/a"] + every["fi/b"] == pytest.approx(0.1, abs=1e-7)


@settings(deadline=None, max_examples=150)
@given(weight_lists, st.lists(st.integers(50, 4000), min_size=8, max_size=8), st.floats(0.5, 4))
def test_a_cap_in_one_stage_is_the_water_filling_of_a_root_finder(weights, rows, max_epochs):
    """min(cap, c * share) for the one c at which all sum to 1, where there is one."""
    total = 2000
    shares = {n: w / sum(weights) for n, w in zip(names_of, weights, strict=False)}
    sizes = sizes_of(rows[: len(shares)])
    cap = {n: max_epochs * sizes[n].rows / total for n in shares}
    mixture = Mixture.shares(shares).cap_epochs(max_epochs, excess="redistribute")
    assume(abs(sum(cap.values()) - 1) > 1e-6)
    if sum(cap.values()) < 1:
        with pytest.raises(UserError, match=r"leaves rows that no source may fill"):
            mixture.compile(sizes, total)
        return

    def excess(c):
        return sum(min(cap[n], c * s) for n, s in shares.items()) - 1

    c = brentq(excess, 0, 1e7, xtol=1e-12)
    expected = {n: min(cap[n], c * s) for n, s in shares.items()}
    assert stage_shares(mixture.compile(sizes, total)) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_cap_over_stages_binds_by_one_factor_and_leaves_the_rest_in_proportion(data):
    sources, stages = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4))
    sizes = sizes_of(data.draw(st.lists(st.integers(100, 3000), min_size=sources, max_size=sources)))
    weight = st.lists(st.one_of(st.just(0.0), st.floats(0.05, 1)), min_size=sources, max_size=sources).filter(any)
    mixtures = []
    for _ in range(stages):
        weights = data.draw(weight)
        mixtures.append(Mixture.shares({n: w / sum(weights) for n, w in zip(sizes, weights, strict=True) if w}))
    mixture, length = mixtures[0], 1000
    for i, other in enumerate(mixtures[1:], start=1):
        mixture = mixture.stage(at_row=i * length, mixture=other)
    total = stages * length
    plain = mixture.compile(sizes, total)
    most = data.draw(st.floats(0.2, 3))
    try:
        capped = mixture.cap_epochs(most, excess="redistribute").compile(sizes, total)
    except UserError as error:
        assert "no source may fill" in str(error)  # noqa: PT017
        return
    before = np.array([stage.shares for stage in plain.stages]) / SHARE_SUM
    after = np.array([stage.shares for stage in capped.stages]) / SHARE_SUM
    rows, cap = after.sum(axis=0) * length, most * np.array([size.rows for size in sizes.values()])
    assert np.all(rows <= cap + 1e-3)
    bound = rows >= cap - 1e-3
    assert np.all(bound | (rows >= before.sum(axis=0) * length - 1e-3))  # nobody else gives anything up
    for stage, (old, new) in enumerate(zip(before, after, strict=True)):
        free = ~bound & (old > 0)
        assert np.all((old > 0) == (new > 0)), stage
        if free.any():
            assert np.ptp(new[free] / old[free]) < 1e-4
    if stages == 1 or not bound.any():
        return
    first = np.flatnonzero(before.sum(axis=0) * length > cap)  # what is over at once keeps its shape over the stages
    for source in first:
        here = before[:, source] > 0
        assert np.ptp(after[here, source] / before[here, source]) < 1e-4


def test_the_cap_is_held_to_the_row_over_a_ramp():
    sizes = sizes_of([5000, 300, 80_000])
    mixture = (
        Mixture.shares({"a": 0.5, "b": 0.5})
        .stage(at_row=1000, mixture=Mixture.shares({"c": 0.9, "b": 0.1}), ramp_rows=4000)
        .cap_epochs(2, excess="redistribute")
    )
    schedule = mixture.compile(sizes, 9000)
    counts = dict(zip(schedule.names, schedule.counts(9000).tolist(), strict=True))
    assert abs(counts["b"] - 600) <= DEVIATION * len(schedule.stages)
    with pytest.raises(UserError, match=r"cap_epochs\(2\) is exceeded in 9,000 rows by b \(\d"):
        mixture.cap_epochs(2).compile(sizes, 9000)


def test_a_floor_that_a_cap_cannot_keep_is_refused_by_name():
    sizes = sizes_of([5000, 100])
    mixture = Mixture.proportional().floor({"b": 0.25}).cap_epochs(4, excess="redistribute")
    mixture.compile(sizes, 1600)
    with pytest.raises(UserError, match=r"'b' has the floor 0.25, and cap_epochs\(4\) allows it 0.2"):
        mixture.compile(sizes, 2000)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 3000), weight_lists, weight_lists, st.data())
def test_rows_of_a_ramp_are_within_the_stated_bound_of_the_line(start, ramp, before, after, data):
    n = min(len(before), len(after))
    a, b = ({k: w / sum(ws[:n]) for k, w in zip(names_of, ws[:n], strict=False)} for ws in (before, after))
    sizes, hold = sizes_of([100] * n), data.draw(st.integers(0, 500))
    mixture = Mixture.shares(a).stage(at_row=start, mixture=Mixture.shares(b), ramp_rows=ramp)
    total = start + ramp + hold
    schedule = mixture.compile(sizes, total)
    starts = [stage.start for stage in schedule.stages]
    pieces = sum(start <= s < start + ramp for s in starts)
    assert pieces <= min(RAMP_PIECES, ramp)
    for k in {*np.linspace(0, total, 23).astype(int).tolist(), start, start + ramp, start + ramp // 2}:
        counts = dict(zip(schedule.names, schedule.counts(k).tolist(), strict=True))
        begun, way = sum(s < k for s in starts), min(max(k - start, 0), ramp)
        for name in sizes:
            line = min(k, start) * a[name] + max(k - start - ramp, 0) * b[name]
            line += way * a[name] + (b[name] - a[name]) * way**2 / 2 / ramp
            bound = abs(b[name] - a[name]) * math.ceil(ramp / pieces) ** 2 / (8 * ramp)
            assert abs(counts[name] - line) <= bound + DEVIATION * begun + 1e-4


def test_a_ramp_makes_small_steps_and_covers_its_rows_exactly():
    mixture = Mixture.shares({"a": 0.999, "b": 0.001}).stage(
        at_row=100, mixture=Mixture.shares({"a": 0.4, "b": 0.1, "c": 0.5}), ramp_rows=64_000_000
    )
    schedule = mixture.compile(sizes_of([10, 10, 10]), 10**8)
    starts = [stage.start for stage in schedule.stages]
    assert starts == [0, *range(100, 64_000_100, 10**6), 64_000_100]
    for before, after in itertools.pairwise(schedule.stages):
        for x, y, ends in zip(before.shares, after.shares, [(0.999, 0.4), (0.001, 0.1), (0, 0.5)], strict=True):
            assert abs(Fraction(y - x, SHARE_SUM)) <= max(ends) / RAMP_PIECES + 1e-9
    flat = Mixture.shares({"a": 0.5, "b": 0.5}).stage(
        at_row=100, mixture=Mixture.shares({"a": 0.51, "b": 0.49}), ramp_rows=6400
    )
    assert len(flat.compile(sizes_of([10, 10]), 10_000).stages) == 2 + 2  # a change of 2 % needs two pieces
    short = Mixture.shares({"a": 1}).stage(at_row=100, mixture=Mixture.shares({"b": 1}), ramp_rows=27)
    assert len(short.compile(sizes_of([10, 10]), 10_000).stages) == 2 + 3  # of nine rows each, not 27 of one


def test_a_run_may_end_with_its_ramp():
    mixture = Mixture.shares({"a": 1}).stage(at_row=50, mixture=Mixture.shares({"b": 1}), ramp_rows=50)
    schedule = mixture.compile(sizes_of([100, 100]), 100)
    assert abs(schedule.counts(100)[0] - 75) <= DEVIATION * len(schedule.stages)
    assert schedule.counts(50).tolist() == [50, 0]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8, unique=True), st.floats(0.2, 6), st.floats(0.01, 0.99))
def test_unimax_is_the_algorithm_of_the_paper(rows, max_epochs, filled):
    """Chung et al. 2023, algorithm 1, in tokens: from the smallest up, min(budget left / languages left, N * size)."""
    sizes = sizes_of(rows)
    total = math.floor(max_epochs * filled * sum(rows))
    assume(total >= 1)
    budget, allotted = Fraction(total), {}
    ascending = sorted(sizes, key=lambda name: sizes[name].rows)
    for i, name in enumerate(ascending):
        allotted[name] = min(budget / (len(ascending) - i), Fraction(max_epochs) * sizes[name].rows)
        budget -= allotted[name]
    expected = {name: float(n / sum(allotted.values())) for name, n in allotted.items()}
    assume(min(expected.values()) > 1e-8)
    assert stage_shares(Mixture.unimax(max_epochs).compile(sizes, total)) == pytest.approx(expected, abs=1e-8)
