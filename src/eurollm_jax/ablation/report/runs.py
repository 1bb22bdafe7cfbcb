"""The sections on what was done: the mixtures tried, how the proxies learnt, what all cost, and what to copy."""

import math

import numpy as np

from eurollm_jax.ablation.report.charts import axis_head, strip
from eurollm_jax.ablation.report.records import ArmRecord, CostRecord, StudyFolder
from eurollm_jax.ablation.report.words import figure, missing, name_cell, number_cell, per_cent, power_of_ten, tick
from eurollm_jax.ablation.table import weighted
from eurollm_jax.evaluation.report.frame import section, table_head
from eurollm_jax.evaluation.report.svg import Axis, Line, nice_axis, plot
from eurollm_jax.evaluation.report.text import SPACE, count, duration, escape

KINDS = {
    "prior": "of the prior (they differ by noise alone)",
    "draw": "drawn around the prior",
    "zeroed": "drawn with groups left out",
    "leave-one-out": "of the prior without a group",
    "one-at-a-time": "of the prior with one group changed",
    "listed": "given by hand",
}

TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)  # shares

STRIP_LEGEND = (
    '<div class="legend">'
    '<span><svg class="whisker strip-row" viewBox="0 0 24 14" aria-hidden="true"><line class="one" x1="12" x2="12" '
    'y1="3"'
    ' y2="11"/></svg>a mixture tried</span>'
    '<span><svg class="whisker" viewBox="0 0 24 14" aria-hidden="true"><line class="prior" x1="12" x2="12" y1="1" '
    'y2="13"/>'
    "</svg>prior</span>"
    '<span><svg class="whisker" viewBox="0 0 24 14" aria-hidden="true"><circle class="dot-mark" cx="12" cy="7" '
    'r="4.5"/></svg>'
    "proposal</span><span>the scale is that of the roots of the shares</span></div>"
)


def design(study: StudyFolder) -> str:
    arms, groups = study.study.arms, study.study.groups
    kinds = {kind: sum(arm.kind == kind for arm in arms) for kind in dict.fromkeys(arm.kind for arm in arms)}
    made_of = "; ".join(f"{number} {escape(KINDS.get(kind, kind))}" for kind, number in kinds.items())
    top = max((arm.shares.get(group, 0.0) for arm in arms for group in groups), default=1.0)
    axis = _root_axis(top)
    head = table_head(
        [
            ("group", "words", "up"),
            (axis_head(axis), "chart", ""),
            ("least", "", "down"),
            ("most", "", "down"),
            ("without it", "wide", "down"),
        ]
    )
    rows = "".join(_strip_row(study, group, axis) for group in groups)
    return section(
        "design",
        "What was tried",
        f"<p>{len(arms)} mixtures: {made_of}. Seeded, and the same whenever the study is run again.</p>",
        f'{STRIP_LEGEND}<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div>',
        _left_out(study),
        _curves(study),
        _all_runs(study),
    )


def _root_axis(top: float) -> Axis:
    """Of the roots of shares, in which the draws are spread evenly: small shares have room too."""
    high = math.sqrt(min(1.0, 1.03 * top) or 1.0)
    ticks = [math.sqrt(share) for share in TICKS if math.sqrt(share) <= high]
    return Axis(0.0, high, ticks, lambda root: f"{100 * root**2:.3g}{SPACE}%")


def _strip_row(study: StudyFolder, group: str, axis: Axis) -> str:
    shares = [arm.shares.get(group, 0.0) for arm in study.study.arms]
    prior = study.study.groups[group].prior
    proposed = study.findings.proposal[group].value if study.findings else math.nan
    low, high = min(shares, default=0.0), max(shares, default=0.0)
    zeros = sum(share == 0 for share in shares)
    label = f"{group}: {len(shares)} shares from {per_cent(low)} to {per_cent(high)}, prior {per_cent(prior)}"
    roots = [math.sqrt(share) for share in shares]
    chart = strip(
        roots, math.sqrt(prior), math.sqrt(max(0.0, proposed)) if math.isfinite(proposed) else None, axis, label
    )
    without = number_cell(zeros, str(zeros), "wide")
    return (
        f'<tr data-tried="{escape(group)}">{name_cell(group)}'
        f'<td class="chart">{chart}</td>'
        f"{number_cell(low, per_cent(low))}{number_cell(high, per_cent(high))}{without}</tr>"
    )


def _left_out(study: StudyFolder) -> str:
    if study.proxies is None:
        return missing(study, "No proxy has been measured yet.", "results.parquet")
    bad = study.diverged
    if not bad:
        fitted = " so far" if study.findings is None else ": all that ended are in the fit"
        return f'<p class="note">No proxy diverged{fitted}.</p>'
    listed = "".join(f"<li><code>{escape(name)}</code>: {escape(why)}</li>" for name, why in sorted(bad.items()))
    return (
        f'<div class="missing"><strong>{len(bad)} of {len(study.study.arms)} proxies diverged. They are in no fit '
        "and no "
        f"average:</strong><ul>{listed}</ul></div>"
    )


