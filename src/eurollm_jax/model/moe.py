"""Mixture of experts: each token is sent to a few of many MLPs, and none is dropped (Shazeer et al. 2017,
arXiv:1701.06538; without capacities as in MegaBlocks, arXiv:2211.15841).

Tokens are sorted by expert, and each expert's run is cut into blocks, so that every product is of one block of tokens
with one expert's matrix: the operations are those of the chosen experts and a little padding, on any backend. A block's
tokens are gathered as its turn comes, and its results added to theirs, so that nothing is stored once for each choice.

Shapes: B batch, T sequence, D embed, E experts, k experts of a token, F hidden of an expert.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.model.config import Activation, BalanceBias, BalanceLoss, MoE
from eurollm_jax.model.layers import activate, linear
from eurollm_jax.model.param import Param, Params, Specs
from eurollm_jax.model.projections import GATHERED, RESIDUAL, addition, projections
from eurollm_jax.parallel.mesh import Layout

LARGEST_BLOCK = 512  # rows of a block: enough for a matrix unit to be busy
SMALLEST_BLOCK = 8
MATRICES = {  # of the experts, and their axes
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


class Routing(NamedTuple):
    """How the tokens of a batch were spread over the experts; padding is not counted. One value for each layer."""

    load: Float[Array, "L E"]  # share of the assignments that each expert got
    balance: Float[Array, "L"]  # experts * sum over experts of (share of tokens * mean probability); top_k where even
    z: Float[Array, "L"]  # mean of logsumexp(logits)^2


def moe_specs(width: int, moe: MoE, residual: float) -> Specs:
    """The weights of one layer's router and experts; `residual` scales the start of what the layer adds."""
    experts: dict[str, Any] = dict(experts=moe.experts)
    tree: dict[str, Param | Specs] = dict(
        router=Param(embed=width, experts=moe.experts, fan_in="embed"),
        experts=dict(
            gate=Param(**experts, embed=width, mlp=moe.hidden, fan_in="embed"),
            up=Param(**experts, embed=width, mlp=moe.hidden, fan_in="embed"),
            down=Param(**experts, mlp=moe.hidden, embed=width, fan_in="mlp", scale=residual),
        ),
    )
    if isinstance(moe.balance, BalanceBias):
        tree["router_bias"] = Param(experts=moe.experts, start=0.0)
    if moe.shared:
        tree["shared"] = dict(
            gate=Param(embed=width, mlp=moe.shared, fan_in="embed"),
            up=Param(embed=width, mlp=moe.shared, fan_in="embed"),
            down=Param(mlp=moe.shared, embed=width, fan_in="mlp", scale=residual),
        )
    return tree


def mixture_of_experts(
    x: Float[Array, "B T D"], w: Params, real: Bool[Array, "B T"], moe: MoE, layout: Layout
) -> tuple[Float[Array, "B T D"], Routing]:
    """The sum of the chosen experts' outputs, and how the tokens that are `real` were spread. `x` and the sum have the
    axes `RESIDUAL`."""
    with jax.named_scope("router"):
        # In whole float32 whatever the rest is: a rounding that swaps two experts is no small error.
        with jax.default_matmul_precision("highest"):
            apart = layout.ways("residual_sequence") > 1
            router_logits = linear(x.astype(jnp.float32), w["router"], apart=apart)
        probability, chosen_BTk, weights_BTk = route(router_logits, w.get("router_bias"), moe, layout)
        routing = _routing(router_logits, probability, chosen_BTk, real, moe, layout)

    with jax.named_scope("experts"):
        out = _on_all_devices(x, chosen_BTk, weights_BTk, w["experts"], moe, layout)

    if moe.shared:
        with jax.named_scope("shared_expert"):
            gate, up = projections(x, w["shared"], ("gate", "up"), layout)
            h = layout.constrain(activate(gate, moe.activation) * up, "batch", "sequence", "mlp")
            out = out + addition(h, w["shared"], "down", layout)
    return out, routing


