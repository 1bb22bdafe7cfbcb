"""How processes find each other, as far as one process can tell; tests/training/test_processes.py starts several."""

import jax
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.parallel import distributed
from eurollm_jax.parallel.distributed import Coordination, any_process, connect, gathered, is_first, require_same
from eurollm_jax.parallel.mesh import Layout, MeshConfig


@pytest.fixture
def initialized(monkeypatch):
    """What JAX was asked for."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append((args, options)))
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_processes_are_found_by_their_launcher_or_by_hand(initialized, monkeypatch):
    connect()
    connect(Coordination("here:1234", 1, 0))
    assert initialized == []  # one process needs no others
    monkeypatch.setenv("SLURM_NTASKS", "8")
    connect()
    assert initialized == []  # a shell in an allocation is no task of a step
    monkeypatch.setenv("SLURM_STEP_NODELIST", "nid[000001-000002]")
    connect()
    connect(Coordination("there:99", 4, 3))
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    connect()
    how = [(args, options.get("cluster_detection_method")) for args, options in initialized]
    assert how == [((), "slurm"), (("there:99", 4, 3), None), ((), "ompi")]


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
