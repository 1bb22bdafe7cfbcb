"""The train step is the same function on every mesh, and its update is AdamW's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.model.param import flatten, unflatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.step import build_program

MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, fsdp=4, tensor=2),
    MeshConfig(data=4, fsdp=1, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


def program(config, layout, tokenizer, data, batch_size=8):
    optimizer = AdamW().build(optax.constant_schedule(1e-2), specs(config))
    return build_program(
        config,
        layout,
        optimizer,
        batch_size=batch_size,
        token_bytes=tokenizer.piece_bytes,
        sources=len(data.source_names),
        z_loss=1e-3,
    )


def three_steps(config, layout, tokenizer, data):
    compiled = program(config, layout, tokenizer, data)
    state, seen = compiled.init(jax.random.key(0)), []
    for _, batch in data.loader(0, 8, stop_row=24):
        state, metrics = compiled.train(state, layout.place_rows(batch))
        seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


@pytest.fixture(scope="module")
def data(store):
    return open_data(DataConfig(str(store.path), Mixture.proportional(), 32), 1000)


@pytest.fixture(scope="module")
def alone(tiny, tokenizer, data):
    return three_steps(tiny, Layout(MeshConfig().build(jax.devices()[:1])), tokenizer, data)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"data{m.data}-fsdp{m.fsdp}-tensor{m.tensor}")
def test_eight_devices_train_as_one(mesh, tiny, tokenizer, data, alone):
    state, metrics = three_steps(tiny, Layout(mesh.build()), tokenizer, data)
    for ours, theirs in zip(metrics, alone[1], strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-5)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=2e-4)
        np.testing.assert_allclose(ours.sources.nats, theirs.sources.nats, rtol=2e-5)
        np.testing.assert_array_equal(ours.sources.tokens, theirs.sources.tokens)
        np.testing.assert_array_equal(ours.sources.bytes, theirs.sources.bytes)
    for path, value in flatten(state.params).items():
        np.testing.assert_allclose(value, flatten(alone[0].params)[path], atol=2e-4, err_msg=path)


def test_state_lives_where_the_mesh_says(tiny, tokenizer, data):
    compiled = program(tiny, Layout(MeshConfig(data=2, fsdp=2, tensor=2).build()), tokenizer, data)
    state = compiled.init(jax.random.key(0))
    gate = state.params["layers"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 8, 16)}  # [layers, embed/2, mlp/2]
    for moment in jax.tree.leaves(state.optimizer):
        if moment.shape == gate.shape:
            assert moment.sharding.is_equivalent_to(gate.sharding, 3)


def test_loss_is_the_mean_of_the_nats_and_sources_add_up(alone, data):
    for metrics in alone[1]:
        sums = metrics.sources
        np.testing.assert_allclose(metrics.loss, sums.nats.sum() / sums.tokens.sum(), rtol=1e-5)


def test_bf16_computes_and_fp32_is_kept(tiny, tokenizer, data, alone):
    config = dataclasses.replace(tiny, compute="bfloat16")
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    state, metrics = three_steps(config, layout, tokenizer, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert metrics[-1].loss != alone[1][-1].loss
    np.testing.assert_allclose(metrics[-1].loss, alone[1][-1].loss, rtol=2e-2)


def test_a_batch_that_cannot_be_dealt_out_is_refused(tiny, tokenizer, data):
    with pytest.raises(UserError, match="12 rows does not divide over 8 devices"):
        program(tiny, Layout(MeshConfig().build()), tokenizer, data, batch_size=12)


def test_adamw_decays_matrices_only_and_clips(tiny):
    """One step by hand: bias-corrected first moments make the first update lr * g / (|g| + eps)."""
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=spec.shape) for path, spec in flatten(specs(tiny)).items()}
    gradients = {path: rng.normal(size=value.shape) for path, value in params.items()}
    optimizer = AdamW(weight_decay=0.5, clip_norm=1.0).build(optax.constant_schedule(0.1), specs(tiny))
    now, slope = (jax.tree.map(np.float32, unflatten(tree)) for tree in (params, gradients))
    updates, _ = optimizer.update(slope, optimizer.init(now), now)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    for path, update in flatten(updates).items():
        clipped = gradients[path] / norm
        decay = 0.0 if "norm" in path else 0.5 * params[path]
        np.testing.assert_allclose(update, -0.1 * (clipped / (np.abs(clipped) + 1e-8) + decay), rtol=2e-3, atol=1e-5)
