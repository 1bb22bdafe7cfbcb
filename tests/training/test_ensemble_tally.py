"""What a tally makes of measurements made up by hand: which members have diverged, and from when on."""

import math
from dataclasses import replace

import numpy as np
import pytest

from eurollm_jax.data.mixture import Mixture
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.model.loss import SourceSums
from eurollm_jax.training.ensemble_inputs import open_ensemble
from eurollm_jax.training.ensemble_tally import BEYOND, FAR_BEYOND, Tally
from eurollm_jax.training.schedule import WSD
from tests.training.ensembles import BASE, member, shared_by

GUESS = math.log(640)  # the vocabulary of tests/conftest.py
LIMIT = GUESS + BEYOND
LOW, HIGH = LIMIT - 0.01, LIMIT + 0.01
READS = np.array([[0.5, 0.3], [1.0, 0.0], [0.0, 0.0]])  # of de and el; the third reads neither


@pytest.fixture(scope="module")
def shared(tiny, tokenizer, store, heldout, tmp_path_factory):
    return shared_by(tiny, tokenizer, store, heldout, tmp_path_factory.mktemp("alone"))


def told(shared, per_token, step=5, complete=False, warmup=2):
    """Why members have diverged that cost so many nats of a token of de and of el, of 10 and 30 tokens."""
    members = [member(shared, n, schedule=WSD(1e-3, warmup)) for n in range(len(per_token))]
    tally = Tally(members, ["de", "el"], READS[: len(members)], Tally.before(len(members)))
    tokens = np.tile([10, 30], (len(members), 1))
    sums = SourceSums(np.array(per_token) * tokens, tokens, np.tile([20, 90], (len(members), 1)))
    found = tally.measured(step, sums, complete=complete)
    assert [one.diverged for one in found] == [tally.diverged.get(one.name, "") for one in members]
    return [one.diverged for one in found]


@pytest.mark.parametrize("complete", [False, True])
def test_who_costs_more_than_a_guess_has_diverged(shared, complete):
    """In proportion to what is read: 5 parts of de and 3 of el."""
    assert told(shared, [[LIMIT - 0.03, LIMIT + 0.049]], complete=complete) == [""]
    (why,) = told(shared, [[LIMIT - 0.03, LIMIT + 0.051]], complete=complete)
    assert why.startswith("by step 5 held-out text costs 4.")
    (why,) = told(shared, [[1e5, 1e5]], complete=complete)
    size = (5 * 2 + 3 * 3) / 8  # bytes of a token
    found, guess = bits_per_byte(1e5, 1) / size, bits_per_byte(GUESS, 1) / size
    assert why == (
        f"by step 5 held-out text costs {found:,.0f} bits per byte, more than a uniform guess would ({guess:.3g})"
    )
    assert found > 50_000


def test_what_a_member_does_not_read_is_no_sign(shared):
    """Unless it reads nothing that is held out, and costs ten times a guess."""
    far = FAR_BEYOND * GUESS
    assert told(shared, [[1, 1], [LOW, 20 * GUESS], [far - 1, far - 1]]) == ["", "", ""]
    sound, one, other = told(shared, [[LOW, LOW], [HIGH, 0], [far + 1, far + 1]])
    assert not sound
    assert "uniform guess" in one
    assert "uniform guess" in other


def test_a_fresh_model_is_sound_and_nobody_is_judged_within_the_warm_up(shared):
    assert told(shared, [[GUESS + 0.5] * 2]) == [""]
    assert told(shared, [[1e3] * 2], step=5, warmup=5) == [""]
    assert told(shared, [[1e3] * 2], step=6, warmup=5) != [""]
    assert told(shared, [[1e3] * 2], step=5, warmup=5, complete=True) != [""]


def test_what_is_not_finite_is_said_so(shared):
    not_a_number, infinite, sound = told(shared, [[math.nan, 1], [math.inf, 1], [1, 1]])
    assert not_a_number == infinite == "by step 5 the loss on held-out text is not finite"
    assert not sound


def test_what_members_read_of_the_languages_that_are_held_out(shared):
    """Shares of rows by language, over all stages."""
    half = BASE.without("el").stage(at_row=48, mixture=Mixture.shares({"el": 0.25, "bg": 0.75}))
    members = [replace(one, data=replace(one.data, mixture=half)) if one.seed == 5 else one for one in
               (member(shared, 0), member(shared, 1))]  # fmt: skip
    inputs = open_ensemble(members)
    assert [source.language for source in inputs.shared.heldout.sources] == ["de", "el", "mt"]
    for data, found in zip(inputs.data, inputs.reads, strict=True):
        names = [data.source_names[data.batch(row, 1).source[0]] for row in range(96)]
        counted = [names.count(name) / 96 for name in ("de", "el", "mt")]
        np.testing.assert_allclose(found, counted, atol=2 / 96)
    assert inputs.reads[1, 1] == pytest.approx(0.125, abs=0.02)
