"""The design of a study: Dirichlet moments in closed form, bounds over random spaces, and designs made by chance."""

import itertools
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.ablation.bounds import LEAST
from eurollm_jax.ablation.design import Arm, arms, require_feasible
from eurollm_jax.ablation.space import Space
from eurollm_jax.ablation.study import Design
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.errors import UserError

DRAWS = Design(draws=24, prior_runs=0)


def space_of(prior, lower=None, upper=None, names=None, max_epochs=None):
    """A source of 1,000 rows for each group."""
    prior = np.array(prior, np.float64)
    groups = tuple(names or "ABCDEFGH"[: len(prior)])
    return Space(
        groups,
        tuple({f"source {group}": 1.0} for group in groups),
        prior,
        np.zeros(len(prior)) if lower is None else np.array(lower, np.float64),
        np.ones(len(prior)) if upper is None else np.array(upper, np.float64),
        {f"source {group}": SourceSize(512_000, 2_048_000, 1000) for group in groups},
        (),
        np.zeros(0),
        np.zeros((0, len(prior))),
        max_epochs,
    )


def shares_of(found, *kinds):
    return np.array([arm.shares for arm in found if not kinds or arm.kind in kinds])


@pytest.mark.parametrize(("fixed", "concentration"), [(False, 20.0), (False, 5.0), (True, 20.0)])
def test_draws_have_the_moments_of_their_dirichlet(fixed, concentration):
    """Mean p and variance p (1 - p) / (s + 1); with a share fixed, the same of what is left of the shares and of s."""
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    bounds = dict(lower=[0.4, 0, 0, 0], upper=[0.4, 1, 1, 1]) if fixed else {}
    design = Design(draws=1000, concentrations=(concentration, concentration), zeroed=0, candidates=1, prior_runs=0)
    designs = [replace(design, seed=seed) for seed in range(4)]
    found = np.concatenate([shares_of(arms(design, space_of(prior, **bounds))) for design in designs])
    if fixed:
        assert (found[:, 0] == 0.4).all()
        found, prior, concentration = found[:, 1:] / 0.6, prior[1:] / 0.6, concentration * 0.6
    variance = prior * (1 - prior) / (concentration + 1)
    np.testing.assert_allclose(found.mean(axis=0), prior, atol=4 * np.sqrt(variance.max() / 4000))
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=0.1)


def test_concentrations_cover_their_range_evenly():
    """The spread of single draws about a prior of two equal shares tells their concentration: E|x - 1/2| falls with it.
    A range draws nearer than its lower end alone and further than its upper end alone."""
    space = space_of([0.5, 0.5])

    def spread(low, high):
        design = Design(draws=300, concentrations=(low, high), zeroed=0, candidates=1, prior_runs=0)
        return np.abs(shares_of(arms(design, space))[:, 0] - 0.5).mean()

    assert spread(1, 1) > 1.2 * spread(1, 50) > 1.2**2 * spread(50, 50)
    assert spread(1, 50) == pytest.approx(np.mean([spread(s, s) for s in 50 ** np.linspace(0.05, 0.95, 10)]), rel=0.1)


def least_distance(shares):
    roots = np.sqrt(shares)
    return min(((a - b) ** 2).sum() for a, b in itertools.combinations(roots, 2))


def test_the_chosen_lie_further_apart_than_what_is_drawn():
    space = space_of([0.3, 0.25, 0.2, 0.15, 0.1])
    chosen, drawn = (
        [least_distance(shares_of(arms(replace(DRAWS, candidates=n, seed=seed), space))) for seed in range(8)]
        for n in (16, 1)
    )
    assert np.mean(chosen) > 3 * np.mean(drawn)
    assert min(chosen) > max(drawn)


