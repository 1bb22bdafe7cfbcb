"""Tokenizers: train one, and see how it serves each language."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, fields_of, group, with_inputs
from eurollm_jax.errors import UserError


def add(commands: Subcommands) -> None:
    tokenizer = group(commands, "tokenizer", "train a tokenizer, and see how it serves each language")
    train_tokenizer = command(tokenizer, "train", _train, "train a lossless SentencePiece BPE tokenizer")
    with_inputs(train_tokenizer)
    train_tokenizer.add_argument("--out", type=Path, required=True)
    train_tokenizer.add_argument("--vocab-size", type=int, required=True)
    train_tokenizer.add_argument("--alpha", type=float, default=0.3, help="share of a language ~ its bytes ** alpha")
    report = command(tokenizer, "report", _report, "bytes per token, fertility and premium of each language")
    report.add_argument("tokenizer", type=Path)
    with_inputs(report)
    report.add_argument("--json", type=Path, help="write the same figures here")


def _train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer

    with _reading(arguments) as how:
        tokenizer = train_tokenizer(
            arguments.inputs, arguments.out, vocab_size=arguments.vocab_size, alpha=arguments.alpha, **how
        )
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.folders import write_json
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
    from eurollm_jax.corpus.tokenizing.tokenizer_report import report_json, report_table, tokenizer_report

    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json.parent} is not a folder: make it, or name another file for the figures.")
    tokenizer = Tokenizer.load(arguments.tokenizer)
    with _reading(arguments) as how:
        rows = tokenizer_report(tokenizer, arguments.inputs, **how)
    Console().print(report_table(rows))
    if arguments.json:
        write_json(arguments.json, report_json(tokenizer, rows))


@contextmanager
def _reading(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How documents are read; says at the end how many were left out."""
    from eurollm_jax.corpus.reading.sources import Defaults, stop_at

    refused: list[UserError] = []
    fault = stop_at if arguments.bad_documents == "stop" else refused.append
    yield {"defaults": Defaults(language=arguments.language, fields=fields_of(arguments)), "fault": fault}
    if refused:
        print(f"{len(refused):,} documents refused; the first: {refused[0]}", file=sys.stderr)
