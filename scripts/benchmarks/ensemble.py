"""What is won by training K small models in one program, beside the same runs one after another?

    python scripts/benchmarks/ensemble.py [--quick] [--members 8 16] [--optimizer adamw|muon] [--rounds N] [--json FILE]

A Llama of 1.4M parameters on random tokens, with the project's own train steps on one device, three ways:

    at once       one program whose arrays have a leading axis of K members, compiled once
    in turn       one run after another in one process, which keep the program of one run: compiled once
    fresh         one run after another, each of which compiles its program anew, as separate commands do

The ways take turns in stretches of steps; a figure is a median over the stretches. Tokens per second are those of all
members together. Wall-clock is of K runs of so many steps each: drawing the weights and compiling as measured here,
without a cache of compiled programs, and the steps at the measured rate; the start of Python, which separate commands
pay as well, is left out. Memory is the compiler's account of the train step, for each member. --quick takes a tiny
model, 2 members and few steps.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # before jax: what is compiled here is compiled for good

import jax
import numpy as np

from eurollm_jax.data.batch import Batch
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.cpu import keep_freed_memory
from eurollm_jax.training.ensemble_step import build_ensemble, layout_of
from eurollm_jax.training.optimizer import AdamW, Muon
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.step import build_program

FULL = {"width": 128, "depth": 4, "vocab": 2048, "length": 128, "rows": 8, "steps": 10}
QUICK = {"width": 32, "depth": 2, "vocab": 512, "length": 32, "rows": 4, "steps": 3}
OPTIMIZERS = {"adamw": AdamW, "muon": Muon}
RUN_STEPS = (100, 500, 2000)  # that the runs have whose wall-clock is worked out
GOAL = 2.0  # wall-clock at once beside fresh
WAYS = ("at once", "in turn", "fresh")


class Case:
    """The model and what its two programs share."""

    def __init__(self, sizes: dict[str, int], optimizer: str) -> None:
        self.rows, self.length, self.vocab = sizes["rows"], sizes["length"], sizes["vocab"]
        self.config = TransformerConfig(
            vocab_size=self.vocab,
            width=sizes["width"],
            depth=sizes["depth"],
            heads=sizes["width"] // 32,
            kv_heads=sizes["width"] // 32,
            head_dim=32,
            mlp=Gated(3 * sizes["width"]),
            max_positions=self.length,
            remat="none",
        )
        self.optimizer, self.schedule = OPTIMIZERS[optimizer](), WSD(peak=1e-3, warmup=10)
        self.devices = jax.devices()[:1]
        self.shared = {"token_bytes": np.ones(self.vocab, np.int32), "sources": 1, "z_loss": 1e-4, "skip": SkipStep()}

    def batch(self, *members: int) -> Batch:
        tokens = np.random.default_rng(0).integers(4, self.vocab, (*members, self.rows, self.length)).astype(np.int32)
        ones = np.ones_like(tokens)
        at = np.broadcast_to(np.arange(self.length, dtype=np.int32), tokens.shape).copy()
        return Batch(tokens, tokens, ones, at, ones.astype(bool), np.zeros((*members, self.rows), np.int32))

    def at_once(self, members: int) -> tuple[Any, Any, Any]:
        """(train step, state, batch) of all members, from nothing."""
        program = build_ensemble(
            self.config,
            layout_of(members, self.devices),
            self.optimizer,
            [self.schedule] * members,
            steps=1000,
            heldout_sources=1,
            **self.shared,
        )
        train = program.compile_train(self.rows, self.length)
        state = program.init(jax.random.split(jax.random.key(0), members))
        return train, jax.block_until_ready(state), program.place(self.batch(members))

    def alone(self) -> tuple[Any, Any, Any]:
        """The same of one run."""
        layout = layout_of(1, self.devices)
        optimizer = self.optimizer.build(self.schedule.build(1000), specs(self.config))
        program = build_program(
            self.config, layout, optimizer, batch_sizes=[self.rows], length=self.length, **self.shared
        )
        train = program.compile_train(self.rows, self.length)
        state = jax.block_until_ready(program.init(jax.random.key(0)))
        return train, state, layout.place_rows(self.batch())


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def stretch(train: Any, state: Any, batch: Any, steps: int) -> tuple[float, Any]:
    """Seconds of a step, one ahead of the other as in the loop; and the state after so many."""
    start, before = time.perf_counter(), None
    for _ in range(steps):
        state, metrics = train(state, batch)
        jax.block_until_ready(before)
        before = metrics
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps, state


def memory(train: Any, members: int) -> dict[str, float] | None:
    """Bytes of each member; None where the backend keeps no account."""
    account = train.memory_analysis()
    if account is None:
        return None
    return {"state": account.alias_size_in_bytes / members, "temporary": account.temp_size_in_bytes / members}


def measure(case: Case, members: int, steps: int, rounds: int) -> dict[str, Any]:
    print(f"\n{members} members", flush=True)
    starts: dict[str, list[float]] = {"at once": [], "alone": []}
    step_times: dict[str, list[float]] = {"at once": [], "alone": []}
    makers: dict[str, Callable[[], Any]] = {"at once": lambda: case.at_once(members), "alone": case.alone}
    accounts: dict[str, Any] = {}
    for number in range(rounds):
        running: dict[str, Any] = {}
        for way in ("at once", "alone") if number % 2 == 0 else ("alone", "at once"):
            taken, (train, state, batch) = seconds(makers[way])
            starts[way].append(taken)
            accounts[way] = memory(train, members if way == "at once" else 1)
            _, state = stretch(train, state, batch, 2)
            running[way] = train, state, batch
        for way in ("at once", "alone", "alone", "at once"):
            train, state, batch = running[way]
            taken, state = stretch(train, state, batch, steps)
            running[way] = train, state, batch
            step_times[way].append(taken if way == "at once" else members * taken)
        said = "; ".join(
            f"{way} {starts[way][-1]:.1f} s to compile and begin, "
            + " and ".join(f"{1e3 * one:.1f}" for one in step_times[way][-2:])
            + " ms a step of all"
            for way in ("at once", "alone")
        )
        print(f"round {number + 1}: {said}", flush=True)
    begin, step = ({way: statistics.median(some) for way, some in found.items()} for found in (starts, step_times))
    tokens = members * case.rows * case.length
    begins = {"at once": begin["at once"], "in turn": begin["alone"], "fresh": members * begin["alone"]}
    each = {"at once": step["at once"], "in turn": step["alone"], "fresh": step["alone"]}
    return {
        "members": members,
        "begin": begin,
        "step": step,
        "starts": starts,
        "steps": step_times,
        "tokens_per_second": {way: tokens / taken for way, taken in step.items()},
        "wall_clock": {n: {way: begins[way] + n * each[way] for way in WAYS} for n in RUN_STEPS},
        "bytes_of_each": accounts,
    }


def report(found: dict[str, Any]) -> None:
    rate, members = found["tokens_per_second"], found["members"]
    print(f"{members} members: tokens/s of all without compiling: {rate['at once']:,.0f} at once, {rate['alone']:,.0f}")
    print(f"    one after another: {rate['at once'] / rate['alone']:.2f} x")
    for steps, row in found["wall_clock"].items():
        figures = ", ".join(f"{way} {taken:.1f} s" for way, taken in row.items())
        gains = ", ".join(f"{row[way] / row['at once']:.2f} x {way}" for way in WAYS[1:])
        print(f"    runs of {steps:4d} steps with compiling: {figures}; at once is {gains}")
    if all(found["bytes_of_each"].values()):
        for way, account in found["bytes_of_each"].items():
            figures = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in account.items())
            print(f"    memory of a member, {way}: {figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 members, few steps")
    parser.add_argument("--members", nargs="+", type=int, metavar="K", help="(default: 8 16)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: adamw)")
    parser.add_argument("--rounds", type=int, help="(default: 3)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    sizes = QUICK if arguments.quick else FULL
    case, before = Case(sizes, arguments.optimizer), os.getloadavg()[0]
    print(", ".join(f"{name} {number}" for name, number in _versions().items()))
    print(f"{case.devices[0].device_kind}, {os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    parameters = count(specs(case.config))
    print(f"{parameters:,} parameters, {case.rows} rows of {case.length} tokens, {arguments.optimizer}", flush=True)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    found = []
    for members in arguments.members or ([2] if arguments.quick else [8, 16]):
        found.append(measure(case, members, sizes["steps"], rounds))
        report(found[-1])
    print(f"\nload of the machine {before:.1f} before and {os.getloadavg()[0]:.1f} after, {rounds} rounds")
    for one in found:
        with_compiling = one["wall_clock"][RUN_STEPS[0]]["fresh"] / one["wall_clock"][RUN_STEPS[0]]["at once"]
        rate = one["tokens_per_second"]["at once"] / one["tokens_per_second"]["alone"]
        print(
            f"{one['members']} members, {RUN_STEPS[0]} steps: at least {GOAL:g} x with compiling: "
            f"{'yes' if with_compiling >= GOAL else 'no'}; no lower throughput without: {'yes' if rate >= 1 else 'no'}"
        )
    if arguments.json:
        content = {"versions": _versions(), "parameters": parameters, **sizes, "rounds": rounds, "measured": found}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("eurollm_jax", "jax", "jaxlib", "optax")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
