"""Weights come off the disk piece by piece, as they were saved, in little memory and without devices."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eurollm_jax.errors import UserError
from eurollm_jax.training import weights
from eurollm_jax.training.checkpoint import Checkpoints, write_checkpoint
from eurollm_jax.training.weights import AveragedWeights, SavedWeights

LAYERS, EXPERTS = 3, 4
SHARDED = {
    "embedding": ((48, 16), P("a", "b")),
    "final_norm": ((16,), P()),
    "layers/query": ((LAYERS, 16, 4, 8), P(None, ("a", "b"), "c", None)),
    "layers/norm": ((LAYERS, 16), P(None, "b")),
    "layers/experts/up": ((LAYERS, EXPERTS, 16, 24), P(None, "c", "a", "b")),
}


def tree_of(flat):
    tree = {"layers": {"experts": {}}}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node[folder]
        node[name] = leaf
    return tree


@pytest.fixture(scope="module")
def content():
    rng = np.random.default_rng(5)
    return {path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in SHARDED.items()}


@pytest.fixture(scope="module")
def on_mesh(content):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    return {path: jax.device_put(content[path], NamedSharding(mesh, spec)) for path, (_, spec) in SHARDED.items()}


def save(folder, state):
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return folder / "1"


@pytest.fixture(scope="module")
def sharded(on_mesh, tmp_path_factory):
    """As a run saves it on eight devices, with the moments of an optimizer and a moving average of twice the values."""
    tree = tree_of(on_mesh)
    twice = jax.tree.map(lambda x: 2 * x, tree)
    state = {"params": tree, "optimizer": ({"mu": tree}, ()), "step": jax.numpy.int32(1), "ema": twice}
    return save(tmp_path_factory.mktemp("sharded"), state)


@pytest.fixture(scope="module")
def unchunked(on_mesh, tmp_path_factory):
    """As a run saved it before there were pieces: one chunk for each device's part of a weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eurollm_jax.training.commit.save_args", lambda state: None)
        return save(tmp_path_factory.mktemp("unchunked"), {"params": tree_of(on_mesh)})


@pytest.mark.parametrize("saved", ["sharded", "unchunked"])
def test_each_piece_is_what_was_saved(saved, content, request):
    found = SavedWeights(request.getfixturevalue(saved))
    assert found.paths() == sorted(SHARDED)
    for path, weight in content.items():
        assert found.shape(path) == weight.shape
        np.testing.assert_array_equal(found.read(path), weight)
        for index in np.ndindex(weight.shape[: 1 + path.count("experts")]):
            piece = found.read(path, index)
            np.testing.assert_array_equal(piece, weight[index])
            assert piece.dtype == np.float32


def test_the_moving_average_is_its_own_item(sharded, content):
    average = SavedWeights(sharded, "ema")
    assert average.paths() == sorted(SHARDED)
    np.testing.assert_array_equal(average.read("layers/query", (2,)), 2 * content["layers/query"][2])


def test_a_checkpoint_in_lower_precision_is_read_in_float32(tmp_path):
    stored = jax.numpy.asarray(np.random.default_rng(0).normal(size=(4, 8)), jax.numpy.bfloat16)
    found = SavedWeights(save(tmp_path, {"params": {"embedding": stored}})).read("embedding")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(stored, np.float32))


def test_what_is_not_there_is_said(sharded, unchunked, tmp_path):
    with pytest.raises(UserError, match="holds no moving average of the weights: train with `ema` in the experiment"):
        SavedWeights(unchunked, "ema")
    with pytest.raises(UserError, match="holds no params head: it is of another model"):
        SavedWeights(sharded).read("head")
    with pytest.raises(UserError, match="holds no params: it is not a checkpoint of a run"):
        SavedWeights(tmp_path)


def test_a_checkpoint_that_a_run_removes_meanwhile_is_named(tmp_path):
    found = SavedWeights(save(tmp_path, {"params": {"embedding": np.ones((64, 64), np.float32)}}))
    found.shape("embedding")
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / '1'} was removed while it was read")):
        found.read("embedding")


@pytest.mark.parametrize("writer", ["save", "write_checkpoint"])
def test_each_piece_lies_on_disk_by_itself(sharded, content, tmp_path, monkeypatch, writer):
    """Guards what this module knows of Orbax's layout, and that reading a piece does not bring in its neighbours."""
    folder = sharded
    if writer == "write_checkpoint":
        folder = tmp_path / "1"
        shapes = {path: weight.shape for path, weight in content.items()}
        monkeypatch.setattr(weights, "CHUNK_BYTES", 256)
        write_checkpoint(
            tmp_path,
            1,
            shapes,
            (
                (path, index, weight[index])
                for path, weight in content.items()
                for index in np.ndindex(weight.shape[: path.count("layers") + path.count("experts")])
            ),
            {},
        )
    state = folder / "state"
    metadata = json.loads((state / "_METADATA").read_text())
    assert metadata["use_ocdbt"]
    assert metadata["use_zarr3"]
    leaves = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
    assert {"/".join(keys[1:]) for keys in leaves if keys[0] == "params"} == set(SHARDED)
    for path, weight in content.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{state}/"},
                "path": f"params.{path.replace('/', '.')}/",
            },
        }
        store = ts.open(spec, open=True, read=True).result()
        assert store.dtype == ts.float32
        np.testing.assert_array_equal(store.read().result(), weight)
        stacked = path.count("layers") + path.count("experts")
        chunk = store.chunk_layout.read_chunk.shape
        assert chunk[:stacked] == (1,) * stacked
        assert writer == "save" or np.prod(chunk) * 4 <= 256


