"""Mixture: how much of a run each source gets, as an immutable value with algebra, compiled to exact integer row
shares.

A mixture is written in the unit that the user thinks in (tokens or bytes) and knows no corpus; `compile` meets it
with the sizes of a store, and refuses by name whatever cannot be honoured.
"""

import difflib
import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from eurollm_jax.data.schedule import DEVIATION, SHARE_SUM, Schedule, Stage
from eurollm_jax.errors import UserError

Unit = Literal["tokens", "bytes"]


@dataclass(frozen=True, slots=True)
class SourceSize:
    """One epoch of a source: its tokens, its raw UTF-8 bytes, and the rows that its tokens fill."""

    tokens: int
    bytes: int
    rows: int
    language: str = ""


@dataclass(frozen=True, slots=True)
class Temperature:
    """Shares in proportion to size ** alpha."""

    alpha: float


@dataclass(frozen=True, slots=True)
class UniMax:
    """Shares as equal as `max_epochs` epochs of each source allow."""

    max_epochs: float


@dataclass(frozen=True, slots=True)
class Shares:
    """Explicit shares, sorted by name."""

    values: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The mixture of one stage: a rule over the sources that `only` and `without` leave, then factors."""

    rule: Temperature | UniMax | Shares
    unit: Unit
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    factors: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the sources, stage by stage. Make one with the class methods, vary it with the others; each returns a
    new value, and equal mixtures compare and hash equal."""

    stages: tuple[tuple[int, Recipe], ...]  # (global row from which on, recipe)
    max_epochs: float | None = None

    @classmethod
    def proportional(cls, unit: Unit = "tokens") -> "Mixture":
        """Every source in proportion to its size: all reach the end of an epoch together."""
        return cls.temperature(1.0, unit)

    @classmethod
    def temperature(cls, alpha: float, unit: Unit = "tokens") -> "Mixture":
        """Shares in proportion to size ** alpha: 1 is proportional, 0 uniform (Lample and Conneau 2019, section
        3.1)."""
        _check(math.isfinite(alpha) and alpha >= 0, f"temperature: alpha must be 0 or more, not {alpha}")
        return cls(((0, Recipe(Temperature(float(alpha)), _unit(unit))),))

    @classmethod
    def unimax(cls, max_epochs: float, unit: Unit = "tokens") -> "Mixture":
        """Shares as equal as possible with no source read more than `max_epochs` times (Chung et al. 2023, algorithm
        1).

        The budget is the rows of the stage. Where the paper goes on beyond `max_epochs` once every source is used up,
        `compile` refuses.
        """
        _check(math.isfinite(max_epochs) and max_epochs > 0, f"unimax: max_epochs must be above 0, not {max_epochs}")
        return cls(((0, Recipe(UniMax(float(max_epochs)), _unit(unit))),))

    @classmethod
    def shares(cls, shares: Mapping[str, float], unit: Unit = "tokens") -> "Mixture":
        """Explicit shares that sum to 1 within 1e-6; sources that are not named get nothing."""
        for name, share in shares.items():
            _check(math.isfinite(share) and share >= 0, f"shares: {name!r} has the share {share}; give 0 or more")
        total = math.fsum(shares.values())
        _check(
            abs(total - 1) <= 1e-6,
            f"shares: the {len(shares)} shares sum to {total:.9g}, not 1; correct them, or divide each by that sum",
        )
        return cls(((0, Recipe(Shares(tuple(sorted((n, float(s)) for n, s in shares.items()))), _unit(unit))),))

    def only(self, *names: str) -> "Mixture":
        """These sources alone; a rule is applied among them, explicit shares are rescaled."""
        _check(names, "only: name at least one source")
        return self._each(lambda r: replace(r, only=frozenset(names) if r.only is None else r.only & frozenset(names)))

    def without(self, *names: str) -> "Mixture":
        """All but these sources; a rule is applied among the others, explicit shares are rescaled."""
        return self._each(lambda r: replace(r, without=r.without | frozenset(names)))

    def scale(self, factors: Mapping[str, float] | None = None, /, **more: float) -> "Mixture":
        """Each named source's share times its factor, then all rescaled to sum to 1: `.scale(fi=2)`, or with a mapping
        where a name is no Python keyword argument: `.scale({"is": 2})`."""
        factors = {**(factors or {}), **more}
        for name, factor in factors.items():
            _check(math.isfinite(factor) and factor > 0, f"scale: {name!r} has the factor {factor}; give one above 0")

        def scaled(recipe: Recipe) -> Recipe:
            product = dict(recipe.factors)
            for name, factor in factors.items():
                product[name] = product.get(name, 1.0) * float(factor)
            return replace(recipe, factors=tuple(sorted(product.items())))

        return self._each(scaled)

    def cap_epochs(self, max_epochs: float) -> "Mixture":
        """The same shares, refused by `compile` if the run would read any source more than `max_epochs` times."""
        _check(math.isfinite(max_epochs) and max_epochs > 0, f"cap_epochs: give a number above 0, not {max_epochs}")
        return replace(self, max_epochs=float(max_epochs))

    def stage(self, *, at_row: int, mixture: "Mixture") -> "Mixture":
        """From global row `at_row` on, `mixture` instead. A cap stays that of the whole run: set it last."""
        last = self.stages[-1][0]
        _check(at_row > last, f"stage: at_row={at_row} does not come after row {last}, at which the last stage starts")
        _check(
            len(mixture.stages) == 1 and mixture.max_epochs is None,
            f"stage: the mixture at row {at_row} has stages or a cap of its own; chain .stage(...) and "
            ".cap_epochs(...) on the outer mixture",
        )
        return replace(self, stages=(*self.stages, (int(at_row), mixture.stages[0][1])))

    def _each(self, change: Callable[[Recipe], Recipe]) -> "Mixture":
        return replace(self, stages=tuple((row, change(recipe)) for row, recipe in self.stages))

    def describe(self) -> dict:
        """A canonical description as JSON-able values; equal for equal mixtures."""
        return {"stages": [{"row": row, **_describe(recipe)} for row, recipe in self.stages], "cap": self.max_epochs}

    def __repr__(self) -> str:
        texts = [_expression(recipe) for _, recipe in self.stages]
        stages = [
            f".stage(at_row={row}, mixture={text})" for (row, _), text in zip(self.stages[1:], texts[1:], strict=True)
        ]
        cap = [] if self.max_epochs is None else [f".cap_epochs({self.max_epochs!r})"]
        return "".join([texts[0], *stages, *cap])

    def compile(self, sizes: Mapping[str, SourceSize], total_rows: int) -> Schedule:
        """Integer row shares for a store of these sizes and a run of `total_rows` rows.

        The run's length sets UniMax's budget and what caps are checked against; the other rules do not depend on it.
        Raises UserError, by name, for a source that the store lacks or has empty, a share too small to be kept, and a
        plan over a cap.
        """
        _check(total_rows >= 1, f"a run needs at least one row, not {total_rows}")
        self._check_names(sizes)
        names = tuple(sorted(sizes))
        ends = [row for row, _ in self.stages[1:]] + [total_rows]
        stages = []
        for (start, recipe), end in zip(self.stages, ends, strict=True):
            where = f"mixture stage from row {start}" if len(self.stages) > 1 else "mixture"
            _check(start < end, f"{where}: the run ends at row {total_rows}, before the stage starts")
            stages.append(Stage(start, _quantise(names, _row_shares(recipe, sizes, end - start, where), where)))
        schedule = Schedule(names, tuple(stages))
        given = {names[source] for source in schedule.scheduled}
        for _, recipe in self.stages:
            for name in sorted((recipe.only or frozenset()) - recipe.without - given):
                raise UserError(f"mixture: only({name!r}) keeps a source that has no share in any stage; give it one")
        if self.max_epochs is not None:
            _check_cap(schedule, sizes, total_rows, self.max_epochs)
        return schedule

    def _check_names(self, sizes: Mapping[str, SourceSize]) -> None:
        for _, recipe in self.stages:
            named = [name for name, _ in recipe.factors]
            if isinstance(recipe.rule, Shares):
                named += [name for name, _ in recipe.rule.values]
            for name in sorted({*named, *recipe.without, *(recipe.only or ())}):
                if name not in sizes:
                    close = difflib.get_close_matches(name, sizes, n=1, cutoff=0.5)
                    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(sizes))}"
                    raise UserError(f"the mixture names the source {name!r}, which the store lacks; {hint}")


