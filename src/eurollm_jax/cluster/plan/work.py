"""The floating-point operations of a step, and the least time that a machine can take for it.

The time is a lower bound, and so the rate is an upper one: products at the chip's peak, memory and networks at theirs,
and each of them busy while the others are. Nothing reaches all of that; what falls short of it is for the profiler.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eurollm_jax.cluster.plan.collectives import Collective
from eurollm_jax.cluster.plan.memory import Mesh, ways
from eurollm_jax.cluster.site import Site
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import MoE, TransformerConfig
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import flops_per_token, specs


@dataclass(frozen=True)
class Work:
    """Of one step, over all devices."""

    tokens: int
    model_flops: float  # by model/transformer.py: what training needs
    flops: float  # with what is computed twice

    @property
    def recomputed(self) -> float:
        return self.flops - self.model_flops


@dataclass(frozen=True)
class Bound:
    """The least seconds of a step by each part of the machine; None where the site's figure is not known."""

    compute: float | None
    memory: float | None
    links: float | None
    network: float | None

    @property
    def seconds(self) -> float | None:
        """None where the peak is not known, without which the others say too little."""
        known = [value for value in vars(self).values() if value is not None]
        return None if self.compute is None else max(known)

    @property
    def by(self) -> str | None:
        """The part that takes longest."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return None if self.compute is None else max(known, key=lambda name: known[name])


def work_of(experiment: Experiment, rows: int, kernel: str) -> Work:
    length = experiment.data.sequence_length
    tokens = rows * length
    needed = flops_per_token(experiment.model, length)
    return Work(tokens, tokens * needed, tokens * (needed + recomputed_per_token(experiment.model, length, kernel)))


def recomputed_per_token(c: TransformerConfig, length: int, kernel: str) -> float:
    """Operations of a token that the backward pass repeats, which `flops_per_token` leaves out: products of the forward
    pass whose results the policy does not keep, and scores, which attention by blocks and fused attention make anew.

    The last product of the MLP is never repeated, for nothing in the backward pass needs its result. Experts are
    repeated under every policy (model/moe.py).
    """
    layer = {path: spec for path, spec in flatten(specs(c)["layers"]).items() if spec.fan_in}  # type: ignore[arg-type]
    keys = _keys(c, length)
    scores = 2.0 * c.heads * c.head_dim * keys  # of one forward product of attention
    again = 0.0 if kernel == "reference" else scores
    repeated: set[str] = set()
    match c.remat:
        case "full":
            repeated = {path for path in layer if not path.endswith("down")}
            again += 2 * scores
        case "attention" | "offload":
            repeated = {path for path in layer if not path.endswith(("down", "query", "key", "value"))}
            if c.qk_norm != "none":
                repeated |= {"query", "key"}
            again += 2 * scores if kernel == "cudnn" else 0.0
        case "dots":
            again += 2 * scores
    if isinstance(c.mlp, MoE):
        repeated |= {"experts/gate", "experts/up"}
        if c.remat == "none":
            repeated = {"experts/gate", "experts/up"}
    return again + 2.0 * sum(_active(c, path, spec.size) for path, spec in layer.items() if path in repeated)


def _keys(c: TransformerConfig, length: int) -> float:
    """Keys that a query sees on average, summed over the layers; as in `flops_per_token`."""
    windows = [min(c.kind(layer).window or length, length) for layer in range(c.depth)]
    return math.fsum(window * (1 - window / (2 * length)) for window in windows)


def _active(c: TransformerConfig, path: str, size: int) -> float:
    if isinstance(c.mlp, MoE) and path.startswith("experts/"):
        return size * c.mlp.top_k / c.mlp.experts
    return size


def bound_of(
    experiment: Experiment, work: Work, mesh: Mesh, site: Site, sent: Sequence[Collective], state: float
) -> Bound:
    """`state` is the bytes of a device's parameters and optimizer state, which a step reads and writes once."""
    chip, devices = site.chip, math.prod(mesh.values())
    traffic = 2 * state + _weights_read(experiment, mesh)
    links = math.fsum(one.sent_within_node for one in sent)
    node = math.fsum(one.sent_between_nodes * site.devices_per_node / one.per_node for one in sent)
    return Bound(
        compute=_time(work.flops / devices, chip.bfloat16),
        memory=_time(traffic, chip.bandwidth),
        links=_time(links, site.link_bandwidth),
        network=_time(node, site.network_bandwidth),
    )


