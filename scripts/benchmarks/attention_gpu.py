"""What does attention cost on one GPU, forward and backward, and is each kernel right there?

    python scripts/benchmarks/attention_gpu.py [--tune] [--json FILE]

First every kernel against `attention` with the mask written out in float32: relative errors (Frobenius) of the result
and the three gradients, over head sizes, windows, soft caps, odd lengths, padding and grouped heads; above 1.5e-2 the
script ends with status 1. Then times of one layer's attention in bfloat16, with documents of exponentially distributed
lengths; "cudnn, no documents" is the same library without a mask, which lets documents see each other. A rate counts
causal attention at half of the row, whatever documents leave of it. --tune times the tiles of the Pallas kernel.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.model import attention_pallas
from eurollm_jax.model.attention import attention, document_mask, packed_attention
from eurollm_jax.model.attention_pallas import TILES, Tile, pallas_attention
from eurollm_jax.parallel.mesh import Layout, MeshConfig

WRONG = 1.5e-2  # bfloat16 keeps 8 bits: errors of single values are up to 4e-3
KERNELS = ("pallas", "cudnn", "blockwise")
CHECKS = [  # rows, length, heads, key/value heads, head_dim, mean document, window, cap
    (2, 512, 4, 2, 64, 100, None, None),
    (2, 512, 4, 2, 64, 100, 100, None),
    (3, 1023, 8, 8, 128, 200, None, None),
    (3, 1023, 8, 2, 128, 200, 300, 30.0),
    (2, 640, 4, 4, 96, 3, None, None),
    (2, 1024, 6, 1, 80, 5000, 257, None),
]
TIMES = [  # rows, length, heads, key/value heads, head_dim, mean document
    (4, 4096, 16, 8, 128, 800),
    (8, 2048, 16, 8, 128, 500),
    (2, 8192, 32, 8, 128, 1500),
    (4, 4096, 32, 8, 64, 800),
    (4, 4096, 16, 8, 128, 100_000),
]
TUNED = list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)))  # queries, keys, warps, stages


def arrays(rows: int, length: int, heads: int, groups: int, dims: int, mean: int) -> tuple[Any, ...]:
    """Query, key, value, the gradient of the result, and segments; the last row ends in padding."""
    rng = np.random.default_rng(0)
    shaped = (
        jnp.asarray(rng.normal(size=(rows, length, n, dims)), jnp.bfloat16) for n in (heads, groups, groups, heads)
    )
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        at, number = 0, 1
        while at < length:
            size = max(1, int(rng.exponential(mean)))
            row[at : at + size], at, number = number, at + size, number + 1
    segments[-1, length - length // 7 :] = 0
    return (*shaped, jnp.asarray(segments))


def with_gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    def both(q: Any, k: Any, v: Any, gradient: Any, segments: Any) -> Any:
        out, back = jax.vjp(lambda q, k, v: f(q, k, v, segments), q, k, v)
        return out, *back(gradient.astype(out.dtype))

    return both


def kernel(name: str, window: int | None = None, cap: float | None = None) -> Callable[..., Any]:
    layout = Layout(MeshConfig().build(jax.devices()[:1]))
    return partial(packed_attention, window=window, scale=None, cap=cap, kernel=name, layout=layout)  # type: ignore[arg-type]


def without_documents(q: Any, k: Any, v: Any, segments: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def milliseconds(f: Callable[..., Any], *arguments: Any, rounds: int = 20, together: int = 4) -> float:
    compiled = jax.jit(f).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [compiled(*arguments) for _ in range(together)]
        jax.block_until_ready(results)
        taken.append((time.perf_counter() - start) / together)
    return 1e3 * statistics.median(taken)


def check() -> list[dict[str, Any]]:
    found = []
    for *shape, window, cap in CHECKS:
        given = arrays(*shape)

        def oracle(q: Any, k: Any, v: Any, segments: Any, window: Any = window, cap: Any = cap) -> Any:
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            return attention(q, k, v, document_mask(segments, window), cap=cap)

        with jax.default_matmul_precision("highest"):
            wanted = [np.asarray(x, np.float64) for x in jax.jit(with_gradients(oracle))(*given)]
        for name in KERNELS:
            if name == "cudnn" and cap is not None:
                continue  # it has none
            results = jax.jit(with_gradients(kernel(name, window, cap)))(*given)
            errors = [
                float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))
                for x, y in zip(results, wanted, strict=True)
            ]
            wrong = not max(errors) < WRONG  # what is not a number is wrong
            found.append(
                {"shape": shape, "window": window, "cap": cap, "kernel": name, "errors": errors, "wrong": wrong}
            )
            said = " ".join(f"{error:.1e}" for error in errors)
            print(f"{shape!s:36s} window {window!s:5s} cap {cap!s:5s} {name:10s} {said}{'  WRONG' * wrong}", flush=True)
    return found


def compare() -> list[dict[str, Any]]:
    found = []
    for shape in TIMES:
        rows, length, heads, _, dims, _ = shape
        q, k, v, gradient, segments = arrays(*shape)
        flops = 3.5 * 4 * rows * heads * dims * length**2 / 2
        for name in (*KERNELS, "cudnn, no documents"):
            f = without_documents if name == "cudnn, no documents" else kernel(name)
            forward = milliseconds(f, q, k, v, segments)
            both = milliseconds(with_gradients(f), q, k, v, gradient, segments)
            found.append({"shape": shape, "kernel": name, "forward": forward, "both": both})
            print(
                f"{shape!s:36s} {name:20s} {forward:7.2f} {both:7.2f} ms {flops / both / 1e9:5.0f} TFLOP/s", flush=True
            )
    return found


def tune() -> None:
    """The fastest tiles of each of the three kernels, the others being as they are."""
    for shape in TIMES[:4]:
        q, k, v, gradient, segments = arrays(*shape)
        size = max(128, shape[4] * 2)
        for part in ("forward", "keys", "queries"):
            results = []
            for numbers in TUNED:
                tiles = TILES[size]._replace(**{part: Tile(*numbers)})
                f = partial(pallas_attention, window=None, scale=shape[4] ** -0.5, cap=None, tiles=tiles)
                attend = lambda q, k, v, s, f=f: f(q, k, v, s, s, 0)  # noqa: E731
                try:
                    results.append(
                        (milliseconds(with_gradients(attend), q, k, v, gradient, segments, rounds=8), numbers)
                    )
                except Exception as error:  # such as one that needs more shared memory than there is
                    print(f"  {part} {numbers}: {str(error).splitlines()[0][:100]}", flush=True)
            best = ", ".join(f"{numbers} {ms:.2f} ms" for ms, numbers in sorted(results)[:3])
            print(f"{shape!s:36s} {part:8s} {best}", flush=True)
            attention_pallas.TILES[size] = TILES[size]._replace(**{part: Tile(*min(results)[1])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("there is no GPU here: scripts/benchmarks/attention.py measures a CPU")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("rows, length, heads, kv heads, head_dim, mean document; errors of result, query, key and value gradients")
    checked = check()
    print("forward alone, forward and backward, and the rate of both")
    timed = compare()
    if arguments.tune:
        tune()
    if arguments.json:
        arguments.json.write_text(json.dumps({"checks": checked, "times": timed}, indent=1) + "\n")
    if any(row["wrong"] for row in checked):
        sys.exit("a kernel is wrong")


if __name__ == "__main__":
    main()
