"""Compile: the stages of a mixture meet the sizes of a store, and become integer row shares or a refusal by name.

A ramp becomes pieces of constant shares. Piece i of n holds the shares that the line has at its middle, so at the end
of each piece the rows of every source are those of the line.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eurollm_jax.data.groups import Corpus, listed, union
from eurollm_jax.data.recipe import EpochCap, Recipe, Rule, Shares, StageRecipe, without
from eurollm_jax.data.rules import StageShares, floor_groups, stage_shares, unit_shares
from eurollm_jax.data.schedule import SHARE_SUM, Schedule, Stage
from eurollm_jax.errors import UserError

RAMP_PIECES = 64
"""The most pieces that a ramp is cut into. A source then changes by at most 1/64 of the larger of its two shares from
piece to piece. A short ramp has fewer: each piece may round by a row, and n pieces of a ramp over which a source
gains d rows leave the line by d / n**2, so no more than the cube root of d are of use."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start..stop of a run: a stage, or the ramp into one. It is pieces `first` to `last` of the schedule."""

    start: int
    stop: int
    first: int
    last: int
    ramp: bool
    binds: Mapping[str, tuple[str, ...]]  # source -> what held its share back or lifted it


@dataclass(frozen=True, slots=True)
class Compiled:
    """A schedule and what its stages mean."""

    schedule: Schedule
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows start..stop with constant shares of the rows, of the recipe `stage` (a ramp: of the one it leads to)."""

    start: int
    stop: int
    stage: int
    ramp: bool
    shares: Mapping[str, float]
    binds: Mapping[str, str]


def compile_stages(stages: Sequence[StageRecipe], cap: EpochCap | None, corpus: Corpus, total_rows: int) -> Compiled:
    """The schedule of a run of `total_rows` rows. Raises UserError for what cannot be honoured."""
    if total_rows < 1:
        raise UserError(f"a run needs at least one row, not {total_rows}")
    for stage in stages:
        _check_names(stage.recipe, corpus)
    pieces = _pieces(stages, corpus, total_rows)
    capped: frozenset[str] = frozenset()
    if cap is not None:
        pieces, capped = _cap(pieces, cap, corpus, total_rows)
        _check_floors(pieces, stages, capped, cap, corpus)
    names = tuple(sorted(corpus.sizes))
    many = len(pieces) > 1
    schedule = Schedule(names, tuple(Stage(p.start, _quantise(names, p.shares, _where(p.start, many))) for p in pieces))
    given = {names[source] for source in schedule.scheduled}
    for stage in stages:
        _check_only(stage.recipe, given, corpus)
    return Compiled(schedule, _spans(pieces, capped))


def _check_names(recipe: Recipe, corpus: Corpus) -> None:
    for name in sorted(recipe.names):
        corpus.members(name)
    rule: Rule | None = recipe.rule
    while rule is not None:
        for name, _ in rule.kind.values if isinstance(rule.kind, Shares) else ():
            corpus.members(name, rule.over)
        rule = rule.within


def _check_only(recipe: Recipe, given: set[str], corpus: Corpus) -> None:
    """Raises UserError for a name that `only` keeps and that gets nothing, whichever stage one looks at."""
    left = set(corpus.sizes) - union(corpus.members(name) for name in recipe.without)
    for names in recipe.only:
        left &= union(corpus.members(name) for name in names)
    for name in sorted(union(recipe.only)):
        members = corpus.members(name) & left
        if members and not members & given:
            raise UserError(f"mixture: only({name!r}) keeps a source that has no share in any stage; give it one")


def _where(start: int, many: bool) -> str:
    return f"mixture stage from row {start}" if many else "mixture"


def _pieces(stages: Sequence[StageRecipe], corpus: Corpus, total_rows: int) -> list[_Piece]:
    """The stages and the ramps between them as pieces of constant shares, without any that begins after the run."""
    ends = [stage.start for stage in stages[1:]] + [total_rows]
    pieces: list[_Piece] = []
    former: StageShares | None = None
    for number, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        where = _where(stage.start, len(stages) > 1)
        if stage.start >= end:
            raise UserError(f"{where}: the run ends at row {total_rows}, before the stage starts")
        hold = stage.start + stage.ramp_rows
        if hold > total_rows:
            raise UserError(
                f"{where}: the run ends at row {total_rows}, before the ramp of {stage.ramp_rows} rows does; shorten it"
            )
        goal = stage_shares(stage.recipe, corpus, end - stage.start, where)
        if former is not None and stage.ramp_rows:
            binds = {**former.binds, **goal.binds}
            for start, stop, shares in _ramp(stage, former.rows, goal.rows):
                pieces.append(_Piece(start, stop, number, True, shares, binds))
        if hold < end:
            pieces.append(_Piece(hold, end, number, False, goal.rows, goal.binds))
        former = goal
    return pieces


def _ramp(
    stage: StageRecipe, before: Mapping[str, float], after: Mapping[str, float]
) -> Iterable[tuple[int, int, dict[str, float]]]:
    """(start, stop, shares) of each piece of a ramp."""
    ends = {name: (before.get(name, 0.0), after.get(name, 0.0)) for name in sorted({*before, *after})}
    relative = max(abs(b - a) / max(a, b) for a, b in ends.values())
    gained = max(abs(b - a) for a, b in ends.values()) * stage.ramp_rows
    pieces = max(1, min(RAMP_PIECES, math.ceil(RAMP_PIECES * relative), math.ceil(gained ** (1 / 3))))
    for i in range(pieces):
        start, stop = i * stage.ramp_rows // pieces, (i + 1) * stage.ramp_rows // pieces
        way = (start + stop) / 2 / stage.ramp_rows
        yield stage.start + start, stage.start + stop, {n: (1 - way) * a + way * b for n, (a, b) in ends.items()}


def _cap(pieces: list[_Piece], cap: EpochCap, corpus: Corpus, total_rows: int) -> tuple[list[_Piece], frozenset[str]]:
    """The pieces with no source read more than `cap.max_epochs` times, and the sources that this held back.

    A source that would be is bound: its share is multiplied by one factor in all pieces, so that the run reads it
    exactly that often, and what is freed goes to the sources of the piece that are not bound, in proportion to their
    shares. That may bind further ones, until none is over.
    """
    names = sorted({name for piece in pieces for name in piece.shares})
    shares = np.array([[piece.shares.get(name, 0.0) for name in names] for piece in pieces])
    rows = np.array([piece.stop - piece.start for piece in pieces], np.float64)
    most = np.array([cap.max_epochs * corpus.sizes[name].rows for name in names])
    over = _over(rows @ shares, most)
    if cap.excess == "refuse":
        listing = ", ".join(f"{names[i]} ({(rows @ shares)[i] / corpus.sizes[names[i]].rows:.3g})" for i in over)
        if len(over):
            raise UserError(
                f"mixture: cap_epochs({cap.max_epochs:g}) is exceeded in {total_rows:,} rows by {listing} (epochs in "
                "brackets); lower these shares, raise the cap, train for fewer rows, or say excess='redistribute'"
            )
        return pieces, frozenset()
    bound = np.zeros(len(names), np.bool_)
    while len(over):
        bound[over] = True
        shares[:, over] *= (most / (rows @ shares))[over]
        shares = _redistributed(shares, bound, pieces, names, cap)
        over = _over(np.where(bound, 0.0, rows @ shares), most)
    capped = [
        _Piece(p.start, p.stop, p.stage, p.ramp, {n: s for n, s in zip(names, line, strict=True) if s > 0}, p.binds)
        for p, line in zip(pieces, shares.tolist(), strict=True)
    ]
    return capped, frozenset(name for name, is_bound in zip(names, bound.tolist(), strict=True) if is_bound)


def _over(rows: Float[np.ndarray, " sources"], most: Float[np.ndarray, " sources"]) -> np.ndarray:
    return np.flatnonzero(rows > most * (1 + 1e-9))


def _redistributed(
    shares: Float[np.ndarray, "pieces sources"],
    bound: np.ndarray,
    pieces: Sequence[_Piece],
    names: Sequence[str],
    cap: EpochCap,
) -> Float[np.ndarray, "pieces sources"]:
    """The shares with those that are not bound raised by one factor in each piece, so that all sum to 1."""
    taken, free = shares[:, bound].sum(axis=1), shares[:, ~bound].sum(axis=1)
    full = np.flatnonzero((free <= 0) & (taken < 1 - 1e-9))
    if len(full):
        piece = pieces[full[0]]
        here = [name for name in names if name in piece.shares]
        raise UserError(
            f"{_where(piece.start, len(pieces) > 1)}: cap_epochs({cap.max_epochs:g}) leaves rows that no source may "
            f"fill, {listed(here)} all read that often; raise the cap, add sources or text, or train for fewer rows"
        )
    factor = np.divide(1 - taken, free, out=np.ones_like(free), where=free > 0)
    return np.where(bound, shares, shares * factor[:, None])


def _check_floors(
    pieces: Iterable[_Piece], stages: Sequence[StageRecipe], capped: frozenset[str], cap: EpochCap, corpus: Corpus
) -> None:
    """Raises UserError where the cap has taken a source below its floor. Within ramps floors are not promised."""
    for piece in pieces:
        recipe = stages[piece.stage].recipe
        if piece.ramp or not capped or not (recipe.floors or recipe.level_floors):
            continue
        where = _where(piece.start, len(stages) > 1)
        shares = unit_shares(piece.shares, recipe, corpus)
        for members, (name, floor) in floor_groups(recipe, set(piece.shares), corpus, where).items():
            share = math.fsum(shares[source] for source in members)
            if share < floor * (1 - 1e-9):
                raise UserError(
                    f"{where}: {name!r} has the floor {floor:g}, and cap_epochs({cap.max_epochs:g}) allows it "
                    f"{share:.3g}; lower the floor, raise the cap, or train for fewer rows"
                )


def _quantise(names: Iterable[str], shares: Mapping[str, float], where: str) -> tuple[int, ...]:
    """The shares as integers that sum to SHARE_SUM, by largest remainder (equal remainders: the first name)."""
    exact = {name: share * SHARE_SUM for name, share in shares.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    missing = SHARE_SUM - sum(whole.values())
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[:missing]:
        whole[name] += 1
    lost = [name for name in exact if whole[name] == 0]
    if lost:
        raise UserError(
            f"{where}: {listed(lost)} given less than 1 row in {SHARE_SUM:,}, which cannot be honoured; "
            f"raise the share or add {without(lost)}"
        )
    return tuple(whole.get(name, 0) for name in names)


def _spans(pieces: Sequence[_Piece], capped: frozenset[str]) -> tuple[Span, ...]:
    """Runs of pieces that belong to one stage, or to the ramp into it."""
    spans: list[Span] = []
    for i, piece in enumerate(pieces):
        if piece.ramp and spans and spans[-1].ramp and pieces[i - 1].stage == piece.stage:
            last = spans.pop()
            spans.append(Span(last.start, piece.stop, last.first, i, True, last.binds))
            continue
        found = {name: [bind] for name, bind in piece.binds.items()}
        for name in capped & piece.shares.keys():
            found.setdefault(name, []).append("cap")
        spans.append(Span(piece.start, piece.stop, i, i, piece.ramp, {n: tuple(b) for n, b in found.items()}))
    return tuple(spans)
