"""A study on the terminal: its design and cost before anything is trained, and its answer afterwards."""

import math
from typing import Any

from rich import box, markup
from rich.table import Table

from eurollm_jax.ablation.report import answer
from eurollm_jax.ablation.report.records import ArmRecord, CostRecord, StudyRecord, read_study
from eurollm_jax.ablation.report.words import DASH, share_range
from eurollm_jax.evaluation.report.records import parse
from eurollm_jax.evaluation.report.text import count, duration

LARGEST = 3  # shares of a mixture that are shown where there are more groups than that
MANY = 9  # groups beyond which a table of all arms does not fit a terminal


def plain_table(title: str) -> Table:
    return Table(
        title=markup.escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        expand=False,
    )


def design_tables(described: dict[str, Any]) -> list[Table | str]:
    """What `run.describe` gives, for the terminal: groups, mixtures, laws, cost."""
    study: StudyRecord = parse(described, StudyRecord, f"the study {described.get('name')}")
    return [_groups(study), _arms(study), _laws(study), *_costs(study)]


def _groups(study: StudyRecord) -> Table:
    table = plain_table(f"{len(study.groups)} groups: shares of tokens, and how far they were tried")
    table.add_column("group", no_wrap=True)
    table.add_column("sources", no_wrap=True)
    for name in ("prior", "least", "most", "bounds"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, record in study.groups.items():
        tried = [arm.shares.get(group, 0.0) for arm in study.arms]
        table.add_row(
            markup.escape(group),
            markup.escape(_begins(sorted(record.sources))),
            _percent(record.prior),
            _percent(min(tried, default=math.nan)),
            _percent(max(tried, default=math.nan)),
            f"{100 * record.lower:.3g} to {100 * record.upper:.3g} %",
        )
    return table


def _begins(names: list[str], width: int = 20) -> str:
    """As many of the names as fit, and how many there are besides."""
    shown = [name for i, name in enumerate(names) if len(", ".join(names[: i + 1])) <= width] or names[:1]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" + {rest}" if rest else "")


def _arms(study: StudyRecord) -> Table:
    """A line for each mixture; of many groups those that hold most, by name."""
    table = plain_table(f"{len(study.arms)} mixtures: shares of tokens in per cent")
    table.add_column("run", no_wrap=True)
    table.add_column("seed", justify="right")
    groups = list(study.groups)
    if len(groups) > MANY:
        table.add_column("largest shares")
        for arm in study.arms:
            table.add_row(markup.escape(arm.name), str(arm.seed), markup.escape(_largest(arm)))
        return table
    for group in groups:
        table.add_column(markup.escape(group), justify="right", overflow="fold")
    for arm in study.arms:
        shares = (f"{100 * arm.shares.get(group, 0.0):.1f}" for group in groups)
        table.add_row(markup.escape(arm.name), str(arm.seed), *shares)
    return table


def _largest(arm: ArmRecord) -> str:
    ordered = sorted(arm.shares.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{group} {100 * value:.1f}" for group, value in ordered[:LARGEST] if value)
    zero = sum(value == 0 for value in arm.shares.values())
    return shown + (f"; {zero} at 0" if zero else "")


def _laws(study: StudyRecord) -> str:
    """How many parameters there are to how many runs."""
    runs = len(study.arms)
    laws = ", ".join(f"{free} of the {law} law" for law, free in study.laws.items())
    return f"{runs} runs for {laws} (free parameters of each of {len(study.targets)} languages)."


def _costs(study: StudyRecord) -> list[Table | str]:
    table = plain_table("Cost, forward and backward, without held-out text")
    table.add_column("")
    for name in ("runs", "parameters", "tokens", "FLOP", "time", "device-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    parts = {"proxies": study.cost.proxies, "confirmation": study.cost.confirmation}
    for name, part in parts.items():
        if part is not None:
            table.add_row(name, *_cost(part, study.cost.device_count))
    said = [f"{name}: {part.rate}" for name, part in parts.items() if part is not None and part.rate]
    total = math.fsum(part.flops for part in parts.values() if part is not None)
    how = "; ".join(said) or "time is not known before a run of this size was timed here"
    return [table, f"{total:.3g} FLOP in all on {study.cost.devices}. How the time is known: {how}."]


def _cost(part: CostRecord, devices: int) -> list[str]:
    seconds = part.expected_seconds
    time, hours = (DASH, DASH) if seconds is None else (duration(seconds), f"{seconds * devices / 3600:,.2f}")
    return [str(part.runs), count(part.parameters), count(part.tokens), f"{part.flops:.3g}", time, hours]


def answer_table(folder: Any) -> tuple[str, Table | None]:
    """The answer of a study in words, and the proposed shares beside the prior's where there are any."""
    study = read_study(folder)
    _, verdict = answer.verdict_of(study)
    said = f"{verdict} {answer.answer(study)}"
    if study.findings is None:
        return said, None
    table = plain_table("Shares of tokens")
    table.add_column("group", no_wrap=True)
    for name in ("prior", "proposed", f"{100 * study.findings.confidence:g} % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, found in study.findings.proposal.items():
        prior = study.study.groups[group].prior
        table.add_row(markup.escape(group), _percent(prior), f"[bold]{_percent(found.value)}[/]", share_range(found))
    return said, table


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else DASH
