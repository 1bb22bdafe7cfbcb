"""A run that diverges goes back to a checkpoint from before and leaves out the rows that it failed with."""

import dataclasses
import json
import signal

import numpy as np
import pytest

from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import open_data
from eurollm_jax.errors import UserError
from eurollm_jax.training.rollback import (
    RollBack,
    Rollbacks,
    going_on,
    recorded_rollbacks,
    roll_back,
)
from eurollm_jax.training.schedule import Constant
from eurollm_jax.training.skipping import DivergedError, SkipStep
from tests.processes import Server, records, state_of, write_experiment

SIZES = BatchSizes(8, ((160, 16),))  # step 20 ends at row 160


def diverged(first, last):
    return DivergedError("It diverged.", first, last, float("nan"), 7.0)


def test_the_rule_says_which_steps_were_skipped():
    rule = SkipStep(at_most=3)
    rule.require(40, 3, 1.0, 9.0, ends=False)
    for step, in_a_row, ends in ((41, 4, False), (41, 2, True)):
        with pytest.raises(DivergedError, match=f"steps {step - in_a_row + 1} to 41 were skipped") as caught:
            rule.require(step, in_a_row, 1.5, 9.0, ends=ends)
        error = caught.value
        assert (error.first_step, error.last_step, error.loss, error.grad_norm) == (42 - in_a_row, 41, 1.5, 9.0)


def test_it_goes_back_before_the_first_skipped_step_and_over_all_rows_to_the_last():
    found = Rollbacks().then(RollBack(), diverged(22, 25), 20, SIZES)
    (entry,) = found.taken
    assert (entry.step, entry.row) == (20, 160)
    assert (entry.left_out_from, entry.left_out_until) == (160, 160 + 5 * 16)
    assert (entry.loss, entry.grad_norm) == (None, 7.0)
    assert found.jumps.taken == ((160, 80),)
    assert Rollbacks.of(json.loads(json.dumps(found.describe()))) == found


def test_going_back_again_leaves_out_more():
    rule, once = RollBack(at_most=2), Rollbacks().then(RollBack(), diverged(22, 25), 20, SIZES)
    again = once.then(rule, diverged(23, 24), 20, SIZES)
    assert again.jumps.taken == ((160, 80 + 4 * 16),)
    assert (again.taken[1].left_out_from, again.taken[1].left_out_until) == (240, 304)
    later = again.then(rule, diverged(33, 34), 30, SIZES)
    assert later.jumps.taken == ((160, 144), (320, 64))
    # To before both: what was left out between is among what is left out now.
    earlier = later.then(RollBack(at_most=9), diverged(19, 32), 10, SIZES)
    assert earlier.jumps.taken == ((80, later.jumps.data_row(SIZES.row_of_step(32) - 1) + 1 - 80),)


