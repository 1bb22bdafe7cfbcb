"""The bytes that a device holds in a train step: what is exact by the shapes alone, and a model of what the step adds.

Parameters and optimizer state have their shapes, so their part is exact. What layers keep for the backward pass is read
off the derivative as JAX traces it, under the policy of rematerialisation, in the types of the site: XLA on a CPU
widens bfloat16, and its own figure for temporaries is then another. How the rest adds up to a peak is a model
(`temporaries`), which docs/plan.md compares with compiled and with measured programs.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, MoE, TransformerConfig, Ungated
from eurollm_jax.model.loss import LOGITS_AT_ONCE, LOGITS_AT_ONCE_ELSEWHERE
from eurollm_jax.model.moe import block_size
from eurollm_jax.model.param import Param, flatten, owner
from eurollm_jax.model.transformer import forward, specs
from eurollm_jax.parallel.mesh import ACTIVATION_AXES, PARAMETER_AXES, Backend, Layout, MeshConfig
from eurollm_jax.training.optimizer import Adafactor, Lion, Muon
from eurollm_jax.training.step import TrainState, step_functions

type Mesh = Mapping[str, int]  # devices along each axis, none of them -1

# Of a layer that is computed again, with its gradients, in its own bytes; from programs of one H100 (docs/plan.md).
REPEATED = 1.6
PRODUCTS = 6  # of Muon, as large as the weights that it multiplies, that are there at once
BATCH_BYTES = 4 * 4 + 1  # of a token: its id, target, segment and position, and whether it counts


@dataclass(frozen=True)
class State:
    """Bytes of the state, of one device or of all together."""

    parameters: int
    optimizer: int
    average: int  # of the parameters, where a run keeps one
    other: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.average + self.other


@dataclass(frozen=True)
class Temporaries:
    """A model of what a step holds beside state and batch at its fullest moment; bytes of one device."""

    gradients: float
    activations: float  # that layers keep for the backward pass
    working: float  # of the layer, the part of the logits or the optimizer's update that is being computed

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.working


def ways(axes: tuple[str, ...], mesh: Mesh, table: Mapping[str, Any] = PARAMETER_AXES) -> int:
    """Into how many parts an array with these logical axes is split."""
    named = [table[axis] for axis in axes]
    names = [name for entry in named for name in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(mesh[name] for name in names)


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes and types of all that a run carries from step to step."""
    model = dataclasses.replace(experiment.model, remat="none", attention_kernel="auto")
    return _abstract_state(dataclasses.replace(experiment, model=model, mesh=MeshConfig(), accumulate=1))


@lru_cache(maxsize=8)
def _abstract_state(experiment: Experiment) -> TrainState:
    weights = specs(experiment.model)
    functions = step_functions(
        experiment.model,
        one_device("cpu"),
        experiment.optimizer.build(experiment.schedule.build(experiment.steps), weights),
        token_bytes=np.ones(1, np.int32),
        sources=1,
        z_loss=experiment.z_loss,
        ema=experiment.ema,
        skip=experiment.skip,
    )
    state: TrainState = jax.eval_shape(functions.init, jax.random.key(0))
    return state


def one_device(backend: Backend) -> Layout:
    return Layout(MeshConfig().build(jax.devices("cpu")[:1]), lowered_for=backend)


def state_bytes(experiment: Experiment, mesh: Mesh) -> State:
    """Of one device, by the closed form: each leaf is split as the weight that it belongs to, and is whole on each
    device where it belongs to none. A mesh of ones gives the bytes of all, which is what a checkpoint holds."""
    state, weights = abstract_state(experiment), flatten(specs(experiment.model))

    def of(tree: Any) -> int:
        def part(path: tuple[Any, ...], leaf: Any) -> int:
            weight = owner(path, weights) if leaf.ndim else None
            split = 1 if weight is None else ways(weights[weight].axes, mesh)
            return leaf.size * leaf.dtype.itemsize // split

        return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(part, tree)))

    return State(of(state.params), of(state.optimizer), of(state.ema), of((state.step, state.skips)))


def batch_bytes(rows: int, length: int, mesh: Mesh) -> int:
    """Of one device."""
    own = rows // ways(("batch",), mesh, ACTIVATION_AXES)
    return own * (length * BATCH_BYTES + 4)


# ------------------------------------------------------------------------------------------------- what layers keep


