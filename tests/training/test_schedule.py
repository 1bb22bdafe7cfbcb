import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.schedule import WSD, Cosine


def test_wsd_rises_stays_and_falls():
    rate = WSD(peak=2.0, warmup=10, decay=0.25, final=0.1).build(100)
    steps = np.arange(101)
    expected = np.interp(steps, [0, 10, 75, 100], [0, 2, 2, 0.2])
    np.testing.assert_allclose([float(rate(step)) for step in steps], expected, rtol=1e-5, atol=1e-7)


def test_cosine_rises_and_falls():
    rate = Cosine(peak=2.0, warmup=10, final=0.1).build(110)
    for step in range(111):
        falling = 0.2 + 1.8 * (1 + np.cos(np.pi * (step - 10) / 100)) / 2
        assert float(rate(step)) == pytest.approx(0.2 * step if step < 10 else falling, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("schedule", [WSD(1.0, warmup=60, decay=0.5), Cosine(1.0, warmup=100)])
def test_a_schedule_that_does_not_fit_is_refused(schedule):
    with pytest.raises(UserError, match="warm-up"):
        schedule.build(100)