def test_it_stops_where_there_is_no_way_back_and_where_it_was_enough():
    rule, past = RollBack(at_most=2), Rollbacks()
    with pytest.raises(UserError, match=r"^It diverged\. No permanent checkpoint is older than step 10\.$"):
        past.then(rule, diverged(10, 14), None, SIZES)
    for _ in range(2):
        past = past.then(rule, diverged(22, 25), 20, SIZES)
    with pytest.raises(UserError, match=r"^It diverged\. The run has gone back 2 times to step 20 or later \(rollback"):
        past.then(rule, diverged(22, 25), 20, SIZES)
    past.then(rule, diverged(32, 35), 30, SIZES)  # it has come further since


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 22, 24):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_later_checkpoints_are_set_aside_also_where_that_was_cut_off(run, monkeypatch):
    there = Rollbacks().then(RollBack(), diverged(22, 25), 20, SIZES)
    renamed, rename = [], type(run).rename

    def cut_off(path, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as context:
        context.setattr(type(run), "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            roll_back(run, there)
    assert len([name for name in checkpoints(run) if name.isdecimal()]) == 3
    assert recorded_rollbacks(run) == there
    assert checkpoints(run) == ["10", "20", "22.before-rollback-1", "24.before-rollback-1"]
    (run / "checkpoints" / "23").mkdir()
    assert recorded_rollbacks(run) == there
    assert "23" in checkpoints(run)  # what was saved since stays


def test_a_run_without_a_record_never_went_back(run):
    assert recorded_rollbacks(run) == Rollbacks()
    (run / "rollbacks.json").write_text("[]")
    with pytest.raises(UserError, match=r"rollbacks\.json was not written by a run .*restore it from a backup"):
        recorded_rollbacks(run)


def test_a_branch_goes_on_without_the_rows_its_parent_left_out(run):
    once = Rollbacks().then(RollBack(), diverged(22, 25), 20, SIZES)
    twice = once.then(RollBack(), diverged(32, 35), 30, SIZES)
    before, between, after = ({"row": row, "rollbacks": once.describe()} for row in (160, 320, 336))  # steps 20, 30, 31
    assert going_on(Rollbacks(), {"row": 0}, run) == Rollbacks()
    assert going_on(once, {"row": 80}, run) == once  # what was saved after it is damaged, say
    assert going_on(Rollbacks(), after, run) == once
    assert going_on(twice, before, run) == going_on(twice, between, run) == twice
    other = Rollbacks().then(RollBack(), diverged(22, 26), 20, SIZES)
    for recorded, progress in ((other, before), (twice, after), (once, {"row": 176})):
        with pytest.raises(UserError, match="do not agree on which rows were left out"):
            going_on(recorded, progress, run)


def test_never_is_written_as_none():
    with pytest.raises(UserError, match="at_most=0 must be 1 or more; rollback=None never goes back"):
        RollBack(at_most=0)


# Batches with any of some data rows predict a single token: such gradients are far larger than usual. With MOVED, all
# rows from that one on are others. A process that is to DIE does so at a point of going back.
SPOILED = """
import signal
from pathlib import Path

import numpy as np

from eurollm_jax.data.loader import Data
from eurollm_jax.training import run as run_module
from eurollm_jax.training.checkpoint import Checkpoints

bad = range(*map(int, os.environ.get("BAD", "0 0").split()))
moved, where = int(os.environ.get("MOVED", "1000000")), os.environ.get("DIE")
whole, rename, save, roll_back = Data.batch, Path.rename, Checkpoints.save, run_module.roll_back


def batch(self, first_row, size, host=0, hosts=1):
    found = whole(self, first_row + (56 if first_row >= moved else 0), size, host, hosts)
    if first_row < bad.stop and first_row + size > bad.start:
        mask = np.zeros_like(found.mask)
        mask[tuple(np.argwhere(found.mask)[0])] = True
        return found._replace(mask=mask)
    return found


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_rename(path, target):
    return die() if where == "renaming" and ".before-rollback-" in Path(target).name else rename(path, target)


def dying_save(self, step, *arguments, **named):
    save(self, step, *arguments, **named)
    if where == "saved" and step == 10:
        self.wait()
        die()


Data.batch, Path.rename, Checkpoints.save = batch, dying_rename, dying_save
run_module.roll_back = (lambda *_: die()) if where == "deciding" else roll_back
"""
BAD = {"BAD": "72 96"}  # the rows of steps 10 to 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rollbacks")


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder) as started:
        yield started


@pytest.fixture
def fragile(experiment, folder):
    """Two skipped steps in a row are borne, and the checkpoints of steps 5 and 10 are permanent."""
    return dataclasses.replace(
        experiment,
        steps=14,
        schedule=Constant(peak=1e-3, warmup=2),
        skip=SkipStep(factor=4.0, window=3, at_most=2),
        checkpoint_every=5,
        runs=str(folder / "runs"),
    )


@pytest.fixture
def undisturbed(fragile, server, folder):
    """A run that meets the bad rows and is not killed, trained once for all tests."""
    return fragile.run if (fragile.run / "samples.json").exists() else trained(server, fragile, folder, BAD)


def trained(server, experiment, folder, environment, processes=1):
    """Its run, in processes of their own on four devices."""
    path = write_experiment(experiment, folder, SPOILED)
    with server.start("train", path, processes=processes, devices=4 // processes, environment=environment) as group:
        assert set(group.wait()) == {0}, group.last_words()
    return experiment.run


def refused(server, experiment, folder, environment):
    """What is said by a run that ends with an error."""
    path = write_experiment(experiment, folder, SPOILED)
    with server.start("train", path, devices=4, environment=environment) as group:
        assert group.wait() == [1], group.last_words()
        return group.said()


def told(run):
    return json.loads((run / "rollbacks.json").read_text())["rollbacks"]


def assert_same_state(run, other):
    mine, theirs = state_of(run), state_of(other)
    assert mine.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(mine[path], value, err_msg=path)


def test_a_run_that_diverges_is_the_run_that_never_had_those_rows(fragile, undisturbed, server, folder):
    """Beside a run on good data whose batches from the checkpoint of step 5 on are those from row 96 on."""
    run, clean = undisturbed, trained(server, dataclasses.replace(fragile, name="clean"), folder, {"MOVED": "40"})
    said = (run / "logs" / "process-0.log").read_text()
    assert "THE RUN GOES BACK TO STEP 5: steps 10 to 12 were skipped. Rows 40 to 95 of the data are left out" in said
    assert_same_state(run, clean)
    assert not records(run, "skipped")  # what was gone back behind is in no record of the run
    ours, theirs = (records(one, "train") for one in (run, clean))
    assert [record["step"] for record in ours] == [3, 5, 6, 9, 10, 12, 14]
    assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]
    data = open_data(fragile.data, fragile.total_rows)
    for record in ours:
        read = [row for row in range(record["row"] + 56) if row < 40 or row >= 96][: record["row"]]
        counted = np.bincount(data.schedule.locate(np.array(read))[0], minlength=len(data.source_names))
        named = dict(zip(data.source_names, counted.tolist(), strict=True))
        assert {name: source["rows"] for name, source in record["sources"].items()} == named
    (entry,) = told(run)
    assert [entry[name] for name in ("step", "left_out_from", "left_out_until")] == [5, 40, 96]
    assert [entry[name] for name in ("first_skipped", "last_skipped")] == [10, 12]
    assert (run / "checkpoints" / "10.before-rollback-1").is_dir()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_point_of_going_back_it_comes_to_the_same(processes, fragile, undisturbed, server, folder):
    disturbed = dataclasses.replace(fragile, name=f"killed-{processes}")
    path = write_experiment(disturbed, folder, SPOILED)
    for where in ("deciding", "renaming", "saved"):
        dying = {0: {"DIE": where}}
        with server.start(
            "train", path, processes=processes, devices=4 // processes, environment=BAD, of_process=dying
        ) as group:
            assert group.wait()[0] == -signal.SIGKILL, group.last_words()
    run = trained(server, disturbed, folder, BAD, processes)
    if processes > 1:  # whose sums have another order
        undisturbed = trained(server, dataclasses.replace(fragile, name=f"left-{processes}"), folder, BAD, processes)
    assert_same_state(run, undisturbed)
    assert records(run) == records(undisturbed)
    assert told(run) == told(undisturbed)


def test_a_run_that_fails_with_all_rows_stops(fragile, server, folder):
    failing = dataclasses.replace(fragile, name="failing")
    said = refused(server, failing, folder, {"BAD": "72 100000"})
    assert "steps 6 to 8 were skipped, more than 2 in a row" in said
    assert "The run has gone back 2 times to step 5 or later (rollback.at_most)." in said
    assert [(entry["step"], entry["left_out_until"]) for entry in told(failing.run)] == [(5, 96), (5, 120)]


def test_without_the_rule_it_stops_at_once(fragile, server, folder):
    without = dataclasses.replace(fragile, name="without", rollback=None)
    said = refused(server, without, folder, BAD)
    assert "steps 10 to 12 were skipped, more than 2 in a row" in said
    assert not (without.run / "rollbacks.json").exists()
    assert (without.run / "checkpoints" / "10").is_dir()  # which was being written
