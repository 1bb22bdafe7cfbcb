"""Optimizers: frozen values that build an optax transformation for a tree of weights.

All clip the gradient by its global norm, turn it into a direction, decay the weights that their specs call decayed by
`weight_decay` times the learning rate, and go against both. With a `base_width` the direction of each weight is scaled
so that the learning rate found at that width serves others (optimizer_width.py). Moments are kept in float32, or
rounded to bfloat16 at random (optimizer_state.py); the weights are float32 always.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from eurollm_jax.model.param import Param, Specs, decay_mask
from eurollm_jax.training.optimizer_factored import clip_by_rms, scale_by_factored_rms, scale_by_param_rms
from eurollm_jax.training.optimizer_state import StateDtype, kept_in
from eurollm_jax.training.optimizer_width import scale_by_width


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    base_width: int | None = None  # at which the learning rate was found
    state_dtype: StateDtype = "float32"

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            kept_in(self.state_dtype, optax.scale_by_adam(self.b1, self.b2, self.eps), specs),
            scale_by_width(self.base_width, specs),
            optax.add_decayed_weights(self.weight_decay, decay_mask(specs)),
            optax.scale_by_learning_rate(learning_rate),
        )


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan 2024) for the layers' matrices, AdamW with Nesterov momentum for the rest.

    A matrix's momentum is orthogonalised and scaled to the root mean square `rms` of AdamW's updates, so that one
    learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    momentum: float = 0.95
    rms: float = 0.2
    b1: float = 0.9  # of Adam
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    state_dtype: StateDtype = "float32"

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            1.0,
            beta=self.momentum,
            consistent_rms=self.rms,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=jax.tree.map(_matrix, specs),
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            kept_in(self.state_dtype, optax.chain(muon, optax.scale(-1.0)), specs),
            optax.add_decayed_weights(self.weight_decay, decay_mask(specs)),
            optax.scale_by_learning_rate(learning_rate),
        )


@dataclass(frozen=True)
class AdEMAMix:
    """AdamW with a second, slow average of the gradients (Pagliardini et al. 2024, arXiv:2409.03137).

    `alpha`, its weight, and `b3`, its decay, grow over `warmup` steps, without which the slow average makes early
    training diverge; the paper takes all steps of a run.
    """

    warmup: int  # steps
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999
    alpha: float = 5.0
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    base_width: int | None = None  # at which the learning rate was found
    state_dtype: StateDtype = "float32"

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        direction = optax.contrib.scale_by_ademamix(self.b1, self.b2, self._b3, self._alpha, self.eps)
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            kept_in(self.state_dtype, direction, specs),
            scale_by_width(self.base_width, specs),
            optax.add_decayed_weights(self.weight_decay, decay_mask(specs)),
            optax.scale_by_learning_rate(learning_rate),
        )

    def _warmed(self, count: Array) -> Float[Array, ""]:
        """The share of the warm-up that is done with the step after `count`."""
        return jnp.minimum((count + 1) / max(self.warmup, 1), 1.0)

    def _alpha(self, count: Array) -> Float[Array, ""]:
        return self.alpha * self._warmed(count)

    def _b3(self, count: Array) -> Float[Array, ""]:
        """From `b1` to `b3`, so that the half-life of the average grows linearly."""
        done, first, last = self._warmed(count), jnp.log(self.b1), jnp.log(self.b3)
        return jnp.exp(first * last / ((1 - done) * last + done * first))


@dataclass(frozen=True)
class Lion:
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675): half of AdamW's state.

    Its paper advises a learning rate 3 to 10 times below AdamW's, and a decay as much above.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.5
    clip_norm: float = 1.0
    base_width: int | None = None  # at which the learning rate was found
    state_dtype: StateDtype = "float32"

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            kept_in(self.state_dtype, optax.scale_by_lion(self.b1, self.b2), specs),
            scale_by_width(self.base_width, specs),
            optax.add_decayed_weights(self.weight_decay, decay_mask(specs)),
            optax.scale_by_learning_rate(learning_rate),
        )


@dataclass(frozen=True)
class Adafactor:
    """Adafactor without momentum (Shazeer & Stern 2018, arXiv:1804.04235): of a matrix's squared gradients it keeps
    the means of rows and columns, next to nothing beside the weights.

    Each layer's matrix is one of its own. Where `relative`, the learning rate is a share of a matrix's root mean
    square, such as 0.01, as in the paper.
    """

    decay: float = 0.8  # the second moment's average keeps 1 - step^-decay of itself
    clip: float = 1.0  # of the root mean square of a matrix's update
    relative: bool = True
    eps: float = 1e-30  # added to squared gradients
    least: float = 1e-3  # root mean square that a matrix is taken to have at least
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            scale_by_factored_rms(self.decay, self.eps, specs),
            clip_by_rms(self.clip, specs),
            scale_by_param_rms(self.least, specs) if self.relative else optax.identity(),
            optax.add_decayed_weights(self.weight_decay, decay_mask(specs)),
            optax.scale_by_learning_rate(learning_rate),
        )


def _matrix(spec: Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions a layer's weight is a matrix from and to; None for what Muon leaves to Adam."""
    if not spec.fan_in or "vocab" in spec.axes:
        return None
    inner = tuple(i for i, axis in enumerate(spec.axes) if axis in spec.fan_in)
    outer = tuple(i for i, axis in enumerate(spec.axes) if axis not in (*spec.fan_in, "layers", "experts"))
    if not outer:  # a router's experts are the columns of one matrix
        outer = (spec.axes.index("experts"),)
    return optax.contrib.MuonDimensionNumbers(inner, outer)
