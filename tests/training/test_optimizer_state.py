"""Moments in bfloat16: rounded without bias, the same on any mesh, and near enough to float32 to train alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eurollm_jax.model.param import Param, flatten, init
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import Adafactor, AdamW, AdEMAMix, Lion, Muon
from eurollm_jax.training.optimizer_state import kept_in, round_at_random
from eurollm_jax.training.step import build_program

ALL = [AdamW(), Muon(), AdEMAMix(warmup=20), Lion(), Adafactor()]
NARROW = [dataclasses.replace(optimizer, state_dtype="bfloat16") for optimizer in ALL[:-1]]


def name(optimizer):
    return type(optimizer).__name__ + ("-bf16" if optimizer in NARROW else "")


def test_rounding_has_the_right_mean_and_goes_to_a_neighbour():
    values = np.random.default_rng(0).normal(size=200).astype(np.float32) * 10.0 ** np.arange(-10, 10).repeat(10)
    values = values.astype(np.float32)
    below = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # towards zero
    above = (below.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    draws = 4000
    rounded = np.asarray(
        round_at_random(jnp.broadcast_to(values, (draws, 200)), jax.random.key(1)).astype(jnp.float32), np.float64
    )
    assert np.all((rounded == below) | (rounded == above))
    share = (values.astype(np.float64) - below) / (above.astype(np.float64) - below)
    error = (rounded == above).mean(0) - share
    assert np.all(np.abs(error) < 5 * np.sqrt(share * (1 - share) / draws) + 1e-9)
    assert abs(error.mean()) < 4 * 0.5 / np.sqrt(draws * 200)


def test_rounding_keeps_what_bfloat16_holds():
    held = np.array([0.0, 1.0, -0.0078125, 3e38, np.inf, -np.inf, np.nan], jnp.bfloat16)
    for seed in range(20):
        found = round_at_random(held.astype(np.float32), jax.random.key(seed))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), held.astype(np.float32))


def test_a_slow_average_does_not_stand_still():
    """Of ones with a decay of 0.999, after 600 steps: 1 - 0.999^600. To the nearest, it stops where a step is less
    than half of the last bit."""
    weights = dict(a=Param(embed=64, mlp=64, fan_in="embed"))
    ones = dict(a=jnp.ones((64, 64)))
    rounded, plain = (kept_in(dtype, optax.ema(0.999, debias=False), weights) for dtype in ("bfloat16", "float32"))

    def after(transformation, narrow=lambda state: state):
        def step(_, state):
            return narrow(transformation.update(ones, state)[1])

        return jax.jit(lambda: jax.lax.fori_loop(0, 600, step, transformation.init(ones)))()

    def nearest(state):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state)

    wanted = 1 - 0.999**600
    assert float(after(rounded).inner.ema["a"].astype(jnp.float32).mean()) == pytest.approx(wanted, rel=2e-3)
    assert abs(float(after(plain, nearest).ema["a"].mean()) / wanted - 1) > 0.02


@pytest.mark.parametrize("optimizer", NARROW, ids=name)
def test_50_steps_are_near_those_of_float32(optimizer):
    """Least squares with noise in the gradients: as far from the start, to a fiftieth of the way."""
    weights = dict(layers=dict(up=Param(layers=1, embed=24, mlp=16, fan_in="embed"), norm=Param(layers=1, mlp=16)))
    rng = np.random.default_rng(0)
    inputs, wanted = rng.normal(size=(64, 24)), rng.normal(size=(64, 16))

    def loss(params, noise):
        found = (inputs + noise) @ params["layers"]["up"][0] * params["layers"]["norm"][0]
        return jnp.mean((found - wanted) ** 2)

    def trained(optimizer):
        built = optimizer.build(optax.constant_schedule(3e-3), weights)

        def step(carry, key):
            params, state = carry
            gradients = jax.grad(loss)(params, jax.random.normal(key, inputs.shape))
            updates, state = built.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = init(weights, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 50)
        (params, state), _ = jax.jit(lambda p: jax.lax.scan(step, (p, built.init(p)), keys))(params)
        return flatten(params), state

    start = flatten(init(weights, jax.random.key(0)))
    (narrow, state), (wide, _) = (
        trained(o) for o in (optimizer, dataclasses.replace(optimizer, state_dtype="float32"))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (1, 24, 16)} == {np.dtype(jnp.bfloat16)}
    for path, value in wide.items():
        way = np.linalg.norm(value - start[path])
        assert np.linalg.norm(narrow[path] - value) < 0.02 * way, path
    assert np.any(narrow["layers/up"] != wide["layers/up"])


@pytest.fixture(scope="module")
def mesh():
    return Layout(MeshConfig(data=2, fsdp=2, tensor=2).build())


@pytest.mark.parametrize(
    "optimizer", [*ALL, *(pytest.param(one, marks=pytest.mark.slow) for one in NARROW[:3]), *NARROW[3:]], ids=name
)
def test_a_step_is_the_same_on_a_mesh_and_state_lives_where_the_weights_do(optimizer, tiny, mesh):
    weights = specs(tiny)
    built = optimizer.build(optax.constant_schedule(1e-2), weights)
    program = build_program(
        tiny, mesh, built, batch_sizes=(8,), token_bytes=np.ones(tiny.vocab_size, np.int32), sources=1, z_loss=0.0
    )
    at = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    kept = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(program.state.params)}
    moments = [leaf for leaf in jax.tree.leaves(program.state.optimizer) if leaf.ndim > 1 and leaf.shape in kept]
    if isinstance(optimizer, Adafactor):
        assert {leaf.shape for leaf in moments} == {(2, 16)}  # of norms; of matrices, rows and columns alone
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(at.optimizer))
    else:
        count = dict(AdamW=2 * 10, AdEMAMix=3 * 10, Lion=10, Muon=7 + 2 * 3)[type(optimizer).__name__]
        assert len(moments) == count
        assert all(leaf.sharding.is_equivalent_to(kept[leaf.shape], leaf.ndim) for leaf in moments)
        assert {leaf.dtype.name for leaf in moments} == {optimizer.state_dtype}

    params, gradients = (init(weights, jax.random.key(seed)) for seed in (0, 1))

    def two_steps(params, gradients):
        state = built.init(params)
        for _ in range(2):
            updates, state = built.update(gradients, state, params)
        return updates, state

    alone = jax.jit(two_steps)(params, gradients)
    placed = jax.device_put((params, gradients), (at.params, at.params))
    shared = jax.jit(two_steps, out_shardings=(at.params, at.optimizer))(*placed)
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        tolerance = dict(rtol=2**-7, atol=1e-6) if theirs.dtype == jnp.bfloat16 else dict(rtol=1e-2, atol=2e-6)
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), **tolerance)


def test_what_is_random_is_the_same_on_a_mesh(mesh):
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    at = mesh.parameter(("embed", "mlp"))
    alone = jax.jit(round_at_random)(x, jax.random.key(5))
    shared = jax.jit(round_at_random, in_shardings=(at, None), out_shardings=at)(x, jax.random.key(5))
    assert shared.sharding.is_equivalent_to(at, 2)
    np.testing.assert_array_equal(np.float32(shared), np.float32(alone))
    assert np.any(np.float32(alone) != np.float32(jax.jit(round_at_random)(x, jax.random.key(6))))
