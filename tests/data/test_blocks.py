"""A batch's memory is used again when nobody can see it any more, and never before."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.data.blocks import empty_batch
from eurollm_jax.data.loader import Data, DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.parallel.mesh import Layout, MeshConfig

ROWS, LENGTH = 16, 64


def filled(value, rows=ROWS, length=LENGTH):
    batch = empty_batch(rows, length)
    for field in batch:
        field.fill(value)
    return batch


def overwrite_what_is_free():
    """Fills more blocks than are ever kept; returns where they lie."""
    return {batch.tokens.ctypes.data for batch in [filled(1) for _ in range(12)]}


def aligned_batch():
    """A batch that jax on a CPU takes over without copying it: its memory begins at a multiple of 64."""
    batches = (empty_batch(ROWS, LENGTH) for _ in itertools.count())
    passed = []  # alive, so that another place is tried each time
    for batch in batches:
        if batch.tokens.ctypes.data % 64 == 0:
            return batch
        passed.append(batch)
    raise AssertionError


def test_the_memory_of_a_batch_that_is_gone_is_used_again():
    batch = filled(0)
    place = batch.tokens.ctypes.data
    del batch
    assert place in overwrite_what_is_free()


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch.tokens,
        lambda batch: batch.targets[3, 5:].T,
        lambda batch: batch.mask.reshape(-1)[7:].view(np.uint8),
        lambda batch: memoryview(batch.segments)[2:],
        lambda batch: np.from_dlpack(batch.positions),
        lambda batch: np.asarray(batch.positions[::2]),
        lambda batch: batch.tokens.flat,
    ],
    ids=["field", "view", "other-type", "memoryview", "dlpack", "slice", "iterator"],
)
def test_the_memory_stays_while_anything_of_the_batch_is_held(keep):
    batch = filled(0)
    place, kept = batch.tokens.ctypes.data, keep(batch)
    del batch
    assert place not in overwrite_what_is_free()
    assert not np.any(np.asarray(kept))


def test_arrays_of_jax_that_share_the_memory_keep_it():
    """On a CPU jax copies nothing where the memory is aligned, and it still reads when the call has returned."""
    batch = aligned_batch()
    for field in batch:
        field.fill(3)
    place = batch.tokens.ctypes.data
    alone, dealt = jax.device_put(batch.tokens), Layout(MeshConfig().build()).place_rows(batch.tokens)
    assert alone.unsafe_buffer_pointer() == dealt.addressable_shards[0].data.unsafe_buffer_pointer() == place

    @jax.jit
    def late(tokens, x):  # the tokens are needed last
        return jnp.sum(tokens) + 0 * jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x).sum()

    under_way = late(alone, jnp.ones((256, 256)))
    del batch, field, alone
    assert place not in overwrite_what_is_free()
    assert float(under_way) == 3 * ROWS * LENGTH
    np.testing.assert_array_equal(dealt, np.full((ROWS, LENGTH), 3))
    under_way = late(dealt, jnp.ones((256, 256)))
    del dealt
    overwrite_what_is_free()
    assert float(under_way) == 3 * ROWS * LENGTH


def test_steps_under_way_see_their_own_batch_while_threads_read_ahead(memory_store):
    """Each result is fetched only when all batches have been read, as the loop of a run fetches it late."""
    data = Data.from_stores([memory_store], DataConfig("unused", Mixture.temperature(0.5), LENGTH), 3000)
    layout, size, steps = Layout(MeshConfig().build()), 16, 60

    @jax.jit
    def sums(batch, x):
        slow = jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y), x).sum()
        return [jnp.sum(field, dtype=jnp.int32) + jnp.int32(0 * slow) for field in batch]

    x = jnp.ones((128, 128))
    found = [
        sums(layout.place_rows(batch), x)
        for _, batch in data.loader(0, size, stop_row=size * steps, threads=3, ahead=4)
    ]
    expected = [[int(field.sum()) for field in data.batch(first, size)] for first in range(0, size * steps, size)]
    assert [[int(value) for value in line] for line in found] == expected
