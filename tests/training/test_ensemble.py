"""Members of an ensemble learn what they learn alone, read what they read alone, and survive each other and kills."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import eurollm_jax.training.ensemble as ensemble
from eurollm_jax.data.loader import open_data
from eurollm_jax.errors import StoppedError
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.training.ensemble import train_ensemble
from eurollm_jax.training.ensemble_inputs import open_ensemble
from eurollm_jax.training.ensemble_measurements import read_measurements
from eurollm_jax.training.run import train
from tests.processes import state_of
from tests.training.ensembles import HIGH, ROWS, STEPS, WILD, member, shared_by

TOLERANCE = 1e-6  # products of several models at once are summed in another order than those of one: bits differ


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Sums over devices are taken in another order than those on one."""
    with pytest.MonkeyPatch.context() as patch:
        only = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *backend: only)
        patch.setattr("eurollm_jax.training.run.sample", lambda *of: [])
        yield


@pytest.fixture(scope="module")
def shared(tiny, tokenizer, store, heldout, tmp_path_factory):
    """Its runs are of this module."""
    return shared_by(tiny, tokenizer, store, heldout, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def members(shared):
    """Of these the first and the last diverge."""
    first, last = member(shared, 0, schedule=HIGH), member(shared, 3, schedule=WILD)
    return [first, member(shared, 1), member(shared, 2), last]


@pytest.fixture(scope="module")
def alone(members):
    """The run directories of the second and the third, trained alone."""
    return {number: train(members[number], "") for number in (1, 2)}


@pytest.fixture(scope="module")
def together(members, tmp_path_factory):
    """The folder of all four, trained at once without a stop."""
    folder = tmp_path_factory.mktemp("together") / "four"
    train_ensemble(members, folder, question="Which?")
    return folder


def lines(path, *kinds):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["kind"] in kinds]


def records(folder):
    timed = {"seconds", "tokens_per_second", "mfu", "data_wait"}
    found = lines(folder / "metrics.jsonl", "train")
    return [{name: value for name, value in line.items() if name not in timed} for line in found]


def assert_same_outcome(one, other):
    assert (one / "measurements.jsonl").read_text() == (other / "measurements.jsonl").read_text()
    assert records(one) == records(other)
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def assert_learnt_alone(folder, place, experiment, run):
    """Member number `place` of the folder's against its own run: losses, weights, what it read, what was measured."""
    losses = {line["step"]: line["losses"][experiment.name] for line in lines(folder / "metrics.jsonl", "train")}
    of_run = {line["step"]: line for line in lines(run / "metrics.jsonl", "train")}
    assert losses.keys() == of_run.keys() == {3, 6, 9, 12}
    for step, loss in losses.items():
        assert loss == pytest.approx(of_run[step]["loss"], rel=TOLERANCE)
    stacked, state = state_of(folder), state_of(run)
    assert stacked.keys() == state.keys()
    for path, value in state.items():
        np.testing.assert_allclose(stacked[path][place], value, rtol=0, atol=TOLERANCE, err_msg=path)
    measured = [one for one in read_measurements(folder) if one.member == experiment.name]
    assert [(one.step, one.complete) for one in measured] == [(5, False), (10, False), (12, False), (12, True)]
    assert [one.rows for one in measured] == [40, 80, 96, 96]
    assert not any(one.diverged for one in measured)
    assert measured[-1].tokens == of_run[12]["tokens"]
    evaluations = {line["step"]: line["bits_per_byte"] for line in lines(run / "metrics.jsonl", "evaluation")}
    evaluated = json.loads((run / "evaluation.json").read_text())["languages"]
    for one in measured:  # each held-out source here is a language
        for name, nats in one.nats.items():
            expected = evaluated[name]["bits_per_byte"] if one.complete else evaluations[one.step][name]
            assert bits_per_byte(nats, one.bytes[name]) == pytest.approx(expected, rel=TOLERANCE)
            if one.complete:
                assert (one.bytes[name], one.tokens_heldout[name]) == (
                    evaluated[name]["bytes"],
                    evaluated[name]["tokens"],
                )


def test_members_of_four_learn_what_they_learn_alone(members, alone, together):
    """Two of them diverge meanwhile."""
    for place, run in alone.items():
        assert_learnt_alone(together, place, members[place], run)


@pytest.mark.slow
def test_members_of_two_do_so_too(members, alone, tmp_path):
    train_ensemble([members[2], members[1]], tmp_path / "two", question="")
    assert_learnt_alone(tmp_path / "two", 0, members[2], alone[2])
    assert_learnt_alone(tmp_path / "two", 1, members[1], alone[1])


