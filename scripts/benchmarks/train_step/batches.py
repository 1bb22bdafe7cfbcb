"""The batches that eurollm_jax trains on beside others."""

import numpy as np
from turns import rows

from eurollm_jax.data.batch import Batch


def batch_of(shape: dict, mean_length: int | None) -> Batch:
    """All rows as one document each, or cut at random into documents of so many tokens on average."""
    tokens, targets = rows(shape)
    starts = np.zeros(tokens.shape, bool)
    if mean_length is not None:
        starts = np.random.default_rng(1).random(tokens.shape) < 1 / mean_length
    starts[:, 0] = True
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    mask = np.roll(~starts, -1, axis=1)
    mask[:, -1] = True
    return Batch(tokens, targets, segments, positions, mask, np.zeros(len(tokens), np.int32))
