"""The sharded train step: one `jit` from (state, batch) to (state, metrics), over whatever mesh the layout has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import MoE, TransformerConfig
from eurollm_jax.model.loss import SourceSums, batch_loss, sum_by_source
from eurollm_jax.model.moe import Routing, auxiliary_loss, rebalanced
from eurollm_jax.model.param import Params, flatten, init
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout


@struct.dataclass
class TrainState:
    step: Int[Any, ""]  # steps done
    params: Params
    optimizer: Any  # optax state
    ema: Params | None = None  # exponential moving average of the parameters, where the run keeps one


class StepMetrics(NamedTuple):
    loss: Float[Array, ""]  # mean nats per predicted token, without z-loss and routers' losses
    grad_norm: Float[Array, ""]  # before clipping
    sources: SourceSums
    routing: Routing | None  # of a mixture of experts


@dataclass(frozen=True)
class Program:
    """The functions of a run, and the shapes and shardings of its state."""

    init: Callable[[PRNGKeyArray], TrainState]
    start: Callable[[Params], TrainState]  # from parameters that are there already; takes over their memory
    train: Any  # jitted (TrainState, Batch) -> (TrainState, StepMetrics); takes over the state's memory
    state: TrainState  # of jax.ShapeDtypeStruct with shardings
    rows: NamedSharding

    def compile_train(
        self, batch_size: int, length: int
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """`train`, compiled ahead of the first batch."""

        def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows)

        tokens, mask = abstract((batch_size, length), jnp.int32), abstract((batch_size, length), jnp.bool_)
        batch = Batch(tokens, tokens, tokens, tokens, mask, source=abstract((batch_size,), jnp.int32))
        return self.train.lower(self.state, batch).compile()


def abstract_params(config: TransformerConfig, layout: Layout) -> Params:
    """Shapes, types and shardings of a model's parameters, as what a checkpoint is restored into."""
    weights = specs(config)
    shardings = layout.parameters(weights)
    return jax.tree.map(lambda spec, at: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=at), weights, shardings)


def build_program(
    config: TransformerConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    batch_sizes: Sequence[int],
    token_bytes: Int[np.ndarray, "V"],
    sources: int,
    z_loss: float,
    ema: float | None = None,
) -> Program:
    """Compiles nothing yet. `batch_sizes` are all that the run will have, over all devices, in rows; `ema` is the share
    that the average of the parameters keeps of itself at each step."""
    ways = layout.ways("batch")
    for size in batch_sizes:
        if size % ways:
            raise UserError(f"a batch of {size} rows does not divide over {ways} devices: use a multiple of {ways}.")
    weights = specs(config)
    moe = config.mlp if isinstance(config.mlp, MoE) else None

    def init_state(key: PRNGKeyArray) -> TrainState:
        params = init(weights, key)
        return start(params)

    def start(params: Params) -> TrainState:
        average = None if ema is None else jax.tree.map(jnp.copy, params)  # the step takes over the memory of both
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    abstract = jax.eval_shape(init_state, jax.random.key(0))
    of_params = layout.parameters(weights)
    sharding = TrainState(
        step=layout.replicated,
        params=of_params,
        optimizer=_like_params(abstract.optimizer, of_params, layout),
        ema=None if ema is None else of_params,
    )

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        predicted = jnp.maximum(jnp.sum(batch.mask), 1)

        def mean_loss(params: Params) -> tuple[Array, tuple[Array, Routing | None]]:
            total, nats, routing = batch_loss(params, batch, config, layout, z_loss)
            mean = total / predicted
            if moe is not None and routing is not None:
                mean += auxiliary_loss(routing, moe)
            return mean, (nats, routing)

        (_, (nats, routing)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        metrics = StepMetrics(
            loss=jnp.sum(nats) / predicted,
            grad_norm=optax.global_norm(gradients),
            sources=sum_by_source(batch, nats, jnp.asarray(token_bytes), sources),
            routing=routing,
        )
        params = optax.apply_updates(state.params, updates)
        if moe is not None and routing is not None:
            params = rebalanced(params, routing, moe)
        average = None if ema is None else optax.incremental_update(params, state.ema, 1 - ema)
        return TrainState(state.step + 1, params, optimizer_state, average), metrics

    return Program(
        init=jax.jit(init_state, out_shardings=sharding),
        start=jax.jit(start, out_shardings=sharding, donate_argnums=0),
        train=jax.jit(
            train,
            in_shardings=(sharding, layout.rows),
            out_shardings=(sharding, layout.replicated),
            donate_argnums=0,
        ),
        state=jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, sharding),
        rows=layout.rows,
    )


def _like_params(optimizer_state: Any, of_params: Any, layout: Layout) -> Any:
    """Shardings of an optimizer's state: what it keeps at the end of a weight's path lives where the weight does."""
    of_path = flatten(of_params)

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
        return next((of_path[suffix] for suffix in suffixes if leaf.ndim and suffix in of_path), layout.replicated)

    return jax.tree_util.tree_map_with_path(sharding, optimizer_state)
