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
from eurollm_jax.model.loss import SourceSums, sum_by_source
from eurollm_jax.model.moe import Routing, rebalanced
from eurollm_jax.model.param import Params, flatten, init, owner
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.training.gradient import mean_gradient
from eurollm_jax.training.skipping import Skips, SkipStep, left_alone, no_skips


@struct.dataclass
class TrainState:
    step: Int[Any, ""]  # steps done
    params: Params
    optimizer: Any  # optax state
    skips: Skips
    ema: Params | None = None  # exponential moving average of the parameters, where the run keeps one


class StepMetrics(NamedTuple):
    loss: Float[Array, ""]  # mean nats per predicted token, without z-loss and routers' losses
    grad_norm: Float[Array, ""]  # before clipping
    sources: SourceSums
    routing: Routing | None  # of a mixture of experts
    skipped: Int[Array, ""]  # steps in a row that were skipped, up to this one; 0 where it was taken


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


@dataclass(frozen=True)
class StepFunctions:
    """What a run computes, before it is compiled: pure functions of arrays."""

    init: Callable[[PRNGKeyArray], TrainState]
    start: Callable[[Params], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def step_functions(
    config: TransformerConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    *,
    token_bytes: Int[np.ndarray, "V"],
    sources: int,
    z_loss: float,
    ema: float | None = None,
    accumulate: int = 1,
    skip: SkipStep | None = None,
) -> StepFunctions:
    """The arguments are those of `build_program`."""
    weights = specs(config)
    moe = config.mlp if isinstance(config.mlp, MoE) else None

    def init_state(key: PRNGKeyArray) -> TrainState:
        return start(init(weights, key))

    def start(params: Params) -> TrainState:
        average = None if ema is None else jax.tree.map(jnp.copy, params)  # the step takes over the memory of both
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), no_skips(), average)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        gradients, nats, routing = mean_gradient(
            state.params, batch, config, layout, z_loss=z_loss, accumulate=accumulate
        )
        loss, norm = jnp.sum(nats) / jnp.maximum(jnp.sum(batch.mask), 1), optax.global_norm(gradients)

        def taken() -> tuple[Params, Any, Params | None]:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            if moe is not None and routing is not None:
                params = rebalanced(params, routing, moe)
            average = None if ema is None else optax.incremental_update(params, state.ema, 1 - ema)
            return params, optimizer_state, average

        if skip is None:
            skips, (params, optimizer_state, average) = state.skips, taken()
        else:
            # A branch, not a choice between both results, for which the state would be there twice.
            take, skips = skip.judge(loss, norm, state.skips)
            left = state.params, left_alone(state.optimizer), state.ema
            params, optimizer_state, average = jax.lax.cond(take, taken, lambda: left)
        sources_sums = sum_by_source(batch, nats, jnp.asarray(token_bytes), sources)
        metrics = StepMetrics(loss, norm, sources_sums, routing, skips.in_a_row)
        return TrainState(state.step + 1, params, optimizer_state, skips, average), metrics

    return StepFunctions(init_state, start, train)


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
    length: int | None = None,
    accumulate: int = 1,
    skip: SkipStep | None = None,
) -> Program:
    """Compiles nothing yet. `batch_sizes` are all that the run will have, over all devices, in rows of `length` tokens,
    which are checked against the mesh; `ema` is the share that the average of the parameters keeps of itself at each
    step; a batch is read in `accumulate` micro-batches."""
    layout.require_batches(batch_sizes, length)
    _require_micro_batches(batch_sizes, layout.ways("batch"), accumulate)
    weights = specs(config)
    functions = step_functions(
        config,
        layout,
        optimizer,
        token_bytes=token_bytes,
        sources=sources,
        z_loss=z_loss,
        ema=ema,
        accumulate=accumulate,
        skip=skip,
    )
    abstract = jax.eval_shape(functions.init, jax.random.key(0))
    of_params = layout.parameters(weights)
    sharding = TrainState(
        step=layout.replicated,
        params=of_params,
        optimizer=_like_params(abstract.optimizer, of_params, layout),
        skips=jax.tree.map(lambda _: layout.replicated, abstract.skips),
        ema=None if ema is None else of_params,
    )
    return Program(
        init=jax.jit(functions.init, out_shardings=sharding),
        start=jax.jit(functions.start, out_shardings=sharding, donate_argnums=0),
        train=jax.jit(
            functions.train,
            in_shardings=(sharding, layout.rows),
            out_shardings=(sharding, layout.replicated),
            donate_argnums=0,
        ),
        state=jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, sharding),
        rows=layout.rows,
    )


def _require_micro_batches(sizes: Sequence[int], ways: int, accumulate: int) -> None:
    for size in sizes:
        if below := size % (unit := ways * accumulate):
            nearest = " or ".join(str(rows) for rows in (size - below, size - below + unit) if rows)
            fitting = max(n for n in range(1, accumulate + 1) if size // ways % n == 0)
            raise UserError(
                f"a batch of {size} rows does not divide into {accumulate} micro-batches over {ways} devices: "
                f"use {nearest} rows, or accumulate={fitting}."
            )


def _like_params(optimizer_state: Any, of_params: Any, layout: Layout) -> Any:
    """Shardings of an optimizer's state: what it keeps at the end of a weight's path lives where the weight does."""
    of_path = flatten(of_params)

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        weight = owner(path, of_path)
        return of_path[weight] if leaf.ndim and weight is not None else layout.replicated

    return jax.tree_util.tree_map_with_path(sharding, optimizer_state)
