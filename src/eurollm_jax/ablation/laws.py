"""Laws: held-out bits per byte of each language as a function of the groups' shares of tokens.

Log-linear (Ye et al. 2024, arXiv:2403.16952; Olmix, arXiv:2602.12237): L_i(r) = c_i + exp(b_i + sum_j t_ij r_j), convex
in r. Every group may help or harm every language, for G + 1 free parameters of each language: as sum_j r_j = 1, a
constant can move between b_i and t_i., and here it is the t_i. weighted by the prior that sum to 0.

Power (He et al. 2024, arXiv:2410.12883): L_i = a_i (p_i + o_i)^-g_i, where p_i is the language's own share of tokens;
the offset o_i keeps the loss finite where a language is left out, and stands for what the others teach of it. Three
parameters, whatever the number of groups; no transfer but through the share itself. Convex in r where g_i >= 0.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from eurollm_jax.errors import UserError

LawName = Literal["log-linear", "power"]
SPARE_RUNS = 4  # beyond a law's free parameters: fewer say nothing of the noise


@dataclass(frozen=True, eq=False)
class Observations:
    """What the proxies showed at their end. Diverged ones are not in here."""

    groups: tuple[str, ...]
    languages: tuple[str, ...]
    shares: Float[np.ndarray, "N G"]  # of tokens; rows sum to 1
    losses: Float[np.ndarray, "N L"]  # held-out bits per byte
    names: tuple[str, ...]  # of the runs

    def __post_init__(self) -> None:
        runs = len(self.names)
        for what, found, expected in (
            ("shares", self.shares.shape, (runs, len(self.groups))),
            ("losses", self.losses.shape, (runs, len(self.languages))),
        ):
            if found != expected:
                raise ValueError(f"{what} have shape {found}, expected {expected}")
        bad = ~np.isfinite(self.losses).all(1)
        if bad.any():
            raise UserError(
                f"run {self.names[int(bad.argmax())]!r}: its held-out bits per byte are not finite: "
                "leave it out as diverged."
            )

    @property
    def moved(self) -> Bool[np.ndarray, "G"]:
        """The groups whose share is not the same in all runs."""
        return np.ptp(self.shares, axis=0) > 1e-6


@dataclass(frozen=True, eq=False)
class LogLinear:
    """`...`: any leading axes, such as one of bootstrap samples; `law[3]` is the fourth of them."""

    floor: Float[np.ndarray, "... L"]  # c, bits per byte that no mixture removes; between 0 and the least observed
    bias: Float[np.ndarray, "... L"]  # b: at the prior, the loss is c + exp(b)
    transfer: Float[np.ndarray, "... L G"]  # t; weighted by the prior it sums to 0

    def __getitem__(self, index: int) -> "LogLinear":
        return LogLinear(self.floor[index], self.bias[index], self.transfer[index])

    def predict(self, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "... L"]:
        """Bits per byte of each language. Leading axes of the law and of the shares broadcast."""
        return self.floor + np.exp(self.bias + np.einsum("...lg,...g->...l", self.transfer, shares))

    def slopes(self, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "... L G"]:
        """d L_i / d r_j."""
        return (self.predict(shares) - self.floor)[..., None] * self.transfer

    def weighted(
        self, weights: Float[np.ndarray, "L"], shares: Float[np.ndarray, "G"]
    ) -> tuple[float, Float[np.ndarray, "G"]]:
        """(sum_i w_i L_i, its gradient) without leading axes: what a solver calls often."""
        excess = weights * np.exp(self.bias + self.transfer @ shares)
        return float(weights @ self.floor + excess.sum()), excess @ self.transfer


@dataclass(frozen=True, eq=False)
class Power:
    """As `LogLinear` has it, `...` are any leading axes; `holds` has none."""

    scale: Float[np.ndarray, "... L"]  # a
    exponent: Float[np.ndarray, "... L"]  # g
    offset: Float[np.ndarray, "... L"]  # o, a share of tokens
    holds: Float[np.ndarray, "L G"]  # share of each group's tokens that are of each language

    def __getitem__(self, index: int) -> "Power":
        return Power(self.scale[index], self.exponent[index], self.offset[index], self.holds)

    def predict(self, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "... L"]:
        """Bits per byte of each language. Leading axes of the law and of the shares broadcast."""
        return self.scale * (shares @ self.holds.T + self.offset) ** -self.exponent

    def slopes(self, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "... L G"]:
        """d L_i / d r_j."""
        own = shares @ self.holds.T + self.offset
        return (-self.exponent * self.scale * own ** (-self.exponent - 1))[..., None] * self.holds

    def weighted(
        self, weights: Float[np.ndarray, "L"], shares: Float[np.ndarray, "G"]
    ) -> tuple[float, Float[np.ndarray, "G"]]:
        own = self.holds @ shares + self.offset
        losses = weights * self.scale * own**-self.exponent
        return float(losses.sum()), -(losses * self.exponent / own) @ self.holds


Law = LogLinear | Power


def parameters(law: LawName, groups: int) -> int:
    """Free ones, of each language."""
    return {"log-linear": groups + 1, "power": 3}[law]


def runs_needed(law: LawName, groups: int) -> int:
    """Fewest runs that a law is fitted to: its free parameters, and some more to tell the noise from."""
    return parameters(law, groups) + SPARE_RUNS


def choose_law(asked: Literal["auto", "log-linear", "power"], runs: int, groups: int) -> LawName:
    """Of `auto` the one with the most parameters for which the runs suffice: log-linear, else power.

    Raises UserError if there are fewer runs than the law needs. A study asks this before it trains.
    """
    log_linear = runs >= runs_needed("log-linear", groups)
    law: LawName = ("log-linear" if log_linear else "power") if asked == "auto" else asked
    needed = runs_needed(law, groups)
    if runs < needed:
        raise UserError(
            f"{runs} runs: the {law} law of {groups} groups needs {needed} or more: "
            + ('add draws to the design, or say law="auto".' if asked == "log-linear" else "add draws to the design.")
        )
    return law


def transfer_matrix(
    law: Law, prior: Float[np.ndarray, "G"], moved: Bool[np.ndarray, "G"] | None = None
) -> Float[np.ndarray, "... L G"]:
    """Change of each language's bits per byte per percentage point of tokens moved to each group; negative is help.

    At the prior, and taken from the other groups in proportion to their shares. That is identified whatever constant
    moves between b and t. `moved`: the groups that the runs' mixtures differ in (default: all); nothing is taken from
    the others, and of them nothing is known: NaN.
    """
    if moved is None:
        moved = np.ones(len(prior), bool)
    slopes, shares = law.slopes(prior), np.where(moved, prior, 0.0)
    total = shares.sum()
    rest = np.where(total - shares > 1e-12, total - shares, np.inf)
    change = 0.01 * (slopes * total - (slopes @ shares)[..., None]) / rest
    return np.where(moved, change, np.nan)
