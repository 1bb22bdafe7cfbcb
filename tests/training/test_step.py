"""The train step is the same function on every mesh, and its update is AdamW's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import Attention, BalanceBias, BalanceLoss, Gated, MoE, Norm, TransformerConfig
from eurollm_jax.model.param import flatten, init, unflatten
from eurollm_jax.model.transformer import embed, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW, Muon
from eurollm_jax.training.step import build_program

MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    pytest.param(MeshConfig(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=4, fsdp=1, tensor=2), marks=pytest.mark.slow),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


def program(config, layout, tokenizer, data, batch_size=8, optimizer=AdamW(), ema=None):
    optimizer = optimizer.build(optax.constant_schedule(1e-2), specs(config))
    return build_program(
        config,
        layout,
        optimizer,
        batch_sizes=(8, batch_size),
        token_bytes=tokenizer.piece_bytes,
        sources=len(data.source_names),
        z_loss=1e-3,
        ema=ema,
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


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["AdamW", "Muon"])
def test_state_lives_where_the_mesh_says(optimizer, tiny, tokenizer, data):
    compiled = program(tiny, Layout(MeshConfig(data=2, fsdp=2, tensor=2).build()), tokenizer, data, optimizer=optimizer)
    state = compiled.init(jax.random.key(0))
    gate = state.params["layers"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 8, 16)}  # [layers, embed/2, mlp/2]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == gate.shape]
    up_too = 2 if isinstance(optimizer, AdamW) else 1  # moments kept; gate and up have one shape
    assert len(moments) == 2 * up_too
    for moment in moments:
        assert moment.sharding.is_equivalent_to(gate.sharding, 3)


def test_loss_is_the_mean_of_the_nats_and_sources_add_up(alone, data):
    for metrics in alone[1]:
        sums = metrics.sources
        np.testing.assert_allclose(metrics.loss, sums.nats.sum() / sums.tokens.sum(), rtol=1e-5)


def test_the_average_of_the_parameters_is_its_closed_form(tiny, tokenizer, data):
    """decay^n of the start, (1 - decay) decay^(n - i) of the parameters after step i; training goes on unchanged."""
    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build())
    averaged, plain = (program(tiny, layout, tokenizer, data, ema=ema) for ema in (0.75, None))
    state, without = (one.init(jax.random.key(0)) for one in (averaged, plain))
    assert without.ema is None
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(without)) + len(jax.tree.leaves(without.params))
    expected = jax.device_get(state.params)
    for _, batch in data.loader(0, 8, stop_row=32):
        state, _ = averaged.train(state, layout.place_rows(batch))
        without, _ = plain.train(without, layout.place_rows(batch))
        expected = jax.tree.map(
            lambda average, now: 0.75 * average + 0.25 * now, expected, jax.device_get(state.params)
        )
    for path, value in flatten(expected).items():
        np.testing.assert_allclose(flatten(state.ema)[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(flatten(state.params)[path], flatten(without.params)[path], rtol=1e-6, err_msg=path)
        assert flatten(state.ema)[path].sharding == flatten(state.params)[path].sharding


@pytest.fixture(scope="module")
def mixture(tiny):
    return dataclasses.replace(tiny, mlp=MoE(experts=4, top_k=2, hidden=16))


def test_routers_losses_enter_the_gradient_and_not_the_reported_loss(mixture, tokenizer, data):
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    helped = dataclasses.replace(mixture.mlp, balance=BalanceLoss(0.5), z_loss=0.1)
    (plain, seen), (balanced, told) = (
        three_steps(dataclasses.replace(mixture, mlp=mlp), layout, tokenizer, data) for mlp in (mixture.mlp, helped)
    )
    assert told[0].loss == pytest.approx(float(seen[0].loss), rel=1e-6)  # of the same weights
    assert told[0].grad_norm != pytest.approx(float(seen[0].grad_norm), rel=1e-3)
    assert told[-1].loss != pytest.approx(float(seen[-1].loss), rel=1e-6)
    np.testing.assert_allclose(told[-1].loss, told[-1].sources.nats.sum() / told[-1].sources.tokens.sum(), rtol=1e-5)
    routers = [flatten(state.params)["layers/router"] for state in (plain, balanced)]
    assert np.abs(routers[0] - routers[1]).max() > 1e-3


def test_routing_is_reported_for_each_layer(mixture, tokenizer, data):
    _, seen = three_steps(mixture, Layout(MeshConfig().build(jax.devices()[:1])), tokenizer, data)
    for metrics in seen:
        assert metrics.routing.load.shape == (2, 4)
        np.testing.assert_allclose(metrics.routing.load.sum(-1), 1, rtol=1e-5)
        assert np.all(metrics.routing.balance > 1)
        assert metrics.routing.z.shape == (2,)


def test_a_dense_model_reports_no_routing(alone):
    assert all(metrics.routing is None for metrics in alone[1])


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("kind", ["gemma", "mixture"])
def test_a_step_lowers_for_accelerators_that_are_not_here(kind, platform, tiny, tokenizer, data):
    options = dict(
        gemma=dict(
            depth=3,
            mlp=Gated(32, "gelu_tanh"),
            pattern=(Attention(window=8), Attention()),
            norm=Norm("both", 1e-6, "one_plus_weight"),
            qk_norm="head",
            attention_cap=50.0,
            logit_cap=30.0,
        ),
        mixture=dict(mlp=MoE(8, 2, 32, score="sigmoid", shared=32, balance=BalanceBias())),
    )
    config = dataclasses.replace(tiny, compute="bfloat16", remat="full", **options[kind])
    compiled = program(config, Layout(MeshConfig(data=2, fsdp=2, tensor=2).build()), tokenizer, data, ema=0.9)

    def abstract(shape, dtype=np.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=compiled.rows)

    batch = Batch(*(abstract((8, 32)) for _ in range(4)), abstract((8, 32), np.bool_), abstract((8,)))
    lowered = compiled.train.trace(compiled.state, batch).lower(lowering_platforms=(platform,))
    assert "stablehlo.dot_general" in lowered.as_text()


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
        decay = 0.0 if "norm" in path or path == "embedding" else 0.5 * params[path]
        np.testing.assert_allclose(update, -0.1 * (clipped / (np.abs(clipped) + 1e-8) + decay), rtol=2e-3, atol=1e-5)


def test_a_frequent_token_learns_in_bf16_as_in_float32():
    """Its gradient is a sum over all its places, which bfloat16 could not add up."""
    config = TransformerConfig(
        vocab_size=4,
        width=8,
        depth=1,
        heads=2,
        kv_heads=1,
        head_dim=4,
        mlp=Gated(8),
        max_positions=4096,
        compute="bfloat16",
    )
    params = init(specs(config), jax.random.key(0))
    tokens = np.ones((2, 4096), np.int32)

    def total(params):
        return embed(params, tokens, config, Layout(MeshConfig().build(jax.devices()[:1]))).astype(np.float32).sum()

    np.testing.assert_allclose(jax.grad(total)(params)["embedding"][1], 8192)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam(tiny):
    """The first update of a matrix has the gradient's singular vectors and nearly equal singular values."""
    rng = np.random.default_rng(0)
    declared = flatten(specs(tiny))
    params = {path: np.zeros(spec.shape, np.float32) for path, spec in declared.items()}
    gradients = {path: rng.normal(size=spec.shape).astype(np.float32) for path, spec in declared.items()}
    optimizer = Muon(clip_norm=1e9).build(optax.constant_schedule(0.1), specs(tiny))
    updates, _ = optimizer.update(unflatten(gradients), optimizer.init(unflatten(params)), unflatten(params))
    for path, update in flatten(updates).items():
        spec = declared[path]
        if not path.startswith("layers/") or "norm" in path:
            nesterov = 0.9 * 0.1 / (1 - 0.9**2) + 1  # of the momentum, bias-corrected
            np.testing.assert_allclose(update, -0.1 * nesterov * np.sign(gradients[path]), rtol=1e-3)
            continue
        inner = int(np.prod([spec.sizes[axis] for axis in spec.fan_in]))
        for ours, gradient in zip(np.asarray(update), gradients[path], strict=True):
            ours, gradient = (x.reshape(inner, -1) for x in (ours, gradient))
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            turned = left.T @ ours @ right.T / (-0.1 * 0.2 * np.sqrt(max(ours.shape)))
            assert np.all((np.diag(turned) > 0.5) & (np.diag(turned) < 1.3)), path
            np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=0.02, err_msg=path)
