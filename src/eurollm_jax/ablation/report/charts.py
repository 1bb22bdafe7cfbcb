"""The charts of a study's report: rows of dots with whiskers, strips of ticks, and the scatter of what was foretold.

As in the run's report, marks are SVG that stretches to any width and words are HTML.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eurollm_jax.ablation.report.records import Interval
from eurollm_jax.evaluation.report.svg import HEIGHT, WIDTH, Axis, percent
from eurollm_jax.evaluation.report.text import escape

FULLEST = 55  # per cent of colour in the strongest cell of a heat map: words on it stay legible
FAINT = 0.15  # of its colour is left to a cell whose interval covers 0


@dataclass(frozen=True, slots=True)
class Point:
    """A run in the scatter."""

    name: str
    x: float
    y: float


def ends_of(found: Iterable[Interval]) -> list[float]:
    """All figures and ends that an axis is to hold; those that are not known are left out."""
    ends = (end for interval in found for end in (*interval.ends, interval.value))
    return [end for end in ends if math.isfinite(end)]


def axis_head(axis: Axis) -> str:
    """The ticks of a chart that is a column of a table, for the column's head."""
    ticks = "".join(
        f'<span class="tick x" style="left:{percent(axis.share(t))}">{escape(axis.show(t))}</span>' for t in axis.ticks
    )
    return f'<div class="axis">{ticks}</div>'


def _at(value: float, axis: Axis) -> str:
    return percent(min(1.0, max(0.0, axis.share(value))) if math.isfinite(value) else 1.0)


def _grid(axis: Axis) -> str:
    return "".join(
        f'<line class="{"zero" if t == 0 and axis.low < 0 else "grid"}" x1="{percent(axis.share(t))}"'
        f' x2="{percent(axis.share(t))}" y1="0" y2="100%"/>'
        for t in axis.ticks
    )


def whisker(
    found: Interval,
    axis: Axis,
    label: str,
    *,
    css: str = "",
    prior: float | None = None,
    within: tuple[float, float] | None = None,
) -> str:
    """One row: a dot with its interval; a tick for `prior`, and a band for the range that it lies `within`."""
    band = ""
    if within is not None:
        low, high = (min(1.0, max(0.0, axis.share(end))) for end in within)
        band = f'<rect class="band" x="{percent(low)}" width="{percent(high - low)}" y="28%" height="44%"/>'
    tick = "" if prior is None else _tick("prior", prior, axis, "14%", "86%")
    low, high = found.ends
    line = f'<line class="arm" x1="{_at(low, axis)}" x2="{_at(high, axis)}" y1="50%" y2="50%"/>' if found.known else ""
    drawn = math.isfinite(found.value)
    dot = f'<circle class="dot-mark" cx="{_at(found.value, axis)}" cy="50%" r="4.5"/>' if drawn else ""
    return (
        f'<svg class="whisker {css}" role="img" aria-label="{escape(label)}">{_grid(axis)}{band}{tick}{line}{dot}</svg>'
    )


def _tick(css: str, value: float, axis: Axis, top: str, bottom: str) -> str:
    return f'<line class="{css}" x1="{_at(value, axis)}" x2="{_at(value, axis)}" y1="{top}" y2="{bottom}"/>'


def strip(values: Iterable[float], prior: float, proposal: float | None, axis: Axis, label: str) -> str:
    """One row: a faint tick for each value, a long one for the prior, a dot for the proposal."""
    ticks = "".join(_tick("one", value, axis, "26%", "74%") for value in values)
    dot = "" if proposal is None else f'<circle class="dot-mark" cx="{_at(proposal, axis)}" cy="50%" r="4"/>'
    return (
        f'<svg class="whisker strip-row" role="img" aria-label="{escape(label)}">{_grid(axis)}{ticks}'
        f"{_tick('prior', prior, axis, '8%', '92%')}{dot}</svg>"
    )


def scatter(points: Sequence[Point], axis: Axis, label: str, words: tuple[str, str]) -> str:
    """Points over one axis both ways, with the line on which both are equal; `words` name x and y in the readings."""
    lines = "".join(
        f"M0,{(1 - axis.share(t)) * HEIGHT:.1f}H{WIDTH}M{axis.share(t) * WIDTH:.1f},0V{HEIGHT}" for t in axis.ticks
    )
    y = [
        f'<span class="y tick" style="top:{percent(1 - axis.share(t))}">{escape(axis.show(t))}</span>'
        for t in axis.ticks
    ]
    x = [
        f'<span class="x tick" style="left:{percent(axis.share(t))}">{escape(axis.show(t))}</span>' for t in axis.ticks
    ]
    ordered = sorted(points, key=lambda point: point.x)
    dots = "".join(
        f'<i class="dot model" style="left:{_at(point.x, axis)};top:{percent(1 - _inside(point.y, axis))}"></i>'
        for point in ordered
    )
    readings = {
        "x": [round(_inside(point.x, axis), 5) for point in ordered],
        "rows": {
            "run": [point.name for point in ordered],
            words[0]: [f"{point.x:.4f}" for point in ordered],
            words[1]: [f"{point.y:.4f}" for point in ordered],
        },
    }
    return (
        f'<div class="plot square" role="img" aria-label="{escape(label)}" tabindex="0"'
        f' data-hover="{escape(json.dumps(readings))}"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none"'
        f' aria-hidden="true"><path class="grid" d="{lines}"/><path class="quiet" d="M0,{HEIGHT}L{WIDTH},0"/></svg>'
        f"{''.join(y)}{''.join(x)}{dots}</div>"
    )


def _inside(value: float, axis: Axis) -> float:
    return min(1.0, max(0.0, axis.share(value))) if math.isfinite(value) else 1.0


def heat(found: Interval, strongest: float, words: str, label: str, *, own: bool) -> str:
    """A cell: colour as the root of the effect, so that not the strongest alone show; faint and without its figure
    where the interval covers 0; empty where it is not known.

    `words` is the figure, `label` all that is to be said of it; `own` frames the cell.
    """
    if not math.isfinite(found.value):
        return f'<td class="heat{" own" if own else ""}" title="{escape(label)}"></td>'
    faint = found.covers_zero
    part = FULLEST * math.sqrt(min(1.0, abs(found.value) / strongest)) if strongest > 0 else 0.0
    css = " ".join(
        ["heat", "helps" if found.value < 0 else "harms", *(["faint"] if faint else []), *(["own"] if own else [])]
    )
    return (
        f'<td class="{css}" style="--part:{part * (FAINT if faint else 1):.1f}%" data-value="{found.value}"'
        f' title="{escape(label)}">{"" if faint else escape(words)}</td>'
    )
