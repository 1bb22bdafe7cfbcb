"""How many tokens a second does a train step take in, beside torch, MaxText and Levanter on the same CPU?

    python scripts/benchmarks/train_step.py [--quick] [--sizes 56M ...] [--peers torch ...] [--json FILE]

All train the same Llama (RMSNorm, rotary positions, grouped queries, SwiGLU, untied head) on the same number of random
tokens, one document a row, with AdamW (0.9, 0.95, decay 0.1), gradients clipped to norm 1, no z-loss, products in
bfloat16. Each is a process of its own that stays alive and trains a few steps when it is told to; the others wait
meanwhile and take no processor time. In each round all take a turn, in one order and then in the other. Of a turn of
several steps the first two do not count: who waits gives its freed memory back, and fetches it again in them. Whose
step takes above 15 s trains one a turn, in the first and the last round. A step ends when the new state is there.

- eurollm_jax: `build_program(...).compile_train`, weights and moments in float32, nothing recomputed unless --remat
  says so (the library's default is "full"). "packed" are the same rows cut into documents of 170 tokens on average.
- torch: transformers' LlamaForCausalLM, SDPA attention, fused AdamW, nothing recomputed; eager, and with torch.compile
  over model and loss. With float32 weights and autocast, and all in bfloat16, moments too. The best of the four counts.
- MaxText and Levanter: their own trainers, called as a user calls them, with plain attention, which is what they have
  on a CPU, and with their own default of recomputing each layer; with --saving, without it, too, and the better one
  counts. Weights, gradients and moments in float32.

Their environments are made below ~/.cache/eurollm_jax/benchmarks from train_step/*.txt; torch is the one of the extra
`verify`. The share of the peak is the model's FLOPs (`flops_per_token`: causal attention at half, nothing recomputed)
by the most that a product of matrices reached here in bfloat16, of XLA or torch, whichever was more.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "train_step"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "eurollm_jax" / "benchmarks"

SMALL = {"vocab": 8192, "width": 256, "depth": 8, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 704}
MEDIUM = {"vocab": 32_000, "width": 512, "depth": 8, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp": 1408}
LARGE = {"vocab": 55_296, "width": 768, "depth": 12, "heads": 12, "kv_heads": 4, "head_dim": 64, "mlp": 2048}
SIZES = {
    "10M": {**SMALL, "length": 512, "batch": 8},
    "56M": {**MEDIUM, "length": 512, "batch": 8},
    "160M": {**LARGE, "length": 512, "batch": 4},
    "56M-long": {**MEDIUM, "length": 2048, "batch": 2},
}

TURN = 8.0  # seconds that a turn's steps should fill
WAKING = 2  # steps of a turn that do not count
SLOW = 15.0  # seconds of a step

OURS, TORCH, MAXTEXT, LEVANTER = "eurollm_jax", "torch", "MaxText", "Levanter"
PEERS = {"torch": TORCH, "maxtext": MAXTEXT, "levanter": LEVANTER}
REQUIREMENTS = {MAXTEXT: "maxtext.txt", LEVANTER: "levanter.txt"}


@dataclass(frozen=True)
class Contestant:
    who: str
    script: str
    forms: dict[str, str]  # what the process calls each form that it trains in -> what the table does
    options: dict[str, Any]


@dataclass
class Worker:
    """A contestant's process."""

    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any]
    steps: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # of each form, what counts
    warm: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # and what came before


class FailedError(Exception):
    """What a contestant said last."""


# ---------------------------------------------------------------------------------------------------- environments


