"""Next-token cross-entropy that never holds the logits of a whole batch.

At a vocabulary of 262,144 the float32 logits of 16k tokens take 17 GB. So logits are made a few positions at a time.
The gradient is made in the same pass, while they are there: d loss / d logits = softmax - one_hot, which needs nothing
from above but one scalar, so the backward pass only scales what the forward pass has stored.

Shapes: B batch, T sequence, D embed, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.layers import soft_cap
from eurollm_jax.model.moe import Routing
from eurollm_jax.model.param import Params
from eurollm_jax.model.transformer import forward, head
from eurollm_jax.parallel.cpu_features import multiplies_bfloat16
from eurollm_jax.parallel.mesh import Layout

LOGITS_AT_ONCE = {"cpu": 2**25}  # per device; with fewer, products become small
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
    nats leave out. With `cap`, each logit is cap * tanh(product / cap). Products are in the type of `hidden`, or in
    float32 where that is as fast; sums and the head's gradient are in float32. A target beyond the vocabulary makes the
    loss NaN.
    """
    return _summed(hidden, head, targets, mask, _Options(z_loss, cap, layout))


@dataclass(frozen=True)
class _Options:
    z_loss: float
    cap: float | None
    layout: Layout


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(hidden, head, targets, mask, options):  # type: ignore[no-untyped-def]
    return _on_all_devices(hidden, head, targets, mask, options, gradients=False)


def _forward(hidden, head, targets, mask, options):  # type: ignore[no-untyped-def]
    total, nats, *gradients = _on_all_devices(hidden, head, targets, mask, options, gradients=True)
    return (total, nats), gradients


def _backward(options, gradients, cotangents):  # type: ignore[no-untyped-def]
    d_total, _ = cotangents
    d_hidden, d_head = gradients
    return (d_total * d_hidden).astype(d_hidden.dtype), d_total * d_head, None, None


_summed.defvjp(_forward, _backward)


def _on_all_devices(
    hidden: Array, head: Array, targets: Array, mask: Array, options: _Options, *, gradients: bool
) -> tuple[Array, ...]:
    """The sum and the nats; with `gradients`, those of `hidden` and `head` too.

    Each device has its own tokens and its own part of the vocabulary. Of a token, the parts of the vocabulary meet as a
    maximum and two sums. The gradient of `hidden` is added up over the parts of the vocabulary, that of the head over
    the parts of the batch, and each crosses the network once.
    """
    layout = options.layout
    products = _type_of_products(hidden.dtype, layout)
    rows = layout.activation(("batch", "sequence")).spec
    residual = layout.activation(("batch", "residual_sequence", "embed"), hidden.shape).spec
    parameter = layout.parameter(("embed", "vocab"))
    embed_axes, vocab_axes = (layout.splitting(axes) for axes in parameter.spec)
    token_axes = tuple(name for axes in rows for name in layout.splitting(axes))
    other_axes = tuple(name for name in token_axes if name not in embed_axes)  # in order: it is part of the program

    def local(hidden: Array, weight: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
        summed, nats, d_hidden, d_weight = _by_chunks(hidden, weight, targets, mask, vocab_axes, options, gradients)
        sums = jax.lax.psum(summed, token_axes), nats
        if not gradients:
            return sums
        if layout.splitting(residual[1]) == layout.splitting(rows[1]):
            d_hidden = jax.lax.psum(d_hidden, vocab_axes)
        else:
            d_hidden = jax.lax.psum_scatter(d_hidden, vocab_axes, scatter_dimension=1, tiled=True)
        d_weight = jax.lax.psum_scatter(d_weight, embed_axes, scatter_dimension=0, tiled=True)
        return *sums, d_hidden, jax.lax.psum(d_weight, other_axes)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(rows, PartitionSpec(None, parameter.spec[1]), rows, rows),
        out_specs=(PartitionSpec(), rows, residual, parameter.spec) if gradients else (PartitionSpec(), rows),
        check_vma=False,
    )(hidden, jax.lax.with_sharding_constraint(head.astype(products), parameter), targets, mask)


def _type_of_products(dtype: Any, layout: Layout) -> Any:
    """On a CPU without units for matrices of bfloat16, XLA multiplies them as float32, and would keep a copy of the
    whole head for it."""
    return dtype if layout.backend != "cpu" or multiplies_bfloat16() else jnp.dtype(jnp.float32)


def _by_chunks(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    vocab_axes: tuple[str, ...],
    options: _Options,
    gradients: bool,
) -> tuple[Array, Array, Any, Any]:
    """One device's part: sum and nats of its tokens, and what its tokens and its part of the vocabulary add to the
    gradients; a few tokens at a time."""
    tokens, width, vocab = targets.size, *weight.shape
    at_once = LOGITS_AT_ONCE.get(options.layout.backend, LOGITS_AT_ONCE_ELSEWHERE)
    chunks = min(-(-tokens * vocab // at_once), tokens)
    chunk = -(-tokens // chunks)
    vocabulary = vocab * options.layout.ways("vocab")
    column = jnp.arange(vocab) + vocab * jax.lax.axis_index(vocab_axes)

    def split(x: Array) -> Array:
        flat = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(flat, [(0, chunks * chunk - tokens), *[(0, 0)] * (flat.ndim - 1)]).reshape(
            chunks, chunk, *flat.shape[1:]
        )

    def merge(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:tokens].reshape(*targets.shape, *x.shape[2:])

    def step(carry: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        total, d_weight = carry
        h, target, counted = part
        h = h.astype(weight.dtype)
        logits = soft_cap(jnp.dot(h, weight, preferred_element_type=jnp.float32), options.cap)
        is_target = column == target[:, None]
        highest = jax.lax.pmax(jnp.max(logits, axis=-1), vocab_axes)
        powers = jnp.exp(logits - highest[:, None])
        sums = jnp.sum(powers, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        power, of_target = jax.lax.psum(sums, vocab_axes)
        of_target = jnp.where((target >= 0) & (target < vocabulary), of_target, jnp.nan)
        log_z = highest + jnp.log(power)
        nats = jnp.where(counted, log_z - of_target, 0.0)
        total += jnp.sum(nats + options.z_loss * jnp.where(counted, jnp.square(log_z), 0.0))
        if not gradients:
            return (total, d_weight), (nats, None)
        share = jnp.where(counted, (1.0 + 2.0 * options.z_loss * log_z) / power, 0.0)
        d_logits = powers * share[:, None] - jnp.where(is_target, counted[:, None], 0.0)
        if options.cap is not None:
            d_logits *= 1 - jnp.square(logits / options.cap)  # of the product before the cap
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.dot(d_logits, weight.T).astype(hidden.dtype)
        # The small operand is turned on its own: folded into the product, its transposition costs more than it.
        turned = jax.lax.optimization_barrier(h.T)
        d_weight += jnp.dot(turned, d_logits, preferred_element_type=jnp.float32)
        return (total, d_weight), (nats, d_h)

    zero = jnp.zeros((), jnp.float32)
    d_weight = jnp.zeros((width, vocab), jnp.float32) if gradients else zero
    (total, d_weight), (nats, d_hidden) = jax.lax.scan(
        step, (zero, d_weight), (split(hidden), split(targets), split(mask))
    )
    return total, merge(nats), merge(d_hidden) if gradients else None, d_weight
