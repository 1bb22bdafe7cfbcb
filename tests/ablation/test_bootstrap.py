"""The bootstrap's parts against what they stand for; the coverage of its intervals is in test_planted.py."""

import numpy as np
import pytest
from scipy import stats

from eurollm_jax.ablation.bootstrap import Samples, estimate, estimate_chosen, gain, mixtures_matter, noise
from eurollm_jax.ablation.fitting import fit
from eurollm_jax.ablation.laws import LogLinear
from tests.ablation.planted import planted

STUDY = planted(4, 3, runs_per_group=7, noise=0.01)


def fitted(study, seed):
    runs = study.observe(np.random.default_rng(seed))
    return fit("log-linear", runs, study.problem.prior, study.problem.holds, starts=4, seed=0)


def test_drawn_noise_is_as_large_as_what_the_runs_have_and_as_common_to_their_languages():
    """Larger by the ratio of Student's quantile, and by at most 1 / sqrt(1 - leverage) for the exponent."""
    spread, common = [], []
    for seed in range(40):
        found = fitted(STUDY, seed)
        drawn = noise(found, 50, 0.9, np.random.default_rng(seed)) / STUDY.law.predict(STUDY.shares)
        spread.append(drawn.std(axis=(0, 1)))
        common.append(np.corrcoef(drawn.reshape(-1, 4).T)[np.triu_indices(4, 1)])
    wider = stats.t.ppf(0.95, 21 - 4) / stats.norm.ppf(0.95)
    assert 0.95 < np.mean(spread) / (STUDY.noise * wider) < 1.15
    assert np.mean(common) == pytest.approx(STUDY.shared, abs=0.1)


def test_the_f_test_finds_chance_as_often_as_it_says():
    flat = planted(4, 3, runs_per_group=7, noise=0.01, effect=0)
    found = np.array([mixtures_matter(fitted(flat, seed), flat.problem) for seed in range(100)])
    assert 0.02 <= (found < 0.1).mean() <= 0.2
    assert mixtures_matter(fitted(STUDY, 0), STUDY.problem) < 1e-6


def test_an_interval_holds_another_sample_as_often_as_it_says_whatever_their_number():
    rng = np.random.default_rng(0)
    for count in (39, 59):
        samples, others = rng.standard_normal((count, 20000)), rng.standard_normal(20000)
        _, low, high = estimate(np.zeros(20000), samples, 0.9)
        assert ((low <= others) & (others <= high)).mean() == pytest.approx(0.9, abs=0.01)


def test_what_samples_overrate_is_taken_off():
    errors = np.random.default_rng(0).normal(0.3, 0.1, 999)
    value, low, high = estimate_chosen(np.asarray(1.0), errors, 0.9)
    assert value == pytest.approx(0.7, abs=0.01)
    assert low == pytest.approx(0.7 - 0.164, abs=0.02)
    assert high == pytest.approx(0.7 + 0.164, abs=0.02)


def test_a_gain_no_larger_than_chance_reaches_zero():
    law = STUDY.law
    assert isinstance(law, LogLinear)
    many = LogLinear(*(np.broadcast_to(x, (99, *x.shape)) for x in (law.floor, law.bias, law.transfer)))
    proposal = np.array([0.2, 0.3, 0.5])
    samples = Samples(STUDY.problem, law, many, proposal, np.tile(proposal, (99, 1)), None)
    value, low, high = gain(samples, 0.9)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)
    by_chance = Samples(STUDY.problem, law, many, proposal, np.tile(proposal, (99, 1)), np.full(99, abs(value) + 0.01))
    assert gain(by_chance, 0.9)[1] == pytest.approx(value - abs(value) - 0.01)
