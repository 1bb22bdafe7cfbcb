"""What the commands share: how one is declared, and how an experiment or a run is named on the command line."""

import argparse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from eurollm_jax.errors import UserError

type Subcommands = Any  # argparse's own type of it is private


def command(
    commands: Subcommands, name: str, function: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    """Adds a command that calls `function` with its arguments."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    added.set_defaults(command=function, parser=added)
    return added


def group(commands: Subcommands, name: str, summary: str) -> Subcommands:
    """Adds a command that has commands of its own."""
    return commands.add_parser(name, help=summary, description=summary).add_subparsers(required=True, metavar="COMMAND")


def with_inputs(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What text is read, and how."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a file (jsonl, txt, .gz, .zst, parquet, arrow), a folder, a quoted pattern, a saved Hugging Face dataset "
        "(FOLDER?split=train), or tfds:NAME/CONFIG?split=train&data_dir=DIR",
    )
    parser.add_argument("--language", help="of all documents (default: what they, or the names of the files, say)")
    parser.add_argument(
        "--field", action="append", default=[], metavar="OURS=THEIRS", help="such as text=content; may be repeated"
    )
    parser.add_argument("--bad-documents", choices=("stop", "skip"), default="stop", help="skip: count and go on")
    return parser


def fields_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Our field -> the name that the inputs have for it."""
    for pair in arguments.field:
        if not all(pair.partition("=")):
            raise UserError(f"--field {pair}: write it as OURS=THEIRS, such as text=content")
    return {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in arguments.field)}


def with_experiment(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The experiment's file, and after it whatever is to be changed in it."""
    parser.add_argument("experiment", type=Path, help="a Python file")
    parser.add_argument(
        "fields",
        nargs=argparse.REMAINDER,
        metavar="--field value",
        help="what to change in it; --help after the file lists its fields",
    )
    return parser


def experiment_of(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The experiment of a file, with the overrides of the command line, and the file's docstring."""
    import tyro

    from eurollm_jax.data.mixture import Mixture
    from eurollm_jax.experiment import Experiment, load_experiment

    experiment, docstring = load_experiment(arguments.experiment)
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    program = f"{arguments.parser.prog} {arguments.experiment}"
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def _mixture_is_python(found: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        """A mixture is written with its methods, which check what its fields do not."""
        keep = tyro.constructors.StructConstructorSpec(instantiate=lambda: found.default, fields=())
        return keep if found.type is Mixture else None

    changed = tyro.cli(
        Experiment, default=experiment, args=arguments.fields, config=settings, prog=program, registry=registry
    )
    return changed, docstring


def recorded_run(run: Path):  # type: ignore[no-untyped-def]
    """Record, model and tokenizer of a run that has a checkpoint; None for the tokenizer that an import lacked."""
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
    from eurollm_jax.experiment import read_record, recorded_model

    record = read_record(run)
    config = recorded_model(record)
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no checkpoint: train the run first.")
    if record.get("imported") and not record["imported"]["tokenizer"]:
        return record, config, None
    return record, config, Tokenizer.load(run / "tokenizer")


def trained_model(run: Path):  # type: ignore[no-untyped-def]
    """Parameters, configuration and tokenizer of a run's newest checkpoint."""
    from eurollm_jax.training.checkpoint import Checkpoints
    from eurollm_jax.training.step import abstract_params

    _, config, tokenizer = recorded_run(run)
    with closing(Checkpoints(run / "checkpoints", read_only=True)) as checkpoints:
        params, _ = checkpoints.restore_params(abstract_params(config, one_device()))
    return params, config, tokenizer


def one_device():  # type: ignore[no-untyped-def]
    import jax

    from eurollm_jax.parallel.mesh import Layout, MeshConfig

    return Layout(MeshConfig().build(jax.devices()[:1]))