def test_each_draw_is_the_farthest_of_its_candidates():
    """One candidate alone is the first of many: what is kept of these is at least as far from the prior."""
    space = space_of([0.5, 0.3, 0.2])
    for seed in range(20):
        many = shares_of(arms(replace(DRAWS, draws=6, candidates=16, zeroed=0, seed=seed), space))
        first = shares_of(arms(replace(DRAWS, draws=1, candidates=1, zeroed=0, seed=seed), space))
        distance = lambda a, space=space: ((np.sqrt(a) - np.sqrt(space.prior)) ** 2).sum()  # noqa: E731
        assert distance(many[0]) >= distance(first[0])


def test_arms_follow_from_the_seed_and_a_longer_design_begins_with_a_shorter_one():
    space = space_of([0.3, 0.25, 0.2, 0.15, 0.1])
    found = arms(DRAWS, space)
    assert found == arms(DRAWS, space)
    assert found == arms(replace(DRAWS, draws=40), space)[:24]
    assert not set(found) & set(arms(replace(DRAWS, seed=1), space))


@pytest.mark.parametrize("zeroed", [0.0, 0.25, 0.4, 1.0])
def test_the_wanted_part_of_the_draws_leaves_groups_out(zeroed):
    """At a concentration at which no share comes near 0 by itself."""
    space = space_of([0.3, 0.25, 0.2, 0.15, 0.1])
    design = Design(draws=40, concentrations=(50, 200), zeroed=zeroed, prior_runs=0)
    found = arms(design, space)
    without = [arm for arm in found if arm.kind == "zeroed"]
    assert len(without) == round(40 * zeroed)
    for arm in found:
        assert (min(arm.shares) == 0) == (arm.kind == "zeroed")
        assert sum(share == 0 for share in arm.shares) <= 2
    if without:
        assert (np.count_nonzero(shares_of(without) == 0, axis=0) > 0).all()  # each group now and then


@st.composite
def spaces(draw):
    """Any prior, with some bounds around it and some shares fixed."""
    size = draw(st.integers(2, 7))
    lists = lambda floats: np.array(draw(st.lists(floats, min_size=size, max_size=size)))  # noqa: E731
    prior = lists(st.floats(0.02, 1))
    prior /= prior.sum()
    kinds = draw(st.lists(st.sampled_from(["free", "floor", "ceiling", "both", "fixed"]), min_size=size, max_size=size))
    lower, upper = prior * lists(st.floats(0.01, 1)), prior + (1 - prior) * lists(st.floats(0, 1))
    lower = np.where(np.isin(kinds, ["floor", "both"]), lower, 0)
    upper = np.where(np.isin(kinds, ["ceiling", "both"]), upper, 1)
    fixed = np.array(kinds) == "fixed"
    fixed[:2] = False
    return space_of(prior, np.where(fixed, prior, lower), np.where(fixed, prior, upper))


@settings(deadline=None, max_examples=60)
@given(spaces(), st.floats(0.5, 5), st.integers(0, 100))
def test_no_arm_crosses_a_bound(space, concentration, seed):
    design = Design(
        draws=6,
        concentrations=(concentration, 20),
        zeroed=0.5,
        candidates=2,
        leave_one_out=True,
        one_at_a_time=2,
        seed=seed,
    )
    found = arms(design, space)
    shares = shares_of(found)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)
    assert (shares >= space.lower).all()
    assert (shares <= space.upper).all()
    assert len({arm.name for arm in found}) == len(found)
    exact = np.isclose(shares * 1e9, np.round(shares * 1e9), atol=1e-4, rtol=0)
    exact |= (shares == space.lower) | (shares == space.upper)
    assert ((~exact).sum(axis=1) <= 1).all()  # of each arm one takes what rounding leaves
    small = (shares > 0) & (shares < LEAST)
    # Only where nothing else may take up the share: all the others are at their bounds.
    for row, low in zip(shares, small, strict=True):
        assert not low.any() or np.all((row == space.upper) | low | (row == 0))
    for arm in found:
        if arm.kind == "zeroed":
            assert (np.array(arm.shares) == 0).any()


