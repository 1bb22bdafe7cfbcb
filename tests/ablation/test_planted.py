"""Planted laws: what an analysis finds of losses whose law, transfer and optimum are known.

Simulated studies have 3 to 5 runs for each group, drawn as `planted.design` has it, and noise of 0.3 to 1 % of the
loss, half of its variance common to the languages of a run. The slow tests print what they measure (`pytest -s`). In
200 simulations the nominal 90 % held:

    law         languages  groups  runs  noise   gain  shares (worst group)  transfer  losses at the proposal
    log-linear         12      12    48  0.5 %   94.5   90.7 (87.0)           92.3      90.3
    log-linear         32      10    40  0.5 %   93.5   90.9 (86.0)           92.2      91.3
    log-linear         12       8    24  1.0 %   90.5   89.4 (81.5)           92.8      88.3
    power              12       8    32  0.5 %   93.5   90.1 (85.0)           88.9      89.7
    power              32      10    40  0.5 %   91.0   89.8 (83.5)           90.5      89.9
    power              32       8    32  0.5 %   87.0   86.9 (71.0)           87.8      88.8

The worst group holds a language that learns three times as much from others as from its own 0.4 % of the tokens: the
penalty, small as it is, still moves its offset. With one half as wide the last line was 82.5, 78.8 (44.0) and 83.5.

Of pure noise (1 %, 8 groups, 32 runs) the gain's interval excluded 0 in 4 (12 languages) and 14 (32) of 200 by the
log-linear law, in 6 and 6 by the power law, none of which was recommended, for the held-out rho. The gain is that of
the proposal made, not of the true optimum.
"""

from dataclasses import asdict

import numpy as np
import pytest

from eurollm_jax.ablation.analysis import LAWS, analyse
from eurollm_jax.ablation.bootstrap import bootstrap, gain
from eurollm_jax.ablation.fitting import fit
from eurollm_jax.ablation.laws import transfer_matrix
from eurollm_jax.ablation.proposal import divergence, objective, propose
from eurollm_jax.ablation.study import Analysis
from tests.ablation.planted import coverage, planted

SIMULATIONS = 200


@pytest.mark.parametrize(("languages", "groups"), [(12, 12), (32, 10)])
def test_law_transfer_and_optimum_are_recovered(languages, groups):
    """At 5 runs for each group and noise of 0.3 %.

    Predictions to 0.25 %, 19 of 20 signs of transfer and each language's own, shares to 0.035 on average, 85 % of what
    the true optimum wins. Of 20 simulations of each the worst had 0.17 %, 95.3 %, 0.031 and 87 %.
    """
    study = planted(languages, groups, runs_per_group=5, noise=0.003, seed=4)
    problem, prior = study.problem, study.problem.prior
    optimum, transfer = propose(study.law, problem), transfer_matrix(study.law, prior)

    def reached(shares):
        return objective(study.law, problem, shares) + problem.kl * divergence(shares, prior)

    for simulation in range(3):
        runs = study.observe(np.random.default_rng(simulation))
        law = fit("log-linear", runs, prior, problem.holds, starts=8, seed=0).law
        error = law.predict(study.shares) / study.law.predict(study.shares) - 1
        assert np.sqrt((error**2).mean()) < 0.0025
        signs = np.sign(transfer_matrix(law, prior)) == np.sign(transfer)
        assert signs.mean() > 0.95
        own = np.arange(languages), np.arange(languages) % groups
        assert signs[own].all()
        proposal = propose(law, problem)
        assert np.abs(proposal - optimum).mean() < 0.035
        assert reached(prior) - reached(proposal) > 0.85 * (reached(prior) - reached(optimum))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dict(languages=12, groups=12),
        dict(languages=32, groups=10),
        dict(languages=12, groups=8, runs_per_group=3, noise=0.01),
        dict(languages=12, groups=8, power=True),
        dict(languages=32, groups=10, power=True),
        dict(languages=32, groups=8, power=True),
    ],
    ids=lambda case: "-".join(f"{name}{value}" for name, value in case.items()),
)
def test_intervals_cover_as_often_as_they_say(case):
    found = coverage(planted(**case), SIMULATIONS, name="power" if "power" in case else "log-linear")
    print(f"\n{case}: {found.row()}")
    shown = asdict(found)
    for what in ("gain", "shares", "transfer", "predicted"):
        assert 0.85 <= shown[what] <= 0.95, f"{what}: {shown[what]:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize(("languages", "groups"), [(12, 8), (32, 8)])
def test_pure_noise_is_declined(languages, groups):
    """Nearly as often by the interval of the gain alone, whatever the law and the held-out rho."""
    study = planted(languages, groups, effect=0, noise=0.01)
    problem = study.problem
    claimed, recommended = dict.fromkeys(LAWS, 0), 0
    for simulation in range(SIMULATIONS):
        runs = study.observe(np.random.default_rng([11, simulation]))
        before = sum(claimed.values())
        for law in LAWS:
            fitted = fit(law, runs, problem.prior, problem.holds, starts=4, seed=simulation)
            _, low, _ = gain(bootstrap(fitted, problem, 59, 0.9, simulation), 0.9)
            claimed[law] += low > 0
        if sum(claimed.values()) > before:
            recommended += analyse(runs, problem, Analysis(bootstraps=59, starts=4, seed=simulation)).recommended
    print(f"\n{languages} languages of noise: claims {claimed}, recommendations {recommended} of {SIMULATIONS}")
    assert max(claimed.values()) <= 0.1 * SIMULATIONS
    assert recommended <= 0.05 * SIMULATIONS
