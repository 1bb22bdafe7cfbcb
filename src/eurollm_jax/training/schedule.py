"""Learning-rate schedules: frozen values that become a function of the step once the number of steps is known."""

from dataclasses import dataclass

import optax

from eurollm_jax.errors import UserError


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): linear up, constant, linear down to `final`."""

    peak: float
    warmup: int  # steps
    decay: float = 0.2  # share of all steps
    final: float = 0.0  # share of the peak

    def build(self, steps: int) -> optax.Schedule:
        decay = round(self.decay * steps)
        if self.warmup + decay > steps:
            raise UserError(
                f"schedule: {self.warmup} steps of warm-up and {decay} of decay exceed the run's {steps}: "
                "lower schedule.warmup or schedule.decay, or train for more steps."
            )
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak, self.warmup),
                optax.constant_schedule(self.peak),
                optax.linear_schedule(self.peak, self.final * self.peak, decay),
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
        if self.warmup >= steps:
            raise UserError(
                f"schedule: {self.warmup} steps of warm-up leave nothing of the run's {steps}: lower schedule.warmup."
            )
        return optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, steps, self.final * self.peak)
