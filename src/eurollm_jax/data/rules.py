"""Rules: from a stage's recipe and the sizes of a store to each source's share of the stage's rows.

Shares are stated in the unit of a rule, rows are what is dealt. A row of a source holds `per_row` of the unit on
average, so a group's share of the rows is its share of the unit over what its rows are worth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eurollm_jax.data.groups import Corpus, listed, union
from eurollm_jax.data.recipe import Level, Recipe, Rule, Shares, Temperature, UniMax, without
from eurollm_jax.errors import UserError

_ROUNDS = 200  # of the search for shares in which a UniMax inside a group agrees with the group's rows


@dataclass(frozen=True, slots=True)
class StageShares:
    """Each source's share of the stage's rows, and what held each back or lifted it ("UniMax", "floor")."""

    rows: dict[str, float]
    binds: dict[str, str]


def stage_shares(recipe: Recipe, corpus: Corpus, rows: int, where: str) -> StageShares:
    """The shares of a stage of `rows` rows. Raises UserError, by name, for what cannot be honoured."""
    kept = _kept(recipe, corpus)
    if not kept:
        raise UserError(f"{where}: no source is left")
    empty = [name for name in kept if corpus.sizes[name].tokens <= 0 or corpus.sizes[name].rows <= 0]
    if empty:
        raise UserError(f"{where}: {listed(empty)} empty in the store; prepare text for it or add {without(empty)}")
    division = _divide(recipe.rule, kept, corpus, rows, where)
    if division.lack:
        raise UserError(f"{where}: {division.lack}")
    shares = division.rows
    for name, factor in recipe.factors:
        scaled = corpus.members(name) & shares.keys()
        if not scaled:
            raise UserError(f"{where}: scale names {name!r}, which has no share to scale")
        shares = {source: share * factor if source in scaled else share for source, share in shares.items()}
    shares, raised = _lift_to_floors(_normalised(shares), recipe, corpus, where)
    return StageShares(shares, dict.fromkeys(division.bound, "UniMax") | dict.fromkeys(raised, "floor"))


def _kept(recipe: Recipe, corpus: Corpus) -> list[str]:
    """The sources that the rule is applied to, sorted."""
    kept = set(corpus.sizes)
    if isinstance(recipe.rule.kind, Shares):
        kept = union(corpus.members(n, recipe.rule.over) for n, share in recipe.rule.kind.values if share > 0)
    for names in recipe.only:
        kept &= union(corpus.members(name) for name in names)
    for name in recipe.without:
        kept -= corpus.members(name)
    return sorted(kept)


@dataclass(frozen=True, slots=True)
class _Division:
    """Shares of a group's rows that sum to 1; the sources that UniMax holds back; what is lacking to fill the rows."""

    rows: dict[str, float]
    bound: frozenset[str] = frozenset()
    lack: str = ""


