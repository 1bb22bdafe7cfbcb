"""A run is what its experiment says, however often it is stopped; a directory is never taken over by another one."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.data.loader import Data, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report import write_report
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import flops_per_token
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.recorder import Recorder
from eurollm_jax.training.run import train
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.step import Program, abstract_params
from eurollm_jax.training.trace import Trace

TIMES = {"seconds", "tokens_per_second", "mfu", "data_wait", "evaluation_seconds"}


def params(run, model):
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    values, progress = checkpoints.restore_params(abstract_params(model, Layout(MeshConfig().build())))
    checkpoints.close()
    return {path: np.asarray(value) for path, value in flatten(values).items()}, progress


def records(run, *kinds):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def metrics(run):
    lines = records(run, "train", "evaluation")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(one, other, model):
    (ours, row), (theirs, their_row) = params(one, model), params(other, model)
    assert row["row"] == their_row["row"]
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    assert metrics(one) == metrics(other)
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


RAMP = ((20, 16), (60, 24))


@pytest.fixture
def ramped(experiment):
    """12 steps: 3 of 8 rows, 3 of 16, 6 of 24, with checkpoints in the second and the third phase."""
    return dataclasses.replace(experiment, batch_ramp=RAMP)


@pytest.fixture
def undisturbed_ramp(ramped, tmp_path):
    return train(dataclasses.replace(ramped, runs=str(tmp_path / "undisturbed")), "")


@pytest.fixture
def undisturbed(experiment, tmp_path):
    return train(dataclasses.replace(experiment, runs=str(tmp_path / "undisturbed")), "")


def command_of(experiment, folder):
    """The command that trains it in a process of its own."""
    module = folder / "experiments" / "tiny.py"
    module.parent.mkdir()
    module.write_text(
        "from eurollm_jax.experiment import *\n"
        "from eurollm_jax.model.config import *\n"
        "from eurollm_jax.data.loader import DataConfig\n"
        "from eurollm_jax.corpus.tokenizing.parity import Parity\n"
        "from eurollm_jax.training.saving import Saving\n"
        "from eurollm_jax.training.watchdog import Watch\n"
        "from eurollm_jax.training.rollback import RollBack\n"
        f"EXPERIMENT = {experiment!r}\n"
    )
    return [sys.executable, "-m", "eurollm_jax", "train", str(module)]


def test_a_killed_run_resumes_to_the_same_bits(ramped, undisturbed_ramp, tmp_path):
    """SIGKILL as soon as a first checkpoint is committed, at whatever point of the steps that follow."""
    command = command_of(ramped, tmp_path)
    run = ramped.run
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "4").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "evaluation.json").exists()

    subprocess.run(command, check=True, capture_output=True)
    assert_same_run(run, undisturbed_ramp, ramped.model)
    assert records(run, "restart")


def test_what_a_start_costs_and_what_holds_the_loop_is_recorded(experiment, caplog):
    with caplog.at_level("INFO", "eurollm_jax"):
        before = time.perf_counter()
        run = train(experiment, "", began=before - 100)
        took = time.perf_counter() - before
    (start,) = records(run, "start")
    flops = flops_per_token(experiment.model, experiment.data.sequence_length)
    assert start["flops_per_token"] == flops
    assert start["peak_source"] == "the fastest float32 product of 1024 x 1024 matrices at the start"
    assert start["mfu_formula"] == "mfu = useful tokens/s * flops_per_token / peak_flops"
    assert start["mesh"] == {"data": 8}
    for line in records(run, "train"):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / start["peak_flops"])
        assert 0 <= line["data_wait"] <= 1
    (first,) = records(run, "first_step")
    assert first["step"] == 1
    assert first["programs"] == 1
    spent = first["lowering_seconds"] + first["compile_seconds"]
    assert 0 < spent < first["seconds_to_first_step"] - 100 < took
    stalls, evaluations = records(run, "checkpoint"), records(run, "evaluation")
    assert [line["step"] for line in stalls] == [4, 8, 12]
    between = [line["stall_seconds"] for line in stalls] + [line["evaluation_seconds"] for line in evaluations]
    assert all(seconds > 0 for seconds in between)
    trained = records(run, "train")[-1]["seconds"]
    assert spent + trained + sum(between) < took  # they are counted once, each in its place
    (said,) = (record.message for record in caplog.records if "FLOP a token" in record.message)
    assert f"{start['devices']}, data=8; " in said
    assert f"parameters, AdamW, products in float32, remat none, attention {start['attention']['kernel']} (" in said


def test_nothing_is_fetched_before_the_next_step_is_under_way(experiment, monkeypatch):
    """The next batch is read and placed, and the figures of a step fetched, while a step runs."""
    happened = []
    loader, compile_train, record = Data.loader, Program.compile_train, Recorder.train

    def noting_batches(self, *args, **kwargs):
        for number, item in enumerate(loader(self, *args, **kwargs), start=1):
            happened.append(f"batch {number}")
            yield item

    def noting_steps(self, *args):
        step = compile_train(self, *args)

        def dispatched(state, batch):
            assert isinstance(batch.tokens, jax.Array)
            happened.append("step")
            return step(state, batch)

        return dispatched

    def noting_records(self, step):
        happened.append(f"record {step}")
        return record(self, step)

    monkeypatch.setattr(Data, "loader", noting_batches)
    monkeypatch.setattr(Program, "compile_train", noting_steps)
    monkeypatch.setattr(Recorder, "train", noting_records)
    train(dataclasses.replace(experiment, steps=4, log_every=1, checkpoint_every=4, evaluate_every=4), "")
    assert happened == [
        *("batch 1", "step", "batch 2", "step", "batch 3", "record 1", "step", "batch 4", "record 2"),
        *("step", "record 3", "record 4"),  # the last one waits for its own figures
    ]


def test_steps_are_profiled_on_request(experiment, undisturbed):
    run = train(experiment, "", trace=Trace(2, 3))
    (profile,) = (run / "trace").rglob("*.xplane.pb")
    assert profile.stat().st_size > 10_000
    assert metrics(run) == metrics(undisturbed)
    shutil.rmtree(run / "checkpoints" / "12")
    with pytest.raises(UserError, match="--trace 8:9: the run has 12 steps, of which 9 to 12 are left"):
        train(experiment, "", trace=Trace(8, 9))
    with pytest.raises(UserError, match="--trace 12:13: the run has 12 steps, of which 1 to 12 are left"):
        train(dataclasses.replace(experiment, name="another"), "", trace=Trace(12, 13))
    assert not (experiment.run.parent / "another").exists()


def test_what_the_devices_cannot_compute_is_refused_before_a_run_begins(experiment):
    model = dataclasses.replace(experiment.model, remat="offload")
    with pytest.raises(UserError, match="choose remat='attention'"):
        train(dataclasses.replace(experiment, model=model), "")
    assert not experiment.run.exists()


def test_a_run_whose_shard_is_deleted_stops_with_its_name_and_fails(experiment, store, tmp_path):
    """Far from its end, so that it cannot get there on what it has read ahead."""
    shutil.copytree(store.path, tmp_path / "store")
    data = dataclasses.replace(experiment.data, store=str(tmp_path / "store"))
    long = dataclasses.replace(experiment, data=data, steps=100_000, checkpoint_every=100_000, evaluate_every=100_000)
    process = subprocess.Popen(command_of(long, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((long.run / "metrics.jsonl").exists() and records(long.run, "train")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shard = tmp_path / "store" / "el" / "tokens-00000.bin"
    shard.unlink()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{shard} of source el was deleted while it was read; restore it" in said
    assert "Traceback" not in said


def noted(monkeypatch):
    """The (first row, next row, batch) of all steps, as the loader hands them out, and the sizes that are compiled."""
    read, compiled = [], []
    loader, compile_train = Data.loader, Program.compile_train

    def noting_rows(self, first_row, *args, **kwargs):
        for next_row, batch in loader(self, first_row, *args, **kwargs):
            read.append((first_row, next_row, batch))
            first_row = next_row
            yield next_row, batch

    def noting_sizes(self, size, length):
        compiled.append(size)
        return compile_train(self, size, length)

    monkeypatch.setattr(Data, "loader", noting_rows)
    monkeypatch.setattr(Program, "compile_train", noting_sizes)
    return read, compiled


def test_a_ramp_cuts_the_same_rows_into_other_batches(ramped, monkeypatch):
    read, compiled = noted(monkeypatch)
    lines = metrics(train(ramped, ""))
    assert [after - first for first, after, _ in read] == [8] * 3 + [16] * 3 + [24] * 6
    assert [first for first, _, _ in read] == [0, *(after for _, after, _ in read[:-1])]
    assert sorted(compiled) == [8, 16, 24]
    data = open_data(ramped.data, ramped.total_rows)
    for first, after, batch in read:
        wanted = sorted(data.batch(row, 1).tokens.tobytes() for row in range(first, after))
        assert sorted(tokens.tobytes() for tokens in batch.tokens) == wanted
    ends = [after for _, after, _ in read]
    learning_rate = ramped.schedule.build(ramped.steps)
    for line in lines:
        assert line["row"] == ends[line["step"] - 1]
        if line["kind"] == "train":
            assert line["learning_rate"] == pytest.approx(float(learning_rate(line["step"] - 1)))
    assert lines[-1]["row"] == ramped.total_rows


def test_a_ramp_goes_on_from_a_checkpoint_of_its_last_phase(ramped, undisturbed_ramp, monkeypatch):
    """Where a killed run goes on from is chance; this one does so at step 8."""
    shutil.copytree(undisturbed_ramp, ramped.run)
    shutil.rmtree(ramped.run / "checkpoints" / "12")
    read, compiled = noted(monkeypatch)
    train(ramped, "")
    assert [(first, after) for first, after, _ in read] == [(row, row + 24) for row in range(120, 216, 24)]
    assert compiled == [24]
    assert_same_run(ramped.run, undisturbed_ramp, ramped.model)


def test_every_batch_size_of_a_ramp_must_divide_over_the_devices(ramped):
    with pytest.raises(UserError, match="a batch of 12 rows does not divide over 8 devices"):
        train(dataclasses.replace(ramped, batch_ramp=((20, 12),)), "")
    assert not ramped.run.exists()


def test_a_ramp_is_part_of_what_a_run_is(ramped):
    short = dataclasses.replace(ramped, steps=4)
    train(short, "")
    train(dataclasses.replace(short, batch_ramp=(*RAMP, (10_000, 12))), "")  # the run does not come so far
    with pytest.raises(UserError, match="batch_ramp"):
        train(dataclasses.replace(short, batch_ramp=()), "")


def test_best_fit_rows_train_and_resume(experiment, tmp_path):
    packed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, packing="best-fit"))
    whole = train(dataclasses.replace(packed, runs=str(tmp_path / "whole")), "")
    shutil.copytree(whole, packed.run)
    shutil.rmtree(packed.run / "checkpoints" / "12")
    train(packed, "")
    assert_same_run(packed.run, whole, packed.model)
    with pytest.raises(UserError, match=r"data\.packing was best-fit and is concat"):
        train(experiment, "")


def test_where_a_run_reads_from_is_no_part_of_what_it_is(experiment, undisturbed, store, tmp_path):
    """Its store elsewhere, worker processes, and another limit of parity go on with the run."""
    shutil.copytree(undisturbed, experiment.run)
    shutil.rmtree(experiment.run / "checkpoints" / "12")
    shutil.copytree(store.path, tmp_path / "elsewhere")
    data = dataclasses.replace(experiment.data, store=(str(tmp_path / "elsewhere"),), workers=1)
    train(dataclasses.replace(experiment, data=data, parity=Parity(max_premium=9.0)), "")
    assert_same_run(experiment.run, undisturbed, experiment.model)


def test_a_language_beyond_the_limits_of_parity_is_refused(experiment, caplog):
    strict = dataclasses.replace(experiment, steps=4, parity=Parity(max_premium=1.0))
    with pytest.raises(UserError, match=r"serves .*bg.* beyond the limits of parity"):
        train(strict, "")
    assert not experiment.run.exists()
    languages = ("bg", "de", "el", "en", "mt")
    run = train(dataclasses.replace(strict, parity=Parity(max_premium=1.0, allow=languages)), "")
    assert any("BEYOND THE LIMITS OF PARITY" in record.message and "el" in record.message for record in caplog.records)
    recorded = json.loads((run / "plan.json").read_text())["parity"]
    assert "el" in recorded["allowed_beyond"]
    shutil.rmtree(run / "checkpoints" / "4")  # its only one: it begins anew, within limits that nothing is beyond
    train(dataclasses.replace(strict, parity=Parity(max_premium=99.0)), "")
    shutil.rmtree(run / "checkpoints" / "4")
    train(dataclasses.replace(strict, parity=Parity(max_premium=1.0, allow=languages)), "")
    restarts = records(run, "restart")
    assert [line["parity_allowed"] for line in restarts] == [[], recorded["allowed_beyond"]]
    assert restarts[0]["stores"] == [experiment.data.store]
    assert recorded["sources"]["el"]["premium"] > 1


def test_the_run_directory_holds_what_it_promises(experiment, undisturbed, heldout):
    evaluation = json.loads((undisturbed / "evaluation.json").read_text())
    assert list(evaluation["languages"]) == ["de", "el", "mt"]
    for name, source in heldout.sources.items():
        figures = evaluation["languages"][name]
        assert figures["bytes"] == source.bytes
        assert figures["bits_per_byte"] == pytest.approx(figures["nats"] / np.log(2) / source.bytes)
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [5, 10, 12]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert sum(source["rows"] for source in last["sources"].values()) == experiment.total_rows
    planned = json.loads((undisturbed / "plan.json").read_text())["sources"]
    assert {name: source["rows"] for name, source in last["sources"].items()} == {
        name: source["rows"] for name, source in planned.items()
    }
    assert last["loss"] < lines[0]["loss"]
    assert {sample["language"] for sample in json.loads((undisturbed / "samples.json").read_text())} == {
        "de",
        "el",
        "mt",
    }
    assert write_report(undisturbed).stat().st_size > 10_000


def test_what_a_killed_run_leaves_before_its_first_checkpoint_is_dropped(experiment, undisturbed):
    run = experiment.run
    run.mkdir(parents=True)
    shutil.copy(undisturbed / "experiment.json", run)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 3}\n{"kind": "train", "st')
    train(experiment, "")
    assert metrics(run) == metrics(undisturbed)


def test_a_new_evaluation_follows_a_new_training(experiment):
    run = train(experiment, "")
    before = (run / "evaluation.json").read_text()
    (run / "evaluation.json").write_text("of another model")
    shutil.rmtree(run / "checkpoints")
    train(experiment, "")
    assert (run / "evaluation.json").read_text() == before


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(experiment):
    with pytest.raises(UserError, match=r"were skipped.*(nan|inf) at step \d+: .*checkpoints before are kept"):
        train(dataclasses.replace(experiment, schedule=WSD(peak=1e30, warmup=4, decay=0.0)), "")
    assert not (experiment.run / "evaluation.json").exists()


def test_two_processes_do_not_train_one_run(experiment):
    experiment.run.mkdir(parents=True)
    with (experiment.run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is not empty"):
            train(experiment, "")
    (experiment.run / ".lock").unlink()
    run = train(experiment, "")
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains in"):
            train(experiment, "")


def test_looking_at_a_run_touches_nothing(experiment):
    run = train(experiment, "")
    (run / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    assert checkpoints.latest == experiment.steps
    checkpoints.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_a_complete_run_is_left_alone(experiment):
    run = train(experiment, "")
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    assert train(experiment, "") == run
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before


def test_another_experiment_is_refused_and_nothing_touched(experiment):
    run = train(experiment, "")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, named in (
        (dict(steps=14), "steps was 12 and is 14"),
        (dict(data=dataclasses.replace(experiment.data, seed=5)), "data.seed was 0 and is 5"),
        (dict(data=dataclasses.replace(experiment.data, mixture=Mixture.proportional())), "mixture"),
    ):
        with pytest.raises(UserError, match=named):
            train(dataclasses.replace(experiment, **change), "")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_directory_of_something_else_is_refused(experiment):
    experiment.run.mkdir(parents=True)
    (experiment.run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no experiment"):
        train(experiment, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(evaluate_rows=0), "evaluate_rows=0 must be 1 or more"),
        (dict(name="../elsewhere"), "the name becomes a folder"),
        (dict(steps=0), "steps=0 must be 1 or more"),
    ],
)
def test_an_impossible_experiment_is_refused(experiment, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(experiment, **change)


def test_a_vocabulary_of_another_size_is_refused(experiment):
    model = dataclasses.replace(experiment.model, vocab_size=99)
    with pytest.raises(UserError, match="model's vocab_size is 99"):
        train(dataclasses.replace(experiment, model=model), "")