def route(
    router_logits: Float[Array, "B T E"], bias: Float[Array, "E"] | None, moe: MoE, layout: Layout
) -> tuple[Float[Array, "B T E"], Int[Array, "B T k"], Float[Array, "B T k"]]:
    """Each expert's probability (summing to one), the chosen experts, and the weights of their outputs."""
    if moe.score == "softmax":
        scores = probability = jax.nn.softmax(router_logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(router_logits)
        probability = _shares(scores)
    chosen = _highest(jax.lax.stop_gradient(scores if bias is None else scores + bias), moe.top_k, layout)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.normalised:
        weights = _shares(weights)
    return probability, chosen, weights * moe.scale


def _highest(scores: Float[Array, "B T E"], count: int, layout: Layout) -> Int[Array, "B T k"]:
    """The experts with a token's highest scores, of equal ones the first first.

    Each device looks at its own tokens: the compiler does not split `top_k`, and would gather the scores of all.
    """
    rows = layout.activation(RESIDUAL[:2], scores.shape[:2]).spec

    def local(scores: Array) -> Array:
        return jax.lax.top_k(scores, count)[1]

    return jax.shard_map(local, mesh=layout.mesh, in_specs=rows, out_specs=rows, check_vma=False)(scores)


def _shares(scores: Array) -> Array:
    """Of their sum, which sigmoids can bring to zero."""
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-12)


def auxiliary_loss(routing: Routing, moe: MoE) -> Float[Array, ""]:
    """What the router adds to the mean loss of a token: the mean over the layers."""
    balance = moe.balance.weight * jnp.mean(routing.balance) if isinstance(moe.balance, BalanceLoss) else 0.0
    return balance + moe.z_loss * jnp.mean(routing.z)


def rebalanced(params: Params, routing: Routing, moe: MoE) -> Params:
    """The parameters with each expert's bias moved by one step towards an even load; no gradient reaches it."""
    if not isinstance(moe.balance, BalanceBias):
        return params
    bias = params["layers"]["router_bias"] + moe.balance.rate * jnp.sign(1 / moe.experts - routing.load)
    return params | {"layers": params["layers"] | {"router_bias": bias}}


def _routing(router_logits: Array, probability: Array, chosen: Array, real: Array, moe: MoE, layout: Layout) -> Routing:
    count = jnp.maximum(jax.lax.psum(jnp.sum(real), layout.apart), 1)
    assigned = jnp.sum(jax.nn.one_hot(chosen, moe.experts), axis=-2)
    tokens = jnp.sum(jnp.where(real[..., None], assigned, 0), axis=(0, 1)) / count  # sums to top_k
    mean = jnp.sum(jnp.where(real[..., None], probability, 0), axis=(0, 1)) / count
    log_z = jax.nn.logsumexp(router_logits, axis=-1)
    return Routing(
        load=tokens / moe.top_k,
        balance=moe.experts * jnp.sum(jax.lax.stop_gradient(jax.lax.psum(tokens, layout.apart)) * mean),
        z=jnp.sum(jnp.where(real, jnp.square(log_z), 0)) / count,
    )


