"""What does a model of 2 GB cost to import, to load and to export, beside `from_pretrained` and `save_pretrained`?

    python scripts/benchmarks/hf_io.py [--quick] [--json FILE] [--keep FOLDER] [--repeats N]

transformers makes a Llama of random weights in bfloat16 (the shape of Llama 3.2 1B with 12 layers), in shards of
0.5 GB. measurement is a fresh process; in each round all take a turn, and the figures are medians over rounds:

- import: folder -> run. Reads 2 GB, writes 4 GB of float32, hashes both and syncs them to disk.
- load: folder -> arrays on the device in float32. Beside it from_pretrained in float32, the same work, and in bfloat16,
  which copies half as much. After each, every weight is read once, so that what a mapped file puts off is counted.
- export: run -> folder. Verifies the hashes of 4 GB, reads them, rounds to bfloat16, refuses what is not finite, writes
  2 GB, hashes and syncs them. Beside it save_pretrained of a model that is in memory in bfloat16 already, which only
  writes, and the whole way from folder to folder, from_pretrained and save_pretrained, neither hashed nor synced.
- export from memory: what is left of export where the float32 weights are in memory, as at the end of a training.
- the parts: hashing, syncing and copying of as many bytes, each alone.

Peak memory is the most that was resident, mapped files included, and "above" is without what an empty process with the
same imports has. CPU seconds are of all threads; on a machine with other work they say more than wall time.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Only what is small: a new process begins with the peak of the one that started it.
SHARD_BYTES = 500_000_000
QUICK_SHARD_BYTES = 60_000_000
SHAPES = {
    False: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "vocab_size": 128256},
    True: {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 16384},
}

OURS, THEIRS = "eurollm_jax", "transformers"


def make(folder: Path, quick: bool) -> None:
    """The model as transformers writes it, and the run that we import from it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[quick],
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=SHAPES[quick]["hidden_size"] // 32,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size=QUICK_SHARD_BYTES if quick else SHARD_BYTES)


# Each measurement: what comes before the clock, and what is timed.


def empty_ours(_: Path) -> Callable[[], Any]:
    import eurollm_jax.hf.export
    import eurollm_jax.hf.importing
    import eurollm_jax.hf.load  # noqa: F401

    return lambda: None


def empty_theirs(_: Path) -> Callable[[], Any]:
    from transformers import LlamaForCausalLM  # noqa: F401

    return lambda: None


def import_ours(folder: Path) -> Callable[[], Any]:
    from eurollm_jax.hf.importing import import_folder

    return lambda: import_folder(folder / "model", folder / "out")


def load_ours(folder: Path) -> Callable[[], Any]:
    import jax

    from eurollm_jax.hf.load import load
    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    layout = Layout(MeshConfig().build(jax.devices()[:1]))

    def work() -> None:
        _, params = load(folder / "model", layout)
        for weight in jax.block_until_ready(jax.tree.leaves(params)):
            memoryview(weight).cast("B")[::4096].tobytes()  # each page

    return work


def _from_pretrained(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype), local_files_only=True)
    for weight in model.parameters():
        weight.detach().view(-1).view(torch.uint8)[::4096].clone()
    return model


def load_theirs(folder: Path, dtype: str) -> Callable[[], Any]:
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    return lambda: _from_pretrained(folder, dtype)


def export_ours(folder: Path) -> Callable[[], Any]:
    from eurollm_jax.experiment import read_record, recorded_model
    from eurollm_jax.hf.export import export
    from eurollm_jax.hf.importing import imported_of
    from eurollm_jax.training.checkpoint import Checkpoints

    record = read_record(folder / "run")

    def work() -> None:
        weights = Checkpoints(folder / "run" / "checkpoints", read_only=True).weights()
        export(
            weights,
            recorded_model(record),
            None,
            folder / "out",
            max_shard_bytes=_shard_bytes(folder),
            imported=imported_of(record),
        )

    return work


def export_memory(folder: Path) -> Callable[[], Any]:
    import jax

    from eurollm_jax.hf.export import export
    from eurollm_jax.hf.load import load
    from eurollm_jax.hf.mapping import InMemory
    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    config, params = load(folder / "model", Layout(MeshConfig().build(jax.devices()[:1])))
    jax.block_until_ready(params)
    return lambda: export(InMemory(params), config, None, folder / "out", max_shard_bytes=_shard_bytes(folder))


def save_theirs(folder: Path) -> Callable[[], Any]:
    model = _from_pretrained(folder, "bfloat16")
    return lambda: model.save_pretrained(folder / "out", max_shard_size=_shard_bytes(folder))


def load_and_save(folder: Path) -> Callable[[], Any]:
    from transformers import LlamaForCausalLM  # noqa: F401

    return lambda: _from_pretrained(folder, "bfloat16").save_pretrained(
        folder / "out", max_shard_size=_shard_bytes(folder)
    )


def verify_checkpoint(folder: Path) -> Callable[[], Any]:
    from eurollm_jax.training.checkpoint import faults

    return lambda: faults(folder / "run" / "checkpoints" / "0")


def hash_export(folder: Path) -> Callable[[], Any]:
    from eurollm_jax.corpus.folders import file_sha256

    return lambda: [file_sha256(file) for file in (folder / "model").glob("*.safetensors")]


def copy_export(folder: Path) -> Callable[[], Any]:
    return lambda: shutil.copytree(folder / "model", folder / "out")


def sync_export(folder: Path) -> Callable[[], Any]:
    shutil.copytree(folder / "model", folder / "out")

    def work() -> None:
        for file in (folder / "out").iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    return work