def _row_shares(recipe: Recipe, sizes: Mapping[str, SourceSize], rows: int, where: str) -> dict[str, float]:
    """Share of the stage's rows for each source that has any.

    Shares are stated in the recipe's unit; a source's row holds `amount / rows` of that unit on average, so its share
    of the rows is its share of the unit divided by that.
    """
    explicit = {n: s for n, s in recipe.rule.values if s > 0} if isinstance(recipe.rule, Shares) else None
    kept = sorted(
        name
        for name in (sizes if explicit is None else explicit)
        if name not in recipe.without and (recipe.only is None or name in recipe.only)
    )
    _check(kept, f"{where}: no source is left")
    amounts = {name: getattr(sizes[name], recipe.unit) for name in kept}
    empty = [name for name in kept if amounts[name] <= 0 or sizes[name].rows <= 0]
    _check(not empty, f"{where}: {_listed(empty)} empty in the store; prepare text for it or add {_without(empty)}")
    match recipe.rule:
        case Temperature(alpha):
            largest = max(amounts.values())  # divided out, so that no power can overflow
            weights = {name: (amounts[name] / largest) ** alpha for name in kept}
        case UniMax(max_epochs):
            weights = _unimax(amounts, {name: sizes[name].rows for name in kept}, max_epochs, rows, where)
        case Shares(values):
            weights = {name: share for name, share in values if name in amounts}
    for name, factor in recipe.factors:
        _check(name in weights, f"{where}: scale names {name!r}, which has no share to scale")
        weights[name] *= factor
    per_row = {name: weight * (sizes[name].rows / amounts[name]) for name, weight in weights.items()}
    total = math.fsum(per_row.values())
    return {name: share / total for name, share in per_row.items()}


