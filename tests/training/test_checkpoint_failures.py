"""Saves that fail: a full disk, a limit, a kill. The run is told, goes on, and keeps what it has."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.loop import train
from eurollm_jax.training.saving import Saving

SCRIPT = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import jax, numpy as np
from eurollm_jax.errors import UserError
from eurollm_jax.training import commit
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.saving import Saving

folder, kind = Path(sys.argv[1]), sys.argv[2]
there = folder / "checkpoints"
honest = shutil.disk_usage

def state(step):
    return {"params": {"w": jax.numpy.full((256, 1024), step, jax.numpy.float32)}}  # 1 MB

def fill(seen=True):
    '''From now on nothing fits; unless it is seen, a look at the room there is does not show it.'''
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return
    (folder / "filler").write_bytes(bytes(honest(folder).free - 200_000))
    commit.shutil.disk_usage = honest if seen else lambda path: honest("/")

def empty():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "filler").unlink(missing_ok=True)

def refused(work):
    try:
        work()
    except UserError as error:
        return str(error)

def looked():
    (value,) = {float(x) for x in np.unique(checkpoints.restore(state(0))[0]["params"]["w"])}
    return {"there": sorted(path.name for path in there.iterdir()), "latest": checkpoints.latest, "restored": value}

checkpoints = Checkpoints(there, saving=Saving(last=1, failures=3))
seen = {}
checkpoints.save(1, state(1), {})
checkpoints.wait()
fill()
checkpoints.save(2, state(2), {})
checkpoints.wait()
seen["first"] = looked()
empty()
fill(seen=False)
checkpoints.save(3, state(3), {})
checkpoints.wait()
seen["second"] = looked()
seen["third"] = refused(lambda: (checkpoints.save(4, state(4), {}), checkpoints.wait()))
empty()
checkpoints.save(5, state(5), {})
checkpoints.wait()
seen["after"] = looked()
fill()
checkpoints.save(6, state(6), {})
seen["closed"] = refused(checkpoints.close)
seen["end"] = looked()
print(json.dumps(seen), flush=True)
empty()
if kind == "limit":
    checkpoints.save(7, state(7), {})
    os.kill(os.getpid(), signal.SIGKILL)
"""

IN_SMALL_DISK = 'mount -t tmpfs -o size=5m tmpfs "$1" && exec "$0" -c "$3" "$1" "$2"'


def outcome(folder, kind):
    """What the script saw, and what it said."""
    command = [sys.executable, "-c", SCRIPT, str(folder), kind]
    if kind == "disk":
        command = ["unshare", "-Urm", "sh", "-c", IN_SMALL_DISK, sys.executable, str(folder), kind, SCRIPT]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert done.returncode == (0 if kind == "disk" else -signal.SIGKILL), done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_saves_without_room_are_said_and_cost_nothing_but_themselves(tmp_path, kind):
    """A disk of 5 MB that is full, or a limit on the size of files; states are of 1 MB."""
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if kind == "disk" and tried.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    seen, said = outcome(tmp_path, kind)
    assert seen["first"] == seen["second"] == {"there": ["1"], "latest": 1, "restored": 1}
    assert "the last 3 checkpoints could not be saved" in seen["third"]
    assert "the newest is of step 1, and the same command goes on from there" in seen["third"]
    assert seen["after"] == seen["end"] == {"there": ["5"], "latest": 5, "restored": 5}
    assert "the last checkpoint could not be saved" in seen["closed"]
    why = "there is no room (no space left on device)" if kind == "disk" else "there is no room (file too large)"
    assert len(said) == 4, said  # one line each
    assert all(" IS NOT SAVED: " in line for line in said)
    assert why in said[1]
    assert why in seen["third"]
    assert ("MB are needed and" if kind == "disk" else why) in said[0]

    if kind == "limit":  # and then it was killed while it saved
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        assert checkpoints.latest in (5, 7)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(checkpoints.latest)]


def test_what_went_wrong_otherwise_is_raised_and_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"w": np.ones(3, np.float32)}}, {"row": {1, 2}})  # a set is no JSON
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.wait()
    assert list(tmp_path.iterdir()) == []
    checkpoints.save(1, {"params": {"w": np.ones(3, np.float32)}}, {"row": 1})
    checkpoints.close()
    assert checkpoints.latest == 1


def test_a_save_that_is_not_asynchronous_is_there_when_it_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path, saving=Saving(asynchronous=False))
    for step in (1, 2, 3):
        checkpoints.save(step, {"params": {"w": np.full(3, step, np.float32)}}, {})
        assert Checkpoints(tmp_path, read_only=True).latest == checkpoints.latest == step
        assert checkpoints.longest > 0


# Through a whole run


@pytest.fixture
def often(experiment):
    """Twelve steps, saved after every second one."""
    return replace(experiment, checkpoint_every=2, evaluate_every=12)


def weights(run):
    saved = Checkpoints(run / "checkpoints", read_only=True).weights(12)
    return {path: saved.read(path) for path in saved.paths()}


def told(run):
    """The mean losses, step by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


@pytest.fixture
def undisturbed(often, tmp_path):
    return train(replace(often, runs=str(tmp_path / "undisturbed")), "")


@pytest.fixture
def refusing(monkeypatch):
    """Steps at which the system lets nobody write a file as large as a checkpoint's."""
    steps = set()
    save = Checkpoints.save

    def limited(checkpoints, step, *args, **options):
        if step not in steps:
            return save(checkpoints, step, *args, **options)
        checkpoints.wait()  # the save before is not to be hit
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            save(checkpoints, step, *args, **options)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(Checkpoints, "save", limited)
    return steps


def test_a_run_outlives_saves_that_fail_and_ends_where_they_do_not_end(often, undisturbed, refusing, caplog):
    refusing |= {4, 6, 10}
    run = train(replace(often, name="some"), "")
    np.testing.assert_equal(weights(run), weights(undisturbed))
    assert told(run) == told(undisturbed)
    assert [line.args[0].name for line in caplog.records if "IS NOT SAVED" in line.msg] == ["4", "6", "10"]

    refusing |= {4, 6, 8}
    with pytest.raises(UserError, match=r"last 3 checkpoints could not .* step 2, and the same command goes on from"):
        train(replace(often, name="all"), "")
    refusing.clear()
    run = train(replace(often, name="all"), "")
    np.testing.assert_equal(weights(run), weights(undisturbed))
    assert told(run) == told(undisturbed)

    refusing |= {12}
    with pytest.raises(UserError, match="the last checkpoint could not be saved"):
        train(replace(often, name="last"), "")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(often, undisturbed, caplog):
    expected = weights(undisturbed), told(undisturbed)
    path = max((undisturbed / "checkpoints" / "12" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert train(replace(often, runs=str(undisturbed.parent)), "") == undisturbed
    assert "12 is damaged" in caplog.text
    np.testing.assert_equal((weights(undisturbed), told(undisturbed)), expected)
    starts = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in starts if record["kind"] in ("start", "restart")] == [0, 10]
