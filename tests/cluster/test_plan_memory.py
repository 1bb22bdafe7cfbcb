"""A plan's bytes against the compiled step of a run, against closed forms, and against what a process takes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.cluster.plan.child import Request, compile_elsewhere, program_of, update_temporaries
from eurollm_jax.cluster.plan.memory import (
    _experts_at_work,
    kept_by_layers,
    modelled_update,
    one_device,
    state_bytes,
    temporaries,
)
from eurollm_jax.cluster.plan.search import modelled_peak
from eurollm_jax.cluster.site import Site
from eurollm_jax.model.config import Gated, MoE
from eurollm_jax.model.moe import mixture_of_experts, moe_specs
from eurollm_jax.model.param import count, flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.hardware import Chip
from eurollm_jax.parallel.mesh import MESH_AXES, Layout, MeshConfig
from eurollm_jax.training.optimizer import Adafactor, AdamW, Lion, Muon
from eurollm_jax.training.step import build_program
from tests.cluster.plans import MIXED, experiment, with_model

FIVE = {
    "data": experiment(mesh=MeshConfig(data=8)),
    "fsdp": with_model(experiment(mesh=MeshConfig(data=1, fsdp=8), ema=0.99), remat="full"),
    "tensor": with_model(experiment(mesh=MeshConfig(data=2, tensor=4), optimizer=Muon()), remat="attention"),
    "fsdp and tensor": with_model(
        experiment(mesh=MeshConfig(data=2, fsdp=2, tensor=2), accumulate=2), attention_kernel="blockwise", remat="dots"
    ),
    "experts": experiment(MIXED, mesh=MeshConfig(data=1, expert=2, context=2, fsdp=2), optimizer=Lion()),
}


@pytest.fixture(scope="module")
def planned():
    request = Request(tuple((one, one.batch_size) for one in FIVE.values()), "cpu", 8, 4)
    return dict(zip(FIVE, compile_elsewhere(request), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_bytes_are_those_of_the_step_that_a_run_compiles(name, planned):
    one = FIVE[name]
    layout = Layout(one.mesh.build())
    program = build_program(
        one.model,
        layout,
        one.optimizer.build(one.schedule.build(one.steps), specs(one.model)),
        batch_sizes=one.batch_sizes.sizes,
        token_bytes=np.arange(one.model.vocab_size, dtype=np.int32),
        sources=5,
        z_loss=one.z_loss,
        ema=one.ema,
        length=one.data.sequence_length,
        accumulate=one.accumulate,
        skip=one.skip,
    )
    memory = program.compile_train(one.batch_size, one.data.sequence_length).memory_analysis()
    plan = planned[name]
    assert plan.arguments == pytest.approx(memory.argument_size_in_bytes, rel=0.02)
    assert plan.temporaries == pytest.approx(memory.temp_size_in_bytes, rel=0.02)
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert plan.peak == pytest.approx(taken, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE)
def test_state_has_the_bytes_of_the_closed_form(name, planned):
    one, plan = FIVE[name], planned[name]
    assert state_bytes(one, plan.mesh) == plan.state
    own = one.mesh
    weights = flatten(specs(one.model))
    fsdp = {"layers": 1, "embed": own.fsdp, "heads": own.tensor, "kv_heads": own.tensor, "mlp": own.tensor}
    fsdp |= {"vocab": own.tensor, "experts": own.expert, "head_dim": 1, "slope": 1}
    of_weights = sum(4 * spec.size // math.prod(fsdp[axis] for axis in spec.axes) for spec in weights.values())
    assert plan.state.parameters == of_weights
    moments = {"AdamW": 2, "Lion": 1}.get(type(one.optimizer).__name__)
    if moments is not None:
        assert plan.state.optimizer == pytest.approx(moments * of_weights, abs=16)
    assert plan.state.average == (of_weights if one.ema else 0)


def test_all_devices_together_hold_one_checkpoint():
    one = FIVE["data"]
    whole = state_bytes(one, dict.fromkeys(("replica", "data", "fsdp", "expert", "context", "tensor"), 1))
    parameters = count(specs(one.model))
    assert whole.parameters == 4 * parameters
    assert whole.optimizer == pytest.approx(8 * parameters, abs=16)


def test_what_layers_keep_has_its_closed_form():
    c = with_model(experiment(), remat="full", compute="bfloat16", attention_kernel="blockwise").model
    kept = kept_by_layers(c, 64, "cuda")
    deeper = kept_by_layers(with_model(experiment(c), depth=2 * c.depth).model, 64, "cuda")
    assert deeper.stream - kept.stream == c.depth * 64 * c.width * 2  # beside tables and the last norm
    attention = kept_by_layers(with_model(experiment(c), remat="attention").model, 64, "cuda")
    heads = c.depth * 64 * ((2 * c.heads + 2 * c.kv_heads) * c.head_dim * 2 + 4 * c.heads)
    assert attention.heads - kept.heads == pytest.approx(heads, rel=0.01)
    nothing = kept_by_layers(with_model(experiment(c), remat="none").model, 64, "cuda")
    assert nothing.on(_MESH, 1) > kept_by_layers(with_model(experiment(c), remat="dots").model, 64, "cuda").on(_MESH, 1)


_MESH = dict.fromkeys(("replica", "data", "fsdp", "expert", "context", "tensor"), 1)


GROWTH = """
import json, sys, pickle
import jax, numpy as np
from eurollm_jax.cluster.plan.child import compiled, program_of
from eurollm_jax.data.batch import Batch
from eurollm_jax.parallel.mesh import Layout

