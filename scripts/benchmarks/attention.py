"""What does attention cost on this CPU, forward and backward, beside torch's scaled_dot_product_attention?

    python scripts/benchmarks/attention.py [--quick] [--json FILE]

Times one layer's attention, from query, key and value to the result and the three gradients, in one process in turn:
ours as `reference` (all scores at once) and `blockwise`, and torch's, where it is installed, with `is_causal`. Rows are
one document each, which is the most work, and for ours also eight documents each, which torch has no argument for but a
mask. Wall time is the median and the least of the rounds; CPU time is of all threads, and on a machine with other work
it says more.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eurollm_jax.parallel.cpu import keep_freed_memory

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
TOKENS = 4096  # in a batch, whatever the length of its rows
DOCUMENTS = 8


def ours(length: int, dtype: str) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from eurollm_jax.model.attention import packed_attention
    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    rows, rng = TOKENS // length, np.random.default_rng(0)
    q, k, v, gradient = (
        jnp.asarray(rng.normal(size=(rows, length, heads, HEAD_DIM)), dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )

    def runner(kernel: Any, documents: int) -> Callable[[], Any]:
        segments = jnp.broadcast_to(1 + jnp.arange(length) * documents // length, (rows, length))

        def both(q: Any, k: Any, v: Any, gradient: Any, segments: Any) -> Any:
            def attend(q: Any, k: Any, v: Any) -> Any:
                return packed_attention(
                    q, k, v, segments, window=None, scale=None, cap=None, kernel=kernel, layout=layout
                )

            out, back = jax.vjp(attend, q, k, v)
            return out, back(gradient)

        compiled = jax.jit(both).lower(q, k, v, gradient, segments).compile()
        return lambda: jax.block_until_ready(compiled(q, k, v, gradient, segments))

    return {
        "reference": runner("reference", 1),
        "blockwise": runner("blockwise", 1),
        f"blockwise, {DOCUMENTS} documents a row": runner("blockwise", DOCUMENTS),
    }


def theirs(length: int, dtype: str) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ImportError:
        return {}
    torch.manual_seed(0)
    q, k, v, gradient = (
        torch.randn(TOKENS // length, heads, length, HEAD_DIM, dtype=getattr(torch, dtype))
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def run() -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.autograd.grad(attend(q, k, v, is_causal=True, enable_gqa=True), (q, k, v), gradient)

    return {"torch": run}


def timed(runners: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, after one that is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    for _ in range(rounds):
        for name, run in runners.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - used))
    return {
        name: {"median": statistics.median(wall[name]), "least": min(wall[name]), "cpu": statistics.median(cpu[name])}
        for name in runners
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rows of 512 in bfloat16 alone, three rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    sizes = [(512, "bfloat16")] if arguments.quick else [(n, t) for n in (512, 2048) for t in ("bfloat16", "float32")]
    versions = {}
    for package in ("jax", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    print(", ".join(f"{name} {found}" for name, found in versions.items()), f"Python {platform.python_version()}")
    print(
        f"{HEADS} heads, {KV_HEADS} key/value heads of {HEAD_DIM}, {TOKENS} tokens; milliseconds, forward and backward"
    )
    tables = []
    for length, dtype in sizes:
        figures = timed(ours(length, dtype) | theirs(length, dtype), 3 if arguments.quick else 11)
        print(f"\n{TOKENS // length} rows of {length}, {dtype:30s} median   least     CPU")
        for name, row in figures.items():
            print(f"{name:48s} {row['median']:7.0f} {row['least']:7.0f} {row['cpu']:7.0f}")
        ratios = {}
        for peer in figures.keys() & {"reference", "torch"}:
            ratios[peer] = {what: figures[peer][what] / figures["blockwise"][what] for what in figures[peer]}
            print(f"{peer} / blockwise: " + ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios[peer].items()))
        tables.append({"length": length, "dtype": dtype, "milliseconds": figures, "ratios": ratios})
    if arguments.json:
        sizes_of = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "tokens": TOKENS}
        arguments.json.write_text(json.dumps({"versions": versions, **sizes_of, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
