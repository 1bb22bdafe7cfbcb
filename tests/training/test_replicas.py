"""Copies of a state on several devices are compared bit by bit, and who is wrong is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.errors import LostError
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.replicas import ReplicaCheck, checksum
from eurollm_jax.training.schedule import Constant
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.step import build_program

from .test_accumulation import batch_for

CONFIG = TransformerConfig(
    vocab_size=64,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=Gated(32),
    max_positions=16,
    compute="float32",
    remat="none",
)


def trained(mesh, steps=2):
    """A layout, its program, and a state after some steps."""
    layout = Layout(mesh.build())
    program = build_program(
        CONFIG,
        layout,
        AdamW(state_dtype="bfloat16").build(Constant(1e-2, 1).build(10), specs(CONFIG)),
        batch_sizes=(16,),
        token_bytes=np.ones(64, np.int32),
        sources=2,
        z_loss=1e-4,
        ema=0.9,
        skip=SkipStep(),
    )
    state = program.init(jax.random.key(0))
    for step in range(steps):
        state, _ = program.train(state, layout.place_rows(batch_for(step)))
    return program, state


def with_flipped_bit(array, device, byte=0, bit=0):
    """The same array, but for one bit of what one device holds."""
    buffers = []
    for shard in array.addressable_shards:
        held = np.array(shard.data)
        if shard.device == device:
            held.reshape(-1).view(np.uint8)[byte] ^= np.uint8(1 << bit)
        buffers.append(jax.device_put(held, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)


def flipped(state, path, device, **where):
    """The state with one bit of one leaf flipped on one device."""

    def one(of_leaf, leaf):
        same = jax.tree_util.keystr(of_leaf, simple=True, separator="/") == path
        return with_flipped_bit(leaf, device, **where) if same else leaf

    return jax.tree_util.tree_map_with_path(one, state)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=2, tensor=2), pytest.param(MeshConfig(replica=2, context=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_copies_stay_the_same_through_training_and_any_flipped_bit_is_found(mesh):
    program, state = trained(mesh)
    check = ReplicaCheck(program.state)
    check.check(state)
    paths = list(check.copies)
    assert check.checked == len(paths) == len(jax.tree.leaves(state))  # "data" has two devices or more in each
    devices = program.rows.mesh.devices.flat
    for number, path in enumerate(paths[::4]):
        device = devices[number % 8]
        with pytest.raises(LostError, match=rf"device {device.id} of process 0 .* in 1 of \d+ leaves \({path}\)"):
            check.check(flipped(state, path, device, bit=number % 8))


def test_where_there_are_more_than_two_copies_the_odd_one_out_is_named_alone():
    program, state = trained(MeshConfig(), steps=0)
    check = ReplicaCheck(program.state)
    device = program.rows.mesh.devices.flat[5]
    bad = flipped(flipped(state, "params/embedding", device, byte=6), "skips/mean_norm", device)
    with pytest.raises(LostError) as caught:
        check.check(bad)
    message = str(caught.value)
    assert f"device {device.id} of process 0" in message
    assert message.count("of process") == 1
    assert "in 2 of" in message
    assert "params/embedding, skips/mean_norm" in message


def test_a_device_that_is_known_to_be_wrong_explains_where_only_two_differ():
    program, state = trained(MeshConfig(data=2, fsdp=4), steps=0)
    check = ReplicaCheck(program.state)
    device, other = program.rows.mesh.devices.flat[6], program.rows.mesh.devices.flat[2]
    bad = flipped(state, "params/embedding", device)
    with pytest.raises(LostError, match=rf"device {other.id} of process 0 .*device {device.id} of process 0"):
        check.check(bad)
    with pytest.raises(LostError) as caught:
        check.check(flipped(bad, "step", device))
    assert str(caught.value).count("of process") == 1
    assert f"device {device.id} of process 0" in str(caught.value)


def test_what_only_fsdp_splits_has_no_copies_and_the_rest_is_checked():
    program, state = trained(MeshConfig(data=1, fsdp=8), steps=0)
    check = ReplicaCheck(program.state)
    assert {path for path, copies in check.copies.items() if copies == 1} >= {"params/embedding", "ema/embedding"}
    assert check.copies["step"] == 8
    assert check.checked < len(check.copies)
    check.check(flipped(state, "params/embedding", program.rows.mesh.devices.flat[3]))  # nothing to compare it with
    with pytest.raises(LostError, match=r"\(step\)"):
        check.check(flipped(state, "step", program.rows.mesh.devices.flat[3]))


def test_one_device_has_nothing_to_compare():
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=layout.replicated)
    check = ReplicaCheck({"a": leaf})
    assert (check.checked, check.copies) == (0, {"a": 1})
    check.check({"a": jnp.zeros(4)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool", "float8_e4m3fn"])
def test_a_checksum_changes_with_any_single_bit_and_with_any_exchange(dtype):
    values = np.arange(12).astype(jnp.dtype(dtype)).reshape(3, 4)
    raw, variants = values.reshape(-1).view(np.uint8), [values.copy()]
    for byte in range(raw.size):
        for bit in range(1 if dtype == "bool" else 8):
            raw[byte] ^= np.uint8(1 << bit)
            variants.append(values.copy())
            raw[byte] ^= np.uint8(1 << bit)
    values[0, 0], values[2, 3] = values[2, 3], values[0, 0]
    variants.append(values)
    first, *others = np.asarray(jax.vmap(checksum)(jnp.asarray(np.stack(variants)))).tolist()
    assert len(others) == raw.size * (1 if dtype == "bool" else 8) + 1
    assert first not in others
