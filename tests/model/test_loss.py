"""The chunked loss against the textbook formula in float64, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.model import loss
from eurollm_jax.model.loss import cross_entropy, sum_by_source
from eurollm_jax.parallel.mesh import Layout, MeshConfig

B, T, D, V = 3, 13, 8, 50


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    targets, mask = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7
    return hidden, head, targets, mask


def oracle(hidden, head, targets, mask, z_loss):
    """Sum, nats, and the gradients by hand: d/dlogits = p - y + 2 z log Z p."""
    logits = hidden @ head
    log_z = np.log(np.exp(logits).sum(-1))
    nats = np.where(mask, log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0], 0)
    total = nats.sum() + z_loss * (log_z**2 * mask).sum()
    p = np.exp(logits - log_z[..., None])
    d_logits = (p * (1 + 2 * z_loss * log_z[..., None]) - np.eye(V)[targets]) * mask[..., None]
    return total, nats, d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits)


@pytest.mark.parametrize("at_once", [1, 2 * B * V, 5 * B * V, B * V * T])  # 1, 2, 4 (does not divide T) and T positions
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradients(inputs, one_device, monkeypatch, at_once, z_loss):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": at_once})
    hidden, head, targets, mask = inputs

    def scaled(hidden, head):
        total, nats = cross_entropy(hidden, head, targets, mask, z_loss=z_loss, layout=one_device)
        return 3.0 * total, (total, nats)

    gradient = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True))
    (d_hidden, d_head), (total, nats) = gradient(hidden.astype(np.float32), head.astype(np.float32))
    expected = oracle(hidden, head, targets, mask, z_loss)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    np.testing.assert_allclose(nats, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_hidden, 3 * expected[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head, 3 * expected[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("cap", [0.5, 4.0, 30.0])
def test_a_logit_cap_as_jax_differentiates_it(inputs, one_device, monkeypatch, cap, z_loss):
    """From caps that flatten nearly all logits to such as hardly touch them."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": 5 * B * V})
    hidden, head, targets, mask = inputs
    hidden, head = hidden.astype(np.float32), head.astype(np.float32)

    def plain(hidden, head):
        logits = cap * jnp.tanh(hidden @ head / cap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = (log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]) * mask
        return 3.0 * (nats.sum() + z_loss * (log_z**2 * mask).sum()), nats

    def ours(hidden, head):
        total, nats = cross_entropy(hidden, head, targets, mask, z_loss=z_loss, layout=one_device, cap=cap)
        return 3.0 * total, nats

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, head) for f in (ours, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=4, tensor=2),
        MeshConfig(data=1, tensor=8),
        MeshConfig(replica=2, data=1, expert=2, context=2),
        MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    ],
    ids=str,
)
def test_eight_devices_with_a_part_of_the_vocabulary_each(mesh, monkeypatch):
    """Against float64, with z-loss, cap and mask, where chunks divide no device's tokens."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": 60})
    layout, cap, z_loss, shape = Layout(mesh.build()), 4.0, 0.1, (4, 6)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(*shape, 8)), rng.normal(size=(8, 48))
    targets, mask = rng.integers(0, 48, shape), rng.random(shape) < 0.7

    capped = cap * np.tanh(hidden @ head / cap)
    log_z = np.log(np.exp(capped).sum(-1))
    nats = np.where(mask, log_z - np.take_along_axis(capped, targets[..., None], -1)[..., 0], 0)
    p = np.exp(capped - log_z[..., None])
    slope = (p * (1 + 2 * z_loss * log_z[..., None]) - np.eye(48)[targets]) * mask[..., None]
    slope *= 1 - (capped / cap) ** 2

    def scaled(hidden, head):
        total, nats = cross_entropy(hidden, head, targets, mask, z_loss=z_loss, layout=layout, cap=cap)
        return 3.0 * total, (total, nats)

    at = layout.rows, layout.parameter(("embed", "vocab"))
    gradient = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True), in_shardings=at)
    (d_hidden, d_head), (total, found) = gradient(hidden.astype(np.float32), head.astype(np.float32))
    np.testing.assert_allclose(total, nats.sum() + z_loss * (log_z**2 * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(found, nats, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_hidden, 3 * slope @ head.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head, 3 * np.einsum("btd,btv->dv", hidden, slope), rtol=1e-4, atol=1e-4)
    assert d_head.sharding.is_equivalent_to(at[1], 2)


def test_a_target_beyond_the_vocabulary_is_no_number(inputs, one_device):
    hidden, head, targets, mask = inputs
    hidden, head, mask = hidden.astype(np.float32), head.astype(np.float32), np.ones_like(mask)
    targets[0, 0] = V
    total, nats = cross_entropy(hidden, head, targets, mask, z_loss=0.0, layout=one_device)
    assert np.isnan(total)
    assert np.isnan(nats).sum() == 1


def test_logits_of_the_whole_batch_are_never_held(one_device):
    """In the compiled program, temporaries stay far below the logits of all positions."""
    batch, length, width, vocab = 8, 1024, 16, 65_536

    def gradient(hidden, head, targets, mask):
        return jax.grad(
            lambda h, w: cross_entropy(h, w, targets, mask, z_loss=0.0, layout=one_device)[0], argnums=(0, 1)
        )(hidden, head)

    shapes = [
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.bool_),
    ]
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * batch * length * vocab


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=4, tensor=2)])
def test_the_heads_gradient_crosses_the_network_once(mesh, monkeypatch):
    """No all-reduce of its size stands inside the loop over chunks."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", {"cpu": 64})
    layout = Layout(mesh.build())

    def gradient(hidden, head, targets, mask):
        return jax.grad(lambda w: cross_entropy(hidden, w, targets, mask, z_loss=0.0, layout=layout)[0])(head)

    rows, head = layout.rows, layout.parameter(("embed", "vocab"))
    compiled = jax.jit(gradient, in_shardings=(rows, head, rows, rows), out_shardings=head).lower(
        jax.ShapeDtypeStruct((8, 16, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, 64), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.int32),
        jax.ShapeDtypeStruct((8, 16), jnp.bool_),
    )
    text = compiled.compile().as_text()
    loop = next(name for name in re.findall(r"body=%?([\w.-]+)", text))
    body = re.search(rf"^%?{re.escape(loop)} .*?^}}", text, re.M | re.S).group()
    assert "dot(" in body or "fusion(" in body
    for shape in re.findall(r"f32\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)", body):
        assert np.prod([int(n) for n in shape.split(",") if n]) < 32 * 64 // 2, f"f32[{shape}] in the loop"


def test_sums_by_source_count_each_position_once():
    rng = np.random.default_rng(1)
    source, mask = np.array([2, 0, 2], np.int32), rng.random((B, T)) < 0.5
    targets, nats = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)).astype(np.float32)
    token_bytes = rng.integers(0, 9, V).astype(np.int32)
    zeros = np.zeros((B, T), np.int32)
    sums = sum_by_source(Batch(zeros, targets, zeros, zeros, mask, source), nats, jnp.asarray(token_bytes), 4)
    for s in range(4):
        rows = source == s
        assert int(sums.tokens[s]) == mask[rows].sum()
        assert int(sums.bytes[s]) == token_bytes[targets[rows]][mask[rows]].sum()
        np.testing.assert_allclose(sums.nats[s], nats[rows][mask[rows]].sum(), rtol=1e-5)
