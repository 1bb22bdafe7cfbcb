"""Learning-rate schedules: frozen values that become a function of the step once the number of steps is known.

All rise linearly over `warmup` steps to `peak`. What follows is a pure function of the step, so a run may leave another
one's schedule at any step for one of its own, such as a decay (`Experiment.branch_from`).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from eurollm_jax.errors import UserError


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): linear up, constant, down to `final`.

    The decay is linear, or falls by the root of its time, fast at first, which ends lower (Hägele et al. 2024,
    arXiv:2405.18392).
    """

    peak: float
    warmup: int  # steps
    decay: float = 0.2  # share of all steps
    final: float = 0.0  # share of the peak
    shape: Literal["linear", "1-sqrt"] = "linear"  # of the decay

    def decay_begins(self, steps: int) -> int:
        """Steps that are done when the decay begins."""
        return steps - round(self.decay * steps)

    def build(self, steps: int) -> optax.Schedule:
        decay = steps - self.decay_begins(steps)
        if self.warmup + decay > steps:
            raise UserError(
                f"schedule: {self.warmup} steps of warm-up and {decay} of decay exceed the run's {steps}: "
                "lower schedule.warmup or schedule.decay, or train for more steps."
            )
        linear = optax.linear_schedule(self.peak, self.final * self.peak, decay)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak, self.warmup),
                optax.constant_schedule(self.peak),
                linear if self.shape == "linear" else _one_minus_root(self.peak, self.final * self.peak, decay),
            ],
            [self.warmup, steps - decay],
        )


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from the peak to `final` (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    peak: float
    warmup: int  # steps
    final: float = 0.1  # share of the peak

    def build(self, steps: int) -> optax.Schedule:
        _leaves_some(self.warmup, steps)
        return optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, steps, self.final * self.peak)


@dataclass(frozen=True)
class Linear:
    """Linear warm-up, then linear from the peak to `final` (Bergsma et al. 2025, arXiv:2502.15938, for 0)."""

    peak: float
    warmup: int  # steps
    final: float = 0.0  # share of the peak

    def build(self, steps: int) -> optax.Schedule:
        _leaves_some(self.warmup, steps)
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak, self.warmup),
                optax.linear_schedule(self.peak, self.final * self.peak, steps - self.warmup),
            ],
            [self.warmup],
        )


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then the peak: a trunk that cooldowns branch off from."""

    peak: float
    warmup: int  # steps

    def build(self, steps: int) -> optax.Schedule:
        return optax.join_schedules(
            [optax.linear_schedule(0.0, self.peak, self.warmup), optax.constant_schedule(self.peak)], [self.warmup]
        )


def _leaves_some(warmup: int, steps: int) -> None:
    if warmup >= steps:
        raise UserError(
            f"schedule: {warmup} steps of warm-up leave nothing of the run's {steps}: lower schedule.warmup."
        )


def _one_minus_root(start: float, end: float, steps: int) -> optax.Schedule:
    def rate(count: Array) -> Float[Array, ""]:
        return end + (start - end) * (1 - jnp.sqrt(jnp.clip(count / max(steps, 1), 0.0, 1.0)))

    return rate
