"""Experiments and their runs: train, show, report."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of, with_experiment


def add(commands: Subcommands) -> None:
    with_experiment(command(commands, "train", _train, "train an experiment, or go on where it stopped"))
    with_experiment(
        command(commands, "show", _show, "print the resolved experiment and what it will read, without training")
    )

    report = command(commands, "report", _report, "write a run's HTML report and print its table")
    report.add_argument("run", type=Path)


def _train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.training.loop import train

    train(*experiment_of(arguments))


def _show(arguments: argparse.Namespace) -> None:
    from eurollm_jax.data.plan import mixture_plan
    from eurollm_jax.data.plan_tables import mix_tables
    from eurollm_jax.experiment import encode
    from eurollm_jax.model.param import count
    from eurollm_jax.model.transformer import flops_per_token, specs
    from eurollm_jax.training.loop import open_inputs

    experiment, docstring = experiment_of(arguments)
    inputs = open_inputs(experiment)
    experiment.schedule.build(experiment.steps)  # refuses here already what does not fit the run
    planned = mixture_plan(experiment.data.mixture, inputs.data.sizes, experiment.total_rows)
    console = Console()
    console.print(docstring, highlight=False, markup=False)
    console.print_json(json.dumps(encode(experiment)))
    console.print(mix_tables(planned)[0])
    if len(planned.stages) > 1:
        console.print(f"Stage by stage: eurollm mix show {arguments.experiment}", soft_wrap=True, highlight=False)
    console.print(inputs.parity.table())
    length = experiment.data.sequence_length
    tokens = sum(source.tokens for source in planned.total)
    parameters, flops = count(specs(experiment.model)), flops_per_token(experiment.model, length)
    console.print(
        f"{parameters:,} parameters; {planned.total_rows:,} rows of {length} tokens, {tokens:,} tokens, "
        f"{flops * tokens:.3g} FLOP"
    )


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.report import final_table, write_report

    path = write_report(arguments.run)
    if (arguments.run / "evaluation.json").is_file():
        Console().print(final_table(arguments.run))
    else:
        print(f"{arguments.run} is not evaluated yet; `eurollm train` goes on with it and then evaluates it.")
    print(f"Open {path} in a browser.")