def _curves(study: StudyFolder) -> str:
    """Weighted bits per byte of every proxy along its tokens, over the part of the text that is read along the run."""
    found = {}
    for name, curve in (study.proxies or {}).items():
        values = [weighted(bits, study.weights) for _, bits in curve.along]
        if not curve.diverged and sum(math.isfinite(value) for value in values) > 1:
            found[name] = (np.array([tokens for tokens, _ in curve.along], float), np.array(values))
    if not found:
        return ""
    kinds = {arm.name: arm.kind for arm in study.study.arms}
    best = min(study.objectives, key=lambda name: study.objectives[name], default="")
    ordered = sorted(found, key=lambda name: (name == best, kinds.get(name) == "prior"))
    lines = [
        Line(*found[name], "model" if name == best else "prior-line" if kinds.get(name) == "prior" else "raw")
        for name in ordered
    ]
    later = np.concatenate([y[len(y) // 3 :] for _, y in found.values()])
    later = later[np.isfinite(later)]
    low, high = float(later.min()), float(later.max())
    pad = 0.08 * (high - low) or 0.05
    last = max(float(x[-1]) for x, _ in found.values())
    chart = plot(
        lines,
        nice_axis(0.0, last, count, count=4),
        nice_axis(low - pad, high + pad, tick),
        label=f"Weighted held-out bits per byte of {len(found)} proxies by tokens, from {high:.3f} to {low:.3f}",
        css="middle",
    )
    key = '<svg viewBox="0 0 24 14" aria-hidden="true"><path d="M0,7H24" class="{}"/></svg>'
    legend = (
        f'<div class="legend line-keys"><span>{key.format("raw")}each '
        f"proxy</span><span>{key.format('prior-line')}prior</span>"
        + (f"<span>{key.format('model')}fewest bits at the end: {escape(best)}</span>" if best else "")
        + "</div>"
    )
    return (
        "<h3>How the proxies learnt</h3>"
        f'{legend}<figure><p class="axis-title">Held-out bits per byte, weighted over the languages, by '
        f"tokens</p>{chart}"
        "<figcaption>Measured along the run on a part of the held-out text. All other figures are of the whole of it, "
        "at the end.</figcaption></figure>"
    )


def _all_runs(study: StudyFolder) -> str:
    groups = list(study.study.groups)
    head = table_head(
        [
            ("run", "words", "up"),
            ("kind", "words wide", "up"),
            ("seed", "wide", "up"),
            ("bits per byte", "", "up"),
            *((escape(group), "", "down") for group in groups),
        ]
    )
    rows = "".join(_run_row(study, arm, groups) for arm in study.study.arms)
    return (
        "<details><summary>Every run</summary>"
        f'<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div></details>'
    )


def _run_row(study: StudyFolder, arm: ArmRecord, groups: list[str]) -> str:
    value = study.objectives.get(arm.name)
    words = "diverged" if arm.name in study.diverged else figure(value)
    cells = "".join(number_cell(arm.shares.get(g, 0.0), per_cent(arm.shares.get(g, 0.0))) for g in groups)
    return (
        f'<tr data-run="{escape(arm.name)}">{name_cell(arm.name)}<td class="words wide" '
        f'data-value="{escape(arm.kind)}">'
        f"{escape(arm.kind)}</td>{number_cell(arm.seed, str(arm.seed), 'wide')}{number_cell(value, words)}{cells}</tr>"
    )


def cost(study: StudyFolder) -> str:
    costs = study.study.cost
    parts = [("Proxies", costs.proxies), *([("Confirmation", costs.confirmation)] if costs.confirmation else [])]
    head = table_head(
        [
            ("", "words", ""),
            ("runs", "", ""),
            ("parameters", "", ""),
            ("tokens", "", ""),
            ("FLOP", "", ""),
            ("time", "", ""),
            ("device-hours", "", ""),
        ]
    )
    rows = "".join(_cost_row(name, part, costs.device_count) for name, part in parts)
    facts = {
        "Devices": escape(costs.devices),
        "Fingerprint": f"<code>{escape(study.study.fingerprint)}</code>",
        "Created": escape(study.study.created),
        "Code": f"<code>{escape(study.study.code)}</code>" if study.study.code else "not from a repository",
        "Versions": escape(", ".join(f"{name} {version}" for name, version in study.study.versions.items())),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts.items())
    return section(
        "cost",
        "What it cost",
        f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>',
        '<p class="note">Tokens and FLOP are of all runs together, forward and backward, without the held-out text. '
        "Time is that of the starts that ended in order, with compilation and evaluation; one that was killed is not "
        "in it.</p>",
        f'<dl class="facts">{listed}</dl>',
    )


def _cost_row(name: str, part: CostRecord, devices: int) -> str:
    time, hours = "–", "–"
    if part.seconds is not None:
        time, hours = duration(part.seconds), f"{part.seconds * devices / 3600:,.2f}"
    return (
        "<tr><th "
        f'scope="row">{name}</th><td>{part.runs}</td><td>{count(part.parameters)}</td><td>{count(part.tokens)}</td>'
        f"<td>{power_of_ten(part.flops)}</td><td>{time}</td><td>{hours}</td></tr>"
    )


def to_copy(study: StudyFolder) -> str:
    title = "The mixture, to copy"
    if study.mixture is None:
        return section("mixture", title, missing(study, "There is no mixture to copy yet.", "mixture.py"))
    if study.datamix is not None:
        blend = f'<h3>datamix.txt, for Megatron-LM</h3><pre class="copy">{escape(study.datamix)}</pre>'
        note = "Paths are the sources’ names: write those of your datasets in their place."
    else:
        blend, note = "", "The study does not recommend this mixture, so it writes no datamix.txt."
    return section(
        "mixture",
        title,
        f"<p>A click selects a block. The files lie in the study’s folder too. {note}</p>",
        f'<h3>mixture.py</h3><pre class="copy">{escape(study.mixture)}</pre>{blend}',
    )
