"""Memory for batches that is used again once nobody holds it.

A batch is megabytes that are written once. Fresh from the kernel, every page of it costs a fault: measured on a virtual
machine, that took longer than reading and packing the rows.
"""

import weakref
from collections import deque

import numpy as np
from jaxtyping import UInt8

from eurollm_jax.data.batch import Batch

_free: deque[memoryview] = deque(maxlen=8)  # append and pop are atomic, and the deque lets go of the oldest


def empty_batch(rows: int, length: int) -> Batch:
    """A batch that holds anything. Its memory is used for another once no array on it is left."""
    places = rows * length
    block = _take(17 * places)
    tokens, targets, segments, positions = block[: 16 * places].view(np.int32).reshape(4, rows, length)
    mask = block[16 * places :].view(np.bool_).reshape(rows, length)
    return Batch(tokens, targets, segments, positions, mask, np.empty(rows, np.int32))


def _take(size: int) -> UInt8[np.ndarray, " size"]:
    try:
        block = _free.pop()
    except IndexError:
        block = None
    if block is None or len(block) != size:  # the shape of batches has changed; the old ones go, one by one
        block = memoryview(np.empty(size, np.uint8))
    array = np.frombuffer(block, np.uint8)
    # Arrays made from this one refer to it, and it refers to the block: when it dies, nobody can see the block.
    weakref.finalize(array, _free.append, block).atexit = False
    return array
