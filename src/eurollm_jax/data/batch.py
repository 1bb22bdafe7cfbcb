"""Batch: all that a train step reads. The one type that `data/` and `model/` share."""

from typing import Any, NamedTuple

from jaxtyping import Bool, Int32


class Batch(NamedTuple):
    """B rows of T predictions each. Numpy on the way in, `jax.Array` inside the step; a pytree either way.

    A row holds text of one source. Segment 0 is padding; documents are numbered from 1 within a row, and attention
    stays within a segment. `mask` is False where there is nothing to predict: at padding, and where the target would be
    the first token of the next document.
    """

    tokens: Int32[Any, "B T"]  # model input
    targets: Int32[Any, "B T"]  # tokens shifted left by one
    segments: Int32[Any, "B T"]  # document number within the row, 0 at padding
    positions: Int32[Any, "B T"]  # restart at 0 at each document and at the start of the row
    mask: Bool[Any, "B T"]  # True where the loss counts
    source: Int32[Any, "B"]  # index into the sorted source names of the data
