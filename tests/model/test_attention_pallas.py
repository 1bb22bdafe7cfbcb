"""The fused kernel gives what `attention` gives with the mask written out, forward and backward, as it is interpreted
on CPU; and it lowers for both kinds of GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.model.attention_pallas import TILES, Tile, Tiles, pallas_attention
from eurollm_jax.model.remat import ATTENTION

from .test_attention import assert_close, inputs, oracle, with_gradients

# Three and two in a row of 40, and no two kernels alike.
SMALL = Tiles(Tile(16, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
SQUARE = Tiles(*[Tile(16, 16, 4, 1)] * 3)


def ours(q, k, v, segments, start=0, window=None, scale=None, cap=None, tiles=SMALL):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = dict(window=window, scale=scale, cap=cap, tiles=tiles, interpret=True)
    return pallas_attention(q, k, v, segments[:, : q.shape[1]], segments, start, **how)


def documents(arrays, lengths):
    """With every row made of documents of these lengths."""
    *arrays, segments = arrays
    return (*arrays, jnp.broadcast_to(np.repeat(np.arange(1, len(lengths) + 1), lengths), segments.shape))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(), dict()),
        (dict(length=37, groups=4), dict(window=7)),
        (dict(length=40, groups=1), dict(window=16, cap=1.5)),
        (dict(length=33, groups=1, dims=5), dict(cap=3.0, scale=0.7)),
        (dict(length=40, heads=6, dims=24), dict(scale=0.1)),
        (dict(length=1), dict()),
        (dict(length=17), dict(window=1)),
        (dict(length=40), dict(window=100)),
    ],
    ids=str,
)
def test_it_agrees_with_the_reference(shape, options):
    arrays = inputs(**shape)
    expected = with_gradients(partial(oracle, **options), *arrays)
    assert_close(with_gradients(partial(ours, **options), *arrays), expected)


@pytest.mark.parametrize("width", sorted(TILES))
def test_tiles_of_the_sizes_that_run_agree(width):
    arrays = documents(inputs(length=300, heads=2, groups=1, dims=width // 4), [40, 130, 3, 127])
    expected = with_gradients(oracle, *arrays)
    assert_close(with_gradients(partial(ours, tiles=None), *arrays), expected, atol=4e-6)


@pytest.mark.parametrize(("start", "window"), [(8, None), (20, 9), (24, None)])
def test_queries_may_be_a_part_of_the_row(start, window):
    """As where rows are split along the sequence, and the place of a device's queries is known when it runs."""
    q, k, v, gradient, segments = inputs()
    mine = slice(start, start + 16)
    elsewhere = jnp.ones(40, bool).at[mine].set(False)[:, None, None]
    out, dq, dk, dv = with_gradients(
        partial(oracle, window=window), q, k, v, jnp.where(elsewhere, 0, gradient), segments
    )

    def part(q, k, v, segments):
        return ours(q, k, v, segments, start=jnp.argmin(elsewhere), window=window)

    results = with_gradients(part, q[:, mine], k, v, gradient[:, mine], segments)
    assert_close(results, (out[:, mine], dq[:, mine], dk, dv))


def test_a_number_that_comes_back_begins_a_segment():
    *arrays, _ = inputs()
    again = documents((*arrays, jnp.zeros(arrays[0].shape[:2])), [16, 20, 4])[-1] % 2
    apart = documents((*arrays, again), [16, 20, 4])[-1]
    assert_close(with_gradients(ours, *arrays, again), with_gradients(oracle, *arrays, apart))


def test_bfloat16_is_about_as_exact_as_the_reference_in_bfloat16():
    """Not quite: the backward pass reads the result as it was rounded."""
    arrays = inputs(dtype=jnp.bfloat16)
    exact = with_gradients(oracle, *(x.astype(jnp.float32) for x in arrays[:4]), arrays[4])
    plain = with_gradients(oracle, *arrays)
    for result, other, wanted in zip(with_gradients(ours, *arrays), plain, exact, strict=True):
        assert np.linalg.norm(result - wanted) <= 1.5 * np.linalg.norm(other - wanted)
        assert np.linalg.norm(result - wanted) <= 2**-7 * np.linalg.norm(wanted)


