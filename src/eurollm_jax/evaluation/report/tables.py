"""The sections of the report with one line per language: the comparison with the baselines, and the mixture."""

import math

from eurollm_jax.evaluation.report.frame import STATUS_TITLES, by_status, language_name, missing, section, table_head
from eurollm_jax.evaluation.report.mixture import mixture_over_time
from eurollm_jax.evaluation.report.records import Evaluation, LanguageResult, Plan, PlanSource, Run
from eurollm_jax.evaluation.report.svg import Axis, dumbbell, nice_axis, percent, share_bar
from eurollm_jax.evaluation.report.text import bits, escape, share, signed_percent, size


def _key(css: str, mark: str, words: str) -> str:
    return f'<span><svg class="{css}" viewBox="0 0 24 14" aria-hidden="true">{mark}</svg>{words}</span>'


def _tick(css: str) -> str:
    return f'<line class="{css}" x1="12" x2="12" y1="1" y2="13"/>'


LEGEND = (
    '<div class="legend">'
    + _key("dumbbell", '<circle class="model" cx="12" cy="7" r="5"/>', "model")
    + _key("dumbbell", _tick("xz"), "xz -9e")
    + _key("dumbbell", '<circle class="order0" cx="12" cy="7" r="4"/>', "order-0 byte model")
    + "<span>bits per byte; further left is better</span></div>"
)
MIXTURE_LEGEND = (
    '<div class="legend">'
    + _key("share", _tick("planned"), "planned share of rows")
    + _key("share", '<rect class="bar" x="0" y="4" width="24" height="6"/>', "consumed share of rows")
    + "</div>"
)
DEFINITIONS = {
    "Bits per byte": "The loss of all held-out text of a language in nats, divided by ln 2 and by its number of raw "
    "UTF-8 bytes: one sum over another, never a mean of ratios, and independent of how the tokenizer cuts the text. "
    "Compare a language with its own baselines and not with another language: a Greek or Cyrillic letter is two bytes, "
    "a Georgian one three, and each byte then holds less.",
    "xz -9e": "The size to which xz -9e compresses the same held-out text, in bits per byte of that text. It knows "
    "nothing of the language beforehand, and the shorter the text, the less it can find in it.",
    "Order-0": "The entropy of the single bytes of the same text: what a code costs that knows how often each byte "
    "occurs, and nothing else.",
    "Gain": "The share of the bits of xz that the model saves: 1 − model / xz.",
}


def languages(run: Run) -> str:
    title = "Held-out text, language by language"
    if run.evaluation is None:
        what = "The model has not been compared with its baselines yet."
        return section("languages", title, missing(run, what, "evaluation.json"))
    results = run.evaluation.languages
    values = [v for r in results.values() for v in (r.bits_per_byte, r.baselines.xz, r.baselines.order0)]
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    axis = nice_axis(math.floor(min(finite)), math.ceil(max(finite)), lambda value: f"{value:g}", count=4)
    ticks = "".join(
        f'<span class="tick x" style="left:{percent(axis.share(t))}">{axis.show(t)}</span>' for t in axis.ticks
    )
    head = table_head(
        [
            ("language", "words", "up"),
            ("bytes", "wide", "down"),
            (f'<div class="axis">{ticks}</div>', "chart", ""),
            ("model", "", "up"),
            ("xz", "wide", "up"),
            ("order-0", "wide", "up"),
            ("gain", "", "down"),
        ]
    )
    bodies = ""
    for status, group in by_status(results):
        heading = escape(STATUS_TITLES.get(status, status.capitalize()))
        rows = "".join(_language_row(code, result, axis) for code, result in group)
        bodies += f'<tbody><tr><th colspan="7" scope="rowgroup">{heading}</th></tr>{rows}</tbody>'
    definitions = DEFINITIONS | {"As evaluated": run.evaluation.definition}
    meanings = "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in definitions.items())
    return section(
        "languages",
        title,
        f"<p>{_verdict(run.evaluation)}</p>{LEGEND}",
        f'<div class="scroll"><table class="sortable">{head}{bodies}</table></div>',
        f'<h3>What the figures mean</h3><dl class="facts narrow">{meanings}</dl>',
    )


def _verdict(evaluation: Evaluation) -> str:
    won = evaluation.beats_xz
    said = (
        f"The model needs fewer bits than xz in <strong>{won.official} of {won.official_total}</strong> official "
        f"languages, and in {won.all} of {won.all_total} languages in all."
    )
    lost = [
        r for _, group in by_status(evaluation.languages) for _, r in group if r.status == "official" and not r.gain > 0
    ]
    by = ", ".join(f"{escape(r.name)} by {bits(r.bits_per_byte - r.baselines.xz)} ({share(-r.gain)})" for r in lost)
    return f"{said} It falls short, in bits per byte, in {by}." if lost else said


