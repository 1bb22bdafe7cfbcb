"""The mixture of experts against a loop over tokens and experts, and what its router is told about balance."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eurollm_jax.cluster.plan.collectives import Machine, collectives
from eurollm_jax.cluster.plan.hlo import parse
from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import BalanceBias, BalanceLoss, MoE, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.moe import Routing, _blocks, auxiliary_loss, mixture_of_experts, moe_specs, rebalanced, route
from eurollm_jax.model.param import flatten, init, stack
from eurollm_jax.model.transformer import empty_cache, extend, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW, Muon
from eurollm_jax.training.step import build_program

WIDTH = 12
SOFTMAX = MoE(experts=5, top_k=2, hidden=8)
SIGMOID = MoE(
    experts=6, top_k=3, hidden=8, score="sigmoid", activation="gelu", scale=2.5, shared=16, balance=BalanceBias()
)
ROUTERS = {
    "softmax": SOFTMAX,
    "softmax-as-it-is": replace(SOFTMAX, normalised=False),
    "sigmoid-shared-biased": SIGMOID,
    "sigmoid-as-it-is": replace(SIGMOID, normalised=False, top_k=1),
    "all-of-them": replace(SOFTMAX, top_k=5),
    "one-expert": MoE(experts=1, top_k=1, hidden=8, normalised=False),
}


def weights_for(moe, seed=0, router_std=1.0):
    """Of one layer; the router tells tokens apart."""
    rng = np.random.default_rng(seed)
    flat = {path: rng.normal(size=spec.shape) for path, spec in flatten(moe_specs(WIDTH, moe, 1.0)).items()}
    flat["router"] *= router_std
    tree = {path: value for path, value in flat.items() if "/" not in path}
    for group in {path.split("/")[0] for path in flat if "/" in path}:
        tree[group] = {path.split("/")[1]: value for path, value in flat.items() if path.startswith(f"{group}/")}
    return tree


def single(tree):
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tree)


def by_loops(x, w, moe):
    """Token by token and expert by expert, in float64."""
    erf = np.vectorize(math.erf)

    def act(v):
        return v / (1 + np.exp(-v)) if moe.activation == "silu" else v * (1 + erf(v / np.sqrt(2))) / 2

    def mlp(v, e):
        return (act(v @ e["gate"]) * (v @ e["up"])) @ e["down"]

    out = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        z = x[b, t] @ w["router"]
        scores = np.exp(z) / np.exp(z).sum() if moe.score == "softmax" else 1 / (1 + np.exp(-z))
        chosen = np.argsort(-(scores + w.get("router_bias", 0)), kind="stable")[: moe.top_k]
        total = scores[chosen].sum() if moe.normalised else 1.0
        for e in chosen:
            out[b, t] += moe.scale * scores[e] / total * mlp(x[b, t], {n: v[e] for n, v in w["experts"].items()})
        if moe.shared:
            out[b, t] += mlp(x[b, t], w["shared"])
    return out


def dense(x, w, real, moe, layout):
    """Every expert on every token, in plain JAX; those that were not chosen weigh nothing."""
    _, chosen, weights = route(x @ w["router"], w.get("router_bias"), moe, layout)
    of_expert = jnp.sum(jax.nn.one_hot(chosen, moe.experts) * weights[..., None], axis=-2)
    act = jax.nn.silu if moe.activation == "silu" else partial(jax.nn.gelu, approximate=False)
    e = w["experts"]
    hidden = act(jnp.einsum("btd,edf->btef", x, e["gate"])) * jnp.einsum("btd,edf->btef", x, e["up"])
    out = jnp.einsum("btef,efd,bte->btd", hidden, e["down"], of_expert)
    if moe.shared:
        out += (act(x @ w["shared"]["gate"]) * (x @ w["shared"]["up"])) @ w["shared"]["down"]
    return out


def summed(function, moe, layout, x, w):
    """A number that depends on every output differently."""
    out = function(x, w, jnp.ones(x.shape[:2], bool), moe, layout)
    out = out[0] if isinstance(out, tuple) else out
    return jnp.sum(jnp.sin(out) * jnp.arange(1, WIDTH + 1))


def value_and_gradients(function, moe, layout, x, w):
    return jax.jit(jax.value_and_grad(partial(summed, function, moe, layout), argnums=(0, 1)))(x, w)


def assert_equal_trees(ours, theirs):
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        tolerance = 6e-5 * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=0, err_msg=jax.tree_util.keystr(path))


def tokens(rows, length, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, length, WIDTH))


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_a_loop_over_tokens_and_experts(name, one_device):
    moe, x = ROUTERS[name], tokens(2, 37)
    w = weights_for(moe)
    out, _ = jax.jit(partial(mixture_of_experts, moe=moe, layout=one_device))(
        jnp.float32(x), single(w), jnp.ones((2, 37), bool)
    )
    expected = by_loops(x, w, moe)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_equal_those_of_a_dense_formulation(name, one_device):
    moe, x, w = ROUTERS[name], jnp.float32(tokens(2, 19)), single(weights_for(ROUTERS[name]))
    ours, theirs = (value_and_gradients(way, moe, one_device, x, w) for way in (mixture_of_experts, dense))
    assert_equal_trees(ours, theirs)


def test_gradients_equal_finite_differences(one_device):
    """Of the loop in float64, along random directions in which no token changes its experts."""
    moe, x = SIGMOID, tokens(1, 7)
    w, way = weights_for(moe, seed=2), weights_for(moe, seed=3)
    way["router_bias"] *= 0  # the choice alone, and no gradient
    _, (_, gradient) = value_and_gradients(mixture_of_experts, moe, one_device, jnp.float32(x), single(w))

    def value(step):
        moved = jax.tree.map(lambda a, b: a + step * b, w, way)
        return np.sum(np.sin(by_loops(x, moved, moe)) * np.arange(1, WIDTH + 1))

    slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    assert slope == pytest.approx((value(1e-7) - value(-1e-7)) / 2e-7, rel=1e-3)
    assert not np.any(gradient["router_bias"])


@pytest.mark.parametrize("length", [1, 2, 3, 9, 64, 333])
def test_any_number_of_tokens(length, one_device):
    moe = MoE(experts=16, top_k=3, hidden=8)
    x, w = jnp.float32(tokens(1, length)), single(weights_for(moe))
    ours, theirs = (value_and_gradients(way, moe, one_device, x, w) for way in (mixture_of_experts, dense))
    assert_equal_trees(ours, theirs)


@pytest.mark.parametrize("favourites", [(0, 1), (4, 2)])
def test_all_tokens_to_the_same_experts(favourites, one_device):
    moe, x = SOFTMAX, np.abs(tokens(2, 50))
    w = weights_for(moe, router_std=0.0)
    w["router"][:, list(favourites)] = 1.0
    run = jax.jit(partial(mixture_of_experts, moe=moe, layout=one_device))
    out, routing = run(jnp.float32(x), single(w), jnp.ones((2, 50), bool))
    expected = by_loops(x, w, moe)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(routing.load, [0.5 if e in favourites else 0.0 for e in range(5)])
    _, (_, gradient) = value_and_gradients(mixture_of_experts, moe, one_device, jnp.float32(x), single(w))
    for value in gradient["experts"].values():
        assert set(np.flatnonzero(np.any(value, axis=(1, 2)))) == set(favourites)


@pytest.mark.parametrize("moe", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_bfloat16_stays_near_float32_and_adds_gradients_up(moe, one_device):
    """Rounding to 8 bits is an error of a few in a thousand, however many tokens add to a gradient."""
    low = weights_for(moe)
    low = single(low) | {name: jax.tree.map(jnp.bfloat16, low[name]) for name in ("experts", "shared") if name in low}
    x, direction = (jnp.bfloat16(tokens(4, 512, seed)) for seed in (1, 2))
    whole = jax.tree.map(jnp.float32, (x, low))

    @jax.jit
    @partial(jax.grad, argnums=1)
    def gradient(x, w):
        out, _ = mixture_of_experts(x, w, jnp.ones((4, 512), bool), moe, one_device)
        return jnp.sum(out.astype(jnp.float32) * direction)

    ours, exact = gradient(x, low), gradient(*whole)
    assert ours["experts"]["up"].dtype == jnp.bfloat16
    assert ours["router"].dtype == jnp.float32
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(np.float32(one) - other) <= 1e-2 * np.linalg.norm(other)


def test_scores_that_vanish_are_no_division_by_zero(one_device):
    moe = replace(SIGMOID, shared=0)
    w = single(weights_for(moe))
    w["router"] = jnp.full_like(w["router"], -100.0)
    found = value_and_gradients(mixture_of_experts, moe, one_device, jnp.ones((1, 4, WIDTH)), w)
    for value in jax.tree.leaves(found):
        assert np.all(np.isfinite(value))


# ------------------------------------------------------------------------------------------------ many devices

MODEL = TransformerConfig(
    vocab_size=48,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    max_positions=32,
    mlp=replace(SIGMOID, balance=BalanceLoss(0.1), z_loss=0.01),
    compute="float32",
    remat="full",
)


def batch_for(rows=8, length=12, seed=0, vocab=48):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[1, 7:] = 0
    at = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    return Batch(ids[:, :-1], ids[:, 1:], segments, at, segments > 0, np.zeros(rows, np.int32))


def loss_and_gradients(config, layout, params, batch):
    def total(params, batch):
        value, _, routing = batch_loss(params, batch, config, layout)
        return value / batch.mask.sum() + auxiliary_loss(routing, config.mlp), routing

    shardings = layout.parameters(specs(config))
    compiled = jax.jit(jax.value_and_grad(total, has_aux=True), in_shardings=(shardings, layout.rows))
    return jax.device_get(compiled(jax.device_put(params, shardings), layout.place_rows(batch)))


@pytest.fixture(scope="module")
def alone(one_device):
    params = init(specs(MODEL), jax.random.key(0))
    return params, loss_and_gradients(MODEL, one_device, params, batch_for())


@pytest.mark.parametrize("mesh", [(2, 2, 2), (4, 1, 2), (1, 4, 2)], ids=str)
def test_the_same_loss_and_gradients_on_every_mesh(mesh, alone):
    data, fsdp, tensor = mesh
    layout = Layout(MeshConfig(data=data, fsdp=fsdp, tensor=tensor).build())
    params, expected = alone
    found = loss_and_gradients(MODEL, layout, params, batch_for())
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def test_a_token_is_written_where_rows_are_split(alone, one_device):
    """The mesh splits sequences, and one position cannot be split."""
    params, _ = alone
    token, valid = jnp.full((8, 1), 3), jnp.ones(8, jnp.int32)

    def one(layout):
        return jax.jit(lambda p: extend(p, token, valid, empty_cache(8, 4, MODEL), MODEL, layout)[0])(params)

    mesh = MeshConfig(data=2, expert=2, context=2).build()
    np.testing.assert_allclose(one(Layout(mesh)), one(one_device), rtol=2e-4, atol=2e-5)


EXPERT_MESHES = [
    MeshConfig(data=4, expert=2),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, expert=4, context=2),
]


@pytest.mark.parametrize("skewed", [False, True], ids=["as-drawn", "all-to-the-same"])
@pytest.mark.parametrize("mesh", EXPERT_MESHES, ids=["data-expert", "fsdp-expert-tensor", "expert-context"])
def test_experts_on_many_devices_are_those_of_one(mesh, skewed, one_device):
    """Output, statistics and gradients, whatever share of the tokens a device's experts are sent."""
    moe = MoE(8, 2, 8, balance=BalanceLoss(0.1))
    x, w = jnp.float32(tokens(8, 8)), single(weights_for(moe, router_std=0.0 if skewed else 1.0))
    layout = Layout(mesh.build())

    def values(layout):
        def value(x, w):
            out, routing = mixture_of_experts(x, w, jnp.ones((8, 8), bool), moe, layout)
            return jnp.sum(jnp.sin(out) * jnp.arange(1, WIDTH + 1)), (out, routing)

        at = layout.activation(("batch", "sequence")), layout.parameters(moe_specs(WIDTH, moe, 1.0))
        run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), in_shardings=at)
        return jax.device_get(run(*jax.device_put((x, w), at)))

    found = values(layout)
    assert_equal_trees(found, values(one_device))
    load = found[0][1][1].load
    assert (load.max() == 0.5) == skewed  # all tokens have the same two favourites