def test_a_map_over_models_agrees():
    q, k, v, _, segments = inputs()
    both = jax.jit(jax.vmap(ours, in_axes=(0, None, None, None)))(jnp.stack([q, 2 * q]), k, v, segments)
    np.testing.assert_allclose(both[1], oracle(2 * q, k, v, segments), atol=2e-6)


QUERY, KEY, VALUE, GRADIENT = range(4)  # of the arguments
OUT, DQ, DK, DV = range(4)  # of the results


@pytest.mark.parametrize(
    ("lengths", "window", "poisoned", "where", "clean", "there"),
    [
        ([16, 32], None, (QUERY, KEY, VALUE, GRADIENT), slice(0, 16), (OUT, DQ, DK, DV), slice(16, 48)),
        ([32, 16], None, (QUERY, KEY, VALUE, GRADIENT), slice(32, 48), (OUT, DQ, DK, DV), slice(0, 32)),
        ([48], 8, (KEY, VALUE), slice(0, 16), (OUT, DQ), slice(32, 48)),
        ([48], 8, (QUERY, GRADIENT), slice(32, 48), (DK, DV), slice(0, 16)),
        ([48], None, (KEY, VALUE), slice(32, 48), (OUT, DQ), slice(0, 32)),
        ([48], None, (QUERY, GRADIENT), slice(0, 16), (DK, DV), slice(16, 48)),
    ],
    ids=["before", "after", "keys behind", "queries beyond", "keys ahead", "queries behind"],
)
def test_tiles_that_nobody_sees_are_not_read(lengths, window, poisoned, where, clean, there):
    """A weight of zero times what is not a number would show."""
    *arrays, segments = documents(inputs(length=48), lengths)
    for i in poisoned:
        arrays[i] = arrays[i].at[:, where].set(jnp.nan)
    results = with_gradients(partial(ours, window=window, tiles=SQUARE), *arrays, segments)
    for i in clean:
        assert np.isfinite(results[i][:, there]).all()
    assert np.isnan(results[clean[0]][:, where]).all()


def kernels_of(jaxpr):
    """The names of the kernels that a program calls, in all its parts."""
    names = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            names.append(equation.params["name"])
            continue
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            names += kernels_of(getattr(part, "jaxpr", part)) if hasattr(part, "eqns") else []
    return names


@pytest.mark.parametrize(("kept", "times"), [((ATTENTION,), 1), ((), 2)])
def test_with_its_values_kept_it_is_not_computed_twice(kept, times):
    arrays = inputs()

    def loss(q, k, v, segments):
        step = jax.checkpoint(
            lambda q, k, v: jnp.sin(ours(q, k, v, segments)).sum(),
            policy=jax.checkpoint_policies.save_only_these_names(*kept),
        )
        return step(q, k, v)

    names = kernels_of(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays[:3], arrays[4]).jaxpr)
    assert sorted(names) == sorted(
        ["attention_forward"] * times + ["attention_key_gradients", "attention_query_gradients"]
    )


@pytest.mark.parametrize(("platform", "kind"), [("cuda", "NVIDIA H100"), ("rocm", "gfx90a")])
@pytest.mark.parametrize("dims", [64, 96, 128, 256])
def test_it_lowers_for_gpus(platform, kind, dims):
    """To three kernels in Triton's representation. That they also compile only a machine with a GPU can say."""
    q = jax.ShapeDtypeStruct((1, 512, 4, dims), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 512, 2, dims), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(q, k, v, segments):
        how = dict(window=300, scale=0.1, cap=30.0)
        return pallas_attention(q, k, v, segments, segments, 0, **how).astype(jnp.float32).sum()

    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    for name in ("attention_forward", "attention_key_gradients", "attention_query_gradients"):
        assert text.count(f'name = "{name}"') == 1
    assert text.count("@__gpu$xla.gpu.triton") == 3
    assert ("__nv_exp2f" in text, "__ocml_exp2_f32" in text) == (platform == "cuda", platform == "rocm")
