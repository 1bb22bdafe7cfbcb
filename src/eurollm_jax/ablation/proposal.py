"""Proposal: the shares that a law and a target ask for, within bounds and not far from the prior.

min over r of sum_i w_i L_i(r) + kl * KL(r || prior), lower <= r <= upper, sum_j r_j = 1. Convex for the log-linear law,
and for the power law where no exponent is negative, so that what the solver finds is the optimum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import optimize

from eurollm_jax.ablation.laws import Law
from eurollm_jax.errors import UserError

LEAST_SHARE = 1e-12  # of a group that may be left out: KL has no slope at 0
TOLERANCE = 1e-6  # bits per byte from the optimum, beyond which the solver is started again
SCALE = 0.1  # bits per byte, a difference between mixtures that is of the order of 1 to the solver


@dataclass(frozen=True, eq=False)
class Problem:
    """What a mixture is to be good for, and must keep."""

    weights: Float[np.ndarray, "L"]  # of the target; sum 1
    prior: Float[np.ndarray, "G"]  # shares of tokens; sum 1
    lower: Float[np.ndarray, "G"]
    upper: Float[np.ndarray, "G"]
    kl: float  # bits per byte for a nat of divergence from the prior
    holds: Float[np.ndarray, "L G"]  # share of each group's tokens that are of each language
    baselines: Mapping[str, Float[np.ndarray, "G"]]  # shares by name


def divergence(shares: Float[np.ndarray, "... G"], prior: Float[np.ndarray, "G"]) -> Float[np.ndarray, "..."]:
    """KL(shares || prior), in nats; infinite where a group has a share and the prior has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * (np.log(shares) - np.log(prior)), 0.0)
    return terms.sum(-1)


def objective(law: Law, problem: Problem, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "..."]:
    """Weighted bits per byte, without the divergence."""
    return law.predict(shares) @ problem.weights


def propose(law: Law, problem: Problem) -> Float[np.ndarray, "G"]:
    """The optimal shares under a law without leading axes.

    Groups that the prior leaves out stay out where kl > 0. Raises UserError where no shares keep the bounds.

    The solver (SLSQP, with exact gradients) moves the roots of the shares, in which the divergence is smooth at 0.
    """
    lower, upper = _bounds(problem)
    if (lower > upper).any() or lower.sum() > 1 + 1e-6 or upper.sum() < 1 - 1e-6:
        raise UserError(
            f"constraints: floors sum to {lower.sum():.3f} and ceilings to {upper.sum():.3f}, so no shares keep them "
            "and sum to 1: lower the floors or raise the ceilings."
        )
    inside = 0.99 * problem.prior + 0.01 / len(lower)  # a share of 0 has no slope in its root
    found = _solve(law, problem, _within(inside, lower, upper), lower, upper)
    gap, better = _gap(law, problem, found)
    if gap > TOLERANCE:
        again = _solve(law, problem, _within((inside + found + better) / 3, lower, upper), lower, upper)
        if _gap(law, problem, again)[0] < gap:
            return again
    return found


def suboptimality(law: Law, problem: Problem, shares: Float[np.ndarray, "G"]) -> float:
    """At most how far the regularised objective is above its optimum, in bits per byte, if the law is convex."""
    return _gap(law, problem, shares)[0]


def _solve(
    law: Law,
    problem: Problem,
    start: Float[np.ndarray, "G"],
    lower: Float[np.ndarray, "G"],
    upper: Float[np.ndarray, "G"],
) -> Float[np.ndarray, "G"]:
    free = upper > lower + 1e-12
    if free.sum() < 2:
        return start
    rest = start[free].sum()
    reference = np.where(problem.prior > 0, problem.prior, 1.0)[free]  # of a free group it is 0 only where kl is
    shares = start.copy()

    def cost(roots: Float[np.ndarray, "F"]) -> tuple[float, Float[np.ndarray, "F"]]:
        shares[free] = np.maximum(roots, 1e-150) ** 2
        ratio = np.log(shares[free] / reference)
        value, slope = law.weighted(problem.weights, shares)
        slope = slope[free] + problem.kl * (ratio + 1)
        return (value + problem.kl * float(shares[free] @ ratio)) / SCALE, slope * 2 * roots / SCALE

    found = optimize.minimize(
        cost,
        np.sqrt(start[free]),
        jac=True,
        method="SLSQP",
        bounds=optimize.Bounds(np.sqrt(lower[free]), np.sqrt(upper[free])),
        constraints=[{"type": "eq", "fun": lambda roots: roots @ roots - rest, "jac": lambda roots: 2 * roots}],
        options={"ftol": 1e-10, "maxiter": 300},
    )
    shares = start.copy()
    shares[free] = found.x**2
    return _within(shares, lower, upper)


def _bounds(problem: Problem) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
    lower, upper = np.asarray(problem.lower, np.float64), np.asarray(problem.upper, np.float64)
    if problem.kl > 0:
        upper = np.where(problem.prior > 0, upper, lower)
        lower = np.where(problem.prior > 0, np.maximum(lower, np.minimum(LEAST_SHARE, upper)), lower)
    return lower, upper


def _gap(law: Law, problem: Problem, shares: Float[np.ndarray, "G"]) -> tuple[float, Float[np.ndarray, "G"]]:
    """(bound on the distance from the optimum, the shares that give it).

    The gap of generalised conditional gradients: a convex law is above its tangent, and the tangent plus the divergence
    has a minimum in closed form, r_j = prior_j exp(m - slope_j / kl) within the bounds, with m such that they sum to 1.
    """
    lower, upper = _bounds(problem)
    _, slope = law.weighted(problem.weights, shares)
    if problem.kl == 0:
        best, left = lower.copy(), 1 - lower.sum()
        for group in np.argsort(slope):
            best[group] += min(left, upper[group] - lower[group])
            left = 1 - best.sum()
        return float(slope @ (shares - best)), best
    known = problem.prior > 0
    logs = np.full(len(slope), -np.inf)
    logs[known] = np.log(problem.prior[known]) - slope[known] / problem.kl

    def at(shift: float) -> Float[np.ndarray, "G"]:
        return np.clip(np.exp(np.minimum(logs + shift, 1.0)), lower, upper)

    middle = -float(np.logaddexp.reduce(logs[known]))
    reach = float(np.ptp(logs[known])) + 60.0
    shift = optimize.brentq(lambda by: at(by).sum() - 1, middle - reach, middle + reach, xtol=1e-12)
    best = at(shift)
    won = slope @ (shares - best) + problem.kl * (divergence(shares, problem.prior) - divergence(best, problem.prior))
    return float(won), best


def _within(
    shares: Float[np.ndarray, "G"], lower: Float[np.ndarray, "G"], upper: Float[np.ndarray, "G"]
) -> Float[np.ndarray, "G"]:
    """The shares of the bounds that are nearest, and sum to 1."""
    clipped = np.clip(shares, lower, upper)
    if abs(clipped.sum() - 1) < 1e-12:
        return clipped
    low, high = (lower - shares).min() - 1, (upper - shares).max() + 1
    shift = optimize.brentq(lambda by: np.clip(shares + by, lower, upper).sum() - 1, low, high, xtol=1e-15)
    clipped = np.clip(shares + shift, lower, upper)
    loose = (clipped > lower) & (clipped < upper)
    if loose.any():
        clipped[np.argmax(np.where(loose, clipped, -1))] += 1 - clipped.sum()
    return clipped