def read(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

one = pickle.loads(open(sys.argv[1], "rb").read())
plan = compiled(one, one.batch_size, "cpu", 8)
layout = Layout(one.mesh.build())
program = program_of(one, layout)
length = one.data.sequence_length
step = program.compile_train(one.batch_size, length)
shape = one.batch_size, length
tokens = np.random.default_rng(0).integers(0, one.model.vocab_size, shape).astype(np.int32)
whole = np.ones(shape, np.int32)
places = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
batch = layout.place_rows(Batch(tokens, tokens, whole, places, whole > 0, np.zeros(len(tokens), np.int32)))
before = read("VmRSS:")
state = jax.tree.map(
    lambda leaf: jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda at, leaf=leaf: np.full(
            leaf.sharding.shard_shape(leaf.shape), 1e-3 if leaf.dtype == np.float32 else 0, leaf.dtype)),
    program.state,
)
for _ in range(2):
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
print(json.dumps({"growth": read("VmHWM:") - before, "predicted": 8 * (plan.peak - plan.batch)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "remat"), [(MeshConfig(data=2, fsdp=4), "full"), (MeshConfig(data=1, fsdp=4, tensor=2), "none")], ids=str
)
def test_the_predicted_peak_is_what_a_process_grows_by(mesh, remat, tmp_path):
    import pickle

    one = experiment(length=512, rows=16, mesh=mesh)
    one = with_model(one, vocab_size=8000, width=768, heads=12, kv_heads=4, head_dim=64, depth=6, remat=remat)
    one = with_model(one, mlp=Gated(2048), attention_kernel="blockwise")
    asked = Path(tmp_path, "experiment")
    asked.write_bytes(pickle.dumps(dataclasses.replace(one)))
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    process = subprocess.run(
        [sys.executable, "-c", GROWTH, str(asked)], env=environment, capture_output=True, text=True, check=True
    )
    measured = json.loads(process.stdout.splitlines()[-1])
    assert measured["growth"] > 1 << 30
    assert measured["predicted"] == pytest.approx(measured["growth"], rel=0.15)


def test_the_head_stays_gathered_from_one_micro_batch_to_the_next():
    one = with_model(experiment(rows=512), compute="bfloat16", remat="full", attention_kernel="blockwise")
    twice = dataclasses.replace(one, accumulate=2)

    def working(planned, rows, **mesh):
        return temporaries(planned, {**_MESH, **mesh}, rows, "cuda").working

    head = 2 * one.model.width * one.model.vocab_size
    assert working(twice, 512, fsdp=8) - working(one, 256, fsdp=8) == head
    assert working(twice, 512, data=8) == working(one, 256, data=8)


@pytest.mark.parametrize(("optimizer", "least"), [(AdamW(), 1.0), (Muon(), 2.5)], ids=["AdamW", "Muon"])
def test_the_update_is_the_fullest_moment_of_a_step_with_few_tokens(optimizer, least):
    """AdamW has its clipped gradients beside the gradients; Muon products of all weights of a kind, too."""
    one = experiment(optimizer=optimizer, length=16, rows=1)
    one = with_model(one, remat="full", depth=8, width=256, mlp=dataclasses.replace(one.model.mlp, hidden=1024))
    program = program_of(one, one_device("cpu"))
    step = program.compile_train(1, 16).memory_analysis()
    parameters, update = 4 * count(specs(one.model)), update_temporaries(one, program)
    assert update >= least * parameters
    assert parameters + update == pytest.approx(step.temp_size_in_bytes, rel=0.08)


def test_the_update_is_a_moment_of_its_own():
    one = experiment()
    parameters = 4 * count(specs(one.model))
    before = temporaries(one, _MESH, 16, "cuda")
    assert temporaries(one, _MESH, 16, "cuda", update=before.total - parameters - 1) == before
    fuller = temporaries(one, _MESH, 16, "cuda", update=2 * before.total)
    assert fuller.total == parameters + 2 * before.total


def test_temporaries_follow_the_batch_and_the_policy():
    mesh = {**_MESH, "data": 8}
    base = with_model(experiment(mesh=MeshConfig(data=8), rows=64), compute="bfloat16", remat="none")

    def total(one):
        return temporaries(one, mesh, one.batch_size, "cuda").activations

    assert total(with_model(base, remat="full")) < total(with_model(base, remat="attention")) < total(base)
    half = temporaries(base, mesh, 32, "cuda").activations
    assert half < total(base) < 2.01 * half


# ----------------------------------------------------------------------------------- experts, and an update's model

OF_LAYER = {  # mesh, experts, rows of 512 tokens
    "tokens of four devices": (MeshConfig(data=1, fsdp=2, expert=4), MoE(8, 2, 64), 64),
    "split three ways": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MoE(8, 2, 512), 16),
}


