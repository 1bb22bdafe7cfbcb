"""How much memory does the loss need beside one that holds all logits, and is it slower?

    python scripts/benchmarks/loss_memory.py [--quick] [--json FILE]

Compiles loss and gradient (of bfloat16 hidden states and a float32 head, with z-loss) at a vocabulary of 262,144, ours
and the textbook form over whole logits, and prints the temporary memory of both by XLA's analysis of the compiled
programs. Then both run in turn at a size that fits into a small machine, and medians of their seconds are printed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    rows: int
    length: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.length} tokens, width {self.width}, vocabulary {self.vocabulary:,}"


COMPILED = Size(8, 2048, 1024, 262_144)
TIMED = Size(8, 512, 512, 32_000)
TIMED_QUICK = Size(4, 256, 256, 32_000)
Z_LOSS = 1e-4


def programs() -> dict[str, Callable[..., Any]]:
    """Loss and gradient of (hidden, head, targets, mask)."""
    import jax
    import jax.numpy as jnp

    from eurollm_jax.model.loss import cross_entropy
    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    layout = Layout(MeshConfig().build(jax.devices()[:1]))

    def ours(hidden: Any, head: Any, targets: Any, mask: Any) -> Any:
        return cross_entropy(hidden, head, targets, mask, z_loss=Z_LOSS, layout=layout)[0]

    def full(hidden: Any, head: Any, targets: Any, mask: Any) -> Any:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.dot(flat, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
        return jnp.sum(jnp.where(mask.reshape(-1), nats + Z_LOSS * jnp.square(log_z), 0.0))

    return {"ours": jax.jit(jax.value_and_grad(ours, (0, 1))), "full": jax.jit(jax.value_and_grad(full, (0, 1)))}


def temporary_memory(function: Any, size: Size) -> int:
    """Bytes beside arguments and results."""
    import jax
    import jax.numpy as jnp

    shape = jax.ShapeDtypeStruct
    rows = (size.rows, size.length)
    lowered = function.lower(
        shape((*rows, size.width), jnp.bfloat16),
        shape((size.width, size.vocabulary), jnp.float32),
        shape(rows, jnp.int32),
        shape(rows, jnp.bool_),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def timed(functions: dict[str, Any], size: Size, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, in turn."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    dice = np.random.default_rng(0)
    hidden = jnp.asarray(dice.normal(size=(size.rows, size.length, size.width)), jnp.bfloat16)
    head = jnp.asarray(dice.normal(size=(size.width, size.vocabulary)) * size.width**-0.5, jnp.float32)
    targets = jnp.asarray(dice.integers(0, size.vocabulary, (size.rows, size.length)), jnp.int32)
    given = hidden, head, targets, jnp.ones((size.rows, size.length), jnp.bool_)
    values = {kind: float(function(*given)[0]) for kind, function in functions.items()}
    np.testing.assert_allclose(values["ours"], values["full"], rtol=1e-4)
    seconds: dict[str, list[float]] = {kind: [] for kind in functions}
    for _ in range(rounds):
        for kind, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*given))
            seconds[kind].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="times a smaller size, three rounds in place of nine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from eurollm_jax.parallel.cpu import keep_freed_memory

    keep_freed_memory()
    import jax

    print(f"jax {version('jax')}, Python {platform.python_version()}, {jax.devices()[0].device_kind}")
    functions = programs()
    memory = {kind: temporary_memory(function, COMPILED) for kind, function in functions.items()}
    share = memory["ours"] / memory["full"]
    print(f"temporary memory of loss and gradient: {COMPILED}")
    for kind, size in memory.items():
        print(f"{kind:5s} {size / 2**20:10,.0f} MiB")
    print(f"ours / full: {share:.1%}")

    at = TIMED_QUICK if arguments.quick else TIMED
    seconds = timed(functions, at, rounds=3 if arguments.quick else 9)
    medians = {kind: statistics.median(rounds) for kind, rounds in seconds.items()}
    ratio = medians["full"] / medians["ours"]
    print(f"seconds, medians of {len(seconds['ours'])} rounds in turn: {at}")
    for kind, median in medians.items():
        print(f"{kind:5s} {median:7.2f} s  (from {min(seconds[kind]):.2f} to {max(seconds[kind]):.2f})")
    print(f"full / ours: {ratio:.2f}")
    if arguments.json:
        result = {
            "jax": version("jax"),
            "device": jax.devices()[0].device_kind,
            "memory": {"size": vars(COMPILED), "bytes": memory, "share": share},
            "time": {"size": vars(at), "seconds": seconds, "medians": medians, "ratio": ratio},
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
