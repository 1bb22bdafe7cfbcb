"""The sections of the report over the steps of the run: training loss, held-out bits per byte, throughput."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from eurollm_jax.evaluation.report.frame import STATUS_TITLES, language_name, missing, section
from eurollm_jax.evaluation.report.records import EvaluationRecord, LanguageResult, Run, TrainRecord
from eurollm_jax.evaluation.report.svg import Axis, Hover, Line, evenly, moving_mean, nice_axis, plot
from eurollm_jax.evaluation.report.text import SPACE, bits, count, duration, escape, share
from eurollm_jax.languages import LANGUAGES

Curve = Float[np.ndarray, "N"]


def _array(records: Iterable[Any], field: str) -> Curve:
    return np.array([getattr(record, field) for record in records], dtype=float)


def _finite(values: Curve) -> Curve:
    return values[np.isfinite(values)]


def _largest(values: Curve) -> float:
    """The largest finite value, or 0."""
    return float(_finite(values).max(initial=0.0))


def _step_axis(last: int) -> Axis:
    return nice_axis(0, max(1, last), lambda step: f"{step:,.0f}")


def _number(value: float) -> str:
    return f"{value:g}"


def _rate(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def learning(run: Run) -> str:
    title = "How the loss fell"
    if not (run.metrics and run.metrics.train):
        return section("learning", title, missing(run, "Nothing has been trained yet.", "metrics.jsonl"))
    train, marks = run.metrics.train, [restart.step for restart in run.metrics.restarts]
    steps, loss, rate = _array(train, "step"), _array(train, "loss"), _array(train, "learning_rate")
    window = max(1, len(train) // 40)
    smooth = moving_mean(loss, window)
    low, high = _loss_range(loss, smooth)
    x = _step_axis(train[-1].step)
    curve = plot(
        [Line(steps, loss, "raw"), Line(steps, smooth, "model", f"{smooth[-1]:.2f}")],
        x,
        nice_axis(low, high, _number),
        marks=marks,
        hover=_loss_hover(train, smooth),
        label=f"Training loss from {loss[0]:.2f} to {smooth[-1]:.2f} nats per token over {train[-1].step:,} steps",
    )
    top = _largest(rate) or 1.0
    strip = plot(
        [Line(steps, rate, "quiet", _rate(rate[-1]))],
        x,
        Axis(0, top * 1.08, [0, top], _rate),
        marks=marks,
        label=f"Learning rate, at most {_rate(top)}, at the end {_rate(rate[-1])}",
        css="strip",
    )
    notes = [_how_drawn(window)]
    above = next((i for i, value in enumerate(loss) if not value > high), len(loss))
    if above:
        notes.append(f"The first {above} intervals lie above the chart, up to {_largest(loss):.2f}.")
    bad = steps[~np.isfinite(loss)]
    if len(bad):
        said = f"The loss was not finite in {len(bad)} of {len(loss)} intervals, first at step {bad[0]:,.0f}."
        notes.append(f"<strong>{said}</strong>")
    if marks:
        notes.append(f"Dotted: the run was resumed at step {', '.join(f'{step:,}' for step in marks)}.")
    return section(
        "learning",
        title,
        f'<figure><p class="axis-title">Training loss, nats per token</p>{curve}',
        f'<p class="axis-title">Learning rate, by optimizer step</p>{strip}',
        f"<figcaption>{' '.join(notes)}</figcaption></figure>",
    )


def _how_drawn(window: int) -> str:
    return f"Thin: each logged interval. Thick: centred mean of {window | 1} intervals." if window > 1 else ""


def _loss_range(loss: Curve, smooth: Curve) -> tuple[float, float]:
    """The range of loss to draw.

    The first steps of a run fall from ln(vocabulary) so fast that they would leave the rest of it flat: the chart
    starts where the smoothed loss is after 4 % of the run.
    """
    if not len(_finite(loss)):
        return 0.0, 1.0
    low = float(_finite(loss).min())
    high = _largest(smooth[len(smooth) // 25 :]) or _largest(loss)
    pad = 0.06 * (high - low) or 0.1
    return low - pad, high + pad


def _loss_hover(train: tuple[TrainRecord, ...], smooth: Curve) -> Hover:
    chosen = evenly(len(train))
    shown = [train[i] for i in chosen]
    return Hover(
        [record.step for record in shown],
        {
            "step": [f"{record.step:,}" for record in shown],
            "tokens": [count(record.tokens) for record in shown],
            "loss": [f"{record.loss:.3f}" for record in shown],
            "smoothed": [f"{smooth[i]:.3f}" for i in chosen],
            "bits per byte": [bits(record.bits_per_byte) for record in shown],
            "learning rate": [_rate(record.learning_rate) for record in shown],
        },
    )


def progress(run: Run) -> str:
    title = "When each language was learnt"
    records = run.metrics.evaluation if run.metrics else ()
    if not records:
        return section("progress", title, missing(run, "No evaluation was logged in training.", "metrics.jsonl"))
    results = run.evaluation.languages if run.evaluation else {}
    steps, mean = _array(records, "step"), _array(records, "macro_bits_per_byte")
    codes = list(dict.fromkeys(code for record in records for code in record.bits_per_byte))
    curves = {code: np.array([record.bits_per_byte.get(code, math.nan) for record in records]) for code in codes}
    low, high = _panel_range(curves, results, skip=len(records) // 10)
    x = Axis(0, max(1, records[-1].step), [], _number)
    y = Axis(low, high, [float(tick) for tick in range(math.ceil(low), math.ceil(high))], lambda _: "")
    groups = ""
    for heading, group in _grouped(codes, results):
        panels = "".join(_panel(code, curves[code], steps, results.get(code), x, y) for code in group)
        groups += f'<h3>{escape(heading)}</h3><div class="panels">{panels}</div>'
    note = f"Every panel: {low:g} to {high:.1f} bits per byte, a line at each whole bit, steps 0 to {steps[-1]:,.0f}."
    if any(_largest(curve) > high for curve in curves.values()):
        note += " What lies above is cut off."
    if results:
        note += (
            " Dashed: xz on all held-out text of the language. An evaluation in training may measure a part of it, so"
            " that a curve can end a little beside the figure of the table above."
        )
    return section(
        "progress",
        title,
        '<figure class="keep"><p class="axis-title">Held-out bits per byte, mean of the languages, by optimizer '
        f'step</p>{_mean_chart(records, steps, mean)}</figure><p class="note">{note}</p>{groups}',
    )


def _mean_chart(records: tuple[EvaluationRecord, ...], steps: Curve, mean: Curve) -> str:
    finite = _finite(mean) if len(_finite(mean)) else np.array([0.0, 1.0])
    rows = {"step": [f"{step:,.0f}" for step in steps], "mean": [bits(value) for value in mean]}
    return plot(
        [Line(steps, mean, "model", bits(mean[-1]))],
        _step_axis(records[-1].step),
        nice_axis(math.floor(finite.min()), math.ceil(finite.max()), _number, count=4),
        hover=Hover(list(steps), rows),
        label=f"Mean held-out bits per byte over {len(records)} evaluations, at the end {bits(mean[-1])}",
        css="middle",
    )


def _panel_range(curves: Mapping[str, Curve], results: Mapping[str, LanguageResult], skip: int) -> tuple[float, float]:
    """One range for all panels, that of the baselines and of the curves without their first `skip` points."""
    levels = [results[code].baselines.xz for code in curves if code in results]
    values = _finite(np.concatenate([levels, *(curve[skip:] for curve in curves.values())]))
    return (float(math.floor(values.min())), float(values.max()) * 1.03) if len(values) else (0.0, 1.0)


def _grouped(codes: list[str], results: Mapping[str, LanguageResult]) -> list[tuple[str, list[str]]]:
    """Codes by name, the official languages first. A group for each status would waste the page."""
    by_name = sorted(codes, key=lambda code: results[code].name if code in results else language_name(code))
    official = [code for code in by_name if code in LANGUAGES and LANGUAGES[code].status == "official"]
    rest = [code for code in by_name if code not in official]
    groups = [(STATUS_TITLES["official"], official), ("Further languages", rest)]
    return [(heading, group) for heading, group in groups if group]


def _panel(code: str, curve: Curve, steps: Curve, result: LanguageResult | None, x: Axis, y: Axis) -> str:
    name = result.name if result else language_name(code)
    lines = [Line(steps, curve, "model", SPACE)]
    rows = {"step": [f"{step:,.0f}" for step in steps], "model": [bits(value) for value in curve]}
    verdict = ""
    if result:
        level = result.baselines.xz
        lines.insert(0, Line(np.array([x.low, x.high]), np.array([level, level]), "xz"))
        rows["xz"] = [bits(level)] * len(steps)
        verdict = "" if curve[-1] < level else "worse"
    label = f"{name}: {bits(curve[-1])} bits per byte at step {steps[-1]:,.0f}"
    head = f'<span>{escape(name)}</span><b class="{verdict}">{bits(curve[-1])}</b>'
    chart = plot(lines, x, y, label=label, hover=Hover(list(steps), rows))
    return f'<div class="panel"><div class="panel-head">{head}</div>{chart}</div>'


def throughput(run: Run) -> str:
    title = "How fast it ran"
    if not (run.metrics and run.metrics.train):
        return section("throughput", title, missing(run, "Nothing has been trained yet.", "metrics.jsonl"))
    train, marks = run.metrics.train, [restart.step for restart in run.metrics.restarts]
    steps, speed, wait = _array(train, "step"), _array(train, "tokens_per_second"), _array(train, "data_wait")
    window = max(1, len(train) // 40)
    smooth, calm = moving_mean(speed, window), moving_mean(wait, window)
    x = _step_axis(train[-1].step)
    fast = plot(
        [Line(steps, speed, "raw"), Line(steps, smooth, "model", f"{smooth[-1]:,.0f}")],
        x,
        nice_axis(0, 1.05 * _largest(speed), lambda value: f"{value:,.0f}", count=4),
        marks=marks,
        hover=_speed_hover(train),
        label=f"Tokens per second over steps, median {np.median(speed):,.0f}",
        css="middle",
    )
    waiting = plot(
        [Line(steps, wait, "raw"), Line(steps, calm, "quiet", share(float(calm[-1])))],
        x,
        nice_axis(0, max(0.01, 1.1 * _largest(wait)), lambda value: f"{100 * value:g}{SPACE}%", count=2),
        marks=marks,
        label=f"Share of the time spent waiting for data, median {share(float(np.median(wait)))}",
        css="strip",
    )
    norm = _array(train, "grad_norm")
    note = _how_drawn(window)
    if len(_finite(norm)):
        where = steps[int(np.nanargmax(np.where(np.isfinite(norm), norm, -1.0)))]
        note += (
            f" Gradient norm: median {np.median(_finite(norm)):.2f}, largest {_largest(norm):.2f} at step {where:,.0f}."
        )
    return section(
        "throughput",
        title,
        f'<figure><p class="axis-title">Tokens per second</p>{fast}',
        f'<p class="axis-title">Share of the time spent waiting for data, by optimizer step</p>{waiting}',
        f"<figcaption>{note}</figcaption></figure>",
    )


def _speed_hover(train: tuple[TrainRecord, ...]) -> Hover:
    shown = [train[i] for i in evenly(len(train))]
    return Hover(
        [record.step for record in shown],
        {
            "step": [f"{record.step:,}" for record in shown],
            "tokens/s": [f"{record.tokens_per_second:,.0f}" for record in shown],
            "waiting for data": [share(record.data_wait) for record in shown],
            "elapsed": [duration(record.seconds) for record in shown],
        },
    )
