"""How long does a train step take to compile, and how long is it until the first one is done, at growing depth?

    python scripts/benchmarks/compile_time.py [--quick] [--depths 4 16 64] [--rounds N] [--json FILE]

A narrow model, so that what the compiler does is what counts, and each measurement is a fresh process without a
compilation cache; the depths take turns, and the figures are medians over rounds. Lowering is from Python to
StableHLO, compiling from there to machine code. The first step is from the beginning of `build_program` until the
state after one step is there, and so holds drawing the weights, too, which is compiled as well. On a machine with other
work the processor time of the same says more.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH = 2, 128
GOAL = 1.2  # the longest at most so many times the shortest
PARTS = ("lowering", "compiling", "first step", "its CPU time")


def one_process(depth: int) -> dict[str, float]:
    """Seconds of each part."""
    import jax
    import numpy as np
    import optax

    from eurollm_jax.data.batch import Batch
    from eurollm_jax.model.config import Gated, TransformerConfig
    from eurollm_jax.model.transformer import specs
    from eurollm_jax.parallel.cpu import keep_freed_memory
    from eurollm_jax.parallel.mesh import Layout, MeshConfig
    from eurollm_jax.training.optimizer import AdamW
    from eurollm_jax.training.skipping import SkipStep
    from eurollm_jax.training.step import build_program

    config = TransformerConfig(
        vocab_size=256, width=64, depth=depth, heads=4, kv_heads=2, head_dim=16, mlp=Gated(128), max_positions=LENGTH
    )
    keep_freed_memory()
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(())))  # the backend is started before the clock
    compiled: list[float] = []

    def duration(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(duration)
    start, used = time.perf_counter(), time.process_time()
    optimizer = AdamW().build(optax.constant_schedule(1e-3), specs(config))
    program = build_program(
        config,
        layout,
        optimizer,
        batch_sizes=[BATCH],
        token_bytes=np.ones(config.vocab_size, np.int32),
        sources=1,
        z_loss=1e-4,
        skip=SkipStep(),
    )
    compiled.clear()
    before = time.perf_counter()
    train = program.compile_train(BATCH, LENGTH)
    compiling, both = sum(compiled), time.perf_counter() - before
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    ones, at = np.ones_like(tokens), np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    batch = Batch(tokens, tokens, ones, at, ones.astype(bool), np.zeros(BATCH, np.int32))
    jax.block_until_ready(train(program.init(jax.random.key(0)), layout.place_rows(batch)))
    return {
        "lowering": both - compiling,
        "compiling": compiling,
        "first step": time.perf_counter() - start,
        "its CPU time": time.process_time() - used,
    }


def measure(depths: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of each part at each depth: all runs, medians, and the longest beside the shortest."""
    runs: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for number in range(rounds):
        for depth in depths if number % 2 == 0 else depths[::-1]:
            command = [sys.executable, __file__, "--process", str(depth)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"depth {depth} failed:\n{done.stderr}")
            runs[depth].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {d: {part: statistics.median(run[part] for run in some) for part in PARTS} for d, some in runs.items()}
    growth = {
        part: max(row[part] for row in medians.values()) / min(row[part] for row in medians.values()) for part in PARTS
    }
    return {"medians": medians, "longest_to_shortest": growth, "runs": runs}


def report(results: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    print(
        f"{os.cpu_count()} cores of {results['processor']}; load of the machine {results['load'][0]:.1f} before and "
        f"{results['load'][1]:.1f} after, {results['rounds']} rounds\n"
    )
    print("medians (lowest-highest)")
    print(f"{'layers':>18s}" + "".join(f"{part + ', s':>24s}" for part in PARTS))
    for depth, row in results["medians"].items():
        print(f"{depth:18d}", end="")
        for part in PARTS:
            seconds = [run[part] for run in results["runs"][depth]]
            print(f"{f'{row[part]:.2f} ({min(seconds):.2f}-{max(seconds):.2f})':>24s}", end="")
        print()
    growth = results["longest_to_shortest"]
    print(f"{'longest / shortest':>18s}" + "".join(f"{growth[part]:24.2f}" for part in PARTS))
    flat = ", ".join(f"{part} {'yes' if growth[part] <= GOAL else 'no'}" for part in PARTS)
    print(f"flat within {GOAL - 1:.0%}: {flat}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, of 4 and 16 layers")
    parser.add_argument("--depths", nargs="+", type=int, metavar="LAYERS", help="(default: 4 16 64)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        print(json.dumps(one_process(arguments.process)))
        return
    rounds = 1 if arguments.quick else arguments.rounds
    before = os.getloadavg()[0]
    measured = measure(arguments.depths or ([4, 16] if arguments.quick else [4, 16, 64]), rounds)
    results = {
        "versions": _versions(),
        "processor": platform.processor() or platform.machine(),
        "rounds": rounds,
        "load": [before, os.getloadavg()[0]],
        **measured,
    }
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("eurollm_jax", "jax", "jaxlib", "optax")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
