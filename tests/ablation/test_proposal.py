"""Proposals against brute force, closed forms and the conditions of optimality."""

from dataclasses import replace

import numpy as np
import pytest

from eurollm_jax.ablation.laws import LogLinear, Power
from eurollm_jax.ablation.proposal import Problem, divergence, objective, propose, suboptimality
from eurollm_jax.errors import UserError
from tests.ablation.planted import planted

THREE = {
    "log-linear": planted(5, 3, seed=1),
    "power": planted(5, 3, seed=2, power=True),
}


@pytest.mark.parametrize("law", THREE)
@pytest.mark.parametrize("kl", [0.0, 0.003, 0.1])
@pytest.mark.parametrize("bounded", [False, True])
def test_no_mixture_of_a_fine_grid_is_better(law, kl, bounded):
    study = THREE[law]
    problem = replace(study.problem, kl=kl)
    if bounded:
        problem = replace(problem, lower=np.full(3, 0.1), upper=np.array([0.4, 0.5, 0.6]))
    steps = np.linspace(0, 1, 401)
    first, second = (axis.ravel() for axis in np.meshgrid(steps, steps))
    grid = np.column_stack([first, second, 1 - first - second])
    grid = grid[((grid >= problem.lower - 1e-12) & (grid <= problem.upper + 1e-12)).all(1)]
    grid = np.abs(grid)

    found = propose(study.law, problem)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= problem.lower).all()
    assert (found <= problem.upper).all()
    costs = objective(study.law, problem, grid) + kl * divergence(grid, problem.prior)
    cost = objective(study.law, problem, found) + kl * divergence(found, problem.prior)
    assert cost <= costs.min() + 1e-7
    assert np.abs(found - grid[costs.argmin()]).max() < 0.02
    assert suboptimality(study.law, problem, found) < 1e-6


def test_suboptimality_bounds_the_distance_from_the_optimum():
    study = THREE["log-linear"]
    best = propose(study.law, study.problem)

    def cost(shares):
        return objective(study.law, study.problem, shares) + study.problem.kl * divergence(shares, study.problem.prior)

    for shares in np.random.default_rng(0).dirichlet(np.ones(3), 50):
        gap = suboptimality(study.law, study.problem, shares)
        assert gap >= cost(shares) - cost(best) - 1e-9 > -1e-8


def test_of_a_law_without_slopes_the_prior_is_the_proposal():
    problem = planted(4, 3).problem
    flat = LogLinear(np.ones(4), np.zeros(4), np.zeros((4, 3)))
    np.testing.assert_allclose(propose(flat, problem), problem.prior, atol=1e-6)


def test_of_power_laws_without_offset_the_shares_follow_the_exponents():
    """He et al.: with each language its own group and no bounds, w_i g_i L_i / p_i is the same for all."""
    exponent, scale = np.array([0.05, 0.1, 0.2]), np.array([1.0, 1.5, 2.0])
    law = Power(scale, exponent, np.full(3, 1e-12), np.eye(3))
    weights = np.array([0.5, 0.2, 0.3])
    problem = Problem(weights, np.full(3, 1 / 3), np.zeros(3), np.ones(3), 0.0, np.eye(3), {})
    found = propose(law, problem)
    pull = weights * exponent * law.predict(found) / found
    np.testing.assert_allclose(pull, pull.mean(), rtol=1e-3)


def test_fixed_shares_stay_and_groups_that_the_prior_leaves_out_stay_out():
    study = planted(5, 4)
    prior = np.array([0.5, 0.3, 0.2, 0.0])
    problem = replace(study.problem, prior=prior, lower=np.array([0, 0.3, 0, 0]), upper=np.array([1.0, 0.3, 1, 1]))
    found = propose(study.law, problem)
    assert found[1] == pytest.approx(0.3, abs=1e-9)
    assert found[3] == 0
    assert found.sum() == pytest.approx(1)


def test_bounds_that_no_mixture_keeps_are_refused():
    study = planted(5, 3)
    with pytest.raises(UserError, match=r"floors sum to 1\.200"):
        propose(study.law, replace(study.problem, lower=np.full(3, 0.4)))
    with pytest.raises(UserError, match=r"ceilings to 0\.600"):
        propose(study.law, replace(study.problem, upper=np.full(3, 0.2)))


@pytest.mark.parametrize("kl", [0.0, 0.01])
def test_twelve_groups_reach_the_optimum(kl):
    for seed in range(5):
        study = planted(24, 12, kl=kl, seed=seed)
        assert suboptimality(study.law, study.problem, propose(study.law, study.problem)) < 2e-6
