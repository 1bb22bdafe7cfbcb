"""Plan: what a run will read of every source, in total and stage by stage, exact and before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from eurollm_jax.data.compile import Span, compile_stages
from eurollm_jax.data.groups import Corpus, SourceSize
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.recipe import Level, Rule
from eurollm_jax.data.schedule import SHARE_SUM, Schedule


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What a run, or a stretch of it, reads of one source."""

    name: str
    share: float  # of the rows
    rows: int
    tokens: int  # in proportion to rows: exact at whole epochs
    bytes: int
    epochs: float
    first_repeat: int | None  # the first global row here that was read before, if there is one
    binds: tuple[str, ...] = ()  # what holds the share back or lifts it: "UniMax", "floor", "cap"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Rows start..stop: a stage, or the ramp into one with the shares of rows that it leads from and to."""

    start: int
    stop: int
    sources: tuple[SourcePlan, ...]
    ramp: Mapping[str, tuple[float, float]] | None = None  # by source: before it, after it


@dataclass(frozen=True, slots=True)
class MixturePlan:
    """What a run reads. `levels` are those that the mixture groups by, "language" before "family"."""

    total_rows: int
    sizes: Mapping[str, SourceSize]
    total: tuple[SourcePlan, ...]
    stages: tuple[StagePlan, ...]
    levels: tuple[Level, ...]


def plan(schedule: Schedule, sizes: Mapping[str, SourceSize], total_rows: int) -> tuple[SourcePlan, ...]:
    """What the first `total_rows` rows read of every source that has a share."""
    return _between(schedule, sizes, 0, total_rows, {})


def mixture_plan(mixture: Mixture, sizes: Mapping[str, SourceSize], total_rows: int) -> MixturePlan:
    """What a run of `total_rows` rows reads under the mixture. Raises UserError as `Mixture.compile` does."""
    corpus = Corpus(sizes, dict(mixture.premiums))
    compiled = compile_stages(mixture.stages, mixture.cap, corpus, total_rows)
    schedule = compiled.schedule
    stages = tuple(
        StagePlan(
            span.start,
            span.stop,
            _between(schedule, sizes, span.start, span.stop, span.binds),
            _ends(schedule, span) if span.ramp else None,
        )
        for span in compiled.spans
    )
    binds = {
        name: tuple(dict.fromkeys(bind for span in compiled.spans for bind in span.binds.get(name, ())))
        for name in schedule.names
    }
    levels = {level for stage in mixture.stages for level in _levels(stage.recipe.rule)}
    levels |= {level for stage in mixture.stages for level, _ in stage.recipe.level_floors}
    return MixturePlan(
        total_rows,
        sizes,
        _between(schedule, sizes, 0, total_rows, binds),
        stages,
        tuple(level for level in get_args(Level) if level in levels - {"source"}),
    )


def share_steps(schedule: Schedule) -> list[dict[str, Any]]:
    """The shares of the rows over the run as JSON-able values: from row `start` on, `shares` by source."""
    return [
        {
            "start": stage.start,
            "shares": {n: share / SHARE_SUM for n, share in zip(schedule.names, stage.shares, strict=True) if share},
        }
        for stage in schedule.stages
    ]


def _levels(rule: Rule) -> set[Level]:
    found: set[Level] = set() if rule.over is None else {rule.over}
    return found if rule.within is None else found | _levels(rule.within)


def _between(
    schedule: Schedule, sizes: Mapping[str, SourceSize], start: int, stop: int, binds: Mapping[str, tuple[str, ...]]
) -> tuple[SourcePlan, ...]:
    before, after = schedule.counts(start).tolist(), schedule.counts(stop).tolist()
    whole = start == 0
    plans = []
    for source in schedule.scheduled:
        name, rows = schedule.names[source], after[source] - before[source]
        if not rows and not whole and name not in binds:
            continue
        size = sizes[name]
        again = max(before[source], size.rows)  # the source's first row here that is not of its first epoch
        repeat = int(schedule.index(np.array(source), np.array(again))) if after[source] > again else None
        tokens, octets = rows * size.tokens // size.rows, rows * size.bytes // size.rows
        share = rows / (stop - start)
        plans.append(
            SourcePlan(name, share, rows, tokens, octets, rows / size.rows, repeat, tuple(binds.get(name, ())))
        )
    return tuple(plans)


def _ends(schedule: Schedule, span: Span) -> dict[str, tuple[float, float]]:
    """Share of the rows of each source before the ramp and after it, or in its last piece where the run ends there."""
    first, last = schedule.stages[span.first - 1].shares, schedule.stages[span.last + 1 :][:1]
    after = last[0].shares if last else schedule.stages[span.last].shares
    return {
        name: (a / SHARE_SUM, b / SHARE_SUM) for name, a, b in zip(schedule.names, first, after, strict=True) if a or b
    }
