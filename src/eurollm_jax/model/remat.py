"""What the backward pass finds of a layer, and what it computes a second time: `TransformerConfig.remat`, by name.

A policy speaks of values by the names that they are given where they arise, so it stays what it is however the products
around them are computed.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from eurollm_jax.errors import UserError
from eurollm_jax.model.config import Remat
from eurollm_jax.parallel.mesh import Layout

LAYER_INPUT = "layer_input"
ATTENTION = "attention"


def layer_input(x: Array) -> Array:
    """Names what a layer reads of the residual stream."""
    return checkpoint_name(x, LAYER_INPUT)


def of_attention(x: Array) -> Array:
    """Names what attention takes, and what its own backward pass needs beside that: its result and the scores' sums.

    With these kept, attention by blocks is not computed twice (cuDNN's is: what its backward pass needs has no name),
    nor are the projections, unless queries and keys have norms.
    """
    return checkpoint_name(x, ATTENTION)


def rematerialised(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`step`, one layer, so that its backward pass keeps what the policy says."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return step
        case "dots":
            return jax.checkpoint(step, policy=policies.dots_with_no_batch_dims_saveable)
        case "attention":
            return jax.checkpoint(step, policy=policies.save_only_these_names(ATTENTION))
        case "full":
            return jax.checkpoint(step)
        case "offload":
            to_host = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT, ATTENTION],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return jax.checkpoint(step, policy=to_host)


def require_memory(remat: Remat, layout: Layout) -> None:
    """Raises UserError where training would offload and the backend has no other memory."""
    if remat == "offload" and layout.backend == "cpu":
        raise UserError(
            "model: remat='offload' moves what layers keep to the memory of the host, and on a CPU they are there "
            "already: choose remat='attention', which keeps as much, or 'full', which keeps least."
        )
