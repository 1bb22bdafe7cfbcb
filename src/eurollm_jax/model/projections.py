"""The products at both ends of a layer's halves: out of the residual stream, with several matrices, and back into it.

Between the halves of a layer a device along the mesh axis `tensor` has some of the positions; within them it has all
positions, and of each matrix some columns. Forward, positions are gathered. Backward, every product adds to the
gradient of every position, and a device knows what its own columns add. A compiler that splits the program by itself
adds up each product over the devices, and hands all positions to each of them. Here a device adds its products up
first, and one reduce-scatter sums over the devices and deals the positions out (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2).

Shapes: B batch, T sequence, D embed, N columns.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from eurollm_jax.model.layers import biased, linear
from eurollm_jax.model.param import Params
from eurollm_jax.parallel.mesh import Layout

RESIDUAL = ("batch", "residual_sequence", "embed")  # the axes of the stream that the halves of a layer add to
GATHERED = ("batch", "sequence", "embed")
MATRIX = ("embed", "mlp")  # of heads, too, which are split as the MLP is

type Matrices = tuple[Float[Array, "D N"], ...]


def projections(
    x: Float[Array, "B T D"], w: Params, names: Sequence[str], layout: Layout
) -> tuple[Float[Array, "B T ..."], ...]:
    """The products of the stream with the matrices so named, whose columns `tensor` splits, and their biases. `x` has
    the axes `RESIDUAL`."""
    weights = tuple(w[name] for name in names)
    residual, gathered = (layout.activation(axes, x.shape).spec for axes in (RESIDUAL, GATHERED))
    if layout.splitting(residual[1]) == layout.splitting(gathered[1]):
        products = _products(x, weights, layout)
    else:
        flat = _of_parts(x, tuple(_flat(weight, layout) for weight in weights), layout)
        shapes = ((*x.shape[:2], *weight.shape[1:]) for weight in weights)
        products = tuple(product.reshape(shape) for product, shape in zip(flat, shapes, strict=True))
    return tuple(biased(product, w, name) for product, name in zip(products, names, strict=True))


def addition(
    h: Float[Array, "B T ..."], w: Params, name: str, layout: Layout, contract: int = 1
) -> Float[Array, "B T D"]:
    """What a half adds to the stream: the product with the matrix so named, whose rows `tensor` splits, and its bias.

    It has the axes `RESIDUAL`. Where `context` splits the sequence, it is first said to be whole along `tensor`:
    otherwise the compiler may take a split of the matrix for that of the product, and gather the sequence.
    """
    apart = layout.ways("sequence") > 1
    out = biased(linear(h, w[name], contract, apart=apart), w, name)
    return layout.constrain(layout.constrain(out, *GATHERED) if apart else out, *RESIDUAL)


def _products(x: Float[Array, "B T D"], weights: tuple[Array, ...], layout: Layout) -> tuple[Array, ...]:
    h = layout.constrain(x, *GATHERED)
    return tuple(linear(h, weight, apart=layout.ways("sequence") > 1) for weight in weights)


def _flat(weight: Float[Array, "D ..."], layout: Layout) -> Float[Array, "D N"]:
    """The matrix with one axis of columns, still split along `fsdp`: it is gathered after rounding, and once for the
    products and their gradient where a layer is computed again."""
    return jax.lax.with_sharding_constraint(weight.reshape(len(weight), -1), layout.parameter(MATRIX))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_parts(x: Float[Array, "B T D"], weights: Matrices, layout: Layout) -> tuple[Array, ...]:
    """The products where devices along `tensor` have parts of the sequence."""
    return _products(x, weights, layout)


def _forward(x: Array, weights: Matrices, layout: Layout) -> tuple[tuple[Array, ...], Any]:
    products, of_weights = jax.vjp(lambda weights: _products(x, weights, layout), weights)
    return products, (of_weights, weights)


def _backward(layout: Layout, kept: Any, d_products: tuple[Array, ...]) -> tuple[Array, Matrices]:
    of_weights, weights = kept
    (d_weights,) = of_weights(d_products)
    return _gradient_of_stream(d_products, weights, layout), d_weights


_of_parts.defvjp(_forward, _backward)


def _gradient_of_stream(d_products: tuple[Array, ...], weights: Matrices, layout: Layout) -> Float[Array, "B T D"]:
    """Each device's sum in the type of the products, as on one device; then the sum over devices, dealt out."""
    columns = layout.parameter(MATRIX).spec[1]
    of_products = layout.activation(("batch", "sequence", "mlp")).spec
    shape = *d_products[0].shape[:2], len(weights[0])

    def local(d_products: tuple[Array, ...], weights: Matrices) -> Array:
        d_x = sum(linear(d_product, weight.T) for d_product, weight in zip(d_products, weights, strict=True))
        return jax.lax.psum_scatter(d_x, columns, scatter_dimension=1, tiled=True)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(of_products, PartitionSpec(None, columns)),
        out_specs=layout.activation(RESIDUAL, shape).spec,
        check_vma=False,
    )(d_products, weights)
