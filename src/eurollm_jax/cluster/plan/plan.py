"""The plan of an experiment on a site: compiled, set against what there is, with remedies where it exceeds that."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eurollm_jax.cluster.plan.child import Compiled, Request, compile_elsewhere
from eurollm_jax.cluster.plan.collectives import Collective
from eurollm_jax.cluster.plan.memory import Temporaries, one_device, state_bytes, temporaries, ways
from eurollm_jax.cluster.plan.search import Candidate, candidates, modelled_peak
from eurollm_jax.cluster.plan.work import (
    Bound,
    Checkpoint,
    WholeRun,
    Work,
    bound_of,
    checkpoint_of,
    phases,
    whole_run,
    work_of,
)
from eurollm_jax.cluster.site import Site
from eurollm_jax.cluster.sites.generic import LOCAL
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.config import Remat
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.flags import FRACTION_VARIABLE, MEMORY_FRACTION
from eurollm_jax.parallel.mesh import ACTIVATION_AXES, MESH_AXES, MeshConfig

MOST_FRACTION = 0.95  # the driver, NCCL's buffers and the program's code need some
FRUGAL: Mapping[Remat, Remat] = {"none": "attention", "dots": "attention", "attention": "full"}
COMPILED_OF_SEARCH = 3
SURE = 0.9  # of the budget; where it was measured, a run took up to 4 % more than the model says (docs/plan.md)


type Verdict = Literal["fits", "unsure", "does not fit"]


def verdict_of(peak: float, budget: float) -> Verdict:
    """Of a modelled peak."""
    if peak > budget:
        return "does not fit"
    return "fits" if peak <= SURE * budget else "unsure"


@dataclass(frozen=True)
class Remedy:
    """A change of the experiment that takes less memory, and the peak that it would have by the model."""

    what: str
    options: str  # as they stand on the command line
    peak: float
    verdict: Verdict


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    compiled: Compiled  # on this CPU
    modelled: Temporaries  # in the site's types
    budget: float | None  # that a program may have there
    fraction: float
    peak: float

    exact: bool = False  # on a CPU, where the peak is the compiled program's own

    @property
    def verdict(self) -> Verdict | None:
        """None where the budget is not known."""
        if self.budget is None:
            return None
        if self.exact:
            return "fits" if self.peak <= self.budget else "does not fit"
        modelled = verdict_of(self.peak, self.budget)
        return "unsure" if modelled == "fits" and self.compiled.peak > self.budget else modelled


@dataclass(frozen=True)
class Plan:
    experiment: Experiment
    site: Site
    devices: int
    parameters: int
    memory: Memory
    work: Work
    bound: Bound
    run: WholeRun
    checkpoint: Checkpoint
    remedies: tuple[Remedy, ...]
    warnings: tuple[str, ...]

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.site.devices_per_node)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return self.memory.compiled.collectives

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.bound.seconds is None else self.work.tokens / self.bound.seconds

    @property
    def share_of_peak(self) -> float | None:
        """At the bound, of the model's operations."""
        seconds, peak = self.bound.seconds, self.site.chip.bfloat16
        return None if seconds is None or not peak else self.work.model_flops / (seconds * peak * self.devices)


def plan(experiment: Experiment, site: Site, devices: int) -> Plan:
    """Of an experiment whose mesh takes so many devices of the site. Raises UserError where it cannot be compiled."""
    site = as_asked(site, devices)
    _fraction(site)
    sizes = sorted({phase.rows for phase in phases(experiment)})
    ends = sorted({sizes[0], sizes[-1]})  # what lies between follows from them
    request = Request(tuple((experiment, rows) for rows in ends), site.chip.backend, devices, site.devices_per_node)
    compiled = dict(zip(ends, compile_elsewhere(request), strict=True))
    largest = compiled[ends[-1]]
    state = largest.state.total
    bounds = {}
    for rows in sizes:
        work = work_of(experiment, rows, largest.kernel)
        sent = _between(compiled[ends[0]], largest, rows)
        bounds[rows] = bound_of(experiment, work, largest.mesh, site, sent, state)
    memory = memory_of(experiment, site, largest)
    seconds = {rows: bound.seconds for rows, bound in bounds.items()}
    whole_state = state_bytes(experiment, dict.fromkeys(MESH_AXES, 1)).total
    return Plan(
        experiment,
        site,
        devices,
        count(specs(experiment.model)),
        memory,
        work_of(experiment, ends[-1], largest.kernel),
        bounds[ends[-1]],
        whole_run(experiment, seconds, site, devices),
        checkpoint_of(experiment, whole_state, seconds[ends[-1]], site),
        () if memory.verdict != "does not fit" else remedies(experiment, site, memory),
        _warnings(experiment, site, devices),
    )


