"""An experiment's fields from the command line, in its record, and in what makes two runs the same."""

import argparse
import dataclasses
import json

import pytest

from eurollm_jax.cli.arguments import experiment_of
from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.data.removal import Removal
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import claim_run, encode, identity, read_record, recorded_model


@pytest.fixture
def overridden(experiment, tmp_path):
    """The experiment as a command line with these fields changes it."""

    def parse(experiment, *fields):
        module = tmp_path / "experiments" / "changed.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(
            "from eurollm_jax.experiment import *\n"
            "from eurollm_jax.model.config import *\n"
            "from eurollm_jax.data.loader import DataConfig\n"
            "from eurollm_jax.data.removal import Removal\n"
            f"EXPERIMENT = {experiment!r}\n"
        )
        parser = argparse.ArgumentParser(prog="eurollm train")
        return experiment_of(argparse.Namespace(experiment=module, fields=list(fields), parser=parser))[0]

    return parse


def test_nested_fields_are_set_from_the_command_line(experiment, overridden):
    data = dataclasses.replace(experiment.data, store=("one", "two"), removed=(Removal("gone.txt", 40),))
    experiment = dataclasses.replace(experiment, data=data, batch_ramp=((24, 16),))
    assert overridden(experiment) == experiment
    assert overridden(experiment, "--data.workers", "2").data == dataclasses.replace(data, workers=2)
    assert overridden(experiment, "--data.packing", "best-fit").data == dataclasses.replace(data, packing="best-fit")
    assert overridden(experiment, "--data.store", "three").data.store == "three"
    assert overridden(experiment, "--data.store", "three", "four").data.store == ("three", "four")
    assert overridden(experiment, "--batch-ramp", "8", "16", "40", "32").batch_ramp == ((8, 16), (40, 32))
    limits = overridden(experiment, "--parity.max-premium", "3", "--parity.allow", "ka", "hy").parity
    assert limits == Parity(max_premium=3.0, allow=("ka", "hy"))


def test_a_record_says_all_and_can_be_compared_with_what_it_was_made_from(experiment):
    data = dataclasses.replace(experiment.data, store=("one", "two"), removed=(Removal("gone.txt", 40),))
    experiment = dataclasses.replace(experiment, data=data, batch_ramp=((24, 16),))
    said = encode(experiment)
    assert json.loads(json.dumps(said)) == said
    assert said["data"]["removed"] == [{"type": "Removal", "blocklist": "gone.txt", "from_row": 40}]
    assert said["batch_ramp"] == [[24, 16]]
    same = identity(experiment, {})
    assert json.loads(json.dumps(same)) == same


def test_a_recorded_run_gives_its_model_back(experiment):
    run = claim_run(dataclasses.replace(experiment, batch_ramp=((8, 16),)), "", {}, {})
    assert recorded_model(read_record(run)) == experiment.model


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (dict(packing="best-fit"), False),
        (dict(workers=3), True),
        (dict(store=("elsewhere", "too")), True),
        (dict(removed=(Removal("gone.txt", 40),)), True),
    ],
)
def test_only_what_decides_the_rows_is_part_of_a_run(experiment, changes, same):
    changed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **changes))
    assert (identity(changed, {}) == identity(experiment, {})) is same


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (((24, 0),), "batch_ramp: a batch of 0 rows is not possible"),
        (((24, 16), (8, 32)), "batch_ramp: the change to batches of 32 rows at row 8 does not come after row 24"),
    ],
)
def test_an_impossible_ramp_is_refused(experiment, ramp, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(experiment, batch_ramp=ramp)