@dataclass(frozen=True)
class Kept:
    """Bytes that the layers of one row keep for the backward pass, by how a mesh splits them."""

    stream: float  # the residual stream and what norms keep: split along the sequence
    gathered: float  # inputs of products, whole along the tensor axis
    heads: float  # what has an axis of heads or of the MLP: split over the tensor axis
    routed: float  # what experts take of tokens: there again for each other device along the expert axis
    weights: float  # copies of weights in the type of the products, of all rows together: split as the weights are
    experts: float  # such copies of experts

    def on(self, mesh: Mesh, rows: float) -> float:
        context, tensor, expert = mesh["context"], mesh["tensor"], mesh["expert"]
        a_row = self.stream / (context * tensor) + self.gathered / context + self.heads / (context * tensor)
        copies = (self.weights + self.experts / expert) / (mesh["fsdp"] * tensor)
        return rows * (a_row + (expert - 1) * self.routed / context) + copies


@lru_cache(maxsize=32)
def kept_by_layers(model: TransformerConfig, length: int, backend: Backend) -> Kept:
    """What the backward pass of `forward` is given, for one row, as JAX traces it."""
    model = dataclasses.replace(model, attention_kernel=_traceable(model))
    here, longer = _residuals(model, length, backend), _residuals(model, length + 512, backend)
    wider = _residuals(_wider(model), length, backend)
    sums = {"stream": 0.0, "gathered": 0.0, "heads": 0.0, "routed": 0.0, "weights": 0.0, "experts": 0.0}
    weights = flatten(specs(model))
    given = {spec.size for spec in weights.values()} if model.remat != "none" else set()
    experts = {spec.shape[1:] for path, spec in weights.items() if "/experts/" in path}
    if isinstance(model.mlp, MoE) and model.remat == "none":
        a_token = model.width * jnp.dtype(model.compute).itemsize + 8 * model.mlp.top_k  # itself, weights, places
        sums["routed"] = model.depth * length * a_token
    for leaf, long, wide in zip(here, longer, wider, strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if leaf.size == long.size:
            group = "experts" if leaf.shape[1:] in experts else "weights"
            sums[group] += 0 if leaf.dtype == jnp.float32 and leaf.size in given else size
        elif leaf.size != wide.size:
            sums["heads"] += size
        elif model.remat in ("none", "dots") and leaf.dtype != jnp.float32:
            sums["gathered"] += size
        else:
            sums["stream"] += size
    return Kept(**sums)


def _traceable(model: TransformerConfig) -> Any:
    return model.attention_kernel if model.attention_kernel == "reference" else "blockwise"


def _wider(model: TransformerConfig) -> TransformerConfig:
    """With twice the heads and twice the MLP: what grows by it has such an axis."""
    mlp: Gated | Ungated | MoE = dataclasses.replace(model.mlp, hidden=2 * model.mlp.hidden)
    return dataclasses.replace(model, heads=2 * model.heads, kv_heads=2 * model.kv_heads, mlp=mlp)


def _residuals(model: TransformerConfig, length: int, backend: Backend) -> list[Any]:
    layout = one_device(backend)
    model = dataclasses.replace(model, max_positions=max(length, model.max_positions))
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs(model))

    def pullback(params: Any, tokens: Any, segments: Any, positions: Any) -> Any:
        return jax.vjp(lambda params: forward(params, tokens, segments, positions, model, layout)[0], params)[1]

    leaves: list[Any] = jax.tree.leaves(jax.eval_shape(pullback, params, row, row, row))
    return leaves


# ------------------------------------------------------------------------------------------------------- the peak


