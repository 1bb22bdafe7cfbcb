"""Bounds against root finding, a general solver, and what `Mixture.cap_epochs` lets through."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from eurollm_jax.ablation.bounds import LEAST, epoch_bounds, onto_bounds, settled, share_bounds
from eurollm_jax.ablation.study import Constraints
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError


def normal(weights):
    return np.array(weights) / sum(weights)


@st.composite
def boxes(draw):
    """(shares, lower, upper) with some shares of sum 1 within the bounds, not always the first."""
    size = draw(st.integers(2, 8))
    weights = st.lists(st.floats(1e-3, 1), min_size=size, max_size=size)
    shares, inside = normal(draw(weights)), normal(draw(weights))
    down, up = (np.array(draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))) for _ in range(2))
    return shares, inside * down, inside + (1 - inside) * up


@settings(deadline=None, max_examples=200)
@given(boxes())
def test_shares_within_bounds_are_those_of_a_root_finder(box):
    shares, lower, upper = box
    found = onto_bounds(shares, lower, upper)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= lower).all()
    assert (found <= upper).all()

    def excess(log_c):
        return np.clip(math.exp(log_c) * shares, lower, upper).sum() - 1

    assume(excess(-30) < 0 < excess(30))
    c = math.exp(brentq(excess, -30, 30, xtol=1e-14))
    np.testing.assert_allclose(found, np.clip(c * shares, lower, upper), atol=1e-9)


def test_shares_within_bounds_diverge_least_from_what_was_asked():
    rng = np.random.default_rng(0)
    for _ in range(5):
        shares, inside = rng.dirichlet(np.ones(5)) * 0.98 + 0.004, rng.dirichlet(np.ones(5))
        lower, upper = inside * rng.uniform(0, 1, 5), inside + rng.uniform(0, 0.2, 5)
        solved = minimize(
            lambda x, shares=shares: (x * np.log(x / shares)).sum(),
            inside,
            bounds=list(zip(np.maximum(lower, 1e-9), upper, strict=True)),
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(onto_bounds(shares, lower, upper), solved.x, atol=1e-4)


def test_what_has_no_share_gets_its_lower_bound_and_the_impossible_is_no_value():
    found = onto_bounds(np.array([0.0, 0.5, 0.5]), np.array([0.1, 0, 0]), np.array([1, 0.3, 1]))
    np.testing.assert_allclose(found, [0.1, 0.3, 0.6])
    with pytest.raises(ValueError, match="no shares of sum 1"):
        onto_bounds(np.array([0.0, 0.5, 0.5]), np.zeros(3), np.array([1, 0.3, 0.3]))


def test_shares_that_count_as_none_go_to_the_others():
    found = settled(np.array([LEAST / 2, 0.6 - LEAST / 2, 0.4]), np.zeros(3), np.ones(3))
    np.testing.assert_allclose(found, [0, *(np.array([0.6 - LEAST / 2, 0.4]) / (1 - LEAST / 2))])
    # Nothing can take up what would be set free.
    full = settled(np.array([LEAST / 2, 0.6 - LEAST / 2, 0.4]), np.zeros(3), np.array([1, 0.6 - LEAST / 2, 0.4]))
    assert full[0] == pytest.approx(LEAST / 2)


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(2, 5000), st.integers(2, 5000)),
    st.floats(0.05, 0.95),
    st.floats(0.02, 0.98),
    st.integers(1, 20_000),
)
def test_epoch_bounds_are_where_a_capped_mixture_is_refused(rows, part, wanted, total_rows):
    """Two groups; every row holds as much. The bound is to be `wanted`, and the second group has text in plenty."""
    max_epochs = wanted * total_rows / min(rows[0] / part, rows[1] / (1 - part))
    plenty = math.ceil(total_rows / max_epochs) + 1
    every = dict(zip("abcd", (*rows, plenty, plenty), strict=True))
    sizes = {name: SourceSize(n * 512, n * 2048, n) for name, n in every.items()}
    within = ({"a": part, "b": 1 - part}, {"c": 0.5, "d": 0.5})
    bound, other = epoch_bounds(within, sizes, max_epochs, total_rows * 512)
    assert bound.share == pytest.approx(wanted)
    assert other.share > 1

    def compiles(share):
        shares = {"a": share * part, "b": share * (1 - part), "c": (1 - share) / 2, "d": (1 - share) / 2}
        Mixture.shares(shares, "tokens").cap_epochs(max_epochs).compile(sizes, total_rows)

    compiles(bound.share * (1 - 1e-6))
    with pytest.raises(UserError, match=rf"cap_epochs.* is exceeded .* {bound.source} "):
        compiles(bound.share * (1 + 1e-6))


GROUPS = ("A", "B", "C")
PRIOR = np.array([0.5, 0.3, 0.2])


def test_bounds_are_floors_ceilings_fixed_shares_and_caps():
    sizes = {name: SourceSize(1000, 4000, 10) for name in "abc"}
    epochs = epoch_bounds([{"a": 1.0}, {"b": 1.0}, {"c": 1.0}], sizes, 2.0, 3000)  # 2000 of 3000 tokens
    lower, upper = share_bounds(Constraints(floors={"A": 0.2}, ceilings={"C": 0.25}), GROUPS, PRIOR, epochs)
    np.testing.assert_allclose(lower, [0.2, 0, 0])
    np.testing.assert_allclose(upper, [2 / 3, 2 / 3, 0.25])
    lower, upper = share_bounds(Constraints(fixed={"B": 0.3000005}), GROUPS, PRIOR, [])
    assert (lower[1], upper[1]) == (0.3, 0.3)  # the prior's own


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (dict(floors={"Aa": 0.1}), "floors names 'Aa', which is no group: did you mean 'A'"),
        (dict(fixed={"Zulu": 0.1}), "fixed names 'Zulu', which is no group: the groups are A, B, C"),
        (dict(ceilings={"A": 1.5}), "ceilings has 1.5 for 'A': give a share from 0 to 1"),
        (dict(floors={"A": math.nan}), "floors has nan for 'A'"),
        (dict(floors={"A": 5e-5}), "less than 0.0001 counts as none"),
        (dict(floors={"A": 0.6}, ceilings={"A": 0.4}), "'A' has the floor 0.6 above its ceiling 0.4"),
        (dict(floors={"A": 0.6}, fixed={"A": 0.5}), "'A' is fixed at 0.5, outside of its floor 0.6"),
        (
            dict(floors={"A": 0.6, "B": 0.3}, fixed={"C": 0.2}),
            r"\(A 0.6, B 0.3, C 0.2\) sum to 1.1, more than 1: lower",
        ),
        (dict(ceilings={"A": 0.3, "B": 0.3, "C": 0.3}), "sum to 0.9, less than 1: raise"),
        (dict(fixed={"A": 0.4}), "fixed at 0.4 and has 0.500000 in the prior: fix it at 0.500000"),
        (dict(floors={"C": 0.3}), "the prior gives 'C' 0.2000, beyond its floor 0.3"),
        (dict(ceilings={"A": 0.4}), "the prior gives 'A' 0.5000, beyond its ceiling 0.4"),
        (dict(fixed={"A": 0.5, "B": 0.3}), "fewer than two groups may move"),
    ],
)
def test_refusals(constraints, message):
    with pytest.raises(UserError, match=message):
        share_bounds(Constraints(**constraints), GROUPS, PRIOR, [])


def test_a_prior_over_the_cap_is_refused_with_the_cap_that_would_do():
    sizes = {"a1": SourceSize(1000, 0, 10), "a2": SourceSize(50_000, 0, 500), "b": SourceSize(90_000, 0, 900)}
    sizes["c"] = sizes["b"]
    within = [{"a1": 0.1, "a2": 0.9}, {"b": 1.0}, {"c": 1.0}]
    with pytest.raises(UserError) as refused:
        share_bounds(Constraints(), GROUPS, PRIOR, epoch_bounds(within, sizes, 4.0, 100_000))
    # 0.5 * 0.1 * 100,000 tokens of 1,000
    assert "reads 'a1' of the group 'A' 5.00 times in 100,000 tokens, and max_epochs=4: max_epochs=5 would do" in str(
        refused.value
    )
    share_bounds(Constraints(), GROUPS, PRIOR, epoch_bounds(within, sizes, 5.0, 100_000))
