"""Optimizer state in half the memory: moments in bfloat16, rounded up or down at random so that no drift is lost.

A moment moves by a small share of itself at each step. Rounded to the nearest of bfloat16's 8 bits, such a move is
often none at all, and an average with a decay of 0.999 stands still; rounded at random, with the probability of each
neighbour such that the mean is exact, it moves as it should (Gupta et al. 2015, arXiv:1502.02551).
"""

import hashlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eurollm_jax.model.param import Specs, flatten, owner

type StateDtype = Literal["float32", "bfloat16"]


class RoundedState(NamedTuple):
    step: Int[Array, ""]  # steps done
    inner: Any  # the transformation's own, its moments in bfloat16


def kept_in(
    dtype: StateDtype, transformation: optax.GradientTransformation, specs: Specs
) -> optax.GradientTransformation:
    """`transformation` with the moments in its state stored in `dtype`; it computes in float32 either way."""
    return transformation if dtype == "float32" else _rounded(transformation, specs)


def _rounded(transformation: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
    """What is random follows from the step and from the moment's place in the state: the same after a restart, and on
    any mesh."""
    shapes = {path: spec.shape for path, spec in flatten(specs).items()}

    def is_moment(path: tuple[Any, ...], leaf: Any) -> bool:
        weight = owner(path, shapes)
        return weight is not None and leaf.shape == shapes[weight] and jnp.issubdtype(leaf.dtype, jnp.floating)

    def init(params: optax.Params) -> RoundedState:
        def narrow(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf.astype(jnp.bfloat16) if is_moment(path, leaf) else leaf

        inner = transformation.init(params)
        return RoundedState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(narrow, inner))

    def update(
        updates: optax.Updates, state: RoundedState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RoundedState]:
        step_key = jax.random.fold_in(jax.random.key(0), state.step)

        def widen(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf.astype(jnp.float32) if is_moment(path, leaf) else leaf

        def narrow(path: tuple[Any, ...], leaf: Array) -> Array:
            if not is_moment(path, leaf):
                return leaf
            place = hashlib.sha256(jax.tree_util.keystr(path).encode()).digest()
            return round_at_random(leaf, jax.random.fold_in(step_key, int.from_bytes(place[:4], "big")))

        wide = jax.tree_util.tree_map_with_path(widen, state.inner)
        updates, wide = transformation.update(updates, wide, params)
        return updates, RoundedState(state.step + 1, jax.tree_util.tree_map_with_path(narrow, wide))

    return optax.GradientTransformation(init, update)


def round_at_random(x: Float[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """float32 as one of the two bfloat16 values around it, the nearer one more often: the mean is `x`.

    A random number is added to the 16 bits that bfloat16 lacks; what carries over rounds away from zero.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
