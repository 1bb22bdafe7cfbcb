"""Copies by tiles are numpy's, whatever is transposed, cut and rounded."""

import ml_dtypes
import numpy as np
import pytest

from eurollm_jax.hf.transposing import copy_to, row_blocks

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SPECIAL = [
    np.nan,
    -np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1e-45,
    6e-8,
    65519.9,
    65520.0,
    3.3961775e38,
    1.00390625,
    1.01171875,
]
SHAPES = [(), (0,), (5,), (0, 3), (3, 0), (1, 7), (7, 1), (300, 520), (520, 300), (256, 512), (70, 3, 90), (3, 2, 1, 4)]


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_every_way_of_lying_in_memory(dtype, wanted):
    dice = np.random.default_rng(0)
    for shape in SHAPES:
        with np.errstate(over="ignore"):
            values = np.asarray(10 ** dice.uniform(-46, 38, shape) * dice.choice([-1, 1], shape), np.float32)
            values.reshape(-1)[: len(SPECIAL)] = SPECIAL[: values.size]
            values = np.asarray(values, dtype)
            expected = np.asarray(values, wanted)
        last_first = np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 0, -1)), -1, 0) if shape else values
        padded = np.zeros([size + 3 for size in shape], dtype)[(*(slice(1, size + 1) for size in shape), ...)]
        padded[...] = values
        for value in (values, last_first, np.asfortranarray(values), padded):
            turned = np.empty(shape[1:] + shape[:1], wanted)
            part = np.empty([size + 5 for size in shape], wanted)[(*map(slice, shape), ...)]
            for out in (np.empty(shape, wanted), np.moveaxis(turned, -1, 0) if shape else turned, part):
                copy_to(out, value)
                assert same_bits(out, expected), (shape, value.strides, out.strides)


def test_blocks_cover_all_rows_in_equal_parts():
    assert row_blocks(()) == row_blocks((0, 5)) == row_blocks((4096, 4096)) == [()]
    for shape in ((128_256, 2048), (4097, 4096), (3, 1 << 25)):
        parts = [part for (part,) in row_blocks(shape)]
        sizes = [part.stop - part.start for part in parts]
        assert [part.start for part in parts] == np.cumsum([0, *sizes[:-1]]).tolist()
        assert sum(sizes) == shape[0]
        assert len(set(sizes[:-1])) == 1
        assert 0 < sizes[-1] <= sizes[0]
        assert sizes[0] == 1 or 4 * sizes[0] * np.prod(shape[1:]) <= 64 << 20
