"""Design: which mixtures a study tries. All of it follows from the design's seed and the space.

Draw i looks at `candidates` points of Dirichlet(concentration * prior) within the bounds, and keeps the one that lies
farthest from the prior and from all draws before it, in Hellinger distance: sum over groups of (sqrt(r) - sqrt(r'))**2.
Each draw has a concentration of its own, and they lie evenly on a logarithmic scale: were the farthest taken from all
concentrations at once, only the lowest would be left. Draw i depends on no later one, so a longer design begins with a
shorter one.
"""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from eurollm_jax.ablation.bounds import can_fill, settled
from eurollm_jax.ablation.laws import runs_needed
from eurollm_jax.ablation.space import Space
from eurollm_jax.ablation.study import Design
from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["prior", "draw", "zeroed", "leave-one-out", "one-at-a-time", "listed"]

REDRAWS = 50
"""Points that are drawn for each candidate until one is within the bounds; after that, they are moved onto them."""

SAME = 1e-6
"""Arms whose shares all differ by less are one."""

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, fill [0, 1) evenly however many there are


@dataclass(frozen=True)
class Arm:
    """A mixture that is tried."""

    name: str  # unique and good for a folder
    kind: Kind
    shares: tuple[float, ...]  # of tokens, by group of the space; sum 1
    seed: int = 0  # what is added to the proxy experiment's: of the initial weights


def arms(design: Design, space: Space) -> list[Arm]:
    """The mixtures of the design, all within the bounds of the space: the priors, the draws, and the others.

    One that equals an earlier one is dropped, and one that the bounds rule out too; lines in the log say which. No
    share is below `bounds.LEAST` but 0. Raises UserError for a design that cannot be.
    """
    _check(design)
    found = [_arm(space, f"prior-{seed}", "prior", space.prior, seed) for seed in range(design.prior_runs)]
    found += _draws(design, space)
    if design.leave_one_out:
        found += _leave_one_out(space)
    if design.one_at_a_time is not None:
        found += _one_at_a_time(space, design.one_at_a_time)
    found += [_listed(number, shares, space) for number, shares in enumerate(design.listed, 1)]
    unlike = _without_twins(_named_apart(found))
    _tell_of_few(unlike, space)
    return unlike


def require_feasible(space: Space, arms: Iterable[Arm], total_rows: int) -> None:
    """Raises UserError, by name, where a run of `total_rows` rows cannot honour the mixture of an arm."""
    for arm in arms:
        mixture = space.mixture(arm.shares)
        try:
            (mixture if space.max_epochs is None else mixture.cap_epochs(space.max_epochs)).compile(
                space.sizes, total_rows
            )
        except UserError as error:
            raise UserError(f"design: {arm.name} cannot be trained for {total_rows:,} rows: {error}") from None


def _check(design: Design) -> None:
    low, high = design.concentrations
    checks = {
        f"draws={design.draws} must be 0 or more": design.draws >= 0,
        f"prior_runs={design.prior_runs} must be 0 or more": design.prior_runs >= 0,
        f"candidates={design.candidates} must be 1 or more": design.candidates >= 1,
        f"zeroed={design.zeroed} must be from 0 to 1": 0 <= design.zeroed <= 1,
        f"concentrations=({low:g}, {high:g}) must be above 0, the lower first": 0 < low <= high < math.inf,
        f"one_at_a_time={design.one_at_a_time} must be above 0, and not 1": design.one_at_a_time is None
        or (0 < design.one_at_a_time < math.inf and design.one_at_a_time != 1),
        f"seed={design.seed} must be 0 or more": design.seed >= 0,
    }
    for message, holds in checks.items():
        if not holds:
            raise UserError(f"design: {message}")


def _arm(space: Space, name: str, kind: Kind, shares: Float[np.ndarray, "G"], seed: int = 0) -> Arm:
    """Shares in nine digits, or on their bounds: the last digits of a logarithm differ between machines, and a study
    may move to another. What rounding leaves goes to the group that is farthest from its bounds."""
    room = np.minimum(shares - space.lower, space.upper - shares)
    bound = np.where(shares - space.lower < space.upper - shares, space.lower, space.upper)
    rounded = np.where(room < 1e-8, bound, np.round(shares, 9))
    if room.max() >= 1e-8:
        rounded[room.argmax()] += 1 - rounded.sum()
    return Arm(name, kind, tuple(float(share) for share in rounded), seed)


# ---------------------------------------------------------------------------------------------------- draws


