"""Which checkpoints stay."""

import itertools
import math
from random import Random

import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.saving import KINDS, Saved, Saving, kept


def stays(found, all_of_them, rule):
    """The rule one sentence at a time, by counting."""
    if not any(other.step > found.step for other in all_of_them):
        return True
    if found.kind == "temporary":
        return False
    permanent = [other for other in all_of_them if other.kind != "temporary"]
    if sum(other.step > found.step for other in permanent) < rule.last:
        return True
    if rule.every and found.step % rule.every == 0:
        return True
    if rule.before_decay and found.kind == "before decay":
        return True
    if found.score is None or not math.isfinite(found.score):
        return False
    scored = [other for other in permanent if other.score is not None and math.isfinite(other.score)]
    better = [other for other in scored if (other.score, other.step) < (found.score, found.step)]
    return len(better) < rule.best


def test_what_stays_is_what_the_rule_says_of_any_history():
    dice = Random(0)
    rules = [
        Saving(last, every, best, before)
        for last, every, best, before in itertools.product((1, 2, 5), (None, 3, 10), (0, 1, 3), (True, False))
    ]
    for _ in range(300):
        steps = dice.sample(range(1, 60), dice.randint(0, 14))
        scores = [None, math.nan, 1.0, 1.5, 1.5, 2.0]
        saved = [Saved(step, dice.choice(KINDS), dice.choice(scores)) for step in steps]
        for rule in dice.sample(rules, 8):
            expected = {found.step for found in saved if stays(found, saved, rule)}
            assert kept(saved, rule) == expected, (saved, rule)


def test_a_run_s_history_one_save_after_the_other():
    """Temporary ones go with the next; the one before the decay and multiples of `every` never go."""
    rule, there, seen = Saving(last=1, every=20), [], []
    for step in range(5, 55, 5):
        kind = "before decay" if step == 30 else "permanent" if step % 10 == 0 else "temporary"
        there = [
            found for found in (*there, Saved(step, kind)) if found.step in kept([*there, Saved(step, kind)], rule)
        ]
        seen.append([found.step for found in there])
    assert seen[:6] == [[5], [10], [10, 15], [20], [20, 25], [20, 30]]
    assert seen[-1] == [20, 30, 40, 50]


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": 0}, {"best": -1}, {"minutes": 0}, {"failures": 0}])
def test_rules_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"saving: {name}="):
        Saving(**wrong)
