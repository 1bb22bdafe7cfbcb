import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.schedule import WSD, Constant, Cosine, Linear


def test_wsd_rises_stays_and_falls():
    rate = WSD(peak=2.0, warmup=10, decay=0.25, final=0.1).build(100)
    steps = np.arange(101)
    expected = np.interp(steps, [0, 10, 75, 100], [0, 2, 2, 0.2])
    np.testing.assert_allclose([float(rate(step)) for step in steps], expected, rtol=1e-5, atol=1e-7)


def test_a_decay_by_the_root_falls_from_the_peak_to_the_end():
    """Hägele et al. 2024, equation of "1-sqrt": 1 - sqrt of the share of the decay that is done."""
    rate = WSD(peak=2.0, warmup=10, decay=0.25, final=0.1, shape="1-sqrt").build(100)
    for step in range(101):
        falling = 0.2 + 1.8 * (1 - np.sqrt(max(step - 75, 0) / 25))
        assert float(rate(step)) == pytest.approx(0.2 * step if step < 10 else falling, rel=1e-5, abs=1e-6)
    assert float(rate(100)) == pytest.approx(0.2)
    assert float(rate(130)) == pytest.approx(0.2)  # and stays there


def test_linear_rises_and_falls():
    rate = Linear(peak=2.0, warmup=10, final=0.1).build(110)
    expected = np.interp(np.arange(111), [0, 10, 110], [0, 2, 0.2])
    np.testing.assert_allclose([float(rate(step)) for step in range(111)], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_constant_is_a_trunk_of_wsd_whatever_its_length(shape):
    """Equal to the bit, so that a decay can branch off."""
    trunk = Constant(peak=3e-3, warmup=7).build(9)
    straight = WSD(peak=3e-3, warmup=7, decay=0.4, shape=shape).build(100)
    for step in range(61):
        assert float(trunk(step)) == float(straight(step))
    assert float(straight(61)) < float(trunk(61))


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in (WSD(2.0, warmup=0), Linear(2.0, warmup=0), Constant(2.0, warmup=0), Cosine(2.0, warmup=0)):
        assert float(schedule.build(100)(0)) == pytest.approx(2.0)


def test_cosine_rises_and_falls():
    rate = Cosine(peak=2.0, warmup=10, final=0.1).build(110)
    for step in range(111):
        falling = 0.2 + 1.8 * (1 + np.cos(np.pi * (step - 10) / 100)) / 2
        assert float(rate(step)) == pytest.approx(0.2 * step if step < 10 else falling, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("schedule", [WSD(1.0, warmup=60, decay=0.5), Cosine(1.0, warmup=100), Linear(1.0, warmup=100)])
def test_a_schedule_that_does_not_fit_is_refused(schedule):
    with pytest.raises(UserError, match="warm-up"):
        schedule.build(100)