def test_devices_exchange_tokens_and_no_expert():
    """Compiled for experts on four devices: tokens are gathered, results are scattered, and weights stay."""
    moe = MoE(8, 2, 24)
    layout = Layout(MeshConfig(data=1, expert=4).build(jax.devices()[:4]))
    at = layout.activation(("batch", "sequence")), layout.parameters(moe_specs(WIDTH, moe, 1.0))
    shapes = jax.ShapeDtypeStruct((8, 16, WIDTH), jnp.float32), single(weights_for(moe))
    run = jax.jit(jax.grad(partial(summed, mixture_of_experts, moe, layout), argnums=(0, 1)), in_shardings=at)
    lines = run.lower(*shapes).compile().as_text().splitlines()
    moved = {
        kind: [line.split(f" {kind}(")[0] for line in lines if f" {kind}(" in line]
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    }
    assert any(f"f32[128,{WIDTH}]" in shape for shape in moved["all-gather"])
    assert any(f"f32[32,{WIDTH}]" in shape for shape in moved["reduce-scatter"])
    assert not moved["all-to-all"] + moved["collective-permute"]
    for shape in moved["all-gather"] + moved["reduce-scatter"]:
        assert f"{moe.hidden}," not in shape
        assert f",{moe.hidden}]" not in shape
    for shape in moved["all-reduce"]:  # of a device's own two experts, where copies add their gradients up
        assert "[8,12,24]" not in shape
        assert "[8,24,12]" not in shape


