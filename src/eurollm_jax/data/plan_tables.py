"""Tables of a mixture's plan for the terminal: what the run and each of its stages read, with subtotals by language and
family where the mixture is written over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box, markup
from rich.table import Table

from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.plan import MixturePlan, SourcePlan, StagePlan
from eurollm_jax.data.recipe import Level
from eurollm_jax.languages import LANGUAGES


def mix_tables(plan: MixturePlan, levels: Sequence[Level] | None = None) -> list[Table]:
    """One table for the whole run, then one for each stage and ramp if there are several; each fits 100 columns.

    `levels` are those to give subtotals for, by default those that the mixture is written over. "repeats" is the first
    global row whose text was read before.
    """
    levels = plan.levels if levels is None else levels
    tables = [_table(f"The whole run: {plan.total_rows:,} rows", plan.total, plan, levels)]
    if len(plan.stages) > 1:
        tables += [_table(_title(stage), stage.sources, plan, levels, stage) for stage in plan.stages]
    return tables


def _title(stage: StagePlan) -> str:
    kind = "Stage" if stage.ramp is None else "Ramp"
    return f"{kind} from row {stage.start:,} to {stage.stop:,}: {stage.stop - stage.start:,} rows"


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a table: a source, or the sum of a group's."""

    label: str
    sources: list[SourcePlan]
    bold: bool


def _table(
    title: str,
    sources: Sequence[SourcePlan],
    plan: MixturePlan,
    levels: Sequence[Level],
    stage: StagePlan | None = None,
) -> Table:
    ramp = stage.ramp if stage else None
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, expand=False
    )
    table.add_column("source", min_width=12, max_width=22, overflow="ellipsis")  # gives way; figures must not
    for name in ("share", "rows", "tokens", "bytes", "epochs", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("held by", no_wrap=True)
    for line in _lines(sources, plan, levels):
        cells = _cells(line, plan, ramp)
        table.add_row(*(f"[bold]{cell}[/]" if line.bold and cell else cell for cell in cells))
    return table


def _lines(sources: Sequence[SourcePlan], plan: MixturePlan, levels: Sequence[Level], depth: int = 0) -> list[_Line]:
    """The sources, those with the largest share first, under the sums of their groups, the highest level outermost."""
    ordered = sorted(sources, key=lambda source: (-source.share, source.name))
    if not levels:
        return [_Line(f"{'  ' * depth}{source.name}", [source], False) for source in ordered]
    groups: dict[str, list[SourcePlan]] = {}
    for source in ordered:
        groups.setdefault(_group(plan.sizes[source.name], levels[-1]), []).append(source)
    lines = []
    for group in sorted(groups, key=lambda name: -math.fsum(source.share for source in groups[name])):
        members = groups[group]
        if levels[-1] == "language" and len(members) == 1:
            lines += _lines(members, plan, (), depth)
            continue
        lines.append(_Line(f"{'  ' * depth}{group}", members, True))
        lines += _lines(members, plan, levels[:-1], depth + 1)
    return lines


def _group(size: SourceSize, level: Level) -> str:
    language = LANGUAGES.get(size.language)
    if language is None:
        return size.language or "no language"
    return language.code if level == "language" else language.family


def _cells(line: _Line, plan: MixturePlan, ramp: Mapping[str, tuple[float, float]] | None) -> list[str]:
    sources = line.sources
    share, exact = _percent(math.fsum(source.share for source in sources)), 10**9
    if ramp is not None:
        ends = [ramp.get(source.name, (0.0, 0.0)) for source in sources]
        before, after = (_percent(math.fsum(end[side] for end in ends)) for side in (0, 1))
        share, exact = f"{before.removesuffix(' %')} → {after}", 10**6  # the arrow takes the room of the digits
    rows, tokens, octets = (sum(getattr(source, name) for source in sources) for name in ("rows", "tokens", "bytes"))
    epochs = rows / sum(plan.sizes[source.name].rows for source in sources)
    repeats = [source.first_repeat for source in sources if source.first_repeat is not None]
    binds = dict.fromkeys(bind for source in sources for bind in source.binds)
    return [
        markup.escape(line.label),
        share,
        _whole(rows, exact),
        _scaled(tokens),
        _scaled(octets, "B"),
        f"{epochs:.2f}" if epochs >= 0.095 or not rows else f"{epochs:.1g}",
        _whole(min(repeats), exact) if repeats else "",
        ", ".join(binds) if not line.bold else "",
    ]


def _percent(share: float) -> str:
    """Two digits that count, three from ten on: "12.3 %", "1.2 %", "0.00012 %"."""
    value = float(f"{100 * share:.1e}") if share < 0.0995 else 100 * share
    digits = 1 if value >= 10 or not value else 1 - math.floor(math.log10(value) + 1e-9)
    return f"{value:.{digits}f} %"


def _whole(value: int, below: int) -> str:
    """All digits of a number below this one."""
    return f"{value:,}" if value < below else _scaled(value)


def _scaled(value: float, unit: str = "") -> str:
    """Three digits that count, before a decimal prefix."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            number = value / scale
            return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {prefix}{unit}"
    return f"{value:,.0f} {unit}".rstrip()
