import re

import jax
import numpy as np
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
        (MeshConfig(replica=2, expert=2, context=2), (2, 1, 1, 2, 2, 1)),
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


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        (MeshConfig(data=1, fsdp=6), {"data": 1, "fsdp": 8}),
        (MeshConfig(tensor=3), {"data": 2, "tensor": 4}),
        (MeshConfig(data=2, fsdp=3, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_the_mesh_that_is_proposed_is_the_nearest_that_can_be_built(config, nearest):
    with pytest.raises(UserError) as refused:
        config.build()
    for proposed in re.search(r"take (.*)\.$", str(refused.value))[1].split(" or "):
        sizes = {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", proposed)}
        assert MeshConfig(**sizes).build().devices.size == 8
        if sizes == {axis: nearest.get(axis, 1) for axis in sizes}:
            break
    else:
        pytest.fail(f"{nearest} is not among the proposals: {refused.value}")


@pytest.mark.parametrize(
    ("mesh", "weight", "told"),
    [
        (MeshConfig(tensor=8), dict(embed=16, heads=6, head_dim=4), "heads=6 .* tensor=2 or tensor=3 or tensor=6.*=8"),
        (MeshConfig(tensor=4), dict(embed=16, kv_heads=2, head_dim=4), "kv_heads=2 .* tensor=2, or .* kv_heads=4"),
        (MeshConfig(tensor=4), dict(embed=16, mlp=30), "mlp=30 .* tensor=6, or a model with mlp=32"),
        (MeshConfig(tensor=8), dict(vocab=50_257, embed=16), "vocab=50257 .* tensor=1, or a model with vocab=50264"),
        (MeshConfig(data=1, fsdp=8), dict(embed=12, mlp=32), "embed=12 .* fsdp=6 or fsdp=12, or .* embed=16"),
        (MeshConfig(expert=4), dict(experts=6, embed=16), "experts=6 .* expert=6, or a model with experts=8"),
    ],
)
def test_a_weight_that_does_not_divide_is_refused_before_anything_compiles(mesh, weight, told):
    with pytest.raises(UserError, match=told):
        Layout(mesh.build()).parameters(dict(some=Param(**weight, fan_in="embed")))


def test_batches_that_cannot_be_dealt_out_are_refused_with_the_nearest_that_can():
    layout = Layout(MeshConfig(data=2, fsdp=2, context=2).build())
    layout.require_batches([4, 8], length=6)
    with pytest.raises(UserError, match=r"10 rows .* 4 devices \(.*data=2 x fsdp=2 x expert=1\): use 8 or 12"):
        layout.require_batches([4, 10])
    with pytest.raises(UserError, match=r"batch of 3 rows .* use 4 rows"):
        layout.require_batches([3])
    with pytest.raises(UserError, match=r"rows of 7 tokens .* 2 devices \(context=2 x tensor=1\): use 6 or 8 tokens"):
        layout.require_batches([4], length=7)


def test_logical_axes_land_where_the_tables_say():
    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build())
    sharding = layout.parameters(dict(q=Param(layers=3, embed=16, heads=4, head_dim=4, fan_in="embed")))["q"]
    assert sharding.spec == P(None, "fsdp", "tensor", None)
    placed = layout.place_rows(jax.numpy.zeros((8, 3)))
    assert placed.sharding.spec == P(("replica", "data", "fsdp", "expert"))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(("length", "own"), [(8, 2), (6, 3), (1, 1)])  # of four, two and no parts
def test_a_sequence_is_split_over_as_many_axes_as_divide_it(length, own):
    layout = Layout(MeshConfig(data=2, context=2, tensor=2).build())
    x = np.arange(2.0 * length * 3).reshape(2, length, 3)
    placed = jax.jit(lambda x: layout.constrain(x, "batch", "residual_sequence", "embed"))(x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, own, 3)}
    np.testing.assert_array_equal(placed, x)
