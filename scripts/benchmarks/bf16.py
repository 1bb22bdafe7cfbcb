"""Does computing in bfloat16 cost held-out bits per byte? The quick start's model, trained in either type.

    python scripts/benchmarks/bf16.py [--quick] [--steps 500] [--seeds 2] [--data FOLDER] [--keep FOLDER] [--json FILE]

`make quickstart` lays the data down. Each run is the project's own `train` of the quick start's experiment, in a
process of its own: the same tokens in the same order; weights, gradients and optimizer state in float32; what a layer
computes in float32 or in bfloat16, in training and in the evaluation. Bits per byte are of all held-out text; those of
"all" are the bits of all languages by their bytes. With more seeds than one the runs are repeated from other initial
weights, which shows how far two runs are apart that differ in nothing else.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.005  # of the bits per byte in float32
TYPES = ("float32", "bfloat16")


def one_process(dtype: str, seed: int, steps: int, data: Path, folder: Path) -> None:
    """Trains, or goes on where it was stopped."""
    from eurollm_jax.experiment import load_experiment
    from eurollm_jax.training.run import train

    quickstart, question = load_experiment(ROOT / "experiments" / "quickstart.py")
    experiment = dataclasses.replace(
        quickstart,
        name=f"{dtype}-{seed}",
        runs=str(folder),
        seed=seed,
        tokenizer=str(data / "tokenizer"),
        heldout=str(data / "store" / "heldout"),
        data=dataclasses.replace(quickstart.data, store=str(data / "store" / "train")),
        model=dataclasses.replace(quickstart.model, compute=dtype),
        schedule=dataclasses.replace(quickstart.schedule, warmup=min(quickstart.schedule.warmup, steps // 4)),
        steps=steps,
        evaluate_every=steps,
        checkpoint_every=steps,
    )
    train(experiment, question)


def trained(dtype: str, seed: int, arguments: argparse.Namespace, steps: int, folder: Path) -> dict[str, Any]:
    """What the evaluation of a run says of each language."""
    command = [sys.executable, __file__, "--process", dtype, str(seed), "--steps", str(steps)]
    command += ["--data", str(arguments.data), "--keep", str(folder)]
    print(f"training in {dtype}, seed {seed} ...", file=sys.stderr)
    done = subprocess.run(command, stdout=sys.stderr, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(f"training in {dtype} failed")
    languages: dict[str, Any] = json.loads((folder / f"{dtype}-{seed}" / "evaluation.json").read_text())["languages"]
    return languages


def of_all(languages: dict[str, Any]) -> float:
    """Bits per byte of all languages together."""
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in languages.values())
    return bits / sum(row["bytes"] for row in languages.values())


def compare(float32: dict[str, Any], bfloat16: dict[str, Any]) -> dict[str, Any]:
    rows = {code: (float32[code]["bits_per_byte"], bfloat16[code]["bits_per_byte"]) for code in float32}
    rows = {"all": (of_all(float32), of_all(bfloat16)), **rows}
    return {
        code: {"float32": one, "bfloat16": two, "difference": two / one - 1}
        for code, (one, two) in sorted(rows.items())
    }


def report(results: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    print(f"{os.cpu_count()} cores of {results['processor']}, {results['steps']} steps")
    for seed, rows in results["seeds"].items():
        print(f"\nseed {seed}, held-out bits per byte\n{'':10s}{'float32':>10s}{'bfloat16':>10s}{'difference':>12s}")
        for code, row in rows.items():
            print(f"{code:10s}{row['float32']:10.4f}{row['bfloat16']:10.4f}{row['difference']:+12.3%}")
        languages = {code: abs(row["difference"]) for code, row in rows.items() if code != "all"}
        most = max(languages, key=lambda code: languages[code])
        held = "yes" if abs(rows["all"]["difference"]) <= GOAL else "no"
        print(f"all within {GOAL:.1%}: {held}; the most of one language: {most} {rows[most]['difference']:+.3%}")
    if len(results["seeds"]) > 1:
        spread = {dtype: [rows["all"][dtype] for rows in results["seeds"].values()] for dtype in TYPES}
        said = ", ".join(f"{dtype} {max(found) / min(found) - 1:.3%}" for dtype, found in spread.items())
        print(f"\nbetween the seeds, all languages: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 steps")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "starter")
    parser.add_argument("--keep", type=Path, help="where the runs are kept, and go on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        dtype, seed = arguments.process
        one_process(dtype, int(seed), arguments.steps, arguments.data, arguments.keep)
        return
    if not (arguments.data / "store" / "heldout").is_dir():
        sys.exit(f"{arguments.data} holds no prepared corpus: run `make quickstart` first, or give --data")
    steps = 4 if arguments.quick else arguments.steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        seeds = {
            str(seed): compare(*(trained(dtype, seed, arguments, steps, folder) for dtype in TYPES))
            for seed in range(arguments.seeds)
        }
    results = {
        "versions": _versions(),
        "processor": platform.processor() or platform.machine(),
        "steps": steps,
        "seeds": seeds,
    }
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("eurollm_jax", "jax", "optax")}}


if __name__ == "__main__":
    main()
