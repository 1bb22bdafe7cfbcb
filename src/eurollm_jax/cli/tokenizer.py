"""Tokenizers: train one, and see how it serves each language."""

import argparse
from pathlib import Path

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, group
from eurollm_jax.errors import UserError


def add(commands: Subcommands) -> None:
    tokenizer = group(commands, "tokenizer", "train a tokenizer, and see how it serves each language")
    train_tokenizer = command(tokenizer, "train", _train, "train a lossless SentencePiece BPE tokenizer")
    train_tokenizer.add_argument("inputs", type=Path)
    train_tokenizer.add_argument("--out", type=Path, required=True)
    train_tokenizer.add_argument("--vocab-size", type=int, required=True)
    train_tokenizer.add_argument("--alpha", type=float, default=0.3, help="share of a language ~ its bytes ** alpha")
    report = command(tokenizer, "report", _report, "bytes per token, fertility and premium of each language")
    report.add_argument("tokenizer", type=Path)
    report.add_argument("inputs", type=Path)
    report.add_argument("--json", type=Path, help="write the same figures here")


def _train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(arguments.inputs, arguments.out, vocab_size=arguments.vocab_size, alpha=arguments.alpha)
    print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.folders import write_json
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
    from eurollm_jax.corpus.tokenizing.tokenizer_report import report_json, report_table, tokenizer_report

    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"{arguments.json.parent} is not a folder: make it, or name another file for the figures.")
    tokenizer = Tokenizer.load(arguments.tokenizer)
    rows = tokenizer_report(tokenizer, arguments.inputs)
    Console().print(report_table(rows))
    if arguments.json:
        write_json(arguments.json, report_json(tokenizer, rows))
