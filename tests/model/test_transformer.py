"""What the decoder may and may not see, and that its declared weights are its weights.

Its numbers are compared with `transformers` in tests/hf.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.model.attention import attention, causal_mask, document_mask
from eurollm_jax.model.config import Attention, BalanceLoss, Gated, MoE, Norm, Rope, TransformerConfig, Ungated
from eurollm_jax.model.param import Param, count, decay_mask, flatten, init
from eurollm_jax.model.transformer import (
    active_matrix_weights,
    empty_cache,
    extend,
    flops_per_token,
    forward,
    logits,
    specs,
)

CONFIG = TransformerConfig(
    vocab_size=40,
    width=24,
    depth=3,
    heads=6,
    kv_heads=2,
    head_dim=8,
    mlp=Gated(32),
    max_positions=64,
    compute="float32",
)


@pytest.fixture(scope="module")
def params():
    return init(specs(CONFIG), jax.random.key(0))


def test_attention_equals_a_loop_over_heads():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, heads, 4)) for heads in (6, 2, 2))
    segments = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 0]])
    expected = np.zeros_like(q)
    for b in range(2):
        for h in range(6):
            for t in range(5):
                seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
                scores = np.array([q[b, t, h] @ k[b, s, h // 3] / 2.0 for s in seen])
                weights = np.exp(scores) / np.exp(scores).sum()
                expected[b, t, h] = weights @ v[b, seen, h // 3]
    result = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), document_mask(jnp.asarray(segments)))
    np.testing.assert_allclose(result, expected, atol=1e-5)


# ------------------------------------------------------------------------------------- against a plain reference


def reference(params, tokens, segments, positions, c):
    """Logits of one row after another in float64, layer by layer, query by query."""
    w = jax.tree.map(np.float64, params)

    def norm(x, gain):
        gain = gain + 1 if c.norm.gain == "one_plus_weight" else gain
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm.eps) * gain

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def project(h, name, here):
        return np.tensordot(h, here[name], 1) + here.get(f"{name}_bias", 0)

    def turn(x, at, rope):
        if rope is None:
            return x
        half = rope.turned(c.head_dim) // 2
        z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(
            1j * at[:, None, None] * rope.theta ** -(np.arange(half) / half)
        )
        return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)

    def qk_norm(x, gain):
        if c.qk_norm == "full":
            return norm(x.reshape(len(x), -1), gain.reshape(-1)).reshape(x.shape)
        return x if c.qk_norm == "none" else norm(x, gain)

    def attend(h, here, kind, segment, at):
        q, k, v = (project(h, name, here) for name in ("query", "key", "value"))
        q = turn(qk_norm(q, here.get("query_norm")), at, kind.rope)
        k = turn(qk_norm(k, here.get("key_norm")), at, kind.rope)
        out = np.zeros_like(q)
        for t, head in np.ndindex(q.shape[:2]):
            first = 0 if kind.window is None else max(0, t + 1 - kind.window)
            seen = [s for s in range(first, t + 1) if segment[s] == segment[t]]
            group = head // (c.heads // c.kv_heads)
            scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
            scores = np.exp(cap(k[seen, group] @ q[t, head] * scale, c.attention_cap))
            out[t, head] = scores @ v[seen, group] / scores.sum()
        return np.tensordot(out, here["output"], 2) + here.get("output_bias", 0)

    def mlp(h, here):
        up = project(h, "up", here)
        if isinstance(c.mlp, Gated):
            gate = project(h, "gate", here)
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            a, b = (np.log1p(np.exp(here[f"alpha_{side}"])) for side in ("positive", "negative"))
            hidden = np.where(up > 0, a * up**2, (b + 0.5) * (np.expm1(np.minimum(up, 0)) - up)) + 0.5 * up
        return project(hidden, "down", here)

    rows = []
    for ids, segment, at in zip(tokens, segments, positions, strict=True):
        x = w["embedding"][ids] * c.embedding_scale
        for number in range(c.depth):
            here = {name: value[number] for name, value in w["layers"].items()}
            for half in ("attention", "mlp"):
                h = norm(x, here[f"{half}_norm"]) if f"{half}_norm" in here else x
                h = mlp(h, here) if half == "mlp" else attend(h, here, c.kind(number), segment, at)
                x = x + (norm(h, here[f"{half}_post_norm"]) if f"{half}_post_norm" in here else h)
        out = norm(x, w["final_norm"])
        rows.append(cap(out @ (w["embedding"].T if c.tied else w["head"]), c.logit_cap))
    return np.stack(rows)


SLIDING, WHOLE, NOWHERE = Attention(window=3), Attention(rope=Rope(theta=500.0)), Attention(rope=None)
MODELS = {
    "llama": CONFIG,
    "gemma": replace(
        CONFIG,
        depth=5,
        pattern=(SLIDING, SLIDING, WHOLE),
        norm=Norm("both", 1e-3, "one_plus_weight"),
        qk_norm="head",
        attention_scale=0.3,
        attention_cap=2.0,
        logit_cap=1.5,
        embedding_scale=4.9,
        tied=True,
    ),
    "olmo": replace(CONFIG, depth=4, pattern=(SLIDING, SLIDING, SLIDING, WHOLE), norm=Norm("post"), qk_norm="full"),
    "smollm": replace(CONFIG, depth=3, pattern=(WHOLE, NOWHERE), attention_bias="qkv"),
    "apertus": replace(CONFIG, mlp=Ungated(32), qk_norm="head", kv_heads=1),
    "biased": replace(
        CONFIG,
        mlp=Gated(32, bias=True),
        attention_bias="all",
        pattern=(Attention(window=1, rope=Rope(fraction=0.5)), Attention(window=64)),
    ),
}
MIXED = replace(
    CONFIG,
    pattern=(SLIDING, WHOLE),
    mlp=MoE(experts=6, top_k=2, hidden=16, shared=8, balance=BalanceLoss(0.1)),
)


def random_params(c):
    """Every weight away from its start, so that none is without effect."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda value: value + jnp.float32(0.2 * rng.normal(size=value.shape)), init(specs(c), jax.random.key(0))
    )