def _on_all_devices(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    experts: Params,
    moe: MoE,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts.

    Devices along the mesh axis `expert` gather each other's tokens, each computes what its own experts add to them, and
    the sums go back to where the tokens came from: whatever the routers choose, nothing is dropped, and a device takes
    as many blocks as its experts were sent. Of the experts' hidden axis a device may hold a part, and then of the
    sequence, too, which is gathered and dealt out again; what it holds of their `embed` axis is gathered where it is
    multiplied.
    """
    rows, gathered = (layout.activation(axes, x.shape).spec for axes in (RESIDUAL, GATHERED))
    in_parts = layout.splitting(rows[1]) != layout.splitting(gathered[1])
    held = {name: layout.parameter(axes).spec for name, axes in MATRICES.items()}
    own, embed, hidden = held["up"]

    def local(x: Array, chosen: Array, weights: Array, experts: Params) -> Array:
        if in_parts:
            given = x, chosen, weights
            x, chosen, weights = (jax.lax.all_gather(part, hidden, axis=1, tiled=True) for part in given)
        flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, moe.top_k), weights.reshape(-1, moe.top_k)
        flat = jax.tree.map(lambda part: jax.lax.all_gather(part, own, tiled=True), flat)
        first = jax.lax.axis_index(own) * len(experts["up"])
        out = _experts(flat, experts, first, moe, layout.splitting(embed))
        out = jax.lax.psum_scatter(out, own, tiled=True).reshape(x.shape)
        if in_parts:
            return jax.lax.psum_scatter(out, hidden, scatter_dimension=1, tiled=True)
        return jax.lax.psum(out, hidden)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(rows, rows, rows, held),
        out_specs=rows,
        check_vma=False,
    )(x, chosen, weights, experts)


class Blocks(NamedTuple):
    """Which assignments each block of rows takes, and of which expert. A assignments are numbered token after token."""

    order: Int[Array, "A+R"]  # assignments by expert, those of other devices' experts last
    start: Int[Array, "M"]  # of each block in that order
    filled: Int[Array, "M"]  # rows that the block has; the rest belong to another
    expert: Int[Array, "M"]
    used: Int[Array, ""]  # blocks that there are; those after them are empty

    def rows(self, block: Array, size: int, shape: tuple[int, ...]) -> tuple[Int[Array, "R"], Int[Array, "R"]]:
        """The assignments of a block, of `shape` [tokens, k], and their tokens; past the end where a row is empty."""
        row = jnp.arange(size)
        assignment = jax.lax.dynamic_slice_in_dim(self.order, self.start[block], size)
        tokens, top_k = shape
        own = row < self.filled[block]
        return jnp.where(own, assignment, tokens * top_k + row), jnp.where(own, assignment // top_k, tokens + row)


def _experts(
    routed: tuple[Float[Array, "N D"], Int[Array, "N k"], Float[Array, "N k"]],
    experts: Params,
    first: Int[Array, ""],
    moe: MoE,
    split: tuple[str, ...],
) -> Float[Array, "N D"]:
    """What some of the experts, numbered from `first`, add to each token.

    `routed` are tokens, the experts chosen for them, and the weights of those; along the mesh axes `split` other
    devices have the rest of the matrices' `embed` axis."""
    x, chosen, weights = routed
    here = len(experts["up"])
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < here), local, here)
    block = block_size(len(local), moe.experts)
    return _blockwise(x, weights, experts, _blocks(local, here, block), _Options(moe.activation, block, split))