@pytest.mark.parametrize("name", OF_LAYER)
def test_what_experts_take_is_what_their_gradient_is_compiled_with(name):
    """Their loop, beside the gathered matrices and the float32 sums of the gradients. Of the router there is more."""
    config, moe, rows = OF_LAYER[name]
    layout, length, weights = Layout(config.build()), 512, moe_specs(256, moe, 1.0)
    mesh = dict(layout.mesh.shape)

    def summed(x, w):
        return jnp.sum(mixture_of_experts(x, w, jnp.ones(x.shape[:2], bool), moe, layout)[0])

    at = layout.activation(("batch", "sequence")), layout.parameters(weights)
    x = jax.ShapeDtypeStruct((rows, length, 256), jnp.float32)
    w = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), weights)
    run = jax.jit(jax.grad(summed, argnums=(0, 1)), in_shardings=at, out_shardings=at)
    compiled = run.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    matrices = 3 * moe.experts * 256 * moe.hidden // mesh["expert"] // mesh["tensor"]
    model = with_model(experiment(), width=256, mlp=moe).model
    working = _experts_at_work(model, mesh, rows * length / layout.ways("batch"), 4)
    assert working + 2 * 4 * matrices == pytest.approx(compiled, rel=0.1)


OF_STEP = {
    "many experts": (MeshConfig(data=1, expert=2, fsdp=4), MoE(32, 4, 512), 16),
    "many tokens": (MeshConfig(data=1, expert=8), MoE(8, 2, 128), 64),
    "no experts": (MeshConfig(data=1, fsdp=8), Gated(1024), 16),
}


