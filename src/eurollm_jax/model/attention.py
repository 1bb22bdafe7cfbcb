"""Scaled dot-product attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

What may be attended is one boolean mask, made here: in training from the documents of a packed row, in generation from
how far the cache is filled.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def document_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s is no later than t and belongs to the same document."""
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(head_dim)) v, each of the G key/value heads serving H/G query heads; softmax in float32.

    Every query must be allowed at least one key.
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, head_dim)
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, value).reshape(query.shape)