MEASURED: dict[str, tuple[str, str, Callable[[Path], Callable[[], Any]]]] = {
    "import": (OURS, "import, folder to run", import_ours),
    "load": (OURS, "load, float32", load_ours),
    "from_pretrained float32": (THEIRS, "from_pretrained, float32", lambda folder: load_theirs(folder, "float32")),
    "from_pretrained bfloat16": (THEIRS, "from_pretrained, bfloat16", lambda folder: load_theirs(folder, "bfloat16")),
    "export": (OURS, "export, run to folder", export_ours),
    "load and save": (THEIRS, "from_pretrained and save_pretrained", load_and_save),
    "export from memory": (OURS, "export of float32 in memory", export_memory),
    "save_pretrained": (THEIRS, "save_pretrained of bfloat16 in memory", save_theirs),
    "verify checkpoint": ("part", "hashes of the checkpoint", verify_checkpoint),
    "hash export": ("part", "hashes of the folder", hash_export),
    "copy export": ("part", "copy of the folder, not synced", copy_export),
    "sync export": ("part", "sync of such a copy", sync_export),
}
EMPTY = {OURS: empty_ours, THEIRS: empty_theirs}


def _shard_bytes(folder: Path) -> int:
    return QUICK_SHARD_BYTES if (folder / "quick").exists() else SHARD_BYTES


def one_process(name: str, folder: Path) -> dict[str, float]:
    begin = EMPTY.get(name) or MEASURED[name][2]
    work = begin(folder)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak": after.ru_maxrss / 1000}


def fresh(name: str, folder: Path) -> dict[str, float]:
    """What another process of this script measures; what it wrote is deleted."""
    command = [sys.executable, __file__, "--keep", str(folder), "--process", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()  # so that nothing of it is written in the time of the next
    return result


def measure(folder: Path, repeats: int, names: list[str]) -> dict[str, Any]:
    empty = {side: fresh(side, folder)["peak"] for side in EMPTY}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else names[::-1]:
            runs[name].append(fresh(name, folder))
    results = {}
    for name, some in runs.items():
        result = {key: statistics.median(run[key] for run in some) for key in some[0]}
        result["above"] = result["peak"] - empty.get(MEASURED[name][0], 0.0)
        results[name] = result | {"runs": some}
    return {"empty": empty, "measured": results}


def report(results: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    print(
        f"{os.cpu_count()} cores of {results['processor']}; load of the machine {results['load'][0]:.1f} before and "
        f"{results['load'][1]:.1f} after, {results['repeats']} rounds"
    )
    shards = ", ".join(f"{size / 1e6:.0f}" for size in results["shards"])
    print(f"{results['parameters'] / 1e9:.2f}e9 parameters in shards of {shards} MB\n")
    print(f"{'':54s}{'seconds (lowest-highest)':>26s}{'CPU s':>8s}{'peak MB':>9s}{'above':>8s}")
    for name, (side, what, _) in MEASURED.items():
        if (row := results["measured"].get(name)) is None:
            continue
        seconds = [run["seconds"] for run in row["runs"]]
        spread = f"{row['seconds']:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
        memory = f"{row['peak']:9.0f}{row['above']:8.0f}" if side != "part" else ""
        print(f"{side:14s}{what:40s}{spread:>26s}{row['cpu_seconds']:8.2f}{memory}")
    print(f"\nan empty process: {', '.join(f'{side} {peak:.0f} MB' for side, peak in results['empty'].items())}")
    limit = 1.3 * max(results["shards"]) / 1e6 + 600
    print(f"1.3 x the largest shard + 600 MB: {limit:.0f} MB")
    for mine, other in results["ratios"]:
        one, two = (results["measured"][name] for name in (mine, other))
        wall, cpu = two["seconds"] / one["seconds"], two["cpu_seconds"] / one["cpu_seconds"]
        print(f"{other} / {mine}: {wall:.2f} in wall time, {cpu:.2f} in CPU time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 0.2 GB, and one round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="where the model is, or is made and kept (12 GB)")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process == "make":
        make(arguments.keep, (arguments.keep / "quick").exists())
        return
    if arguments.process:
        print(json.dumps(one_process(arguments.process, arguments.keep)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        prepare(folder, arguments.quick)
        index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
        before = os.getloadavg()[0]
        repeats = 1 if arguments.quick else arguments.repeats
        pairs = (
            *(("load", "from_pretrained float32"), ("load", "from_pretrained bfloat16")),
            *(("export", "load and save"), ("export", "save_pretrained")),
            ("export from memory", "save_pretrained"),
        )
        results = {
            "versions": _versions(),
            "processor": platform.processor() or platform.machine(),
            "repeats": repeats,
            "parameters": index["metadata"]["total_size"] // 2,
            "shards": sorted(file.stat().st_size for file in (folder / "model").glob("*.safetensors")),
            **measure(folder, repeats, arguments.only),
            "load": [before, os.getloadavg()[0]],
            "ratios": [pair for pair in pairs if {*pair} <= {*arguments.only}],
        }
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def prepare(folder: Path, quick: bool) -> None:
    """Makes the model and a run of it where they are not there yet, in processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        if quick:
            (folder / "quick").touch()
        subprocess.run([sys.executable, __file__, "--keep", str(folder), "--process", "make"], check=True)
    if not (folder / "run").exists():
        subprocess.run(
            [sys.executable, "-m", "eurollm_jax", "import", str(folder / "model"), str(folder / "run")], check=True
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = (
        "eurollm_jax",
        "jax",
        "orbax-checkpoint",
        "tensorstore",
        "numpy",
        "ml_dtypes",
        THEIRS,
        "torch",
        "safetensors",
    )
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