def _between(smallest: Compiled, largest: Compiled, rows: int) -> tuple[Collective, ...]:
    """What a step with `rows` sends: between those of the smallest and the largest batch, bytes grow in proportion."""
    if rows == largest.rows:
        return largest.collectives
    if rows == smallest.rows:
        return smallest.collectives
    share = (rows - smallest.rows) / (largest.rows - smallest.rows)
    parts = ((smallest.collectives, 1 - share), (largest.collectives, share))
    return tuple(dataclasses.replace(one, operand=one.operand * part) for some, part in parts for one in some)


def memory_of(experiment: Experiment, site: Site, compiled: Compiled) -> Memory:
    """Of a CPU the compiled program's own figures; of a GPU the compiled state with the model's temporaries, because a
    CPU widens bfloat16. What the optimizer's update takes is compiled by itself."""
    modelled = temporaries(experiment, compiled.mesh, compiled.rows, site.chip.backend, compiled.update)
    fraction = _fraction(site)
    budget = None if site.chip.memory is None else fraction * site.chip.memory
    exact = site.chip.backend == "cpu"
    added = compiled.temporaries if exact else modelled.total
    return Memory(compiled, modelled, budget, fraction, compiled.arguments + compiled.results + added, exact)


def _fraction(site: Site) -> float:
    if site.chip.backend == "cpu":
        return 1.0
    stated = site.environment.get(FRACTION_VARIABLE)
    try:
        fraction = MEMORY_FRACTION if stated is None else float(stated)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(
            f"site {site.name}: {FRACTION_VARIABLE}={stated} must be a number above 0 and at most 1, such as 0.9."
        )
    return fraction


