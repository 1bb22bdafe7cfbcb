"""Several real processes are one run: they train what one process trains, stop together, and wait for no dead one."""

import dataclasses
import shutil
import signal

import numpy as np
import pytest

from tests.processes import WITHOUT_SAMPLES, Server, differences, newest, outcome, records, state_of, write_experiment

STOPPED, LOST = 75, 76
LOST_WITHIN = 30.0  # seconds until a process that is gone has ended the others: far above what it takes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("processes")) as server:
        yield server


@pytest.fixture
def longer(experiment):
    """Enough steps to be met in the middle of them."""
    return dataclasses.replace(experiment, steps=40, log_every=4, evaluate_every=20, checkpoint_every=20)


def command(experiment, folder):
    """What trains it, in the folder's runs."""
    elsewhere = dataclasses.replace(experiment, runs=str(folder / "runs"))
    return "train", write_experiment(elsewhere, folder, WITHOUT_SAMPLES)


def trained(server, experiment, folder, **options):
    """The run directory, once all processes have trained to the end."""
    with server.start(*command(experiment, folder), **options) as group:
        assert set(group.wait()) == {0}, group.last_words()
    return folder / "runs" / experiment.name


def at_step(group, step, process=0):
    """Whether a process is in that step or a later one."""
    names = [name.split() for _, name in group.phases(process)]
    return any(words[0] == "step" and int(words[1]) >= step for words in names)


def in_step(group):
    """The last step that process 0 has begun."""
    return max(int(name.split()[1]) for _, name in group.phases() if name.startswith("step "))


def test_two_processes_train_what_one_does_though_one_is_killed(server, longer, tmp_path):
    undisturbed = trained(server, longer, tmp_path / "undisturbed", processes=2, devices=2)
    assert_same_within_rounding(undisturbed, trained(server, longer, tmp_path / "one", processes=1, devices=4))
    stop_by_a_death(server, longer, tmp_path, at=25, processes=2)
    assert not differences(outcome(undisturbed), outcome(trained(server, longer, tmp_path, processes=2)))


def assert_same_within_rounding(two, one):
    """Sums over devices may be taken in another order; what was read is exactly the same."""
    assert [line["processes"] for run in (two, one) for line in records(run, "start")] == [2, 1]
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert (ours["kind"], ours["step"], ours["row"]) == (theirs["kind"], theirs["step"], theirs["row"])
        if ours["kind"] == "train":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            for name, read in ours["sources"].items():
                for figure in ("rows", "tokens", "bytes"):
                    assert read[figure] == theirs["sources"][name][figure]
        else:
            assert ours["macro_bits_per_byte"] == pytest.approx(theirs["macro_bits_per_byte"], rel=1e-4)
    arrays = state_of(one)
    for path, value in state_of(two).items():
        np.testing.assert_allclose(value, arrays[path], rtol=1e-2, atol=1e-4, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_in_every_way_is_the_undisturbed_one(server, longer, tmp_path, processes):
    undisturbed = trained(server, longer, tmp_path / "undisturbed", processes=processes)
    with server.start(*command(longer, tmp_path), "--time-limit", "0:00:31", processes=processes) as group:
        assert set(group.wait()) == {STOPPED}, group.last_words()
        assert "by its time limit" in group.said()
    assert newest(longer.run) < 8
    stop_by_a_signal(server, longer, tmp_path, signal.SIGTERM, at=8, processes=processes)
    stop_by_a_signal(server, longer, tmp_path, signal.SIGUSR1, at=16, processes=processes)
    stop_by_a_death(server, longer, tmp_path, at=25, processes=processes)
    assert not differences(outcome(undisturbed), outcome(trained(server, longer, tmp_path, processes=processes)))


def stop_by_a_signal(server, experiment, folder, number, *, at, processes):
    """All processes get it, as from a scheduler: saved within a few steps, it ends with the status of a stop."""
    with server.start(*command(experiment, folder), processes=processes) as group:
        group.until(lambda: at_step(group, at))
        group.signal(number)
        asked = in_step(group)
        assert set(group.wait()) == {STOPPED}, group.last_words()
        assert number.name in group.said()
    assert at <= newest(experiment.run) <= asked + 3


def stop_by_a_death(server, experiment, folder, *, at, processes):
    """SIGKILL of the last process: the others end, and name it."""
    before = newest(experiment.run) if experiment.run.exists() else 0
    with server.start(*command(experiment, folder), processes=processes) as group:
        group.until(lambda: at_step(group, at))
        group.signal(signal.SIGKILL, processes - 1)
        assert group.wait(LOST_WITHIN) == [LOST] * (processes - 1) + [-signal.SIGKILL], group.last_words()
        if processes > 1:
            assert "process 1" in group.said()
    (*_, begun) = records(experiment.run, "start", "restart")
    assert begun["step"] == before


def endless(experiment):
    """Far from its end, so that nothing gets there on what was read ahead."""
    return dataclasses.replace(experiment, steps=100_000, evaluate_every=100_000, checkpoint_every=100_000)


def test_data_that_one_process_cannot_read_stop_all_with_its_number(server, experiment, store, tmp_path):
    for index in range(2):
        shutil.copytree(store.path, tmp_path / f"store-{index}")
    path = write_experiment(
        endless(experiment),
        tmp_path,
        'data = dataclasses.replace(EXPERIMENT.data, store=os.environ["STORE"])\n'
        "EXPERIMENT = dataclasses.replace(EXPERIMENT, data=data)\n",
    )
    stores = {index: {"STORE": str(tmp_path / f"store-{index}")} for index in range(2)}
    with server.start("train", path, processes=2, of_process=stores) as group:
        group.until(lambda: at_step(group, 5))
        shard = tmp_path / "store-1" / "el" / "tokens-00000.bin"
        shard.unlink()
        assert group.wait(LOST_WITHIN) == [1, 1], group.last_words()
        for index in range(2):
            assert f"{shard} of source el was deleted" in group.said(index)
            assert "process 1" in group.said(index)
            assert "Traceback" not in group.said(index)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named(server, experiment, tmp_path):
    soon = "from eurollm_jax.parallel.liveness import RollCall\nRollCall.__init__.__defaults__ = (5.0,)\n"
    with server.start("train", write_experiment(endless(experiment), tmp_path, soon), processes=2) as group:
        group.until(lambda: at_step(group, 5))
        group.signal(signal.SIGSTOP, 1)
        group.until_ended(0, LOST_WITHIN)
        assert group.statuses() == [LOST, None]
        assert "process 1" in group.said()


def test_processes_of_different_experiments_refuse_at_the_start(server, experiment, tmp_path):
    path = write_experiment(
        experiment, tmp_path, 'EXPERIMENT = dataclasses.replace(EXPERIMENT, seed=int(os.environ.get("SEED", 0)))\n'
    )
    with server.start("train", path, processes=2, of_process={1: {"SEED": "7"}}) as group:
        assert group.wait(LOST_WITHIN) == [1, 1], group.last_words()
        for index in range(2):
            assert "differs from that of the others" in group.said(index)
    assert not experiment.run.exists()
