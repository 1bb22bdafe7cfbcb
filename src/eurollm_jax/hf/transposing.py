"""Copies of transposed arrays, several times as fast as numpy's: by tiles, so that what is read stays in the cache.

Nearly every weight is transposed on the way in and out, which would otherwise take longer than all the rest together.
"""

import math
from collections.abc import Sequence

import numpy as np

_TILE = 256  # rows and columns; 64 to 512 are about as fast
_BLOCK_BYTES = 64 << 20


def copy_to(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value` for arrays of one shape, rounded to the type of `out`; either may be a transposed view.

    What the type of `out` cannot hold becomes infinite without a warning.
    """
    with np.errstate(over="ignore"):
        if _by_columns(value) and _by_rows(out):
            _by_tiles(out.reshape(len(out), -1), value.reshape(len(out), -1))
        elif _by_columns(out) and _by_rows(value):
            _by_tiles(out.reshape(len(out), -1).T, value.reshape(len(out), -1).T)
        else:
            np.copyto(out, value, casting="unsafe")


def row_blocks(shape: Sequence[int]) -> list[tuple[slice, ...]]:
    """Indices that cut a float32 array into rows of about 64 MiB, all as many but the last; `[()]` for a smaller one.

    An embedding may be as large as a whole shard of a file, so that in float32 it would be twice that.
    """
    size = 4 * math.prod(shape)
    if size <= _BLOCK_BYTES:
        return [()]
    some = max(1, shape[0] * _BLOCK_BYTES // size)
    return [(slice(at, min(at + some, shape[0])),) for at in range(0, shape[0], some)]


def _by_rows(array: np.ndarray) -> bool:
    """Whether it is a matrix in row order, or part of one; here and below a row may have several dimensions itself."""
    return array.flags.c_contiguous or (array.ndim == 2 and array.strides[1] == array.itemsize)


def _by_columns(array: np.ndarray) -> bool:
    turned = np.moveaxis(array, 0, -1) if array.ndim > 1 else array
    return array.size > 0 and not array.flags.c_contiguous and _by_rows(turned)


def _by_tiles(out: np.ndarray, value: np.ndarray) -> None:
    """Of a matrix in row order and one in column order; the narrower of both types is the one that is moved."""
    rows, columns = value.shape
    down, across = ([slice(at, at + _TILE) for at in range(0, size, _TILE)] for size in value.shape)
    if out.itemsize < value.itemsize:
        for some in across:
            strip = value[:, some].astype(out.dtype)  # stays in column order
            for part in down:
                out[part, some] = strip[part]
    elif out.dtype != value.dtype:
        strip = np.empty((min(_TILE, rows), columns), value.dtype)
        for part in down:
            turned = strip[: len(out[part])]
            for some in across:
                turned[:, some] = value[part, some]
            np.copyto(out[part], turned, casting="unsafe")
    else:
        for part in down:
            for some in across:
                out[part, some] = value[part, some]
