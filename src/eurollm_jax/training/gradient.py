"""The gradient of a batch's mean loss: of the whole batch at once, or of one micro-batch after the other.

Accumulated, it is the same sum in another order. Each device keeps the rows that it was dealt: a micro-batch takes some
of every device's. The copies of the model (mesh axes `replica` and `data`) add their gradients up once, after the last
micro-batch, however many there are; what `fsdp` splits is gathered and added up in each, for the gradient of a whole
model would not fit beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import MoE, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.moe import Routing, auxiliary_loss
from eurollm_jax.model.param import Params
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout

COPIES = ("replica", "data")  # mesh axes along which each device has the same parameters


def mean_gradient(
    params: Params, batch: Batch, config: TransformerConfig, layout: Layout, *, z_loss: float, accumulate: int
) -> tuple[Params, Float[Array, "B T"], Routing | None]:
    """The gradient of the loss per predicted token, the nats of each position, and how tokens were routed.

    The mean is over all that the batch predicts, so micro-batches count by what they predict. What routers add counts
    by their tokens: loads and the z-loss are those of the batch, and the balance loss the mean of the micro-batches'.
    """
    moe = config.mlp if isinstance(config.mlp, MoE) else None
    predicted, real = jnp.maximum(jnp.sum(batch.mask), 1), jnp.maximum(jnp.sum(batch.segments > 0), 1)

    def gradient(
        params: Params, rows: Batch, predicted: Array, real: Array, layout: Layout, apart: tuple[str, ...] = ()
    ) -> tuple[Params, tuple[Array, Routing | None]]:
        """What some rows add."""

        def share(params: Params) -> tuple[Array, tuple[Array, Routing | None]]:
            total, nats, routing = batch_loss(params, rows, config, layout, z_loss)
            loss = total / predicted
            if moe is not None and routing is not None:
                tokens = jax.lax.psum(jnp.sum(rows.segments > 0), apart) / real
                routing = jax.tree.map(lambda mean: mean * tokens, routing)
                loss += auxiliary_loss(routing, moe)
            return loss, (nats, routing)

        return jax.grad(share, has_aux=True)(params)

    if accumulate == 1:
        whole, (nats, routing) = gradient(params, batch, predicted, real, layout)
        return whole, nats, routing

    copies = COPIES if layout.splitting(COPIES) else ()

    def of_copy(params: Params, batch: Batch, predicted: Array, real: Array) -> tuple[Any, Array]:
        """Of the rows that one copy of the model has, added up over the copies."""
        inner = layout.inside(copies) if copies else layout
        ways, of_params = inner.ways("batch"), inner.parameters(specs(config))

        def split(x: Array) -> Array:  # [B, ...] -> [micro-batches, B / micro-batches, ...]
            parts = jnp.moveaxis(x.reshape(ways, accumulate, -1, *x.shape[1:]), 1, 0)
            return _dealt(parts, inner).reshape(accumulate, -1, *x.shape[1:])

        def join(x: Array) -> Array:
            parts = _dealt(x.reshape(accumulate, ways, -1, *x.shape[2:]), inner)
            return jnp.moveaxis(parts, 0, 1).reshape(-1, *x.shape[2:])

        def add(sums: Any, rows: Batch) -> tuple[Any, Array]:
            slope, (nats, routing) = gradient(params, rows, predicted, real, inner, copies)
            slope = jax.lax.with_sharding_constraint(slope, of_params)
            return jax.tree.map(jnp.add, sums, (slope, routing)), nats

        zeros = jax.tree.map(jnp.zeros_like, params), _no_routing(config)
        sums, nats = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
        return jax.lax.psum(sums, copies), join(nats)

    if not copies:  # the compiler refuses a `shard_map` over axes of one device around a model that is split
        (slope, routing), nats = of_copy(params, batch, predicted, real)
        return slope, nats, routing
    everywhere, of_copies = PartitionSpec(), PartitionSpec(COPIES)
    in_copies = jax.shard_map(
        of_copy,
        mesh=layout.mesh,
        in_specs=(everywhere, of_copies, everywhere, everywhere),
        out_specs=(everywhere, of_copies),
        axis_names=set(COPIES),
        check_vma=False,
    )
    (slope, routing), nats = in_copies(params, batch, predicted, real)
    return slope, nats, routing


def _dealt(x: Float[Array, "M P ..."], layout: Layout) -> Array:
    """Micro-batches whose second axis is the parts of a batch that devices hold."""
    rows = PartitionSpec(None, *layout.rows.spec)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, rows))


def _no_routing(config: TransformerConfig) -> Routing | None:
    if not isinstance(config.mlp, MoE):
        return None
    of_layer = jnp.zeros(config.depth, jnp.float32)
    return Routing(jnp.zeros((config.depth, config.mlp.experts), jnp.float32), of_layer, of_layer)