def test_bounds_that_few_draws_keep_are_met_by_moving_the_draws(caplog):
    """Every share within a tenth of the prior's: no draw of Dirichlet(prior) is."""
    prior = np.array([0.3, 0.3, 0.2, 0.2])
    space = space_of(prior, 0.9 * prior, 1.1 * prior)
    found = shares_of(arms(Design(draws=8, concentrations=(1, 1), prior_runs=0), space))
    assert len(found) > 4
    assert least_distance(found) > 1e-6
    assert "Dirichlet draws lie beyond the bounds, most often" in caplog.text
    assert "8 of the 8 that were kept were moved onto the bounds: higher concentrations" in caplog.text
    assert "the bounds allow no draw without one of the groups: all draws have all of them" in caplog.text


def test_groups_one_at_a_time_by_hand():
    space = space_of([0.5, 0.3, 0.2], names=("Baltic", "West Slavic", "is/a"))
    design = Design(draws=0, prior_runs=2, leave_one_out=True, one_at_a_time=0.5)
    found = arms(design, space)
    assert [(arm.name, arm.kind, arm.seed) for arm in found] == [
        ("prior-0", "prior", 0),
        ("prior-1", "prior", 1),
        *((f"without-{name}", "leave-one-out", 0) for name in ("Baltic", "West-Slavic", "is-a")),
        *((f"{name}-x0.5", "one-at-a-time", 0) for name in ("Baltic", "West-Slavic", "is-a")),
    ]
    np.testing.assert_allclose(
        shares_of(found),
        [
            [0.5, 0.3, 0.2],
            [0.5, 0.3, 0.2],
            [0, 0.6, 0.4],
            [5 / 7, 0, 2 / 7],
            [5 / 8, 3 / 8, 0],
            [0.25, 0.45, 0.3],
            [0.5 * 0.85 / 0.7, 0.15, 0.2 * 0.85 / 0.7],
            [0.5625, 0.3375, 0.1],
        ],
    )


def test_what_the_bounds_rule_out_of_these_is_left_out(caplog):
    space = space_of([0.5, 0.3, 0.2], lower=[0.4, 0, 0], upper=[0.6, 1, 0.2])
    found = arms(Design(draws=0, prior_runs=1, leave_one_out=True, one_at_a_time=2), space)
    assert {arm.name: arm.shares for arm in found} == {
        "prior-0": (0.5, 0.3, 0.2),
        "without-C": pytest.approx((0.6, 0.4, 0)),
        "A-x2": pytest.approx((0.6, 0.24, 0.16)),
        "B-x2": pytest.approx((0.4, 0.6, 0)),
    }
    assert "no mixture without A" in caplog.text
    assert "no mixture without B" in caplog.text
    assert "C-x2 has the shares of prior-0 and is dropped" in caplog.text


def test_names_of_groups_that_become_one_are_numbered():
    space = space_of([0.5, 0.3, 0.2], names=("fi/a", "fi a", "?"))
    found = arms(Design(draws=0, prior_runs=0, leave_one_out=True), space)
    assert [arm.name for arm in found] == ["without-fi-a-1", "without-fi-a-2", "without-group"]
    space = space_of([0.4, 0.3, 0.2, 0.1], names=("a b", "a-b", "a-b-2", "a-b-1"))
    found = arms(Design(draws=0, prior_runs=0, leave_one_out=True), space)
    assert [arm.name for arm in found] == ["without-a-b-3", "without-a-b-4", "without-a-b-2", "without-a-b-1"]


PARTS = st.sampled_from(["a", "b", "-", " ", "/", "-x2", "-1", "-2", "without-"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map("".join), min_size=2, max_size=6, unique=True))
def test_names_of_arms_are_unlike_whatever_groups_are_called(names):
    """Also across kinds: "a-x2" left out and "without-a" twice are both without-a-x2."""
    space = space_of(np.arange(1, len(names) + 1) / sum(range(1, len(names) + 1)), names=names)
    design = Design(draws=2, candidates=1, prior_runs=2, leave_one_out=True, one_at_a_time=2, listed=({names[0]: 1.0},))
    found = [arm.name for arm in arms(design, space)]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in found)
    assert found[:2] == ["prior-0", "prior-1"]
    assert found == [arm.name for arm in arms(design, space)]


