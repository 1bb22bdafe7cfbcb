"""The small pure functions that a decoder block is made of.

Shapes: B batch, T sequence, D embed, H heads, K head_dim, F mlp.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eurollm_jax.model.config import Activation, LinearScaling, Llama3Scaling, Norm, Rope, YarnScaling

XIELU_BETA = 0.5  # slope of xIELU at 0, and the least by which its left side falls
XIELU_START = 0.8  # of both learnt slopes


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], norm: Norm) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * gain, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    if norm.gain == "one_plus_weight":
        return (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


def linear(
    x: Float[Array, "..."], weight: Float[Array, "..."], contract: int = 1, *, apart: bool = False
) -> Float[Array, "..."]:
    """Product over the last `contract` axes of x and the first of the weight.

    It is computed as one product of two matrices: with the leading axes (batch, sequence) left apart, XLA on CPU takes
    several times as long over the weight's gradient. Accelerators lower both forms to the same product. But they must
    stay `apart` where devices have parts of the sequence: merged with the batch it cannot stay split, and each device
    would multiply all of it.
    """
    lead, inner = x.shape[: x.ndim - contract], math.prod(weight.shape[:contract])
    rows = lead if apart else (math.prod(lead),)
    product = x.reshape(*rows, inner) @ weight.reshape(inner, -1)
    return product.reshape(*lead, *weight.shape[contract:])


def biased(x: Float[Array, "..."], w: Mapping[str, Any], name: str) -> Float[Array, "..."]:
    """The product with the matrix `name` and its bias, where the weights have one."""
    bias = w.get(f"{name}_bias")
    return x if bias is None else x + bias


def activate(x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


def xielu(
    x: Float[Array, "..."], alpha_positive: Float[Array, "1"], alpha_negative: Float[Array, "1"]
) -> Float[Array, "..."]:
    """The integral of an ELU, with learnt slopes (Huang & Schlag 2024, arXiv:2411.13010, equation 6).

    Right of 0 it is `a x^2 + beta x`, left of it `b (e^x - 1 - x) + beta x`, with a and b - beta above 0.
    """
    up = jax.nn.softplus(alpha_positive)
    down = XIELU_BETA + jax.nn.softplus(alpha_negative)
    left = jnp.minimum(x, -1e-6)  # the exponential's gradient must not overflow where it is not used
    return jnp.where(x > 0, up * jnp.square(x), down * (jnp.expm1(left) - x)) + XIELU_BETA * x


def xielu_start(side: Literal["positive", "negative"]) -> float:
    """What the learnt number starts at, so that the slope it stands for is `XIELU_START`."""
    return math.log(math.expm1(XIELU_START - (XIELU_BETA if side == "negative" else 0.0)))


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): about x where it is small, never beyond the cap (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotary_frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, "R/2"], float]:
    """The angle that each pair of dimensions turns by from one position to the next, and a factor on cosine and sine.

    In numpy: a power in float32 is off by up to 1e-6 and differs between devices, 4e-3 radians at position 4096.
    """
    turned = rope.turned(head_dim)
    plain = rope.theta ** -(np.arange(0, turned, 2, dtype=np.float64) / turned)
    match rope.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor):
            return plain / factor, 1.0
        case Llama3Scaling(factor, original, low, high):
            turns = original * plain / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return plain * kept + plain / factor * (1 - kept), 1.0
        case YarnScaling(factor, original, beta_fast, beta_slow, attention_factor, truncate):

            def pair_with(turns: float) -> float:
                """The (fractional) pair of dimensions that makes so many turns in the original positions."""
                return turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

            first, last = pair_with(beta_fast), pair_with(beta_slow)
            if truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, turned - 1)
            last = last + 0.001 if first == last else last
            divided = np.clip((np.arange(turned // 2) - first) / (last - first), 0, 1)
            grown = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            return plain * (1 - divided) + plain / factor * divided, attention_factor or grown


def rotary_tables(positions: Int[Array, "B T"], head_dim: int, rope: Rope) -> tuple[Array, Array]:
    """Cosine and sine of position * frequency, [B, T, 1, R/2] float32, where R of the head's dimensions are turned."""
    frequencies, factor = rotary_frequencies(rope, head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Float[Array, "B T H K"], tables: tuple[Array, Array] | None) -> Float[Array, "B T H K"]:
    """Turns the pairs (i, i + R/2) of the first R dimensions, which is how Hugging Face lays them out."""
    if tables is None:
        return x
    cos, sin = tables
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), x[..., turned:]], axis=-1)
