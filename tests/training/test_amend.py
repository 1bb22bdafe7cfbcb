"""An experiment may change in mid-run, from rows on that are not trained yet; then it is the run it would have been."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.run import train
from eurollm_jax.training.schedule import WSD, Constant

BEHIND, ROW = 4, 32  # the step and the row of the checkpoint that a changed run goes on from


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("amended")


@pytest.fixture
def short(experiment, folder):
    """4 steps at a constant rate."""
    constant = Constant(peak=1e-2, warmup=2)
    return dataclasses.replace(
        experiment, name="run", runs=str(folder / "short"), steps=BEHIND, schedule=constant, log_every=1
    )


@pytest.fixture
def trained(short):
    return short.run if (short.run / "evaluation.json").exists() else train(short, "")


@pytest.fixture
def ours(short, trained, tmp_path):
    """The same, with a copy of its run to go on in."""
    shutil.copytree(trained, tmp_path / "copy" / "run")
    return dataclasses.replace(short, runs=str(tmp_path / "copy"))


def with_mixture(experiment, mixture):
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, mixture=mixture))


def longer(experiment):
    """The same, to step 10 with a decay at the end; behind the checkpoint, in larger batches of another mixture."""
    staged = experiment.data.mixture.stage(at_row=ROW, mixture=Mixture.temperature(0.1).without("mt"))
    return dataclasses.replace(
        with_mixture(experiment, staged),
        steps=10,
        schedule=WSD(peak=1e-2, warmup=2, decay=0.4),
        batch_ramp=((ROW, 16),),
    )


def lines(run, kind):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def weights(run):
    checkpoint = Checkpoints(run / "checkpoints", read_only=True).weights()
    return {path: checkpoint.read(path) for path in checkpoint.paths()}


def test_a_change_is_refused_with_how_to_accept_it(ours):
    with pytest.raises(UserError, match=r"another experiment \(batch_ramp.*\): .*; --accept-changes goes on"):
        train(longer(ours), "")
    assert json.loads((ours.run / "experiment.json").read_text())["experiment"]["steps"] == BEHIND


def test_an_accepted_change_gives_the_run_it_would_have_been_and_is_recorded(ours, tmp_path):
    changed = longer(ours)
    train(changed, "", accept_changes=True)
    whole = train(dataclasses.replace(changed, runs=str(tmp_path / "whole")), "")
    mine, theirs = weights(changed.run), weights(whole)
    for path, value in theirs.items():
        np.testing.assert_array_equal(mine[path], value, err_msg=path)
    timed = {"seconds", "tokens_per_second", "mfu", "data_wait"}
    for one, other in zip(lines(changed.run, "train"), lines(whole, "train"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    mine, theirs = (json.loads((run / "experiment.json").read_text()) for run in (changed.run, whole))
    assert mine["fingerprint"] == theirs["fingerprint"]
    (change,) = mine["changes"]
    assert (change["step"], change["row"]) == (BEHIND, ROW)
    assert "steps was 4 and is 10" in change["changed"]
    assert change["before"]["schedule"]["type"] == "Constant"
    train(changed, "")  # it is this experiment's run now
    with pytest.raises(UserError, match="another experiment"):
        train(ours, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: dataclasses.replace(e, steps=8, batch_size=16),
            r"read 32 rows in other batches .* set batch_size=8 and batch_ramp=\(\(32, 16\),\)",
        ),
        (
            lambda e: dataclasses.replace(e, steps=8, batch_ramp=((16, 24),)),
            r"set batch_size=8 and batch_ramp=\(\(32, 24",
        ),
        (
            lambda e: dataclasses.replace(e, steps=8, schedule=WSD(peak=1e-2, warmup=2, decay=0.75)),
            r"step 4 had a learning rate of 0\.01 where the schedule now has .*begin at step 4 or later \(decay=0\.5",
        ),
        (lambda e: dataclasses.replace(e, steps=3), r"has 4 steps behind it: set steps to 4 or more, not 3"),
        (
            lambda e: with_mixture(e, e.data.mixture.stage(at_row=ROW - 1, mixture=Mixture.proportional())),
            r"other data: schedule\.stages.*as mixture\.stage\(at_row=32, mixture=\.\.\.\)",
        ),
        (lambda e: with_mixture(e, Mixture.proportional()), r"schedule\.stages\[0\]\.shares"),
        (lambda e: dataclasses.replace(e, seed=3, steps=8), r"another experiment \(seed was 0 and is 3\): give"),
        (lambda e: dataclasses.replace(e, z_loss=0.5), r"another experiment \(z_loss was 0\.0001 and is 0\.5\): give"),
        (
            lambda e: dataclasses.replace(e, data=dataclasses.replace(e.data, seed=7)),
            r"another experiment \(data\.seed was 0 and is 7\): give",
        ),
    ],
)
def test_what_would_have_changed_the_past_is_refused_by_name(ours, change, message):
    before = (ours.run / "experiment.json").read_text()
    with pytest.raises(UserError, match=message):
        train(change(ours), "", accept_changes=True)
    assert (ours.run / "experiment.json").read_text() == before
