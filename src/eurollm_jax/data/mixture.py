"""Mixture: how much of a run each source gets, as an immutable value with algebra.

A mixture is written in the unit that the user thinks in (tokens, bytes or content) and knows no corpus; `compile` meets
it with the sizes of a store, and refuses by name whatever cannot be honoured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from eurollm_jax.data import recipe as recipes
from eurollm_jax.data.compile import compile_stages
from eurollm_jax.data.groups import Corpus, SourceSize
from eurollm_jax.data.recipe import (
    EpochCap,
    Excess,
    Level,
    Recipe,
    Rule,
    Shares,
    StageRecipe,
    Temperature,
    UniMax,
    Unit,
)
from eurollm_jax.data.schedule import Schedule
from eurollm_jax.errors import UserError
from eurollm_jax.languages import resolve

__all__ = ["Level", "Mixture", "SourceSize", "Unit"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the sources, stage by stage. Make one with the class methods, vary it with the others; each returns a
    new value, and equal mixtures compare and hash equal.

    A name is a source's, a language's code or a family's, looked up in this order; a language or a family stands for
    its sources together. `source:fi`, `language:fi`, `family:Uralic` say which is meant where a name is two things.

    A rule deals shares out `over` families, languages or sources, and the mixture `within` deals each group's share
    out inside it, without one in proportion to size.

    The order in which operations are written does not matter. Each stage does this: `only` and `without` choose its
    sources; the rule gives them shares; `scale` multiplies them; `floor` lifts the low ones. Then ramps join the
    stages, and last `cap_epochs` holds for the whole run. Each operation applies to all stages that are there when it
    is called.
    """

    stages: tuple[StageRecipe, ...]
    cap: EpochCap | None = None
    premiums: tuple[tuple[str, float], ...] = ()

    @classmethod
    def proportional(cls, unit: Unit = "tokens", over: Level = "source", within: "Mixture | None" = None) -> "Mixture":
        """Every source in proportion to its size: all reach the end of an epoch together."""
        return cls.temperature(1.0, unit, over, within)

    @classmethod
    def temperature(
        cls, alpha: float, unit: Unit = "tokens", over: Level = "source", within: "Mixture | None" = None
    ) -> "Mixture":
        """Shares in proportion to size ** alpha: 1 is proportional, 0 uniform (Lample and Conneau 2019, section
        3.1)."""
        _check(math.isfinite(alpha) and alpha >= 0, f"temperature: alpha must be 0 or more, not {alpha}")
        return _mixture(Temperature(float(alpha)), unit, over, within)

    @classmethod
    def unimax(
        cls, max_epochs: float, unit: Unit = "tokens", over: Level = "source", within: "Mixture | None" = None
    ) -> "Mixture":
        """Shares as equal as possible with no source read more than `max_epochs` times (Chung et al. 2023, algorithm
        1).

        The budget is the rows of the stage, and its ramp's. Where the paper goes on beyond `max_epochs` once every
        source is used up, `compile` refuses. Over groups, a group is full when the first of its sources is.
        """
        _check(math.isfinite(max_epochs) and max_epochs > 0, f"unimax: max_epochs must be above 0, not {max_epochs}")
        return _mixture(UniMax(float(max_epochs)), unit, over, within)

    @classmethod
    def shares(
        cls,
        shares: Mapping[str, float],
        unit: Unit = "tokens",
        over: Level | None = None,
        within: "Mixture | None" = None,
    ) -> "Mixture":
        """Explicit shares that sum to 1 within 1e-6; sources that are not named get nothing. `over` says what all names
        are; without it each is looked up. As the mixture within another, shares are relative."""
        for name, share in shares.items():
            _check(math.isfinite(share) and share >= 0, f"shares: {name!r} has the share {share}; give 0 or more")
        total = math.fsum(shares.values())
        _check(
            abs(total - 1) <= 1e-6,
            f"shares: the {len(shares)} shares sum to {total:.9g}, not 1; correct them, or divide each by that sum",
        )
        return _mixture(Shares(tuple(sorted((n, float(s)) for n, s in shares.items()))), unit, over, within)

    def only(self, *names: str) -> "Mixture":
        """These alone; a rule is applied among them, explicit shares are rescaled."""
        _check(names, "only: name at least one source")
        return self._each(lambda r: replace(r, only=r.only | {frozenset(names)}))

    def without(self, *names: str) -> "Mixture":
        """All but these; a rule is applied among the others, explicit shares are rescaled."""
        return self._each(lambda r: replace(r, without=r.without | frozenset(names)))

    def scale(self, factors: Mapping[str, float] | None = None, /, **more: float) -> "Mixture":
        """Each named share times its factor, then all rescaled to sum to 1: `.scale(fi=2)`, or with a mapping where a
        name is no Python keyword argument: `.scale({"is": 2})`."""
        factors = {**(factors or {}), **more}
        for name, factor in factors.items():
            _check(math.isfinite(factor) and factor > 0, f"scale: {name!r} has the factor {factor}; give one above 0")

        def scaled(recipe: Recipe) -> Recipe:
            product = dict(recipe.factors)
            for name, factor in factors.items():
                product[name] = product.get(name, 1.0) * float(factor)
            return replace(recipe, factors=tuple(sorted(product.items())))

        return self._each(scaled)

    def floor(self, floors: Mapping[str, float] | float, over: Level = "source") -> "Mixture":
        """At least these shares (in the unit of the outermost rule), or one for every group that has any at the level
        `over`. Who is below is lifted to the floor, the others are lowered by one factor. A second floor replaces the
        first."""
        named = floors if isinstance(floors, Mapping) else {}
        for name, share in (named if isinstance(floors, Mapping) else {f"every {over}": floors}).items():
            _check(math.isfinite(share) and 0 < share <= 1, f"floor: {name!r} has {share}; give a share above 0, to 1")
        _check(over in get_args(Level), f"floor: over is {_options(Level)}, not {over!r}")

        def lifted(recipe: Recipe) -> Recipe:
            if isinstance(floors, Mapping):
                return replace(recipe, floors=_merged(recipe.floors, named))
            return replace(recipe, level_floors=_merged(recipe.level_floors, {over: floors}))

        return self._each(lifted)

    def cap_epochs(self, max_epochs: float, excess: Excess = "refuse") -> "Mixture":
        """No source read more than `max_epochs` times in the whole run (but for the rounding to whole rows).

        A plan over the cap is refused by `compile`; with `excess="redistribute"` the share of a source that is over is
        multiplied by one factor in all stages, so that the run reads it exactly `max_epochs` times, and what is freed
        goes to the others of each stage in proportion.
        """
        _check(math.isfinite(max_epochs) and max_epochs > 0, f"cap_epochs: give a number above 0, not {max_epochs}")
        _check(excess in get_args(Excess), f"cap_epochs: excess is {_options(Excess)}, not {excess!r}")
        return replace(self, cap=EpochCap(float(max_epochs), excess))

    def content_premiums(self, premiums: Mapping[str, float]) -> "Mixture":
        """Byte premiums by language, for `unit="content"`, in place of those of the language table."""
        for code, premium in premiums.items():
            _check(
                math.isfinite(premium) and premium > 0, f"content_premiums: {code!r} has {premium}; give one above 0"
            )
        codes = {resolve(code).code: float(premium) for code, premium in premiums.items()}
        return replace(self, premiums=_merged(self.premiums, codes))

    def stage(self, *, at_row: int, mixture: "Mixture", ramp_rows: int = 0) -> "Mixture":
        """From global row `at_row` on, `mixture` instead; with `ramp_rows`, the shares of the rows go there on a
        straight line in that many. Caps and premiums stay those of the whole run: set them last.

        A ramp is cut into at most 64 pieces of constant shares, a short one into fewer. A source that changes by d
        over a ramp of w rows in n pieces is, at any row of it, within d * ceil(w / n)**2 / (8 * w) rows of the line,
        besides the rounding to whole rows (`schedule.DEVIATION` for each piece begun).
        """
        last = self.stages[-1]
        _check(
            at_row > last.start,
            f"stage: at_row={at_row} does not come after row {last.start}, at which the last stage starts",
        )
        _check(
            at_row >= last.start + last.ramp_rows,
            f"stage: at_row={at_row} lies in the ramp of the last stage, which ends at row "
            f"{last.start + last.ramp_rows}",
        )
        _check(ramp_rows >= 0, f"stage: ramp_rows must be 0 or more, not {ramp_rows}")
        _check(
            len(mixture.stages) == 1 and mixture.cap is None and not mixture.premiums,
            f"stage: the mixture at row {at_row} has stages, a cap or premiums of its own; chain .stage(...), "
            ".cap_epochs(...) and .content_premiums(...) on the outer mixture",
        )
        added = StageRecipe(int(at_row), mixture.stages[0].recipe, int(ramp_rows))
        return replace(self, stages=(*self.stages, added))

    def _each(self, change: Callable[[Recipe], Recipe]) -> "Mixture":
        return replace(self, stages=tuple(replace(stage, recipe=change(stage.recipe)) for stage in self.stages))

    def describe(self) -> dict[str, Any]:
        """A canonical description as JSON-able values; equal for equal mixtures."""
        stages = [{"row": s.start, "ramp_rows": s.ramp_rows, **recipes.describe(s.recipe)} for s in self.stages]
        cap = None if self.cap is None else {"max_epochs": self.cap.max_epochs, "excess": self.cap.excess}
        return {"stages": stages, "cap": cap, "premiums": dict(self.premiums)}

    def __repr__(self) -> str:
        text = recipes.expression(self.stages[0].recipe)
        for stage in self.stages[1:]:
            ramp = f", ramp_rows={stage.ramp_rows}" if stage.ramp_rows else ""
            text += f".stage(at_row={stage.start}, mixture={recipes.expression(stage.recipe)}{ramp})"
        if self.premiums:
            text += f".content_premiums({dict(self.premiums)})"
        if self.cap is not None:
            excess = "" if self.cap.excess == "refuse" else f", excess={self.cap.excess!r}"
            text += f".cap_epochs({self.cap.max_epochs!r}{excess})"
        return text

    def compile(self, sizes: Mapping[str, SourceSize], total_rows: int) -> Schedule:
        """Integer row shares for a store of these sizes and a run of `total_rows` rows.

        The run's length sets UniMax's budget and what caps are held against; the other rules do not depend on it.
        Raises UserError, by name, for what the store lacks or has empty, a share too small to be kept, floors and caps
        that cannot be held, and a language whose byte premium is needed and not known.
        """
        return compile_stages(self.stages, self.cap, Corpus(sizes, dict(self.premiums)), total_rows).schedule


