"""Recipe: what a user said about one stage of a mixture, as plain values that compare, hash, and print as the Python
that makes them."""

import keyword
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["tokens", "bytes", "content"]
Level = Literal["source", "language", "family"]
Excess = Literal["refuse", "redistribute"]


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
class Rule:
    """How shares are dealt to groups of sources, and by `within` inside each group; without one, in proportion.

    `over` is None for explicit shares whose names are looked up at every level.
    """

    kind: Temperature | UniMax | Shares
    unit: Unit
    over: Level | None = "source"
    within: "Rule | None" = None

    @property
    def inner(self) -> "Rule":
        """The rule inside each group."""
        return self.within or Rule(Temperature(1.0), self.unit)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The mixture of one stage: a rule over the sources that `only` and `without` leave, then factors, then floors."""

    rule: Rule
    only: frozenset[frozenset[str]] = frozenset()  # a source must be in each
    without: frozenset[str] = frozenset()
    factors: tuple[tuple[str, float], ...] = ()
    floors: tuple[tuple[str, float], ...] = ()
    level_floors: tuple[tuple[Level, float], ...] = ()  # for every group of the level

    @property
    def names(self) -> set[str]:
        """Every source, language and family that `only`, `without`, `factors` and `floors` name."""
        return {*self.without, *(n for n, _ in self.factors), *(n for n, _ in self.floors)}.union(*self.only)


@dataclass(frozen=True, slots=True)
class StageRecipe:
    """From global row `start` on, `recipe`; over the first `ramp_rows` of them, gradually."""

    start: int
    recipe: Recipe
    ramp_rows: int = 0


@dataclass(frozen=True, slots=True)
class EpochCap:
    """How often the whole run may read a source, and what becomes of a plan that would read it more often."""

    max_epochs: float
    excess: Excess


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able values; equal for equal recipes."""
    return {
        **_describe_rule(recipe.rule),
        "only": sorted(sorted(names) for names in recipe.only),
        "without": sorted(recipe.without),
        "scale": dict(recipe.factors),
        "floor": dict(recipe.floors),
        "floor_of_each": dict(recipe.level_floors),
    }


def _describe_rule(rule: Rule) -> dict[str, Any]:
    match rule.kind:
        case Temperature(alpha):
            kind: dict[str, Any] = {"temperature": alpha}
        case UniMax(max_epochs):
            kind = {"unimax": max_epochs}
        case Shares(values):
            kind = {"shares": dict(values)}
    within = None if rule.within is None else _describe_rule(rule.within)
    return {**kind, "unit": rule.unit, "over": rule.over, "within": within}


def expression(recipe: Recipe) -> str:
    """The recipe as the Python that makes it."""
    text = _rule_expression(recipe.rule)
    for names in sorted(map(sorted, recipe.only)):
        text += f".only({', '.join(map(repr, names))})"
    if recipe.without:
        text += without(recipe.without)
    if recipe.factors:
        plain = all(name.isidentifier() and not keyword.iskeyword(name) for name, _ in recipe.factors)
        keywords = ", ".join(f"{name}={factor!r}" for name, factor in recipe.factors)
        text += f".scale({keywords if plain else dict(recipe.factors)})"
    if recipe.floors:
        text += f".floor({dict(recipe.floors)})"
    for level, share in recipe.level_floors:
        text += f".floor({share!r})" if level == "source" else f".floor({share!r}, over={level!r})"
    return text


def _rule_expression(rule: Rule) -> str:
    over: Level | None = "source"
    match rule.kind:
        case Temperature(alpha):
            name, arguments = ("proportional", []) if alpha == 1 else ("temperature", [repr(alpha)])
        case UniMax(max_epochs):
            name, arguments = "unimax", [repr(max_epochs)]
        case Shares(values):
            name, arguments, over = "shares", [repr(dict(values))], None
    if rule.unit != "tokens":
        arguments.append(f"unit={rule.unit!r}")
    if rule.over != over:
        arguments.append(f"over={rule.over!r}")
    if rule.within is not None:
        arguments.append(f"within={_rule_expression(rule.within)}")
    return f"Mixture.{name}({', '.join(arguments)})"


def without(names: Iterable[str]) -> str:
    """The call that leaves these sources out."""
    return f".without({', '.join(map(repr, sorted(names)))})"