def temporaries(experiment: Experiment, mesh: Mesh, rows: int, backend: Backend, update: float = 0.0) -> Temporaries:
    """What a step with batches of `rows` holds beside state and batch, at the fullest of three moments: while the loss
    and its gradient are made, when all activations are there; in the backward pass through a layer, when the gradients
    are there, too; and in the optimizer's update, which takes `update` bytes beside the gradients."""
    model, length = experiment.model, experiment.data.sequence_length
    width = jnp.dtype(model.compute).itemsize
    micro = rows / ways(("batch",), mesh, ACTIVATION_AXES) / experiment.accumulate
    kept = kept_by_layers(model, length, backend)
    activations = 0.0 if model.remat == "offload" else kept.on(mesh, micro)
    parameters = state_bytes(experiment, mesh).parameters
    sums = parameters if experiment.accumulate > 1 else 0
    layer = _one_layer(model, length, mesh, micro, width, backend)
    tokens = micro * length / mesh["context"]
    vocabulary = model.vocab_size / mesh["tensor"]
    at_once = min(tokens * vocabulary, LOGITS_AT_ONCE.get(backend, LOGITS_AT_ONCE_ELSEWHERE))
    head = model.width * vocabulary
    loss = at_once * (4 + width) + head * (width + 4) + tokens * model.width * 3 * width
    if experiment.accumulate > 1 and mesh["fsdp"] > 1:
        layer += head * width  # gathered once, before the first micro-batch
    moments = (
        Temporaries(parameters + sums, activations, layer),
        Temporaries(sums, activations, loss),
        Temporaries(parameters, 0.0, update),
    )
    return max(moments, key=lambda moment: moment.total)


def _one_layer(model: TransformerConfig, length: int, mesh: Mesh, rows: float, width: int, backend: Backend) -> float:
    """What the backward pass of one layer makes: what the layer would keep without rematerialisation, where it has it,
    with the gradients beside it; its weights gathered and in the type of the products, and their gradients before they
    are dealt out."""
    alone = dataclasses.replace(model, depth=len(model.pattern), remat="none")
    traced = dataclasses.replace(kept_by_layers(alone, length, backend), routed=0.0)  # counted in _experts_at_work
    kept = traced.on(mesh, rows) / len(model.pattern)
    layer = flatten(specs(model)["layers"])  # type: ignore[arg-type]
    weights = sum(_gathered(spec, mesh) for spec in layer.values()) / model.depth
    again = 0.0 if model.remat == "none" else REPEATED * kept
    of_round = 4 * weights * (len(model.pattern) - 1)  # gradients of a round's other layers, before they are dealt out
    at_work = _experts_at_work(model, mesh, rows * length / mesh["context"], width)
    return again + weights * (width + 4) + of_round + at_work


def _experts_at_work(model: TransformerConfig, mesh: Mesh, tokens: float, width: int) -> float:
    """What the loop of model/moe.py over the blocks of a layer takes beside the experts' matrices and the sums of their
    gradients, for `tokens` of one device: the tokens of all devices along `expert`, the gradient of what is added to
    them, their own in float32; of each choice its weight, that one's gradient, its expert and its place in the order;
    and one block with its expert."""
    if not isinstance(model.mlp, MoE):
        return 0.0
    moe, hidden = model.mlp, model.mlp.hidden / mesh["tensor"]
    routed = tokens * mesh["expert"]
    of_tokens = routed * (model.width * (2 * width + 4) + moe.top_k * 4 * 4)
    block = block_size(int(routed * moe.top_k), moe.experts)
    of_block = (block * (2 * model.width + 3 * hidden) + 3 * model.width * hidden) * width
    return of_tokens + of_block


def modelled_update(experiment: Experiment, mesh: Mesh) -> float:
    """What the optimizer's update takes of one device beside the gradients, for a mesh on which it is not compiled.

    There are the clipped gradients, and of Adafactor the directions before they are clipped; where moments are kept in
    bfloat16, each of them in float32 with the random bits that round it; and what Muon multiplies, all layers' weights
    of one kind at a time. The numbers in it are those of updates compiled on a CPU, as is the plan's own figure.
    """
    optimizer, state = experiment.optimizer, state_bytes(experiment, mesh)
    weights = flatten(specs(experiment.model)).values()
    if isinstance(optimizer, Adafactor):
        return 2.0 * state.parameters
    if optimizer.state_dtype == "bfloat16":
        taken = 1.5 * state.parameters + 4.3 * state.optimizer
    else:
        one_more = max(4 * spec.size / ways(spec.axes, mesh) for spec in weights) if isinstance(optimizer, Lion) else 0
        taken = state.parameters + one_more
    if isinstance(optimizer, Muon):
        matrices = [spec for spec in weights if spec.fan_in and "vocab" not in spec.axes]
        whole = (spec.size if "experts" in spec.axes else _gathered(spec, mesh) for spec in matrices)
        taken += PRODUCTS * 4 * max(whole)
    return taken


def _gathered(spec: Param, mesh: Mesh) -> float:
    """The elements of a weight on a device that has gathered what `fsdp` splits."""
    return spec.size / ways(spec.axes, {**mesh, "fsdp": 1})
