"""Each optimizer against another implementation of it, over several steps with clipping, decay and a schedule."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from eurollm_jax.model.param import Param, flatten, unflatten
from eurollm_jax.training.optimizer import Adafactor, AdamW, AdEMAMix, Lion, Muon

STEPS = 8
SPECS = dict(
    embedding=Param(vocab=6, embed=4, fan_in="embed"),
    layers=dict(
        norm=Param(layers=2, embed=4),
        output=Param(layers=2, heads=2, head_dim=3, embed=4, fan_in=("heads", "head_dim")),
        query=Param(layers=2, embed=4, heads=2, head_dim=3, fan_in="embed"),
        router=Param(layers=2, embed=4, experts=3, fan_in="embed"),
        experts=dict(up=Param(layers=2, experts=3, embed=4, mlp=5, fan_in="embed")),
    ),
    head=Param(embed=4, vocab=6, fan_in="embed"),
)
DECAYED = {"layers/output", "layers/query", "layers/router", "layers/experts/up", "head"}
BY_MUON = DECAYED - {"head"}


def learning_rate(count):
    return 0.02 / (1 + count)


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=spec.shape) for path, spec in flatten(SPECS).items()}


@pytest.fixture(scope="module")
def gradients():
    """Of each step, with norms on both sides of 1."""
    rng = np.random.default_rng(1)
    sizes = np.linspace(0.02, 0.4, STEPS)
    shapes = {path: spec.shape for path, spec in flatten(SPECS).items()}
    return [{path: size * rng.normal(size=shape) for path, shape in shapes.items()} for size in sizes]


def ours(optimizer, start, gradients):
    built = optimizer.build(learning_rate, SPECS)
    params = unflatten({path: np.float32(value) for path, value in start.items()})
    state, update = built.init(params), jax.jit(built.update)
    for gradient in gradients:
        updates, state = update(unflatten({p: np.float32(g) for p, g in gradient.items()}), state, params)
        params = optax.apply_updates(params, updates)
    return flatten(params)


def by_hand(direction, optimizer, start, gradients):
    """Float64: clipping, the optimizer's own direction(path, gradient, step from 1, memory, param), decay, the rate."""
    params, memory = dict(start), {path: {} for path in start}
    for step, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for path, param in params.items():
            clipped = gradient[path] * min(1.0, optimizer.clip_norm / norm)
            moved = direction(path, clipped, step, memory[path], param)
            decay = optimizer.weight_decay * param if path in DECAYED else 0.0
            params[path] = param - learning_rate(step - 1) * (moved + decay)
    return params


def average(memory, name, value, keep):
    memory[name] = keep * memory.get(name, 0.0) + (1 - keep) * value
    return memory[name]


def assert_same(found, wanted, rtol=2e-5):
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=rtol, atol=2e-6, err_msg=path)


