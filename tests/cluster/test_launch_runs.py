"""`eurollm launch` from the command line to the trained model: several real processes under a scheduler of this
machine, preempted, queued again, resumed, and the weights of a run that nobody disturbed."""

import dataclasses
import subprocess
import sys

import pytest

from eurollm_jax.cli import main
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training import run as training_run
from tests.cluster.fake_slurm.cluster import Cluster
from tests.processes import WITHOUT_SAMPLES, Server, differences, flags, outcome, records, write_experiment
from tests.tiny import tiny_experiment, tiny_model
from tests.training.conftest import heldout  # noqa: F401

# At the first start of the job every process says before its seventh step that it is there, and waits for a signal.
WAITS = """
if os.environ.get("SLURM_PROCID") and not os.environ.get("SLURM_RESTART_COUNT"):
    import time
    from eurollm_jax.training.stopping import Stopping
    ask = Stopping.ask

    def waiting(self):
        self.asks = getattr(self, "asks", 0) + 1
        if self.asks == 7:
            open(os.environ["PLACE"] + "/there-" + os.environ["SLURM_PROCID"], "w").close()
            while self._signal is None:
                time.sleep(0.01)
        ask(self)

    Stopping.ask = waiting
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with Cluster(tmp_path / "slurm", monkeypatch) as cluster:
        yield cluster


SITE = """
based_on = "local"
scheduler = "slurm"
devices_per_node = 2
processes_per_node = 2
cores_per_node = 4
time_limit = "24:00:00"
environment = { GREETING = "job $SLURM_JOB_ID" }
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A machine of a user's own, with one device for each process, as the tests' own variables would not have it."""
    monkeypatch.setenv("XLA_FLAGS", flags(1))
    path = tmp_path / "cluster.toml"
    path.write_text(SITE)
    return path


@pytest.fixture
def experiment(tokenizer, store, heldout, tmp_path, monkeypatch):  # noqa: F811
    """Without a save or an evaluation on its way."""
    # Its module, which `launch` executes in this process, puts another in this place: what is set here is set back.
    monkeypatch.setattr(training_run, "sample", training_run.sample)
    return tiny_experiment(
        tokenizer,
        store,
        heldout,
        tmp_path,
        model=tiny_model(tokenizer, depth=1),
        mesh=MeshConfig(data=-1, fsdp=2),
        evaluate_every=100,
        checkpoint_every=100,
    )


def preempted_and_gone_on(cluster, site, experiment, folder, nodes):
    """The experiment launched on so many nodes of two processes, disturbed by the signal that Slurm sends; its run."""
    path = write_experiment(experiment, folder, WITHOUT_SAMPLES + WAITS)
    launch = ["launch", "--site", str(site), "--nodes", str(nodes), str(path), "--time", "01:00:00"]
    assert main([*launch, "--seed", "7"]) == 0
    tasks = 2 * nodes
    cluster.until(lambda: len(list(folder.glob("there-*"))) == tasks or not live(cluster))
    log = experiment.run.with_name("tiny.launch") / "logs" / f"{cluster.jobs()[0]['number']}.out"
    assert len(list(folder.glob("there-*"))) == tasks, log.read_text()
    assert main([*launch, "--seed", "7"]) == 1  # while it runs, no second one
    (job,) = cluster.jobs()
    subprocess.run(["scancel", "--signal=USR1", str(job["number"])], check=True)
    (job,) = cluster.ended()
    assert (job["state"], job["restarts"], job["statuses"][-1]) == ("COMPLETED", 1, 0), log.read_text()
    said = log.read_text()
    assert f"job {job['number']}, start 1, on localhost" in said
    assert f"job {job['number']}, start 2, on localhost" in said
    assert "by SIGUSR1" in said
    first, second = (line["step"] for line in records(experiment.run, "start", "restart"))
    assert first == 0
    assert second in (7, 8, 9)
    assert main([*launch, "--seed", "7"]) == 0  # complete: nothing is submitted
    assert len(cluster.jobs()) == 1
    return experiment.run


def live(cluster):
    return [job for job in cluster.jobs() if job["state"] in ("PENDING", "RUNNING")]


def undisturbed(experiment, folder, processes):
    """What the same experiment comes to in so many processes of a device that nobody interrupts."""
    alone = dataclasses.replace(experiment, runs=str(folder / "local"), seed=7)
    with Server(folder) as server:
        path = write_experiment(alone, folder / "alone", WITHOUT_SAMPLES)
        with server.start("train", path, processes=processes, devices=1) as group:
            assert set(group.wait()) == {0}, group.last_words()
    return outcome(alone.run)


def test_a_launched_run_is_preempted_and_goes_on_to_the_weights_of_a_local_one(cluster, site, experiment, tmp_path):
    run = preempted_and_gone_on(cluster, site, experiment, tmp_path, nodes=1)
    assert not differences(undisturbed(experiment, tmp_path, processes=2), outcome(run))


@pytest.mark.slow
def test_two_nodes_of_two_processes_end_with_the_weights_of_four_local_ones(cluster, site, experiment, tmp_path):
    run = preempted_and_gone_on(cluster, site, experiment, tmp_path, nodes=2)
    assert not differences(undisturbed(experiment, tmp_path, processes=4), outcome(run))
