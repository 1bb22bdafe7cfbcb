"""How much of a CPU training step goes into fetching freed memory back from the kernel?

    python scripts/benchmarks/freed_memory.py [--quick] [--json FILE]

Times the loss and gradient of the quick start's model in fresh processes, in turn as glibc comes and with
`keep_freed_memory()`, and prints medians over processes, page faults and the ratio.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, LENGTH = 8, 512


def one_process(keep: bool, steps: int) -> dict[str, float]:
    """Seconds of wall and system time and page faults, each per step."""
    from eurollm_jax.parallel.cpu import keep_freed_memory

    if keep:
        keep_freed_memory()
    import jax
    import numpy as np

    from eurollm_jax.data.batch import Batch
    from eurollm_jax.model.families import NANO
    from eurollm_jax.model.loss import batch_loss
    from eurollm_jax.model.param import init
    from eurollm_jax.model.transformer import specs
    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    tokens = np.random.default_rng(0).integers(4, NANO.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    ones, at = np.ones_like(tokens), np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    batch = Batch(tokens, tokens, ones, at, ones.astype(bool), np.zeros(BATCH, np.int32))
    step = jax.jit(jax.grad(lambda params: batch_loss(params, batch, NANO, layout)[0]))
    params = init(specs(NANO), jax.random.key(0))
    for _ in range(2):
        jax.block_until_ready(step(params))
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(step(params))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": seconds / steps,
        "system": (after.ru_stime - before.ru_stime) / steps,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pairs of processes in place of five")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--process", choices=("plain", "keep"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 4 if arguments.quick else 10
    if arguments.process:
        print(json.dumps(one_process(arguments.process == "keep", steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "keep": []}
    for _ in range(2 if arguments.quick else 5):
        for kind, results in runs.items():
            command = [sys.executable, __file__, "--process", kind, *(["--quick"] if arguments.quick else [])]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {
        kind: {figure: statistics.median(result[figure] for result in results) for figure in results[0]}
        for kind, results in runs.items()
    }
    from importlib.metadata import version

    print(f"jax {version('jax')}, Python {platform.python_version()}, {' '.join(platform.libc_ver())}")
    print(f"loss and gradient of the quick start's model, {BATCH} rows of {LENGTH} tokens, per step")
    for kind, figures in medians.items():
        wall, system = 1e3 * figures["wall"], 1e3 * figures["system"]
        print(f"{kind:6s} {wall:7.0f} ms wall  {system:6.0f} ms system  {figures['faults']:9,.0f} page faults")
    ratio = medians["plain"]["wall"] / medians["keep"]["wall"]
    print(f"plain / keep: {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"medians": medians, "runs": runs, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
