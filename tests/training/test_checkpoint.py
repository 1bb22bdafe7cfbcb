"""A checkpoint comes back exactly, or not at all."""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eurollm_jax.errors import UserError
from eurollm_jax.training import checkpoint
from eurollm_jax.training.checkpoint import MANIFEST, Checkpoints, faults, write_checkpoint
from eurollm_jax.training.manifest import agreed_faults
from eurollm_jax.training.saving import Saving


def state(seed):
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": jax.numpy.asarray(rng.normal(size=(64, 33)), jax.numpy.float32)},
        "step": jax.numpy.asarray(seed, jax.numpy.int32),
    }


def saved(folder, *steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"row": 10 * step})
    checkpoints.close()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restored(folder):
    checkpoints = Checkpoints(folder)
    result, progress = checkpoints.restore(abstract(state(0)))
    params, _ = checkpoints.restore_params(abstract(state(0))["params"])
    checkpoints.close()
    np.testing.assert_array_equal(params["w"], result["params"]["w"])
    return result, progress


def assert_is(result, step):
    tree, progress = result
    assert progress == {"row": 10 * step}
    assert int(tree["step"]) == step
    np.testing.assert_array_equal(tree["params"]["w"], state(step)["params"]["w"])


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    saved(tmp_path, 1, 2, 3, saving=Saving(last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert_is(restored(tmp_path), 3)


def test_the_manifest_is_committed_with_the_files_it_names(tmp_path):
    """Guards the order that `Checkpoints._seal` relies on: called before the files, or after the rename, this fails."""
    saved(tmp_path, 1)
    listed = {line.split("  ")[1] for line in (tmp_path / "1" / MANIFEST).read_text().splitlines()}
    present = {str(path.relative_to(tmp_path / "1")) for path in (tmp_path / "1").rglob("*") if path.is_file()}
    data = {name for name in present if name.startswith(("state/", "progress/"))}
    assert data
    assert data <= listed
    subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=tmp_path / "1", check=True)


def flipped(content, dice):
    at = int(dice.integers(8 * len(content)))
    return content[: at // 8] + bytes([content[at // 8] ^ (1 << at % 8)]) + content[at // 8 + 1 :]


def zeroed(content, dice):
    """A page of 4 kB that was not zeros."""
    pages = [start for start in range(0, len(content), 4096) if any(content[start : start + 4096])]
    start = int(dice.choice(pages))
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


DAMAGES = {
    "flip a bit": flipped,
    "zero a page": zeroed,
    "truncate": lambda content, dice: content[: int(dice.integers(len(content)))],
    "cut at the end of a line": lambda content, dice: content[: content.rstrip().rfind(b"\n") + 1],
    "delete": lambda content, dice: None,
}


def test_damage_to_any_file_is_found_and_the_one_before_is_restored(tmp_path):
    """Every file, of those that Orbax writes and of ours, each in every way; how many there were is printed."""
    saved(tmp_path / "run", 1, 2)
    whole = tmp_path / "run" / "2"
    files = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {MANIFEST, "about.json", "progress/metadata", "_CHECKPOINT_METADATA", "state/_METADATA"} <= files.keys()
    dice = np.random.default_rng(0)
    tried = dict.fromkeys(DAMAGES, 0)
    for name, content in files.items():
        for kind, damage in DAMAGES.items():
            left = damage(content, dice)
            if left == content:
                continue
            if left is None:
                (whole / name).unlink()
            else:
                (whole / name).write_bytes(left)
            assert faults(whole), (kind, name)
            assert_is(restored(tmp_path / "run"), 1)
            (aside,) = (tmp_path / "run").glob("2.damaged-*")
            aside.rename(whole)
            (whole / name).write_bytes(content)
            tried[kind] += 1
    print(f"{len(files)} files, found and passed over: {tried}")
    assert all(count >= len(files) - 3 for kind, count in tried.items() if "line" not in kind)
    assert tried["cut at the end of a line"] >= 1  # the manifest, which then names fewer files
    assert_is(restored(tmp_path / "run"), 2)


def test_a_damaged_checkpoint_is_named_and_its_step_can_be_saved_again(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    path = max((tmp_path / "2").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.ERROR):
        assert_is(restored(tmp_path), 1)
    assert f"{tmp_path / '2'} is damaged ({path.relative_to(tmp_path / '2')} is not what was written)" in caplog.text
    saved(tmp_path, 2)
    assert_is(restored(tmp_path), 2)


def test_files_that_people_add_are_no_damage(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "1" / "README.txt").write_text("The one that went into the paper.")
    (tmp_path / "1" / "state" / ".nfs0001").write_text("")
    assert faults(tmp_path / "1") == []
    (tmp_path / "1" / "state" / "more").write_text("")
    assert faults(tmp_path / "1") == [f"state/more is not in {MANIFEST}"]


@pytest.mark.parametrize("wrong", ["shape", "missing"])
def test_what_does_not_fit_is_said_in_a_sentence(tmp_path, wrong):
    """Orbax says it in up to megabytes."""
    saved(tmp_path, 1)
    wanted = state(0)
    if wrong == "shape":
        wanted["params"]["w"] = jax.numpy.zeros((64, 34))
    else:
        wanted["params"]["bias"] = jax.numpy.zeros(3)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"is as it was written and does not fit .* begin with its weights") as said:
        checkpoints.restore(abstract(wanted))
    assert len(str(said.value)) < 800
    assert "\n" not in str(said.value)


def test_a_state_that_is_donated_at_once_is_stored_as_it_was(tmp_path):
    """The next step writes to the same memory while the files are still being written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"params": {f"w{i}": jax.numpy.full((512, 1024), i, jax.numpy.float32) for i in range(8)}}
    wanted = abstract(tree)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree, {})
    for _ in range(3):
        tree = step(tree)
    assert float(tree["params"]["w7"][0, 0]) == 10
    checkpoints.wait()
    stored, _ = checkpoints.restore(wanted)
    for i in range(8):
        np.testing.assert_array_equal(stored["params"][f"w{i}"], np.full((512, 1024), i, np.float32))
    checkpoints.close()


def test_the_rule_decides_what_stays(tmp_path):
    """Temporary ones go with the next; the best and the one before the decay stay."""
    seen = []
    checkpoints = Checkpoints(
        tmp_path, saving=Saving(last=1, best=1), permanent=lambda step: step % 2 == 0, decay_begins=4
    )
    for step, score in ((1, None), (2, 0.5), (3, None), (4, None), (5, None), (6, 0.75), (7, None)):
        checkpoints.save(step, state(step), {"row": 10 * step}, score=score)
        checkpoints.wait()
        seen.append(sorted(int(path.name) for path in tmp_path.iterdir()))
    assert seen == [[1], [2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 6], [2, 4, 6, 7]]
    assert [checkpoints.newest_permanent(before) for before in (9, 6, 3, 2)] == [6, 4, 2, None]
    checkpoints.close()


def test_nothing_to_restore_is_said_plainly(tmp_path):
    with pytest.raises(UserError, match="holds no sound checkpoint"):
        restored(tmp_path)


@pytest.fixture
def hashed(monkeypatch):
    """The folders that were verified, in order."""
    verified = []

    def spy(folder, *of):
        verified.append(int(folder.name))
        return agreed_faults(folder, *of)

    monkeypatch.setattr(checkpoint, "agreed_faults", spy)
    return verified


def test_steps_are_those_of_sound_checkpoints_and_each_is_hashed_once(tmp_path, caplog, hashed):
    saved(tmp_path, 1, 2, 10, saving=Saving(last=5))
    (tmp_path / "2" / "progress" / "metadata").write_text("{}")
    hashed.clear()
    reader = Checkpoints(tmp_path, read_only=True)
    assert hashed == [10]  # what opening needs
    with caplog.at_level(logging.ERROR):
        assert reader.steps() == [1, 10] == reader.steps()
    assert hashed == [10, 2, 1]
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    assert (tmp_path / "2").is_dir()  # read only

    np.testing.assert_array_equal(reader.weights(1).read("w"), state(1)["params"]["w"])
    np.testing.assert_array_equal(reader.weights().read("w"), state(10)["params"]["w"])
    assert hashed == [10, 2, 1]
    for step in (2, 3):
        with pytest.raises(UserError, match=rf"no sound checkpoint of step {step}: choose one of 1, 10\."):
            reader.weights(step)


def test_the_newest_permanent_one_is_found_without_reading_older_ones(tmp_path, hashed):
    saved(tmp_path, 1, 2, 3, 4, 5, saving=Saving(last=9), permanent=lambda step: step != 5)
    (tmp_path / "4" / "progress" / "metadata").write_text("{}")
    hashed.clear()
    signs = []
    checkpoints = Checkpoints(tmp_path, alive=lambda: signs.append(len(hashed)))
    files = sum(path.is_file() for path in (tmp_path / "5").rglob("*")) - 1
    assert signs == [1] * files  # a sign of life with each file
    assert checkpoints.newest_permanent(6) == 3
    assert hashed == [5, 4, 3]
    (aside,) = checkpoints.set_aside
    assert aside.startswith("4.damaged-")


def test_too_few_checkpoints_for_an_average_are_counted(tmp_path):
    saved(tmp_path, 1, 2, 3, saving=Saving(last=3))
    reader = Checkpoints(tmp_path, read_only=True)
    two = np.mean([state(seed)["params"]["w"] for seed in (2, 3)], axis=0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(reader.averaged(2).read("w"), two)
    with pytest.raises(UserError, match=r"holds 3 sound checkpoints, too few for .* saving.last=4 or more"):
        reader.averaged(4)
    (tmp_path / "2" / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds 2 sound checkpoints"):
        Checkpoints(tmp_path, read_only=True).averaged(3)
    with pytest.raises(UserError, match="1 or more"):
        reader.averaged(0)


@struct.dataclass
class State:
    params: Any
    step: Any
    ema: Any = None


def test_a_state_without_an_average_is_stored_as_before_there_was_one(tmp_path):
    """A part that is None leaves no trace, so that older checkpoints and states with the part left out agree."""
    before, average = state(1), {"w": state(2)["params"]["w"]}
    now = State(before["params"], before["step"])
    for folder, tree in {"before": before, "now": now, "average": replace(now, ema=average)}.items():
        writer = Checkpoints(tmp_path / folder)
        writer.save(7, tree, {})
        writer.close()
    metadata = {name: (tmp_path / name / "7" / "state" / "_METADATA").read_text() for name in ("before", "now")}
    assert metadata["before"] == metadata["now"]

    for folder in ("before", "now"):
        reader = Checkpoints(tmp_path / folder, read_only=True)
        result, _ = reader.restore(abstract(now))
        jax.tree.map(np.testing.assert_array_equal, result, now)
        assert result.ema is None
        for attempt in (lambda r: r.weights(item="ema"), lambda r: r.restore_params(abstract(average), "ema")):
            with pytest.raises(UserError, match="holds no moving average of the weights: train with `ema`"):
                attempt(reader)

    reader = Checkpoints(tmp_path / "average", read_only=True)
    result, _ = reader.restore(abstract(replace(now, ema=average)))
    jax.tree.map(np.testing.assert_array_equal, result, replace(now, ema=average))
    np.testing.assert_array_equal(reader.restore_params(abstract(average), "ema")[0]["w"], average["w"])
    np.testing.assert_array_equal(reader.restore_params(abstract(average))[0]["w"], before["params"]["w"])
    np.testing.assert_array_equal(reader.weights(item="ema").read("w"), average["w"])


SHAPES = {"embedding": (24, 8), "layers/norm": (3, 8), "layers/query": (3, 8, 2, 4), "layers/experts/up": (3, 4, 8, 6)}


def written_params():
    rng = np.random.default_rng(3)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    layers = {"norm": flat["layers/norm"], "query": flat["layers/query"], "experts": {"up": flat["layers/experts/up"]}}
    return flat, {"embedding": flat["embedding"], "layers": layers}


def pieces(flat):
    """Shuffled, and each weight cut on as many axes as it is stacked on."""
    cuts = [
        (path, index)
        for path, weight in flat.items()
        for index in np.ndindex(weight.shape[: path.count("layers") + path.count("experts")])
    ]
    shuffled = np.random.default_rng(0).permutation(len(cuts))
    return [(*cuts[number], flat[cuts[number][0]][cuts[number][1]]) for number in shuffled]


def test_a_checkpoint_written_in_pieces_is_restored_onto_any_sharding(tmp_path):
    flat, tree = written_params()
    write_checkpoint(tmp_path / "run", 0, SHAPES, pieces(flat), {"row": 5})
    subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST], cwd=tmp_path / "run" / "0", check=True)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    assert checkpoints.steps() == [0]
    assert checkpoints.newest_permanent(1) == 0
    spreads = {
        "nothing": lambda x: P(),
        "last axis": lambda x: P(*[None] * (x.ndim - 1), "a"),
        "the axis of 8": lambda x: P(*[None] * x.shape.index(8), ("a", "b")),
    }
    for spread in spreads.values():
        wanted = jax.tree.map(
            lambda x, spread=spread: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spread(x))),
            tree,
        )
        params, progress = checkpoints.restore_params(wanted)
        jax.tree.map(np.testing.assert_array_equal, params, tree)
        assert jax.tree.all(jax.tree.map(lambda got, want: got.sharding == want.sharding, params, wanted))
        assert progress == {"row": 5}

    saver = Checkpoints(tmp_path / "saved")
    saver.save(0, {"params": jax.tree.map(jax.numpy.asarray, tree)}, {"row": 5})
    saver.close()
    ours, theirs = (Checkpoints(tmp_path / run, read_only=True).weights() for run in ("run", "saved"))
    assert ours.paths() == theirs.paths() == sorted(SHAPES)
    for path, weight in flat.items():
        np.testing.assert_array_equal(ours.read(path), weight)
        np.testing.assert_array_equal(theirs.read(path), weight)

    with pytest.raises(UserError, match="is there already"):
        write_checkpoint(tmp_path / "run", 0, SHAPES, pieces(flat), {})


@pytest.mark.parametrize("fault", ["missing", "twice", "shape", "cut", "unknown", "late"])
def test_pieces_that_do_not_make_up_the_weights_leave_nothing(tmp_path, fault):
    flat, _ = written_params()
    given = pieces(flat)

    def faulty():
        yield from given if fault != "missing" else given[1:]
        if fault == "twice":
            yield given[0]
        elif fault == "shape":
            yield "embedding", (), flat["embedding"][:-1]
        elif fault == "cut":
            yield "layers/norm", (), flat["layers/norm"]
        elif fault == "unknown":
            yield "head", (), flat["embedding"]
        elif fault == "late":
            raise UserError("the source is damaged")

    expected = {"unknown": KeyError, "late": UserError}.get(fault, ValueError)
    with pytest.raises(expected, match={"late": "the source is damaged", "missing": "pieces came of"}.get(fault)):
        write_checkpoint(tmp_path, 0, SHAPES, faulty(), {})
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path, 0, SHAPES, given, {})
    assert Checkpoints(tmp_path, read_only=True).steps() == [0]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from eurollm_jax.training.checkpoint import write_checkpoint

def pieces():
    for layer in range(32):
        if {die} and layer == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield "layers/up", (layer,), np.full((512, 1024), layer, np.float32)

{before}
write_checkpoint(Path(sys.argv[1]), 0, {{"layers/up": (32, 512, 1024)}}, pieces(), {{}})
"""


def run_script(folder, **parts):
    script = SCRIPT.format(**{"die": False, "before": ""} | parts)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_kill_while_pieces_are_written_leaves_nothing_that_looks_whole(tmp_path):
    assert run_script(tmp_path, die=True).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert sum(path.stat().st_size for path in left.rglob("*") if path.is_file()) > 1 << 20  # it was under way
    assert Checkpoints(tmp_path, read_only=True).steps() == []
    assert run_script(tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    np.testing.assert_array_equal(
        Checkpoints(tmp_path, read_only=True).weights().read("layers/up", (31,)), np.full((512, 1024), 31)
    )


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    failed = run_script(tmp_path, before=limit)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert list(tmp_path.iterdir()) == []