def _unimax(
    amounts: Mapping[str, int], rows_of: Mapping[str, int], max_epochs: float, budget: int, where: str
) -> dict[str, float]:
    """What each source gets, in the unit of `amounts`, when `budget` rows are shared out as equally as the caps allow.

    From the smallest source up: an equal part of what is left if the source has that much in `max_epochs` epochs, else
    all of those. A row's worth differs between sources, so the part is the level at which the rows left are used up.
    """
    available = max_epochs * sum(rows_of.values())
    _check(
        budget <= available * (1 + 1e-9),
        f"{where}: unimax({max_epochs:g}) can fill {available:,.0f} rows from this store and is asked for {budget:,}; "
        "raise max_epochs, add text, or train for fewer rows",
    )
    ascending = sorted(amounts, key=lambda name: (amounts[name], name))
    left, weights = float(budget), {}
    for i, name in enumerate(ascending):
        level = left / math.fsum(rows_of[other] / amounts[other] for other in ascending[i:])
        weights[name] = min(level, max_epochs * amounts[name])
        left -= weights[name] * rows_of[name] / amounts[name]
    return weights


def _quantise(names: Iterable[str], shares: Mapping[str, float], where: str) -> tuple[int, ...]:
    """The shares as integers that sum to SHARE_SUM, by largest remainder (equal remainders: the first name)."""
    exact = {name: share * SHARE_SUM for name, share in shares.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    missing = SHARE_SUM - sum(whole.values())
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[:missing]:
        whole[name] += 1
    lost = [name for name in exact if whole[name] == 0]
    _check(
        not lost,
        f"{where}: {_listed(lost)} given less than 1 row in {SHARE_SUM:,}, which cannot be honoured; "
        f"raise the share or add {_without(lost)}",
    )
    return tuple(whole.get(name, 0) for name in names)


def _check_cap(schedule: Schedule, sizes: Mapping[str, SourceSize], total_rows: int, max_epochs: float) -> None:
    rounding = DEVIATION * len(schedule.stages) + total_rows / SHARE_SUM  # what compiling to integers may add
    over = [p for p in plan(schedule, sizes, total_rows) if p.rows > max_epochs * sizes[p.name].rows + rounding]
    listed = ", ".join(f"{p.name} ({p.epochs:.3g})" for p in over)
    _check(
        not over,
        f"mixture: cap_epochs({max_epochs:g}) is exceeded in {total_rows:,} rows by {listed} (epochs in brackets); "
        "lower these shares, raise the cap, or train for fewer rows",
    )


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What a run reads of one source."""

    name: str
    share: float  # of the run's rows
    rows: int
    tokens: int  # in proportion to rows: exact at whole epochs
    bytes: int
    epochs: float
    first_repeat: int | None  # the global row at which the second epoch starts, if the run gets there


def plan(schedule: Schedule, sizes: Mapping[str, SourceSize], total_rows: int) -> tuple[SourcePlan, ...]:
    """What the first `total_rows` rows read of every source that has a share, exact and before anything is read."""
    counts = schedule.counts(total_rows).tolist()
    plans = []
    for source in schedule.scheduled:
        name, rows = schedule.names[source], counts[source]
        size = sizes[name]
        repeat = int(schedule.index(np.array(source), np.array(size.rows))) if rows > size.rows else None
        tokens, octets = rows * size.tokens // size.rows, rows * size.bytes // size.rows
        plans.append(SourcePlan(name, rows / total_rows, rows, tokens, octets, rows / size.rows, repeat))
    return tuple(plans)


def _describe(recipe: Recipe) -> dict:
    match recipe.rule:
        case Temperature(alpha):
            rule: dict = {"temperature": alpha}
        case UniMax(max_epochs):
            rule = {"unimax": max_epochs}
        case Shares(values):
            rule = {"shares": dict(values)}
    return {
        **rule,
        "unit": recipe.unit,
        "only": None if recipe.only is None else sorted(recipe.only),
        "without": sorted(recipe.without),
        "scale": dict(recipe.factors),
    }


def _expression(recipe: Recipe) -> str:
    """The recipe as the Python that makes it."""
    match recipe.rule:
        case Temperature(alpha):
            name, argument = ("proportional", "") if alpha == 1 else ("temperature", repr(alpha))
        case UniMax(max_epochs):
            name, argument = "unimax", repr(max_epochs)
        case Shares(values):
            name, argument = "shares", repr(dict(values))
    unit = [] if recipe.unit == "tokens" else [f"unit={recipe.unit!r}"]
    text = f"Mixture.{name}({', '.join([argument] * bool(argument) + unit)})"
    if recipe.only is not None:
        text += f".only({', '.join(map(repr, sorted(recipe.only)))})"
    if recipe.without:
        text += _without(recipe.without)
    if recipe.factors:
        plain = all(name.isidentifier() and not keyword.iskeyword(name) for name, _ in recipe.factors)
        keywords = ", ".join(f"{name}={factor!r}" for name, factor in recipe.factors)
        text += f".scale({keywords if plain else dict(recipe.factors)})"
    return text


def _unit(unit: str) -> Unit:
    for known in get_args(Unit):
        if unit == known:
            return known
    raise UserError(f"a mixture's unit is 'tokens' or 'bytes', not {unit!r}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _without(names: Iterable[str]) -> str:
    return f".without({', '.join(map(repr, sorted(names)))})"


def _check(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)
