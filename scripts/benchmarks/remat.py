"""What does each remat policy cost in time, and what does it save in memory?

    python scripts/benchmarks/remat.py [--quick] [--json FILE]

Compiles the loss and gradient of a model with 56 million parameters under every policy of `TransformerConfig.remat`,
8 rows of 512 tokens in bfloat16 on one device, and prints the scratch memory that the compiled program asks for, and
its seconds: the policies take turns, and the fastest of each one's turns counts.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.param import count, init
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import flops_per_token, specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.parallel.mesh import Layout, MeshConfig

POLICIES = ("none", "dots", "attention", "full", "offload")
MODEL = TransformerConfig(
    vocab_size=32000, width=512, depth=8, heads=8, kv_heads=4, head_dim=64, max_positions=2048, mlp=Gated(1408)
)
QUICK = replace(MODEL, vocab_size=4096, width=256, depth=4, mlp=Gated(704))


def rows(model: TransformerConfig, batch: int, length: int) -> Batch:
    """Rows of one document each."""
    tokens = np.random.default_rng(0).integers(4, model.vocab_size, (batch, length)).astype(np.int32)
    ones, at = np.ones_like(tokens), np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return Batch(tokens, tokens, ones, at, ones.astype(bool), np.zeros(batch, np.int32))


def compiled(model: TransformerConfig, layout: Layout, params: Any, batch: Batch) -> Any:
    def gradient(params: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda params: batch_loss(params, batch, model, layout)[0])(params)

    return jax.jit(gradient).lower(params, batch).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and two turns in place of five")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, turns, batch_size, length = (QUICK, 2, 4, 256) if arguments.quick else (MODEL, 5, 8, 512)
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    if layout.backend == "cpu":
        keep_freed_memory()
    batch, params = layout.place_rows(rows(model, batch_size, length)), init(specs(model), jax.random.key(0))
    programs, refused = {}, {}
    for remat in POLICIES:
        try:
            require_memory(remat, layout)
        except UserError as error:
            refused[remat] = str(error)
            continue
        programs[remat] = compiled(replace(model, remat=remat), layout, params, batch)
    seconds: dict[str, list[float]] = {remat: [] for remat in programs}
    losses = {}
    for turn in range(turns + 1):
        for remat, program in programs.items():
            start = time.perf_counter()
            loss, _ = jax.block_until_ready(program(params, batch))
            if turn:
                seconds[remat].append(time.perf_counter() - start)
            losses[remat] = float(loss)
    scratch = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
    tokens = batch_size * length
    table = {
        remat: {
            "scratch_bytes": scratch[remat],
            "scratch_share": scratch[remat] / scratch["none"],
            "seconds": min(seconds[remat]),
            "tokens_per_second": tokens / min(seconds[remat]),
            "time_share": min(seconds[remat]) / min(seconds["none"]),
            "loss": losses[remat],
        }
        for remat in programs
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("jax", "jaxlib")}}
    print(", ".join(f"{name} {number}" for name, number in versions.items()), f"on {jax.devices()[0].device_kind}")
    print(
        f"{count(specs(model)):,} parameters, {batch_size} rows of {length} tokens, {model.compute}, "
        f"{flops_per_token(model, length):.3g} FLOP a token; loss and gradient, fastest of {turns} turns"
    )
    print(f"{'policy':<10} {'scratch':>10} {'of none':>8} {'seconds':>8} {'of none':>8} {'tokens/s':>9} {'loss':>11}")
    for remat, row in table.items():
        print(
            f"{remat:<10} {row['scratch_bytes'] / 2**20:>6.0f} MiB {row['scratch_share']:>8.2f} {row['seconds']:>8.3f} "
            f"{row['time_share']:>8.2f} {row['tokens_per_second']:>9,.0f} {row['loss']:>11.3f}"
        )
    for remat, reason in refused.items():
        print(f"{remat:<10} {reason}")
    if arguments.json:
        size = {"parameters": count(specs(model)), "batch": batch_size, "length": length, "turns": turns}
        arguments.json.write_text(
            json.dumps({"versions": versions, "size": size, "policies": table, "refused": refused}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
