"""A plan as tables for a person, and as plain values for a program."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from eurollm_jax.cluster.plan.collectives import Collective
from eurollm_jax.cluster.plan.plan import SURE, Memory, Plan, Ranked
from eurollm_jax.cluster.plan.work import Bound, power
from eurollm_jax.parallel.flags import FRACTION_VARIABLE

GIB = 1 << 30
UNKNOWN = "unknown"
ASSUMED = "attention as if each row were one document"
PARTS = {"compute": "products", "memory": "memory", "links": "links within a node", "network": "network between nodes"}


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return UNKNOWN
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:.0f} B"


def mesh_words(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis}={devices}" for axis, devices in mesh.items() if devices > 1) or "one device"


def tables(plan: Plan) -> list[Table]:
    return [memory_table(plan), collectives_table(plan), speed_table(plan), *_remedies(plan)]


def heading(plan: Plan) -> str:
    compiled, experiment = plan.memory.compiled, plan.experiment
    kernel = f"attention {compiled.kernel} ({compiled.kernel_reason})"
    if compiled.kernel != compiled.compiled_kernel:
        kernel += f", planned as {compiled.compiled_kernel}, which a CPU can compile"
    if experiment.model.remat != compiled.compiled_remat:
        kernel += f"; remat {experiment.model.remat}, planned as {compiled.compiled_remat}"
    return (
        f"{experiment.name} on {plan.site.title}: {plan.nodes} nodes, {plan.devices} x {plan.site.chip.name}, "
        f"{mesh_words(compiled.mesh)}; {plan.parameters:,} parameters, batches of {compiled.rows:,} rows of "
        f"{experiment.data.sequence_length:,} tokens in {experiment.accumulate} micro-batches, "
        f"remat {experiment.model.remat}, {kernel}; compiled in {compiled.seconds:.0f} s"
    )


def memory_table(plan: Plan) -> Table:
    memory, compiled = plan.memory, plan.memory.compiled
    state, modelled = compiled.state, memory.modelled
    table = _table("Memory of one device", ("what", "left"), ("bytes", "right"), ("", "left"))
    table.add_row("parameters", size(state.parameters), "float32")
    table.add_row("optimizer", size(state.optimizer), type(plan.experiment.optimizer).__name__)
    if state.average:
        table.add_row("average of the parameters", size(state.average), f"ema={plan.experiment.ema}")
    table.add_row("batch", size(compiled.batch), f"{compiled.rows:,} rows over all devices")
    table.add_row("gradients", size(modelled.gradients), "modelled; at the fullest moment of a step")
    table.add_row("activations", size(modelled.activations), f"modelled; kept by remat {plan.experiment.model.remat}")
    table.add_row("working space", size(modelled.working), "modelled; of a layer, some of the logits, or the update")
    table.add_row(
        "temporaries, compiled", size(compiled.temporaries), "of the program for this CPU, all three together"
    )
    table.add_row(
        "peak", size(memory.peak), "with the compiled" if plan.site.chip.backend == "cpu" else "with the modelled"
    )
    if memory.budget is None:
        table.add_row("a device has", UNKNOWN, f"the memory of {plan.site.chip.name} is not known")
    else:
        share = f"{memory.fraction:.0%} of {size(plan.site.chip.memory)} ({FRACTION_VARIABLE})"
        table.add_row("a program may have", size(memory.budget), share)
        colour = {"fits": "green", "unsure": "yellow", "does not fit": "red"}[memory.verdict or "unsure"]
        table.add_row("verdict", f"[{colour}]{memory.verdict}[/]", verdict_words(memory))
    return table


def verdict_words(memory: Memory) -> str:
    assert memory.budget is not None
    share = f"{memory.peak / memory.budget:.0%} of it"
    if memory.verdict != "unsure":
        return share
    if memory.peak > SURE * memory.budget:
        return f"{share}, and the model may err by {1 - SURE:.0%}"
    need = size(memory.compiled.peak)
    return f"{share} by the model; as compiled for this CPU, which widens bfloat16, it would need {need}"


def collectives_table(plan: Plan) -> Table:
    columns = (("axis", "left"), ("collective", "left"), ("type", "left"), ("times", "right"))
    table = _table(
        "What a device sends in a step", *columns, ("bytes each time", "right"), ("in all", "right"), ("way", "left")
    )
    for axes, kind, dtype, some in _grouped(plan.collectives):
        times, sent = sum(one.times for one in some), sum(one.sent for one in some)
        way = "within nodes" if all(one.nodes == 1 for one in some) else "between nodes"
        unsure = "" if all(one.certain for one in some) else " at least"
        table.add_row(" x ".join(axes), kind, dtype, f"{times:,}{unsure}", size(sent / times), size(sent), way)
    return table


def _grouped(collectives: Sequence[Collective]) -> list[tuple[tuple[str, ...], str, str, list[Collective]]]:
    groups: dict[tuple[tuple[str, ...], str, str], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.axes, one.kind, one.dtype), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: -sum(one.sent for one in item[1]))
    return [(*key, some) for key, some in ordered]


def speed_table(plan: Plan) -> Table:
    work, bound, run, site = plan.work, plan.bound, plan.run, plan.site
    table = _table("At best", ("what", "left"), ("figure", "right"), ("", "left"))
    table.add_row("model FLOP a step", f"{work.model_flops:.4g}", "forward and backward")
    table.add_row("with recomputation", f"{work.flops:.4g}", f"{work.recomputed / work.model_flops:.0%} more")
    sent = sum(one.sent for one in plan.collectives)
    if sent:
        table.add_row("FLOP for each byte sent", f"{work.flops / plan.devices / sent:,.0f}", "of one device")
    for part, words in PARTS.items():
        seconds = getattr(bound, part)
        what = "" if seconds is not None else "a figure of the site is not known"
        table.add_row(f"step by {words}", UNKNOWN if seconds is None else f"{seconds:.4g} s", what)
    if bound.seconds is None:
        table.add_row("tokens/s at most", UNKNOWN, f"the peak of {site.chip.name} is not known")
    else:
        rate = f"limited by {PARTS[bound.by or 'compute']}; all parts overlap perfectly; {ASSUMED}"
        table.add_row("tokens/s at most", f"{plan.tokens_per_second:,.0f}", rate)
        table.add_row(
            "share of peak at most", f"{plan.share_of_peak:.0%}", "of the model's FLOP, without recomputation"
        )
    table.add_row("whole run", f"{run.tokens:.4g} tokens", f"{run.steps:,} steps")
    table.add_row("days at least", _number(run.days), ASSUMED)
    table.add_row("device-hours at least", _number(run.device_hours), f"{plan.devices} devices")
    table.add_row("MWh at full power", _number(run.megawatt_hours), _energy_words(plan))
    saved = plan.checkpoint
    table.add_row("checkpoint", size(saved.bytes), "parameters and optimizer state")
    table.add_row("seconds to write it", _number(saved.seconds), _interval_words(plan))
    return table


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.1f}"


def _energy_words(plan: Plan) -> str:
    site = plan.site
    if power(site, plan.devices) is None:
        return f"the power of {site.chip.name} is not known"
    left_out = [name for name, value in (("nodes", site.node_watts), ("building", site.pue)) if value is None]
    return f"devices at {site.chip.watts:g} W" + (f"; without {' and '.join(left_out)}" if left_out else "")


def _interval_words(plan: Plan) -> str:
    saved = plan.checkpoint
    if saved.seconds is None:
        return "the rate of the site's storage is not known"
    if saved.every is None:
        return ""
    kept = "fits" if saved.seconds <= saved.every else "exceeds"
    return f"{kept} the {saved.every:,.0f} s between two"


def _remedies(plan: Plan) -> list[Table]:
    if not plan.remedies:
        return []
    table = _table(
        "What would take less, by the model", ("change", "left"), ("peak", "right"), ("", "left"), ("options", "left")
    )
    for remedy in plan.remedies:
        table.add_row(remedy.what, size(remedy.peak), remedy.verdict, remedy.options)
    return [table]


def search_table(ranked: Sequence[Ranked], most: int = 20) -> Table:
    table = _table(
        f"Ranked by bound: {len(ranked)} possible, {min(most, len(ranked))} shown",
        *(
            ("mesh", "left"),
            ("remat", "left"),
            ("accumulate", "right"),
            ("peak", "right"),
            ("tokens/s at most", "right"),
        ),
        *(("limited by", "left"), ("share of peak", "right"), ("", "left")),
    )
    for one in ranked[:most]:
        chosen, bound = one.candidate, one.bound
        rate = UNKNOWN if bound.seconds is None else f"{chosen.work.tokens / bound.seconds:,.0f}"
        share = UNKNOWN
        if bound.compute:
            share = f"{bound.compute / (bound.seconds or 1) * chosen.work.model_flops / chosen.work.flops:.0%}"
        how = "modelled" if one.memory is None else "compiled"
        if one.memory is not None and one.memory.verdict != "fits":
            how += f", {one.memory.verdict}"
        limit = PARTS[bound.by] if bound.by else UNKNOWN
        experiment = chosen.experiment
        table.add_row(
            mesh_words(chosen.mesh),
            experiment.model.remat,
            str(experiment.accumulate),
            size(one.peak),
            rate,
            limit,
            share,
            how,
        )
    return table


def _table(title: str, *columns: tuple[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


# -------------------------------------------------------------------------------------------------------------- JSON


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures: bytes, seconds, FLOP; of one device where it says so. None where one is not known."""
    memory, compiled = plan.memory, plan.memory.compiled
    return {
        "experiment": plan.experiment.name,
        "site": plan.site.name,
        "nodes": plan.nodes,
        "devices": plan.devices,
        "mesh": compiled.mesh,
        "rows": compiled.rows,
        "accumulate": plan.experiment.accumulate,
        "remat": plan.experiment.model.remat,
        "kernel": compiled.kernel,
        "planned_kernel": compiled.compiled_kernel,
        "parameters": plan.parameters,
        "memory_of_a_device": {
            **dataclasses.asdict(compiled.state),
            "batch": compiled.batch,
            "modelled": dataclasses.asdict(memory.modelled),
            "temporaries_compiled": compiled.temporaries,
            "update_compiled": compiled.update,
            "results_compiled": compiled.results,
            "peak_compiled": compiled.peak,
            "peak": memory.peak,
            "budget": memory.budget,
            "fraction": memory.fraction,
            "verdict": memory.verdict,
        },
        "flops": {"model": plan.work.model_flops, "with_recomputation": plan.work.flops},
        "collectives": [_collective(one) for one in plan.collectives],
        "bound_seconds": bound_json(plan.bound),
        "tokens_per_second": plan.tokens_per_second,
        "share_of_peak": plan.share_of_peak,
        "run": dataclasses.asdict(plan.run),
        "checkpoint": dataclasses.asdict(plan.checkpoint),
        "remedies": [dataclasses.asdict(remedy) for remedy in plan.remedies],
        "warnings": list(plan.warnings),
        "compile_seconds": compiled.seconds,
    }


def bound_json(bound: Bound) -> dict[str, Any]:
    return {**dataclasses.asdict(bound), "step": bound.seconds, "by": bound.by}


def _collective(one: Collective) -> dict[str, Any]:
    figures = {"bytes_each": one.each, "bytes_a_step": one.sent, "bytes_between_nodes": one.sent_between_nodes}
    return {**dataclasses.asdict(one), **figures}


def search_json(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    return [
        {
            "mesh": one.candidate.mesh,
            "remat": one.candidate.experiment.model.remat,
            "accumulate": one.candidate.experiment.accumulate,
            "peak": one.peak,
            "compiled": one.memory is not None,
            "verdict": None if one.memory is None else one.memory.verdict,
            "bound_seconds": bound_json(one.bound),
        }
        for one in ranked
    ]
