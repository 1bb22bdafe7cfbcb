"""A small study from its design to its report; stopped, killed and gone on with; and what it refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from eurollm_jax.ablation import run as run_module
from eurollm_jax.ablation.confirm import Arms, mean_interval, verdict
from eurollm_jax.ablation.prepared import ensembles, prepare
from eurollm_jax.ablation.run import ablate, describe
from eurollm_jax.ablation.study import Analysis, Confirmation, Constraints, Design
from eurollm_jax.errors import UserError
from eurollm_jax.training.ensemble import train_ensemble

FILES = ("results.parquet", "findings.json", "confirmation.json", "mixture.py", "report.html")


@pytest.fixture
def whole(study):
    """With everything that a study may have, and noise enough to decline."""
    larger = replace(
        study.proxy, name="larger", steps=18, model=replace(study.proxy.model, width=32, heads=4, kv_heads=4)
    )
    return replace(
        study,
        design=Design(draws=9, candidates=4, prior_runs=2),
        analysis=Analysis(bootstraps=20, folds=3, starts=2),
        confirmation=Confirmation(larger, seeds=2, baselines=("temperature 0.3",), when_declined=True),
        at_once=6,
    )


def contents(folder):
    """What a study has found; the table without its order of writing."""
    table = pq.read_table(folder / "results.parquet").to_pylist()
    return {
        "table": [{**row, "shares": tuple(row["shares"])} for row in table],
        "findings": json.loads((folder / "findings.json").read_text()),
        "confirmation": json.loads((folder / "confirmation.json").read_text()),
        "mixture": (folder / "mixture.py").read_text(),
    }


def test_a_study_goes_on_as_if_it_had_not_been_stopped(whole, tmp_path, monkeypatch):
    undisturbed = ablate(whole, "Which?")
    assert all((undisturbed / name).is_file() for name in FILES)
    expected = contents(undisturbed)
    shutil.move(undisturbed, tmp_path / "undisturbed")

    calls = 0

    def stopping(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls in (2, 4):  # in the middle of the proxies, and of the confirmation
            raise KeyboardInterrupt
        return train_ensemble(*arguments, **named)

    monkeypatch.setattr(run_module, "train_ensemble", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ablate(whole, "Which?")
    assert contents(ablate(whole, "Which?")) == expected


def test_observations_are_those_of_the_table(whole, monkeypatch):
    seen = []
    monkeypatch.setattr(run_module, "analyse", lambda observations, *of: seen.append(observations) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ablate(whole, "Which?")
    (observations,) = seen
    prepared = prepare(whole)
    assert observations.names == tuple(arm.name for arm in prepared.arms)
    for row in pq.read_table(whole.folder / "results.parquet").to_pylist():
        run = observations.names.index(row["replica"])
        shares = dict(zip(observations.groups, observations.shares[run], strict=True))
        assert dict(row["shares"]) == pytest.approx(shares)
        if row["complete"] and row["level"] == "language":
            found = observations.losses[run, observations.languages.index(row["name"])]
            assert row["nats"] / np.log(2) / row["bytes"] == pytest.approx(found)


def test_a_diverged_proxy_is_left_out_and_named(whole, monkeypatch):
    def diverging(members, *arguments, **named):
        found = train_ensemble(members, *arguments, **named)
        return [replace(one, diverged="spikes at step 3" if one.member == "draw-02" else one.diverged) for one in found]

    monkeypatch.setattr(run_module, "train_ensemble", diverging)
    folder = ablate(replace(whole, confirmation=None), "Which?")
    found = json.loads((folder / "findings.json").read_text())
    assert found["runs"] == len(prepare(whole).arms) - 1
    assert "draw-02" not in {run["name"] for runs in found["heldout"].values() for run in runs}
    assert "draw-02" in (folder / "report.html").read_text()
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["diverged"] for row in rows if row["replica"] == "draw-02"} == {"spikes at step 3"}


def test_a_folder_of_another_study_is_refused(whole):
    study = replace(whole, confirmation=None)
    run_module._claimed(prepare(study), "Which?")
    run_module._claimed(prepare(study), "Which?")
    with pytest.raises(UserError, match=r"holds another study \(design.draws was 9 and is 10\)"):
        run_module._claimed(prepare(replace(study, design=replace(study.design, draws=10))), "Which?")


def test_refusals_before_anything_is_trained(whole):
    with pytest.raises(UserError, match=r"takes .* FLOP, and its budget is 1e\+03"):
        prepare(replace(whole, budget=1e3))
    with pytest.raises(UserError, match="runs"):
        prepare(replace(whole, design=Design(draws=1, prior_runs=1), analysis=Analysis(law="log-linear")))
    other = replace(whole.confirmation.experiment, heldout="elsewhere")
    with pytest.raises(UserError, match="held-out store"):
        prepare(replace(whole, confirmation=Confirmation(other)))
    with pytest.raises(UserError, match="no baseline 'best'"):
        prepare(replace(whole, confirmation=replace(whole.confirmation, baselines=("best",))))
    with pytest.raises(UserError, match="epochs"):
        prepare(replace(whole, constraints=Constraints(max_epochs=1e-4)))


def test_description_is_that_of_the_study(whole):
    found = describe(whole, "Which?")
    assert [arm["name"] for arm in found["arms"]] == [arm.name for arm in prepare(whole).arms]
    assert found["cost"]["proxies"]["runs"] == len(found["arms"])
    assert found["cost"]["proxies"]["tokens"] == len(found["arms"]) * 12 * 8 * 32
    assert found["cost"]["proxies"]["expected_seconds"] > 0
    assert not whole.folder.exists()


@pytest.mark.parametrize(
    ("runs", "at_once", "sizes"), [(27, 8, [7, 7, 7, 6]), (8, 8, [8]), (9, 8, [5, 4]), (3, 1, [1] * 3)]
)
def test_parts_are_of_about_one_size(runs, at_once, sizes):
    parts = ensembles(range(runs), at_once)
    assert [len(part) for part in parts] == sizes
    assert [one for part in parts for one in part] == list(range(runs))


def test_interval_of_a_mean_covers_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    covered = [low <= 1.0 <= high for _, low, high in (mean_interval(draw, 0.9) for draw in draws)]
    assert 0.885 < np.mean(covered) < 0.915
    assert mean_interval([0.5], 0.9) == (0.5, -np.inf, np.inf)


@pytest.mark.parametrize(("shift", "held"), [(0.1, "yes"), (-0.1, "no"), (0.0, "undecided")])
def test_verdict_of_a_confirmation(shift, held):
    noise = np.random.default_rng(1).normal(0, 0.01, (4, 2))
    prior = np.full((4, 2), 2.0)
    arms = Arms(("de", "el"), np.array([0.5, 0.5]), {"prior": prior, "proposal": prior - shift + noise - noise.mean()})
    found = verdict(arms, (0.05, 0.01, 0.09), 0.9)
    assert found["held"] == held
    assert found["gain"]["mean"] == pytest.approx(shift)
    assert json.loads(json.dumps(found)) == found
