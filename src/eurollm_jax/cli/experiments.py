"""Experiments and their runs: train, show, report."""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of, with_experiment
from eurollm_jax.cli.starting import signals_end_at_once, with_time_limit
from eurollm_jax.errors import UserError

if TYPE_CHECKING:
    from eurollm_jax.model.config import TransformerConfig

log = logging.getLogger(__name__)


def add(commands: Subcommands) -> None:
    train = command(commands, "train", _train, "train an experiment, or go on where it stopped")
    _with_run_options(train)
    with_experiment(train)
    with_experiment(
        command(commands, "show", _show, "print the resolved experiment and what it will read, without training")
    )

    report = command(commands, "report", _report, "write a run's HTML report and print its table")
    report.add_argument("run", type=Path, help="a run directory; of an imported one, what it is made of is printed")


def _with_run_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What concerns this start of a run alone, and so is no field of the experiment."""
    parser.add_argument(
        "--trace",
        metavar="FIRST:LAST",
        help="profile these steps, such as 20:23; the run's folder trace/ is for TensorBoard and Perfetto",
    )
    with_time_limit(parser)
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run whose mixture, batch sizes or schedule are others from here on; it is recorded",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 of several listens (Slurm and Open MPI are recognised without this)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes train, with --coordinator")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    with signals_end_at_once():
        _train_or_go_on(arguments)


def _train_or_go_on(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    # Such an option stands before the experiment's file or among the fields after it.
    options = _with_run_options(argparse.ArgumentParser(prog=arguments.parser.prog, add_help=False, allow_abbrev=False))
    options.set_defaults(
        **{name: value for name, value in vars(arguments).items() if name in vars(options.parse_args([]))}
    )
    after, arguments.fields = options.parse_known_args(arguments.fields)
    experiment, docstring = experiment_of(arguments)  # which may print its fields and exit, before the imports below

    from eurollm_jax.parallel.distributed import Coordination, connect
    from eurollm_jax.parallel.programs import keep_programs
    from eurollm_jax.training.run import train
    from eurollm_jax.training.trace import Trace

    by_hand = (after.coordinator, after.processes, after.process)
    if any(value is not None for value in by_hand) and None in by_hand:
        raise UserError("--coordinator, --processes and --process belong together: give all three or none.")
    trace = None if after.trace is None else Trace.parse(after.trace)
    keep_programs()
    _architecture(experiment.model)
    connect(None if after.coordinator is None else Coordination(*by_hand))
    train(
        experiment,
        docstring,
        trace=trace,
        began=began,
        time_limit=after.time_limit,
        accept_changes=after.accept_changes,
    )


def _architecture(model: "TransformerConfig") -> str | None:
    """The class of transformers that `eurollm export` writes the model as; where there is none, this is logged."""
    from eurollm_jax.hf.families import family_for

    try:
        return family_for(model).architecture
    except UserError as error:
        log.warning("WHAT IS TRAINED HERE CANNOT BE EXPORTED: %s", error)
        return None


def _show(arguments: argparse.Namespace) -> None:
    from eurollm_jax.data.plan import mixture_plan
    from eurollm_jax.data.plan_tables import mix_tables
    from eurollm_jax.experiment import encode
    from eurollm_jax.model.param import count
    from eurollm_jax.model.transformer import flops_per_token, specs
    from eurollm_jax.training.inputs import open_inputs

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
    if exported := _architecture(experiment.model):
        console.print(f"Exports as {exported}", highlight=False)


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.report import final_table, write_report
    from eurollm_jax.experiment import read_record

    record = read_record(arguments.run)
    if record.get("imported"):
        _describe_imported(arguments.run, record)
        return
    path = write_report(arguments.run)
    if (arguments.run / "evaluation.json").is_file():
        Console().print(final_table(arguments.run))
    else:
        print(f"{arguments.run} is not evaluated yet; `eurollm train` goes on with it and then evaluates it.")
    print(f"Open {path} in a browser.")


def _describe_imported(run: Path, record: dict[str, Any]) -> None:
    """There is nothing to plot of a model that was not trained here."""
    from eurollm_jax.experiment import recorded_model
    from eurollm_jax.hf.card.words import architecture

    origin = record["imported"]
    tokenizer = "with its tokenizer" if origin["tokenizer"] else "without a tokenizer"
    print(
        f"{run}: {origin['architecture']}, {record['parameters']:,} parameters in {origin['dtype']}, imported "
        f"{tokenizer} from {origin['folder']} at {record['created']}"
    )
    for sentence in architecture(recorded_model(record)):
        print(f"- {sentence}")
    print("It was not trained here, so there are no figures. An experiment begins with it by start_from.")
