"""A learning rate that was found at one width holds at others: hidden states move as far in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import BalanceBias, Gated, MoE, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.param import flatten, init
from eurollm_jax.model.transformer import forward, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW, Lion
from eurollm_jax.training.optimizer_width import rate_shares


def model(width, **changes):
    sizes = dict(
        vocab_size=64,
        width=width,
        depth=2,
        heads=width // 16,
        kv_heads=width // 16,
        head_dim=16,
        mlp=Gated(2 * width),
        max_positions=32,
        compute="float32",
        remat="none",
    )
    return TransformerConfig(**(sizes | changes))


def moved(optimizer, width):
    """Root mean square of the change of the last hidden states in two steps on one batch."""
    config, layout = model(width), Layout(MeshConfig().build(jax.devices()[:1]))
    tokens = np.random.default_rng(0).integers(0, 64, (4, 33)).astype(np.int32)
    places = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], np.ones_like(places), places, np.ones((4, 32), bool), np.zeros(4, np.int32)
    )
    built = optimizer.build(optax.constant_schedule(1e-3), specs(config))

    def hidden(params):
        return forward(params, batch.tokens, batch.segments, batch.positions, config, layout)[0]

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(lambda p: batch_loss(p, batch, config, layout, 0.0)[0] / batch.mask.sum())(params)
        updates, state = built.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def change(params):
        (after, _), _ = jax.lax.scan(step, (params, built.init(params)), length=2)
        return jnp.sqrt(jnp.mean((hidden(after) - hidden(params)) ** 2))

    return float(change(init(specs(config), jax.random.key(0))))


@pytest.mark.parametrize("base_width", [64, None])
def test_hidden_states_move_as_far_at_any_width_only_with_a_base_width(base_width):
    small, middle, large = (moved(AdamW(base_width=base_width, weight_decay=0.0), width) for width in (64, 128, 256))
    if base_width is None:
        assert middle > 1.3 * small
        assert large > 1.7 * small
    else:
        assert 0.87 < middle / small < 1.15
        assert 0.87 < large / small < 1.15


def test_shares_of_the_rate_are_those_of_table_8():
    """Of a model four times as wide; the embedding's, with its start of 1/sqrt(width), is a root."""
    shares = flatten(rate_shares(64, specs(model(256, attention_bias="all", qk_norm="head"))))
    for path, share in shares.items():
        gain = "norm" in path or "bias" in path
        assert share == (1 if gain else 1 / 2 if path == "embedding" else 1 / 4), path
    of_experts = flatten(rate_shares(64, specs(model(256, mlp=MoE(4, 2, 64, balance=BalanceBias())))))
    assert {of_experts[f"layers/{name}"] for name in ("router", "experts/up", "experts/down")} == {1 / 4}
    assert of_experts["layers/router_bias"] == 1
    assert flatten(rate_shares(64, specs(model(256, tied=True))))["embedding"] == 1 / 4
    assert set(flatten(rate_shares(64, specs(model(64)))).values()) == {1}


def test_the_direction_is_scaled_and_the_decay_is_not():
    weights = specs(model(128))
    params = init(weights, jax.random.key(0))
    shares = flatten(rate_shares(64, weights))

    def update(**options):
        built = Lion(**options).build(optax.constant_schedule(1.0), weights)
        return flatten(built.update(params, built.init(params), params)[0])

    plain, scaled = update(weight_decay=0.0), update(weight_decay=0.0, base_width=64)
    decayed = update(weight_decay=0.5, base_width=64)
    for path, spec in flatten(weights).items():
        np.testing.assert_allclose(scaled[path], shares[path] * plain[path], rtol=1e-6, err_msg=path)
        decay = -0.5 * flatten(params)[path] * spec.decayed
        np.testing.assert_allclose(decayed[path] - scaled[path], decay, atol=1e-6, err_msg=path)


def test_a_base_width_that_is_none_is_refused():
    with pytest.raises(UserError, match="base_width=0 must be 1 or more"):
        AdamW(base_width=0).build(optax.constant_schedule(1.0), specs(model(64)))
