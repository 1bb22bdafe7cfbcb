"""Next-token cross-entropy that never holds the logits of a whole batch.

At a vocabulary of 262,144 the float32 logits of 16k tokens take 17 GB. So logits are made a few positions at a time.
The gradient is made in the same pass, while they are there: d loss / d logits = softmax - one_hot, which needs nothing
from above but one scalar, so the backward pass only scales what the forward pass has stored.

Shapes: B batch, T sequence, D embed, V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.layers import soft_cap
from eurollm_jax.model.moe import Routing
from eurollm_jax.model.param import Params
from eurollm_jax.model.transformer import forward, head
from eurollm_jax.parallel.mesh import Layout

LOGITS_AT_ONCE = {"cpu": 2**23}  # per device; few enough to stay near the cache of a CPU
LOGITS_AT_ONCE_ELSEWHERE = 2**28  # enough for large products: 1 GB in float32


class SourceSums(NamedTuple):
    """What was predicted of each source. Bits per byte are nats / bytes / ln 2 of such sums, never a mean of ratios."""

    nats: Float[Any, "S"]
    tokens: Int[Any, "S"]  # predictions that counted
    bytes: Int[Any, "S"]  # UTF-8 bytes that those tokens stand for


def batch_loss(
    params: Params, batch: Batch, config: TransformerConfig, layout: Layout, z_loss: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, "B T"], Routing | None]:
    """The loss summed over a batch, the nats of each position, and how the routers, if any, spread the tokens."""
    hidden, routing = forward(params, batch.tokens, batch.segments, batch.positions, config, layout)
    weight = head(params, config)
    total, nats = cross_entropy(
        hidden, weight, batch.targets, batch.mask, z_loss=z_loss, layout=layout, cap=config.logit_cap
    )
    return total, nats, routing


def sum_by_source(batch: Batch, nats: Float[Array, "B T"], token_bytes: Int[Array, "V"], sources: int) -> SourceSums:
    """Sums over the masked positions of each source's rows; `token_bytes` says how many bytes each token stands for."""

    def total(values: Array) -> Array:
        rows = jnp.sum(jnp.where(batch.mask, values, 0), axis=1)
        return jax.ops.segment_sum(rows, batch.source, sources)

    return SourceSums(total(nats), total(jnp.ones_like(batch.targets)), total(token_bytes[batch.targets]))


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    z_loss: float,
    layout: Layout,
    cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The loss summed over the masked positions, and each position's nats (zero where the mask is False).

    Only the sum is differentiable. It adds `z_loss * log(Z)^2` to each position (PaLM, arXiv:2204.02311), which the
    nats leave out. With `cap`, each logit is cap * tanh(product / cap). Products are in the type of `hidden`; sums and
    the head's gradient are in float32.
    """
    batch, length, _ = hidden.shape
    at_once = LOGITS_AT_ONCE.get(layout.backend, LOGITS_AT_ONCE_ELSEWHERE)
    per_position = batch * head.shape[1] // (layout.ways("batch") * layout.ways("vocab"))
    chunks = -(-length * per_position // at_once)
    chunk = -(-length // min(chunks, length))
    padding = [(0, 0), (0, -length % chunk)]
    total, nats = _summed(
        jnp.pad(hidden, [*padding, (0, 0)]),
        head,
        jnp.pad(targets, padding),
        jnp.pad(mask, padding),
        z_loss,
        cap,
        chunk,
        layout,
    )
    return total, nats[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _summed(hidden, head, targets, mask, z_loss, cap, chunk, layout):  # type: ignore[no-untyped-def]
    total, nats, _ = _by_chunks(hidden, head, targets, mask, z_loss, cap, chunk, layout, gradients=False)
    return total, nats


def _forward(hidden, head, targets, mask, z_loss, cap, chunk, layout):  # type: ignore[no-untyped-def]
    total, nats, gradients = _by_chunks(hidden, head, targets, mask, z_loss, cap, chunk, layout, gradients=True)
    return (total, nats), gradients


def _backward(z_loss, cap, chunk, layout, gradients, cotangents):  # type: ignore[no-untyped-def]
    d_total, _ = cotangents
    d_hidden, d_head = gradients
    return (d_total * d_hidden).astype(d_hidden.dtype), d_total * d_head, None, None


_summed.defvjp(_forward, _backward)


def _by_chunks(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    z_loss: float,
    cap: float | None,
    chunk: int,
    layout: Layout,
    gradients: bool,
) -> tuple[Array, Array, Any]:
    """Scans over chunks of the sequence axis, so that each device holds its own rows of every chunk.

    The head's gradient is kept apart for each part of the batch until the end: summed in the scan, it would cross the
    network once for each chunk.
    """
    batch, length, width = hidden.shape
    weight, parts = head.astype(hidden.dtype), layout.ways("batch")

    def split(x: Array) -> Array:  # [B, T, ...] -> [T/chunk, B, chunk, ...]
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    def merge(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])

    def step(carry: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        total, d_head = carry
        h, target, counted = part
        flat = h.reshape(-1, width)
        logits = jnp.dot(flat, weight, preferred_element_type=jnp.float32).reshape(batch, chunk, -1)
        logits = soft_cap(logits, cap)
        logits = layout.constrain(logits, "batch", "sequence", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = jnp.where(counted, log_z - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0], 0.0)
        total += jnp.sum(nats + z_loss * jnp.where(counted, jnp.square(log_z), 0.0))
        if not gradients:
            return (total, d_head), (nats, None)
        probability = jnp.exp(logits - log_z[..., None]) * (1.0 + 2.0 * z_loss * log_z)[..., None]
        one_hot = target[..., None] == jnp.arange(logits.shape[-1])
        d_logits = jnp.where(counted[..., None], probability - one_hot, 0.0)
        if cap is not None:
            d_logits *= 1 - jnp.square(logits / cap)  # of the product before the cap
        d_logits = d_logits.astype(h.dtype).reshape(-1, d_logits.shape[-1])
        d_h = jnp.dot(d_logits, weight.T).reshape(h.shape)
        by_part = flat.reshape(parts, -1, width), d_logits.reshape(parts, -1, d_logits.shape[-1])
        d_head += jnp.einsum("pnd,pnv->pdv", *by_part, preferred_element_type=jnp.float32)
        return (total, layout.constrain(d_head, "batch", "embed", "vocab")), (nats, d_h)

    zero = jnp.zeros((), jnp.float32)
    d_head = jnp.zeros((parts, *head.shape), jnp.float32) if gradients else zero
    (total, d_head), (nats, d_hidden) = jax.lax.scan(step, (zero, d_head), (split(hidden), split(targets), split(mask)))
    return total, merge(nats), (merge(d_hidden), d_head.sum(0)) if gradients else None