def packed(rows=2, length=14):
    """Two documents in a row, cut at another place in each, and padding after them."""
    tokens = np.random.default_rng(3).integers(0, 40, (rows, length))
    segments = np.array([np.repeat([1, 2, 0], [5 + row, length - 7 - row, 2]) for row in range(rows)])
    positions = np.array([[np.flatnonzero(row == row[t])[0] for t in range(length)] for row in segments])
    return tokens, segments, np.arange(length) - positions


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(name, one_device):
    c, (tokens, segments, positions) = MODELS[name], packed()
    weights = random_params(c)
    expected = reference(weights, tokens, segments, positions, c)

    @jax.jit
    def run(weights):
        return logits(weights, forward(weights, tokens, segments, positions, c, one_device)[0], c)

    np.testing.assert_allclose(run(weights), expected, atol=2e-5 * np.abs(expected).max())


def loss_and_gradients(c, params, layout, rows):
    """((value, routing), gradients) of a number that every logit has a part in."""

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        hidden, routing = forward(params, *rows, c, layout)
        total = jnp.sum(jnp.square(logits(params, hidden, c)))
        return (total if routing is None else total + jnp.sum(routing.balance)), routing

    return run(params)


def assert_equal_trees(ours, theirs, tolerance=1e-4):
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        limit = tolerance * max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=limit, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "c",
    [pytest.param(MODELS["gemma"], marks=pytest.mark.slow), MODELS["smollm"], MIXED],
    ids=["gemma", "smollm", "mixture"],
)
def test_a_pattern_is_its_layers_written_out(c, one_device):
    """Scanned by the period, with layers left over, or as one pattern as long as the model: values and gradients."""
    weights, rows = random_params(c), packed()
    assert c.depth % len(c.pattern)
    written_out = replace(c, pattern=tuple(c.kind(layer) for layer in range(c.depth)))
    ours, theirs = (loss_and_gradients(one, weights, one_device, rows) for one in (c, written_out))
    assert_equal_trees(ours, theirs)
    if isinstance(c.mlp, MoE):
        assert ours[0][1].load.shape == (c.depth, c.mlp.experts)


@pytest.mark.parametrize("c", [MODELS["olmo"], pytest.param(MIXED, marks=pytest.mark.slow)], ids=["dense", "mixture"])
def test_recomputing_changes_no_gradient(c, one_device):
    weights, rows = random_params(c), packed()
    kept = loss_and_gradients(replace(c, remat="none"), weights, one_device, rows)
    for remat in ("dots", "attention", "full", "offload"):
        assert_equal_trees(loss_and_gradients(replace(c, remat=remat), weights, one_device, rows), kept)


def test_a_packed_document_gives_what_it_gives_alone(params, one_device):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, n) for n in (5, 9, 3)]
    packed = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3], [5, 9, 3])[None]
    positions = np.concatenate([np.arange(n) for n in (5, 9, 3)])[None]
    together = forward(params, packed, segments, positions, CONFIG, one_device)[0][0]
    start = 0
    for document in documents:
        n = len(document)
        ones, at = np.ones((1, n), int), np.arange(n)[None]
        alone = forward(params, document[None], ones, at, CONFIG, one_device)[0][0]
        np.testing.assert_allclose(together[start : start + n], alone, atol=1e-5)
        start += n


READERS = {name: MODELS[name] for name in ("llama", "gemma", "smollm")} | {
    "long windows": replace(MODELS["gemma"], pattern=(Attention(window=11), Attention(window=64))),
    "mixture": MIXED,
}


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param((5, 6, 9), id="pieces"),
        pytest.param(tuple(range(1, 14)), id="one by one", marks=pytest.mark.slow),
        pytest.param((13,), id="nearly all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", READERS)
