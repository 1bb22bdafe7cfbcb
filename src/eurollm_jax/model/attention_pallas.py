"""Attention in one kernel for GPUs, forward and backward, which reads no block that lies outside of the documents.

cuDNN's attention takes documents as a mask: it computes every pair of blocks below the diagonal, whatever the mask
says. Here the keys that a query sees are an interval of its row, from where its document begins, or its window, up to
itself. So each block of queries meets the blocks of keys from its first query's first key to the diagonal, and each
block of keys the queries from the diagonal to the last one that sees any of it.

The softmax is kept up as blocks of keys come by, and the backward pass makes the scores again from the saved
log-sum-exp (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691): one kernel for the gradients of keys and
values, which goes over the queries and the query heads of a group, and one for those of the queries. Nothing is added
up by several programs, so results do not depend on their order.

The kernels are written with Pallas and compiled by Triton. Shapes: B rows, T queries, S keys, H heads, G key/value
heads, R = H / G, K head_dim; in kernels a tile of Q queries and one of P keys.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import exp2  # by name, so that a benchmark can put another in its place
from jaxtyping import Array, Float, Int

from eurollm_jax.model.remat import of_attention

NEVER = -0.7 * float(np.finfo(np.float32).max)  # a score that is not seen; finite, and so is the difference of two
LOG2E = math.log2(math.e)  # scores are kept in base 2: GPUs compute 2^x in one instruction
LEAST = 16  # the smallest side of a product that Triton takes


class Tile(NamedTuple):
    """How many queries and keys a program multiplies at once, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int  # of a loop's iterations, whose loads run ahead of their use


class Tiles(NamedTuple):
    """Of the three kernels. All sides are powers of two."""

    forward: Tile
    keys: Tile  # gradients of keys and values
    queries: Tile


# By the bytes of one head's vector. Larger tiles read keys and values less often, until what a program holds (a tile's
# sums in float32 in registers, its operands times the stages in shared memory) no longer fits. Documents favour small
# ones: a tile is computed whole when a single pair in it is seen. The first two rows are the fastest of 6 to 10 on an
# H100 (scripts/benchmarks/attention_gpu.py --tune); the others are guesses of what fits.
TILES = {
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    512: Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)),
    1024: Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
}


class _How(NamedTuple):
    """What is known when the program is made."""

    scale: float
    cap: float | None
    tiles: Tiles
    interpret: bool


def pallas_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    start: Int[Array, ""] | int,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "B T H K"]:
    """Causal attention within segments, of queries whose first stands at place `start` of the keys' row.

    A segment is one run of equal numbers, as the loader makes documents and padding; where a number comes back after
    another one, a second segment begins. (`blockwise` and `reference` would let it see the first.) `query_segments` is
    not read, being the part of `key_segments` from `start` on. Products are of the operands' type and summed in
    float32. `interpret` computes without a GPU, for tests.
    """
    del query_segments
    length, head_dim = query.shape[1], query.shape[3]
    width = max(LEAST, pl.next_power_of_2(head_dim))
    tiles = _fitting(tiles or TILES[max(128, width * query.dtype.itemsize)], length, key.shape[1])
    query = _filled(query, max(tile.queries for tile in tiles), width)
    key, value = (_filled(x, max(tile.keys for tile in tiles), width) for x in (key, value))
    start = jnp.asarray(start, jnp.int32)
    first = _first_keys(key_segments, start, length, window)
    # Queries that fill up the last tile see themselves, or the last key: no sum of weights is zero.
    filling = jnp.minimum(start + jnp.arange(length, query.shape[1], dtype=jnp.int32), key.shape[1] - 1)
    first = jnp.concatenate([first, jnp.broadcast_to(filling, (len(first), len(filling)))], axis=1)
    how = _How(scale, cap, tiles, interpret)
    return _attend(query, key, value, of_attention(first), start[None], how)[:, :length, :, :head_dim]