@pytest.mark.slow
def test_the_model_is_near_the_compiled_steps_of_mixtures():
    """Where nothing is rematerialised: for that there is a factor, which was measured on a GPU."""
    shape = dict(vocab_size=2000, width=256, head_dim=32, remat="none", attention_kernel="blockwise")
    ones = [
        with_model(experiment(mesh=mesh, length=512, rows=rows), mlp=mlp, **shape)
        for mesh, mlp, rows in OF_STEP.values()
    ]
    planned = compile_elsewhere(Request(tuple((one, one.batch_size) for one in ones), "cpu", 8, 8))
    for name, one, plan in zip(OF_STEP, ones, planned, strict=True):
        found = temporaries(one, plan.mesh, one.batch_size, "cpu", plan.update).total
        assert found == pytest.approx(plan.temporaries, rel=0.05), name


def test_devices_that_share_experts_keep_the_tokens_of_all():
    """In the types of a GPU: those of four devices, with their choices, and of the experts' copies a quarter."""
    one = with_model(experiment(MIXED, rows=64), compute="bfloat16", attention_kernel="blockwise")
    alone, shared = (temporaries(one, {**_MESH, "data": 8 // ways, "expert": ways}, 64, "cuda") for ways in (1, 4))
    c, tokens = one.model, 64 * 64 // 8
    of_others = 3 * tokens * (2 * c.width + (4 + 4) * c.mlp.top_k)
    copies = 2 * 3 * c.mlp.experts * c.width * c.mlp.hidden
    assert shared.activations - alone.activations == c.depth * (of_others - copies * 3 / 4)


UPDATES = {
    "AdamW": (AdamW(), MeshConfig(data=1, fsdp=8), 0.02),
    "Lion": (Lion(), MeshConfig(data=1, fsdp=8), 0.1),
    "Muon": (Muon(), MeshConfig(data=1, fsdp=8), 0.25),
    "Adafactor": (Adafactor(), MeshConfig(data=2, fsdp=4), 0.05),
    "AdamW in bfloat16": (AdamW(state_dtype="bfloat16"), MeshConfig(data=1, expert=2, fsdp=4), 0.1),
    "Muon with tensor": (Muon(), MeshConfig(data=1, fsdp=4, tensor=2), 0.25),
}
SLOW = ("Adafactor", "AdamW in bfloat16", "Muon with tensor")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in UPDATES])
def test_the_modelled_update_is_near_the_compiled_one(name):
    optimizer, config, within = UPDATES[name]
    for mlp in (Gated(1024), MoE(8, 2, 256)):
        one = experiment(optimizer=optimizer, mesh=config)
        one = with_model(one, vocab_size=4096, width=256, head_dim=32, depth=8, mlp=mlp)
        layout = Layout(config.build())
        compiled = update_temporaries(one, program_of(one, layout))
        assert modelled_update(one, dict(layout.mesh.shape)) == pytest.approx(compiled, rel=within)


def test_a_candidate_that_is_not_compiled_has_its_update_modelled():
    one = with_model(experiment(length=16, rows=8), remat="full", depth=8, mlp=Gated(1024), compute="bfloat16")
    site = Site("eight", "Eight", Chip("E", (), "cuda", 1e12, 1 << 40, 1e12, 100.0, ""), 8, 8, None, "none")
    mesh = {**dict.fromkeys(MESH_AXES, 1), "data": 8}
    parameters = 4 * count(specs(one.model))
    assert modelled_update(one, mesh) == parameters  # the clipped gradients
    assert modelled_peak(one, mesh, 8, site) == modelled_peak(one, mesh, 8, site, update=parameters)
    muon = dataclasses.replace(one, optimizer=Muon())
    largest = 4 * 8 * 96 * 1024  # of all layers
    assert modelled_update(muon, mesh) == parameters + 6 * largest
    assert modelled_peak(muon, mesh, 8, site) > modelled_peak(muon, mesh, 8, site, update=parameters)
