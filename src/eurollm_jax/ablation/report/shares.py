"""The sections on shares: what is proposed against the prior, and what other rules would give."""

import math

from eurollm_jax.ablation.report.charts import axis_head, ends_of, whisker
from eurollm_jax.ablation.report.records import BaselineRecord, Findings, StudyFolder
from eurollm_jax.ablation.report.words import (
    DASH,
    confidence,
    figure,
    missing,
    name_cell,
    number_cell,
    per_cent,
    share_range,
    signed,
    signed_range,
    tick,
)
from eurollm_jax.evaluation.report.frame import language_name, section, table_head
from eurollm_jax.evaluation.report.svg import Axis, nice_axis
from eurollm_jax.evaluation.report.text import escape, share

PROPOSAL_LEGEND = (
    '<div class="legend">'
    '<span><svg class="whisker" viewBox="0 0 24 14" aria-hidden="true"><line class="arm" x1="1" x2="23" y1="7" y2="7"/>'
    '<circle class="dot-mark" cx="12" cy="7" r="4.5"/></svg>proposed share with its interval</span>'
    '<span><svg class="whisker" viewBox="0 0 24 14" aria-hidden="true"><line class="prior" x1="12" x2="12" y1="1" '
    'y2="13"/>'
    "</svg>prior</span>"
    '<span><svg class="whisker" viewBox="0 0 24 14" aria-hidden="true"><rect class="band" x="0" y="3" width="24" '
    'height="8"/>'
    "</svg>between the bounds</span></div>"
)


def proposal(study: StudyFolder) -> str:
    title = "The proposed shares"
    findings = study.findings
    if findings is None:
        return section("proposal", title, missing(study, "No mixture is proposed yet.", "findings.json"))
    groups = study.study.groups
    top = max([*ends_of(findings.proposal.values()), *(record.prior for record in groups.values()), 1e-9])
    axis = nice_axis(0.0, min(1.0, 1.04 * top), _per_cent_tick, count=4)
    head = table_head(
        [
            ("group", "words", "up"),
            (axis_head(axis), "chart", ""),
            ("prior", "", "down"),
            ("proposed", "", "down"),
            (f"{confidence(study)} interval", "wide", ""),
            ("change", "wide", "down"),
            ("bounds", "wide", ""),
        ]
    )
    bounded = any(record.lower > 0 or record.upper < 1 for record in groups.values())
    rows = "".join(_group_row(study, findings, group, axis, bounded) for group in groups)
    unlike = "" if findings.recommended else "<p><strong>The study does not recommend these shares.</strong></p>"
    return section(
        "proposal",
        title,
        "<p>Shares of the tokens. What lies inside a group keeps the prior’s proportions. The proposal is the least "
        "of the "
        "predicted bits per byte, weighted over the languages, plus a price for leaving the prior, within all "
        "bounds.</p>",
        f'{unlike}{PROPOSAL_LEGEND}<div class="scroll"><table '
        f'class="sortable">{head}<tbody>{rows}</tbody></table></div>',
        _note(study, findings),
        _contents(study),
    )


def _per_cent_tick(value: float) -> str:
    return f"{100 * value:g}\N{NO-BREAK SPACE}%"


def _group_row(study: StudyFolder, findings: Findings, group: str, axis: Axis, bounded: bool) -> str:
    record, found = study.study.groups[group], findings.proposal[group]
    change = found.value - record.prior
    label = f"{group}: prior {per_cent(record.prior)}, proposed {per_cent(found.value)}, interval {share_range(found)}"
    bounds = (record.lower, record.upper)
    chart = whisker(found, axis, label, prior=record.prior, within=bounds if bounded else None)
    limits = f"{100 * record.lower:.3g} to {100 * record.upper:.3g}\N{NO-BREAK SPACE}%"
    moved = f'<span title="points of per cent">{signed(100 * change, 1)}</span>'
    shown = f"<strong>{per_cent(found.value)}</strong>"
    return (
        f'<tr data-group="{escape(group)}">{name_cell(group)}<td class="chart">{chart}</td>'
        f"{number_cell(record.prior, per_cent(record.prior))}"
        f'{number_cell(found.value, shown)}<td class="wide">{share_range(found)}</td>'
        f"{number_cell(change, moved, 'wide')}"
        f'<td class="wide">{limits}</td></tr>'
    )


