"""A run's checkpoints, as a user lists, verifies and thins them out."""

import json
import shutil

import jax.numpy as jnp
import pytest

from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.lock import locked
from eurollm_jax.training.saving import Saving


@pytest.fixture
def run(made, tmp_path):
    """A run with a temporary checkpoint and seven permanent ones, of which 4 begins the decay."""
    shutil.copytree(made.run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    checkpoints = Checkpoints(
        tmp_path / "run" / "checkpoints",
        saving=Saving(last=9),
        permanent=lambda step: step != 8,
        decay_begins=4,
    )
    for step, score in ((1, None), (2, 3.5), (3, 1.25), (4, 2.0), (5, None), (6, 1.5), (7, None), (8, None)):
        checkpoints.save(step, {"params": {"w": jnp.full((64, 32), step, jnp.float32)}}, {"row": step}, score=score)
    checkpoints.close()
    return tmp_path / "run"


def steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def damage(run, step):
    (path,) = (run / "checkpoints" / str(step) / "state").glob("manifest.ocdbt")
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_the_list_says_what_each_is_and_reads_them_when_asked_to(call, run):
    said = call("checkpoint", "list", run)
    assert said.status == 0
    rows = {}
    for line in said.out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0].isdecimal():
            rows[int(cells[0])] = cells
    assert list(rows) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [rows[step][1] for step in (3, 4, 8)] == ["permanent", "before decay", "temporary"]
    assert rows[3][4] == "1.2500"
    assert rows[1][4] == ""
    assert "sound" not in said.out

    damage(run, 5)
    (run / "checkpoints" / "3.damaged-20260101T000000").mkdir()
    said = call("checkpoint", "list", run, "--verify")
    assert said.status == 0
    assert said.out.count("sound") == 7
    assert "DAMAGED" in said.out
    assert "3.damaged-20260101T000000 is no checkpoint (0 B)" in said.out.replace("\N{NO-BREAK SPACE}", " ")


def test_verify_fails_where_one_is_damaged(call, refusal, run):
    said = call("checkpoint", "verify", run)
    assert (said.status, said.out.count(": sound (")) == (0, 8)
    damage(run, 5)
    said = call("checkpoint", "verify", run)
    assert said.status == 1
    assert "step 5: DAMAGED: state/manifest.ocdbt is not what was written" in said.out
    assert call("checkpoint", "verify", run, "--step", 5).status == 1
    said = call("checkpoint", "verify", run, "--step", 4)
    assert (said.status, said.out.count("\n")) == (0, 1)
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8]  # nothing is set aside
    assert "no checkpoint of step 9: there are 1, 2, 3" in refusal(run, "checkpoint", "verify", run, "--step", 9)
    assert "not a run directory" in refusal(run, "checkpoint", "list", run / "checkpoints")


def test_prune_keeps_what_the_rule_keeps(call, contents, run):
    before = contents(run)
    said = call("checkpoint", "prune", run, "--last", 1, "--every", 3, "--best", 1, "--dry-run")
    *going, rule = said.out.splitlines()
    assert [line.split()[1] for line in going] == ["1", "2", "5"]
    assert rule == "the rule is last=1, every=3, best=1, before_decay=True"
    assert contents(run) == before
    said = call("checkpoint", "prune", run, "--last", 1, "--every", 3, "--best", 1)
    assert said.status == 0
    assert "left are 3, 4, 6, 7, 8 (the rule is last=1, every=3, best=1, before_decay=True)" in said.out
    assert steps(run) == [3, 4, 6, 7, 8]  # 3 is the best, 4 before the decay, 7 the last, 8 the newest
    call("checkpoint", "prune", run)
    assert steps(run) == [4, 6, 7, 8]  # as the experiment says: the last two
    record = json.loads((run / "experiment.json").read_text())
    record["experiment"]["saving"] |= {"last": 1, "before_decay": False}
    (run / "experiment.json").write_text(json.dumps(record))
    said = call("checkpoint", "prune", run)
    assert "left are 7, 8 (the rule is last=1, every=None, best=0, before_decay=False)" in said.out


def test_prune_refuses_where_a_run_trains_and_where_the_newest_is_damaged(refusal, run):
    with locked(run):
        assert "trains in" in refusal(run / "checkpoints", "checkpoint", "prune", run)
    damage(run, 8)
    assert "is the newest checkpoint and damaged" in refusal(run / "checkpoints", "checkpoint", "prune", run)
