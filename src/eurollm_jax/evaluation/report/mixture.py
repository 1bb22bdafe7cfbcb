"""The curves of a mixture that changes over the run: families as bands on top of each other, each language in a panel.

The bands show where the rows go; forty languages in one chart could not be told apart, so each has a panel of its own.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from eurollm_jax.evaluation.report.frame import language_name
from eurollm_jax.evaluation.report.records import Plan
from eurollm_jax.evaluation.report.svg import Axis, Hover, Line, evenly, nice_axis, plot
from eurollm_jax.evaluation.report.text import SPACE, escape, share
from eurollm_jax.languages import LANGUAGES

Curve = Float[np.ndarray, "steps"]

LABELLED = 0.035  # a band thinner than this has no room for its name
SHADES = 7


def mixture_over_time(plan: Plan) -> str:
    """The bands and the panels; nothing where the shares are the same from the first row to the last."""
    steps = [step for step in plan.stages if step.start < plan.total_rows]
    if all(step.shares == steps[0].shares for step in steps):
        return ""
    languages = _summed(plan, {name: source.language or name for name, source in plan.sources.items()})
    families = _summed(
        plan,
        {
            name: LANGUAGES[source.language].family if source.language in LANGUAGES else "no family"
            for name, source in plan.sources.items()
        },
    )
    starts = np.array([step.start for step in steps], float)
    rows = np.repeat(np.append(starts, plan.total_rows), 2)[1:-1]  # both ends of each step
    x = nice_axis(0, plan.total_rows, lambda row: f"{row:,.0f}")
    panels = "".join(
        _panel(code, rows, curve, plan.total_rows) for code, curve in sorted(languages.items(), key=_largest_first)
    )
    return (
        '<h3>How the mixture changes</h3><figure class="keep"><p class="axis-title">Planned share of the rows by '
        f"language family, over the rows of the run</p>{_bands(rows, families, x)}</figure>"
        f'<p class="note">By language, each panel from 0 to its own largest share; above it the shares at the start and'
        f' at the end.</p><div class="panels shares">{panels}</div>'
    )


def _largest_first(item: tuple[str, Curve]) -> tuple[float, str]:
    return -float(item[1].mean()), item[0]


def _summed(plan: Plan, group_of: Mapping[str, str]) -> dict[str, Curve]:
    """Share of the rows in each step, by group."""
    steps = [step for step in plan.stages if step.start < plan.total_rows]
    curves = {group: np.zeros(len(steps)) for group in group_of.values()}
    for i, step in enumerate(steps):
        for name, value in step.shares.items():
            curves.setdefault(group_of.get(name, name), np.zeros(len(steps)))[i] += value
    return curves


def _bands(rows: Curve, families: Mapping[str, Curve], x: Axis) -> str:
    """Families as bands, the largest at the bottom. A band is drawn over those above it, from its upper edge down."""
    ordered = sorted(families.items(), key=_largest_first)
    edge = np.zeros(len(rows))
    lines, readings = [], {"row": [f"{row:,.0f}" for row in rows]}
    for i, (family, curve) in enumerate(ordered):
        steps = np.repeat(curve, 2)
        edge = edge + steps
        middle = float(edge[-1] - steps[-1] / 2)
        label = f"{family} {share(float(curve[-1]))}" if curve[-1] >= LABELLED else ""
        lines.append(Line(rows, edge, f"band shade-{i % SHADES}", label, label_at=middle))
        readings[family] = [share(float(value)) for value in steps]
    y = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1], lambda value: f"{100 * value:.0f}{SPACE}%")
    chosen = evenly(len(rows))
    return plot(
        lines[::-1],
        x,
        y,
        hover=Hover([float(rows[i]) for i in chosen], {n: [words[i] for i in chosen] for n, words in readings.items()}),
        label="Planned share of the rows by family: "
        + ", ".join(f"{family} from {share(float(c[0]))} to {share(float(c[-1]))}" for family, c in ordered),
        css="bands",
    )


def _panel(code: str, rows: Curve, curve: Curve, total_rows: int) -> str:
    name = language_name(code)
    steps = np.repeat(curve, 2)
    first, last = share(float(curve[0])), share(float(curve[-1]))
    chart = plot(
        [Line(rows, steps, "model", SPACE)],
        Axis(0, max(1, total_rows), [], str),
        Axis(0, float(curve.max()) * 1.05 or 1.0, [], str),
        label=f"{name}: from {first} to {last} of the rows",
    )
    head = f'<span>{escape(name)}</span><b title="{first} to {last}">{first} → {last}</b>'
    return f'<div class="panel" data-share="{escape(code)}"><div class="panel-head">{head}</div>{chart}</div>'
