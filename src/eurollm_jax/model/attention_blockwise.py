"""Attention in blocks of queries and keys, which never holds all scores at once, in operations of XLA alone.

The softmax over a query's keys is kept up as blocks of keys come by (Milakov & Gimelshein 2018, arXiv:1805.02867); the
backward pass makes the scores again from the saved log-sum-exp (Dao et al. 2022, arXiv:2205.14135). Pairs of blocks in
which no query may see a key are left out: those above the diagonal, those behind the window, those of other documents.

A block of scores has keys as rows and queries as columns. Then each of the seven products contracts the last axis of
its left operand, which XLA on CPU does up to three times as fast as the first, and the softmax reduces over rows, which
it vectorises. The query heads that share a key/value head stand side by side as columns, so no key is repeated.

Shapes: N rows, T queries, S keys, H heads, G key/value heads, R = H / G, K head_dim; I blocks of queries with C = R *
queries columns each, J blocks of P keys each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eurollm_jax.model.layers import soft_cap
from eurollm_jax.model.remat import of_attention
from eurollm_jax.parallel.mesh import Backend

NEVER = -0.7 * float(np.finfo(np.float32).max)  # a score that is not seen; finite, and so is the difference of two
OUTSIDE = -1  # segment of the places that fill up the last block

CPU_BLOCK = 128  # scores of eight heads take 0.5 MB, a part of a core's cache
ACCELERATOR_BLOCK = 512


class _How(NamedTuple):
    """What is known when the program is made: what is computed, and in what pieces."""

    window: int | None
    scale: float
    cap: float | None
    queries: int  # in a block
    keys: int
    rows: int | None  # that are computed at once; None: all
    products: Any  # type of the operands


class _Visits(NamedTuple):
    """Which blocks of the other kind each block is computed with: from the first to the one before the end."""

    first_keys: Int[Array, "N I"]
    end_keys: Int[Array, "N I"]
    first_queries: Int[Array, "N J"]
    end_queries: Int[Array, "N J"]


def blockwise(
    query: Float[Array, "N T H K"],
    key: Float[Array, "N S G K"],
    value: Float[Array, "N S G K"],
    query_segments: Int[Array, "N T"],
    key_segments: Int[Array, "N S"],
    start: Int[Array, ""] | int,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    backend: Backend,
) -> Float[Array, "N T H K"]:
    """Causal attention within segments, of queries whose first stands at place `start` of the keys' row.

    On CPU one row is computed at a time, so that its blocks stay in the cache, with products in float32: those of
    bfloat16 are no faster at this size. Elsewhere all rows are computed at once, in the type of the query.
    """
    cpu = backend == "cpu"
    most = CPU_BLOCK if cpu else ACCELERATOR_BLOCK
    queries, keys = _block_size(query.shape[1], most), _block_size(key.shape[1], most)
    how = _How(window, scale, cap, queries, keys, 1 if cpu else None, jnp.float32 if cpu else query.dtype)
    query_segments, key_segments = _filled(query_segments, queries, OUTSIDE), _filled(key_segments, keys, OUTSIDE)
    start = jnp.asarray(start, jnp.int32)
    visits = _visits(query_segments, key_segments, start, how)
    rows = (_filled(query, queries), _filled(key, keys), _filled(value, keys), query_segments, key_segments, visits)
    return _attend(*rows, start, how)[:, : query.shape[1]]


def _block_size(length: int, most: int) -> int:
    """At most `most`, a multiple of 8, and such that the last block is about full."""
    count = math.ceil(length / most)
    return 8 * math.ceil(length / count / 8)


def _filled(x: Array, size: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _visits(query_segments: Array, key_segments: Array, start: Array, how: _How) -> _Visits:
    """Blocks meet that hold a query and a key which could be of one document, the key neither ahead nor too far behind.

    Segments are compared by the least and the greatest of each block: no pair is missed, in whatever order they come.
    """
    q_segments = query_segments.reshape(len(query_segments), -1, 1, how.queries)
    k_segments = key_segments.reshape(len(key_segments), 1, -1, how.keys)
    meet = (q_segments.min(-1) <= k_segments.max(-1)) & (k_segments.min(-1) <= q_segments.max(-1))
    i, j = jnp.arange(meet.shape[1])[:, None], jnp.arange(meet.shape[2])[None, :]
    first_behind = start + i * how.queries - (j + 1) * how.keys + 1
    last_behind = start + (i + 1) * how.queries - 1 - j * how.keys
    meet = meet & (last_behind >= 0)
    if how.window is not None:
        meet = meet & (first_behind < how.window)
    return _Visits(
        jnp.where(meet, j, j.size).min(2),
        jnp.where(meet, j + 1, 0).max(2),
        jnp.where(meet, i, i.size).min(1),
        jnp.where(meet, i + 1, 0).max(1),
    )


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    visits: _Visits,
    start: Array,
    how: _How,
) -> Array:
    return _attend_forward(query, key, value, query_segments, key_segments, visits, start, how)[0]


def _attend_forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    *arrays, start, how = arguments
    attended, logsumexp = _by_rows(partial(_forward, start=start, how=how), tuple(arrays), how)
    attended, logsumexp = of_attention(attended), of_attention(logsumexp)
    return attended, (*arrays, attended, logsumexp, start)


def _attend_backward(how: _How, kept: tuple[Any, ...], grad: Array) -> tuple[Array | None, ...]:
    *arrays, start = kept
    grads = _by_rows(partial(_backward, start=start, how=how), (*arrays, grad), how)
    return (*grads, None, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _by_rows(f: Callable[..., Any], arrays: tuple[Any, ...], how: _How) -> Any:
    if how.rows is None:
        return f(*arrays)
    grouped = jax.tree.map(lambda x: x.reshape(-1, how.rows, *x.shape[1:]), arrays)
    results = jax.lax.map(lambda part: f(*part), grouped)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _forward(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    visits: _Visits,
    start: Array,
    how: _How,
) -> tuple[Float[Array, "N T H K"], Float[Array, "N I G C"]]:
    """What is attended, and the log-sum-exp of each query's scores."""
    groups = key.shape[2]
    scores = _scorer(query_segments, key_segments, start, query.shape[2] // groups, how)
    q_NIGKC = _split(query, groups, how.queries, how).swapaxes(-1, -2)
    k_NJGPK = _split(key, groups, how.keys, how)
    v_NJGKP = _split(value, groups, how.keys, how).swapaxes(-1, -2)
    first, end = visits.first_keys.min(0), visits.end_keys.max(0)

    def one(i: Array) -> tuple[Array, Array]:
        q_NGKC = _at(q_NIGKC, i)
        rows, _, dims, columns = q_NGKC.shape

        def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, sums = carry
            scores_NGPC = scores(_product("ngpk,ngkc->ngpc", _at(k_NJGPK, j), q_NGKC), i, j)
            new_most = jnp.maximum(most, scores_NGPC.max(2))
            weights_NGPC, shrink = jnp.exp(scores_NGPC - new_most[:, :, None]), jnp.exp(most - new_most)
            total = total * shrink + weights_NGPC.sum(2)
            added = _product("ngkp,ngpc->ngkc", _at(v_NJGKP, j), weights_NGPC.astype(how.products))
            return new_most, total, sums * shrink[:, :, None] + added

        one_NGC = jnp.zeros((rows, groups, columns), jnp.float32)
        nothing = one_NGC + NEVER, one_NGC, jnp.zeros((rows, groups, dims, columns), jnp.float32)
        most, total, sums = _loop(first[i], end[i], k_NJGPK.shape[1], body, nothing)
        return (sums / total[:, :, None]).astype(query.dtype), most + jnp.log(total)

    attended_INGKC, logsumexp_INGC = jax.lax.map(one, jnp.arange(len(first)))
    attended_NIGCK = attended_INGKC.swapaxes(0, 1).swapaxes(-1, -2)
    return _joined(attended_NIGCK, query.shape), logsumexp_INGC.swapaxes(0, 1)


def _backward(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    visits: _Visits,
    attended: Array,
    logsumexp_NIGC: Array,
    grad: Array,
    start: Array,
    how: _How,
) -> tuple[Float[Array, "N T H K"], Float[Array, "N S G K"], Float[Array, "N S G K"]]:
    """Gradients of query, key and value: for each block of keys, over the blocks of queries that see it."""
    groups = key.shape[2]
    scores = _scorer(query_segments, key_segments, start, query.shape[2] // groups, how)
    q_NIGCK, grad_NIGCK = _split(query, groups, how.queries, how), _split(grad, groups, how.queries, how)
    k_NJGPK, v_NJGPK = _split(key, groups, how.keys, how), _split(value, groups, how.keys, how)
    # A barrier, or XLA folds the transposition into the products and contracts the slow axis after all.
    q_NIGKC, grad_NIGKC, k_NJGKP = jax.lax.optimization_barrier(
        tuple(x.swapaxes(-1, -2) for x in (q_NIGCK, grad_NIGCK, k_NJGPK))
    )
    inner = jnp.sum(attended.astype(jnp.float32) * grad.astype(jnp.float32), -1, keepdims=True)
    inner_NIGC = _split(inner, groups, how.queries, how._replace(products=jnp.float32))[..., 0]
    first, end = visits.first_queries.min(0), visits.end_queries.max(0)

    def one(dq_NIGKC: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_NGPK, v_NGPK, k_NGKP = _at(k_NJGPK, j), _at(v_NJGPK, j), _at(k_NJGKP, j)

        def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dk, dv, dq = carry
            seen = scores(_product("ngpk,ngkc->ngpc", k_NGPK, _at(q_NIGKC, i)), i, j)
            weights = jnp.exp(seen - _at(logsumexp_NIGC, i)[:, :, None])
            dweights = _product("ngpk,ngkc->ngpc", v_NGPK, _at(grad_NIGKC, i))
            dscores = weights * (dweights - _at(inner_NIGC, i)[:, :, None])
            if how.cap is not None:
                dscores = dscores * (1 - jnp.square(jnp.clip(seen / how.cap, -1, 1)))
            weights, dscores = weights.astype(how.products), dscores.astype(how.products)
            dv = dv + _product("ngpc,ngck->ngpk", weights, _at(grad_NIGCK, i))
            dk = dk + _product("ngpc,ngck->ngpk", dscores, _at(q_NIGCK, i))
            dq_block = _at(dq, i) + _product("ngkp,ngpc->ngkc", k_NGKP, dscores)
            return dk, dv, jax.lax.dynamic_update_index_in_dim(dq, dq_block, i, 1)

        zero = jnp.zeros(k_NGPK.shape, jnp.float32)
        dk, dv, dq_NIGKC = _loop(first[j], end[j], q_NIGKC.shape[1], body, (zero, zero, dq_NIGKC))
        return dq_NIGKC, ((dk * how.scale).astype(key.dtype), dv.astype(value.dtype))

    none = jnp.zeros(q_NIGKC.shape, jnp.float32)
    dq_NIGKC, (dk_JNGPK, dv_JNGPK) = jax.lax.scan(one, none, jnp.arange(len(first)))
    dq_NIGCK = (dq_NIGKC * how.scale).astype(query.dtype).swapaxes(-1, -2)
    dk, dv = (_joined(x.swapaxes(0, 1), key.shape) for x in (dk_JNGPK, dv_JNGPK))
    return _joined(dq_NIGCK, query.shape), dk, dv


def _product(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _scorer(
    query_segments: Array, key_segments: Array, start: Array, repeats: int, how: _How
) -> Callable[[Array, Array, Array], Array]:
    """From the products of a block of queries and one of keys to scores: scaled and capped, `NEVER` where not seen."""
    q_segments = jnp.tile(query_segments.reshape(len(query_segments), -1, how.queries), repeats)
    k_segments = key_segments.reshape(len(key_segments), -1, how.keys)
    ahead_PC = jnp.tile(jnp.arange(how.queries), repeats)[None, :] - jnp.arange(how.keys)[:, None]

    def scores(products_NGPC: Array, i: Array, j: Array) -> Float[Array, "N G P C"]:
        behind = ahead_PC + (start + i * how.queries - j * how.keys)
        seen = (behind >= 0) if how.window is None else (behind >= 0) & (behind < how.window)
        same = _at(k_segments, j)[:, :, None] == _at(q_segments, i)[:, None, :]
        return jnp.where((seen & same)[:, None], soft_cap(products_NGPC * how.scale, how.cap), NEVER)

    return scores


def _loop(first: Array, end: Array, count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`body` for each index from first to end, of `count` at most; a single one, always met, needs no loop."""
    return body(jnp.asarray(0), carry) if count == 1 else jax.lax.fori_loop(first, end, body, carry)


def _at(x: Array, index: Array) -> Array:
    """One block of each row."""
    return jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False)


def _split(x: Array, groups: int, size: int, how: _How) -> Array:
    """[N T H K] as blocks [N T/size G R*size K]."""
    rows, length, heads, dims = x.shape
    blocks = x.reshape(rows, length // size, size, groups, heads // groups, dims).transpose(0, 1, 3, 4, 2, 5)
    return blocks.reshape(rows, length // size, groups, heads // groups * size, dims).astype(how.products)


def _joined(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_split`."""
    rows, count, groups, _, dims = blocks.shape
    repeats, size = shape[2] // groups, shape[1] // count
    return blocks.reshape(rows, count, groups, repeats, size, dims).transpose(0, 1, 4, 2, 3, 5).reshape(shape)
