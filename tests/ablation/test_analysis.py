"""From observations to a finding: what it holds, when it declines, and what it then says would settle it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eurollm_jax.ablation.analysis import analyse
from eurollm_jax.ablation.bootstrap import Estimate
from eurollm_jax.ablation.finding import Finding
from eurollm_jax.ablation.laws import Observations
from eurollm_jax.ablation.study import Analysis
from eurollm_jax.ablation.validation import Score
from eurollm_jax.ablation.verdict import Evidence, noise_of_repeats, verdict
from eurollm_jax.errors import UserError
from tests.ablation.planted import planted, won

SETTINGS = Analysis(bootstraps=60, starts=4)
STUDY = planted(6, 5, runs_per_group=5, noise=0.003)
RUNS = STUDY.observe(np.random.default_rng(0))


@pytest.fixture(scope="module")
def finding() -> Finding:
    return analyse(RUNS, STUDY.problem, SETTINGS)


def test_a_clear_gain_is_recommended(finding):
    assert finding.recommended
    assert finding.further == ""
    assert finding.law == "log-linear"
    proposal = np.array([finding.proposal[group].value for group in RUNS.groups])
    assert proposal.sum() == pytest.approx(1)
    assert finding.gain.low <= won(STUDY.law, STUDY.problem, proposal) <= finding.gain.high
    assert finding.gain.value <= finding.gain_of_law
    assert finding.scores["log-linear"].rho_heldout > 0.85
    assert finding.scores["log-linear"].rho_loo > 0.85
    assert set(finding.scores) == {"log-linear", "power", "trees"}


def test_intervals_hold_their_values_and_what_belongs_together_agrees(finding):
    estimates = [
        finding.gain,
        *finding.proposal.values(),
        *finding.changes.values(),
        *finding.predicted["prior"].values(),
        *finding.predicted["proposal"].values(),
        *(entry for entries in finding.transfer.values() for entry in entries.values()),
        *(contender.objective for contender in finding.baselines.values()),
    ]
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in estimates)
    assert set(finding.baselines) == {"prior", "proposal", "uniform"}
    assert finding.baselines["prior"].gain == Estimate(0, 0, 0)
    assert finding.baselines["proposal"].gain == finding.gain
    for language in RUNS.languages:
        change = finding.predicted["proposal"][language].value - finding.predicted["prior"][language].value
        assert change == pytest.approx(finding.changes[language].value, abs=0.002)  # each is rid of its own optimism
    assert [run.name for run in finding.heldout["log-linear"]] == list(RUNS.names)
    observed = [run.observed for run in finding.heldout["trees"]]
    np.testing.assert_allclose(observed, RUNS.losses @ STUDY.problem.weights)


def test_a_finding_survives_json(finding):
    text = json.dumps(finding.to_json(), allow_nan=False)
    assert Finding.from_json(json.loads(text)) == finding
    assert set(json.loads(text)["baselines"]["uniform"]) == {"shares", "value", "low", "high", "gain"}


def test_the_same_runs_give_the_same_finding(finding):
    assert analyse(RUNS, STUDY.problem, SETTINGS) == finding


def test_noise_is_declined_with_reasons():
    study = planted(6, 5, runs_per_group=5, effect=0)
    found = analyse(study.observe(np.random.default_rng(1)), study.problem, SETTINGS)
    assert not found.recommended
    assert found.gain.low <= 0
    assert "does not exclude that there is none" in found.reasons[0]
    assert "less than the 0.80 asked for" in found.reasons[1]
    assert found.further


def test_of_laws_that_the_runs_suffice_for_the_better_prophet_proposes():
    study = planted(6, 5, runs_per_group=5, power=True, noise=0.002)
    runs = study.observe(np.random.default_rng(0))
    found = analyse(runs, study.problem, SETTINGS)
    assert found.scores["power"].r2_heldout > found.scores["log-linear"].r2_heldout
    assert (found.law, found.transfer_law) == ("power", "log-linear")
    assert any("R2" in caveat for caveat in found.caveats)
    asked = analyse(runs, study.problem, replace(SETTINGS, law="log-linear"))
    assert asked.law == "log-linear"
    assert asked.transfer == found.transfer


def test_with_fewer_runs_than_parameters_the_power_law_proposes():
    study = planted(6, 6, power=True, noise=0.002)
    runs = study.observe(np.random.default_rng(0))
    few = Observations(runs.groups, runs.languages, runs.shares[:10], runs.losses[:10], runs.names[:10])
    found = analyse(few, study.problem, SETTINGS)
    assert found.law == "power"
    assert "log-linear" not in found.scores
    assert any("no transfer" in caveat for caveat in found.caveats)
    with pytest.raises(UserError, match="needs 11 or more"):
        analyse(few, study.problem, replace(SETTINGS, law="log-linear"))


def test_a_fixed_group_stays_and_its_transfer_is_not_known():
    study = planted(6, 5, runs_per_group=5, noise=0.003)
    others = study.shares[:, 1:] + 1e-6
    others *= (1 - 0.2) / others.sum(1, keepdims=True)
    shares = np.column_stack([np.full(len(others), 0.2), others])
    prior = np.concatenate([[0.2], 0.8 * study.problem.prior[1:] / study.problem.prior[1:].sum()])
    fixed = np.array([0.2, 0.0, 0.0, 0.0, 0.0]), np.array([0.2, 1.0, 1.0, 1.0, 1.0])
    problem = replace(study.problem, prior=prior, lower=fixed[0], upper=fixed[1])
    runs = replace(study, shares=shares).observe(np.random.default_rng(0))
    found = analyse(runs, problem, SETTINGS)
    assert found.proposal["g0"] == Estimate(*[pytest.approx(0.2, abs=1e-9)] * 3)
    text = json.dumps(found.to_json(), allow_nan=False)
    entries = json.loads(text)["transfer"]["l1"]
    assert entries["g0"] == {"value": None, "low": None, "high": None}
    assert entries["g1"]["low"] < entries["g1"]["value"] < entries["g1"]["high"] < 0
    assert np.isnan(Finding.from_json(json.loads(text)).transfer["l1"]["g0"].value)


def test_a_share_that_no_run_had_is_named():
    most = RUNS.shares[:, 0].max()
    problem = replace(STUDY.problem, lower=np.array([most + 0.01, 0.0, 0.0, 0.0, 0.0]))
    found = analyse(RUNS, problem, SETTINGS)
    assert any("extrapolates: no run had such a share of g0" in caveat for caveat in found.caveats)


def test_a_law_of_the_wrong_form_is_named():
    study = planted(6, 5, runs_per_group=5, noise=0.0005)
    runs = study.observe(np.random.default_rng(0))
    bent = runs.losses + 0.1 * np.sin(20 * runs.shares @ np.arange(5))[:, None]
    found = analyse(replace(runs, losses=bent), study.problem, SETTINGS)
    assert any("form does not fit" in caveat for caveat in found.caveats)


def test_noise_is_what_equal_mixtures_differ_by():
    shares = np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8], [0.2, 0.8], [1.0, 0.0]])
    noise, free = noise_of_repeats(shares, np.array([1.0, 3.0, 5.0, 5.0, 9.0]))
    assert free == 2
    assert noise == pytest.approx(1.0)
    assert noise_of_repeats(shares[1:3], np.ones(2)) == (None, 0)


def evidence(gain=(0.02, 0.01, 0.03), rho=0.9, trees=0.5, spread=0.05, noise=0.005) -> Evidence:
    scores = {"log-linear": Score(rho, 0.5, None, None, {}), "trees": Score(trees, 0.5, None, None, {})}
    return Evidence("log-linear", RUNS, 0.9, Estimate(*gain), scores, 0.8, spread, noise)


@pytest.mark.parametrize(
    ("change", "further"),
    [
        # The lower end is 0.03 below 0.02, so the interval must shrink by 1.5: 2.25 times the 25 runs.
        (dict(gain=(0.02, -0.01, 0.05)), "About 32 more runs"),
        (dict(gain=(0.001, -0.02, 0.02)), "at most 0.0200 bits per byte"),
        (dict(gain=(-0.01, -0.02, -0.001)), "not likely to help"),
        (dict(rho=0.6, noise=0.04), "only 0.60"),
        (dict(rho=0.6, trees=0.9), "wrong form"),
        (dict(rho=0.6), "longer"),
    ],
)
def test_a_study_that_declines_says_what_would_settle_it(change, further):
    recommended, reasons, said = verdict(evidence(**change))
    assert not recommended
    assert further in said
    assert len(reasons) == 2


def test_a_study_that_is_sure_and_foretells_recommends():
    recommended, _, further = verdict(evidence())
    assert recommended
    assert further == ""