def environments(who: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each contestant, and why there is none for the others."""
    pythons, failed = {OURS: sys.executable}, {}
    for name in sorted(who - {OURS}):
        try:
            pythons[name] = _torch() if name == TORCH else _made(name)
        except (FailedError, OSError) as error:
            failed[name] = str(error)
    return pythons, failed


def _torch() -> str:
    done = subprocess.run([sys.executable, "-c", "import torch, transformers"], capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"{_last(done.stderr)}: install eurollm_jax[verify]")
    return sys.executable


def _made(name: str) -> str:
    """An environment with what the peer's list pins; made once."""
    listed = HERE / REQUIREMENTS[name]
    folder = CACHE / f"{name.lower()}-{hashlib.sha256(listed.read_bytes()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return str(python)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise FailedError("there is no uv to install it with: install eurollm_jax[dev]")
    print(f"installing {name} into {folder} ...", file=sys.stderr)
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "--requirement", str(listed)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise FailedError(f"not installed: {_last(done.stderr)}")
    (folder / "ready").touch()
    return str(python)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# --------------------------------------------------------------------------------------------------------- turns


def start(contestant: Contestant, python: str, shape: dict[str, int], logs: Path) -> Worker:
    log = logs / f"{len(list(logs.iterdir()))}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(HERE / contestant.script), json.dumps(shape | contestant.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
    worker = Worker(process, log, {})
    worker.facts = _answer(worker)
    for form in contestant.forms:
        worker.warm[form], worker.steps[form] = [], []
        worker.warm[form] += train(worker, form, 1)
        if worker.warm[form][-1]["seconds"] < SLOW or len(contestant.forms) > 1:  # compiled within its first step
            worker.warm[form] += train(worker, form, 1)
    return worker


def train(worker: Worker, form: str, count: int) -> list[dict[str, float]]:
    assert worker.process.stdin is not None
    try:
        worker.process.stdin.write(f"{form} {count}\n")
        worker.process.stdin.flush()
    except BrokenPipeError:
        pass  # what it said last is in its log
    return [_answer(worker) for _ in range(count)]


def turn(worker: Worker, form: str, *, at_the_edge: bool) -> None:
    """One turn of a round; `at_the_edge`, it is the first or the last."""
    usual = min(step["seconds"] for step in worker.warm[form] + worker.steps[form])
    if usual > SLOW:
        if at_the_edge:
            worker.steps[form] += train(worker, form, 1)
        return
    steps = train(worker, form, WAKING + min(5, max(1, round(TURN / usual))))
    worker.warm[form] += steps[:WAKING]
    worker.steps[form] += steps[WAKING:]


def end(worker: Worker) -> None:
    worker.process.kill()
    worker.process.communicate()


def _answer(worker: Worker) -> dict[str, Any]:
    assert worker.process.stdout is not None
    line = worker.process.stdout.readline()
    if not line:
        code = worker.process.wait()
        raise FailedError(f"ended with {code}: {_last(worker.log.read_text(errors='replace'))}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def compare(
    contestants: list[Contestant], pythons: dict[str, str], shape: dict[str, int], rounds: int
) -> dict[str, Any]:
    """The figures of each contestant and form at one size, and why some have none."""
    workers: list[tuple[Contestant, Worker]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as logs:
        for contestant in contestants:
            label = next(iter(contestant.forms.values()))
            print(f"  starting {label} ...", file=sys.stderr)
            try:
                workers.append((contestant, start(contestant, pythons[contestant.who], shape, Path(logs))))
            except FailedError as error:
                failed[label] = str(error)
        for number in range(rounds):
            print(f"  round {number + 1} of {rounds} ...", file=sys.stderr)
            turns = [(*pair, form) for pair in workers for form in pair[0].forms]
            for contestant, worker, form in turns if number % 2 == 0 else turns[::-1]:
                if contestant.forms[form] in failed:
                    continue
                try:
                    turn(worker, form, at_the_edge=number in (0, rounds - 1))
                except FailedError as error:
                    failed |= dict.fromkeys(contestant.forms.values(), str(error))
        for _, worker in workers:
            end(worker)
    measured = {}
    for contestant, worker in workers:
        for form, label in contestant.forms.items():
            if label not in failed:
                measured[label] = {"who": contestant.who, **worker.facts, **_figures(worker, form, shape)}
    sizes = {row["parameters"] for row in measured.values()}
    if len(sizes) > 1:
        sys.exit(f"not the same model: { ({label: row['parameters'] for label, row in measured.items()}) }")
    return {"shape": shape, "measured": measured, "failed": failed}


def _figures(worker: Worker, form: str, shape: dict[str, int]) -> dict[str, Any]:
    tokens, steps = shape["batch"] * shape["length"], worker.steps[form]
    rates = [tokens / step["seconds"] for step in steps]
    return {
        "tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "tokens_per_cpu_second": statistics.median(tokens / step["cpu_seconds"] for step in steps),
        "first_step": worker.warm[form][0]["seconds"],
        "first_loss": worker.warm[form][0]["loss"],
        "last_loss": steps[-1]["loss"],
        "peak": max(step["peak"] for step in steps),
        "steps": steps,
    }


# -------------------------------------------------------------------------------------------------------- figures


def peaks(pythons: dict[str, str]) -> dict[str, dict[str, float]]:
    """The most FLOP/s of a product, by who computes it and in which type."""
    found = {}
    for who, name in ((OURS, "jax"), (TORCH, "torch")):
        if who in pythons:
            command = [pythons[who], str(HERE / "matmul_peak.py"), name]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            if done.returncode:
                sys.exit(f"the peak of {name} could not be measured: {_last(done.stderr)}")
            found[name] = json.loads(done.stdout)
    return found


def higher(one: dict[str, dict[str, float]], two: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {dtype: max(rate, two[name][dtype]) for dtype, rate in rates.items()} for name, rates in one.items()}


def ratios(measured: dict[str, Any], ours: str) -> dict[str, float]:
    """Ours to the best of each peer."""
    mine = measured[ours]["tokens_per_second"]
    best = {
        who: max((row["tokens_per_second"] for row in measured.values() if row["who"] == who), default=None)
        for who in PEERS.values()
    }
    return {who: mine / rate for who, rate in best.items() if rate}


def report(results: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    print(
        f"{os.cpu_count()} cores of {results['processor']}; load of the machine {results['load'][0]:.1f} before and "
        f"{results['load'][1]:.1f} after"
    )
    for name, rates in results["peaks"].items():
        said = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
        print(f"most of a product in {name}: {said}")
    for size, result in results["sizes"].items():
        shape, measured = result["shape"], result["measured"]
        print(
            f"\n{size}: {result['parameters']:,} parameters, width {shape['width']}, {shape['depth']} layers, "
            f"{shape['heads']}-{shape['kv_heads']} heads, mlp {shape['mlp']}, vocabulary {shape['vocab']}, "
            f"T {shape['length']}, B {shape['batch']}, {result['flops'] / 1e12:.2f} TFLOP a step"
        )
        print(f"{'':34s}{'tokens/s (lowest-highest)':>26s}{'of peak':>9s}{'per CPU s':>11s}", end="")
        print(f"{'peak MB':>9s}{'first step':>12s}{'loss':>15s}{'steps':>7s}")
        for label, row in measured.items():
            spread = f"{row['tokens_per_second']:.0f} ({row['lowest']:.0f}-{row['highest']:.0f})"
            loss = f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}"
            print(
                f"{label:34s}{spread:>26s}{row['share_of_peak']:9.1%}{row['tokens_per_cpu_second']:11.0f}"
                f"{row['peak']:9.0f}{row['first_step']:10.1f} s{loss:>15s}{len(row['steps']):7d}"
            )
        for label, reason in (results["failed"] | result["failed"]).items():
            print(f"{label:34s}has no figure: {reason}")
        if result["ratios"]:
            print(f"{OURS} to " + ", ".join(f"{who} {ratio:.2f}" for who, ratio in result["ratios"].items()))


def contestants_of(peers: list[str], remat: list[str], saving: bool) -> list[Contestant]:
    ours = []
    for policy in remat:
        forms = {"rows": f"{OURS}, remat {policy}"} if ours else {"rows": OURS, "packed": f"{OURS}, packed"}
        ours.append(Contestant(OURS, "run_ours.py", forms, {"remat": policy}))
    theirs = [
        *(
            Contestant(TORCH, "run_torch.py", {form: f"torch {form}{also}" for form in ("eager", "compiled")}, options)
            for also, options in (("", {"weights": "float32"}), (", all in bfloat16", {"weights": "bfloat16"}))
        ),
        Contestant(MAXTEXT, "run_maxtext.py", {"rows": MAXTEXT}, {"remat": "full"}),
        Contestant(LEVANTER, "run_levanter.py", {"rows": LEVANTER}, {"remat": True, "attention": "VANILLA"}),
    ]
    if saving:
        maxtext = {"remat": "minimal_with_context"}  # the most that it can keep
        levanter = {"remat": False, "attention": "VANILLA"}
        theirs += [
            Contestant(MAXTEXT, "run_maxtext.py", {"rows": f"{MAXTEXT}, products kept"}, maxtext),
            Contestant(LEVANTER, "run_levanter.py", {"rows": f"{LEVANTER}, all kept"}, levanter),
        ]
    return ours + [contestant for contestant in theirs if contestant.who in {PEERS[peer] for peer in peers}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10M, torch alone, one round")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--remat", nargs="+", default=["none"], help="ours; the first is compared (default: none)")
    parser.add_argument("--saving", action="store_true", help="MaxText and Levanter also where they recompute least")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    peers = (["torch"] if arguments.quick else list(PEERS)) if arguments.peers is None else arguments.peers
    sizes = arguments.sizes or (["10M"] if arguments.quick else list(SIZES))
    rounds = 1 if arguments.quick else arguments.rounds
    contestants = contestants_of(peers, arguments.remat, arguments.saving)
    pythons, failed = environments({contestant.who for contestant in contestants})
    contestants = [contestant for contestant in contestants if contestant.who in pythons]

    before = os.getloadavg()[0]
    peak = peaks(pythons)
    results: dict[str, Any] = {"sizes": {}, "failed": failed}
    for size in sizes:
        print(f"{size}:", file=sys.stderr)
        results["sizes"][size] = compare(contestants, pythons, SIZES[size], rounds)
    peak = higher(peak, peaks(pythons))
    most = max(rates["bfloat16"] for rates in peak.values())
    versions = {"python": platform.python_version()}
    without = {size: result for size, result in results["sizes"].items() if OURS not in result["measured"]}
    for size in without:
        del results["sizes"][size]
    for size, result in results["sizes"].items():
        measured = result["measured"]
        tokens = SIZES[size]["batch"] * SIZES[size]["length"]
        flops = measured[OURS]["flops_per_token"] * tokens
        for row in measured.values():
            row["share_of_peak"] = row["tokens_per_second"] * flops / tokens / most
            versions |= {f"{name} ({row['who']})" if name == "jax" else name: v for name, v in row["versions"].items()}
        result |= {
            "parameters": measured[OURS]["parameters"],
            "flops": flops,
            "ratios": ratios(measured, OURS),
        }
    results |= {
        "versions": versions,
        "processor": platform.processor() or platform.machine(),
        "peaks": peak,
        "rounds": rounds,
        "load": [before, os.getloadavg()[0]],
    }
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if without:
        sys.exit("; ".join(f"{size}: {OURS} has no figure: {r['failed'][OURS]}" for size, r in without.items()))


if __name__ == "__main__":
    main()
