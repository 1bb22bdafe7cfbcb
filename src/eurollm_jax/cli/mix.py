"""Mixtures: what an experiment's mixture will read, before anything is read, and its exchange with Megatron."""

import argparse
from pathlib import Path

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of, group, with_experiment


def add(commands: Subcommands) -> None:
    mix = group(commands, "mix", "see what a mixture reads, and exchange it")
    with_experiment(command(mix, "show", _show, "print rows, tokens and epochs of each source, stage by stage"))
    export = command(mix, "export", _export, "write an experiment's mixture as a datamix.txt")
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--prefix", type=Path, help="folder of 'corpus export' (default: where datasets are imported)")
    with_experiment(export)


def _show(arguments: argparse.Namespace) -> None:
    from eurollm_jax.data.loader import open_data
    from eurollm_jax.data.plan import mixture_plan
    from eurollm_jax.data.plan_tables import mix_tables

    experiment, _ = experiment_of(arguments)
    data = open_data(experiment.data, experiment.total_rows)
    console = Console()
    console.print(repr(experiment.data.mixture), markup=False)
    for table in mix_tables(mixture_plan(experiment.data.mixture, data.sizes, experiment.total_rows)):
        console.print(table)


def _export(arguments: argparse.Namespace) -> None:
    from eurollm_jax.data.datamix import write_datamix
    from eurollm_jax.data.loader import open_data

    experiment, _ = experiment_of(arguments)
    data = open_data(experiment.data, experiment.total_rows)
    if arguments.prefix is not None:
        prefixes = {name: arguments.prefix / name for name in data.source_names}
    else:
        prefixes = {name: prefix for name, source in data.sources.items() if (prefix := source.megatron_prefix)}
    write_datamix(arguments.out, data.schedule, data.sizes, prefixes)
    print(f"{arguments.out}: written")
