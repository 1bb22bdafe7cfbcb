"""Checkpoints of two processes: written, verified and restored together, and given up together."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.manifest import MANIFEST, faults

SCRIPT = """
import errno, json, resource, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from eurollm_jax.errors import LostError, UserError
from eurollm_jax.parallel.distributed import Coordination, connect

folder, address, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
connect(Coordination(address, 2, process))
from eurollm_jax.parallel import messages
from eurollm_jax.training import manifest
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.saving import Saving

# Devices have not been started yet, and words go to and fro.
assert (messages.processes(), messages.process_number()) == (2, process)
for number in range(3):
    assert messages.told("test", f"told {number} by {process}") == f"told {number} by 0"
    heard = messages.collected("test", f"said {number} by {process}")
    assert heard == ([] if process else [f"said {number} by 0", f"said {number} by 1"])

mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
spread, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

def state(step):
    w = step + np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)
    place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return {"params": {"w": place(w, spread)}, "step": place(np.int32(step), everywhere)}

def abstract(sharding):
    tree = state(0)
    one = jax.ShapeDtypeStruct((64, 1024), np.float32, sharding=sharding)
    return {"params": {"w": one}, "step": jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)}

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

checkpoints = Checkpoints(folder, saving=Saving(last=3, failures=2))
assert checkpoints.latest is None
for step in (1, 2):
    checkpoints.save(step, state(step), {"row": step})
checkpoints.wait()
seen = {"saved": checkpoints.latest}
if process == 1:
    limit(1000)
checkpoints.save(3, state(3), {"row": 3})  # which one process alone cannot write
checkpoints.wait()
seen["after one failure"] = checkpoints.latest
limit(resource.RLIM_INFINITY)
checkpoints.save(4, state(4), {"row": 4})
checkpoints.close()
seen["closed"] = checkpoints.latest

# One node's stale view, or its lost file server, condemns nothing; where the first cannot read, all stop.
honest = manifest.file_sha256
def unreadable(path):
    raise OSError(errno.EIO, "Input/output error", str(path))
def missing(path):
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
for number, view in enumerate((unreadable, missing, lambda path: 64 * "0")):
    manifest.file_sha256 = view if process == 1 else honest
    seen[f"other view {number}"] = Checkpoints(folder).latest
manifest.file_sha256 = unreadable if process == 0 else honest
try:
    Checkpoints(folder)
except LostError as error:
    seen["lost"] = str(error)
manifest.file_sha256 = honest
if process == 0:
    (file,) = (folder / "4" / "state").glob("manifest.ocdbt")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    seen["keys"] = len(messages._service().key_value_dir_get("eurollm_jax/"))
messages.told("test", "damaged")

checkpoints = Checkpoints(folder)
seen["fallen back"] = checkpoints.latest
seen["permanent"] = [checkpoints.newest_permanent(before) for before in (5, 2, 1)]
seen["aside"] = [name.partition("-")[0] for name in checkpoints.set_aside]
for sharding in (spread, NamedSharding(mesh, P(None, "x")), everywhere):
    tree, progress = checkpoints.restore(abstract(sharding))
    wanted = 2 + np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)
    for shard in tree["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])
    assert progress == {"row": 2}
wrong = {"params": {"w": jax.ShapeDtypeStruct((64, 8), np.float32, sharding=spread)}, "step": abstract(spread)["step"]}
try:
    checkpoints.restore(wrong)
except UserError as error:
    seen["refused"] = str(error)
print(json.dumps(seen), flush=True)
"""


def test_two_processes_save_fall_back_and_restore_as_one(tmp_path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), address, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in (0, 1)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said for _, said in ended)
    seen = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert seen[0].pop("keys") < 10  # what has been read is not kept: a run of weeks saves thousands of times
    assert seen[0] == seen[1]
    assert [seen[0][name] for name in ("saved", "after one failure", "closed", "fallen back")] == [2, 2, 4, 2]
    assert [seen[0][f"other view {number}"] for number in range(3)] == [4, 4, 4]
    for view in ("could not be read (input/output error)", "is missing", "is not what was written"):
        assert any(f"{view}, but process 0 reads it as" in line for line in ended[0][1].splitlines()), view
    assert "to process 1 " in ended[0][1]
    assert "could not be read (input/output error): nothing was changed" in seen[0]["lost"]
    assert (seen[0]["permanent"], seen[0]["aside"]) == ([2, 1, None], ["4.damaged"])
    assert "does not fit what is to be restored" in seen[0]["refused"]
    assert len(seen[0]["refused"]) < 1000
    assert "IS NOT SAVED: process 1: there is no room (file too large)" in ended[0][1]

    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert there[:2] == ["1", "2"]
    assert len(there) == 3
    assert there[2].startswith("4.damaged-")
    for step in (1, 2):
        listed = (tmp_path / "run" / str(step) / MANIFEST).read_text()
        assert all(f"state/ocdbt.process_{process}/" in listed for process in (0, 1))
        assert faults(tmp_path / "run" / str(step)) == []

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))  # and one process goes on with eight devices
    one = jax.ShapeDtypeStruct((64, 1024), np.float32, sharding=NamedSharding(mesh, P("x")))
    step = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
    checkpoints = Checkpoints(tmp_path / "run")
    tree, progress = checkpoints.restore({"params": {"w": one}, "step": step})
    np.testing.assert_array_equal(tree["params"]["w"], 2 + np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024))
    assert (int(tree["step"]), progress) == (2, {"row": 2})