def test_the_gradients_are_clipped_at_some_steps_and_not_at_others(gradients):
    norms = [np.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
    assert min(norms) < 0.5
    assert max(norms) > 2


def test_adamw_is_that_of_torch(start, gradients):
    optimizer = AdamW(b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=1.0)
    params = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
    groups = [
        dict(params=[value for path, value in params.items() if (path in DECAYED) is decayed], weight_decay=decay)
        for decayed, decay in ((True, 0.3), (False, 0.0))
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-8)
    for step, gradient in enumerate(gradients):
        for path, value in params.items():
            value.grad = torch.tensor(gradient[path])
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        for group in theirs.param_groups:
            group["lr"] = learning_rate(step)
        theirs.step()
    assert_same(ours(optimizer, start, gradients), {path: value.detach().numpy() for path, value in params.items()})


def test_ademamix_is_that_of_its_paper(start, gradients):
    """Algorithm 1, with the schedules of alpha and beta3 of section 3, which end before the last step."""
    optimizer = AdEMAMix(warmup=6, b1=0.8, b2=0.9, b3=0.99, alpha=4.0, weight_decay=0.3)

    def direction(path, g, step, memory, param):
        done = min(step / 6, 1.0)
        b3 = min(np.exp(np.log(0.8) * np.log(0.99) / ((1 - done) * np.log(0.99) + done * np.log(0.8))), 0.99)
        fast, slow = average(memory, "fast", g, 0.8), average(memory, "slow", g, b3)
        squares = average(memory, "squares", g**2, 0.9)
        root = np.sqrt(squares / (1 - 0.9**step)) + 1e-8
        return (fast / (1 - 0.8**step) + 4.0 * done * slow) / root

    assert_same(ours(optimizer, start, gradients), by_hand(direction, optimizer, start, gradients), rtol=1e-4)


def test_lion_is_that_of_its_paper(start, gradients):
    optimizer = Lion(b1=0.7, b2=0.9, weight_decay=0.3)

    def direction(path, g, step, memory, param):
        sign = np.sign(0.7 * memory.get("momentum", 0.0) + 0.3 * g)
        average(memory, "momentum", g, 0.9)
        return sign

    assert_same(ours(optimizer, start, gradients), by_hand(direction, optimizer, start, gradients))


def orthogonalised(matrix):
    """Jordan's five steps of a quintic Newton-Schulz iteration, on the wide side up."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices(path, value):
    """[stacked, inputs, outputs]: each layer's, and each expert's, own matrix; a router's goes to the experts."""
    shapes = {
        "layers/output": (2, 6, 4),
        "layers/query": (2, 4, 6),
        "layers/experts/up": (6, 4, 5),
        "layers/router": (2, 4, 3),
    }
    return value.reshape(shapes[path])


def test_muon_is_newton_schulz_on_a_nesterov_momentum_and_adamw_for_the_rest(start, gradients):
    """Both momenta have the bias correction of NAdam (Dozat 2016); updates have the root mean square of 0.2 of AdamW's
    (Liu et al. 2025, equation 4)."""
    optimizer = Muon(momentum=0.9, rms=0.3, b1=0.8, b2=0.95, weight_decay=0.3)

    def direction(path, g, step, memory, param):
        keep = 0.9 if path in BY_MUON else 0.8
        momentum = average(memory, "momentum", g, keep)
        ahead = keep * momentum / (1 - keep ** (step + 1)) + (1 - keep) * g / (1 - keep**step)
        if path not in BY_MUON:
            squares = average(memory, "squares", g**2, 0.95)
            return ahead / (np.sqrt(squares / (1 - 0.95**step)) + 1e-8)
        stacked = matrices(path, ahead)
        moved = np.stack([orthogonalised(matrix) for matrix in stacked]) * 0.3 * np.sqrt(max(stacked.shape[1:]))
        return moved.reshape(param.shape)

    assert_same(ours(optimizer, start, gradients), by_hand(direction, optimizer, start, gradients), rtol=2e-4)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_first_step_of_muon_is_that_of_torch(shape):
    """Which iterates in bfloat16."""
    rng = np.random.default_rng(3)
    gradient = rng.normal(size=shape).astype(np.float32)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.tensor(gradient)
    torch.optim.Muon([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    specs = dict(layers=dict(up=Param(layers=1, embed=shape[0], mlp=shape[1], fan_in="embed")))
    built = Muon(clip_norm=1e9).build(optax.constant_schedule(0.1), specs)
    params = dict(layers=dict(up=np.zeros((1, *shape), np.float32)))
    updates, _ = jax.jit(built.update)(dict(layers=dict(up=gradient[None])), built.init(params), params)
    np.testing.assert_allclose(updates["layers"]["up"][0], weight.detach().numpy(), atol=2e-3)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_is_that_of_optax_on_each_matrix_alone(relative, start, gradients):
    optimizer = Adafactor(clip=0.8, relative=relative, weight_decay=0.0, clip_norm=1e9)
    found = ours(optimizer, start, gradients)
    theirs = optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=1,
        clipping_threshold=0.8,
        multiply_by_parameter_scale=relative,
    )

    def cut(path, value):
        """Into matrices, and layers' gains into vectors."""
        if path in {"embedding", "head"}:
            return [value]
        return list(value if path == "layers/norm" else matrices(path, value))

    def all_cut(tree):
        return {path: cut(path, np.float32(value)) for path, value in tree.items()}

    params, update = all_cut(start), jax.jit(theirs.update)
    state = theirs.init(params)
    for gradient in gradients:
        updates, state = update(all_cut(gradient), state, params)
        params = optax.apply_updates(params, updates)
    for path, parts in params.items():
        for part, wanted in zip(cut(path, np.asarray(found[path])), parts, strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-6, err_msg=path)


def test_adafactor_clips_and_decays_as_the_others(start, gradients):
    """With a decay of 0 an average is the last square alone; of a rank of one, the estimate is exact."""
    rank_one = [{path: np.full_like(g, size) for path, g in gradients[0].items()} for size in (0.01, 0.5, 2.0)]
    optimizer = Adafactor(decay=0.0, relative=False, weight_decay=0.3)
    wanted = by_hand(lambda path, g, *_: np.sign(g), optimizer, start, rank_one)
    assert_same(ours(optimizer, start, rank_one), wanted)


def test_adafactor_keeps_next_to_nothing():
    specs = dict(layers=dict(up=Param(layers=3, embed=100, mlp=300, fan_in="embed"), norm=Param(layers=3, embed=100)))
    built = Adafactor().build(learning_rate, specs)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.float32), specs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(built.init, params)))
    assert kept < 3 * (100 + 300 + 100) + 10


@pytest.mark.parametrize(
    "optimizer", [AdamW(), Muon(), AdEMAMix(warmup=4), Lion(), Adafactor()], ids=lambda o: type(o).__name__
)
def test_decay_is_of_matrices_and_neither_of_gains_nor_of_embeddings(optimizer, start, gradients):
    """The difference that a decay makes in one step, whatever the direction."""
    with_, without = (
        ours(dataclasses.replace(optimizer, weight_decay=decay), start, gradients[:1]) for decay in (0.5, 0.0)
    )
    for path, value in start.items():
        wanted = -learning_rate(0) * 0.5 * value if path in DECAYED else np.zeros_like(value)
        np.testing.assert_allclose(with_[path] - without[path], wanted, atol=1e-6, err_msg=path)