def _language_row(code: str, result: LanguageResult, axis: Axis) -> str:
    model, xz, order0 = result.bits_per_byte, result.baselines.xz, result.baselines.order0
    label = f"{result.name}: model {bits(model)}, xz {bits(xz)}, order-0 {bits(order0)} bits per byte"
    verdict = "better" if result.gain > 0 else "worse"
    return (
        f'<tr data-language="{escape(code)}">{_name_cell(result.name, code)}'
        f'<td class="wide" data-value="{result.bytes}">{size(result.bytes)}</td>'
        f'<td class="chart">{dumbbell(model, xz, order0, axis, label)}</td>'
        f'<td class="{verdict}" data-value="{model}">{bits(model)}</td>'
        f'<td class="wide" data-value="{xz}">{bits(xz)}</td>'
        f'<td class="wide" data-value="{order0}">{bits(order0)}</td>'
        f'<td data-value="{result.gain}">{signed_percent(result.gain)}</td></tr>'
    )


def _name_cell(name: str, code: str) -> str:
    words = f'{escape(name)}<span class="code">{escape(code)}</span>'
    return f'<th scope="row" data-value="{escape(name)}">{words}</th>'


def mixture(run: Run) -> str:
    title = "What the model read"
    if run.plan is None:
        return section("mixture", title, missing(run, "There is no plan of the mixture yet.", "plan.json"))
    sources = run.plan.sources
    consumed = _consumed_shares(run)
    largest = max([*(source.share for source in sources.values()), *(consumed or {}).values(), 1e-12])
    rows = ""
    for name in sorted(sources, key=lambda name: -sources[name].share):
        got = None if consumed is None else consumed.get(name, 0.0)
        rows += _mixture_row(name, sources[name], got, largest, run.plan)
    said = "Nothing has been read yet."
    if consumed is not None:
        names = sources.keys() | consumed.keys()
        planned = {name: sources[name].share if name in sources else 0.0 for name in names}
        apart = max((abs(planned[name] - consumed.get(name, 0.0)) for name in names), default=0.0)
        said = f"No consumed share is further than {share(apart)} of all rows from its planned share."
    head = table_head(
        [
            ("source", "words", "up"),
            ("", "chart", ""),
            ("planned", "", "down"),
            ("consumed", "wide", "down"),
            ("epochs", "", "down"),
            ("text in store", "wide", "down"),
            ("first repeat", "wide", "up"),
            ("licence", "words wide", ""),
        ]
    )
    return section(
        "mixture",
        title,
        f"<p>{run.plan.total_rows:,} rows of {run.plan.sequence_length:,} tokens from {len(sources)} sources. "
        f"{said}</p>",
        mixture_over_time(run.plan),
        f'{MIXTURE_LEGEND}<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div>',
        '<p class="note">Epochs: how often the planned run passes over all text of the source. First repeat: how far '
        "into the run its text begins to recur.</p>",
    )


def _consumed_shares(run: Run) -> dict[str, float] | None:
    """Share of the rows read so far, by source; None before any were."""
    if not (run.metrics and run.metrics.train):
        return None
    rows = {name: progress.rows for name, progress in run.metrics.train[-1].sources.items()}
    total = sum(rows.values())
    return {name: n / total for name, n in rows.items()} if total else None


def _mixture_row(name: str, source: PlanSource, consumed: float | None, largest: float, plan: Plan) -> str:
    title = language_name(source.language)
    label = f"{title}: planned {share(source.share)}" + ("" if consumed is None else f", consumed {share(consumed)}")
    first = math.inf if source.first_repeat is None else source.first_repeat
    repeat = "never" if source.first_repeat is None else share(source.first_repeat / max(1, plan.total_rows))
    licences = sorted(source.licences, key=lambda licence: -source.licences[licence])
    every = ", ".join(f"{licence}: {size(source.licences[licence])}" for licence in licences)
    main = (licences[0] if licences else "–") + (f" + {len(licences) - 1} more" if len(licences) > 1 else "")
    return (
        f'<tr data-source="{escape(name)}">{_name_cell(title, name)}'
        f'<td class="chart">{share_bar(source.share, consumed, largest, label)}</td>'
        f'<td data-value="{source.share}">{share(source.share)}</td>'
        f'<td class="wide" data-value="{consumed or 0}">{"–" if consumed is None else share(consumed)}</td>'
        f'<td data-value="{source.epochs}">{source.epochs:.2f}</td>'
        f'<td class="wide" data-value="{source.store_bytes}">{size(source.store_bytes)}</td>'
        f'<td class="wide" data-value="{first}">{repeat}</td>'
        f'<td class="words wide" title="{escape(every)}">{escape(main)}</td></tr>'
    )
