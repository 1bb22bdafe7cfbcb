"""The sections that say how far the law can be trusted: runs that it had not seen, and the confirmation."""

import math

from eurollm_jax.ablation.report.charts import Point, axis_head, ends_of, scatter, whisker
from eurollm_jax.ablation.report.records import ConfirmationRecord, Findings, Interval, StudyFolder
from eurollm_jax.ablation.report.words import (
    DASH,
    figure,
    missing,
    name_cell,
    number_cell,
    paired_range,
    sentence,
    signed,
    signed_range,
    tick,
)
from eurollm_jax.evaluation.report.frame import section, table_head
from eurollm_jax.evaluation.report.svg import nice_axis
from eurollm_jax.evaluation.report.text import SPACE, escape

SCORES = {
    "rho_heldout": "ρ, folds",
    "r2_heldout": "R², folds",
    "rho_loo": "ρ, one<br>left out",
    "r2_loo": "R², one<br>left out",
}


def prediction(study: StudyFolder) -> str:
    title = "Did the law foresee runs it had not seen?"
    findings = study.findings
    if findings is None:
        return section("prediction", title, missing(study, "No law is fitted yet.", "findings.json"))
    return section(
        "prediction",
        title,
        f"<p>Each run was left out of a fit to the others and then predicted by it. The proposal rests on the "
        f"{escape(findings.law)} law.</p>",
        _scatter(findings),
        _scores(study, findings),
    )


def _scatter(findings: Findings) -> str:
    points = [Point(run.name, run.predicted, run.observed) for run in findings.heldout.get(findings.law, [])]
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not points:
        return '<p class="note">No run was left out and predicted.</p>'
    values = [value for point in points for value in (point.x, point.y)]
    pad = 0.05 * (max(values) - min(values)) or 0.01
    axis = nice_axis(min(values) - pad, max(values) + pad, tick)
    chart = scatter(points, axis, f"Observed against predicted of {len(points)} runs", ("predicted", "observed"))
    said = "; ".join(
        f"{escape(law)}: ρ {figure(found.rho_heldout, 2)}, R² {figure(found.r2_heldout, 2)}"
        for law, found in findings.scores.items()
    )
    error = math.sqrt(math.fsum((point.x - point.y) ** 2 for point in points) / len(points))
    noise = (
        "" if findings.noise is None else f"; equal mixtures differ by {figure(findings.noise)} (standard deviation)"
    )
    return (
        '<figure class="keep"><p class="axis-title">Observed (upwards) against predicted (to the right) bits per byte, '
        f"weighted over the languages, {escape(findings.law)} law</p>{chart}<figcaption>{len(points)} runs, each "
        "left out "
        f"once; on the line what was predicted is what was observed. Root of the mean squared error {figure(error)} "
        "bits "
        f"per byte{noise}. By law, {said}.</figcaption></figure>"
    )


def _scores(study: StudyFolder, findings: Findings) -> str:
    kinds = [key for key in SCORES if any(getattr(found, key) is not None for found in findings.scores.values())]
    head = table_head(
        [("law", "words", "up"), ("parameters", "wide", "up"), *((SCORES[key], "", "down") for key in kinds)]
    )
    rows = ""
    for law, found in findings.scores.items():
        free = study.study.laws.get(law)
        cells = "".join(number_cell(getattr(found, key), figure(getattr(found, key), 3)) for key in kinds)
        parameters = number_cell(free, DASH if free is None else str(free), "wide")
        rows += f'<tr data-law="{escape(law)}">{name_cell(law)}{parameters}{cells}</tr>'
    note = (
        "ρ: Spearman’s rank correlation of predicted and observed, 1 where the order is right. R²: share of the "
        "variance that is predicted; below 0 the mean would do better. Parameters: free ones for each language."
    )
    table = f'<div class="scroll"><table class="sortable narrow">{head}<tbody>{rows}</tbody></table></div>'
    return f'<h3>All laws</h3>{table}<p class="note">{note}</p>'


