"""The small functions of a block, against those of transformers and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN, XIELUActivation
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eurollm_jax.model.config import LinearScaling, Llama3Scaling, Norm, Rope, YarnScaling
from eurollm_jax.model.layers import (
    XIELU_START,
    activate,
    rms_norm,
    rotary_frequencies,
    rotary_tables,
    rotate,
    soft_cap,
    xielu,
    xielu_start,
)


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (1.3, -2.0), (-3.0, 4.0)])
def test_xielu_equals_that_of_transformers_value_and_gradients(slopes):
    x = np.float32([-80, -20, -3, -1, -1e-3, -1e-7, 0, 1e-7, 1e-3, 1, 3, 20, 80, 90, -90, 1e4, -1e4, 1e12, -1e12])
    theirs = XIELUActivation(dtype=torch.float32)
    with torch.no_grad():
        theirs.alpha_p.fill_(slopes[0])
        theirs.alpha_n.fill_(slopes[1])
    at = torch.tensor(x, requires_grad=True)
    value = theirs(at)
    value.sum().backward()
    positive, negative = (jnp.full(1, slope, jnp.float32) for slope in slopes)
    np.testing.assert_allclose(xielu(x, positive, negative), value.detach(), rtol=2e-6, atol=1e-9)
    gradient = jax.grad(lambda x: jnp.sum(xielu(x, positive, negative)))(x)
    np.testing.assert_allclose(gradient, at.grad, rtol=2e-6, atol=1e-7)
    small = np.float32([-80, -3, -1, 0, 1, 3, 80])
    theirs.zero_grad()
    theirs(torch.tensor(small)).sum().backward()
    ours = jax.grad(lambda p, n: jnp.sum(xielu(small, p, n)), argnums=(0, 1))(positive, negative)
    for slope, wanted in zip(ours, (theirs.alpha_p.grad, theirs.alpha_n.grad), strict=True):
        np.testing.assert_allclose(slope, wanted, rtol=1e-5)


def test_xielu_starts_with_the_slopes_of_its_authors():
    theirs = XIELUActivation(dtype=torch.float32)
    np.testing.assert_allclose(xielu_start("positive"), theirs.alpha_p.item(), rtol=1e-5)
    np.testing.assert_allclose(xielu_start("negative"), theirs.alpha_n.item(), rtol=1e-5)
    slopes = jnp.full(1, xielu_start("positive")), jnp.full(1, xielu_start("negative"))
    curvature = jax.vmap(jax.grad(jax.grad(lambda x: xielu(x, *slopes)[0])))(jnp.float32([2.0, -1e-3]))
    np.testing.assert_allclose(curvature, [2 * XIELU_START, XIELU_START], rtol=2e-3)


def frequencies_of_transformers(rope_type, head_dim, fraction, rope):
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=10**6,
        rope_parameters=dict(rope_type=rope_type, partial_rotary_factor=fraction, **rope),
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config)


def shape(rng):
    """A head's dimensions, and a fraction of them that is an even number."""
    head_dim = 2 * int(rng.integers(2, 65))
    turned = 2 * int(rng.integers(1, head_dim // 2 + 1))
    return head_dim, 1.0 if rng.random() < 0.5 else (turned + 0.25) / head_dim


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.filterwarnings("ignore")
def test_rotary_frequencies_equal_those_of_transformers(kind, seed):
    rng = np.random.default_rng(seed)
    head_dim, fraction = shape(rng)
    theta, factor = float(10 ** rng.uniform(2, 7)), float(rng.uniform(1.0, 40.0))
    original = int(2 ** rng.integers(4, 17))
    said = dict(rope_theta=theta, factor=factor)
    match kind:
        case "linear":
            scaling = LinearScaling(factor)
        case "llama3":
            low, span = float(rng.uniform(0.5, 4)), float(rng.uniform(0.5, 30))
            scaling = Llama3Scaling(factor, original, low, low + span)
            said |= dict(low_freq_factor=low, high_freq_factor=low + span, original_max_position_embeddings=original)
        case "yarn":
            fast, slow = float(rng.uniform(8, 64)), float(rng.uniform(0.25, 4))
            attention_factor = None if seed % 3 else float(rng.uniform(0.5, 2))
            scaling = YarnScaling(factor, original, fast, slow, attention_factor, truncate=seed % 2 == 0)
            said |= dict(original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow)
            said |= dict(truncate=seed % 2 == 0, attention_factor=attention_factor)
    ours, our_factor = rotary_frequencies(Rope(theta, scaling, fraction), head_dim)
    theirs, their_factor = frequencies_of_transformers(kind, head_dim, fraction, said)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5)
    assert our_factor == pytest.approx(their_factor)


def test_tables_and_rotation_turn_pairs_by_position_times_frequency():
    rope = Rope(theta=100.0, fraction=0.5)
    positions = np.array([[0, 1, 5], [7, 8, 4095]])
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 12)).astype(np.float32)
    turned = rotate(jnp.asarray(x), rotary_tables(jnp.asarray(positions), 12, rope))
    pairs = x[..., :3] + 1j * x[..., 3:6]
    pairs = pairs * np.exp(1j * positions[..., None, None] * 100.0 ** -(np.arange(3) / 3))
    expected = np.concatenate([pairs.real, pairs.imag, x[..., 6:]], axis=-1)
    np.testing.assert_allclose(turned, expected, atol=1e-3)
    np.testing.assert_allclose(turned[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), None), x)


def test_yarn_makes_queries_and_keys_grow():
    scaling = YarnScaling(8.0, 64)
    cos, sin = rotary_tables(jnp.arange(20)[None], 16, Rope(scaling=scaling))
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * np.log(8.0) + 1) ** 2, rtol=1e-5)


def test_soft_cap_is_the_identity_near_zero_and_never_beyond_the_cap():
    x = jnp.float32([-1e9, -30, -0.1, 0, 0.1, 30, 1e9])
    np.testing.assert_allclose(soft_cap(x, 30.0), 30 * np.tanh(np.float64(x) / 30), rtol=1e-6)
    assert soft_cap(x, None) is x
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda v: soft_cap(v, 30.0)))(x)[2:5], 1, atol=1e-4)


@pytest.mark.parametrize("gain", ["weight", "one_plus_weight"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_is_its_formula(gain, dtype):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(3, 64)) * 100, dtype), jnp.asarray(rng.normal(size=64), dtype)
    wide, factor = np.float64(x), np.float64(weight) + (gain == "one_plus_weight")
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5) * factor
    normed = rms_norm(x, weight, Norm(eps=0.5, gain=gain))
    assert normed.dtype == dtype
    np.testing.assert_allclose(np.float64(normed), expected, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-6)


def test_one_plus_weight_is_added_in_float32():
    """In bfloat16, 1.003 would be 1; times 1.5 it is what rounds to the number after 1.5."""
    x = jnp.bfloat16([1.5, 1.5, 1, 1, 1, 0.5, 0.5, 0])  # whose mean square is 1
    normed = rms_norm(x, jnp.full(8, 0.003, jnp.bfloat16), Norm(eps=1e-9, gain="one_plus_weight"))
    assert float(normed[0]) == 1.5078125


@pytest.mark.parametrize(("ours", "theirs"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_activations_are_those_of_transformers(ours, theirs):
    x = np.linspace(-12, 12, 301, dtype=np.float32)
    np.testing.assert_allclose(activate(x, ours), ACT2FN[theirs](torch.tensor(x)), rtol=1e-5, atol=2e-6)
