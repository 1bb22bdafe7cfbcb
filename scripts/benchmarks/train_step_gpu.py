"""How many tokens a second does a train step take in on one GPU, beside torch?

    python scripts/benchmarks/train_step_gpu.py [--rounds 2] [--batch 4] [--kernels auto cudnn blockwise] [--json FILE]

Both train EuroLLM-1.7B (`families.EUROLLM_1_7B`) on the same random tokens, with AdamW (0.9, 0.95, decay 0.1),
gradients clipped to norm 1, weights and moments in float32, products in bfloat16. Each contestant is a process of its
own, for the memory holds one at a time; they are run one after the other, in one order and then in the other. The first
steps of each, which compile, do not count. A step ends when the new state is there.

- eurollm_jax: the step of `eurollm train`, of each policy of --remat and each kernel; rows of one document, as torch
  has them, and "packed", rows of documents of 800 tokens on average, which attention keeps apart.
- torch: transformers' LlamaForCausalLM with SDPA attention (causal, no documents), float32 weights and autocast, fused
  AdamW; with torch.compile over model and loss, and eager; with and without recomputing layers.

Utilisation is `flops_per_token` (causal attention at half, nothing recomputed) by the maker's bf16 figure for the
device.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS, WARM = 12, 3
DOCUMENT = 800  # mean length of a packed document, in tokens
sys.path.insert(0, str(Path(__file__).parent / "train_step"))


def ours(case: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import replace

    import jax
    import numpy as np
    import optax
    from batches import batch_of

    from eurollm_jax.model.families import EUROLLM_1_7B
    from eurollm_jax.model.param import count
    from eurollm_jax.model.transformer import flops_per_token, specs
    from eurollm_jax.parallel.hardware import chip_of
    from eurollm_jax.parallel.mesh import Layout, MeshConfig
    from eurollm_jax.training.optimizer import AdamW
    from eurollm_jax.training.skipping import SkipStep
    from eurollm_jax.training.step import build_program

    device = jax.devices()[0]
    layout = Layout(MeshConfig().build([device]))
    config = replace(EUROLLM_1_7B, max_positions=case["length"], remat=case["remat"], attention_kernel=case["kernel"])
    program = build_program(
        config,
        layout,
        AdamW().build(optax.constant_schedule(1e-4), specs(config)),
        batch_sizes=[case["batch"]],
        token_bytes=np.ones(config.vocab_size, np.int32),
        sources=1,
        z_loss=0.0,
        skip=SkipStep(),
    )
    train = program.compile_train(case["batch"], case["length"])
    memory = train.memory_analysis()  # type: ignore[attr-defined]
    state = program.init(jax.random.key(0))
    shape = {"vocab": config.vocab_size, "batch": case["batch"], "length": case["length"]}
    batch = layout.place_rows(batch_of(shape, DOCUMENT if case["packed"] else None))
    seconds, losses = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(train(state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics.loss))
    chip = chip_of(device.device_kind)
    return {
        "versions": {"jax": jax.__version__},
        "device": device.device_kind,
        "parameters": count(specs(config)),
        "flops_per_token": flops_per_token(config, case["length"]),
        "peak_flops": chip.bfloat16 if chip else None,
        "seconds": seconds,
        "losses": losses,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "bytes": device.memory_stats()["peak_bytes_in_use"],
    }


def torch_llama(case: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch
    import torch.nn.functional as F
    import transformers

    from eurollm_jax.model.families import EUROLLM_1_7B as SHAPE

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=SHAPE.vocab_size,
                hidden_size=SHAPE.width,
                num_hidden_layers=SHAPE.depth,
                num_attention_heads=SHAPE.heads,
                num_key_value_heads=SHAPE.kv_heads,
                head_dim=SHAPE.head_dim,
                intermediate_size=SHAPE.mlp.hidden,  # type: ignore[union-attr]
                max_position_embeddings=case["length"],
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        ).train()
    if case["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (case["batch"], case["length"] + 1))
    inputs, targets = (torch.from_numpy(part.copy()).cuda() for part in (tokens[:, :-1], tokens[:, 1:]))

    def mean_loss(inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs).logits
        return F.cross_entropy(logits.float().view(-1, SHAPE.vocab_size), targets.view(-1))

    compute = torch.compile(mean_loss) if case["compile"] else mean_loss
    seconds, losses = [], []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = compute(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": seconds,
        "losses": losses,
        "bytes": torch.cuda.max_memory_allocated(),
    }


def run(label: str, case: dict[str, Any]) -> dict[str, Any]:
    """One contestant, in a process of its own."""
    print(f"  {label} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(case)],
        capture_output=True,
        text=True,
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        out_of_memory = next((line for line in said if "out of memory" in line.lower()), None)
        return {"failed": (out_of_memory or said[-1])[:200]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def report(results: dict[str, list[dict[str, Any]]], batch: int, length: int) -> None:
    sound = [run for runs in results.values() for run in runs if "failed" not in run]
    if not sound:
        sys.exit(f"no contestant has a figure: {results}")
    flops = next((run["flops_per_token"] for run in sound if "flops_per_token" in run), None)
    peak = next((run["peak_flops"] for run in sound if run.get("peak_flops")), None)
    print(", ".join(sorted({f"{name} {version}" for run in sound for name, version in run["versions"].items()})))
    print(f"{sound[0]['device']}; {sound[0]['parameters']:,} parameters, T {length}, B {batch}")
    print(f"{'':44s}{'tokens/s (lowest-highest)':>28s}{'mfu':>8s}{'GiB':>7s}{'first':>9s}{'loss':>16s}")
    for label, runs in results.items():
        counted = [seconds for run in runs if "failed" not in run for seconds in run["seconds"][WARM:]]
        if not counted:
            print(f"{label:44s}has no figure: {runs[0]['failed']}")
            continue
        good = next(run for run in runs if "failed" not in run)
        rates = [batch * length / seconds for seconds in counted]
        rate = statistics.median(rates)
        mfu = f"{rate * flops / peak:.1%}" if flops and peak else "?"
        spread = f"{rate:.0f} ({min(rates):.0f}-{max(rates):.0f})"
        loss = f"{good['losses'][0]:.2f} -> {good['losses'][-1]:.2f}"
        print(f"{label:44s}{spread:>28s}{mfu:>8s}{good['bytes'] / 2**30:7.1f}{good['seconds'][0]:7.1f} s{loss:>16s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", nargs="+", default=["dots"])
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--torch", nargs="*", default=["compiled", "eager", "compiled+recompute"], metavar="FORM")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case = json.loads(arguments.child)
        print(json.dumps((torch_llama if case["who"] == "torch" else ours)(case)))
        return
    shape = {"batch": arguments.batch, "length": arguments.length}
    cases = {
        f"eurollm_jax, {kernel}, remat {remat}{', packed' * packed}": {
            "who": "ours",
            "kernel": kernel,
            "remat": remat,
            "packed": packed,
            **shape,
        }
        for kernel in arguments.kernels
        for remat in arguments.remat
        for packed in (False, True)
    } | {
        f"torch {form}": {
            "who": "torch",
            "compile": "compiled" in form,
            "recompute": "recompute" in form,
            **shape,
        }
        for form in arguments.torch
    }
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in cases}
    for number in range(arguments.rounds):
        for label in list(cases)[:: 1 if number % 2 == 0 else -1]:
            results[label].append(run(label, cases[label]))
            gc.collect()
    report(results, **shape)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