def test_chunks_have_a_largest_size(on_mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 256)
    found = SavedWeights(save(tmp_path, {"params": tree_of(on_mesh)}))
    for path in found.paths():
        assert np.prod(found.open(path).chunk_layout.read_chunk.shape) * 4 <= 256


def test_an_average_is_rounded_once(tmp_path, content, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 512)  # several blocks of rows for each piece
    rng = np.random.default_rng(1)
    trees = [{path: weight + rng.normal(size=weight.shape) * 1e-3 for path, weight in content.items()} for _ in "12345"]
    trees = [{path: weight.astype(np.float32) for path, weight in tree.items()} for tree in trees]
    trees[0]["final_norm"] = np.full(16, 2.0**24, np.float32)  # in float32, the others would be lost beside it
    folders = [save(tmp_path / str(number), {"params": tree_of(tree)}) for number, tree in enumerate(trees)]
    average = AveragedWeights([SavedWeights(folder) for folder in folders])
    assert average.paths() == sorted(SHARDED)
    for path in SHARDED:
        exact = np.mean([tree[path].astype(np.float64) for tree in trees], axis=0).astype(np.float32)
        assert average.shape(path) == exact.shape
        assert average.read(path).dtype == np.float32
        np.testing.assert_allclose(average.read(path), exact, rtol=1e-7)
        for index in np.ndindex(exact.shape[: 1 + path.count("experts")]):
            np.testing.assert_array_equal(average.read(path, index), average.read(path)[index])


def test_checkpoints_of_different_models_are_not_averaged(tmp_path):
    def weights_of(name, **arrays):
        return SavedWeights(save(tmp_path / name, {"params": {k: np.zeros(v, np.float32) for k, v in arrays.items()}}))

    first = weights_of("first", embedding=(4, 8), head=(4, 8))
    wider = weights_of("wider", embedding=(4, 16), head=(4, 8))
    tied = weights_of("tied", embedding=(4, 8))
    with pytest.raises(UserError, match=r"embedding is 4x8 in .*first/1 and 4x16 in .*wider/1: only .* of one model"):
        AveragedWeights([first, wider])
    with pytest.raises(UserError, match=r"head is missing in .*tied/1 and 4x8 in .*first/1"):
        AveragedWeights([tied, first])


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from eurollm_jax.training.checkpoint import Checkpoints, write_checkpoint

def peak():  # of this process alone: ru_maxrss begins with that of the process that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

LAYERS, PIECE = 24, (2048, 2048)

def pieces():
    for layer in range(LAYERS):
        yield "layers/up", (layer,), np.full(PIECE, layer, np.float32)

before = peak()
if sys.argv[1] == "write":
    write_checkpoint(Path(sys.argv[2]), 0, {"layers/up": (LAYERS, *PIECE)}, pieces(), {})
else:
    checkpoints = Checkpoints(Path(sys.argv[2]), read_only=True)
    found = checkpoints.averaged(1) if sys.argv[1] == "average" else checkpoints.weights()
    for layer in range(LAYERS):
        assert (found.read("layers/up", (layer,)) == layer).all()
print((peak() - before) / 4 / 2048**2)
"""


def test_memory_is_that_of_a_few_pieces_and_reading_starts_no_devices(tmp_path):
    """A piece has 16 MiB, the weight 24 pieces. Up to 32 MiB wait for the disk; code that is loaded late counts too."""
    for job, pieces in {"write": 14, "read": 5, "average": 8}.items():
        platform = "cpu" if job == "write" else "there-is-none"  # which fails whatever starts it
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, job, tmp_path],
            capture_output=True,
            text=True,
            check=False,
            # With a fixed threshold glibc gives all large blocks back, instead of keeping some for each thread.
            env={**os.environ, "JAX_PLATFORMS": platform, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        )
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) < pieces, job


def test_a_save_is_restored_whatever_its_chunks(sharded, unchunked, on_mesh):
    tree = tree_of(on_mesh)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    for folder in (sharded, unchunked):
        params, _ = Checkpoints(folder.parent, read_only=True).restore_params(wanted)
        jax.tree.map(np.testing.assert_array_equal, params, tree)


def test_orbax_reads_what_is_written_in_pieces_by_itself(content, tmp_path):
    """With nothing of ours: the arrays, named and typed as it would have saved them."""
    shapes = {path: weight.shape for path, weight in content.items()}
    write_checkpoint(tmp_path, 4, shapes, ((path, (), weight) for path, weight in content.items()), {"row": 1})
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "4" / "state")
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": tree_of(content)})