def _fitting(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """No larger than the row."""
    queries, keys = (max(LEAST, pl.next_power_of_2(length)) for length in (queries, keys))
    return Tiles(*(t._replace(queries=min(t.queries, queries), keys=min(t.keys, keys)) for t in tiles))


def _filled(x: Float[Array, "B L N K"], multiple: int, width: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, width - x.shape[3])])


def _first_keys(segments: Int[Array, "B S"], start: Array, length: int, window: int | None) -> Int[Array, "B T"]:
    """The place of the first key that each query sees; from one query to the next it never falls."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, places - (window - 1))
    return jax.lax.dynamic_slice_in_dim(first, start, length, axis=1)


# ------------------------------------------------------------------------------------------ forward and backward


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query: Array, key: Array, value: Array, first: Array, start: Array, how: _How) -> Array:
    return _attend_forward(query, key, value, first, start, how)[0]


def _attend_forward(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    first: Int[Array, "B T"],
    start: Int[Array, "1"],
    how: _How,
) -> tuple[Array, tuple[Array, ...]]:
    """What is attended, and the log-sum-exp of each query's scores, in base 2."""
    rows, length, heads, _ = query.shape
    tile = how.tiles.forward
    own, whole, per_query = _by_query(query, key, tile)
    attended, logsumexp_BHT = _call(
        _forward_kernel,
        "attention_forward",
        (length // tile.queries, heads, rows),
        [_scalar(), _first_of(tile), own, whole, whole],
        [own, per_query],
        [query, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)],
        tile,
        how,
    )(start, first, query, key, value)
    attended, logsumexp_BHT = of_attention(attended), of_attention(logsumexp_BHT)
    return attended, (query, key, value, first, start, attended, logsumexp_BHT)