def _weights_read(experiment: Experiment, mesh: Mesh) -> float:
    """Bytes of weights, in the type of the products, that a device reads for them: forward and backward, and for each
    micro-batch."""
    weights = flatten(specs(experiment.model))
    width = 2 if experiment.model.compute == "bfloat16" else 4
    own = sum(spec.size / ways(spec.axes, {**mesh, "fsdp": 1}) for spec in weights.values() if spec.fan_in)
    return 2.0 * experiment.accumulate * own * width


def _time(amount: float, rate: float | None) -> float | None:
    if not amount:
        return 0.0
    return amount / rate if rate else None


# --------------------------------------------------------------------------------------------------- the whole run


@dataclass(frozen=True)
class Phase:
    """Steps of a run that have batches of one size."""

    rows: int
    steps: int


def phases(experiment: Experiment) -> tuple[Phase, ...]:
    """The batch sizes of a run and how many steps each has, in their order."""
    sizes = experiment.batch_sizes.until(experiment.total_rows)
    begins = [0, *(sizes.steps(row) for row, _ in sizes.changes), experiment.steps]
    of = [sizes.first, *(size for _, size in sizes.changes)]
    counted = [
        Phase(rows, min(end, experiment.steps) - begin)
        for rows, begin, end in zip(of, begins[:-1], begins[1:], strict=True)
    ]
    return tuple(phase for phase in counted if phase.steps > 0)


@dataclass(frozen=True)
class WholeRun:
    """At best; None where a figure of the site that it needs is not known."""

    tokens: int
    steps: int
    days: float | None
    device_hours: float | None
    megawatt_hours: float | None


def whole_run(experiment: Experiment, seconds: Mapping[int, float | None], site: Site, devices: int) -> WholeRun:
    """`seconds` are those of a step, by its batch size."""
    steps = phases(experiment)
    times = [(phase.steps, seconds[phase.rows]) for phase in steps]
    tokens = experiment.total_rows * experiment.data.sequence_length
    known = [count * second for count, second in times if second is not None]
    if len(known) < len(times):
        return WholeRun(tokens, experiment.steps, None, None, None)
    hours = math.fsum(known) / 3600
    watts = power(site, devices)
    return WholeRun(
        tokens, experiment.steps, hours / 24, hours * devices, None if watts is None else hours * watts / 1e6
    )


def power(site: Site, devices: int) -> float | None:
    """Watts of the devices at most, with their nodes' and the building's where these are known."""
    if site.chip.watts is None:
        return None
    nodes = -(-devices // site.devices_per_node)
    return (devices * site.chip.watts + nodes * (site.node_watts or 0.0)) * (site.pue or 1.0)


@dataclass(frozen=True)
class Checkpoint:
    bytes: int
    seconds: float | None  # to write it at the site's best
    every: float | None  # seconds between two at the least


def checkpoint_of(experiment: Experiment, state: int, seconds: float | None, site: Site) -> Checkpoint:
    """`state` is the bytes of all devices' together, without copies, `seconds` those of a step."""
    minutes = experiment.saving.minutes
    cadences = [experiment.checkpoint_every * seconds] if seconds is not None else []
    cadences += [60 * minutes] if minutes is not None else []
    bandwidth = site.storage_bandwidth
    return Checkpoint(state, state / bandwidth if bandwidth else None, min(cadences) if cadences else None)
