"""Steps that are left out: those whose loss or gradient is not finite, or whose gradient is far larger than usual."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.errors import UserError


class DivergedError(UserError):
    """Steps `first_step` to `last_step` were skipped, and these are more than may be; `loss` and `grad_norm` are what
    the last of them was skipped for."""

    def __init__(self, message: str, first_step: int, last_step: int, loss: float, grad_norm: float) -> None:
        super().__init__(message)
        self.first_step, self.last_step, self.loss, self.grad_norm = first_step, last_step, loss, grad_norm


@struct.dataclass
class Skips:
    """What the rule knows of the steps before."""

    mean_norm: Float[Any, ""]  # of the gradients of steps that were taken
    seen: Int[Any, ""]  # steps that the mean is of, at most the window
    in_a_row: Int[Any, ""]  # steps skipped since one was taken


def no_skips() -> Skips:
    """Before the first step."""
    return Skips(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


@dataclass(frozen=True)
class SkipStep:
    """Skips a step whose loss or gradient is not finite, or whose gradient's norm is beyond `factor` times the mean.

    The mean is of about the last `window` steps that were taken, and calls nothing a spike before it has seen as many:
    early gradients are large and fall fast. Skipped, a step leaves parameters, moments and averages as they are; its
    rows count as read, and the learning rate goes on. OLMo skips by standard deviations (arXiv:2501.00656, section 3);
    a factor needs no variance, and leaves alone what is usual in small runs.
    """

    factor: float = 10.0
    window: int = 100
    at_most: int = 10  # in a row; with one more the run has diverged

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise UserError(f"skip: factor={self.factor} must be above 1, such as 10: usual gradients are the mean.")
        for name in ("window", "at_most"):
            if getattr(self, name) < 1:
                raise UserError(f"skip: {name}={getattr(self, name)} must be 1 or more.")

    def judge(self, loss: Float[Array, ""], norm: Float[Array, ""], past: Skips) -> tuple[Bool[Array, ""], Skips]:
        """Whether the step is taken, and what the next one is judged by."""
        spike = (past.seen >= self.window) & (norm > self.factor * past.mean_norm)
        taken = jnp.isfinite(loss) & jnp.isfinite(norm) & ~spike
        seen = jnp.minimum(past.seen + 1, self.window)
        mean = past.mean_norm + (norm - past.mean_norm) / seen
        after = Skips(mean, seen, jnp.zeros_like(past.in_a_row))
        before = Skips(past.mean_norm, past.seen, past.in_a_row + 1)
        return taken, jax.tree.map(partial(jnp.where, taken), after, before)

    def require(self, step: int, in_a_row: int, loss: float, norm: float, *, ends: bool) -> None:
        """Raises DivergedError where more than `at_most` steps up to `step` were skipped, or more than one at the end.

        `loss` and `norm` are what the step was skipped for.
        """
        limit = 1 if ends else self.at_most
        if in_a_row > limit:
            raise DivergedError(
                f"steps {step - in_a_row + 1} to {step} were skipped, more than {limit} in a row"
                f"{' at the end' * ends}; the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {step}: "
                "the checkpoints before are kept. Under another name, branch_from one of them with a decay from there, "
                "or train anew with another seed, a lower rate or, where such norms are usual, a higher skip.factor.",
                step - in_a_row + 1,
                step,
                loss,
                norm,
            )


def left_alone(optimizer_state: Any) -> Any:
    """The optimizer's state after a step that was skipped: as before, but for the place of the learning rate."""

    def counted(state: Any) -> Any:
        return optax.ScaleByScheduleState(state.count + 1) if _is_schedule(state) else state

    return jax.tree.map(counted, optimizer_state, is_leaf=_is_schedule)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)
