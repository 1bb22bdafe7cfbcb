"""Scaled dot-product attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

`packed_attention` is for training rows: causal, within the documents of a packed row. Several implementations compute
it, and `attention_choice` says which one a model takes on which devices, and why.
`attention` takes any mask; generation uses it with one made of how far the cache is filled. A sliding window narrows
either (Beltagy et al. 2020, arXiv:2004.05150).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.errors import UserError
from eurollm_jax.model.attention_blockwise import OUTSIDE, blockwise
from eurollm_jax.model.config import AttentionKernel, TransformerConfig
from eurollm_jax.model.layers import soft_cap
from eurollm_jax.model.remat import of_attention
from eurollm_jax.parallel.mesh import ACTIVATION_AXES, Layout

AMPERE = 8.0
PALLAS_HEAD_DIM = 128  # up to which its tiles were measured
HOPPER = 9.0  # compute capability from which on cuDNN's attention takes heads of 256 dimensions in place of 128


def attention_choice(c: TransformerConfig, layout: Layout) -> tuple[AttentionKernel, str]:
    """How attention is computed in training, and why so.

    Raises UserError where the configuration names an implementation that cannot compute it on these devices.
    """
    kernel, backend = c.attention_kernel, layout.backend
    obstacles = {"pallas": _pallas_obstacle(c, layout), "cudnn": _cudnn_obstacle(c, layout)}
    match kernel:
        case "auto" if backend == "cuda" and obstacles["pallas"] is None:
            return "pallas", "the fused kernel that leaves out what lies outside of a document"
        case "auto" if backend == "cuda" and obstacles["cudnn"] is None:
            return "cudnn", f"the fused kernel with documents as a mask; pallas cannot: {obstacles['pallas']}"
        case "auto" if backend == "cuda":
            return "blockwise", f"pallas cannot: {obstacles['pallas']}; nor can cudnn: {obstacles['cudnn']}"
        case "auto":
            return "blockwise", f"the default on {backend}"
        case "pallas" | "cudnn" if (obstacle := obstacles[kernel]) is not None:
            raise UserError(
                f"model: attention_kernel={kernel!r} cannot compute this model's attention: {obstacle}. "
                "Choose 'auto' or 'blockwise'."
            )
        case _:
            return kernel, "named by attention_kernel"


def _pallas_obstacle(c: TransformerConfig, layout: Layout) -> str | None:
    """What keeps the kernel of attention_pallas.py from computing attention as configured, if anything does."""
    if (obstacle := _of_every_fused_kernel(c, layout)) is not None:
        return obstacle
    if c.head_dim > PALLAS_HEAD_DIM:
        return f"it takes heads of up to {PALLAS_HEAD_DIM} dimensions, and head_dim={c.head_dim}"
    return None


def _of_every_fused_kernel(c: TransformerConfig, layout: Layout) -> str | None:
    if layout.backend != "cuda":
        return f"it runs on NVIDIA GPUs (cuda), and this program is for {layout.backend}"
    if c.compute != "bfloat16":
        return f"it takes bfloat16, and compute={c.compute!r}"
    capability = float(getattr(layout.device, "compute_capability", AMPERE))
    if capability < AMPERE:
        return f"it needs compute capability {AMPERE} (Ampere), and this device has {capability}"
    return None


def _cudnn_obstacle(c: TransformerConfig, layout: Layout) -> str | None:
    """What keeps cuDNN from computing attention as configured, if anything does."""
    if (obstacle := _of_every_fused_kernel(c, layout)) is not None:
        return obstacle
    if c.attention_cap is not None:
        return f"it has no soft cap, and attention_cap={c.attention_cap}"
    capability = float(getattr(layout.device, "compute_capability", AMPERE))
    most = 256 if capability >= HOPPER else 128
    if c.head_dim % 8 or c.head_dim > most:
        return f"it takes heads of up to {most} dimensions in steps of 8, and head_dim={c.head_dim}"
    return None


def packed_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G K"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float | None,
    cap: float | None,
    kernel: AttentionKernel,
    layout: Layout,
) -> Float[Array, "B T H K"]:
    """Causal attention within the segments of each row; padding, segment 0, is a segment like the others.

    The result is named for policies of rematerialisation, by `of_attention`, and so is what else `blockwise` keeps.

    Each device computes its own rows, heads and queries. Where rows are split along the sequence, it gathers the keys
    and values of the others; in the backward pass their gradients are summed and dealt out again.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    context = ACTIVATION_AXES["sequence"]
    split = layout.ways("sequence") > 1

    def on_one_device(query: Array, key: Array, value: Array, segments: Array) -> Array:
        start: Array | int = 0
        all_segments = segments
        if split:
            start = jax.lax.axis_index(context) * query.shape[1]
            key, value, all_segments = (
                jax.lax.all_gather(x, context, axis=1, tiled=True) for x in (key, value, segments)
            )
        match kernel:
            case "blockwise":
                how = dict(window=window, scale=scale, cap=cap, backend=layout.backend)
                return blockwise(query, key, value, segments, all_segments, start, **how)  # type: ignore[arg-type]
            case "pallas":
                from eurollm_jax.model.attention_pallas import pallas_attention  # half a second, for GPUs alone

                how = dict(window=window, scale=scale, cap=cap)
                return pallas_attention(query, key, value, segments, all_segments, start, **how)  # type: ignore[arg-type]
            case "cudnn":
                whole = not split
                return of_attention(_cudnn(query, key, value, segments, all_segments, start, window, scale, whole))
            case "reference":
                mask = _document_mask(segments, all_segments, start, window)
                return of_attention(attention(query, key, value, mask, scale=scale, cap=cap))

    queries = layout.activation(("batch", "sequence", "heads", "head_dim")).spec
    keys = layout.activation(("batch", "sequence", "kv_heads", "head_dim")).spec
    rows = layout.activation(("batch", "sequence")).spec
    sharded = jax.shard_map(
        on_one_device, mesh=layout.mesh, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False
    )
    return sharded(query, key, value, segments)