@pytest.mark.slow
def test_four_sound_members_learn_what_they_learn_alone(shared, tmp_path):
    members = [member(shared, number, name=f"sound-{number}") for number in range(4)]
    train_ensemble(members, tmp_path / "four", question="")
    for place, one in enumerate(members):
        assert_learnt_alone(tmp_path / "four", place, one, train(one, ""))


@pytest.mark.slow
def test_who_is_beside_a_member_changes_no_bit_of_it(shared, members, tmp_path):
    """In a program of as many members."""
    for other in (0, 3):
        train_ensemble([members[1], member(shared, other)], tmp_path / f"beside-{other}", question="")
    theirs = state_of(tmp_path / "beside-3")
    for path, value in state_of(tmp_path / "beside-0").items():
        np.testing.assert_array_equal(value[0], theirs[path][0], err_msg=path)


@pytest.mark.slow
def test_one_after_the_other_gives_the_same_numbers(members, together, tmp_path):
    for one in members[1:3]:
        of_all = [m for m in read_measurements(together) if m.member == one.name]
        for ours, theirs in zip(train_ensemble([one], tmp_path / one.name, question=""), of_all, strict=True):
            assert dataclasses.replace(ours, nats={}) == dataclasses.replace(theirs, nats={})
            assert ours.nats == pytest.approx(theirs.nats, rel=TOLERANCE)


def test_every_member_reads_the_rows_of_its_own_run(members):
    """What the ensemble trains on, byte for byte against what each experiment opens by itself."""
    own = [open_data(experiment.data, experiment.total_rows) for experiment in members]
    inputs, at = open_ensemble(members), 0
    for after, batch in inputs.rows.batches(members[0].batch_sizes, members[0].total_rows):
        for place, data in enumerate(own):
            for field, expected in zip(batch, data.batch(at, ROWS), strict=True):
                np.testing.assert_array_equal(field[place], expected)
        at = after
    assert at == STEPS * ROWS


def test_a_language_less_changes_no_byte_of_the_others(members):
    """The first member's rows of each language, and the second's, which has one language less."""
    inputs, first = open_ensemble(members[:2]), 0
    assert "el" in inputs.data[0].source_names
    order = [{name: [] for name in data.source_names} for data in inputs.data]
    for after, batch in inputs.rows.batches(members[0].batch_sizes, members[0].total_rows):
        for i, data in enumerate(inputs.data):
            for place in np.argsort(data.order.batch_rows(first, ROWS)):
                row = [np.asarray(field[i, place]) for field in batch]
                order[i][data.source_names[row[-1]]].append(b"".join(field.tobytes() for field in row))
        first = after
    assert order[0].pop("el")
    assert not order[1].pop("el")
    for name, rows in order[0].items():
        other = order[1][name]
        both = min(len(rows), len(other))
        assert both
        assert rows[:both] == other[:both]


def broken_off(monkeypatch, at, error):
    """From now on the step function fails before step `at`, once."""
    compiled = ensemble._compiled

    def failing(run, sizes, writer):
        steps = compiled(run, sizes, writer)

        def fail(step):
            def run_step(state, batch):
                if int(state.step[0]) == at - 1:
                    monkeypatch.undo()
                    error()
                return step(state, batch)

            return run_step

        return {size: fail(step) for size, step in steps.items()}

    monkeypatch.setattr(ensemble, "_compiled", failing)


class Killed(Exception):
    pass


def killed():
    raise Killed


def starts(folder):
    """The steps at which it was begun or gone on with."""
    return [line["step"] for line in history(folder) if line["event"] == "start"]


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_an_ensemble_that_breaks_off_and_is_stopped_leaves_what_an_undisturbed_one_does(
    members, together, tmp_path, monkeypatch
):
    """After a measurement and a record that no checkpoint has; then by a signal between checkpoints."""
    folder = tmp_path / "four"
    broken_off(monkeypatch, 11, killed)
    with pytest.raises(Killed):
        train_ensemble(members, folder, question="Which?")
    assert max(one.step for one in read_measurements(folder)) == 10
    assert records(folder)[-1]["step"] == 9
    broken_off(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match=r"stopped after step 8 of 12 by SIGTERM; all is saved in .*four"):
        train_ensemble(members, folder, question="Which?")
    assert max(one.step for one in read_measurements(folder)) == 5
    train_ensemble(members, folder, question="Which?")
    assert_same_outcome(folder, together)
    assert starts(folder) == [0, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 7])
def test_also_where_it_breaks_off_elsewhere(members, together, tmp_path, monkeypatch, at):
    """Before the first checkpoint, and just after one."""
    folder = tmp_path / "four"
    broken_off(monkeypatch, at, killed)
    with pytest.raises(Killed):
        train_ensemble(members, folder, question="Which?")
    train_ensemble(members, folder, question="Which?")
    assert_same_outcome(folder, together)
    assert starts(folder) == [0, {2: 0, 7: 6}[at]]


