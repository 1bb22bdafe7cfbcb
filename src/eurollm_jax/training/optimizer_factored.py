"""The parts of Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), by spec: which axes are rows, columns or stacked.

optax has them for plain matrices. Here a weight is a stack of matrices, one for each layer and expert, whose rows and
columns may be several axes (a query goes from `embed` to `heads` x `head_dim`): each matrix is treated as its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from eurollm_jax.model.param import Param, Specs


class FactoredState(NamedTuple):
    step: Int[Array, ""]  # steps done
    moments: Any  # of each weight {"rows", "columns"}, or {"squares"} where it is no matrix


def scale_by_factored_rms(decay: float, eps: float, specs: Specs) -> optax.GradientTransformation:
    """Divides gradients by the root of an estimate of their mean squares, which is rows * columns / mean(rows).

    The average of step t, counted from 1, keeps 1 - t^-decay of itself; `eps` is added to the squares.
    """

    def init(params: optax.Params) -> FactoredState:
        def zeros(spec: Param) -> dict[str, Array]:
            rows, columns = _rows(spec), _columns(spec)
            if not rows:
                return {"squares": jnp.zeros(spec.shape, jnp.float32)}
            return {"rows": jnp.zeros(_without(spec, columns)), "columns": jnp.zeros(_without(spec, rows))}

        return FactoredState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, specs))

    def update(
        updates: optax.Updates, state: FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredState]:
        keep = 1 - (state.step + 1.0) ** -decay

        def moment(spec: Param, gradient: Array, before: dict[str, Array]) -> dict[str, Array]:
            squares = gradient**2 + eps
            over = {"squares": (), "rows": _columns(spec), "columns": _rows(spec)}
            return {
                name: keep * old + (1 - keep) * jnp.mean(squares, over[name], keepdims=True)
                for name, old in before.items()
            }

        def direction(spec: Param, gradient: Array, now: dict[str, Array]) -> Array:
            if "squares" in now:
                return gradient * now["squares"] ** -0.5
            relative = now["rows"] / jnp.mean(now["rows"], _rows(spec), keepdims=True)
            return gradient * relative**-0.5 * now["columns"] ** -0.5

        moments = jax.tree.map(moment, specs, updates, state.moments)
        return jax.tree.map(direction, specs, updates, moments), FactoredState(state.step + 1, moments)

    return optax.GradientTransformation(init, update)


def clip_by_rms(most: float, specs: Specs) -> optax.GradientTransformation:
    """Scales the update of each matrix, and of each layer's gain or bias, down to a root mean square of `most`."""

    def clipped(spec: Param, update: Array) -> Array:
        return update / jnp.maximum(1.0, _rms(spec, update) / most)

    return optax.stateless(lambda updates, _: jax.tree.map(clipped, specs, updates))


def scale_by_param_rms(least: float, specs: Specs) -> optax.GradientTransformation:
    """Multiplies the update of each matrix by the matrix's root mean square, or by `least` where that is more."""

    def scaled(spec: Param, update: Array, param: Array) -> Array:
        return update * jnp.maximum(_rms(spec, param), least)

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, specs, updates, params))


def _rms(spec: Param, x: Array) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.mean(x**2, _own(spec), keepdims=True))


def _own(spec: Param) -> tuple[int, ...]:
    """The axes of one matrix, or of one layer's gain. A router's experts are columns of its matrix."""
    stacked = spec.axes.index(spec.fan_in[0]) if spec.fan_in else spec.axes.count("layers")
    return tuple(i for i, axis in enumerate(spec.axes) if i >= stacked or axis not in ("layers", "experts"))


def _rows(spec: Param) -> tuple[int, ...]:
    return tuple(i for i in _own(spec) if spec.axes[i] in spec.fan_in)


def _columns(spec: Param) -> tuple[int, ...]:
    return tuple(i for i in _own(spec) if spec.axes[i] not in spec.fan_in)


def _without(spec: Param, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in axes else size for i, size in enumerate(spec.shape))
