"""A checkpoint comes back exactly, or not at all."""

import logging
import subprocess

import jax
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.training.checkpoint import MANIFEST, Checkpoints, faults


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


def restored(folder):
    checkpoints = Checkpoints(folder)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    result, progress = checkpoints.restore(abstract)
    params, _ = checkpoints.restore_params(abstract["params"])
    checkpoints.close()
    np.testing.assert_array_equal(params["w"], result["params"]["w"])
    return result, progress


def assert_is(result, step):
    tree, progress = result
    assert progress == {"row": 10 * step}
    assert int(tree["step"]) == step
    np.testing.assert_array_equal(tree["params"]["w"], state(step)["params"]["w"])


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=2)
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


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_and_the_one_before_used(tmp_path, caplog, damage):
    saved(tmp_path, 1)
    names = [line.split("  ")[1] for line in (tmp_path / "1" / MANIFEST).read_text().splitlines()]
    original = {name: (tmp_path / "1" / name).read_bytes() for name in names}
    for name, content in original.items():
        path = tmp_path / "1" / name
        if damage == "flip" and content:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "truncate" and content:
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        assert len(faults(tmp_path / "1")) == 1, name
        path.write_bytes(content)
    assert faults(tmp_path / "1") == []

    saved(tmp_path, 2)
    largest = max(names, key=lambda name: len(original[name]) if (tmp_path / "2" / name).exists() else 0)
    path = tmp_path / "2" / largest
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.ERROR):
        assert_is(restored(tmp_path), 1)
    assert f"{tmp_path / '2'} is damaged ({largest} is not what was written)" in caplog.text
    saved(tmp_path, 2)  # the step can be saved again
    assert_is(restored(tmp_path), 2)


def test_nothing_to_restore_is_said_plainly(tmp_path):
    with pytest.raises(UserError, match="holds no sound checkpoint"):
        restored(tmp_path)