def _draws(design: Design, space: Space) -> list[Arm]:
    zeroed = design.zeroed
    if zeroed and design.draws and not any(_may_leave_out(space, _only(space, g)) for g in range(len(space.groups))):
        log.warning("the bounds allow no draw without one of the groups: all draws have all of them")
        zeroed = 0.0
    low, high = design.concentrations
    roots = np.sqrt(np.tile(space.prior, (design.draws + 1, 1)))  # of the prior and the draws so far
    found: list[Arm] = []
    drawn, moved, beyond = 0, 0, Counter[str]()
    for number in range(design.draws):
        leaves_out = math.floor((number + 1) * zeroed) > math.floor(number * zeroed)
        concentration = low * (high / low) ** ((0.5 + number * _GOLDEN) % 1)
        rng = np.random.default_rng([design.seed, number])
        pool = _candidates(rng, space, concentration, design.candidates, leaves_out)
        apart = (np.sqrt(pool.points)[:, None] - roots[: number + 1]) ** 2
        distances = apart.sum(axis=2).min(axis=1)
        best = int(distances.argmax())
        kind: Kind = "zeroed" if leaves_out else "draw"
        found.append(_arm(space, f"{kind}-{number:02d}", kind, pool.points[best]))
        roots[number + 1] = np.sqrt(pool.points[best])
        drawn, moved = drawn + pool.drawn, moved + (best >= pool.within)
        beyond.update(pool.beyond)
    if moved or beyond.total() > drawn / 2:
        (bound, times), *_ = beyond.most_common(1)
        log.warning(
            "%d of %d Dirichlet draws lie beyond the bounds, most often %s (%d); %d of the %d that were kept were "
            "moved onto the bounds: higher concentrations stay nearer to the prior",
            beyond.total(), drawn, bound, times, moved, design.draws,
        )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class _Pool:
    """Candidates for one draw; those after the first `within` were moved onto the bounds."""

    points: Float[np.ndarray, "n G"]
    within: int
    drawn: int  # how many were looked at
    beyond: Counter[str]  # how many broke a bound, by the one that they broke by most


def _candidates(rng: np.random.Generator, space: Space, concentration: float, count: int, leaves_out: bool) -> _Pool:
    within: list[Float[np.ndarray, G]] = []
    outside: list[tuple[Float[np.ndarray, G], Float[np.ndarray, G]]] = []
    beyond = Counter[str]()
    free = _free(space)
    drawn = 0
    while len(within) < count and drawn < REDRAWS * count:
        drawn += 1
        out = _left_out(rng, space) if leaves_out else np.zeros(len(space.groups), np.bool_)
        point = _dirichlet(rng, space, concentration, out)
        point = settled(point, np.where(free, 0.0, space.lower), np.where(free, 1.0 - out, space.upper))
        upper = np.where(out, 0.0, space.upper)
        excess = np.maximum(point - upper, space.lower - point)
        worst = int(excess.argmax())
        if excess[worst] <= 0:
            within.append(point)
        else:
            side = "above the highest share of" if point[worst] > upper[worst] else "below the lowest share of"
            beyond[f"{side} {space.groups[worst]}"] += 1
            outside.append((point, upper))
    moved = [  # with a little of the prior, so that groups without a share can take up what the bounds take away
        settled(np.where(upper > 0, 0.99 * point + 0.01 * space.prior, 0.0), space.lower, upper)
        for point, upper in outside[: count - len(within)]
    ]
    return _Pool(np.array(within + moved), len(within), drawn, beyond)


def _dirichlet(
    rng: np.random.Generator, space: Space, concentration: float, out: Bool[np.ndarray, "G"]
) -> Float[np.ndarray, "G"]:
    """A point of Dirichlet(concentration * prior) given its fixed shares, and that the groups `out` have none."""
    free = _free(space)
    point = np.where(free, 0.0, space.prior)
    drawn = rng.dirichlet(concentration * space.prior[free & ~out])
    point[free & ~out] = drawn * (1 - point.sum())
    return point


