"""One run over changing numbers of processes and meshes: the losses of the run that nothing changed, every row once."""

import dataclasses
import signal
from collections import Counter

import pytest

from eurollm_jax.data.loader import open_data
from eurollm_jax.parallel.mesh import MeshConfig
from tests.processes import WITHOUT_SAMPLES, Server, newest, records, write_experiment

# Writes down the rows that each step trains on, once over all devices that hold them.
SPY = """
import numpy as np
from eurollm_jax.training.step import Program
compile_train = Program.compile_train

def spying(self, *args):
    step = compile_train(self, *args)

    def spied(state, batch):
        with open(os.environ["ROWS"], "a") as file:
            for shard in batch.tokens.addressable_shards:
                if shard.replica_id == 0:
                    file.writelines(row.tobytes().hex() + "\\n" for row in np.asarray(shard.data))
        return step(state, batch)

    return spied

Program.compile_train = spying
"""
DATA, FSDP, TENSOR = MeshConfig(), MeshConfig(data=1, fsdp=-1), MeshConfig(data=-1, tensor=2)
BOTH = MeshConfig(data=-1, fsdp=2, tensor=2)


def run_in_parts(experiment, folder, parts):
    """Trains with (processes, mesh) after (processes, mesh), each from where the one before was stopped; gives the rows
    that were trained on, and the (step, processes, mesh) of all starts."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    of_process = {process: {"ROWS": str(rows / str(process))} for process in range(4)}
    with Server(folder) as server:
        for number, (processes, mesh) in enumerate(parts, 1):
            path = write_experiment(dataclasses.replace(experiment, mesh=mesh), folder, SPY + WITHOUT_SAMPLES)
            with server.start(
                "train", path, processes=processes, devices=4 // processes, of_process=of_process
            ) as group:
                if number == len(parts):
                    assert set(group.wait()) == {0}, group.last_words()
                    break
                enough = experiment.steps * number // len(parts)
                group.until(lambda group=group, enough=enough: f"step {enough}" in [name for _, name in group.phases()])
                group.signal(signal.SIGTERM)
                assert set(group.wait()) == {75}, group.last_words()
                assert enough <= newest(experiment.run) < experiment.steps
    starts = [(line["step"], line["processes"], line["mesh"]) for line in records(experiment.run, "start", "restart")]
    return [bytes.fromhex(line) for path in rows.iterdir() for line in path.read_text().splitlines()], starts


def assert_one_run(experiment, folder, parts):
    undisturbed = dataclasses.replace(experiment, runs=str(folder / "undisturbed"))
    run_in_parts(undisturbed, folder / "alone", [(1, DATA)])
    rows, starts = run_in_parts(experiment, folder / "parts", parts)
    assert [processes for _, processes, _ in starts] == [processes for processes, _ in parts]
    assert len({str(mesh) for _, _, mesh in starts}) == len({str(mesh) for _, mesh in parts})
    data = open_data(experiment.data, experiment.total_rows)
    assert Counter(rows) == Counter(data.batch(row, 1).tokens.tobytes() for row in range(experiment.total_rows))
    for ours, theirs in zip(records(experiment.run), records(undisturbed.run), strict=True):
        for name in ("kind", "step", "row", "tokens", "learning_rate", "skipped"):
            assert ours.get(name) == theirs.get(name)
        if ours["kind"] == "evaluation":
            assert ours["macro_bits_per_byte"] == pytest.approx(theirs["macro_bits_per_byte"], rel=1e-4)
            continue
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for name, read in ours["sources"].items():
            assert {**read, "nats": None} == {**theirs["sources"][name], "nats": None}


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one_on_another_mesh(experiment, tmp_path):
    assert_one_run(dataclasses.replace(experiment, steps=36), tmp_path, [(1, FSDP), (2, TENSOR)])


@pytest.mark.slow
def test_one_process_then_four_then_two_over_data_fsdp_and_tensor(experiment, tmp_path):
    parts = [(1, DATA), (4, FSDP), (2, TENSOR), (4, BOTH), (1, TENSOR)]
    assert_one_run(dataclasses.replace(experiment, steps=100), tmp_path, parts)
