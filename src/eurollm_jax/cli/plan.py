"""What an experiment would take of a machine, before it is queued: plan."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of, with_experiment
from eurollm_jax.errors import UserError


def add(commands: Subcommands) -> None:
    plan = command(
        commands, "plan", _plan, "compile an experiment's train step for a machine, and print what it would take"
    )
    with_experiment(_with_options(plan))


def _with_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--site", default="local", metavar="NAME|FILE.toml", help="where (default: this computer)")
    parser.add_argument("--nodes", type=int, metavar="N", help="how many nodes of the site")
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices, in place of --nodes")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="in place of the experiment's, such as data=16,fsdp=4")
    parser.add_argument("--search", action="store_true", help="rank the possible meshes and rematerialisations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # a login node's GPU is not asked for, nor waited for
    # Such an option stands before the experiment's file or among the fields after it.
    options = _with_options(argparse.ArgumentParser(prog=arguments.parser.prog, add_help=False, allow_abbrev=False))
    options.set_defaults(
        **{name: value for name, value in vars(arguments).items() if name in vars(options.parse_args([]))}
    )
    given, arguments.fields = options.parse_known_args(arguments.fields)

    from eurollm_jax.cluster.plan.plan import mesh_of, placed
    from eurollm_jax.cluster.site_files import site_of

    if given.json is not None and (given.json.is_dir() or not given.json.parent.is_dir()):
        raise UserError(f"--json {given.json}: name a file in a folder that exists.")
    site = site_of(given.site)
    mesh = None if given.mesh is None else mesh_of(given.mesh)
    experiment, _ = experiment_of(arguments)
    devices = placed(experiment, site, given.nodes, given.devices, mesh)
    if mesh is not None:
        experiment = dataclasses.replace(experiment, mesh=mesh)

    from eurollm_jax.cluster.plan import tables
    from eurollm_jax.cluster.plan.plan import plan, search

    console = Console()
    if given.search:
        ranked = search(experiment, site, devices)
        console.print(tables.search_table(ranked))
        figures: object = tables.search_json(ranked)
    else:
        made = plan(experiment, site, devices)
        console.print(tables.heading(made), soft_wrap=True, highlight=False)
        for warning in made.warnings:
            console.print(f"[yellow]{warning}[/]", soft_wrap=True, highlight=False)
        for table in tables.tables(made):
            console.print(table)
        figures = tables.as_json(made)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