@pytest.mark.slow
def test_a_time_limit_ends_it_before_it_is_over(members, tmp_path):
    with pytest.raises(StoppedError, match="by its time limit"):
        train_ensemble(members, tmp_path / "four", question="", time_limit=1000, began=time.perf_counter() - 980)
    assert (tmp_path / "four" / "checkpoints" / "1").is_dir()


def test_a_kill_within_the_last_measurement_has_it_taken_again(members, together, tmp_path):
    """Some members' lines are there and one is cut short; the last checkpoint is sound."""
    folder = tmp_path / "four"
    shutil.copytree(together, folder)
    path = folder / "measurements.jsonl"
    path.write_text(path.read_text()[:-500])
    assert 0 < sum(one.complete for one in read_measurements(folder)) < len(members)
    train_ensemble(members, folder, question="Which?")
    assert_same_outcome(folder, together)


def test_a_finished_ensemble_is_not_built_again(members, together, monkeypatch):
    monkeypatch.setattr(ensemble, "build_ensemble", lambda *of, **named: pytest.fail("it was built"))
    assert train_ensemble(members, together, question="Which?") == read_measurements(together)


def test_what_the_folder_says_of_it(members, alone, together):
    record = json.loads((together / "ensemble.json").read_text())
    assert record["question"] == "Which?"
    assert record["identity"]["members"] == [one.name for one in members]
    for number, run in alone.items():
        of_run = json.loads((run / "experiment.json").read_text())
        assert record["fingerprints"][members[number].name] == of_run["fingerprint"]
        assert record["experiments"][members[number].name] == of_run["experiment"]
        assert record["versions"] == of_run["versions"]


NOT_FINITE = r"at step (\d+) the loss is \S+ and the gradient's norm (nan|inf)"
USELESS = r"by step (\d+) held-out text costs \S+ bits per byte, more than a uniform guess would \(\d\.\d+\)$"


def assert_told_apart(folder, name, others, said=NOT_FINITE):
    """The step from which on the member is known to have diverged."""
    (end,) = (line for line in history(folder) if line["event"] == "end")
    why = end["diverged"][name]
    assert not end["diverged"].keys() & set(others)
    step = int(re.match(said, why).group(1))
    assert 1 < step < STEPS
    for one in read_measurements(folder):
        if one.member not in (name, *others):
            continue
        assert one.diverged == (why if one.member == name and one.step >= step else "")
    last = lines(folder / "metrics.jsonl", "train")[-1]
    assert name in last["diverged"]
    assert (last["losses"][name] is None) == (said == NOT_FINITE)
    assert last["loss"] == pytest.approx(np.mean([last["losses"][other] for other in others]))
    return step


def test_a_member_that_diverges_is_told_apart(together):
    """That the others are what they are alone is seen above. From the third step on all are skipped, three of them
    without being called diverged."""
    assert assert_told_apart(together, "member-3", ["member-1", "member-2"]) == 6


def test_so_is_one_whose_losses_stay_finite(together):
    assert assert_told_apart(together, "member-0", ["member-1", "member-2"], USELESS) == 5


@pytest.mark.slow
def test_also_where_no_step_is_skipped_and_it_is_said_at_once(shared, tmp_path, caplog):
    shared = dataclasses.replace(shared, skip=None)
    members = [member(shared, 0, schedule=WILD), member(shared, 1)]
    with caplog.at_level("ERROR", "eurollm_jax"):
        train_ensemble(members, tmp_path / "two", question="")
    assert assert_told_apart(tmp_path / "two", "member-0", ["member-1"]) == 3
    (said,) = (record.message for record in caplog.records if "DIVERGED" in record.message)
    assert said.startswith("MEMBER member-0 HAS DIVERGED: at step 3 the loss is ")
    assert_learnt_alone(tmp_path / "two", 1, members[1], train(dataclasses.replace(members[1], runs=str(tmp_path)), ""))


@pytest.mark.slow
def test_batches_may_grow(shared, tmp_path):
    ramped = dataclasses.replace(shared, batch_ramp=((20, 16), (60, 24)), runs=str(tmp_path / "alone"))
    members = [member(ramped, number) for number in (0, 1)]
    found = train_ensemble(members, tmp_path / "ramped", question="")
    own = state_of(train(members[1], ""))
    for path, value in state_of(tmp_path / "ramped").items():
        np.testing.assert_allclose(value[1], own[path], rtol=0, atol=TOLERANCE, err_msg=path)
    assert {one.rows for one in found if one.complete} == {3 * 8 + 3 * 16 + 6 * 24}