def _attend_backward(how: _How, kept: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    query, key, value, first, start, attended, logsumexp_BHT = kept
    inner = jnp.sum(attended.astype(jnp.float32) * grad.astype(jnp.float32), -1).swapaxes(1, 2)
    arrays = (query, key, value, grad, logsumexp_BHT, inner)
    dk, dv = _key_gradients(start, first, *arrays, how)
    return _query_gradients(start, first, *arrays, how), dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _key_gradients(start: Array, first: Array, query: Array, key: Array, *others: Any) -> tuple[Array, Array]:
    *arrays, how = others
    rows, length, heads, width = query.shape
    keys, groups = key.shape[1:3]
    repeats, tile = heads // groups, how.tiles.keys
    ends = jnp.arange(1, keys // tile.keys + 1, dtype=jnp.int32) * tile.keys
    end_queries = jnp.sum(first[:, None, :] < ends[:, None], axis=2, dtype=jnp.int32)  # seeing any key of a tile
    own = pl.BlockSpec((None, tile.keys, None, width), lambda j, g, b: (b, j, g, 0))
    whole = pl.BlockSpec((None, length, repeats, width), lambda j, g, b: (b, 0, g, 0))
    per_query = pl.BlockSpec((None, repeats, length), lambda j, g, b: (b, g, 0))
    return _call(
        _key_kernel,
        "attention_key_gradients",
        (keys // tile.keys, groups, rows),
        [
            _scalar(),
            pl.BlockSpec((None, length), lambda j, g, b: (b, 0)),
            pl.BlockSpec((None, 1), lambda j, g, b: (b, j)),
            *(whole, own, own, whole, per_query, per_query),
        ],
        [own, own],
        [key, arrays[0]],
        tile,
        how,
    )(start, first, end_queries, query, key, *arrays)


def _query_gradients(start: Array, first: Array, query: Array, key: Array, *others: Any) -> Array:
    *arrays, how = others
    rows, length, heads, _ = query.shape
    tile = how.tiles.queries
    own, whole, per_query = _by_query(query, key, tile)
    return _call(
        _query_kernel,
        "attention_query_gradients",
        (length // tile.queries, heads, rows),
        [_scalar(), _first_of(tile), own, whole, whole, own, per_query, per_query],
        own,
        query,
        tile,
        how,
    )(start, first, query, key, *arrays)


def _call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    in_specs: Any,
    out_specs: Any,
    out: Any,
    tile: Tile,
    how: _How,
) -> Callable[..., Any]:
    """Programs that differ in the first index of the grid run side by side and find each other's keys in the cache."""
    return pl.pallas_call(
        partial(kernel, tile=tile, how=how),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=how.interpret,
        name=name,
    )


def _scalar() -> pl.BlockSpec:
    return pl.BlockSpec((1,), lambda *_: (0,))


def _first_of(tile: Tile) -> pl.BlockSpec:
    return pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, i))


def _by_query(query: Array, key: Array, tile: Tile) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """What a program of a tile of queries reads: of its head, of all keys of its group, of one number a query."""
    heads, width = query.shape[2:]
    keys, groups = key.shape[1:3]
    return (
        pl.BlockSpec((None, tile.queries, None, width), lambda i, h, b: (b, i, h, 0)),
        pl.BlockSpec((None, keys, None, width), lambda i, h, b: (b, 0, h // (heads // groups), 0)),
        pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, i)),
    )


# ------------------------------------------------------------------------------------------------------- kernels


def _forward_kernel(*refs: Any, tile: Tile, how: _How) -> None:
    start_ref, first_ref, q_ref, k_ref, v_ref, out_ref, sum_ref = refs
    q_QK, first_Q = q_ref[...], first_ref[...]
    begin, end, places_Q = _visited(start_ref, first_ref, k_ref, tile)

    def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most_Q, total_Q, sums_QK = carry
        keys = pl.ds(j * tile.keys, tile.keys)
        products_QP = plt.dot(q_QK, k_ref[keys, :], trans_b=True)
        seen_QP = _seen(_places(j, tile.keys)[None, :], first_Q[:, None], places_Q[:, None])
        scores_QP, _ = _scores(products_QP, seen_QP, how)
        new_Q = jnp.maximum(most_Q, jnp.max(scores_QP, 1))
        weights_QP, shrink_Q = exp2(scores_QP - new_Q[:, None]), exp2(most_Q - new_Q)
        total_Q = total_Q * shrink_Q + jnp.sum(weights_QP, 1)
        sums_QK = sums_QK * shrink_Q[:, None] + plt.dot(weights_QP.astype(v_ref.dtype), v_ref[keys, :])
        return new_Q, total_Q, sums_QK

    none_Q = jnp.zeros(first_Q.shape, jnp.float32)
    carry = none_Q + NEVER, none_Q, jnp.zeros(q_QK.shape, jnp.float32)
    most_Q, total_Q, sums_QK = jax.lax.fori_loop(begin, end, body, carry)
    out_ref[...] = (sums_QK / total_Q[:, None]).astype(out_ref.dtype)
    sum_ref[...] = most_Q + jnp.log2(total_Q)


def _query_kernel(*refs: Any, tile: Tile, how: _How) -> None:
    start_ref, first_ref, q_ref, k_ref, v_ref, grad_ref, sum_ref, inner_ref, dq_ref = refs
    q_QK, grad_QK, first_Q = q_ref[...], grad_ref[...], first_ref[...]
    logsumexp_Q, inner_Q = sum_ref[...], inner_ref[...]
    begin, end, places_Q = _visited(start_ref, first_ref, k_ref, tile)

    def body(j: Array, dq_QK: Array) -> Array:
        keys = pl.ds(j * tile.keys, tile.keys)
        k_PK = k_ref[keys, :]
        seen_QP = _seen(_places(j, tile.keys)[None, :], first_Q[:, None], places_Q[:, None])
        scores_QP, slopes_QP = _scores(plt.dot(q_QK, k_PK, trans_b=True), seen_QP, how)
        dweights_QP = plt.dot(grad_QK, v_ref[keys, :], trans_b=True)
        dscores_QP = exp2(scores_QP - logsumexp_Q[:, None]) * (dweights_QP - inner_Q[:, None]) * slopes_QP
        return dq_QK + plt.dot(dscores_QP.astype(k_PK.dtype), k_PK)

    dq_QK = jax.lax.fori_loop(begin, end, body, jnp.zeros(q_QK.shape, jnp.float32))
    dq_ref[...] = (dq_QK * how.scale).astype(dq_ref.dtype)


def _key_kernel(*refs: Any, tile: Tile, how: _How) -> None:
    """One loop over the tiles of queries of one head after the other, so that loads run ahead across heads as well."""
    start_ref, first_ref, end_ref, q_ref, k_ref, v_ref, grad_ref, sum_ref, inner_ref, dk_ref, dv_ref = refs
    k_PK, v_PK = k_ref[...], v_ref[...]
    j, start = pl.program_id(0), start_ref[0]
    keys_P = _places(j, tile.keys)
    begin = jax.lax.div(jnp.maximum(j * tile.keys - start, 0), tile.queries)
    count = jnp.maximum(jax.lax.div(end_ref[0] + (tile.queries - 1), tile.queries) - begin, 0)

    def body(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_PK, dv_PK = carry
        head = jax.lax.div(n, count)
        i = begin + n - head * count
        queries = pl.ds(i * tile.queries, tile.queries)
        q_QK, grad_QK = q_ref[queries, head, :], grad_ref[queries, head, :]
        seen_PQ = _seen(keys_P[:, None], first_ref[queries][None, :], start + _places(i, tile.queries)[None, :])
        scores_PQ, slopes_PQ = _scores(plt.dot(k_PK, q_QK, trans_b=True), seen_PQ, how)
        weights_PQ = exp2(scores_PQ - sum_ref[head, queries][None, :])
        dv_PK = dv_PK + plt.dot(weights_PQ.astype(grad_QK.dtype), grad_QK)
        dweights_PQ = plt.dot(v_PK, grad_QK, trans_b=True)
        dscores_PQ = weights_PQ * (dweights_PQ - inner_ref[head, queries][None, :]) * slopes_PQ
        return dk_PK + plt.dot(dscores_PQ.astype(q_QK.dtype), q_QK), dv_PK

    zero_PK = jnp.zeros(k_PK.shape, jnp.float32)
    dk_PK, dv_PK = jax.lax.fori_loop(0, count * q_ref.shape[1], body, (zero_PK, zero_PK))
    dk_ref[...] = (dk_PK * how.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_PK.astype(dv_ref.dtype)


def _visited(start_ref: Any, first_ref: Any, k_ref: Any, tile: Tile) -> tuple[Array, Array, Int[Array, "Q"]]:
    """The tiles of keys that this program's queries see, from the first to the one before the end; the queries' places.

    The first query sees furthest back, the last one furthest ahead; no tile lies beyond the keys.
    """
    i, start = pl.program_id(0), start_ref[0]
    end = jax.lax.div(start + (i + 1) * tile.queries + (tile.keys - 1), tile.keys)
    end = jnp.minimum(end, k_ref.shape[0] // tile.keys)
    return jax.lax.div(first_ref[0], tile.keys), end, start + _places(i, tile.queries)


def _places(index: Array, size: int) -> Int[Array, "size"]:
    return index * size + jnp.arange(size, dtype=jnp.int32)


def _seen(keys: Array, first: Array, last: Array) -> Array:
    return (keys >= first) & (keys <= last)


def _scores(products: Array, seen: Array, how: _How) -> tuple[Array, Array | float]:
    """From products to scores in base 2, `NEVER` where not seen; and the soft cap's derivative."""
    if how.cap is None:
        return jnp.where(seen, products * (how.scale * LOG2E), NEVER), 1.0
    tanh = jnp.tanh(products * (how.scale / how.cap))
    return jnp.where(seen, tanh * (how.cap * LOG2E), NEVER), 1 - tanh * tanh