SPLITTING = [MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)]


@pytest.mark.parametrize("mesh", SPLITTING, ids=["data", "tensor"])
def test_experts_are_gathered_in_the_type_of_the_products_and_scores_stay(mesh):
    """Layers as they are compiled for a GPU, forward and backward, whose float32 weights are cast as a model's are."""
    moe, rows, length = MoE(8, 2, 24, balance=BalanceLoss(0.1)), 8, 16
    layout, layers = Layout(mesh.build()), stack(moe_specs(WIDTH, moe, 1.0), layers=3)

    def loss(x, stacked):
        def layer(x, w):
            w = w | {"experts": jax.tree.map(jnp.bfloat16, w["experts"])}
            out, routing = mixture_of_experts(x, w, jnp.ones(x.shape[:2], bool), moe, layout)
            return x + out, routing.balance

        x, balance = jax.lax.scan(layer, x, stacked)
        return jnp.sum(jnp.sin(jnp.float32(x))) + jnp.sum(balance)

    at = layout.activation(("batch", "sequence")), layout.parameters(layers)
    x = jax.ShapeDtypeStruct((rows, length, WIDTH), jnp.bfloat16)
    weights = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), layers)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=at, out_shardings=at).lower(x, weights)
    text = lowered.compile(compiler_options={"xla_allow_excess_precision": False}).as_text()
    found = collectives(parse(text), Machine(dict(layout.mesh.shape), 8), for_gpu=True)

    def moved(kind, dtype, axis):
        """Bytes of a device's operands."""
        alike = [one for one in found if (one.kind, one.dtype, one.axes) == (kind, dtype, (axis,))]
        return sum(one.times * one.operand for one in alike)

    own = 2 * sum(spec.size for path, spec in flatten(layers).items() if "experts/" in path) * mesh.data // 8
    assert moved("all-gather", "bf16", "fsdp") == 2 * own  # forward and backward
    assert moved("reduce-scatter", "bf16", "fsdp") == mesh.fsdp * own  # once
    tokens, router = rows * length // layout.ways("batch"), 4 * WIDTH * moe.experts
    stream = 3 * 2 * tokens * WIDTH
    assert moved("all-gather", "bf16", "expert") == 2 * stream  # tokens, and the gradient of what was added to them
    assert moved("reduce-scatter", "bf16", "expert") == mesh.expert * 2 * stream
    in_float32 = {one.operand for one in found if one.kind == "all-gather" and one.dtype == "f32"}
    weighed = 4 * tokens * moe.top_k  # the weights of the experts' outputs, which `tensor` splits as it does the stream
    assert in_float32 <= {router / 2, router / 4, weighed, weighed / mesh.tensor}
    assert 4 * tokens * moe.experts not in {one.operand for one in found}  # scores


