"""Bounds: how low and how high each group's share may go, from what a study asks and from how much text there is; and
the nearest shares within them.

A source that is read x times in a run holds its whole group back, for the shares within a group do not move.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation.study import Constraints
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.errors import UserError

LEAST = 1e-4
"""A group's share below this counts as none: it would be a row or two of a proxy."""

SLACK = 1e-9
"""By how much rounding may take a share beyond its bounds."""


@dataclass(frozen=True)
class EpochBound:
    """The share of the group at which `source` is read `max_epochs` times in a run of `tokens` tokens."""

    share: float
    source: str
    max_epochs: float
    tokens: float


def epoch_bounds(
    within: Sequence[Mapping[str, float]], sizes: Mapping[str, SourceSize], max_epochs: float, tokens: float
) -> list[EpochBound]:
    """For each group, that of its source which is used up first. May be above 1."""
    bounds = []
    for shares in within:
        most = {name: max_epochs * sizes[name].tokens / (share * tokens) for name, share in shares.items()}
        source = min(most, key=lambda name: (most[name], name))
        bounds.append(EpochBound(most[source], source, max_epochs, tokens))
    return bounds


def share_bounds(
    constraints: Constraints,
    groups: Sequence[str],
    prior: Float[np.ndarray, "G"],
    epochs: Sequence[EpochBound],
) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
    """The lowest and the highest share of each group. `epochs` is empty where no epoch cap is set.

    The prior lies within. Raises UserError for groups that are not there, for bounds that leave no mixture, and for
    a prior that does not keep them.
    """
    lower, upper = np.zeros(len(groups)), np.ones(len(groups))
    for field in ("floors", "ceilings", "fixed"):
        for group, share in getattr(constraints, field).items():
            if group not in groups:
                close = difflib.get_close_matches(group, groups, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"the groups are {', '.join(groups)}"
                raise UserError(f"constraints: {field} names {group!r}, which is no group: {hint}")
            if not (math.isfinite(share) and 0 <= share <= 1):
                raise UserError(f"constraints: {field} has {share} for {group!r}: give a share from 0 to 1")
            if 0 < share < LEAST:
                raise UserError(
                    f"constraints: {field} has {share:g} for {group!r}, and less than {LEAST:g} counts as none: give "
                    "0 or more than that"
                )
            i = list(groups).index(group)
            lower[i] = share if field == "floors" else lower[i]
            upper[i] = share if field == "ceilings" else upper[i]
    for i, group in enumerate(groups):
        if lower[i] > upper[i]:
            raise UserError(
                f"constraints: {group!r} has the floor {lower[i]:g} above its ceiling {upper[i]:g}: change one of them"
            )
        if group in constraints.fixed:
            fixed = constraints.fixed[group]
            if not lower[i] <= fixed <= upper[i]:
                raise UserError(
                    f"constraints: {group!r} is fixed at {fixed:g}, outside of its floor {lower[i]:g} and ceiling "
                    f"{upper[i]:g}: drop the floor and the ceiling, or the fixed share"
                )
            lower[i] = upper[i] = fixed
    _check_sums(groups, lower, upper)
    for i, group in enumerate(groups):
        if group in constraints.fixed:
            if abs(prior[i] - constraints.fixed[group]) > 1e-6:
                raise UserError(
                    f"constraints: {group!r} is fixed at {constraints.fixed[group]:g} and has {prior[i]:.6f} in the "
                    f"prior: fix it at {prior[i]:.6f}, or change the prior"
                )
            lower[i] = upper[i] = prior[i]
        elif not lower[i] - SLACK <= prior[i] <= upper[i] + SLACK:
            kind, bound = ("floor", lower[i]) if prior[i] < lower[i] else ("ceiling", upper[i])
            raise UserError(
                f"constraints: the prior gives {group!r} {prior[i]:.4f}, beyond its {kind} {bound:g}: change the "
                f"{kind}, or the prior"
            )
    if epochs:
        _check_epochs(groups, prior, epochs)
        upper = np.minimum(upper, [bound.share for bound in epochs])
    upper = np.maximum(upper, prior)  # by rounding alone
    lower = np.minimum(lower, prior)
    if (lower < upper).sum() < 2:
        raise UserError("constraints: fewer than two groups may move: fix fewer of them")
    return lower, upper


def _check_sums(groups: Sequence[str], lower: Float[np.ndarray, "G"], upper: Float[np.ndarray, "G"]) -> None:
    if lower.sum() > 1 + SLACK:
        named = ", ".join(f"{group} {share:g}" for group, share in zip(groups, lower, strict=True) if share > 0)
        raise UserError(
            f"constraints: floors and fixed shares ({named}) sum to {lower.sum():.4g}, more than 1: lower them"
        )
    if upper.sum() < 1 - SLACK:
        named = ", ".join(f"{group} {share:g}" for group, share in zip(groups, upper, strict=True))
        raise UserError(
            f"constraints: ceilings and fixed shares ({named}) sum to {upper.sum():.4g}, less than 1: raise them"
        )


def _check_epochs(groups: Sequence[str], prior: Float[np.ndarray, "G"], epochs: Sequence[EpochBound]) -> None:
    """Raises UserError where the prior itself reads a source too often."""
    over = [i for i, bound in enumerate(epochs) if prior[i] > bound.share * (1 + 1e-12)]
    if not over:
        return
    worst = max(over, key=lambda i: prior[i] / epochs[i].share)
    bound = epochs[worst]
    read = bound.max_epochs * prior[worst] / bound.share
    needed = math.ceil(round(read * 100, 6)) / 100
    others = f" (and {len(over) - 1} more of the groups break it)" if len(over) > 1 else ""
    raise UserError(
        f"constraints: the prior reads {bound.source!r} of the group {groups[worst]!r} {read:.2f} times in "
        f"{bound.tokens:,.0f} tokens, and max_epochs={bound.max_epochs:g}{others}: max_epochs={needed:g} would do, or "
        f"give {bound.source!r} a smaller share of the prior, or train for fewer tokens"
    )


def can_fill(upper: Float[np.ndarray, "G"]) -> bool:
    """Whether shares up to these can sum to 1."""
    return bool(upper.sum() >= 1 - SLACK)


def onto_bounds(
    shares: Float[np.ndarray, "G"], lower: Float[np.ndarray, "G"], upper: Float[np.ndarray, "G"]
) -> Float[np.ndarray, "G"]:
    """The shares x within the bounds, of sum 1, with the least divergence KL(x || shares).

    They are min(max(c * shares, lower), upper) for the one c at which they sum to 1: where no bound is reached, all
    stay in proportion. What has no share gets `lower`. ValueError where the others cannot fill up to 1.
    """
    shares = np.where(shares > 1e-30, shares, 0.0)  # so that no point is infinite
    held = shares > 0
    points = np.unique(np.concatenate([lower[held] / shares[held], upper[held] / shares[held]]))
    sums = np.clip(points[:, None] * shares, lower, upper).sum(axis=1)  # rises with c, straight between the points
    if not sums[0] - SLACK <= 1 <= sums[-1] + SLACK:
        raise ValueError(f"no shares of sum 1: those within the bounds sum to {sums[0]:.6g} to {sums[-1]:.6g}")
    return np.clip(np.interp(1.0, sums, points) * shares, lower, upper)


def settled(
    shares: Float[np.ndarray, "G"], lower: Float[np.ndarray, "G"], upper: Float[np.ndarray, "G"]
) -> Float[np.ndarray, "G"]:
    """`onto_bounds`, and no share below `LEAST` but 0 where there is no floor: what is freed goes to the others."""
    found = onto_bounds(shares, lower, upper)
    while (small := (found > 0) & (found < LEAST) & (lower <= 0)).any():
        upper = np.where((found < LEAST) & (lower <= 0), 0.0, upper)
        if not can_fill(upper):
            break  # all others are at their bounds
        found = onto_bounds(np.where(small, 0.0, found), lower, upper)
    return found
