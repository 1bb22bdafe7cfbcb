"""The sections by held-out language: bits per byte arm by arm, and which group's tokens help or harm which language."""

import math
from collections.abc import Sequence

import numpy as np

from eurollm_jax.ablation.report.charts import axis_head, ends_of, heat, whisker
from eurollm_jax.ablation.report.records import Findings, Interval, StudyFolder
from eurollm_jax.ablation.report.words import (
    confidence,
    counted,
    family,
    figure,
    missing,
    name_cell,
    number_cell,
    signed,
    signed_range,
    tick,
)
from eurollm_jax.evaluation.report.frame import language_name, section, table_head
from eurollm_jax.evaluation.report.svg import Axis, nice_axis
from eurollm_jax.evaluation.report.text import SPACE, escape, share

BEST = 2  # proxies that the table shows beside prior and proposal
FULL = 0.9  # quantile of the figures at which a cell has all its colour: a few large ones would pale the others
UNIT = 1000  # the heat map's figures are in thousandths of a bit per byte

HEAT_LEGEND = (
    '<div class="legend"><span><i class="swatch helps"></i>more of the group: fewer bits</span>'
    '<span><i class="swatch harms"></i>more bits</span>'
    '<span><i class="swatch helps faint"></i>faint, without a figure: the interval covers 0</span>'
    '<span><i class="swatch own"></i>the group holds text of the language</span></div>'
)


def languages(study: StudyFolder) -> str:
    title = "Bits per byte, language by language"
    findings = study.findings
    if findings is None:
        return section("languages", title, missing(study, "No law is fitted yet.", "findings.json"))
    best = sorted(study.objectives, key=lambda name: study.objectives[name])[:BEST]
    ends = [0.0, *ends_of(findings.changes.values())]
    pad = 0.04 * (max(ends) - min(ends)) or 0.01
    axis = nice_axis(min(ends) - pad, max(ends) + pad, tick, count=3)
    of_prior = _prior_runs(study)
    confirmed = list(study.confirmation.arms) if study.confirmation else []
    head = table_head(
        [
            ("language", "words", "up"),
            ("weight", "wide", "down"),
            (axis_head(axis), "chart", ""),
            ("change", "", "up"),
            (f"prior,<br>{'observed' if of_prior else 'predicted'}", "", "up"),
            ("proposal,<br>predicted", "", "up"),
            *((f"{escape(name)},<br>observed", "wide", "up") for name in best),
            *((f"{escape(name)},<br>confirmed", "wide", "up") for name in confirmed),
        ]
    )
    rows = "".join(_language_row(study, findings, code, axis, (of_prior, best, confirmed)) for code in counted(study))
    shown = f"Prior, observed: the mean of {' and '.join(of_prior)}. " if len(of_prior) > 1 else ""
    shown += f"The proxies with the fewest bits are {' and '.join(best)}. " if best else ""
    return section(
        "languages",
        title,
        f"<p>{_tally(findings, confidence(study))}</p>",
        f'<p class="axis-title">Predicted change of bits per byte with its interval; further left is better</p>'
        f'<div class="scroll"><table class="sortable">{head}<tbody>{rows}</tbody></table></div>',
        f'<p class="note">{escape(shown)}Confirmed: the mean of the seeds at the confirmation’s size, to be compared '
        "with "
        "each other and not with the proxies. The definition is that of every report: nats of all held-out text / ln "
        "2 / its "
        "raw UTF-8 bytes, a sum over a sum.</p>",
    )


def _tally(findings: Findings, confidence: str) -> str:
    better = sum(found.known and found.ends[1] < 0 for found in findings.changes.values())
    worse = sum(found.known and found.ends[0] > 0 for found in findings.changes.values())
    open_ = len(findings.changes) - better - worse
    others = f"; of the other {open_} the runs cannot tell" if open_ else ""
    return (
        f"By the law, <strong>{better}</strong> of {len(findings.changes)} languages get better from the prior to the "
        f"proposal and <strong>{worse}</strong> worse, by more than their {confidence} intervals{others}."
    )


def _prior_runs(study: StudyFolder) -> list[str]:
    """The proxies of the prior that ended soundly."""
    return [arm.name for arm in study.study.arms if arm.kind == "prior" and arm.name in study.objectives]


def _mean(study: StudyFolder, runs: Sequence[str], code: str) -> float:
    values = [(study.proxies or {})[run].final.get(code, math.nan) for run in runs]
    return math.fsum(values) / len(values) if values else math.nan


def _language_row(
    study: StudyFolder,
    findings: Findings,
    code: str,
    axis: Axis,
    arms: tuple[Sequence[str], Sequence[str], Sequence[str]],  # runs of the prior, best runs, and the confirmation's
) -> str:
    of_prior, best, confirmed = arms
    prior, proposal = (at.get(code) for at in (findings.predicted.prior, findings.predicted.proposal))
    change = findings.changes.get(code, Interval(math.nan, None, None))
    name = language_name(code)
    label = f"{name}: change {signed(change.value)}, interval {signed_range(change)}"
    clear = "" if change.covers_zero else "better" if change.value < 0 else "worse"
    marks = {"": "quiet-mark", "better": "", "worse": "worse-mark"}[clear]
    cells = ""
    for run in best:
        value = _mean(study, [run], code)
        cells += number_cell(value, figure(value, 3), "wide")
    for arm in confirmed:
        value = study.confirmation.arms[arm].mean(code) if study.confirmation else math.nan
        cells += number_cell(value, figure(value, 3), "wide")
    return (
        f'<tr data-language="{escape(code)}">{name_cell(name, code)}'
        f"{number_cell(study.weights[code], share(study.weights[code]), 'wide')}"
        f'<td class="chart">{whisker(change, axis, label, css=marks)}</td>'
        f"{number_cell(change.value, signed(change.value), clear)}"
        f"{_predicted(prior, _mean(study, of_prior, code))}{_predicted(proposal)}{cells}</tr>"
    )