def _divide(rule: Rule, names: Sequence[str], corpus: Corpus, budget: float, where: str) -> _Division:
    """`budget` rows dealt to these sources, group by group.

    What a group's rows are worth depends on how they are divided inside it, and a UniMax inside depends on how many
    they are: the two are made to agree by turns. With any other rule inside, the second turn changes nothing.
    """
    groups = _groups(rule, names, corpus, where)
    if rule.over == "source":
        inner = {group: _Division({group: 1.0}) for group in groups}
    shares = dict.fromkeys(groups, 1 / len(groups))
    settled = True
    for turn in range(_ROUNDS):
        if rule.over != "source":
            inner = {g: _divide(rule.inner, groups[g], corpus, budget * shares[g], where) for g in groups}
        worth = {g: math.fsum(q * corpus.per_row(s, rule.unit) for s, q in inner[g].rows.items()) for g in groups}
        weights, bound, lack = _weights(rule, groups, inner, worth, corpus, budget)
        before, shares = shares, _normalised({group: weights[group] / worth[group] for group in groups})
        if all(math.isclose(shares[g], before[g], rel_tol=1e-12) for g in groups):
            break
        # They may go to and fro between two states: a smaller part of the way then.
        part = 2.0 ** -(4 * turn // _ROUNDS)
        shares = _normalised({group: before[group] ** (1 - part) * shares[group] ** part for group in groups})
    else:
        settled = False
    lacks = [lack, *(f"in {group}, {division.lack}" for group, division in inner.items() if division.lack)]
    lack = next(filter(None, lacks), "")
    if not (settled or lack):
        raise UserError(f"{where}: the unimax inside each group does not settle; raise its max_epochs")
    rows = {s: shares[g] * q for g in groups for s, q in inner[g].rows.items()}
    return _Division(rows, bound.union(*(d.bound for d in inner.values())), lack)


def _groups(rule: Rule, names: Sequence[str], corpus: Corpus, where: str) -> dict[str, list[str]]:
    """The sources by the groups that the rule deals to: at its level, or those that explicit shares name."""
    if not isinstance(rule.kind, Shares):
        return corpus.grouped(names, rule.over or "source")
    groups: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for label, share in rule.kind.values:
        members = sorted(corpus.members(label, rule.over).intersection(names)) if share > 0 else []
        for name in members:
            if name in group_of:
                raise UserError(f"{where}: shares gives the source {name!r} to both {group_of[name]!r} and {label!r}")
            group_of[name] = label
        if members:
            groups[label] = members
    if not groups:
        raise UserError(f"{where}: the shares inside a group name none of {', '.join(names)}; give one of them a share")
    return groups


def _weights(
    rule: Rule,
    groups: Mapping[str, list[str]],
    inner: Mapping[str, _Division],
    worth: Mapping[str, float],
    corpus: Corpus,
    budget: float,
) -> tuple[dict[str, float], frozenset[str], str]:
    """What each group gets in the rule's unit, up to a factor; the sources that UniMax holds back; what is lacking."""
    match rule.kind:
        case Temperature(alpha):
            sizes = {group: math.fsum(corpus.amount(s, rule.unit) for s in groups[group]) for group in groups}
            largest = max(sizes.values())  # divided out, so that no power can overflow
            return {group: (size / largest) ** alpha for group, size in sizes.items()}, frozenset(), ""
        case Shares(values):
            return {label: share for label, share in values if label in groups}, frozenset(), ""
        case UniMax(max_epochs):
            rows = {g: min(max_epochs * corpus.sizes[s].rows / q for s, q in inner[g].rows.items()) for g in groups}
            weights = _unimax({g: rows[g] * worth[g] for g in groups}, worth, budget)
            full = {g for g in groups if weights[g] >= rows[g] * worth[g] * (1 - 1e-12)}
            bound = frozenset(
                s
                for g in full
                for s, q in inner[g].rows.items()
                if q * rows[g] >= max_epochs * corpus.sizes[s].rows * (1 - 1e-9)
            )
            available = math.fsum(rows.values())
            lack = (
                f"unimax({max_epochs:g}) can fill {available:,.0f} rows from this store and is asked for "
                f"{budget:,.0f}; raise max_epochs, add text, or train for fewer rows"
            )
            return weights, bound, lack if budget > available * (1 + 1e-9) else ""


def _unimax(most: Mapping[str, float], worth: Mapping[str, float], budget: float) -> dict[str, float]:
    """What each group gets, in the unit of `most`, when `budget` rows are shared out as equally as `most` allows.

    From the smallest up: an equal part of what is left if the group has that much, else all that it has. A row's worth
    differs between groups, so the part is the level at which the rows left are used up.
    """
    ascending = sorted(most, key=lambda name: (most[name], name))
    left, weights = float(budget), {}
    for i, name in enumerate(ascending):
        level = left / math.fsum(1 / worth[other] for other in ascending[i:])
        weights[name] = min(level, most[name])
        left -= weights[name] / worth[name]
    return weights


def floor_groups(
    recipe: Recipe, names: set[str], corpus: Corpus, where: str
) -> dict[frozenset[str], tuple[str, float]]:
    """The sets of sources that have a floor in common, each with its name and floor.

    Raises UserError where two of them share a part of their sources, and where a floor names nothing that has a share.
    """
    wanted = [(name, corpus.members(name) & names, share) for name, share in recipe.floors]
    for name, members, _ in wanted:
        if not members:
            raise UserError(f"{where}: floor names {name!r}, which has no share to raise")
    level: Level
    for level, share in recipe.level_floors:
        wanted += [(group, frozenset(sources), share) for group, sources in corpus.grouped(names, level).items()]
    floors: dict[frozenset[str], tuple[str, float]] = {}
    for name, members, share in wanted:
        for other, (label, _) in floors.items():
            if members & other and members != other:
                raise UserError(
                    f"{where}: the floors of {label!r} and {name!r} overlap in {', '.join(sorted(members & other))}; "
                    "keep one of them"
                )
        floors[members] = max(floors.get(members, (name, 0.0)), (name, share), key=lambda pair: pair[1])
    return floors


def unit_shares(rows: Mapping[str, float], recipe: Recipe, corpus: Corpus) -> dict[str, float]:
    """Shares of the rows as shares of the recipe's unit."""
    return _normalised({name: share * corpus.per_row(name, recipe.rule.unit) for name, share in rows.items()})


def _lift_to_floors(
    rows: dict[str, float], recipe: Recipe, corpus: Corpus, where: str
) -> tuple[dict[str, float], frozenset[str]]:
    """The shares of rows, with each group below its floor raised to it and the others lowered by one factor; and the
    sources that were raised. Floors are shares of the recipe's unit."""
    floors = floor_groups(recipe, set(rows), corpus, where)
    total = math.fsum(share for _, share in floors.values())
    if total > 1 + 1e-9:
        raise UserError(f"{where}: the {len(floors)} floors sum to {total:.6g}, more than 1; lower them")
    if not floors:
        return rows, frozenset()
    shares = unit_shares(rows, recipe, corpus)
    weight = {members: math.fsum(shares[name] for name in members) for members in floors}
    raised: set[frozenset[str]] = set()
    while True:
        free = max(1 - math.fsum(floors[members][1] for members in raised), 0.0)
        unbound = math.fsum(s for name, s in shares.items() if not any(name in members for members in raised))
        factor = free / unbound if unbound > 0 else 0.0
        low = {m for m in floors if m not in raised and weight[m] * factor < floors[m][1] * (1 - 1e-12)}
        if not low:
            break
        raised |= low
    lift = {name: floors[members][1] / weight[members] for members in raised for name in members}
    lifted = {
        name: share * lift.get(name, factor) / corpus.per_row(name, recipe.rule.unit) for name, share in shares.items()
    }
    squeezed = [name for name, share in lifted.items() if share <= 0]
    if squeezed:
        raise UserError(f"{where}: the floors leave nothing for {', '.join(squeezed)}; lower them")
    return _normalised(lifted), frozenset(lift)


def _normalised(shares: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(shares.values())
    return {name: share / total for name, share in shares.items()}
