"""How processes find each other: as one can tell, and in real ones, of which some do not come as they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.parallel import distributed, launcher
from eurollm_jax.parallel.distributed import Coordination, any_process, connect, gathered, is_first, require_same
from eurollm_jax.parallel.mesh import Layout, MeshConfig


@pytest.fixture
def initialized(monkeypatch):
    """What JAX was asked for, in a shell that no launcher has started, where all others have come."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
    monkeypatch.setattr(distributed, "_meet", lambda place, seconds: None)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR_"))]:
        monkeypatch.delenv(name)
    for name in launcher.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_enable_preemption_service
    yield asked
    jax.config.update("jax_enable_preemption_service", before)


# Variables of a task, as Slurm and Open MPI set them -> process 0's address, and the devices that are the task's own.
STEP = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "nid[1-2]", "SLURM_LOCALID": "3"}
STEP |= {"SLURM_JOB_ID": "4097", "SLURM_PROCID": "7"}
SHELL = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "nid1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPI |= {"OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911"}
SLURM_S, MPI_S = "nid1:61441", "10.96.0.1:61442"
LAUNCHES = [
    ({}, None, None),
    ({"SLURM_NTASKS": "8"}, None, None),  # a batch script
    (SHELL, None, None),  # an interactive step of an allocation for 8 tasks
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, SLURM_S, [3]),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "ROCR_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, SLURM_S, [6, 7]),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0"}, SLURM_S, []),  # --gpus-per-task=1
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, SLURM_S, []),  # all four of its node
    ({**STEP, "JAX_COORDINATOR_PORT": "7", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, "nid1:7", []),
    ({**STEP, "JAX_COORDINATOR_ADDRESS": "other:7", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, "other:7", []),
    (MPI, MPI_S, [1]),
    ({**SHELL, **MPI, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, MPI_S, [2, 3]),  # mpirun in a Slurm allocation
]


@pytest.mark.parametrize(("variables", "address", "devices"), LAUNCHES)
def test_launchers_are_recognised_and_every_device_is_used(variables, address, devices, initialized, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    connect()
    asked = [(one["coordinator_address"], list(one["local_device_ids"])) for one in initialized]
    assert asked == ([] if address is None else [(address, devices)])
    for one in initialized:
        assert (one["process_id"], one["num_processes"]) == ((3, 4) if "OMPI_COMM_WORLD_SIZE" in variables else (7, 8))


def test_where_the_address_is_not_known_jax_is_left_to_find_it(initialized, monkeypatch):
    """As under Open MPI 5."""
    for name, value in {**STEP, **MPI}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    monkeypatch.setattr(distributed, "_meet", None)
    connect()
    ((asked,)) = initialized
    assert asked["cluster_detection_method"] == "ompi"
    assert "coordinator_address" not in asked


def test_where_process_0_is_as_jax_finds_it(monkeypatch):
    from jax._src.clusters import OmpiCluster, SlurmCluster

    uri = {**MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911"}
    lists = ["nid001", "nid001,nid7", "nid[001-004]", "nid[001,007-009],other"]
    cases = [({**STEP, "SLURM_STEP_NODELIST": nodes}, SlurmCluster) for nodes in lists]
    for variables, cluster in [*cases, (uri, OmpiCluster)]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert launcher.address_of(variables) == cluster.get_coordinator_address(None, None)
    assert launcher.address_of({}) is None


def test_processes_are_counted_as_their_launcher_does():
    step = {**STEP, "SLURM_PROCID": "5"}
    assert launcher.started_as(step) == (5, 8)
    assert launcher.local_number(step) == 3
    assert launcher.started_as({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == (0, 1)  # a batch script
    assert launcher.started_as({**MPI, **step}) == (3, 4)
    assert launcher.started_as({}) == (0, 1)
    assert launcher.node_of({**step, "SLURMD_NODENAME": "nid2"}) == "nid2"


LISTS = [
    ("nid001", ["nid001"]),
    ("nid[001-003,07],login1", ["nid001", "nid002", "nid003", "nid07", "login1"]),
    ("nid[9-10]", ["nid9", "nid10"]),
    ("nid[1-2]-ib", []),  # forms that are left alone
    ("rack[0-1]node[0-3]", []),
]


@pytest.mark.parametrize(("listed", "nodes"), LISTS)
def test_the_nodes_of_a_step(listed, nodes):
    assert list(launcher.nodes_of({**STEP, "SLURM_STEP_NODELIST": listed})) == nodes
    assert launcher.nodes_of({**SHELL, "SLURM_STEP_NODELIST": listed}) == ()


def test_processes_started_by_hand_are_not_looked_for(initialized, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "nid1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    connect(Coordination("here:1234", 1, 0))
    connect(Coordination("there:99", 4, 3))
    (asked,) = initialized
    assert (asked["coordinator_address"], asked["num_processes"], asked["process_id"]) == ("there:99", 4, 3)
    assert asked["cluster_detection_method"] == "deactivate"


def test_processes_that_cannot_meet_are_a_user_error(initialized, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody came\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"do not find each other \(DEADLINE_EXCEEDED: nobody came\)"):
        connect(Coordination("there:99", 4, 3))


PLACES = [
    (("h:1", 2, 2), "from 0 to 1"),
    *(((address, 2, 0), "host:port") for address in ("h", "h:", ":1", "h:x", "h:0", "h:65536")),
]


@pytest.mark.parametrize(("given", "said"), PLACES)
def test_a_place_that_cannot_be_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        Coordination(*given)


def test_one_process_agrees_with_itself():
    assert is_first()
    assert any_process(True)
    assert not any_process(False)
    np.testing.assert_array_equal(gathered([1, 2]), [[1, 2]])
    require_same("the experiment", {"a": 1})
    assert len(distributed.host_names()) == 1


@pytest.mark.parametrize(
    "config",
    [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, tensor=8), MeshConfig(data=4, context=2)],
)
@pytest.mark.parametrize("owned", [range(4), range(4, 8), range(2, 4), range(8)])
def test_the_part_of_a_batch_that_a_process_reads_holds_the_rows_of_its_devices(config, owned, monkeypatch):
    """A process that owned these devices, against the rows that the sharding gives them."""
    layout, rows = Layout(config.build()), 16
    indices = layout.rows.devices_indices_map((rows,))
    mine = [jax.devices()[number] for number in owned]
    wanted = {row for device in mine for row in range(rows)[indices[device][0]]}

    def addressable(self, shape):
        return {device: index for device, index in self.devices_indices_map(shape).items() if device in mine}

    monkeypatch.setattr(type(layout.rows), "addressable_devices_indices_map", addressable)
    part, parts = layout.part_of_rows([rows, 8])
    assert rows % parts == 0
    read = set(range(part * rows // parts, (part + 1) * rows // parts))
    assert wanted <= read
    smaller = [n for n in range(parts + 1, rows + 1) if rows % n == 0 and 8 % n == 0]
    for n in smaller:  # no finer cut has a part that holds them all
        size = rows // n
        assert len({row // size for row in wanted}) > 1


def test_rows_are_dealt_out_as_they_were_whole():
    layout = Layout(MeshConfig(data=4, tensor=2).build())
    batch = {"x": np.arange(16 * 3).reshape(16, 3), "y": np.arange(16)}
    placed = layout.place_rows(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(np.asarray(array), batch[name])
        assert array.sharding == layout.rows


# ------------------------------------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(exit statuses, what each said) of the processes of each case of starts.py; all run at once."""
    folder, tests = tmp_path_factory.mktemp("starts"), Path(__file__).parents[1]
    command = [sys.executable, str(tests / "parallel/starts.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return {
        case: (found, [(folder / f"{case}-{index}").read_text() for index in range(len(found))])
        for case, found in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("case", ["all", "strangers"])
def test_all_that_come_are_connected_whoever_else_comes_by(ends, case):
    statuses, said = ends[case]
    assert statuses == [0, 0, 0], said
    assert said == [f"connected as {process} of 3\n" for process in range(3)]


MISSED = [
    ("one absent", 76, "process 2 of 3 has not come within 3 s (those that came are on host0, host1)"),
    ("two absent", 76, "2 of 4 processes (1, 3) have not come within 3 s (those that came are on host0, host1)"),
    ("twice", 1, "process 1 of 3 is there twice, on host"),
    ("other count", 1, "process 5 on host2 is one of 6, and process 0 on host0 one of 3"),
    ("gone", 76, "process 2 of 4 on host2 came and is gone: it was killed, or it crashed"),
]


@pytest.mark.parametrize(("case", "status", "line"), MISSED)
def test_all_that_come_say_in_one_line_why_they_cannot_begin(ends, case, status, line):
    statuses, said = ends[case]
    victim = {"gone": 2}.get(case)
    assert statuses == [-9 if member == victim else status for member in range(len(statuses))]
    told = {text for member, text in enumerate(said) if member != victim}
    assert len(told) == 1
    assert told.pop().startswith(line)


def test_two_that_claim_one_number_are_named_by_their_hosts(ends):
    line = ends["twice"][1][0]
    assert "host1" in line
    assert "host2" in line


def test_where_process_0_does_not_come_the_others_say_where_they_have_looked(ends):
    statuses, said = ends["first absent"]
    assert statuses == [76, 76]
    assert all(text.startswith("process 0 cannot be reached at localhost:") for text in said)
    assert all(" within 3 s (connection refused): " in text for text in said)


def test_where_process_0_is_killed_the_others_say_so(ends):
    statuses, (_, said) = ends["first gone"]
    assert statuses == [-9, 76]
    assert said.startswith("process 0 on host0 was there, and is gone or silent: ")


def test_an_address_that_leads_elsewhere_is_told_by_process_0_too(ends):
    statuses, (first, other) = ends["elsewhere"]
    assert statuses == [76, 76]
    assert first.startswith("process 0 is on host0, and 192.0.2.1:")
    assert " does not lead to it: " in first
    assert other.startswith("process 0 cannot be reached at 192.0.2.1:")


@pytest.mark.parametrize("case", ["taken", "first twice"])
def test_a_port_that_is_taken_is_said_at_once(ends, case):
    statuses, said = ends[case]
    assert statuses[1] == 1
    assert said[1].startswith("process 0 cannot listen at localhost:")
    assert " on host1 (address already in use): " in said[1]
