"""Draws the charts of the report: SVG for the marks, HTML for the words, so that text keeps its size on a phone.

A line chart is a `div.plot` whose SVG stretches to any width (`preserveAspectRatio="none"`, strokes that do not scale),
with labels placed in percent around it. The readings under the pointer travel along as JSON in `data-hover`.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from eurollm_jax.evaluation.report.text import escape

WIDTH, HEIGHT = 1000, 400  # of the drawing, in its own units
MAX_POINTS = 500  # a chart is about a thousand pixels wide: more points would only make the file larger


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. `css` is the class that gives it its colour and weight."""

    x: Float[np.ndarray, "N"]
    y: Float[np.ndarray, "N"]
    css: str
    label: str = ""  # written at the last point
    label_at: float | None = None  # the height to write it at instead, without a dot: a curve that is filled below


@dataclass(frozen=True, slots=True)
class Axis:
    low: float
    high: float
    ticks: list[float]
    show: Callable[[float], str]

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1 inside the chart."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Hover:
    """What the pointer reads: for each x the words of each named series."""

    x: list[float]
    rows: dict[str, list[str]] = field(default_factory=dict)


def nice_axis(low: float, high: float, show: Callable[[float], str], count: int = 5) -> Axis:
    """An axis over [low, high] (not widened) with about `count` ticks at 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, [i * step for i in range(first, last + 1)], show)


def moving_mean(y: Float[np.ndarray, "N"], window: int) -> Float[np.ndarray, "N"]:
    """Centred mean over `window` points (made odd), fewer at the ends; values that are not finite are left out."""
    half = window // 2
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def thin(y: Float[np.ndarray, "N"], points: int = MAX_POINTS) -> list[int]:
    """Indices to draw so that a curve keeps its look: lowest and highest value of each of `points` / 2 stretches."""
    n = len(y)
    if n <= points:
        return list(range(n))
    kept = {0, n - 1}
    edges = np.linspace(0, n, points // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        part = y[start:stop]
        if np.isfinite(part).any():
            kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
        if not np.isfinite(part).all():
            kept.add(int(start + np.flatnonzero(~np.isfinite(part))[0]))  # so that the gap is drawn as a gap
    return sorted(kept)


def evenly(n: int, points: int = MAX_POINTS) -> list[int]:
    """At most `points` indices of range(n), evenly spread, with both ends."""
    return list(range(n)) if n <= points else [round(i * (n - 1) / (points - 1)) for i in range(points)]


def path(line: Line, x: Axis, y: Axis) -> str:
    """The curve as SVG path data; a value that is not finite interrupts it."""
    parts, pen_down = [], False
    for i in thin(line.y):
        if math.isfinite(line.y[i]):
            # A point far off the chart is drawn a little off it: browsers clip large coordinates differently.
            height = min(2.0, max(-1.0, y.share(float(line.y[i]))))
            parts.append(
                f"{'L' if pen_down else 'M'}{x.share(float(line.x[i])) * WIDTH:.1f},{(1 - height) * HEIGHT:.1f}"
            )
        pen_down = math.isfinite(line.y[i])
    return "".join(parts)


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def plot(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    label: str,
    hover: Hover | None = None,
    marks: Iterable[float] = (),
    css: str = "",
) -> str:
    """A line chart as HTML.

    Args:
        lines: drawn in order, the last on top; a line with a label gets it at its last finite point, and a dot there.
        x, y: the axes; ticks of `y` draw grid lines, ticks of `x` only labels.
        label: what the chart shows, for those who cannot see it.
        marks: x of vertical dotted rules (restarts of the run).
        css: further classes of the chart, which choose its height.
    """
    svg = [f'<path class="grid" d="{"".join(f"M0,{(1 - y.share(t)) * HEIGHT:.1f}H{WIDTH}" for t in y.ticks)}"/>']
    svg += [f'<path class="mark" d="M{x.share(m) * WIDTH:.1f},0V{HEIGHT}"/>' for m in marks]
    words = [f'<span class="y tick" style="top:{percent(1 - y.share(t))}">{escape(y.show(t))}</span>' for t in y.ticks]
    words += [f'<span class="x tick" style="left:{percent(x.share(t))}">{escape(x.show(t))}</span>' for t in x.ticks]
    for line in lines:
        closed = "" if line.label_at is None else f"V{HEIGHT}H{x.share(float(line.x[0])) * WIDTH:.1f}Z"
        svg.append(f'<path class="{line.css}" d="{path(line, x, y)}{closed}"/>')
        finite = np.flatnonzero(np.isfinite(line.y))
        if line.label and len(finite):
            end = int(finite[-1])
            height = float(line.y[end]) if line.label_at is None else line.label_at
            place = f"left:{percent(x.share(float(line.x[end])))};top:{percent(1 - y.share(height))}"
            if line.label_at is None:
                words.append(f'<i class="dot {line.css}" style="{place}"></i>')
            words.append(f'<b class="end {line.css}" style="{place}">{escape(line.label)}</b>')
    data = ""
    if hover and hover.x:
        positions = [round(x.share(value), 5) for value in hover.x]
        data = f' tabindex="0" data-hover="{escape(json.dumps({"x": positions, "rows": hover.rows}))}"'
    return (
        f'<div class="plot {css}" role="img" aria-label="{escape(label)}"{data}>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{"".join(svg)}</svg>'
        f"{''.join(words)}</div>"
    )


def dumbbell(model: float, xz: float, order0: float, axis: Axis, label: str) -> str:
    """One row of the comparison: a dot for the model, a tick for xz, a ring for order-0, a bar for what was gained."""

    def at(value: float) -> str:
        return percent(min(1.0, max(0.0, axis.share(value))) if math.isfinite(value) else 1.0)

    grid = "".join(
        f'<line class="grid" x1="{percent(axis.share(t))}" x2="{percent(axis.share(t))}" y1="0" y2="100%"/>'
        for t in axis.ticks
    )
    verdict = "better" if model < xz else "worse"
    return (
        f'<svg class="dumbbell" role="img" aria-label="{escape(label)}">{grid}'
        f'<line class="span {verdict}" x1="{at(model)}" x2="{at(xz)}" y1="50%" y2="50%"/>'
        f'<circle class="order0" cx="{at(order0)}" cy="50%" r="3.5"/>'
        f'<line class="xz" x1="{at(xz)}" x2="{at(xz)}" y1="22%" y2="78%"/>'
        f'<circle class="model {verdict}" cx="{at(model)}" cy="50%" r="5"/></svg>'
    )


def share_bar(planned: float, consumed: float | None, largest: float, label: str) -> str:
    """Planned share of a language as a tick, consumed share as a bar, on a scale that ends at `largest`."""
    bar = (
        ""
        if consumed is None
        else f'<rect class="bar" x="0" y="30%" width="{percent(consumed / largest)}" height="40%"/>'
    )
    end = percent(planned / largest)
    return (
        f'<svg class="share" role="img" aria-label="{escape(label)}">{bar}'
        f'<line class="planned" x1="{end}" x2="{end}" y1="12%" y2="88%"/></svg>'
    )
