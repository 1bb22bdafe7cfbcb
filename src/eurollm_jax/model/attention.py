"""Scaled dot-product attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

What may be attended is one boolean mask, made here: in training from the documents of a packed row, in generation from
how far the cache is filled. A sliding window narrows either (Beltagy et al. 2020, arXiv:2004.05150).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.model.layers import soft_cap


def causal_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"] | Int[Array, "S"], window: int | None
) -> Bool[Array, "B T S"]:
    """True where the query at one place may see the key at another: no later, and among the last `window` places."""
    behind = queries[..., :, None] - keys[..., None, :]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def document_mask(segments: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s is no later than t and belongs to the same document."""
    places = jnp.arange(segments.shape[1])[None]
    return causal_mask(places, places, window) & (segments[:, :, None] == segments[:, None, :])


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(scale q k^T) v, each of the G key/value heads serving H/G query heads; softmax in float32.

    `scale` is head_dim^-1/2 unless given; with `cap`, products become cap * tanh(product / cap). Every query must be
    allowed at least one key.
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], soft_cap(scores, cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, value).reshape(query.shape)
