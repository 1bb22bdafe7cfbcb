"""A branch goes on from a checkpoint of another run, with a schedule of its own: the straight run, to the bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training import loop
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.optimizer import AdEMAMix
from eurollm_jax.training.run import train
from eurollm_jax.training.schedule import WSD, Constant

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # all of a checkpoint, read as it is

STEPS, BRANCH = 10, 6
TIMES = {"seconds": 0, "lap": 0}
COOLDOWN = WSD(peak=1e-2, warmup=2, decay=0.4, shape="1-sqrt")  # from step 6 on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("branches")


@pytest.fixture
def straight(experiment, folder):
    """10 steps with the decay over the last 4; batches grow before the branch, and behind it."""
    return dataclasses.replace(
        experiment,
        name="straight",
        runs=str(folder),
        steps=STEPS,
        schedule=COOLDOWN,
        batch_ramp=((24, 16), (96, 8)),
        optimizer=AdEMAMix(warmup=STEPS, state_dtype="bfloat16"),
        ema=0.9,
        checkpoint_every=BRANCH,
        evaluate_every=100,
    )


@pytest.fixture
def trunk(straight):
    """The constant rate, to a step behind the branch; its own batches grow no more there."""
    return dataclasses.replace(
        straight, name="trunk", steps=7, schedule=Constant(peak=1e-2, warmup=2), batch_ramp=((24, 16),)
    )


@pytest.fixture
def trained_trunk(trunk):
    return trained(trunk)


@pytest.fixture
def branch(straight, trained_trunk):
    return dataclasses.replace(straight, name="branch", branch_from=str(trained_trunk / "checkpoints" / str(BRANCH)))


def trained(experiment):
    """Its run, trained once for all tests."""
    return experiment.run if (experiment.run / "evaluation.json").exists() else train(experiment, "")


def leaves(run, step=None):
    """Everything in a checkpoint, by path."""
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    step = checkpoints.latest if step is None else step
    checkpoints.close()
    state = ocp.PyTreeCheckpointer().restore(checkpoints.folder / str(step) / "state")
    progress = json.loads((checkpoints.folder / str(step) / "progress" / "metadata").read_text())
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}, progress


def test_a_branched_cooldown_is_the_straight_run(straight, branch):
    (whole, their_progress), (ours, progress) = (leaves(trained(one)) for one in (straight, branch))
    assert whole.keys() == ours.keys()
    assert {path.split("'")[1] for path in whole} == {"step", "params", "optimizer", "skips", "ema"}
    for path, value in whole.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)
    assert {**progress, **TIMES} == {**their_progress, **TIMES}
    assert (branch.run / "evaluation.json").read_text() == (straight.run / "evaluation.json").read_text()
    before, _ = leaves(straight.run, BRANCH)
    assert any(np.any(before[path] != value) for path, value in whole.items() if "params" in path)


def test_a_branch_records_its_parent_and_where_it_begins(branch):
    run = trained(branch)
    record = json.loads((run / "experiment.json").read_text())
    assert record["experiment"]["branch_from"] == branch.branch_from
    assert len(record["identity"]["inputs"]["branch"]) == 64
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in lines if line["kind"] == "train") > BRANCH
    assert [line["step"] for line in lines if line["kind"] == "train"][-1] == STEPS


def test_a_branch_needs_its_parent_until_it_has_a_checkpoint(branch, trained_trunk, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(trained_trunk, parent)
    alone = dataclasses.replace(branch, runs=str(tmp_path), branch_from=str(parent / "checkpoints" / str(BRANCH)))
    shutil.copytree(trained(branch), alone.run)
    record = json.loads((alone.run / "experiment.json").read_text())
    record["experiment"]["branch_from"] = alone.branch_from
    (alone.run / "experiment.json").write_text(json.dumps(record))
    shutil.rmtree(parent)
    assert train(alone, "") == alone.run
    shutil.rmtree(alone.run / "checkpoints")
    with pytest.raises(UserError, match="holds no sound checkpoint"):
        train(alone, "")


def test_another_checkpoint_in_the_parents_place_is_refused(branch, trained_trunk, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    copy = tmp_path / "copied"
    shutil.copytree(trained_trunk, copy)
    moving = dataclasses.replace(branch, name="moving", branch_from=str(copy / "checkpoints" / str(BRANCH)))
    with monkeypatch.context() as context:
        context.setattr(loop, "_loop", killed)
        with pytest.raises(KeyboardInterrupt):
            train(moving, "")
    shutil.rmtree(copy / "checkpoints" / str(BRANCH))
    shutil.copytree(copy / "checkpoints" / "7", copy / "checkpoints" / str(BRANCH))
    with pytest.raises(UserError, match=r"is another checkpoint than when .*moving began"):
        train(moving, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=3), r"more than the schedule \(seed was 0 and is 3\): take these from there"),
        (dict(optimizer=AdEMAMix(warmup=9, state_dtype="bfloat16")), r"optimizer\.warmup was 10 and is 9"),
        (dict(ema=None), r"ema was 0\.9 and is None"),
        (dict(batch_ramp=((40, 16), (96, 8))), r"batch_ramp\[0\]\[0\] was 24 and is 40"),
        (
            dict(schedule=WSD(peak=1e-2, warmup=2, decay=0.8)),
            r"a rate of \S+ at step \d+, where that run had 0\.01: take its peak .* begin at step 6 or later",
        ),
        (dict(steps=6), r"ends at step 6, and .*checkpoints/6 has 6 behind it: set steps to 7 or more"),
    ],
)
def test_what_is_no_branch_is_refused_before_anything_is_made(branch, change, message):
    other = dataclasses.replace(branch, name="refused", **change)
    with pytest.raises(UserError, match=message):
        train(other, "")
    assert not other.run.exists()


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("", "trunk names no checkpoint: give its folder, such as runs/base/checkpoints/1000"),
        ("checkpoints/5", "holds no sound checkpoint of step 5: choose one of 6, 7"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(branch, trained_trunk, at, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(branch, name="refused", branch_from=str(trained_trunk / at)), "")


def test_a_branch_has_one_beginning_and_it_is_another_run(branch):
    with pytest.raises(UserError, match=r"exclude each other: .* set start_from=None"):
        dataclasses.replace(branch, start_from="runs/base")
    with pytest.raises(UserError, match="would branch off from its own run"):
        train(dataclasses.replace(branch, name="trunk"), "")
