"""Which steps may be profiled; test_loop.py reads a profile."""

import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.trace import Trace


def test_steps_are_named_by_the_first_and_the_last():
    assert Trace.parse("20:23") == Trace(20, 23)
    assert Trace.parse("7:7") == Trace(7, 7)


@pytest.mark.parametrize("text", ["20", "20-23", "23:20", "0:3", ":3", "3:", "a:b", "-1:3", "1:2:3", ""])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match=r"name the first and the last step, counted from 1, such as 20:23\."):
        Trace.parse(text)


def test_only_steps_that_are_still_to_be_trained_can_be_traced():
    Trace(1, 12).require_within(0, 12)
    Trace(5, 6).require_within(4, 12)
    for trace, done, left in [
        (Trace(11, 13), 0, "the run has 12 steps, of which 1 to 12 are left: name some of those"),
        (Trace(4, 6), 4, "5 to 12 are left"),
        (Trace(12, 12), 12, "none is left"),
    ]:
        with pytest.raises(UserError, match=left):
            trace.require_within(done, 12)
