"""The command line: one subcommand for each job that a user has. It parses, calls and prints; the work is elsewhere.

Each command imports what it needs when it runs, so that `eurollm corpus` starts at once on a login node without jax.
"""

import argparse
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from eurollm_jax import __version__
from eurollm_jax.cli import ablation, checkpoints, corpus, doctor, experiments, launch, mix, models, plan, tokenizer
from eurollm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, that of the error (errors.py), or 2 for unknown options."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("eurollm_jax").setLevel(logging.INFO)
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(_unknown(unknown[0], arguments))
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        print(f"eurollm: {error}", file=sys.stderr)
        return error.status
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        print(f"eurollm: {error.filename} cannot be used ({error.strerror}): give another path.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" to write {error.filename}" if error.filename else ""
        print(f"eurollm: there is no room{where} ({error.strerror}): free some space or quota.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eurollm: stopped; the same command goes on with what was done", file=sys.stderr)
        return 130


def run(experiment_file: str) -> NoReturn:
    """`python -m experiments.name` is `eurollm train experiments/name.py`."""
    sys.exit(main(["train", experiment_file, *sys.argv[1:]]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eurollm", description="Pre-trains models for the languages of Europe.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (corpus, tokenizer, mix, experiments, plan, launch, doctor, ablation, checkpoints, models):
        part.add(commands)
    return parser


def _unknown(option: str, arguments: argparse.Namespace) -> str:
    if "fields" in arguments:
        return f"unknown: {option} (fields of the experiment come after its file)"
    close = difflib.get_close_matches(option, re.findall(r"--[a-z-]+", arguments.parser.format_usage()), n=1)
    return f"unknown: {option}" + (f"; did you mean {close[0]}?" if close else "")
