"""A small study from its design to its report; stopped, killed and gone on with; and what it refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from eurollm_jax.ablation import run as run_module
from eurollm_jax.ablation import trained as trained_module
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


@pytest.mark.slow
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

    monkeypatch.setattr(trained_module, "train_ensemble", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ablate(whole, "Which?")
    assert contents(ablate(whole, "Which?")) == expected


@pytest.mark.slow
def test_what_is_finished_is_kept_where_fewer_are_trained_at_once(whole, monkeypatch):
    trained, room = [], 6

    def noting(members, *arguments, **named):
        if len(trained) == 1 and room == 6:
            raise MemoryError
        trained.append([member.name for member in members])
        return train_ensemble(members, *arguments, **named)

    monkeypatch.setattr(trained_module, "train_ensemble", noting)
    study = replace(whole, confirmation=None, design=replace(whole.design, draws=10))
    with pytest.raises(MemoryError):
        ablate(study, "Which?")
    room = 3
    ablate(replace(study, at_once=room), "Which?")
    names = [arm.name for arm in prepare(study).arms]
    assert trained == [names[:6], names[:6], names[6:9], names[9:]]
    table = pq.read_table(study.folder / "results.parquet").to_pylist()
    assert list(dict.fromkeys(row["replica"] for row in table)) == names


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

    monkeypatch.setattr(trained_module, "train_ensemble", diverging)
    folder = ablate(replace(whole, confirmation=None), "Which?")
    found = json.loads((folder / "findings.json").read_text())
    assert found["runs"] == len(prepare(whole).arms) - 1
    assert "draw-02" not in {run["name"] for runs in found["heldout"].values() for run in runs}
    assert "draw-02" in (folder / "report.html").read_text()
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["diverged"] for row in rows if row["replica"] == "draw-02"} == {"spikes at step 3"}


def claimed(study):
    run_module._claim(prepare(study), "Which?")
    return json.loads((study.folder / "study.json").read_text())


def test_what_would_change_a_proxy_is_refused_and_what_follows_from_them_is_not(whole):
    whole.folder.mkdir(parents=True)
    before = claimed(whole)
    assert claimed(whole) == before
    larger = replace(whole.confirmation, seeds=3, baselines=())
    more = replace(
        whole, design=replace(whole.design, draws=10), analysis=Analysis(confidence=0.8), confirmation=larger
    )
    after = claimed(replace(more, targets={"de": 1.0}))
    assert after["identity"]["arms"].items() >= before["identity"]["arms"].items()
    assert len(after["arms"]) == len(before["arms"]) + 1
    assert after["created"] == before["created"]
    assert after["fingerprint"] != before["fingerprint"]
    with pytest.raises(UserError, match=r"another study \(arms.draw-08 was .* and is None\)"):
        claimed(replace(whole, design=replace(whole.design, draws=8)))
    reordered = replace(whole, groups=dict(reversed(list(whole.groups.items()))))
    with pytest.raises(UserError, match="another study "):
        claimed(reordered)
    with pytest.raises(UserError, match=r"another study \(proxy.steps was 12 and is 13\)"):
        claimed(replace(whole, proxy=replace(whole.proxy, steps=13)))


def test_a_damaged_record_is_made_again_once_it_is_removed(whole):
    whole.folder.mkdir(parents=True)
    path = whole.folder / "study.json"
    for damaged in ("{", "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="remove that one file"):
            claimed(whole)
    path.unlink()
    assert claimed(whole)["name"] == "tiny"


def test_what_was_found_stays_for_the_same_runs_and_settings(whole, monkeypatch):
    study = replace(whole, confirmation=None)
    folder = ablate(study, "Which?")
    path, calls = folder / "findings.json", []
    found, analyse = path.read_text(), run_module.analyse
    monkeypatch.setattr(run_module, "analyse", lambda *of: calls.append(of) or analyse(*of))
    ablate(study, "Which?")
    assert (path.read_text(), len(calls)) == (found, 0)
    path.write_text("{")
    ablate(study, "Which?")
    assert (path.read_text(), len(calls)) == (found, 1)
    ablate(replace(study, analysis=replace(study.analysis, confidence=0.8)), "Which?")
    assert json.loads(path.read_text())["confidence"] == 0.8


def test_a_folder_of_something_else_is_refused(whole):
    whole.folder.mkdir(parents=True)
    (whole.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no study\.json"):
        ablate(whole, "Which?")
    assert [path.name for path in whole.folder.iterdir()] == ["notes.txt"]


def test_refusals_before_anything_is_trained(whole):
    with pytest.raises(UserError, match=r"takes .* FLOP, and its budget is 1e\+03"):
        prepare(replace(whole, budget=1e3))
    with pytest.raises(UserError, match="runs"):
        prepare(replace(whole, design=Design(draws=1, prior_runs=1), analysis=Analysis(law="log-linear")))
    with pytest.raises(UserError, match="epochs"):
        prepare(replace(whole, constraints=Constraints(max_epochs=1e-4)))
    with pytest.raises(UserError, match="accumulate=2"):
        prepare(replace(whole, proxy=replace(whole.proxy, accumulate=2)))


def test_runs_of_a_confirmation_bear_their_seeds(whole):
    larger = whole.confirmation.experiment
    larger = replace(larger, seed=5, data=replace(larger.data, seed=2))
    prepared = prepare(replace(whole, confirmation=replace(whole.confirmation, experiment=larger)))
    runs = prepared.confirming("temperature 0.3", prepared.space.prior.tolist())
    seeds = [(run.name, run.seed, run.data.seed) for run in runs]
    assert seeds == [("temperature-0.3-seed-5", 5, 2), ("temperature-0.3-seed-6", 6, 3)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accumulate": 2}, "accumulate=2"),
        ({"heldout": "STORE"}, "another heldout than the proxies"),
        ({"start_from": "runs/base"}, "start_from=runs/base"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_a_confirmation_that_could_not_be_trained_is_refused_before_the_proxies(whole, changes, said):
    larger = whole.confirmation.experiment
    changes = {name: larger.data.store if value == "STORE" else value for name, value in changes.items()}
    if "data" in changes:
        changes["data"] = replace(larger.data, store=changes["data"])
    with pytest.raises(UserError, match=said):
        prepare(replace(whole, confirmation=replace(whole.confirmation, experiment=replace(larger, **changes))))


def test_a_baseline_that_is_not_there_is_refused(whole):
    with pytest.raises(UserError, match="no baseline 'best'"):
        prepare(replace(whole, confirmation=replace(whole.confirmation, baselines=("best",))))


@pytest.mark.parametrize(
    "changes",
    [
        {"confidence": 90},
        {"confidence": 1.0},
        {"bootstraps": 0},
        {"folds": 1},
        {"starts": 0},
        {"kl": -1.0},
        {"kl": float("nan")},
        {"min_rho": float("nan")},
        {"seed": -1},
        {"law": "best"},
    ],
)
def test_settings_that_no_analysis_could_keep_are_refused(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"analysis: {name}="):
        Analysis(**changes)


def test_impossible_studies_are_refused(whole):
    for changes in ({"at_once": 0}, {"at_once": 2.5}, {"budget": float("nan")}):
        (name,) = changes
        with pytest.raises(UserError, match=f"{name}="):
            replace(whole, **changes)
    with pytest.raises(UserError, match="seeds=0"):
        replace(whole.confirmation, seeds=0)
    with pytest.raises(UserError, match="'UniMax' is trained once"):
        replace(whole.confirmation, baselines=("UniMax", "UniMax"))


@pytest.mark.parametrize("timed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_description_is_that_of_the_study(whole, timed):
    found = describe(whole, "Which?", timed=timed)
    assert [arm["name"] for arm in found["arms"]] == [arm.name for arm in prepare(whole).arms]
    assert found["cost"]["proxies"]["runs"] == len(found["arms"])
    assert found["cost"]["proxies"]["tokens"] == len(found["arms"]) * 12 * 8 * 32
    assert found["cost"]["confirmation"]["runs"] == 3 * 2
    expected = [found["cost"][phase]["expected_seconds"] for phase in ("proxies", "confirmation")]
    assert all(seconds > 0 for seconds in expected) if timed else expected == [None, None]
    assert not whole.folder.exists()


@pytest.mark.parametrize(
    ("runs", "at_once", "devices", "sizes"),
    [
        (27, 8, 1, [7, 7, 7, 6]),
        (8, 8, 1, [8]),
        (9, 8, 1, [5, 4]),
        (3, 1, 1, [1] * 3),
        (35, 16, 8, [16, 16, 3]),
        (16, 9, 8, [8, 8]),
        (5, 2, 8, [2, 2, 1]),
    ],
)
def test_parts_are_of_about_one_size_and_fill_the_devices(runs, at_once, devices, sizes):
    parts = ensembles(range(runs), at_once, devices)
    assert [len(part) for part in parts] == sizes
    assert [one for part in parts for one in part] == list(range(runs))
    assert ensembles(range(len(parts[0]), runs), at_once, devices) == parts[1:] or len(parts) == 1


def test_interval_of_a_mean_covers_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    covered = [low <= 1.0 <= high for _, low, high in (mean_interval(draw, 0.9) for draw in draws)]
    assert 0.885 < np.mean(covered) < 0.915
    assert mean_interval([0.5], 0.9) == (0.5, -np.inf, np.inf)


def arms_of(prior, proposal, **others):
    losses = {"prior": prior, "proposal": proposal, **others}
    return Arms(("de", "el"), np.array([0.5, 0.5]), {arm: dict(enumerate(rows)) for arm, rows in losses.items()})


@pytest.mark.parametrize(("shift", "held"), [(0.1, "yes"), (-0.1, "no"), (0.0, "undecided")])
def test_verdict_of_a_confirmation(shift, held):
    noise = np.random.default_rng(1).normal(0, 0.01, (4, 2))
    prior = np.full((4, 2), 2.0)
    found = verdict(arms_of(prior, prior - shift + noise - noise.mean()), (0.05, 0.01, 0.09), 0.9)
    assert found["held"] == held
    assert found["gain"]["mean"] == pytest.approx(shift)
    assert json.loads(json.dumps(found)) == found


def test_seeds_are_compared_in_pairs_that_are_whole():
    """Of three seeds the prior lacks one and a baseline another: the proposal still has two pairs, the baseline one."""
    arms = arms_of([[2.0, 2.0], [4.0, 4.0]], [[1.0, 1.0], [3.5, 3.5], [0.0, 0.0]], UniMax=[[2.5, 2.5]])
    found = verdict(arms, (0.05, 0.01, 0.09), 0.9)
    assert found["gain"]["of_seeds"] == [1.0, 0.5]
    assert found["arms"]["UniMax"]["gain"] == -0.5
    assert [found["arms"][arm]["seeds"] for arm in ("prior", "proposal", "UniMax")] == [[0, 1], [0, 1, 2], [0]]
    one = verdict(arms_of([[2.0, 2.0]], [[1.0, 1.0]]), (0.05, 0.01, 0.09), 0.9)
    assert (one["held"], one["gain"]["low"], one["gain"]["high"]) == ("undecided", None, None)
    assert "of one seed, which has no interval" in one["sentence"]
