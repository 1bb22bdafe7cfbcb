"""A batch read in micro-batches is the batch: the same loss, gradient and update, and one exchange between copies."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import BalanceLoss, Gated, MoE, TransformerConfig
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.step import build_program

DENSE = TransformerConfig(
    vocab_size=64,
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=Gated(32),
    max_positions=16,
    compute="float32",
    remat="full",
)
MIXTURE = dataclasses.replace(DENSE, mlp=MoE(4, 2, 16, score="sigmoid", z_loss=0.1))


def batch_for(seed, rows=16, length=8):
    """Rows end in padding of different lengths, so that micro-batches predict different numbers of tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    segments = (at < rng.integers(1, length + 1, (rows, 1))).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], segments, at, segments > 0, rng.integers(0, 2, rows).astype(np.int32))


def program(config, layout, accumulate, rows=16):
    return build_program(
        config,
        layout,
        AdamW().build(optax.constant_schedule(1e-2), specs(config)),
        batch_sizes=(rows,),
        token_bytes=np.arange(64) % 5,
        sources=2,
        z_loss=1e-3,
        accumulate=accumulate,
    )


def trained(config, layout, accumulate, steps=3):
    run, seen = program(config, layout, accumulate), []
    state = run.init(jax.random.key(0))
    for step in range(steps):
        state, metrics = run.train(state, layout.place_rows(batch_for(step)))
        seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


@pytest.fixture(scope="module")
def alone():
    one_device = Layout(MeshConfig().build(jax.devices()[:1]))
    return {name: trained(config, one_device, 1) for name, config in (("dense", DENSE), ("mixture", MIXTURE))}


@pytest.mark.parametrize(
    ("kind", "mesh", "accumulate"),
    [
        ("dense", None, 8),
        ("dense", MeshConfig(data=2, fsdp=2, tensor=2), 2),
        pytest.param("dense", MeshConfig(data=1, fsdp=4, tensor=2), 2, marks=pytest.mark.slow),
        ("dense", MeshConfig(data=1, tensor=2, context=4), 4),
        ("mixture", MeshConfig(data=1, fsdp=2, expert=4), 2),
        pytest.param("mixture", MeshConfig(replica=2, data=2, expert=2), 2, marks=pytest.mark.slow),
    ],
    ids=["one-device", "data-fsdp-tensor", "fsdp-tensor", "context-tensor", "fsdp-expert", "replica-data-expert"],
)
def test_micro_batches_train_as_the_batch_does(kind, mesh, accumulate, alone):
    layout = Layout(MeshConfig().build(jax.devices()[:1]) if mesh is None else mesh.build())
    state, metrics = trained({"dense": DENSE, "mixture": MIXTURE}[kind], layout, accumulate)
    expected, seen = alone[kind]
    for ours, theirs in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-5)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=2e-4)
        np.testing.assert_allclose(ours.sources.nats, theirs.sources.nats, rtol=2e-5)
        np.testing.assert_array_equal(ours.sources.tokens, theirs.sources.tokens)
        np.testing.assert_array_equal(ours.sources.bytes, theirs.sources.bytes)
        if kind == "mixture":
            np.testing.assert_allclose(ours.routing.load, theirs.routing.load, rtol=1e-4)
            np.testing.assert_allclose(ours.routing.z, theirs.routing.z, rtol=1e-4)
    for path, value in flatten(state.params).items():
        np.testing.assert_allclose(value, flatten(expected.params)[path], atol=2e-4, err_msg=path)


def test_the_balance_loss_is_the_mean_of_the_micro_batches():
    """On one device the first micro-batch is the first half of the rows, and each counts by its tokens."""
    config = dataclasses.replace(MIXTURE, mlp=dataclasses.replace(MIXTURE.mlp, balance=BalanceLoss(0.0)))
    layout, whole = Layout(MeshConfig().build(jax.devices()[:1])), batch_for(0)
    _, (found,) = trained(config, layout, 2, steps=1)
    halves, run = [], program(config, layout, 1, rows=8)
    for rows in (slice(0, 8), slice(8, 16)):
        half = Batch(*(values[rows] for values in whole))
        _, metrics = run.train(run.init(jax.random.key(0)), layout.place_rows(half))
        halves.append(metrics.routing.balance)
    shares = np.array([(whole.segments[:8] > 0).sum(), (whole.segments[8:] > 0).sum()]) / (whole.segments > 0).sum()
    np.testing.assert_allclose(found.routing.balance, shares @ np.stack(halves), rtol=1e-5)


def collectives(accumulate):
    """How many collectives the compiled step of eight copies has in loops, and outside of them."""
    run = program(DENSE, Layout(MeshConfig(data=8).build()), accumulate, rows=32)
    inside, outside, entry = 0, 0, False
    for line in run.compile_train(32, 8).as_text().splitlines():
        if line and not line.startswith((" ", "}")):
            entry = line.startswith("ENTRY")
        if re.search(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line):
            along = re.search(r"replica_groups=mesh\[[^]]*\] \{([^}]*)\}", line)
            if along is None or "'data'" in along[1]:  # of a group of one device nothing is moved
                inside, outside = inside + (not entry), outside + entry
    return inside, outside


def test_copies_of_the_model_meet_once_a_step():
    """Whatever crosses the network does so after the last micro-batch: no loop has any of it."""
    inside, outside = collectives(4)
    assert inside == 0
    assert outside > 0
    assert collectives(1)[0] > 0  # at once, each layer's gradient is added up in the loop over the layers


@pytest.mark.parametrize(("rows", "use"), [(8, "use 16 rows, or accumulate=1"), (40, "use 32 or 48 rows")])
def test_a_batch_that_has_no_such_micro_batches_is_refused(rows, use):
    with pytest.raises(UserError, match=f"{rows} rows does not divide into 2 micro-batches over 8 devices: {use}"):
        program(DENSE, Layout(MeshConfig().build()), 2, rows=rows)
