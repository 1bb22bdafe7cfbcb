"""Saves that fail: a full disk, a limit, a kill. The run is told, goes on, and keeps what it has."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from eurollm_jax.corpus import folders
from eurollm_jax.errors import LostError, UserError
from eurollm_jax.training import checkpoint, commit, manifest
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.run import train
from eurollm_jax.training.saving import Saving

SCRIPT = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import jax, numpy as np
from eurollm_jax.errors import UserError
from eurollm_jax.training import checkpoint, commit
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.saving import Saving

checkpoint.PAUSES = ()
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
checkpoint.PAUSES = (0.1, 0.1)
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
    assert "the last 3 checkpoints could not be saved" in seen["closed"]  # three tries for one
    why = "there is no room (no space left on device)" if kind == "disk" else "there is no room (file too large)"
    assert len(said) == 8, said  # one line each
    assert [number for number, line in enumerate(said) if " IS NOT SAVED: " in line] == [0, 1, 2, 3, 5, 7]
    assert all("step 6 is tried again in 0.1 seconds" in said[number] for number in (4, 6))
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


def test_the_last_state_is_tried_again_while_it_is_there(tmp_path, monkeypatch):
    """And not where a step has written to its memory."""
    there = tmp_path / "run"
    checkpoints = Checkpoints(there)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"params": {"w": jax.numpy.zeros((64, 64))}}
    free = shutil.disk_usage
    room = iter((0, 0, 1 << 30, 0, 1 << 30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(path)._replace(free=next(room)))
    monkeypatch.setattr(checkpoint, "PAUSES", (0.01, 0.01))
    checkpoints.save(1, tree, {})
    checkpoints.close()  # at the second further try
    assert Checkpoints(there, read_only=True).latest == checkpoints.latest == 1

    checkpoints.save(2, tree, {})
    add(tree)
    with pytest.raises(UserError, match="the last checkpoint could not be saved"):
        checkpoints.close()
    assert len(list(room)) == 1
    assert checkpoints.latest == 1


def test_saves_that_cannot_begin_are_counted_with_those_that_fail(tmp_path):
    checkpoints = Checkpoints(tmp_path, saving=Saving(failures=2))
    tree = {"params": {"w": np.ones(3, np.float32)}}
    checkpoints.refuse("no records")
    checkpoints.save(1, tree, {})
    checkpoints.close()
    checkpoints.refuse("no records")
    with pytest.raises(UserError, match=r"last 2 checkpoints could not .* \(no records\): the newest is of step 1, "):
        checkpoints.refuse("no records")


def test_a_file_that_a_save_loses_sight_of_is_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    """As where a node has a stale view of what the others have written."""
    listed = manifest._files
    monkeypatch.setattr(manifest, "_files", lambda *of, **options: [*listed(*of, **options), "state/more"])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"w": np.ones(3, np.float32)}}, {})
    checkpoints.wait()
    assert (checkpoints.latest, list(tmp_path.iterdir())) == (None, [])


@pytest.fixture
def unreadable(monkeypatch):
    """(name of a file, number of times, error) of what the system refuses to read."""
    refused = []

    def read(path):
        for number, (name, times, error) in enumerate(refused):
            if str(path).endswith(name) and times:
                refused[number] = (name, times - 1, error)
                raise OSError(error, os.strerror(error), str(path))
        return folders.file_sha256(path)

    monkeypatch.setattr(manifest, "file_sha256", read)
    return refused


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.EACCES])
def test_what_cannot_be_read_is_no_damage(tmp_path, unreadable, error):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"params": {"w": np.ones(3, np.float32)}}, {})
    checkpoints.close()
    unreadable.append(("2/progress/metadata", 2, error))
    with pytest.raises(LostError, match=r"2/progress/metadata could not be read .* nothing was changed") as said:
        Checkpoints(tmp_path)
    assert os.strerror(error).lower() in str(said.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert Checkpoints(tmp_path).latest == 2


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    """A run would begin anew."""

    def listdir(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(commit.Path, "iterdir", listdir)
    with pytest.raises(LostError, match=r"could not be read .input/output error.: nothing was changed"):
        Checkpoints(tmp_path)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOENT])
def test_what_is_read_at_the_second_time_is_sound(tmp_path, unreadable, caplog, error):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"params": {"w": np.ones(3, np.float32)}}, {})
    checkpoints.close()
    unreadable.append(("2/progress/metadata", 1, error))
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest, checkpoints.set_aside) == (2, [])
    assert "but process 0 reads it as it was written" in caplog.text


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


def test_a_run_outlives_saves_that_fail_and_ends_where_they_do_not_end(
    often, undisturbed, refusing, caplog, monkeypatch
):
    monkeypatch.setattr(checkpoint, "PAUSES", ())
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

    monkeypatch.setattr(checkpoint, "PAUSES", (0.01,))  # and once more, when there is room again
    run = train(replace(often, name="again"), "")
    np.testing.assert_equal(weights(run), weights(undisturbed))


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
