"""Which ensembles are trained, and which a folder is for: the rest is refused before anything is trained."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.training.ensemble import train_ensemble
from eurollm_jax.training.ensemble_inputs import claim_folder, open_ensemble, recorded_members
from eurollm_jax.training.ensemble_measurements import Measurement, add_measurements
from tests.training.ensembles import member, shared_by


@pytest.fixture(scope="module")
def shared(tiny, tokenizer, store, heldout, tmp_path_factory):
    return shared_by(tiny, tokenizer, store, heldout, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def members(shared):
    return [member(shared, number) for number in range(3)]


@pytest.fixture(scope="module")
def inputs(members):
    return open_ensemble(members)


@pytest.fixture
def claimed(members, inputs, tmp_path):
    """The folder of an ensemble that has not begun to train."""
    folder = tmp_path / "three"
    claim_folder(folder, members, inputs, "Which?")
    return folder


def measured(one, step, complete):
    return Measurement(one.name, step, 8 * step, 700, complete, "", {"de": 9.0}, {"de": 3}, {"de": 9})


CHANGES = {
    "steps": ({"steps": 13}, r"members 'member-0' and 'member-1' differ in steps: the members"),
    "model": ({"z_loss": 0.0}, "differ in z_loss"),
    "name": ({"name": "member-0"}, "several members have the name 'member-0'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_members_that_differ_in_more_are_refused_by_the_field(shared, tmp_path, case):
    changes, said = CHANGES[case]
    with pytest.raises(UserError, match=said):
        train_ensemble([member(shared, 0), member(shared, 1, **changes)], tmp_path / "two", question="")
    assert not (tmp_path / "two").exists()


ALIKE = {
    "accumulate": ({"accumulate": 2}, "accumulate=2"),
    "start_from": ({"start_from": "runs/base"}, "start_from=runs/base"),
    "branch_from": ({"branch_from": "runs/base/checkpoints/4"}, "branch_from=runs/base"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_no_ensemble_trains_is_refused(shared, tmp_path, case):
    changes, said = ALIKE[case]
    with pytest.raises(UserError, match=said):
        train_ensemble([member(shared, 0, **changes), member(shared, 1, **changes)], tmp_path / "two", question="")


def test_several_processes_are_refused(members, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="one process, and there are 2"):
        train_ensemble(members, tmp_path / "four", question="")


def test_a_mixture_that_the_store_cannot_honour_names_its_member(shared, tmp_path):
    absent = member(shared, 1, **{"data.mixture": Mixture.shares({"fr": 1.0})})
    with pytest.raises(UserError, match=r"member 'member-1': .*fr"):
        train_ensemble([member(shared, 0), absent], tmp_path / "two", question="")


def test_the_folder_of_another_ensemble_is_refused_with_the_differences(members, inputs, claimed, tmp_path):
    claim_folder(claimed, members, inputs, "Which?")
    with pytest.raises(UserError, match="its members are member-0, member-1, member-2, and not member-0, member-1"):
        claim_folder(claimed, members[:2], open_ensemble(members[:2]), "")
    other = [*members[:2], dataclasses.replace(members[2], seed=8)]
    with pytest.raises(UserError, match=r"another ensemble \(experiments\.member-2\.seed was 0 and is 8\): choose"):
        claim_folder(claimed, other, inputs, "")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs").touch()
    with pytest.raises(UserError, match=r"is not empty and holds no ensemble\.json"):
        claim_folder(tmp_path / "other", members, inputs, "")


def test_how_often_is_measured_stays_until_an_ensemble_is_finished(members, inputs, claimed):
    """A finished one keeps what was measured of it: its final figures do not depend on it."""
    changed = [dataclasses.replace(one, evaluate_every=2, evaluate_rows=3) for one in members]
    add_measurements(claimed, [measured(one, 5, False) for one in members])
    add_measurements(claimed, [measured(one, 12, True) for one in members[:2]])
    said = r"under way, of which evaluate_every was 5 and is 2; evaluate_rows was 2 and is 3: set that back, or .*study"
    with pytest.raises(UserError, match=said):
        claim_folder(claimed, changed, inputs, "")
    add_measurements(claimed, [measured(members[2], 12, True)])
    before = (claimed / "ensemble.json").read_bytes()
    claim_folder(claimed, changed, inputs, "")
    assert (claimed / "ensemble.json").read_bytes() == before
    with pytest.raises(UserError, match=r"another ensemble \(experiments\.member-0\.seed was 0 and is 3\)"):
        claim_folder(claimed, [dataclasses.replace(changed[0], seed=3), *changed[1:]], inputs, "")


def test_the_members_of_a_folder_are_named_and_a_damaged_record_too(members, inputs, claimed):
    assert recorded_members(claimed) == ["member-0", "member-1", "member-2"]
    path = claimed / "ensemble.json"
    whole = path.read_bytes()
    identity = json.loads(whole)["identity"]
    wrong = [whole[:100], b"", b"\xff\xfe", b"[]", b"{}", b'{"identity": [1]}', json.dumps({"identity": None}).encode()]
    wrong.append(json.dumps({"identity": {**identity, "members": "member-0"}}).encode())
    for content in wrong:
        path.write_bytes(content)
        for reading in (lambda: recorded_members(claimed), lambda: claim_folder(claimed, members, inputs, "")):
            with pytest.raises(
                UserError, match=r"three/ensemble\.json is damaged \(.*\): restore it, or move that ensemble's folder"
            ):
                reading()


def test_measurements_are_read_as_they_were_written():
    one = Measurement(
        "m", 3, 24, 700, False, "", {"de": 0.1, "el": float("nan")}, {"de": 3, "el": 2}, {"de": 9, "el": 5}
    )
    again = Measurement.from_line(one.to_line())
    assert "NaN" not in one.to_line()
    assert again.nats["de"] == 0.1
    assert np.isnan(again.nats["el"])
    assert dataclasses.replace(again, nats={}) == dataclasses.replace(one, nats={})
