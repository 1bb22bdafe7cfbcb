"""The sections of the report that are words and single figures: headline, samples, provenance, footer."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from eurollm_jax.evaluation.report.frame import language_name, missing, section, table_head
from eurollm_jax.evaluation.report.records import PlanSource, Run
from eurollm_jax.evaluation.report.text import SPACE, bits, count, duration, escape, paragraphs, share, size
from eurollm_jax.languages import LANGUAGES

ANCHORS = ("learning", "languages", "progress", "mixture", "throughput", "samples", "provenance")


def headline(run: Run) -> str:
    """Name of the experiment, its docstring (the first paragraph is the question), and the key figures."""
    text = ""
    for i, (kind, words) in enumerate(paragraphs(run.experiment.docstring)):
        lead = ' class="lead"' if i == 0 and kind == "p" else ""
        text += f"<{kind}{lead}>{escape(words)}</{kind}>"
    links = "".join(f'<a href="#{anchor}">{anchor.capitalize()}</a>' for anchor in ANCHORS)
    return (
        f'<header><p class="eyebrow">Report of a run</p><h1>{escape(run.experiment.name)}</h1>{text}'
        f'<dl class="tiles">{_evaluation_tiles(run)}{_training_tiles(run)}</dl><nav>{links}</nav></header>'
    )


def _tile(name: str, figure: str, under: str) -> str:
    words = f'<dd class="figure">{figure}</dd><dd class="under">{escape(under)}</dd>'
    return f'<div class="tile"><dt>{name}</dt>{words}</div>'


def _figure(value: str) -> str:
    """Numbers large, units small: "5 min 30 s"."""
    parts = (part.partition(SPACE) for part in value.split(" "))
    return " ".join(f"{escape(number)} <small>{escape(unit)}</small>" if unit else number for number, _, unit in parts)


def _evaluation_tiles(run: Run) -> str:
    logged = run.metrics.evaluation if run.metrics else ()
    if run.evaluation:
        won, of = run.evaluation.beats_xz, len(run.evaluation.languages)
        figure = f"{won.official} <small>of {won.official_total} official languages</small>"
        first = _tile("Beats xz", figure, f"{won.all} of {won.all_total} in all")
        under = f"mean of {of} languages; step {run.evaluation.step:,}"
        return first + _tile("Held-out bits per byte", bits(run.evaluation.macro), under)
    first = _tile("Beats xz", "–", "not evaluated yet")
    if not logged:
        return first + _tile("Held-out bits per byte", "–", "not evaluated yet")
    under = f"mean of {len(logged[-1].bits_per_byte)} languages, in training; step {logged[-1].step:,}"
    return first + _tile("Held-out bits per byte", bits(logged[-1].macro_bits_per_byte), under)


def _training_tiles(run: Run) -> str:
    experiment, train = run.experiment, run.metrics.train if run.metrics else ()
    without = f"{count(experiment.parameters_non_embedding)} without embeddings"
    first = _tile("Parameters", _figure(count(experiment.parameters)), without)
    if not train:
        rest = ("Tokens seen", "Training time", "Tokens per second")
        return first + "".join(_tile(name, "–", "not trained yet") for name in rest)
    last, done = train[-1], ""
    if run.plan:
        whole = last.row >= run.plan.total_rows
        done = ", the whole plan" if whole else f", {share(last.row / run.plan.total_rows)} of the plan"
    shares = [record.mfu for record in train if record.mfu is not None]
    peak = f"; {share(float(np.median(shares)))} of the machine's peak" if shares else ""
    speed = np.median([record.tokens_per_second for record in train])
    return (
        first
        + _tile("Tokens seen", _figure(count(last.tokens)), f"{last.step:,} steps{done}")
        + _tile("Training time", _figure(duration(last.seconds)), experiment.devices)
        + _tile("Tokens per second", f"{speed:,.0f}", f"median{peak}")
    )


def samples(run: Run) -> str:
    title = "What it writes"
    if not run.samples:
        return section("samples", title, missing(run, "There are no samples yet.", "samples.json"))
    cards = ""
    for sample in run.samples:
        how = "greedy" if sample.temperature == 0 else f"temperature {sample.temperature:g}"
        name = f"<b>{escape(language_name(sample.language))}</b> {escape(_autonym(sample.language))}"
        text = f"<mark>{escape(sample.prompt)}</mark><span>{escape(sample.continuation)}</span>"
        cards += (
            f'<article class="sample"><header><span>{name}</span><span>{how}</span></header>'
            f'<blockquote lang="{escape(sample.language)}" dir="auto">{text}</blockquote></article>'
        )
    intro = (
        "<p>The highlighted words were given; the model wrote the rest, and nothing of it was corrected. "
        "A control character appears as its picture (␀).</p>"
    )
    return section("samples", title, intro, f'<div class="samples">{cards}</div>')


def _autonym(code: str) -> str:
    language = LANGUAGES.get(code)
    return language.autonym if language and language.autonym != language.name else ""


def provenance(run: Run) -> str:
    experiment = run.experiment
    facts = {
        "Fingerprint": f"<code>{escape(experiment.fingerprint)}</code>",
        "Created": escape(experiment.created),
        "Code": f"<code>{escape(experiment.code)}</code>" if experiment.code else "not from a repository",
        "Machine": escape(experiment.devices),
        "Versions": escape(", ".join(f"{name} {version}" for name, version in experiment.versions.items())),
    }
    if run.metrics:
        restarts = "; ".join(f"at step {restart.step:,}, {restart.time}" for restart in run.metrics.restarts)
        facts["Resumed"] = escape(restarts or "never: one uninterrupted run")
        if run.metrics.cut_line:
            where = f"line {run.metrics.cut_line} of <code>metrics.jsonl</code>"
            facts["Left out"] = f"{where}, which a stopped run left unfinished"
    listed = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts.items())
    config = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in _leaves(experiment.experiment)
    )
    return section(
        "provenance",
        "Where it comes from",
        f'<dl class="facts">{listed}</dl>',
        _licences(run.plan.sources) if run.plan else "",
        f'<details><summary>The whole configuration</summary><table class="config">{config}</table></details>',
    )


def _licences(sources: Mapping[str, PlanSource]) -> str:
    """Bytes of the store under each licence."""
    totals: dict[str, int] = {}
    for source in sources.values():
        for licence, amount in source.licences.items():
            totals[licence] = totals.get(licence, 0) + amount
    whole = max(1, sum(totals.values()))
    rows = ""
    for licence in sorted(totals, key=lambda licence: -totals[licence]):
        text = f'<td data-value="{totals[licence]}">{size(totals[licence])}</td>'
        name = f'<th scope="row">{escape(licence)}</th>'
        rows += f'<tr data-licence="{escape(licence)}">{name}{text}<td>{share(totals[licence] / whole)}</td></tr>'
    head = table_head([("licence", "words", ""), ("text", "", ""), ("share", "", "")])
    title = "<h3>Licences of the text in the store</h3>"
    return f'{title}<table class="narrow">{head}<tbody>{rows}</tbody></table>'


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """The configuration as dotted paths, the form in which the command line takes them."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else repr(value)


def footer(run: Run) -> str:
    version = run.experiment.versions.get("eurollm_jax", "")
    folder = f"<code>{escape(run.path.resolve().name)}</code>"
    made = f"Made by eurollm_jax {escape(version)} from the run directory {folder}."
    return f"<footer>{made} One file that asks nothing of the network.</footer>"
