"""Every way to compute attention gives what `attention` gives with the mask written out, forward and backward."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.model import attention_blockwise
from eurollm_jax.model.attention import attention, attention_choice, document_mask, packed_attention
from eurollm_jax.model.attention_blockwise import blockwise
from eurollm_jax.model.config import Attention, Gated, TransformerConfig
from eurollm_jax.model.param import init
from eurollm_jax.model.transformer import forward, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

DOCUMENTS = [[5, 12, 3, 20], [40], [1, 1, 38], [9, -16, 15]]  # lengths in each row; a negative one is padding


def inputs(length=40, heads=4, groups=2, dims=8, dtype=jnp.float32, seed=0):
    """Query, key, value and a gradient of the result; rows of documents, cut or padded at the end."""
    rng = np.random.default_rng(seed)
    arrays = (
        jnp.asarray(rng.normal(size=(len(DOCUMENTS), length, count, dims)), dtype)
        for count in (heads, groups, groups, heads)
    )
    segments = np.zeros((len(DOCUMENTS), length), np.int32)
    for row, lengths in zip(segments, DOCUMENTS, strict=True):
        numbers = np.repeat(
            [number if size > 0 else 0 for number, size in enumerate(lengths, 1)], [abs(size) for size in lengths]
        )[:length]
        row[: len(numbers)] = numbers
    return (*arrays, jnp.asarray(segments))


def with_gradients(compute, q, k, v, gradient, segments):
    def both(q, k, v, gradient, segments):
        out, back = jax.vjp(lambda q, k, v: compute(q, k, v, segments), q, k, v)
        return out, *back(gradient)

    return [np.asarray(x, np.float32) for x in jax.jit(both)(q, k, v, gradient, segments)]


def oracle(q, k, v, segments, window=None, scale=None, cap=None):
    return attention(q, k, v, document_mask(segments, window), scale=scale, cap=cap)


def packed(kernel, layout, window=None, scale=None, cap=None):
    return partial(packed_attention, window=window, scale=scale, cap=cap, kernel=kernel, layout=layout)


def assert_close(results, expected, atol=2e-6):
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=atol * max(1, np.abs(wanted).max()))


@pytest.fixture
def small_blocks(monkeypatch):
    """Three blocks in a row of 40, as 128 make of 300."""
    monkeypatch.setattr(attention_blockwise, "CPU_BLOCK", 16)
    monkeypatch.setattr(attention_blockwise, "ACCELERATOR_BLOCK", 24)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(), dict()),
        (dict(length=37, groups=4), dict(window=7)),
        (dict(length=40, groups=1), dict(window=16, cap=1.5)),
        (dict(length=33, groups=1, dims=5), dict(cap=3.0, scale=0.7)),
        (dict(length=1), dict()),
        (dict(length=17), dict(window=1)),
        (dict(length=40), dict(window=100)),
    ],
    ids=str,
)
def test_blocks_agree_with_the_reference(shape, options, small_blocks, one_device):
    arrays = inputs(**shape)
    expected = with_gradients(partial(oracle, **options), *arrays)
    assert_close(with_gradients(packed("blockwise", one_device, **options), *arrays), expected)


def test_blocks_of_the_size_that_runs_agree(one_device):
    arrays = inputs(length=300)
    assert_close(with_gradients(packed("blockwise", one_device), *arrays), with_gradients(oracle, *arrays))


def test_all_rows_at_once_agree_as_accelerators_compute_them(small_blocks):
    arrays = inputs(length=37)
    options = dict(window=20, cap=2.0, scale=0.4)

    def compute(q, k, v, segments):
        return blockwise(q, k, v, segments, segments, 0, **options, backend="rocm")

    assert_close(with_gradients(compute, *arrays), with_gradients(partial(oracle, **options), *arrays))


def test_documents_may_come_back_and_in_any_order(small_blocks, one_device):
    *arrays, segments = inputs()
    segments = jax.random.randint(jax.random.key(0), segments.shape, 0, 4)
    expected = with_gradients(oracle, *arrays, segments)
    assert_close(with_gradients(packed("blockwise", one_device), *arrays, segments), expected)


def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(small_blocks, one_device):
    arrays = inputs(dtype=jnp.bfloat16)
    exact = with_gradients(oracle, *(x.astype(jnp.float32) for x in arrays[:4]), arrays[4])
    plain = with_gradients(oracle, *arrays)
    ours = with_gradients(packed("blockwise", one_device), *arrays)
    for result, other, wanted in zip(ours, plain, exact, strict=True):
        assert np.linalg.norm(result - wanted) <= 1.25 * np.linalg.norm(other - wanted)
        assert np.linalg.norm(result - wanted) <= 2**-7 * np.linalg.norm(wanted)


def test_a_map_over_models_agrees(small_blocks, one_device):
    q, k, v, _, segments = inputs()
    compute = packed("blockwise", one_device)
    both = jax.jit(jax.vmap(compute, in_axes=(0, None, None, None)))(jnp.stack([q, 2 * q]), k, v, segments)
    np.testing.assert_allclose(both[1], oracle(2 * q, k, v, segments), atol=2e-6)


@pytest.mark.parametrize(
    ("documents", "window", "poisoned", "clean"),
    [
        ([16, 32], None, slice(0, 16), slice(16, 48)),
        ([48], 8, slice(0, 24), slice(32, 48)),
        ([48], None, slice(32, 48), slice(0, 32)),
    ],
    ids=["another document", "behind the window", "ahead"],
)
def test_blocks_that_a_query_cannot_see_are_not_computed(documents, window, poisoned, clean, monkeypatch, one_device):
    """A weight of zero times a value that is not a number would show."""
    monkeypatch.setattr(attention_blockwise, "CPU_BLOCK", 8)
    q, k, v, gradient, _ = inputs(length=48)
    segments = jnp.broadcast_to(np.repeat(np.arange(len(documents)), documents), q.shape[:2])
    v = v.at[:, poisoned].set(jnp.nan)
    out, dq, _, _ = with_gradients(packed("blockwise", one_device, window=window), q, k, v, gradient, segments)
    assert np.isfinite(out[:, clean]).all()
    assert np.isfinite(dq[:, clean]).all()
    assert np.isnan(out[:, poisoned]).all()


def test_scores_are_never_held_at_once(one_device):
    length, heads = 4096, 2
    q, segments = jnp.zeros((1, length, heads, 16)), jnp.ones((1, length), jnp.int32)

    def temporary(kernel):
        def loss(q, k, v):
            return packed(kernel, one_device)(q, k, v, segments).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_map = length * length * heads * 4
    assert temporary("reference") > one_map
    assert temporary("blockwise") < one_map / 8


# --------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("kernel", "mesh"),
    [
        ("blockwise", dict(data=2, context=2, tensor=2)),
        ("blockwise", dict(fsdp=2, context=4)),
        ("blockwise", dict(replica=2, expert=2, tensor=2)),
        ("reference", dict(context=4, tensor=2)),
    ],
)
def test_meshes_agree_with_one_device(kernel, mesh, small_blocks):
    layout = Layout(MeshConfig(**{"data": 1, **mesh}).build())
    arrays = inputs(length=72)
    expected = with_gradients(partial(oracle, window=30), *arrays)
    assert_close(with_gradients(packed(kernel, layout, window=30), *arrays), expected)


def test_a_split_row_gathers_keys_and_deals_out_their_gradients():
    layout = Layout(MeshConfig(data=2, context=4).build())
    q, k, v, _, segments = inputs()
    loss = jax.grad(lambda q, k, v: packed("blockwise", layout)(q, k, v, segments).sum(), (0, 1, 2))
    text = jax.jit(loss).lower(q, k, v).as_text()
    assert text.count("all_gather") >= 2
    assert text.count("reduce_scatter") == 2


# ------------------------------------------------------------------------------------------------- who computes it

CONFIG = TransformerConfig(
    vocab_size=40, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, max_positions=64, mlp=Gated(32)
)


def on(backend, **mesh):
    return Layout(MeshConfig(**mesh).build(jax.devices() if mesh else jax.devices()[:1]), lowered_for=backend)


@pytest.mark.parametrize(
    ("changes", "backend", "kernel", "reason"),
    [
        (dict(), "cpu", "blockwise", "default on cpu"),
        (dict(), "rocm", "blockwise", "default on rocm"),
        (dict(), "cuda", "pallas", "outside of a document"),
        (dict(attention_cap=50.0, head_dim=20), "cuda", "pallas", "outside of a document"),
        (dict(compute="float32"), "cuda", "blockwise", "pallas cannot: .* compute='float32'; nor can cudnn: it takes"),
        (dict(head_dim=256), "cuda", "blockwise", "pallas cannot: .* up to 128 .* nor can cudnn: .* head_dim=256"),
        (dict(head_dim=256, attention_kernel="cudnn"), "hopper", "cudnn", "attention_kernel"),
        (dict(head_dim=256), "hopper", "cudnn", "pallas cannot: it takes heads of up to 128"),
        (dict(head_dim=256, attention_cap=5.0), "hopper", "blockwise", "nor can cudnn: .* attention_cap=5.0"),
        (dict(attention_kernel="reference"), "cuda", "reference", "attention_kernel"),
        (dict(attention_kernel="cudnn"), "cuda", "cudnn", "attention_kernel"),
    ],
)
def test_the_choice_is_told_with_its_reason(changes, backend, kernel, reason, monkeypatch):
    layout = on("cuda" if backend == "hopper" else backend)
    if backend == "hopper":
        monkeypatch.setattr(type(layout), "device", SimpleNamespace(compute_capability="9.0"))
    chosen, why = attention_choice(replace(CONFIG, **changes), layout)
    assert chosen == kernel
    assert re.search(reason, why)


@pytest.mark.parametrize(
    ("changes", "backend", "complaint"),
    [
        (dict(attention_kernel="cudnn"), "cpu", r"for cpu\. Choose 'auto' or 'blockwise'"),
        (dict(attention_kernel="cudnn"), "rocm", "for rocm"),
        (dict(attention_kernel="cudnn", attention_cap=50.0), "cuda", "attention_cap=50"),
        (dict(attention_kernel="cudnn", compute="float32"), "cuda", "compute='float32'"),
        (dict(attention_kernel="cudnn", head_dim=136), "cuda", "head_dim=136"),
        (dict(attention_kernel="cudnn", head_dim=20), "cuda", "steps of 8, and head_dim=20"),
        (dict(attention_kernel="pallas"), "cpu", "'pallas' cannot .* for cpu"),
        (dict(attention_kernel="pallas"), "rocm", "for rocm"),
        (dict(attention_kernel="pallas", compute="float32"), "cuda", "compute='float32'"),
        (dict(attention_kernel="pallas", head_dim=136), "cuda", "up to 128 dimensions, and head_dim=136"),
    ],
)
def test_a_kernel_that_cannot_is_refused_before_anything_compiles(changes, backend, complaint):
    c = replace(CONFIG, **changes)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    with pytest.raises(UserError, match=complaint):
        jax.eval_shape(
            lambda params, tokens: forward(params, tokens, tokens, tokens, c, on(backend)),
            jax.eval_shape(lambda: init(specs(c), jax.random.key(0))),
            tokens,
        )


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """Lowering asks the library for its version; there is none where there is no GPU."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def lowered(c, layout, platform):
    params = jax.eval_shape(lambda: init(specs(c), jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)

    def loss(params, tokens, segments):
        return forward(params, tokens, segments, tokens, c, layout)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, tokens, tokens)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("mesh", "mask"), [(dict(), "4x1x32x32xbf16"), (dict(data=2, context=4), "2x1x8x32xbf16")])
