"""Every axis of the mesh, and products of them, against one device; and what the compiled programs send."""

import dataclasses
import math
import re

import jax
import numpy as np
import optax
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import Attention, Gated, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.param import flatten, init
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.step import build_program

UNTIED = TransformerConfig(
    vocab_size=80,  # sizes that no two axes share, so that each shape in a program tells whose it is
    width=24,
    depth=3,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp=Gated(56),
    pattern=(Attention(window=9),),
    max_positions=64,
    compute="float32",
    remat="none",
)
TIED = dataclasses.replace(UNTIED, tied=True, logit_cap=10.0)
B, T = 8, 16
ONE = MeshConfig()
AXES = [  # each on its own
    MeshConfig(replica=2, data=1),
    MeshConfig(data=2),
    MeshConfig(data=1, fsdp=2),
    MeshConfig(data=1, expert=2),
    MeshConfig(data=1, context=2),
    MeshConfig(data=1, tensor=2),
]
PRODUCTS = [
    MeshConfig(data=1, fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    MeshConfig(replica=2, data=1, expert=2, context=2),
]


def devices(mesh):
    return math.prod(dataclasses.astuple(mesh)) if mesh != ONE else 1


def name(mesh):
    return "-".join(f"{axis}{size}" for axis, size in dataclasses.asdict(mesh).items() if size > 1)


def batch():
    """Rows of up to four documents, the last of which is padding."""
    dice = np.random.default_rng(0)
    tokens = dice.integers(0, UNTIED.vocab_size, (B, T)).astype(np.int32)
    segments = np.sort(dice.integers(0, 4, (B, T)).astype(np.int32))[:, ::-1].copy()
    starts = np.array([[np.flatnonzero(row == s)[0] for s in row] for row in segments])
    positions = (np.arange(T) - starts).astype(np.int32)
    return Batch(tokens, np.roll(tokens, -1, 1), segments, positions, segments > 0, np.arange(B, dtype=np.int32) % 2)


def loss_and_gradients(config, mesh):
    layout = Layout(mesh.build(jax.devices()[: devices(mesh)]))
    at = layout.parameters(specs(config))
    function = jax.jit(
        jax.value_and_grad(lambda params, batch: batch_loss(params, batch, config, layout, 1e-2)[0]),
        out_shardings=(layout.replicated, at),
    )
    params = jax.device_put(init(specs(config), jax.random.key(0)), at)
    return jax.device_get(function(params, layout.place_rows(batch())))


def one_step(config, mesh):
    layout = Layout(mesh.build(jax.devices()[: devices(mesh)]))
    program = build_program(
        config,
        layout,
        AdamW(eps=1e-2).build(optax.constant_schedule(1e-2), specs(config)),
        batch_sizes=(B,),
        token_bytes=np.arange(config.vocab_size, dtype=np.int32),
        sources=2,
        z_loss=1e-2,
    )
    return jax.device_get(program.train(program.init(jax.random.key(0)), layout.place_rows(batch())))


@pytest.fixture(scope="module")
def alone():
    return {config.tied: loss_and_gradients(config, ONE) for config in (UNTIED, TIED)}


@pytest.mark.parametrize("mesh", [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in AXES), *PRODUCTS], ids=name)
def test_loss_and_gradients_are_those_of_one_device(mesh, alone):
    config = TIED if mesh.tensor == 2 and mesh.fsdp != 2 else UNTIED
    (loss, gradients), (expected, slopes) = loss_and_gradients(config, mesh), alone[config.tied]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, slope in flatten(slopes).items():
        np.testing.assert_allclose(
            flatten(gradients)[path], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max(), err_msg=path
        )


@pytest.fixture(scope="module")
def stepped_alone():
    return one_step(UNTIED, ONE)


@pytest.mark.parametrize("mesh", [*PRODUCTS[1:3], pytest.param(PRODUCTS[3], marks=pytest.mark.slow)], ids=name)
def test_an_optimizer_step_is_that_of_one_device(mesh, stepped_alone):
    state, metrics = one_step(UNTIED, mesh)
    expected, told = stepped_alone
    np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, told.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(metrics.sources.nats, told.sources.nats, rtol=1e-5)
    np.testing.assert_array_equal(metrics.sources.bytes, told.sources.bytes)
    for path, value in flatten(expected.params).items():
        np.testing.assert_allclose(flatten(state.params)[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


def sent(config, mesh):
    """(operation, sizes of what it returns) for each collective of the compiled loss and gradient, and its text."""
    layout = Layout(mesh.build())
    at = layout.parameters(specs(config))
    params = jax.tree.map(lambda p, at: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=at), specs(config), at)
    function = jax.jit(
        jax.value_and_grad(lambda params, batch: batch_loss(params, batch, config, layout)[0]),
        out_shardings=(layout.replicated, at),
    )
    text = function.lower(params, layout.place_rows(batch())).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes]
    return found, text


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=4, tensor=2)], ids=name
)
def test_what_is_sent_is_a_layer_at_a_time_and_never_the_vocabulary(mesh):
    collectives, text = sent(UNTIED, mesh)
    own_vocab, own_mlp = 80 // mesh.tensor, 56 // mesh.tensor
    gathered = {shape for operation, shape in collectives if operation == "all-gather"}
    if mesh.fsdp > 1:
        assert {(24, own_mlp), (24, own_vocab)} <= gathered | {shape[::-1] for shape in gathered}
        assert ("reduce-scatter", (24 // mesh.fsdp, own_vocab)) in collectives  # the head's gradient
        assert any(operation == "all-to-all" for operation, _ in collectives)  # what was looked up
    else:
        assert ("all-reduce", (24, own_vocab)) in collectives
    for operation, shape in collectives:
        whole = math.prod(shape)
        assert 3 not in shape[:1] or len(shape) < 3, f"{operation} {shape} of all layers"
        if mesh.tensor > 1:
            assert 80 not in shape, f"{operation} {shape} of the whole vocabulary"
            assert whole < 24 * 56 or 56 not in shape, f"{operation} {shape} of the whole hidden axis"
        assert not (operation == "all-gather" and {80 // mesh.tensor, 24} <= set(shape) and shape[0] == own_vocab), (
            f"{operation} {shape} of the embedding"
        )
    tokens = B * T // (mesh.data * mesh.fsdp)
    if mesh.tensor > 1:
        assert not re.search(rf"\[(?:{tokens}|{B // (mesh.data * mesh.fsdp)},{T}),80\]", text), "logits of all tokens"


def test_the_residual_stream_is_kept_in_parts_of_the_sequence():
    """Each device keeps a layer's input at its own positions for the backward pass, not at all of them."""
    for mesh, length in ((MeshConfig(data=4, tensor=2), T // 2), (MeshConfig(data=2, context=2, tensor=2), T // 4)):
        _, text = sent(dataclasses.replace(UNTIED, remat="full"), mesh)
        assert f"f32[3,{B // mesh.data},{length},24]" in text
        assert f"f32[3,{B // mesh.data},{T},24]" not in text