def test_the_backward_pass_keeps_the_experts_as_they_are_split():
    """Gathered, those of all layers would be there at once."""
    moe, layout = MoE(4, 2, 256), Layout(MeshConfig(data=4, fsdp=2).build())
    x, w = jnp.float32(tokens(8, 2)), single(weights_for(moe))
    _, kept = jax.eval_shape(partial(jax.vjp, partial(summed, mixture_of_experts, moe, layout)), x, w)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) == w["experts"]["up"].size


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=2, expert=2, context=2), None], ids=["mesh", "one"])
def test_of_equal_scores_the_first_experts_are_chosen(mesh, one_device):
    layout = one_device if mesh is None else Layout(mesh.build())
    logits = np.random.default_rng(0).integers(0, 3, (8, 16, 8))
    _, chosen, _ = jax.jit(partial(route, bias=None, moe=MoE(8, 3, 8), layout=layout))(jnp.float32(logits))
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=-1, kind="stable")[..., :3])


@pytest.mark.parametrize("favoured", [0, 7])
def test_a_device_computes_the_blocks_of_its_own_experts_alone(favoured):
    """Of 8 experts on 4 devices, one is sent all tokens: its device has all of the blocks, and the others none."""
    chosen = jnp.full(128, favoured)
    counts = []
    for first in range(0, 8, 2):
        local = jnp.where((chosen >= first) & (chosen < first + 2), chosen - first, 2)
        counts.append(int(_blocks(local, 2, 8).used))
    assert counts == [16 if first <= favoured < first + 2 else 0 for first in range(0, 8, 2)]