def test_cudnn_is_given_the_mask_forward_and_backward(mesh, mask, cudnn_is_there):
    c = replace(CONFIG, pattern=(Attention(window=8), Attention()), attention_kernel="cudnn")
    calls = [line for line in lowered(c, on("cuda", **mesh), "cuda").splitlines() if "custom_call @__cudnn" in line]
    assert {line.split("@__cudnn$")[1].split("(")[0] for line in calls} == {
        "fmhaScaleBiasSoftmax",
        "fmhaScaleBiasSoftmaxBackward",
    }
    for line in calls:
        assert mask in line.split(" : (")[-1].split(" -> ")[0]


@pytest.mark.parametrize(("backend", "changes"), [("rocm", dict()), ("cuda", dict(compute="float32"))])
def test_where_no_fused_kernel_is_chosen_no_module_calls_one(backend, changes):
    text = lowered(replace(CONFIG, **changes), on(backend), backend)
    assert "cudnn" not in text
    assert "triton" not in text
    assert "stablehlo.while" in text


@pytest.mark.parametrize("mesh", [dict(), dict(data=2, context=4)])
def test_a_model_for_nvidia_calls_the_fused_kernel_forward_and_backward(mesh, monkeypatch):
    hopper = SimpleNamespace(compute_capability=90)
    monkeypatch.setattr("jax._src.pallas.triton.gpu_info.get_gpu_info", lambda: hopper)  # asked for when lowering
    text = lowered(replace(CONFIG, pattern=(Attention(window=8), Attention())), on("cuda", **mesh), "cuda")
    names = re.findall(r'name = "(attention_\w+)"', text)
    assert set(names) == {"attention_forward", "attention_key_gradients", "attention_query_gradients"}
    assert "@__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("mesh", [dict(), dict(data=2, context=4)])
@pytest.mark.parametrize(("length", "window"), [(36, None), (36, 7), (20, 5)])
def test_what_cudnn_is_asked_for_is_the_reference(mesh, length, window, monkeypatch):
    """The same call, answered by XLA's implementation of it."""
    by_xla = partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: by_xla(*a, **k))
    arrays = inputs(length=length if mesh else length + 1)
    options = dict(window=window, scale=0.3)
    expected = with_gradients(partial(oracle, **options), *arrays)
    assert_close(with_gradients(packed("cudnn", on("cuda", **mesh), **options), *arrays), expected)
