"""Which mesh and which rematerialisation an experiment could take on a machine: all that are possible, ranked by bound.

Every product of the axes that the model, the batch and the nodes allow is modelled; the first few are then compiled.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from eurollm_jax.cluster.plan.memory import Mesh, batch_bytes, modelled_update, state_bytes, temporaries
from eurollm_jax.cluster.plan.sending import modelled_collectives
from eurollm_jax.cluster.plan.work import Bound, Work, bound_of, work_of
from eurollm_jax.cluster.site import Site
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import BalanceLoss, MoE, Remat
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import ACTIVATION_AXES, MESH_AXES, PARAMETER_AXES, MeshConfig

REMATS: tuple[Remat, ...] = tuple(get_args(Remat.__value__))
MOST_CONTEXT = 16  # more ways for one row than a device's memory has asked for yet


@dataclass(frozen=True)
class Candidate:
    """One way to place an experiment, as the model sees it; bytes are those of one device."""

    experiment: Experiment  # with the mesh, remat and accumulate that are meant
    mesh: dict[str, int]
    peak: float
    work: Work
    bound: Bound


def candidates(experiment: Experiment, site: Site, devices: int, kernel: str, budget: float) -> list[Candidate]:
    """All that fit into `budget` bytes, the fastest by its bound first; where none does, those that come nearest."""
    rows = max(experiment.batch_sizes.until(experiment.total_rows).sizes)
    found = []
    for mesh in meshes(experiment, site, devices):
        for remat in REMATS[:-1]:  # to offload costs time that is not modelled
            model = dataclasses.replace(experiment.model, remat=remat)
            placed = dataclasses.replace(experiment, model=model, mesh=MeshConfig(**mesh))
            found.append(_least_accumulated(placed, mesh, rows, site, kernel, budget))
    fitting = [one for one in found if one.peak <= budget]
    if not fitting:
        return sorted(found, key=lambda one: one.peak)
    return sorted(fitting, key=lambda one: (one.bound.seconds or math.inf, _sent(one), one.peak))


def _sent(one: Candidate) -> float:
    return max(one.bound.network or 0.0, one.bound.links or 0.0)


def meshes(experiment: Experiment, site: Site, devices: int) -> Iterator[dict[str, int]]:
    """The meshes of so many devices that the model's sizes and the batch divide by, with `tensor` inside a node."""
    model, length = experiment.model, experiment.data.sequence_length
    experts = model.mlp.experts if isinstance(model.mlp, MoE) else 1
    for tensor in _divisors(math.gcd(site.devices_per_node, devices)):
        for context in _divisors(devices // tensor):
            if context > MOST_CONTEXT or length % (context * tensor):
                continue
            for expert in _divisors(math.gcd(devices // tensor // context, experts)):
                for fsdp in _divisors(devices // tensor // context // expert):
                    data = devices // tensor // context // expert // fsdp
                    sizes = (1, data, fsdp, expert, context, tensor)
                    mesh = dict(zip(MESH_AXES, sizes, strict=True))
                    if _divides(experiment, mesh):
                        yield mesh


def _divides(experiment: Experiment, mesh: Mesh) -> bool:
    """Whether each axis of each weight, and each batch, falls into equal parts."""
    for spec in flatten(specs(experiment.model)).values():
        for axis, size in spec.sizes.items():
            named = PARAMETER_AXES[axis]
            if isinstance(named, str) and size % mesh[named]:
                return False
    parts = math.prod(mesh[name] for name in ACTIVATION_AXES["batch"] or ())
    return all(rows % parts == 0 for rows in experiment.batch_sizes.until(experiment.total_rows).sizes)


def _least_accumulated(
    experiment: Experiment, mesh: dict[str, int], rows: int, site: Site, kernel: str, budget: float
) -> Candidate:
    """With as few micro-batches as fit; a balance loss depends on them, so then with the experiment's own."""
    parts = math.prod(mesh[name] for name in ACTIVATION_AXES["batch"] or ())
    moe = experiment.model.mlp
    own = math.gcd(*(size // parts for size in experiment.batch_sizes.until(experiment.total_rows).sizes))
    fixed = isinstance(moe, MoE) and isinstance(moe.balance, BalanceLoss)
    counts = [experiment.accumulate] if fixed and own % experiment.accumulate == 0 else _divisors(own)
    for accumulate in counts:
        placed = dataclasses.replace(experiment, accumulate=accumulate)
        peak = modelled_peak(placed, mesh, rows, site)
        if peak <= budget:
            break
    work = work_of(placed, rows, kernel)
    sent = modelled_collectives(placed, mesh, rows, site)
    state = state_bytes(placed, mesh)
    return Candidate(placed, mesh, peak, work, bound_of(placed, work, mesh, site, sent, state.total))


def modelled_peak(experiment: Experiment, mesh: Mesh, rows: int, site: Site, update: float | None = None) -> float:
    """State, batch and temporaries of one device; what the optimizer's update takes is modelled unless it is given."""
    taken = modelled_update(experiment, mesh) if update is None else update
    added = temporaries(experiment, mesh, rows, site.chip.backend, taken).total
    return state_bytes(experiment, mesh).total + batch_bytes(rows, experiment.data.sequence_length, mesh) + added


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
