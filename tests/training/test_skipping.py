"""Steps that are not finite, or whose gradients are spikes, change nothing but the count of steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.param import flatten, init
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.run import train
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.skipping import SkipStep, no_skips
from eurollm_jax.training.step import build_program

from .test_accumulation import batch_for

CONFIG = TransformerConfig(
    vocab_size=64,
    width=16,
    depth=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp=Gated(32),
    max_positions=16,
    compute="float32",
    remat="none",
)
LAYOUT = Layout(MeshConfig().build(jax.devices()[:1]))
POISON = 63  # a token whose embedding is not finite


def program(skip):
    return build_program(
        CONFIG,
        LAYOUT,
        AdamW().build(optax.linear_schedule(1e-2, 0.0, 10), specs(CONFIG)),
        batch_sizes=(16,),
        token_bytes=np.ones(64, np.int32),
        sources=2,
        z_loss=0.0,
        ema=0.9,
        skip=skip,
    )


def batch(seed, *, poisoned=False):
    found = batch_for(seed)
    tokens = np.where(found.tokens == POISON, 0, found.tokens)
    tokens[0, 0] = POISON if poisoned else 0
    return LAYOUT.place_rows(found._replace(tokens=tokens))


def run_through(skip, batches):
    compiled, seen = program(skip), []
    params = init(specs(CONFIG), jax.random.key(0))
    params["embedding"] = params["embedding"].at[POISON].set(jnp.nan)
    state = compiled.start(params)
    states = [jax.device_get(state)]
    for one in batches:
        state, metrics = compiled.train(state, one)
        states.append(jax.device_get(state))
        seen.append(jax.device_get(metrics))
    return states, seen


def assert_same(ours, theirs):
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def test_the_rule_follows_the_mean_of_what_was_taken():
    rule, past, told = SkipStep(factor=3.0, window=4, at_most=2), no_skips(), []
    mean, seen, in_a_row = 0.0, 0, 0
    nan, inf = float("nan"), float("inf")
    norms = [100.0, 1.0, 2.0, nan, 3.0, 1000.0, 2.0, 50.0, 2.0, inf, nan, 1.0, 1.0]
    for number, norm in enumerate(norms):
        loss = nan if number == 6 else 1.0
        usual = seen < 4 or norm <= 3 * mean
        take = np.isfinite(loss) and np.isfinite(norm) and usual
        if take:
            seen = min(seen + 1, 4)
            mean += (norm - mean) / seen
        in_a_row = 0 if take else in_a_row + 1
        taken, past = jax.jit(rule.judge)(jnp.float32(loss), jnp.float32(norm), past)
        told.append(bool(taken))
        assert bool(taken) == take, number
        assert (int(past.seen), int(past.in_a_row)) == (seen, in_a_row)
        assert past.mean_norm == pytest.approx(mean, rel=1e-6)
    assert told == [True, True, True, False, True, False, False, True, True, False, False, True, True]


def test_a_step_that_is_not_finite_changes_nothing_and_the_schedule_goes_on():
    states, seen = run_through(SkipStep(), [batch(0), batch(1, poisoned=True), batch(2)])
    _, before, after, last = states
    assert np.isnan(seen[1].loss)
    assert [int(metrics.skipped) for metrics in seen] == [0, 1, 0]
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert_same((before.params, before.ema), (after.params, after.ema))
    moments, kept = ([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim] for state in (before, after))
    assert_same(moments, kept)
    # The third step's learning rate is that of the third step of a run that took all.
    counts = [leaf for path, leaf in jax.tree.leaves_with_path(last.optimizer) if "count" in jax.tree_util.keystr(path)]
    assert sorted(int(count) for count in counts) == [2, 3]  # of the moments, and of the schedule
    assert np.all(np.isfinite(flatten(last.params)["embedding"][:POISON]))


def test_a_spike_is_skipped_once_the_usual_is_known():
    """A batch that predicts a single token has a far larger gradient than one that predicts dozens."""
    spiky = batch(3)
    mask = np.zeros_like(spiky.mask)
    mask[0, 0] = True
    spiky = spiky._replace(mask=LAYOUT.place_rows(mask))
    _, seen = run_through(SkipStep(factor=2.0, window=2), [spiky, batch(0), batch(1), spiky, batch(2)])
    first, second, third, spike = (float(metrics.grad_norm) for metrics in seen[:4])
    mean = (first + second) / 2
    assert spike > 2 * (mean + (third - mean) / 2)
    assert [int(metrics.skipped) for metrics in seen] == [0, 0, 0, 1, 0]


def test_a_run_in_which_nothing_is_skipped_is_the_same_as_without_the_rule():
    batches = [batch(seed) for seed in range(3)]
    (*_, ours), _ = run_through(SkipStep(), batches)
    (*_, theirs), _ = run_through(None, batches)
    for kept in ("params", "optimizer", "ema"):
        for one, other in zip(*(jax.tree.leaves(getattr(state, kept)) for state in (ours, theirs)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7, err_msg=kept)


def test_too_many_in_a_row_stop_the_run_and_name_the_steps(experiment):
    """The first update is so large that no later step is finite; steps are recorded as they are skipped."""
    broken = dataclasses.replace(
        experiment, schedule=WSD(peak=1e30, warmup=1, decay=0.0), skip=SkipStep(at_most=3), log_every=1
    )
    with pytest.raises(UserError, match=r"steps \d+ to \d+ were skipped, more than 3 in a row; the loss is"):
        train(broken, "")
    records = [json.loads(line) for line in (experiment.run / "metrics.jsonl").read_text().splitlines()]
    skipped = [record for record in records if record["kind"] == "skipped"]
    assert [record["step"] for record in skipped] == list(range(skipped[0]["step"], skipped[0]["step"] + 3))


@pytest.mark.parametrize("wrong", [dict(factor=1.0), dict(window=0), dict(at_most=0)])
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=f"skip: {next(iter(wrong))}="):
        SkipStep(**wrong)