def test_reading_in_pieces_equals_reading_at_once(name, cuts, one_device):
    """Each piece is padded to a length of its own: what lies past `valid` must leave no trace."""
    c = READERS[name]
    weights, tokens = random_params(c), np.random.default_rng(0).integers(0, 40, (2, 14))
    ones, at = np.ones((2, 14), int), np.tile(np.arange(14), (2, 1))
    whole, _ = jax.jit(partial(forward, c=c, layout=one_device))(weights, tokens, ones, at)
    cache, parts = empty_cache(2, 32, c), []
    read = jax.jit(partial(extend, c=c, layout=one_device))
    longest = max(np.diff([0, *cuts, 14])) + 2
    for piece in np.split(tokens, cuts, axis=1):
        length = piece.shape[1]
        padded = np.pad(piece, [(0, 0), (0, longest - length)], constant_values=7)
        hidden, cache = read(weights, padded, np.full(2, length), cache)
        parts.append(hidden[:, :length])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=5e-5)
    np.testing.assert_array_equal(cache.lengths, 14)


def test_a_new_weight_leaves_the_others_initial_values():
    first = dict(a=Param(x=3, fan_in="x"), z=Param(x=5, fan_in="x"))
    second = dict(a=Param(x=3, fan_in="x"), m=Param(x=4, fan_in="x"), z=Param(x=5, fan_in="x"))
    before, after = (init(tree, jax.random.key(3)) for tree in (first, second))
    for name in first:
        np.testing.assert_array_equal(before[name], after[name])
    assert not np.array_equal(after["a"], after["z"][:3])


def test_initial_deviation_follows_the_fan_in(params):
    flat, declared = flatten(params), flatten(specs(CONFIG))
    assert sum(value.size for value in flat.values()) == count(specs(CONFIG))
    for path, spec in declared.items():
        if spec.fan_in:
            assert np.std(flat[path]) == pytest.approx(spec.std, rel=0.15), path
        else:
            assert np.all(flat[path] == 1), path
    assert flatten(decay_mask(specs(CONFIG))) == {path: "norm" not in path and path != "embedding" for path in declared}


def test_flops_of_a_token_count_every_product(one_device):
    """XLA's own count of the forward pass, times three, on a model without a causal mask to halve."""
    length = 16
    config = replace(CONFIG, depth=1)
    one = init(specs(config), jax.random.key(0))
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(params, tokens, segments, positions):
        return logits(params, forward(params, tokens, segments, positions, config, one_device)[0], config)

    cost = jax.jit(run).lower(one, shape, shape, shape).compile().cost_analysis()
    attention_all_keys = 12.0 * config.heads * config.head_dim * length
    ours = flops_per_token(config, length) + attention_all_keys / 2
    assert 3 * cost["flops"] / length == pytest.approx(ours, rel=0.25)  # XLA counts norms, rotation and softmax too


def products(jaxpr):
    """Floating-point operations of all matrix products of a program, those in loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([shape[axis] for axis in contracted])
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(equation.params)]
        total += times * sum(products(value) for value in inner if hasattr(value, "eqns"))
    return total


@pytest.mark.parametrize("c", [MODELS["gemma"], MODELS["apertus"]], ids=["gemma", "apertus"])
def test_flops_of_a_token_are_those_of_the_products(c, one_device):
    """All keys are multiplied and then masked."""
    length = 2**15
    weights = jax.eval_shape(lambda: init(specs(c), jax.random.key(0)))
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    c = replace(c, attention_kernel="reference")

    def run(params, tokens, segments, positions):
        return logits(params, forward(params, tokens, segments, positions, c, one_device)[0], c)

    found = 3 * products(jax.make_jaxpr(run)(weights, shape, shape, shape).jaxpr) / length
    all_keys = 12.0 * c.depth * c.heads * c.head_dim * length
    seen = sum(
        float(jnp.sum(causal_mask(jnp.arange(2**9), jnp.arange(2**9), c.kind(n).window))) for n in range(c.depth)
    )
    ours_short = flops_per_token(c, 2**9) - 6.0 * active_matrix_weights(c)
    assert ours_short == pytest.approx(12.0 * c.heads * c.head_dim * seen / 2**9, rel=0.01)
    assert found - all_keys == pytest.approx(6.0 * active_matrix_weights(c), rel=1e-6)


def test_a_token_meets_the_weights_of_its_experts_alone():
    weights = {path: spec.size for path, spec in flatten(specs(MIXED)).items() if spec.fan_in}
    elsewhere = MIXED.depth * (MIXED.mlp.experts - MIXED.mlp.top_k) * 3 * MIXED.width * MIXED.mlp.hidden
    assert active_matrix_weights(MIXED) == sum(weights.values()) - weights["embedding"] * (not MIXED.tied) - elsewhere


@pytest.mark.parametrize("wrong", [dict(kv_heads=4), dict(head_dim=7)])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(UserError, match=r"change|choose"):
        replace(CONFIG, **wrong)