def _note(study: StudyFolder, findings: Findings) -> str:
    groups = study.study.groups
    fixed = [group for group, record in groups.items() if record.upper - record.lower < 1e-9]
    at_bound = [
        group
        for group, found in findings.proposal.items()
        if group not in fixed and min(found.value - groups[group].lower, groups[group].upper - found.value) < 1e-4
    ]
    bound = f" At a bound: {', '.join(at_bound)}." if at_bound else ""
    bound += f" Fixed: {', '.join(fixed)}." if fixed else ""
    return (
        f'<p class="note">Intervals: the proposals of {findings.bootstraps} fits to the same {findings.runs} runs with '
        "their noise drawn anew (wild and residual bootstrap); a share that changes the loss little has a wide one."
        f"{escape(bound)}</p>"
    )


def _contents(study: StudyFolder) -> str:
    listed = ""
    for group, record in study.study.groups.items():
        largest = sorted(record.sources.items(), key=lambda item: (-item[1], item[0]))
        words = ", ".join(f"{language_name(name)} {share(part)}" for name, part in largest)
        listed += f"<dt>{escape(group)}</dt><dd>{escape(words)}</dd>"
    return f'<details><summary>What the groups hold</summary><dl class="facts">{listed}</dl></details>'


def baselines(study: StudyFolder) -> str:
    """Predicted weighted bits per byte of the proposal, the prior and the usual rules, and their shares."""
    title = "What other rules would give"
    findings = study.findings
    if findings is None:
        return section("baselines", title, missing(study, "No law is fitted yet.", "findings.json"))
    ends = ends_of(record.interval for record in findings.baselines.values()) or [0.0, 1.0]
    pad = 0.04 * (max(ends) - min(ends)) or 0.01
    axis = nice_axis(min(ends) - pad, max(ends) + pad, tick, count=4)
    head = table_head(
        [
            ("mixture", "words", "up"),
            (axis_head(axis), "chart", ""),
            ("bits per<br>byte", "", "up"),
            ("gain over<br>prior", "", "down"),
            (f"{confidence(study)} interval", "wide", ""),
        ]
    )
    rows = ""
    value = {name: record.value for name, record in findings.baselines.items()}
    for name in sorted(value, key=lambda name: value[name] if math.isfinite(value[name]) else math.inf):
        rows += _baseline_row(name, findings.baselines[name], axis)
    return section(
        "baselines",
        title,
        f"<p>Predicted bits per byte, weighted over the languages, each with its {confidence(study)} interval. "
        "Those of the proposal are rid of the optimism of having been chosen.</p>",
        f'<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div>',
        _their_shares(study, findings),
    )


def _baseline_row(name: str, record: BaselineRecord, axis: Axis) -> str:
    found, gain = record.interval, record.gain
    label = f"{name}: {figure(found.value)} bits per byte"
    css, prior = "" if name == "proposal" else "quiet-mark", name == "prior"
    words = f"<b>{escape(name)}</b>" if css == "" else escape(name)
    title = f'<th scope="row" data-value="{escape(name)}">{words}</th>'
    return (
        f'<tr data-baseline="{escape(name)}">{title}<td class="chart">{whisker(found, axis, label, css=css)}</td>'
        f"{number_cell(found.value, figure(found.value))}"
        f"{number_cell(gain.value, DASH if prior else signed(gain.value))}"
        f'<td class="wide">{DASH if prior else signed_range(gain)}</td></tr>'
    )


def _their_shares(study: StudyFolder, findings: Findings) -> str:
    names = list(findings.baselines)
    head = table_head([("group", "words", "up"), *((escape(name), "", "down") for name in names)])
    rows = ""
    for group in study.study.groups:
        cells = ""
        for name in names:
            value = findings.baselines[name].shares.get(group, 0.0)
            cells += number_cell(value, per_cent(value))
        rows += f"<tr>{name_cell(group)}{cells}</tr>"
    table = f'<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div>'
    return f"<details><summary>Their shares</summary>{table}</details>"
