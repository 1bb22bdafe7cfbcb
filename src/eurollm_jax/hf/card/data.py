"""The sections of a model card about its data: what was read, under which mixture, and the licences.

What a card says must be what the weights have seen: tokens and bytes are those that training counted, up to the step of
the weights, never those that were planned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eurollm_jax.evaluation.report.records import Plan, PlanSource, Run
from eurollm_jax.evaluation.report.text import share, size
from eurollm_jax.hf.card.words import NOT_RECORDED, bullets, cell, language, mixture, table


@dataclass(frozen=True)
class Consumed:
    """What training has read of each source up to a step, useful tokens alone."""

    step: int
    seconds: float
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    bytes: Mapping[str, int]

    @property
    def all_tokens(self) -> int:
        return sum(self.tokens.values())


@dataclass(frozen=True)
class LanguageRead:
    tokens: int
    bytes: int
    epochs: tuple[float, ...]  # of each of its sources


def consumed_until(run: Run, step: int | None) -> Consumed | None:
    """From the records of training, up to `step` or the last; None where there are none."""
    records = [record for record in run.metrics.train if step is None or record.step <= step] if run.metrics else []
    if not records:
        return None
    last = records[-1]
    return Consumed(
        last.step,
        last.seconds,
        rows={name: progress.rows for name, progress in last.sources.items()},
        tokens={name: progress.tokens for name, progress in last.sources.items()},
        bytes={name: sum(r.sources[name].bytes for r in records if name in r.sources) for name in last.sources},
    )


def read_by_language(plan: Plan | None, consumed: Consumed | None) -> dict[str, LanguageRead]:
    """The languages of which something was read, those with most tokens first."""
    if plan is None or consumed is None:
        return {}
    found: dict[str, LanguageRead] = {}
    for name, source in plan.sources.items():
        if not consumed.tokens.get(name, 0):
            continue
        before = found.get(source.language, LanguageRead(0, 0, ()))
        found[source.language] = LanguageRead(
            before.tokens + consumed.tokens[name],
            before.bytes + consumed.bytes[name],
            (*before.epochs, _epochs(source, consumed.rows[name])),
        )
    return dict(sorted(found.items(), key=lambda item: (-item[1].tokens, item[0])))


def data_section(run: Run, consumed: Consumed | None) -> str:
    title = "## Training data"
    if run.plan is None or consumed is None:
        return f"{title}\n\nWhat the model has read is {NOT_RECORDED}."
    rows, total = sum(consumed.rows.values()), max(1, consumed.all_tokens)
    parts = [
        title,
        f"Counted in training, up to step {consumed.step:,}: {consumed.all_tokens:,} tokens and "
        f"{sum(consumed.bytes.values()):,} bytes of UTF-8 in {rows:,} rows, without padding and without what was "
        "removed. Epochs: how often the text of a source was passed over.",
    ]
    if origin := run.experiment.experiment.get("start_from"):
        parts.append(
            f"Training began with the parameters of {cell(Path(origin).name)}; what these had seen is not counted."
        )
    if rows != run.plan.total_rows:
        parts.append(
            f"This is {share(rows / max(1, run.plan.total_rows))} of the {run.plan.total_rows:,} rows that the run is "
            "planned to read."
        )
    languages = (
        (language(code), f"{read.tokens:,}", f"{read.bytes:,}", share(read.tokens / total), _range(read.epochs))
        for code, read in read_by_language(run.plan, consumed).items()
    )
    columns = {"Language": "left", "Tokens": "right", "Bytes": "right", "Share of tokens": "right", "Epochs": "right"}
    parts.append(table(columns, languages))
    if len(run.plan.sources) > len({source.language for source in run.plan.sources.values()}):
        parts += ["### By source", _sources(run.plan, consumed)]
    return "\n\n".join(parts)


def _sources(plan: Plan, consumed: Consumed) -> str:
    rows_read = max(1, sum(consumed.rows.values()))
    lines = (
        (
            cell(name),
            language(plan.sources[name].language),
            f"{consumed.tokens.get(name, 0):,}",
            share(plan.sources[name].share),
            share(consumed.rows.get(name, 0) / rows_read),
            _range((_epochs(plan.sources[name], consumed.rows.get(name, 0)),)),
        )
        for name in sorted(plan.sources, key=lambda name: (-consumed.tokens.get(name, 0), name))
    )
    columns = {"Source": "left", "Language": "left", "Tokens": "right", "Rows planned": "right", "Rows read": "right"}
    return table({**columns, "Epochs": "right"}, lines)


def _epochs(planned: PlanSource, rows: int) -> float:
    """How often this many rows pass over a source."""
    return planned.epochs * rows / planned.rows if planned.rows else 0.0


def _range(values: tuple[float, ...]) -> str:
    """ "1.24", or of several sources "0.80 to 3.10"."""
    low, high = (f"{v:.2f}" if v >= 0.095 or not v else f"{v:.2g}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def mixture_section(run: Run) -> str:
    declared = run.experiment.experiment.get("data", {}).get("mixture")
    if not isinstance(declared, Mapping) or not declared.get("stages"):
        return f"### Mixture\n\nThe mixture as it was declared is {NOT_RECORDED}."
    lines = []
    for stage in declared["stages"]:
        ramp = f", gradually over {stage['ramp_rows']:,} rows" if stage["ramp_rows"] else ""
        start = f"From row {stage['row']:,} on{ramp}: " if len(declared["stages"]) > 1 else ""
        lines.append(start + mixture(stage))
    if cap := declared.get("cap"):
        lines.append(f"No source more than {cap['max_epochs']:g} epochs in the whole run (excess: {cap['excess']})")
    if premiums := declared.get("premiums"):
        lines.append("Byte premiums: " + ", ".join(f"{cell(name)} {value:g}" for name, value in premiums.items()))
    return f"### Mixture as declared\n\n{bullets(lines)}"


def licence_section(plan: Plan | None) -> str:
    title = "## Licences of the training data"
    if plan is None or not any(source.licences for source in plan.sources.values()):
        return f"{title}\n\nThe licences of the training text are {NOT_RECORDED}."
    totals: dict[str, int] = {}
    for source in plan.sources.values():
        for licence, octets in source.licences.items():
            totals[licence] = totals.get(licence, 0) + octets
    whole = max(1, sum(totals.values()))
    rows = (
        (_licence(licence), f"{totals[licence]:,}", share(totals[licence] / whole))
        for licence in sorted(totals, key=lambda licence: (-totals[licence], licence))
    )
    each = (
        (cell(name), ", ".join(f"{_licence(licence)}: {size(n)}" for licence, n in sorted(source.licences.items())))
        for name, source in sorted(plan.sources.items())
    )
    return "\n\n".join(
        [
            title,
            "Of all text that the sources of the mixture hold, whether training read it in part, once or often.",
            table({"Licence": "left", "Bytes": "right", "Share": "right"}, rows),
            "<details><summary>By source</summary>",
            table({"Source": "left", "Licences": "left"}, each),
            "</details>",
        ]
    )


def _licence(name: str) -> str:
    return cell(name) or "none stated"
