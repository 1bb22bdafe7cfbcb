"""Optimizers: frozen values that build an optax transformation for a tree of weights."""

from dataclasses import dataclass

import optax

from eurollm_jax.model.param import Specs, decay_mask


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