def test_experts_that_do_not_divide_their_axis_are_refused():
    with pytest.raises(UserError, match=r"experts 4 ways.*experts=6"):
        Layout(MeshConfig(data=2, expert=4).build()).parameters(moe_specs(WIDTH, SIGMOID, 1.0))


def test_bfloat16_runs_on_a_mesh(alone):
    config = replace(MODEL, compute="bfloat16")
    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]))
    (loss, _), gradients = loss_and_gradients(config, layout, alone[0], batch_for())
    assert loss == pytest.approx(float(alone[1][0][0]), rel=2e-2)
    assert all(np.all(np.isfinite(value)) for value in jax.tree.leaves(gradients))


def test_the_backward_pass_keeps_nothing_of_the_experts_hidden_layer(one_device):
    """However large it is: without remat a dense layer of the same operations would keep three of them."""
    moe, x = MoE(experts=4, top_k=2, hidden=1024), jax.ShapeDtypeStruct((1, 4096, WIDTH), jnp.float32)
    w = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, jnp.float32), weights_for(moe))
    run = jax.jit(jax.grad(partial(summed, mixture_of_experts, moe, one_device)))
    memory = run.lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4096 * 2 * 1024


# ----------------------------------------------------------------------------------------------- routing, balance


def statistics(logits, moe, layout, real=None):
    """Of tokens whose router logits are these: the identity is the router, as far as it goes."""
    x = np.zeros((*logits.shape[:2], WIDTH))
    x[..., : moe.experts] = logits
    w = weights_for(moe)
    w["router"] = np.eye(WIDTH, moe.experts)
    real = np.ones(logits.shape[:2], bool) if real is None else real
    run = jax.jit(partial(mixture_of_experts, moe=moe, layout=layout))
    return jax.device_get(run(jnp.float32(x), single(w), jnp.asarray(real))[1])


