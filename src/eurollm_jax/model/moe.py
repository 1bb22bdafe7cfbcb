"""Mixture of experts: each token is sent to a few of many MLPs, and none is dropped (Shazeer et al. 2017,
arXiv:1701.06538; without capacities as in MegaBlocks, arXiv:2211.15841).

Tokens are sorted by expert, and each expert's run is padded to whole blocks, so that every product is of one block of
tokens with one expert's matrix: the operations are those of the chosen experts and a little padding, on any backend.
What a block computes on its way is never stored: a layer keeps its rows alone, whatever it recomputes.

Shapes: B batch, T sequence, D embed, E experts, k experts of a token, F hidden of an expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.model.config import Activation, BalanceBias, BalanceLoss, MoE
from eurollm_jax.model.layers import activate, linear
from eurollm_jax.model.param import Param, Params, Specs
from eurollm_jax.parallel.mesh import Layout

LARGEST_BLOCK = 512  # rows of a block: enough for a matrix unit to be busy
SMALLEST_BLOCK = 8


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
    """The sum of the chosen experts' outputs, and how the tokens that are `real` were spread."""
    with jax.named_scope("router"):
        # In whole float32 whatever the rest is: a rounding that swaps two experts is no small error.
        with jax.default_matmul_precision("highest"):
            router_logits = linear(x.astype(jnp.float32), w["router"])
        probability, chosen_BTk, weights_BTk = route(router_logits, w.get("router_bias"), moe)
        routing = _routing(router_logits, probability, chosen_BTk, real, moe)

    with jax.named_scope("experts"):
        rows, hidden = layout.activation(("batch", "sequence", "embed")).spec, layout.activation(("mlp",)).spec[0]
        whole = {"gate": (None, None, hidden), "up": (None, None, hidden), "down": (None, hidden, None)}

        def local(x: Array, chosen: Array, weights: Array, experts: Params) -> Array:
            flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, moe.top_k), weights.reshape(-1, moe.top_k)
            return jax.lax.psum(_experts(*flat, experts, moe).reshape(x.shape), hidden)

        # Each device sorts its own tokens, and has all experts, of whose hidden axis it may hold a part.
        out = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(rows, rows, rows, {name: PartitionSpec(*axes) for name, axes in whole.items()}),
            out_specs=rows,
            check_vma=False,
        )(x, chosen_BTk, weights_BTk, w["experts"])

    if moe.shared:
        with jax.named_scope("shared_expert"):
            shared = w["shared"]
            h = activate(linear(x, shared["gate"]), moe.activation) * linear(x, shared["up"])
            out = out + linear(layout.constrain(h, "batch", "sequence", "mlp"), shared["down"])
    return out, routing


