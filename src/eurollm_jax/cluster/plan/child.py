"""Compiles train steps for devices that are not here: a process with as many CPU devices as the machine has.

The number of devices is fixed when JAX starts, so each plan has a process of its own. Nothing is allocated: the step is
compiled from shapes, and its memory and its collectives are read off the result.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from eurollm_jax.cluster.plan.collectives import Collective, Machine, collectives
from eurollm_jax.cluster.plan.hlo import parse
from eurollm_jax.cluster.plan.memory import State
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.attention import attention_choice
from eurollm_jax.model.config import AttentionKernel, TransformerConfig
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Backend, Layout
from eurollm_jax.training.step import Program, build_program

SOURCES = 64  # that the metrics count apart, where the stores are not here; a few bytes each

QUICK = "--xla_backend_optimization_level=0"  # machine code that never runs need not be fast
ROUNDED = "--xla_allow_excess_precision=false"  # where bfloat16 was widened stays to be seen


@dataclass(frozen=True)
class Request:
    """Steps to compile, each an experiment at one of its batch sizes."""

    steps: tuple[tuple[Experiment, int], ...]
    backend: Backend
    devices: int
    devices_per_node: int


@dataclass(frozen=True)
class Compiled:
    """What a compiled step says of itself; bytes are those of one device."""

    mesh: dict[str, int]
    rows: int
    state: State
    batch: int
    arguments: int  # state and batch, as compiled
    temporaries: int
    update: int  # temporaries of the optimizer's update alone
    results: int  # that take memory of their own, beside the state's
    collectives: tuple[Collective, ...]
    kernel: str
    kernel_reason: str
    compiled_kernel: str
    compiled_remat: str
    seconds: float

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.results


def compile_elsewhere(request: Request) -> tuple[Compiled, ...]:
    """The steps, compiled in a process that has so many devices. Raises the UserError that it ended with."""
    rounded = () if request.backend == "cpu" else (ROUNDED,)
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_COMPILATION_CACHE="false",
        XLA_FLAGS=" ".join((f"--xla_force_host_platform_device_count={request.devices}", QUICK, *rounded)),
    )
    with tempfile.TemporaryDirectory(prefix="eurollm-plan-") as folder:
        asked, answered = Path(folder, "request"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps(request))
        program = "import sys; from eurollm_jax.cluster.plan.child import main; main(*sys.argv[1:])"
        command = (sys.executable, "-c", program, str(asked), str(answered))
        status = subprocess.run(command, env=environment, check=False).returncode
        if not answered.exists():
            raise UserError(
                f"the process that compiles for {request.devices} devices ended with status {status}: what it wrote "
                "above says why; where it was killed, this computer has too little memory for it."
            )
        answer = pickle.loads(answered.read_bytes())
    if isinstance(answer, UserError):
        raise answer
    result: tuple[Compiled, ...] = answer
    return result


def main(asked: str, answered: str) -> None:
    """Reads a Request, writes what `compiled` makes of it, or the UserError that keeps it from being compiled."""
    request: Request = pickle.loads(Path(asked).read_bytes())
    answer: Any
    try:
        answer = tuple(compiled(*step, request.backend, request.devices_per_node) for step in request.steps)
    except UserError as error:
        answer = error
    Path(answered).write_bytes(pickle.dumps(answer))


def compiled(experiment: Experiment, rows: int, backend: Backend, devices_per_node: int) -> Compiled:
    """The experiment's step with batches of `rows`, on as many of this process's devices as its mesh has."""
    began = time.perf_counter()
    layout = Layout(experiment.mesh.build(), lowered_for=backend)
    require_memory(experiment.model.remat, layout)
    kernel, reason = attention_choice(experiment.model, layout)
    model = on_cpu(experiment.model, kernel)
    program = program_of(dataclasses.replace(experiment, model=model), layout)
    step: Any = program.compile_train(rows, experiment.data.sequence_length)
    memory = step.memory_analysis()
    mesh = dict(layout.mesh.shape)
    module = parse(step.as_text())
    state = state_of(program)
    return Compiled(
        mesh,
        rows,
        state,
        memory.argument_size_in_bytes - state.total,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        update_temporaries(experiment, program),
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives(module, Machine(mesh, devices_per_node), for_gpu=backend != "cpu"),
        kernel,
        reason,
        model.attention_kernel,
        model.remat,
        time.perf_counter() - began,
    )


def on_cpu(model: TransformerConfig, kernel: str) -> TransformerConfig:
    """The model with what a CPU can compile: kernels of GPUs become attention by blocks, which keeps as much, and what
    is offloaded stays where it is."""
    remat = "attention" if model.remat == "offload" else model.remat
    by_xla: AttentionKernel = "reference" if kernel == "reference" else "blockwise"
    return dataclasses.replace(model, attention_kernel=by_xla, remat=remat)


def program_of(experiment: Experiment, layout: Layout) -> Program:
    """The program that a run of the experiment has, but for the tokenizer and the stores, which need not be here."""
    return build_program(
        experiment.model,
        layout,
        experiment.optimizer.build(experiment.schedule.build(experiment.steps), specs(experiment.model)),
        batch_sizes=experiment.batch_sizes.until(experiment.total_rows).sizes,
        token_bytes=np.ones(experiment.model.vocab_size, np.int32),
        sources=SOURCES,
        z_loss=experiment.z_loss,
        ema=experiment.ema,
        length=experiment.data.sequence_length,
        accumulate=experiment.accumulate,
        skip=experiment.skip,
    )


def update_temporaries(experiment: Experiment, program: Program) -> int:
    """Bytes of one device that the optimizer's update takes beside parameters, state and gradients. Its arrays are
    float32 but for moments kept in bfloat16, and no product of it is in bfloat16, so a CPU widens nothing. Gradients
    stay while it lasts, as they do in a step that may be left out."""
    optimizer = experiment.optimizer.build(experiment.schedule.build(experiment.steps), specs(experiment.model))

    def update(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = program.state.params, program.state.optimizer
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step: Any = jax.jit(update, out_shardings=shardings, donate_argnums=(0, 1)).lower(params, state, params)
    return int(step.compile().memory_analysis().temp_size_in_bytes)


def state_of(program: Program) -> State:
    """Bytes of one device by the shardings that the step is compiled with."""

    def of(tree: Any) -> int:
        leaves: Sequence[Any] = jax.tree.leaves(tree)
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)

    state = program.state
    return State(of(state.params), of(state.optimizer), of(state.ema), of((state.step, state.skips)))