def test_listed_shares():
    space = space_of([0.5, 0.3, 0.2])
    listed = ({"A": 0.25, "B": 0.75}, {"A": 0.5, "B": 0.3, "C": 0.2}, {"A": 0.25, "B": 0.75}, {"C": 1.0})
    found = arms(Design(draws=0, prior_runs=0, listed=listed), space)
    assert found == [
        Arm("listed-1", "listed", (0.25, 0.75, 0.0)),
        Arm("listed-2", "listed", (0.5, 0.3, 0.2)),
        Arm("listed-4", "listed", (0.0, 0.0, 1.0)),
    ]


def test_few_runs_are_told_of(caplog):
    with caplog.at_level(logging.WARNING):
        arms(Design(draws=5, prior_runs=0), space_of([0.3, 0.25, 0.2, 0.15, 0.1]))
        assert "5 runs: a log-linear law of 5 groups is fitted to 10 or more" in caplog.text
        caplog.clear()
        arms(Design(draws=10, prior_runs=0), space_of([0.3, 0.25, 0.2, 0.15, 0.1]))
        assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(draws=-1), "draws=-1 must be 0 or more"),
        (dict(prior_runs=-1), "prior_runs=-1 must"),
        (dict(candidates=0), "candidates=0 must be 1 or more"),
        (dict(zeroed=1.5), "zeroed=1.5 must be from 0 to 1"),
        (dict(concentrations=(5, 1)), r"concentrations=\(5, 1\) must be above 0, the lower first"),
        (dict(concentrations=(0, 1)), r"concentrations=\(0, 1\) must"),
        (dict(one_at_a_time=1.0), "one_at_a_time=1.0 must be above 0, and not 1"),
        (dict(seed=-1), "seed=-1 must"),
        (dict(listed=({"Z": 1.0},)), "listed shares 1: there is no group 'Z': the groups are A, B, C"),
        (dict(listed=({"A": 0.5, "C": 0.5}, {"A": 0.5})), "listed shares 2: they sum to 0.5, not 1"),
        (dict(listed=({"A": 1.5, "B": -0.5},)), "listed shares 1: .* has a share that is not 0 or more"),
        (
            dict(listed=({"A": 0.8, "B": 0.2},)),
            "listed shares 1: 'A' has 0.8000, and the constraints allow 0.0000 to 0.7000",
        ),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=f"design: {message}"):
        arms(replace(DRAWS, **changes), space_of([0.5, 0.3, 0.2], upper=[0.7, 1, 1]))


def test_an_arm_that_a_run_cannot_honour_is_named():
    space = space_of([0.5, 0.3, 0.2])
    found = arms(DRAWS, space)
    require_feasible(space, found, 1000)
    twice = Arm("draw-99", "draw", (0.5, 0.3, 0.2))
    capped = space_of([0.5, 0.3, 0.2], max_epochs=0.25)
    with pytest.raises(UserError, match=r"draw-99 cannot be trained for 1,000 rows: mixture: cap_epochs\(0.25\)"):
        require_feasible(capped, [twice], 1000)
    empty = replace(space, sizes={**space.sizes, "source C": SourceSize(0, 0, 0)})
    with pytest.raises(UserError, match=r"draw-99 cannot .*source C is empty in the store"):
        require_feasible(empty, [twice], 1000)


def test_the_arms_of_a_study(study, space):
    found = arms(study.design, space)
    require_feasible(space, found, study.proxy.total_rows)
    assert [arm.kind for arm in found] == ["prior", "prior", "draw", "draw", "draw", "zeroed"]
    assert found[1] == replace(found[0], name="prior-1", seed=1)