def confirmation(study: StudyFolder) -> str:
    title = "Did it hold when trained again?"
    found = study.confirmation
    if found is None:
        if study.study.cost.confirmation is None:
            none = '<p class="missing">The study declares no confirmation: nothing was trained again.</p>'
            return section("confirmation", title, none)
        declined = study.findings is not None and not study.findings.recommended
        if declined and study.declared("confirmation", "when_declined") is False:
            none = "The study does not recommend its proposal, so nothing was trained again."
            ask = "<code>when_declined=True</code> in its Confirmation asks for that all the same."
            return section("confirmation", title, f'<p class="missing">{none} {ask}</p>')
        what = "Prior and proposal have not been trained again yet."
        return section("confirmation", title, missing(study, what, "confirmation.json"))
    return section(
        "confirmation",
        title,
        f"<p>{sentence(found.sentence)} {_foretold(found)}</p>",
        _gains(found),
        _arms(found),
    )


def _foretold(found: ConfirmationRecord) -> str:
    """Whether the proxies foresaw the size of the gain, not its sign alone."""
    predicted, seen = found.predicted_gain.interval, found.gain.mean
    if not predicted.known:
        return ""
    low, high = predicted.ends
    where = "within" if low <= seen <= high else "above" if seen > high else "below"
    return f"The observed gain lies <strong>{where}</strong> the interval that the proxies foretold."


def _gains(found: ConfirmationRecord) -> str:
    predicted, observed = found.predicted_gain.interval, found.gain.interval
    rows = {
        "predicted, proxies": (predicted, signed_range(predicted)),
        "observed, confirmation": (observed, paired_range(found)),
    }
    ends = [0.0, *ends_of((predicted, observed))]
    pad = 0.06 * (max(ends) - min(ends)) or 0.01
    axis = nice_axis(min(ends) - pad, max(ends) + pad, tick, count=4)
    head = table_head(
        [
            ("gain, bits per byte", "words", ""),
            (axis_head(axis), "chart", ""),
            ("", "", ""),
            (f"{100 * found.confidence:g}{SPACE}% interval", "wide", ""),
        ]
    )
    body = "".join(
        f"<tr>{name_cell(name)}<td "
        f"class='chart'>{whisker(gain, axis, f'{name}: {signed(gain.value)}', css=_css(gain))}</td>"
        f"<td>{signed(gain.value)}</td><td class='wide'>{between}</td></tr>"
        for name, (gain, between) in rows.items()
    )
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _css(gain: Interval) -> str:
    return "quiet-mark" if gain.covers_zero else "" if gain.value > 0 else "worse-mark"


def _arms(found: ConfirmationRecord) -> str:
    seeds = sorted({seed for arm in found.arms.values() for seed in arm.seeds})
    head = table_head([("mixture", "words", "up"), ("mean", "", "up"), *((f"seed {seed}", "", "up") for seed in seeds)])
    rows = ""
    for name, arm in found.arms.items():
        mean = math.fsum(arm.objective) / len(arm.objective) if arm.objective else math.nan
        of_seed = dict(zip(arm.seeds, arm.objective, strict=False))
        cells = "".join(number_cell(of_seed.get(seed), figure(of_seed.get(seed))) for seed in seeds)
        first = number_cell(mean, f"<strong>{figure(mean)}</strong>")
        rows += f'<tr data-arm="{escape(name)}">{name_cell(name)}{first}{cells}</tr>'
    note = (
        "Bits per byte, weighted over the languages. Runs of one seed begin with the same weights and read their data "
        "in the same order: they are a pair."
    )
    if found.diverged:
        named = "; ".join(f"{name} ({why})" for name, why in found.diverged.items())
        note += f" Diverged, so that their pair is not in the gain: {escape(named)}."
    return (
        '<h3>Run by run</h3><div class="scroll"><table class="sortable '
        f'narrow">{head}<tbody>{rows}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )
