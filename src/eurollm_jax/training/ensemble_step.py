"""The train step of many small models at once: one program whose arrays have a leading axis, a place for each model.

Each model, a member, has parameters, optimizer state and rows of its own, and nothing of one reaches another: the step
is `vmap` of the step of one run, inside a `shard_map` that gives every device whole members. A program is compiled once
for all of them, and small products of several models keep a device busier than those of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from eurollm_jax.data.batch import Batch
from eurollm_jax.evaluation.perplexity import Measure
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.loss import batch_loss, sum_by_source
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.gradient import COPIES
from eurollm_jax.training.optimizer import Adafactor, AdamW, AdEMAMix, Lion, Muon
from eurollm_jax.training.schedule import WSD, Constant, Cosine, Linear
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.step import StepFunctions, TrainState, step_functions

MEMBERS = PartitionSpec(COPIES)  # of arrays whose first axis is the members: where a run would have copies of its model


@dataclass(frozen=True)
class EnsembleProgram:
    """The functions of an ensemble of K members, and the shapes and shardings of its state. All that a run has of one
    model has a leading axis of K here."""

    init: Callable[[PRNGKeyArray], TrainState]  # from K keys
    train: Any  # jitted (TrainState, Batch) -> (TrainState, StepMetrics); takes over the state's memory
    measure: Measure  # (parameters of all members, a batch without the axis) -> sums of each member
    state: TrainState  # of jax.ShapeDtypeStruct with shardings
    layout: Layout

    def place(self, tree: Any) -> Any:
        """Numpy arrays whose first axis is the members, each on its member's device."""
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.layout.mesh, MEMBERS)), tree)

    def replicate(self, tree: Any) -> Any:
        """Numpy arrays that all members read."""
        return jax.tree.map(lambda x: jax.device_put(x, self.layout.replicated), tree)

    def compile_train(self, batch_size: int, length: int) -> Any:
        """`train`, compiled ahead of the first batch, whose members have `batch_size` rows each."""
        members, at = self.state.step.shape[0], NamedSharding(self.layout.mesh, MEMBERS)

        def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((members, *shape), dtype, sharding=at)

        tokens, mask = abstract((batch_size, length), jnp.int32), abstract((batch_size, length), jnp.bool_)
        batch = Batch(tokens, tokens, tokens, tokens, mask, source=abstract((batch_size,), jnp.int32))
        return self.train.lower(self.state, batch).compile()


def layout_of(members: int, devices: Sequence[jax.Device]) -> Layout:
    """Deals members out evenly, over as many of the devices as their number divides by."""
    used = max(count for count in range(1, len(devices) + 1) if members % count == 0)
    return Layout(MeshConfig(data=used).build(devices[:used]))


def build_ensemble(
    config: TransformerConfig,
    layout: Layout,
    optimizer: AdamW | Muon | AdEMAMix | Lion | Adafactor,
    schedules: Sequence[WSD | Cosine | Linear | Constant],
    *,
    steps: int,
    token_bytes: Int[np.ndarray, "V"],
    sources: int,
    heldout_sources: int,
    z_loss: float,
    ema: float | None = None,
    skip: SkipStep | None = None,
) -> EnsembleProgram:
    """Compiles nothing yet. There is a schedule, for runs of `steps`, for each member; the rest is the same for all, as
    in `build_program`. `heldout_sources` are those that held-out batches number."""
    mesh, members = layout.mesh, len(schedules)
    different = list(dict.fromkeys(schedules))
    rates = [schedule.build(steps) for schedule in different]
    schedule_of = jnp.array([different.index(schedule) for schedule in schedules], jnp.int32)

    def of_one(which: Int[Array, ""] | None = None) -> StepFunctions:
        def rate(step: Any) -> Any:
            return rates[0](step) if which is None else jnp.stack([rate(step) for rate in rates])[which]

        return step_functions(
            config,
            layout.inside(),
            optimizer.build(rates[0] if len(rates) == 1 else rate, specs(config)),
            token_bytes=token_bytes,
            sources=sources,
            z_loss=z_loss,
            ema=ema,
            skip=skip,
        )

    def on_each_device(function: Any, *shared: bool) -> Any:
        """The function over the members of a device; which arguments all of them share is said one by one."""
        inside = jax.vmap(function, in_axes=tuple(None if of_all else 0 for of_all in shared))
        specs = tuple(PartitionSpec() if of_all else MEMBERS for of_all in shared)
        return jax.shard_map(
            inside, mesh=mesh, in_specs=specs, out_specs=MEMBERS, axis_names=set(COPIES), check_vma=False
        )

    def train(state: TrainState, batch: Batch) -> Any:
        step = on_each_device(lambda state, batch, which: of_one(which).train(state, batch), False, False, False)
        return step(state, batch, schedule_of)

    def measure_one(params: Any, batch: Batch) -> Any:
        _, nats, _ = batch_loss(params, batch, config, layout.inside())
        return sum_by_source(batch, nats, jnp.asarray(token_bytes), heldout_sources)

    init = jax.jit(on_each_device(lambda key: of_one().init(key), False))
    at = NamedSharding(mesh, MEMBERS)
    abstract = jax.eval_shape(init, jax.random.split(jax.random.key(0), members))
    return EnsembleProgram(
        init=init,
        train=jax.jit(train, donate_argnums=0),
        measure=jax.jit(on_each_device(measure_one, False, True)),
        state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract),
        layout=layout,
    )