def test_an_even_load_costs_top_k(one_device):
    """Each token's favourites are the next two in turn, so each expert gets as many tokens, and as much probability."""
    logits = np.stack([np.roll([3.0, 2.0, 0.0, 0.0, 0.0], t) for t in range(20)])[None]
    found = statistics(logits, SOFTMAX, one_device)
    np.testing.assert_allclose(found.load, 0.2, rtol=1e-6)
    np.testing.assert_allclose(found.balance, 2.0, rtol=1e-6)
    np.testing.assert_allclose(found.z, np.log(np.exp(logits[0, 0]).sum()) ** 2, rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_statistics_follow_their_formulas_and_leave_padding_out(score, one_device):
    moe = replace(SOFTMAX, score=score)
    rng = np.random.default_rng(4)
    logits, real = rng.normal(size=(3, 11, 5)) * 2, rng.random((3, 11)) < 0.6
    found = statistics(logits, moe, one_device, real)
    z = logits[real]
    p = np.exp(z) if score == "softmax" else 1 / (1 + np.exp(-z))
    p /= p.sum(-1, keepdims=True)
    share = np.mean([[e in row for e in range(5)] for row in np.argsort(-z, axis=-1)[:, :2]], axis=0)
    np.testing.assert_allclose(found.load, share / 2, rtol=1e-5)
    np.testing.assert_allclose(found.balance, 5 * np.sum(share * p.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(found.z, np.mean(np.log(np.exp(z).sum(-1)) ** 2), rtol=1e-5)
    nothing = statistics(logits, moe, one_device, np.zeros((3, 11), bool))
    assert all(np.all(value == 0) for value in nothing)


def test_the_auxiliary_loss_is_the_weighted_mean_over_the_layers():
    routing = Routing(jnp.zeros((2, 5)), jnp.array([2.0, 4.0]), jnp.array([1.0, 7.0]))
    assert auxiliary_loss(routing, replace(SOFTMAX, balance=BalanceLoss(0.1), z_loss=0.01)) == pytest.approx(0.34)
    assert auxiliary_loss(routing, replace(SOFTMAX, balance=BalanceBias(), z_loss=0.01)) == pytest.approx(0.04)
    assert auxiliary_loss(routing, SOFTMAX) == 0


def test_rebalancing_favours_the_idle_and_leaves_the_even_alone():
    bias = jnp.array([[0.5, 0.0, -0.25, 1.0]])
    params = {"layers": {"router_bias": bias, "router": jnp.ones((1, 3, 4))}, "head": jnp.ones(3)}
    routing = Routing(jnp.array([[0.0, 0.25, 0.3, 0.45]]), jnp.ones(1), jnp.ones(1))
    moved = rebalanced(params, routing, MoE(4, 2, 8, balance=BalanceBias(0.125)))
    np.testing.assert_allclose(moved["layers"]["router_bias"], bias + jnp.array([[0.125, 0, -0.125, -0.125]]))
    assert moved["layers"]["router"] is params["layers"]["router"]
    assert moved["head"] is params["head"]
    assert rebalanced(params, routing, MoE(4, 2, 8)) is params


def trained(balance, steps, optimizer=AdamW(clip_norm=1e9), learning_rate=1e-9):
    """Real train steps of a model whose router sends all tokens to experts 0 and 1 at first; loads by step."""
    config = replace(MODEL, depth=1, mlp=replace(SOFTMAX, experts=4, score="sigmoid", balance=balance), remat="none")
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    program = build_program(
        config,
        layout,
        optimizer.build(optax.constant_schedule(learning_rate), specs(config)),
        batch_sizes=[8],
        token_bytes=np.ones(48, np.int32),
        sources=1,
        z_loss=0.0,
    )
    params = init(specs(config), jax.random.key(0))
    # The mean of the embeddings is what all tokens share, and the router looks at that.
    params["embedding"] += 2.0
    params["layers"]["router"] = 0.05 * params["layers"]["router"] + jnp.array([0.03, 0.03, 0.0, 0.0])
    state, loads = program.start(params), []
    for step in range(steps):
        state, metrics = program.train(state, layout.place_rows(batch_for(seed=step)))
        loads.append(np.asarray(metrics.routing.load[0]))
    return jax.device_get(state.params), np.stack(loads)


def test_a_bias_evens_the_load_of_a_skewed_router():
    """Moved by the sign alone, it walks until the idle experts are chosen as often as the favourites."""
    _, left = trained(None, 30)
    assert np.all(left[:, :2].sum(-1) > 0.9)
    params, loads = trained(BalanceBias(0.01), 120)
    assert loads[0, :2].sum() > 0.9
    np.testing.assert_allclose(loads[-20:].mean(0), 0.25, atol=0.08)
    bias = params["layers"]["router_bias"][0]
    assert bias[:2].max() < 0 < bias[2:].min()


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.5), Muon(weight_decay=0.5)], ids=["AdamW", "Muon"])
def test_optimizers_leave_the_bias_alone(optimizer):
    """After a step it is where the sign of the load's error put it, whatever the learning rate."""
    params, loads = trained(BalanceBias(0.125), 1, optimizer, learning_rate=0.1)
    np.testing.assert_array_equal(params["layers"]["router_bias"][0], 0.125 * np.sign(0.25 - loads[0]))


def test_a_balance_loss_evens_the_load_by_gradient():
    _, left = trained(None, 60, learning_rate=3e-3)
    _, helped = trained(BalanceLoss(1.0), 60, learning_rate=3e-3)

    def unevenness(loads):
        return np.abs(loads[-5:].mean(0) - 0.25).sum()

    assert unevenness(helped) < 0.5 * unevenness(left)