def _left_out(rng: np.random.Generator, space: Space) -> Bool[np.ndarray, "G"]:
    """Some groups, one to half of all, without which the bounds can be kept."""
    out = np.zeros(len(space.groups), np.bool_)
    wanted = int(rng.integers(1, max(len(out) // 2, 1), endpoint=True))
    for group in rng.permutation(len(out)):
        if out.sum() < wanted and _may_leave_out(space, out | _only(space, group)):
            out[group] = True
    return out


def _may_leave_out(space: Space, out: Bool[np.ndarray, "G"]) -> bool:
    return bool((space.lower[out] <= 0).all()) and can_fill(np.where(out, 0.0, space.upper))


def _only(space: Space, group: int) -> Bool[np.ndarray, "G"]:
    return np.arange(len(space.groups)) == group


def _free(space: Space) -> Bool[np.ndarray, "G"]:
    """The groups whose share is not fixed."""
    return space.lower < space.upper


# --------------------------------------------------------------------------------------------------- others


def _leave_one_out(space: Space) -> list[Arm]:
    """The prior without each group, the others in proportion as far as the bounds allow."""
    found = []
    for i, group in enumerate(space.groups):
        if not _may_leave_out(space, _only(space, i)):
            log.warning("the bounds allow no mixture without %s: its leave-one-out run is left out", group)
            continue
        upper = np.where(_only(space, i), 0.0, space.upper)
        shares = settled(np.where(_only(space, i), 0.0, space.prior), space.lower, upper)
        found.append(_arm(space, f"without-{_plain(group)}", "leave-one-out", shares))
    return found


def _one_at_a_time(space: Space, factor: float) -> list[Arm]:
    """The prior with each group's share times the factor, as far as the bounds allow, and the others in proportion."""
    found = []
    for i, group in enumerate(space.groups):
        share = float(np.clip(factor * space.prior[i], space.lower[i], space.upper[i]))
        lower, upper = (np.where(_only(space, i), share, bound) for bound in (space.lower, space.upper))
        if lower.sum() > 1 or not can_fill(upper):
            log.warning("the bounds allow no mixture with %g times the share of %s: it is left out", factor, group)
            continue
        name = f"{_plain(group)}-x{factor:g}"
        found.append(_arm(space, name, "one-at-a-time", settled(space.prior, lower, upper)))
    return found


def _listed(number: int, shares: Mapping[str, float], space: Space) -> Arm:
    """Raises UserError where these are no shares of the groups, or break a bound."""
    where = f"design: listed shares {number}"
    if unknown := sorted(shares.keys() - set(space.groups)):
        raise UserError(
            f"{where}: there is no group {', '.join(map(repr, unknown))}: the groups are {', '.join(space.groups)}"
        )
    found = np.array([shares.get(group, 0.0) for group in space.groups], np.float64)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise UserError(f"{where}: {dict(shares)} has a share that is not 0 or more: mend it")
    if abs(found.sum() - 1) > 1e-6:
        raise UserError(f"{where}: they sum to {found.sum():.6g}, not 1: correct them")
    found = found / found.sum()
    for i, group in enumerate(space.groups):
        if not space.lower[i] - 1e-6 <= found[i] <= space.upper[i] + 1e-6:
            raise UserError(
                f"{where}: {group!r} has {found[i]:.4f}, and the constraints allow {space.lower[i]:.4f} to "
                f"{space.upper[i]:.4f}: change the share, or the constraints"
            )
    upper = np.where(found > 0, space.upper, 0.0)
    return _arm(space, f"listed-{number}", "listed", settled(found, space.lower, upper))


def _plain(group: str) -> str:
    """The group's name as a part of a folder's."""
    return re.sub(r"[^\w.-]+", "-", group).strip(".-") or "group"


def _named_apart(found: Sequence[Arm]) -> list[Arm]:
    """With a number where groups' names become the same: the next that makes a name which no other arm has."""
    times = Counter(arm.name for arm in found)
    taken, named = set(times), []
    for arm in found:
        name = arm.name
        if times[name] > 1:
            name = next(new for i in itertools.count(1) if (new := f"{arm.name}-{i}") not in taken)
            taken.add(name)
        named.append(replace(arm, name=name))
    return named


def _without_twins(found: Sequence[Arm]) -> list[Arm]:
    shares = np.array([arm.shares for arm in found]).reshape(len(found), -1)
    kept: list[Arm] = []
    for i, arm in enumerate(found):
        twin = int((np.abs(shares[: i + 1] - shares[i]) < SAME).all(axis=1).argmax())  # the first, at last itself
        if twin == i or arm.kind == "prior":
            kept.append(arm)
        else:
            log.warning("%s has the shares of %s and is dropped", arm.name, found[twin].name)
    return kept


def _tell_of_few(found: Sequence[Arm], space: Space) -> None:
    needed = runs_needed("log-linear", len(space.groups))
    if len(found) < needed:
        log.warning(
            "%d runs: a log-linear law of %d groups is fitted to %d or more; take more draws, or fewer groups",
            len(found), len(space.groups), needed,
        )  # fmt: skip