def route(
    router_logits: Float[Array, "... E"], bias: Float[Array, "E"] | None, moe: MoE
) -> tuple[Float[Array, "... E"], Int[Array, "... k"], Float[Array, "... k"]]:
    """Each expert's probability (summing to one), the chosen experts, and the weights of their outputs."""
    if moe.score == "softmax":
        scores = probability = jax.nn.softmax(router_logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(router_logits)
        probability = _shares(scores)
    _, chosen = jax.lax.top_k(scores if bias is None else scores + jax.lax.stop_gradient(bias), moe.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.normalised:
        weights = _shares(weights)
    return probability, chosen, weights * moe.scale


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


def _routing(router_logits: Array, probability: Array, chosen: Array, real: Array, moe: MoE) -> Routing:
    count = jnp.maximum(jnp.sum(real), 1)
    assigned = jnp.sum(jax.nn.one_hot(chosen, moe.experts), axis=-2)
    tokens = jnp.sum(jnp.where(real[..., None], assigned, 0), axis=(0, 1)) / count  # sums to top_k
    mean = jnp.sum(jnp.where(real[..., None], probability, 0), axis=(0, 1)) / count
    log_z = jax.nn.logsumexp(router_logits, axis=-1)
    return Routing(
        load=tokens / moe.top_k,
        balance=moe.experts * jnp.sum(tokens * mean),
        z=jnp.sum(jnp.where(real, jnp.square(log_z), 0)) / count,
    )


def _experts(
    x: Float[Array, "N D"], chosen: Int[Array, "N k"], weights: Float[Array, "N k"], experts: Params, moe: MoE
) -> Float[Array, "N D"]:
    """The weighted sum of each token's experts, added up in float32."""
    tokens, width = x.shape
    place, of_block, block = _places(chosen.reshape(-1), moe.experts)

    def spread(values: Array) -> Array:
        """Each assignment's value in its row, and zeros in the rows between."""
        rows = jnp.zeros((len(of_block) * block, *values.shape[1:]), values.dtype)
        return rows.at[place].set(values, unique_indices=True).reshape(-1, block, *values.shape[1:])

    rows, row_weights = spread(jnp.repeat(x, moe.top_k, axis=0)), spread(weights.reshape(-1))
    out = blockwise(partial(_expert, moe.activation), rows, row_weights, experts, of_block)
    of_assignment = out.reshape(-1, width).at[place].get(unique_indices=True)
    return jnp.sum(of_assignment.reshape(tokens, moe.top_k, width), axis=1, dtype=jnp.float32).astype(x.dtype)


def _places(expert: Int[Array, "A"], experts: int) -> tuple[Int[Array, "A"], Int[Array, "M"], int]:
    """The row of each assignment, the expert of each block of rows, and the size of a block.

    Rows are in the order of the experts. Each expert has whole blocks: the rows that it does not fill stay empty, and
    so do the blocks at the end that no expert needs.
    """
    block = _block_size(len(expert), experts)
    busy = min(experts, len(expert))  # experts that can have an assignment
    blocks = busy + (len(expert) - busy) // block  # as many as there can be

    counts = jnp.bincount(expert, length=experts)
    ends = jnp.cumsum(-(-counts // block) * block)
    moved = jnp.pad(ends - jnp.cumsum(counts), (1, 0))  # by the empty rows of the experts before
    order = jnp.argsort(expert, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(expert)) + moved[expert[order]], unique_indices=True)
    of_block = jnp.searchsorted(ends, jnp.arange(blocks) * block, side="right").clip(max=experts - 1)
    return place, of_block, block


def _block_size(assignments: int, experts: int) -> int:
    """A power of two of at most a quarter of an expert's even share, so that of many rows a fifth at most are empty."""
    quarter = assignments // (4 * experts)
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << max(quarter, 1).bit_length() - 1))


def _expert(
    activation: Activation, x: Float[Array, "R D"], weights: Float[Array, "R"], expert: Params
) -> Float[Array, "R D"]:
    """One expert's output for some tokens, times their weights."""
    hidden = activate(x @ expert["gate"], activation) * (x @ expert["up"])
    return (hidden * weights[:, None]).astype(x.dtype) @ expert["down"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(
    function: Callable[[Array, Array, Params], Array],
    rows: Float[Array, "M R D"],
    weights: Float[Array, "M R"],
    experts: Params,
    of_block: Int[Array, "M"],
) -> Float[Array, "M R D"]:
    """`function` of each block of rows, their weights and their expert's matrices, block after block.

    The backward pass computes each block again, so what lies between a block's products is never kept. It adds the
    gradient of the matrices up in place, in float32: left to JAX, each block would add a whole tree of zeros to it.
    """

    def one(part: tuple[Array, Array, Array]) -> Array:
        return function(part[0], part[1], jax.tree.map(lambda w: w[part[2]], experts))

    return jax.lax.map(one, (rows, weights, of_block))


def _blockwise_forward(function: Any, *given: Any) -> tuple[Array, Any]:
    return blockwise(function, *given), given


def _blockwise_backward(function: Any, given: Any, d_out: Array) -> tuple[Array, Array, Params, None]:
    rows, weights, experts, of_block = given

    def one(d_experts: Params, part: tuple[Array, ...]) -> tuple[Params, tuple[Array, Array]]:
        rows, weights, at, d_out = part
        _, pull = jax.vjp(function, rows, weights, jax.tree.map(lambda w: w[at], experts))
        d_rows, d_weights, d_expert = pull(d_out)
        return jax.tree.map(lambda total, d_w: total.at[at].add(d_w), d_experts, d_expert), (d_rows, d_weights)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
    d_experts, (d_rows, d_weights) = jax.lax.scan(one, zeros, (rows, weights, of_block, d_out))
    return d_rows, d_weights, jax.tree.map(lambda d_w, w: d_w.astype(w.dtype), d_experts, experts), None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)
