"""What the decoder may and may not see, and that its declared weights are its weights.

Its numbers are compared with `transformers` in tests/hf.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.model.attention import attention, document_mask
from eurollm_jax.model.param import Param, count, decay_mask, flatten, init
from eurollm_jax.model.transformer import TransformerConfig, empty_cache, extend, forward, logits, specs

CONFIG = TransformerConfig(
    vocab_size=40, width=24, depth=3, heads=6, kv_heads=2, head_dim=8, mlp=32, max_positions=64, compute="float32"
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


def test_a_packed_document_gives_what_it_gives_alone(params, one_device):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, n) for n in (5, 9, 3)]
    packed = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3], [5, 9, 3])[None]
    positions = np.concatenate([np.arange(n) for n in (5, 9, 3)])[None]
    together = forward(params, packed, segments, positions, CONFIG, one_device)[0]
    start = 0
    for document in documents:
        n = len(document)
        ones, at = np.ones((1, n), int), np.arange(n)[None]
        alone = forward(params, document[None], ones, at, CONFIG, one_device)[0]
        np.testing.assert_allclose(together[start : start + n], alone, atol=1e-5)
        start += n


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_gradient(params, one_device, remat):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 10))
    ones, at = np.ones((2, 10), int), np.tile(np.arange(10), (2, 1))

    def total(params, config):
        return jnp.sum(jnp.square(logits(params, forward(params, tokens, ones, at, config, one_device), config)))

    kept = jax.grad(total)(params, dataclasses.replace(CONFIG, remat="none"))
    again = jax.grad(total)(params, dataclasses.replace(CONFIG, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), kept, again)


def test_reading_in_pieces_equals_reading_at_once(params, one_device):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 12))
    ones, at = np.ones((2, 12), int), np.tile(np.arange(12), (2, 1))
    whole = forward(params, tokens, ones, at, CONFIG, one_device)
    cache, parts = empty_cache(2, 16, CONFIG), []
    for piece in np.split(tokens, [5, 6, 9], axis=1):
        valid = np.full(2, piece.shape[1])
        hidden, cache = extend(params, piece, valid, cache, CONFIG, one_device)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


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
    assert flatten(decay_mask(specs(CONFIG))) == {path: "norm" not in path for path in declared}


def test_flops_of_a_token_count_every_product(params, one_device):
    """XLA's own count of the forward pass, times three, on a model without a causal mask to halve."""
    length = 16
    config = dataclasses.replace(CONFIG, depth=1)
    one = init(specs(config), jax.random.key(0))
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(params, tokens, segments, positions):
        return logits(params, forward(params, tokens, segments, positions, config, one_device), config)

    cost = jax.jit(run).lower(one, shape, shape, shape).compile().cost_analysis()
    attention_all_keys = 12.0 * config.heads * config.head_dim * length
    ours = config.flops_per_token(length) + attention_all_keys / 2
    assert 3 * cost["flops"] / length == pytest.approx(ours, rel=0.25)  # XLA counts norms, rotation and softmax too


@pytest.mark.parametrize("wrong", [dict(kv_heads=4), dict(head_dim=7)])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(UserError, match=r"change|choose"):
        dataclasses.replace(CONFIG, **wrong)
