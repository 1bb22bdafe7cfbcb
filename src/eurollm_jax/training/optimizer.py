"""Optimizers: frozen values that build an optax transformation for a tree of weights."""

from dataclasses import dataclass

import jax
import optax

from eurollm_jax.model.param import Param, Specs, decay_mask


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) after clipping by global norm; gains are not decayed."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                learning_rate,
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decay_mask(specs),
            ),
        )


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan 2024) for the layers' matrices, Adam with Nesterov momentum for the rest, after clipping by norm.

    A matrix's momentum is orthogonalised and scaled to the root mean square `rms` of AdamW's updates, so that one
    learning rate serves both (Liu et al. 2025, arXiv:2502.16982). Only the layers' matrices are decayed.
    """

    momentum: float = 0.95
    rms: float = 0.2
    b1: float = 0.9  # of Adam
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def build(self, learning_rate: optax.Schedule, specs: Specs) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.contrib.muon(
                learning_rate,
                beta=self.momentum,
                weight_decay=self.weight_decay,
                consistent_rms=self.rms,
                adam_b1=self.b1,
                adam_b2=self.b2,
                muon_weight_dimension_numbers=jax.tree.map(_matrix, specs),
            ),
        )


def _matrix(spec: Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions a layer's weight is a matrix from and to; None for what Muon leaves to Adam."""
    if not spec.fan_in or "vocab" in spec.axes:
        return None
    inner = tuple(i for i, axis in enumerate(spec.axes) if axis in spec.fan_in)
    outer = tuple(i for i, axis in enumerate(spec.axes) if axis not in (*spec.fan_in, "layers", "experts"))
    return optax.contrib.MuonDimensionNumbers(inner, outer)
