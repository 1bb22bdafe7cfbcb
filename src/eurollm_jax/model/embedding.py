"""The look-up of tokens in a table of which each device holds a part: some of the vocabulary, and some of the width.

The table never crosses the network, nor does its gradient in one piece: the devices that share its columns tell each
other their tokens, each looks up what it holds, and what was found is what they exchange.

Shapes: B batch, T sequence, D embed, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eurollm_jax.parallel.mesh import Layout


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any, layout: Layout) -> Float[Array, "B T D"]:
    """The rows of the tokens in `dtype`, laid out as the residual stream is. A token beyond the table is all zeros.

    Rows are looked up before they are cast: the table's gradient is then summed in its own type. In bfloat16 a token's
    sum stops growing at 256.
    """
    held = layout.parameter(("vocab", "embed")).spec
    rows = layout.activation(("batch", "sequence"), tokens.shape).spec
    residual = layout.activation(("batch", "residual_sequence", "embed"), (*tokens.shape, table.shape[1])).spec
    vocab_axes, embed_axes = (layout.splitting(axes) for axes in held)
    splits_sequence = layout.splitting(residual[1]) != layout.splitting(rows[1])

    def local(table: Array, tokens: Array) -> Array:
        tokens = jax.lax.all_gather(tokens, embed_axes, axis=0, tiled=True)
        place = tokens - len(table) * jax.lax.axis_index(vocab_axes)
        elsewhere = (place < 0) | (place >= len(table))
        found = table.at[jnp.where(elsewhere, len(table), place)].get(mode="fill", fill_value=0).astype(dtype)
        # One device has found each row, and zeros are added to it.
        if splits_sequence:
            found = jax.lax.psum_scatter(found, vocab_axes, scatter_dimension=1, tiled=True)
        else:
            found = jax.lax.psum(found, vocab_axes)
        if not embed_axes:
            return found
        return jax.lax.all_to_all(found, embed_axes, split_axis=0, concat_axis=2, tiled=True)

    if not layout.splitting(layout.mesh.axis_names):
        return local(table, tokens)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=(held, rows), out_specs=residual, check_vma=False)(
        table, tokens
    )