def _blocks(expert: Int[Array, "A"], experts: int, size: int) -> Blocks:
    """Whole blocks of `size` rows for each of the experts 0, 1, ...; other numbers are left out."""
    busy = min(experts, len(expert))  # experts that can have an assignment
    most = busy + (len(expert) - busy) // size
    counts = jnp.bincount(expert, length=experts + 1)[:experts]
    ends = jnp.cumsum(-(-counts // size))
    block = jnp.arange(most)
    of_block = jnp.searchsorted(ends, block, side="right").clip(max=experts - 1)
    before = (block - (ends - -(-counts // size))[of_block]) * size  # rows of the expert's blocks before this one
    return Blocks(
        order=jnp.pad(jnp.argsort(expert, stable=True), (0, size)),
        start=(jnp.cumsum(counts) - counts)[of_block] + before,
        filled=counts[of_block] - before,
        expert=of_block,
        used=ends[-1],
    )


def block_size(assignments: int, experts: int) -> int:
    """A power of two of at most a quarter of an expert's even share, so that of many rows a fifth at most are empty."""
    quarter = assignments // (4 * experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << max(quarter, 1).bit_length() - 1))


def _expert(
    activation: Activation, x: Float[Array, "R D"], weights: Float[Array, "R"], expert: Params
) -> Float[Array, "R D"]:
    """One expert's output for some tokens, times their weights."""
    hidden = activate(x @ expert["gate"], activation) * (x @ expert["up"])
    return (hidden * weights[:, None]).astype(x.dtype) @ expert["down"]


@dataclass(frozen=True)
class _Options:
    activation: Activation
    block: int  # rows
    split: tuple[str, ...]  # mesh axes along which the matrices' `embed` axis is split


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(
    x: Float[Array, "N D"], weights: Float[Array, "N k"], experts: Params, blocks: Blocks, options: _Options
) -> Float[Array, "N D"]:
    """The sum of the experts' outputs, block after block, in float32, and then rounded.

    The backward pass computes each block again, so what lies between a block's products is never kept, and it gathers
    the matrices again. It adds their gradient up in place, in float32: left to JAX, each block would add a whole tree
    of zeros to it. Between devices it is added up in the type of the products, as that of any other matrix is.
    """
    experts = _gathered(experts, options)

    def one(block: Array, out: Array) -> Array:
        slot, token = blocks.rows(block, options.block, weights.shape)
        return _add(out, token, _expert(options.activation, *_take(block, slot, token, x, weights, experts, blocks)))

    return jax.lax.fori_loop(0, blocks.used, one, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _blockwise_forward(
    x: Array, weights: Array, experts: Params, blocks: Blocks, options: _Options
) -> tuple[Array, Any]:
    return _blockwise(x, weights, experts, blocks, options), (x, weights, experts, blocks)


def _blockwise_backward(options: _Options, given: Any, d_out: Array) -> tuple[Any, ...]:
    x, weights, experts, blocks = given
    experts = _gathered(experts, options)

    def one(block: Array, sums: tuple[Array, Array, Params]) -> tuple[Array, Array, Params]:
        d_x, d_weights, d_experts = sums
        slot, token = blocks.rows(block, options.block, weights.shape)
        taken = _take(block, slot, token, x, weights, experts, blocks)
        _, pull = jax.vjp(partial(_expert, options.activation), *taken)
        d_rows, d_row_weights, d_expert = pull(_get(d_out, token))
        d_experts = jax.tree.map(lambda sum_, d_w: sum_.at[blocks.expert[block]].add(d_w), d_experts, d_expert)
        return _add(d_x, token, d_rows), _add(d_weights, slot, d_row_weights), d_experts

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (x, weights.reshape(-1), experts))
    d_x, d_weights, d_experts = jax.lax.fori_loop(0, blocks.used, one, zeros)
    d_given = d_x, d_weights.reshape(weights.shape), d_experts
    d_x, d_weights, d_experts = jax.tree.map(lambda d_w, w: d_w.astype(w.dtype), d_given, (x, weights, experts))
    return d_x, d_weights, _scattered(d_experts, options), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _gathered(experts: Params, options: _Options) -> Params:
    """The matrices with the whole of their `embed` axis."""
    return {
        name: jax.lax.all_gather(w, options.split, axis=MATRICES[name].index("embed"), tiled=True)
        for name, w in experts.items()
    }


def _scattered(d_experts: Params, options: _Options) -> Params:
    """The reverse: each device's part of that axis, summed over the devices."""
    return {
        name: jax.lax.psum_scatter(d_w, options.split, scatter_dimension=MATRICES[name].index("embed"), tiled=True)
        for name, d_w in d_experts.items()
    }


def _take(
    block: Array, slot: Array, token: Array, x: Array, weights: Array, experts: Params, blocks: Blocks
) -> tuple[Array, Array, Params]:
    """A block's rows, their weights, and its expert's matrices."""
    expert = jax.tree.map(lambda w: w[blocks.expert[block]], experts)
    return _get(x, token), _get(weights.reshape(-1), slot), expert


def _get(values: Array, index: Array) -> Array:
    """Zeros where the index is past the end."""
    return values.at[index].get(mode="fill", fill_value=0, unique_indices=True)


def _add(sums: Array, index: Array, values: Array) -> Array:
    """Nothing where the index is past the end."""
    return sums.at[index].add(values.astype(sums.dtype), mode="drop", unique_indices=True)