def remedies(experiment: Experiment, site: Site, memory: Memory) -> tuple[Remedy, ...]:
    """What would take less, each by itself and then together; the peak is the plan's, less what the model saves."""
    assert memory.budget is not None
    mesh, rows, update = memory.compiled.mesh, memory.compiled.rows, memory.compiled.update
    now = modelled_peak(experiment, mesh, rows, site, update)
    found: list[Remedy] = []

    def consider(what: str, options: str, changed: Experiment, on: Mapping[str, int]) -> None:
        peak = memory.peak + modelled_peak(changed, on, rows, site, update) - now  # an update of no fewer bytes
        found.append(Remedy(what, options, peak, verdict_of(peak, memory.budget)))  # type: ignore[arg-type]

    both, others, options = experiment, dict(mesh), []
    axis = next((name for name in ("data", "replica") if mesh[name] % 2 == 0), None)
    if axis is not None and experiment.model.width % (2 * mesh["fsdp"]) == 0:
        others = {**mesh, axis: mesh[axis] // 2, "fsdp": 2 * mesh["fsdp"]}
        options.append(f"--mesh {','.join(f'{name}={size}' for name, size in others.items() if size > 1)}")
        consider(f"fsdp={others['fsdp']}", options[-1], experiment, others)
    if (frugal := FRUGAL.get(experiment.model.remat)) is not None:
        model = dataclasses.replace(experiment.model, remat=frugal)
        both = dataclasses.replace(both, model=model)
        options.append(f"--model.remat {frugal}")
        consider(f"remat={frugal}", options[-1], dataclasses.replace(experiment, model=model), mesh)
    own = rows // ways(("batch",), mesh, ACTIVATION_AXES) // experiment.accumulate
    more = next((factor for factor in range(2, own + 1) if own % factor == 0), None)
    if more is not None:
        accumulate = experiment.accumulate * more
        consider(
            f"accumulate={accumulate}",
            f"--accumulate {accumulate}",
            dataclasses.replace(experiment, accumulate=accumulate),
            mesh,
        )
        if others == mesh:
            both = dataclasses.replace(both, accumulate=accumulate)
            options.append(f"--accumulate {accumulate}")
    if len(options) > 1:
        consider("these together", " ".join(options), both, others)
    if memory.fraction < (needed := memory.peak / (site.chip.memory or math.inf)) <= MOST_FRACTION:
        setting = f"{FRACTION_VARIABLE}={math.ceil(100 * needed) / 100:g}"
        found.append(Remedy("a larger share of the memory", setting, memory.peak, "unsure"))
    return tuple(found)


def _warnings(experiment: Experiment, site: Site, devices: int) -> tuple[str, ...]:
    nodes = -(-devices // site.devices_per_node)
    found = []
    if site.nodes is not None and nodes > site.nodes:
        found.append(f"{nodes} nodes exceed the {site.nodes} that one job may have on {site.title}")
    if experiment.model.compute != "bfloat16" and site.chip.backend != "cpu":
        found.append(f"products are in {experiment.model.compute}, and the bound takes the chip's peak in bfloat16")
    return tuple(found)


# ------------------------------------------------------------------------------------------- which devices, which mesh


def placed(experiment: Experiment, site: Site, nodes: int | None, devices: int | None, mesh: MeshConfig | None) -> int:
    """The number of devices that is meant: that of the nodes, that asked for, that of a mesh without -1, or one node's.

    Raises UserError where these contradict each other or the site.
    """
    per_node, sizes = site.devices_per_node, dataclasses.astuple(mesh or experiment.mesh)
    if site.name == LOCAL.name:
        if nodes not in (None, 1):
            raise UserError(f"--nodes {nodes}: {site.title.lower()} is one node: say how many with --devices.")
        nodes, per_node = None, max(devices or 1, 1)
    for name, value in (("--nodes", nodes), ("--devices", devices)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be 1 or more.")
    if nodes is not None and devices is not None and nodes * per_node != devices:
        raise UserError(
            f"--nodes {nodes} of {site.title} have {nodes * per_node} devices, and --devices says {devices}: give one."
        )
    if nodes is not None:
        return nodes * per_node
    if devices is not None:
        if devices > per_node and devices % per_node:
            raise UserError(
                f"--devices {devices} do not fill nodes of {per_node} on {site.title}: "
                f"take {devices // per_node * per_node} or {-(-devices // per_node) * per_node}."
            )
        return devices
    return per_node if -1 in sizes else math.prod(sizes)


def as_asked(site: Site, devices: int) -> Site:
    """This computer is one node, of as many devices as are asked for; any other site is as it is."""
    return dataclasses.replace(site, devices_per_node=devices) if site.name == LOCAL.name else site


def mesh_of(text: str) -> MeshConfig:
    """`data=16,fsdp=4`: what is not named takes one device, and `data` takes what is left unless it is named or
    another axis is -1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES:
            raise UserError(f"--mesh {text}: {name!r} is no axis of a mesh: choose from {', '.join(MESH_AXES)}.")
        if name in sizes:
            raise UserError(f"--mesh {text}: {name} is given twice: name each axis once.")
        if not re.fullmatch(r"-1|[0-9]*[1-9][0-9]*", size):
            raise UserError(
                f"--mesh {text}: {name}={size} must be a whole number of devices: 1 or more, or -1 for what is left."
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        named = " and ".join(name for name, size in sizes.items() if size == -1)
        raise UserError(f"--mesh {text}: {named} are both -1: one axis alone can take what is left.")
    return MeshConfig(**({"data": 1} if -1 in sizes.values() else {}) | sizes)


# ------------------------------------------------------------------------------------------------------------ search


@dataclass(frozen=True)
class Ranked:
    candidate: Candidate
    memory: Memory | None  # of those that were compiled
    bound: Bound

    @property
    def peak(self) -> float:
        return self.candidate.peak if self.memory is None else self.memory.peak


def search(experiment: Experiment, site: Site, devices: int) -> tuple[Ranked, ...]:
    """The possible ways to place an experiment, the best few of which are compiled, and ranked by what that says."""
    site = as_asked(site, devices)
    if site.chip.memory is None:
        raise UserError(
            f"--search needs the memory of a device, which is not known of {site.title}: name another site."
        )
    budget = _fraction(site) * site.chip.memory
    kernel, _ = attention_choice(experiment.model, one_device(site.chip.backend))
    found = candidates(experiment, site, devices, kernel, budget)
    if not found:
        raise UserError(
            f"no mesh of {devices} devices divides the model's sizes and batches of {experiment.batch_size} rows: "
            "change the number of devices or the batch size."
        )
    best, rest = found[:COMPILED_OF_SEARCH], found[COMPILED_OF_SEARCH:]
    rows = max(phase.rows for phase in phases(experiment))
    steps = tuple((one.experiment, rows) for one in best)
    ranked = []
    answers = compile_elsewhere(Request(steps, site.chip.backend, devices, site.devices_per_node))
    for one, compiled in zip(best, answers, strict=True):
        memory = memory_of(one.experiment, site, compiled)
        work = work_of(one.experiment, rows, compiled.kernel)
        sent, state = compiled.collectives, compiled.state.total
        ranked.append(Ranked(one, memory, bound_of(one.experiment, work, one.mesh, site, sent, state)))
    order = ("fits", "unsure", "does not fit")
    ranked.sort(key=lambda one: (order.index(one.memory.verdict), one.bound.seconds or math.inf))  # type: ignore
    return (*ranked, *(Ranked(one, None, one.bound) for one in rest))