def _mixture(kind: Temperature | UniMax | Shares, unit: Unit, over: Level | None, within: Mixture | None) -> Mixture:
    """A mixture of one stage with this rule."""
    _check(unit in get_args(Unit), f"a mixture's unit is {_options(Unit)}, not {unit!r}")
    _check(
        over in get_args(Level) or (over is None and isinstance(kind, Shares)),
        f"a mixture is over {_options(Level)}, not {over!r}",
    )
    inside = None if within is None else _rule(within, over)
    if inside == Rule(Temperature(1.0), unit):
        inside = None  # what stands there anyway
    return Mixture((StageRecipe(0, Recipe(Rule(kind, unit, over, inside))),))


def _rule(within: Mixture, over: Level | None) -> Rule:
    """The rule of a mixture that is to deal out inside the groups of another, which is over `over`."""
    recipe = within.stages[0].recipe
    _check(
        within == Mixture((StageRecipe(0, Recipe(recipe.rule)),)),
        f"within: {within!r} is more than a rule; apply .scale(...), .floor(...) and the like to the outer mixture",
    )
    levels = get_args(Level)
    _check(
        over is None or (over != "source" and levels.index(recipe.rule.over or "source") < levels.index(over)),
        f"within: a mixture over {recipe.rule.over!r} cannot stand inside one over {over!r}; levels go from 'family' "
        "over 'language' to 'source'",
    )
    return recipe.rule


def _merged[K](pairs: tuple[tuple[K, float], ...], more: Mapping[K, float]) -> tuple[tuple[K, float], ...]:
    return tuple(sorted(({**dict(pairs), **{key: float(value) for key, value in more.items()}}).items()))


def _options(literal: Any) -> str:
    *others, last = map(repr, get_args(literal))
    return f"{', '.join(others)} or {last}"


def _check(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)