def _predicted(found: Interval | None, observed: float = math.nan) -> str:
    """A cell with what was observed, if it was, and else what is predicted; the prediction's interval as its title."""
    found = found or Interval(math.nan, None, None)
    low, high = found.ends
    value, title = found.value, f"{figure(low, 3)} to {figure(high, 3)}"
    if math.isfinite(observed):
        value, title = observed, f"predicted {figure(found.value, 3)}, {title}"
    return number_cell(value, f'<span title="{title}">{figure(value, 3)}</span>')


def transfer(study: StudyFolder) -> str:
    title = "What a group’s tokens do to a language"
    findings = study.findings
    if findings is None:
        return section("transfer", title, missing(study, "No law is fitted yet.", "findings.json"))
    groups = list(study.study.groups)
    found = {code: findings.transfer[code] for code in counted(study) if code in findings.transfer}
    figures = [abs(cell.value) for row in found.values() for cell in row.values() if not cell.covers_zero]
    strongest = float(np.quantile(figures, FULL)) if figures else 0.0
    columns = "".join(f'<th scope="col" class="slanted"><span>{escape(group)}</span></th>' for group in groups)
    rows = "".join(
        _transfer_row(study, code, found[code], groups, strongest)
        for code in sorted(found, key=lambda code: (family(code), language_name(code)))
    )
    clear = sum(not cell.covers_zero for row in found.values() for cell in row.values())
    cells = sum(cell.known for row in found.values() for cell in row.values())
    by_chance = (1 - findings.confidence) * cells
    own_only = ""
    if findings.transfer_law == "power":
        own_only = (
            "<p><strong>The power law knows no transfer:</strong> a group acts on the languages that it holds alone, "
            "and on others only by taking tokens from them.</p>"
        )
    elif findings.transfer_law != findings.law:
        own_only = (
            f"<p>These are of the {escape(findings.transfer_law)} law: the {escape(findings.law)} law, which predicts "
            "these runs better and makes the proposal, knows no transfer.</p>"
        )
    return section(
        "transfer",
        title,
        f"<p>Thousandths of a bit per byte, for one percentage point of the tokens moved to a group from all others in "
        f"proportion, at the prior. Of {cells} intervals of {confidence(study)}, {clear} leave out 0; about "
        f"{by_chance:.0f} would if there were no transfer at all.</p>{own_only}",
        f'{HEAT_LEGEND}<div class="scroll"><table class="heat-map"><thead><tr><th scope="col" '
        f'class="words"></th>{columns}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>",
        '<p class="note">Languages stand by family. Rest the pointer on a cell for its figure and interval. '
        f"{escape(_hardly_tried(study))}</p>",
    )


def _hardly_tried(study: StudyFolder) -> str:
    """Of groups whose shares differ by less than the percentage point that the figures are for."""
    still = [group for group in study.study.groups if _spread(study, group) < 1e-9]
    said = [f"Nothing is known of {', '.join(still)}, whose shares do not move."] if still else []
    narrow = [group for group in study.study.groups if 1e-9 <= _spread(study, group) < 0.01]
    if narrow:
        said.append(
            f"The shares of {', '.join(narrow)} that were tried lie less than a point apart: there the figures say "
            "what a point would do if the law held so far."
        )
    return " ".join(said)


def _spread(study: StudyFolder, group: str) -> float:
    """Between the least and the largest share of the group that was tried."""
    shares = [arm.shares.get(group, 0.0) for arm in study.study.arms] or [0.0]
    return max(shares) - min(shares)


def _effect(found: Interval) -> str:
    """All that is to be said of a cell. Of a group that does not move the law knows nothing."""
    if not math.isfinite(found.value):
        return "does not move"
    low, high = found.ends
    milli = Interval(UNIT * found.value, UNIT * low, UNIT * high) if found.known else found
    shown = signed(UNIT * found.value, 2)
    return f"{shown}{SPACE}/{SPACE}1000 bits per byte a point, interval {signed_range(milli, 2)}"


def _transfer_row(study: StudyFolder, code: str, row: dict[str, Interval], groups: list[str], strongest: float) -> str:
    cells = ""
    for group in groups:
        found = row.get(group, Interval(math.nan, None, None))
        label = f"{group} → {language_name(code)}: {_effect(found)}"
        own = study.study.holds.get(code, {}).get(group, 0.0) > 0
        cells += heat(found, strongest, signed(UNIT * found.value, 1), label, own=own)
    return f'<tr data-transfer="{escape(code)}">{name_cell(language_name(code), code)}{cells}</tr>'
