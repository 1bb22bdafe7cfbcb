"""Models: taken in from Hugging Face format, written in it, compared with it, and made to write."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, group, one_device, recorded_run, trained_model
from eurollm_jax.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add(commands: Subcommands) -> None:
    importing = command(commands, "import", _import, "make a run of a model in Hugging Face format, to go on from")
    importing.add_argument("folder", type=Path, help="with config.json and safetensors files")
    importing.add_argument("run", type=Path, help="the run directory to make, such as runs/salamandra")

    export = command(commands, "export", _export, "write a run's model in Hugging Face format")
    export.add_argument("run", type=Path, help="a run directory, trained or imported")
    export.add_argument("out", type=Path, help="the folder to make")
    with_weights(export)
    export.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: bfloat16; of an imported model, what it came in)",
    )
    export.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="of a file, such as 500MB (default: 5GB)",
    )
    export.add_argument(
        "--architecture",
        metavar="CLASS",
        help="of transformers, such as LlamaForCausalLM (default: as imported, or the first that can say the model)",
    )
    export.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja file for the tokenizer")
    export.add_argument("--license", help="of the weights, for the model card, such as apache-2.0")
    export.add_argument(
        "--base-model", metavar="NAME", help="the hub's name of the model that the run began with, for the model card"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--verify", action="store_true", help="reload with transformers and compare")

    hub = group(commands, "hf", "compare with Hugging Face format")
    verify = command(hub, "verify", _verify, "compare a folder with the run that it was exported from or imported to")
    verify.add_argument("folder", type=Path, help="in Hugging Face format")
    verify.add_argument("run", type=Path, help="a run directory, trained or imported")
    with_weights(verify)

    generate = command(commands, "generate", _generate, "let a run's model continue a text")
    generate.add_argument("run", type=Path, help="a run directory, trained or imported")
    generate.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="what is continued; may be given several times, and all are continued together",
    )
    generate.add_argument("--tokens", type=int, default=100, metavar="N", help="to write at most (default: 100)")
    generate.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token (default: 0.7)"
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    generate.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens that together hold this share of the probability (default: 0.95)",
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text to stop before; may be given several times"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def with_weights(parser: argparse.ArgumentParser) -> None:
    """Which of a run's weights are meant."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--average-last", type=int, metavar="N", help="the mean of the last N checkpoints' weights")
    which.add_argument("--ema", action="store_true", help="the moving average that the run kept")


def _import(arguments: argparse.Namespace) -> None:
    import jax

    from eurollm_jax.hf.importing import import_folder

    jax.config.update("jax_platforms", "cpu")  # weights go from file to file: an accelerator is left to others
    hub = import_folder(arguments.folder, arguments.run)
    print(f"{arguments.run}: {hub.family.architecture}, {hub.parameters:,} parameters in {hub.dtype}")
    print(f"`eurollm report {arguments.run}` says what it is made of.")


def _export(arguments: argparse.Namespace) -> int:
    from eurollm_jax.hf.card import model_card
    from eurollm_jax.hf.export import export
    from eurollm_jax.hf.importing import imported_of
    from eurollm_jax.hf.verify import require_libraries

    if arguments.verify:
        require_libraries()
    record, config, tokenizer = recorded_run(arguments.run)
    imported = imported_of(record)
    dtype = arguments.dtype or (imported.dtype if imported else "bfloat16")
    weights, described, step = _weights(arguments)
    if imported and arguments.average_last is None:
        described = "as imported"
    card = model_card(
        arguments.run,
        config,
        name=record["name"],
        dtype=dtype,
        sources_of_weights=described,
        step=step,
        license=arguments.license,
        base_model=arguments.base_model,
    )
    export(
        weights,
        config,
        tokenizer,
        arguments.out,
        dtype=dtype,
        max_shard_bytes=arguments.max_shard_size,
        architecture=arguments.architecture,
        imported=imported,
        chat_template=_template(arguments, tokenizer),
        card=card,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.out}: written ({described}, {dtype})")
    return _compared(arguments.out, arguments.run, weights, config, tokenizer) if arguments.verify else 0


def _verify(arguments: argparse.Namespace) -> int:
    record, config, tokenizer = recorded_run(arguments.run)
    hashes = (record.get("imported") or {}).get("sha256")
    return _compared(arguments.folder, arguments.run, _weights(arguments)[0], config, tokenizer, hashes)


def _compared(folder: Path, run: Path, weights: Any, config: Any, tokenizer: Any, hashes: Any = None) -> int:
    """Prints the comparison; the exit status says whether all agrees."""
    from eurollm_jax.hf.verify import TEXTS, verify, verify_table

    samples = run / "samples.json"
    prompts = [sample["prompt"] for sample in json.loads(samples.read_text())] if samples.is_file() else []
    rows = verify(folder, weights, config, tokenizer, texts=[*prompts, *TEXTS], recorded=hashes)
    Console().print(verify_table(rows))
    return 0 if all(row.ok for row in rows) else 1


def _weights(arguments: argparse.Namespace) -> tuple[Any, str, int | None]:
    """The weights that the options name, read from the run's files; what they are in words, and as of which step."""
    from eurollm_jax.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(arguments.run / "checkpoints", read_only=True)
    if arguments.average_last is not None:
        described = f"mean of the last {arguments.average_last} checkpoints"
        return checkpoints.averaged(last=arguments.average_last), described, checkpoints.latest
    if arguments.ema:
        return checkpoints.weights(item="ema"), f"moving average at step {checkpoints.latest}", checkpoints.latest
    return checkpoints.weights(), f"step {checkpoints.latest}", checkpoints.latest


def _generate(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from eurollm_jax.evaluation.generate import Sampling, generate

    params, config, tokenizer = trained_model(arguments.run)
    if tokenizer is None:
        raise UserError(f"{arguments.run} was imported without a tokenizer, so no text can be continued.")
    continuations = generate(
        params,
        config,
        one_device(),
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.tokens,
        sampling=Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
        ),
        stop=tuple(arguments.stop),
    )
    console = Console()
    for prompt, continuation in zip(arguments.prompt, continuations, strict=True):
        console.print(f"[bold]{escape(prompt)}[/bold]{escape(continuation.text)}", highlight=False, soft_wrap=True)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?B)?", text.upper())
    if not found or not (size := int(float(found[1]) * _UNITS[found[2] or ""])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 500MB or 5GB")
    return size


def _template(arguments: argparse.Namespace, tokenizer: Any) -> str | None:
    """The chat template that is given, or the one that a tokenizer of ours was imported with; those of others keep
    theirs among their files."""
    from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer
    from eurollm_jax.hf.tokenizer import recorded_chat_template

    if arguments.chat_template is not None:
        return _text(arguments.chat_template)
    return (
        recorded_chat_template(arguments.run / "tokenizer") if isinstance(tokenizer, SentencePieceTokenizer) else None
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a file with a chat template.") from None
