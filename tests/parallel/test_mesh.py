import jax
import pytest
from jax.sharding import PartitionSpec as P

from eurollm_jax.errors import UserError
from eurollm_jax.model.param import Param
from eurollm_jax.parallel.mesh import Layout, MeshConfig


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (1, 2, 2, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=4, tensor=2), (1, 1, 4, 1, 1, 2)),
    ],
)
def test_the_axis_that_is_left_open_takes_what_is_left(config, shape):
    assert config.build().devices.shape == shape


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (MeshConfig(data=3), "3 devices, and there are 8"),
        (MeshConfig(tensor=3), "multiple of 3 devices, and there are 8"),
        (MeshConfig(data=4, fsdp=4), "16 devices, and there are 8"),
        (MeshConfig(data=-1, fsdp=-1), "at most one axis"),
        (MeshConfig(data=0), "one device or more"),
    ],
)
def test_impossible_meshes_are_refused_with_the_numbers(config, numbers):
    with pytest.raises(UserError, match=numbers):
        config.build()


def test_a_weight_that_does_not_divide_is_refused_before_anything_compiles():
    layout = Layout(MeshConfig(tensor=8).build())
    with pytest.raises(UserError, match="heads=6 does not divide"):
        layout.parameters(dict(query=Param(embed=16, heads=6, head_dim=4, fan_in="embed")))


def test_logical_axes_land_where_the_tables_say():
    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build())
    sharding = layout.parameters(dict(q=Param(layers=3, embed=16, heads=4, head_dim=4, fan_in="embed")))["q"]
    assert sharding.spec == P(None, "fsdp", "tensor", None)
    placed = layout.place_rows(jax.numpy.zeros((8, 3)))
    assert placed.sharding.spec == P(("replica", "data", "fsdp", "expert"))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
