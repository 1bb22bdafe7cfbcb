"""How processes find each other, as far as one process can tell; tests/training/test_processes.py starts several."""

import os

import jax
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.parallel import distributed
from eurollm_jax.parallel.distributed import Coordination, any_process, connect, gathered, is_first, require_same
from eurollm_jax.parallel.mesh import Layout, MeshConfig


@pytest.fixture
def initialized(monkeypatch):
    """What JAX was asked for, in a shell that no launcher has started."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append((args, options)))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name in distributed.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_enable_preemption_service
    yield asked
    jax.config.update("jax_enable_preemption_service", before)


# Variables of a task, as Slurm and Open MPI set them -> JAX's name of the launcher, and the devices that are its own.
STEP = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "nid[1-2]", "SLURM_LOCALID": "3"}
SHELL = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "nid1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
LAUNCHES = [
    ({}, None, None),
    ({"SLURM_NTASKS": "8"}, None, None),  # a batch script
    (SHELL, None, None),  # an interactive step of an allocation for 8 tasks
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "slurm", [3]),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "ROCR_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "slurm", [6, 7]),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0"}, "slurm", []),  # --gpus-per-task=1
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, "slurm", []),  # all four of its node
    (MPI, "ompi", [1]),
    ({**SHELL, **MPI, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "ompi", [2, 3]),  # mpirun in a Slurm allocation
]


@pytest.mark.parametrize(("variables", "launcher", "devices"), LAUNCHES)
def test_launchers_are_recognised_and_every_device_is_used(variables, launcher, devices, initialized, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    connect()
    asked = [(args, o["cluster_detection_method"], list(o["local_device_ids"])) for args, o in initialized]
    assert asked == ([] if launcher is None else [((), launcher, devices)])


def test_processes_started_by_hand_are_not_looked_for(initialized, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "nid1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    connect(Coordination("here:1234", 1, 0))
    connect(Coordination("there:99", 4, 3))
    ((args, options),) = initialized
    assert args == ("there:99", 4, 3)
    assert options["cluster_detection_method"] == "deactivate"


def test_processes_that_cannot_meet_are_a_user_error(initialized, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody came\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"do not find each other \(DEADLINE_EXCEEDED: nobody came\)"):
        connect(Coordination("there:99", 4, 3))


@pytest.mark.parametrize(("given", "said"), [(("h:1", 2, 2), "from 0 to 1"), (("h", 2, 0), "host:port")])
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