# ------------------------------------------------------------------------------------------------ with any mask


def causal_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"] | Int[Array, "S"], window: int | None
) -> Bool[Array, "B T S"]:
    """True where the query at one place may see the key at another: no later, and among the last `window` places."""
    behind = queries[..., :, None] - keys[..., None, :]
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def document_mask(segments: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s is no later than t and belongs to the same document."""
    return _document_mask(segments, segments, 0, window)


def _document_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], start: Array | int, window: int | None
) -> Bool[Array, "B T S"]:
    """The same for queries whose first stands at place `start` of the keys' row."""
    queries, keys = jnp.arange(query_segments.shape[1])[None] + start, jnp.arange(key_segments.shape[1])[None]
    return causal_mask(queries, keys, window) & (query_segments[:, :, None] == key_segments[:, None, :])


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


# --------------------------------------------------------------------------------------------------------- cuDNN


def _cudnn(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    start: Array | int,
    window: int | None,
    scale: float,
    whole: bool,
) -> Float[Array, "B T H K"]:
    """cuDNN's fused attention, which never holds the scores of a head at once.

    Documents, window and order are one mask, [B, 1, T, S], added in the type of the query: jax.nn gives packed offsets
    no name. Where the rows are `whole`, query t stands at key t, and cuDNN may skip what lies above the diagonal.
    """
    length = query.shape[1]
    query, key, value = (_even(x) for x in (query, key, value))
    mask = _document_mask(_even(query_segments, OUTSIDE), _even(key_segments, OUTSIDE), start, window)
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=scale, is_causal=whole, implementation="cudnn"
    )
    return attended[:, :length]


def _even(x: Array, fill: int = 0) -> Array:
    """With a place more where the length is odd: cuDNN takes a mask of even lengths only."""
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
