"""Which processes the others wait for, out of what each has measured."""

import numpy as np
import pytest

from eurollm_jax.training.slow_hosts import slow, slow_hosts

NAN = np.nan


def test_a_device_that_takes_longer_and_a_process_that_waits_longer_are_named():
    products = np.array([[0.010, 0.011], [0.010, 0.016], [0.009, NAN], [0.010, 0.010]])
    waits = np.array([1.0, 1.2, 1.1, 9.0])  # beyond 1.5 times the second lowest, and 1 s
    (first, one), (second, other) = slow(waits, products, 100.0)
    assert (first, second) == (1, 3)
    assert "takes 16 ms on its device 1 for a product that takes 10 ms as a rule" in one
    assert "waited 9 s of 100 for data, and others 1.1 s as a rule" in other


def test_of_two_processes_the_slower_one_is_named():
    (found,) = slow(np.array([0.0, 0.0]), np.array([[0.02], [0.01]]), 100.0)
    assert found[0] == 0


@pytest.mark.parametrize(
    ("waits", "products"),
    [
        ([0.0, 0.0, 0.9], [[1.0], [1.0], [1.0]]),  # less than one per cent of the time
        ([30.0, 31.0, 29.0], [[1.0], [1.0], [1.0]]),  # all wait alike
        ([0.0, 0.0, 0.0], [[1.0], [1.49], [0.2]]),
        ([5.0], [[7.0]]),
    ],
)
def test_what_slows_nobody_down_is_not_named(waits, products):
    assert slow(np.array(waits), np.array(products), 100.0) == []


def test_one_process_measures_itself_and_is_not_slower_than_itself():
    record = slow_hosts(0.5, 10.0)
    assert record["data_wait_seconds"] == [0.5]
    ((seconds,),) = record["product_seconds"]
    assert 0 < seconds < 10
    assert record["slow"] == []
