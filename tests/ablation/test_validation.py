"""Scores of runs left out: against fits made without them, and formulas written anew."""

import numpy as np
import pytest

from eurollm_jax.ablation.fitting import fit
from eurollm_jax.ablation.laws import Observations
from eurollm_jax.ablation.validation import folds, foretold, foretold_by_trees, r_squared, score, spearman
from tests.ablation.planted import planted

STUDY = planted(4, 3, runs_per_group=7, noise=0.003)
RUNS = STUDY.observe(np.random.default_rng(0))


def test_folds_are_equal_but_for_one_and_follow_from_the_seed():
    found = folds(23, 5, 1)
    assert sorted(np.bincount(found)) == [4, 4, 5, 5, 5]
    assert (found == folds(23, 5, 1)).all()
    assert (found != folds(23, 5, 2)).any()
    assert sorted(folds(3, 5, 0)) == [0, 1, 2]


def test_a_run_is_foretold_by_a_fit_that_never_saw_its_fold():
    fold = folds(len(RUNS.names), 4, 0)
    whole = fit("log-linear", RUNS, STUDY.problem.prior, STUDY.problem.holds, starts=4, seed=0)
    (found,) = foretold(whole, fold)
    seen = fold != 2
    without = Observations(
        RUNS.groups, RUNS.languages, RUNS.shares[seen], RUNS.losses[seen],
        tuple(name for name, kept in zip(RUNS.names, seen, strict=True) if kept),
    )  # fmt: skip
    alone = fit("log-linear", without, STUDY.problem.prior, STUDY.problem.holds, starts=4, seed=0)
    expected = alone.law.predict(RUNS.shares[~seen])
    # Penalties and noise of the two fits differ a little: they are scaled by the runs that each saw.
    np.testing.assert_allclose(found[~seen], expected, atol=0.5 * float(whole.noise.mean()))

    spoilt = RUNS.losses.copy()
    spoilt[~seen] += 5
    moved = fit("log-linear", RUNS, STUDY.problem.prior, STUDY.problem.holds, starts=4, seed=0)
    other = moved.again(losses=spoilt[None], weights=seen[None].astype(float))
    np.testing.assert_allclose(whole.predicted_by(other)[0][~seen], found[~seen], rtol=1e-9)


def test_trees_never_see_the_fold_either():
    fold = folds(len(RUNS.names), 4, 0)
    found = foretold_by_trees(RUNS, fold, 0)
    losses = RUNS.losses.copy()
    losses[fold == 1] += 5
    moved = Observations(RUNS.groups, RUNS.languages, RUNS.shares, losses, RUNS.names)
    np.testing.assert_array_equal(foretold_by_trees(moved, fold, 0)[fold == 1], found[fold == 1])
    assert (foretold_by_trees(moved, fold, 0)[fold == 0] != found[fold == 0]).any()


def test_spearman_and_r_squared():
    observed = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(observed**3, observed) == pytest.approx(1)
    assert spearman(np.array([1.0, 3.0, 2.0, 4.0]), observed) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(np.ones(4), observed) == 0
    assert r_squared(observed, observed) == 1
    assert r_squared(np.full(4, 2.5), observed) == 0
    assert r_squared(observed[::-1], observed) == pytest.approx(1 - 20 / 5)


def test_a_score_is_of_the_weighted_objective_and_of_each_language():
    weights = np.array([1.0, 0.0, 0.0, 0.0])
    heldout = RUNS.losses.copy()
    heldout[:, 1] = -heldout[:, 1]
    found = score(RUNS, weights, heldout, None)
    assert found.rho_heldout == pytest.approx(1)
    assert found.r2_heldout == pytest.approx(1)
    assert found.rho_loo is None
    assert found.languages["l1"]["rho_heldout"] == pytest.approx(-1)
    assert found.languages["l2"]["r2_heldout"] == pytest.approx(1)
