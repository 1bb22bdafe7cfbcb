"""Products of the stream on every mesh against one device, and what their gradients send."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.model.layers import linear
from eurollm_jax.model.projections import GATHERED, RESIDUAL, projections
from eurollm_jax.parallel.mesh import Layout, MeshConfig

B, T, D = 8, 8, 12
AXES = (("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim"), ("embed", "mlp"))
SHAPES = ((D, 4, 6), (D, 2, 6), (D, 20))
MESHES = {
    "data-tensor": MeshConfig(data=4, tensor=2),
    "fsdp-tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "expert-tensor": MeshConfig(data=1, expert=4, tensor=2),
    "context-tensor": MeshConfig(data=1, context=4, tensor=2),
    "fsdp-context-tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}
ONE_PRODUCT, ALL = slice(2, 3), slice(None)  # an MLP without a gate has one


def given(dtype=jnp.float32, length=T, which=ALL):
    dice = np.random.default_rng(0)
    x = jnp.asarray(dice.normal(size=(B, length, D)), dtype)
    return x, tuple(jnp.asarray(dice.normal(size=shape), dtype) for shape in SHAPES[which])


def gradient(layout, x, weights, which=ALL, multiply=projections):
    """The gradients of a value that weighs each product differently, traced for the mesh."""

    def value(x, weights):
        products = multiply(x, dict(enumerate(weights)), range(len(weights)), layout)
        return sum(jnp.sum(jnp.sin(product.astype(jnp.float32)) * (1 + at)) for at, product in enumerate(products))

    at = layout.activation(RESIDUAL, x.shape), tuple(layout.parameter(axes) for axes in AXES[which])
    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), in_shardings=at, out_shardings=(None, at))
    return run.trace(*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, weights)))


def values(layout, x, weights, which=ALL):
    return jax.device_get(gradient(layout, x, weights, which).lower().compile()(x, weights))


def assert_near(found, expected, rtol=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.float32(one), np.float32(other)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


def sent(layout, *arguments):
    """(operation, shape of the result) of each collective of the compiled gradient."""
    text = gradient(layout, *arguments).lower().compile().as_text()
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    return [
        (kind, tuple(int(n) for n in shape.split(",") if n))
        for shapes, kind in re.findall(pattern, text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_gradients_are_those_of_one_device(mesh, one_device):
    x, weights = given()
    assert_near(values(Layout(mesh.build()), x, weights), values(one_device, x, weights))


def test_bfloat16_is_summed_as_on_one_device(one_device):
    """In the type of the products: a device's parts first, then over the devices."""
    x, weights = given(jnp.bfloat16)
    layout = Layout(MESHES["data-tensor"].build())
    assert_near(values(layout, x, weights), values(one_device, x, weights), rtol=2e-2)


@pytest.mark.parametrize("which", [ALL, ONE_PRODUCT], ids=["three", "one"])
def test_the_gradient_of_the_stream_is_dealt_out_in_one_exchange(which):
    """Whatever the number of products; and the stream is gathered once. The scalar is the value itself."""
    found = sent(Layout(MeshConfig(data=1, tensor=2).build(jax.devices()[:2])), *given(which=which), which)
    assert sorted(set(found)) == [("all-gather", (B, T, D)), ("all-reduce", ()), ("reduce-scatter", (B, T // 2, D))]


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, context=8), MESHES["fsdp-context-tensor"]], ids=["8", "2x2x2"])
def test_a_device_multiplies_its_own_positions_alone(mesh, one_device):
    """Merged with the batch, a sequence that is split would be gathered, and every device multiply all of it."""
    one, parts = (gradient(layout, *given()).lower().compile() for layout in (one_device, Layout(mesh.build())))
    assert parts.cost_analysis()["flops"] == pytest.approx(one.cost_analysis()["flops"] / 8, rel=0.05)


def test_a_length_that_the_mesh_does_not_divide_is_computed_whole(one_device):
    """As the one new position of a text that is being written."""
    layout = Layout(MESHES["data-tensor"].build())
    x, weights = given(length=5)
    assert_near(values(layout, x, weights), values(one_device, x, weights))
    assert {kind for kind, _ in sent(layout, x, weights)} == {"all-reduce"}


def test_where_nothing_is_split_along_tensor_the_program_is_that_of_plain_products():
    def plain(x, weights, names, layout):
        h = layout.constrain(x, *GATHERED)
        return [linear(h, weights[name]) for name in names]

    layout = Layout(MeshConfig(data=2, fsdp=2, expert=2).build())
    ours, theirs = (gradient(layout, *given(), multiply=each).lower().as_text() for each in (projections, plain))
    assert ours == theirs
