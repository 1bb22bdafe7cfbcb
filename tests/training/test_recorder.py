"""What a checkpoint keeps of the steps since the last record is what they were, bit for bit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.model.loss import SourceSums
from eurollm_jax.model.moe import Routing
from eurollm_jax.training.metrics import Clock
from eurollm_jax.training.recorder import _decoded, _encoded
from eurollm_jax.training.step import StepMetrics


@pytest.mark.parametrize("loss", [2.7182817, float("nan"), float("inf"), 1e-45])
def test_metrics_of_a_step_survive_json(loss):
    rng = np.random.default_rng(0)
    sources = SourceSums(rng.random(3, np.float32) * 1e7, np.array([1, 2, 3], np.int32), np.array([4, 5, 6], np.int32))
    routing = Routing(rng.random((2, 4), np.float32), rng.random(2, np.float32), rng.random(2, np.float32))
    for spread in (None, routing):
        metrics = StepMetrics(np.float32(loss), np.float32(1 / 3), sources, spread, np.int32(2))
        again = _decoded(json.loads(json.dumps(_encoded(metrics))))
        assert (again.routing is None) == (spread is None)
        for one, other in zip(jnp_leaves(metrics), jnp_leaves(again), strict=True):
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()


def jnp_leaves(metrics):
    fields = [metrics.loss, metrics.grad_norm, *metrics.sources, *(metrics.routing or ()), metrics.skipped]
    return [np.asarray(jnp.asarray(field)) for field in fields]


def test_a_clock_goes_on_with_a_lap():
    before = Clock(10.0)
    before._start -= 5.0  # five seconds ago
    with before.waiting(jnp.zeros(()).block_until_ready()):
        pass
    after = Clock(before.total, before.so_far())
    after.restart()
    seconds, _ = after.lap()
    assert 5.0 <= seconds < 6.0
    assert after.total == 10.0 + seconds
    assert after.lap()[0] < 1.0  # the next lap is its own
