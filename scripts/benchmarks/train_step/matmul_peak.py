"""The most that a plain product of two matrices reaches here, in FLOP/s: `matmul_peak.py jax|torch`.

The best of three runs over shapes and over both orders of the second matrix, for float32 and bfloat16. Prints JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = ((2048, 2048, 2048), (4096, 512, 4096), (4096, 2048, 4096), (8192, 1024, 1024))
TYPES = ("float32", "bfloat16")


def of_jax(dtype: str, m: int, k: int, n: int, transposed: bool) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    one, two = jnp.ones((m, k), dtype), jnp.ones((n, k) if transposed else (k, n), dtype)
    product = jax.jit(lambda one, two: jnp.dot(one, two.T if transposed else two))
    return lambda: jax.block_until_ready(product(one, two))


def of_torch(dtype: str, m: int, k: int, n: int, transposed: bool) -> Callable[[], Any]:
    import torch

    kind = getattr(torch, dtype)
    one, two = torch.ones(m, k, dtype=kind), torch.ones((n, k) if transposed else (k, n), dtype=kind)
    return lambda: one @ (two.T if transposed else two)


def best(make: Callable[..., Callable[[], Any]], dtype: str) -> float:
    highest = 0.0
    for m, k, n in SHAPES:
        for transposed in (False, True):
            product = make(dtype, m, k, n, transposed)
            product()
            for _ in range(3):
                start = time.perf_counter()
                product()
                highest = max(highest, 2 * m * k * n / (time.perf_counter() - start))
    return highest


if __name__ == "__main__":
    make = {"jax": of_jax, "torch": of_torch}[sys.argv[1]]
    print(json.dumps({dtype: best(make, dtype) for dtype in TYPES}))
