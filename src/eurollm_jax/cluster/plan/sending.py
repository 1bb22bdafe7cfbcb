"""A model of what a step sends along each axis of a mesh, for the many meshes that a search does not compile.

It counts what grows with the model: weights gathered and gradients added up, and the activations of each layer. The
compiled step has more, norms and metrics among them; tests compare the two.
"""

import math

from eurollm_jax.cluster.plan.collectives import Collective
from eurollm_jax.cluster.plan.memory import Mesh, state_bytes, ways
from eurollm_jax.cluster.site import Site
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import MoE
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import ACTIVATION_AXES, MESH_AXES


def modelled_collectives(experiment: Experiment, mesh: Mesh, rows: int, site: Site) -> tuple[Collective, ...]:
    """By mesh axis."""
    return tuple(
        one
        for one in (
            *_of_weights(experiment, mesh, site),
            *_of_activations(experiment, mesh, rows, site),
        )
        if one.devices > 1
    )


def _of_weights(experiment: Experiment, mesh: Mesh, site: Site) -> list[Collective]:
    """Over `fsdp` weights are gathered for the forward and for the backward pass of each micro-batch, the head once a
    step, and gradients are added up; over `context` and `expert` gradients are added up in each; over the copies
    once."""
    model, fsdp = experiment.model, mesh["fsdp"]
    width = 2 if model.compute == "bfloat16" else 4
    weights = {path: spec for path, spec in flatten(specs(model)).items() if spec.fan_in}
    layers = sum(spec.size / ways(spec.axes, mesh) for path, spec in weights.items() if path.startswith("layers/"))
    head = weights["embedding" if model.tied else "head"]
    own_head = head.size / ways(head.axes, mesh)
    times = experiment.accumulate
    found = [
        _along("fsdp", mesh, site, "all-gather", layers * width, 2 * times),
        _along("fsdp", mesh, site, "all-gather", own_head * width, 1),
        _along("fsdp", mesh, site, "reduce-scatter", layers * fsdp * width, times),
        _along("fsdp", mesh, site, "reduce-scatter", own_head * fsdp * 4, times),
    ]
    for axis in ("context", "expert"):  # whose devices have the same weights and other tokens
        shared = [spec for spec in weights.values() if axis == "context" or "experts" not in spec.axes]
        gradients = sum(spec.size / ways(spec.axes, mesh) for spec in shared) * width
        found.append(_along(axis, mesh, site, "all-reduce", gradients, times))
    own = state_bytes(experiment, mesh).parameters
    copies = ("replica", "data")
    if (group := math.prod(mesh[axis] for axis in copies)) > 1:
        stride = math.prod(mesh[axis] for axis in MESH_AXES if axis not in copies)
        nodes = _spanned(group, stride, site.devices_per_node)
        names = tuple(axis for axis in copies if mesh[axis] > 1)
        found.append(Collective("all-reduce", names, group, nodes, "f32", own, 1))
    return found


def _of_activations(experiment: Experiment, mesh: Mesh, rows: int, site: Site) -> list[Collective]:
    """Over `tensor` the residual stream is gathered before each half of a layer and dealt out after it, and backward so
    is its gradient, after what the backward pass repeats of the layer; embedding and loss do each once in both. Over
    `context` keys and values are gathered; over `expert` the tokens."""
    model = experiment.model
    width, name = (2, "bf16") if model.compute == "bfloat16" else (4, "f32")
    parts = ways(("batch",), mesh, ACTIVATION_AXES) * mesh["context"] * experiment.accumulate
    tokens = rows * experiment.data.sequence_length / parts
    stream, times = tokens * model.width * width, model.depth * experiment.accumulate
    repeated, once = model.remat != "none", 2 * experiment.accumulate
    own, keys = stream / mesh["tensor"], 2 * tokens * model.kv_heads / mesh["tensor"] * model.head_dim * width
    found = [
        _along("tensor", mesh, site, "all-gather", own, times * (6 if repeated else 4) + once, name),
        _along("tensor", mesh, site, "reduce-scatter", stream, times * (5 if repeated else 4) + once, name),
        _along("context", mesh, site, "all-gather", keys, times * (2 if model.remat == "full" else 1), name),
        _along("context", mesh, site, "reduce-scatter", keys * mesh["context"], times, name),
        _along("fsdp", mesh, site, "all-to-all", own, once, name),
    ]
    if isinstance(model.mlp, MoE):
        again = times * (3 if repeated else 2)
        found += [
            _along("expert", mesh, site, "all-gather", stream, again, name),
            _along("expert", mesh, site, "reduce-scatter", stream * mesh["expert"], 2 * times, name),
        ]
        if model.mlp.shared:  # beside the experts, it gathers and deals out for itself
            found += [
                _along("tensor", mesh, site, "all-gather", own, again, name),
                _along("tensor", mesh, site, "reduce-scatter", stream, 2 * times, name),
            ]
    return found


def _along(axis: str, mesh: Mesh, site: Site, kind: str, operand: float, times: int, dtype: str = "bf16") -> Collective:
    stride = math.prod(mesh[faster] for faster in MESH_AXES[MESH_AXES.index(axis) + 1 :])
    return Collective(
        kind, (axis,), mesh[axis], _spanned(mesh[axis], stride, site.devices_per_node), dtype, operand, times
    )


def _spanned(devices: int, stride: int, per_node: int) -> int:
    """Nodes of a group of so many devices that stand `stride` apart."""
    return min(devices, -(-devices * stride // per_node))
