"""What does a checkpoint cost a run, and how long does it take to go on from one?

    python scripts/benchmarks/checkpoint.py [--quick] [--folder DIR] [--json FILE]

Trains a Llama of 33M parameters (weights and two moments in float32: a state of 400 MB) on random tokens in stretches
of 100 steps: one with an asynchronous save after its 50th step, one with none, in turn. The time lost is the difference
of the two in a pair. A stretch ends when the save is committed, and begins with nothing to be written, so that what the
background takes from the steps is counted in full. Beside it, once: the same save awaited. Then it is restored and
verified several times, beside the plain reading of its files, all from the page cache and, where the kernel lets go of
it for us (posix_fadvise), from the disk. --quick takes 4M parameters and stretches of 20 steps.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.manifest import faults
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.step import Program, build_program

FULL = {"width": 512, "depth": 8, "vocab": 8192, "steps": 100, "pairs": 3}
QUICK = {"width": 192, "depth": 4, "vocab": 4096, "steps": 20, "pairs": 2}
ROWS, LENGTH = 4, 256


def program_of(case: dict[str, int], layout: Layout) -> tuple[Program, Batch, int]:
    """The train program, a batch, and the number of parameters."""
    width, vocab = case["width"], case["vocab"]
    config = TransformerConfig(
        vocab_size=vocab,
        width=width,
        depth=case["depth"],
        heads=width // 64,
        kv_heads=width // 64,
        head_dim=64,
        mlp=Gated(round(2.75 * width)),
        max_positions=LENGTH,
        remat="none",
    )
    weights = specs(config)
    program = build_program(
        config,
        layout,
        AdamW().build(optax.constant_schedule(1e-4), weights),
        batch_sizes=[ROWS],
        token_bytes=np.ones(vocab, np.int32),
        sources=1,
        z_loss=0.0,
        length=LENGTH,
    )
    tokens = np.random.default_rng(0).integers(4, vocab, (ROWS, LENGTH)).astype(np.int32)
    ones, at = np.ones_like(tokens), np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = Batch(tokens, tokens, ones, at, ones.astype(bool), np.zeros(ROWS, np.int32))
    return program, layout.place_rows(batch), count(weights)


def stretch(train: Callable[..., Any], state: Any, batch: Batch, steps: int, save: Callable[[Any], None] | None) -> Any:
    """The state after so many steps, one ahead of the other as in the loop."""
    before = None
    for step in range(steps):
        state, metrics = train(state, batch)
        jax.block_until_ready(before)
        before = metrics
        if save is not None and step == steps // 2:
            save(state)
    return jax.block_until_ready(state)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_all(folder: Path, *, forget: bool = False) -> None:
    """Reads every file, or has the kernel forget what it holds of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                if forget:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(8 << 20):
                        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small state and few steps")
    parser.add_argument("--folder", type=Path, help="on the file system to measure (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    case = QUICK if arguments.quick else FULL
    keep_freed_memory()
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    program, batch, parameters = program_of(case, layout)
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    train = program.compile_train(ROWS, LENGTH)
    state = program.init(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", saving=Saving(last=1))
        number, blocked, lost, without, with_save = 0, [], [], [], []

        def save(state: Any) -> None:
            nonlocal number
            number += 1
            blocked.append(seconds(lambda: checkpoints.save(number, state, {})))

        state = stretch(train, state, batch, 5, save)
        checkpoints.wait()
        blocked.clear()
        for pair in range(case["pairs"]):
            taken = {}
            for saving in (pair % 2 == 0, pair % 2 == 1):
                os.sync()
                start = time.perf_counter()
                state = stretch(train, state, batch, case["steps"], save if saving else None)
                checkpoints.wait()
                taken[saving] = time.perf_counter() - start
            without.append(taken[False])
            with_save.append(taken[True])
            lost.append(taken[True] - taken[False])
            print(f"pair {pair + 1}: {taken[True]:.2f} s with a save, {taken[False]:.2f} s without", flush=True)
        os.sync()
        number += 1
        awaited = seconds(lambda: (checkpoints.save(number, state, {}), checkpoints.wait()))
        checkpoints.close()

        path = Path(folder) / "checkpoints" / str(number)
        timed: dict[str, list[float]] = {}
        for where in ("cache", "disk") * 3:
            works = {
                "read": lambda: read_all(path),
                "verify": lambda: faults(path),
                "restore": lambda: jax.block_until_ready(
                    Checkpoints(path.parent, read_only=True).restore(program.state)[0]
                ),
            }
            for name, work in works.items():
                if where == "disk":
                    read_all(path, forget=True)
                timed.setdefault(f"{name} from {where}", []).append(seconds(work))
    medians = {name: statistics.median(found) for name, found in timed.items()}
    share = statistics.median(lost) / statistics.median(without)
    print(f"{parameters:,} parameters, a state of {size / 1e6:.0f} MB; stretches of {case['steps']} steps")
    for name, found in (("without a save", without), ("with one save", with_save)):
        print(f"{name:16s} {' '.join(f'{value:7.2f}' for value in found)} s")
    print(f"lost: {' '.join(f'{value:.2f}' for value in lost)} s, {100 * share:.2f} % of {case['steps']} steps")
    print(f"the loop is held for {statistics.median(blocked):.3f} s; a save that is awaited takes {awaited:.2f} s")
    for name, found in medians.items():
        print(f"{name:20s} {found:6.2f} s, {size / found / 1e6:6.0f} MB/s")
    for where in ("cache", "disk"):
        ratio = medians[f"restore from {where}"] / medians[f"read from {where}"]
        print(f"restore, verified, beside reading the files from {where}: {ratio:.1f} times as long")
    if arguments.json:
        figures = {"lost": lost, "without": without, "with": with_save, "share": share, "blocked": blocked}
        figures |= {"awaited": awaited, "bytes": size, "medians": medians, "runs": timed, "case": case}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
