"""The small pure functions that a decoder block is made of.

Shapes: B batch, T sequence, D embed, H heads, K kv heads, F mlp, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * gain, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * gain.astype(x.dtype)


def linear(x: Float[Array, "..."], weight: Float[Array, "..."], contract: int = 1) -> Float[Array, "..."]:
    """Product over the last `contract` axes of x and the first of the weight.

    It is computed as one product of two matrices: with the leading axes (batch, sequence) left apart, XLA on CPU takes
    several times as long over the weight's gradient. Accelerators lower both forms to the same product.
    """
    lead, inner = x.shape[: x.ndim - contract], math.prod(weight.shape[:contract])
    flat = x.reshape(-1, inner) @ weight.reshape(inner, -1)
    return flat.reshape(*lead, *weight.shape[contract:])


def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def rotary_tables(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of position * theta^(-2i/head_dim) (Su et al. 2021, arXiv:2104.09864), [B, T, 1, K/2] float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # In numpy: a power in float32 is off by up to 1e-6 and differs between devices, 4e-3 radians at position 4096.
    frequencies = (1 / theta ** exponents.astype(np.float64)).astype(np.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H K"], tables: tuple[Array, Array]) -> Float[Array, "B T H K"]:
    """Rotates the pairs (i, i + head_dim/2), which is how the Llama family of Hugging Face lays them out."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
