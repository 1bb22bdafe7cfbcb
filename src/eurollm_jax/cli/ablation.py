"""Studies of mixtures: run one, write its report again, set several side by side."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, group
from eurollm_jax.cli.starting import signals_end_at_once, with_time_limit


def add(commands: Subcommands) -> None:
    ablate = command(commands, "ablate", _ablate, "run a study of mixtures, or go on where it stopped")
    ablate.add_argument("study", type=Path, help="a Python file that defines STUDY")
    ablate.add_argument("--name", help="of the study and its folder, in place of the one in the file")
    ablate.add_argument(
        "--dry-run",
        action="store_true",
        help="print the mixtures that would be tried and what that costs; write nothing",
    )
    ablate.add_argument(
        "--untimed", action="store_true", help="with --dry-run: train no few steps to learn how long all will take"
    )
    ablate.add_argument(
        "--ensembles",
        metavar="I/N",
        help="train the proxies of every Nth ensemble from the Ith on, from 0, while other jobs train the others, and "
        "end; the command without this then analyses them",
    )
    with_time_limit(ablate)

    study = group(commands, "study", "look at studies that were run")
    report = command(study, "report", _report, "write a study's HTML report and print its answer")
    report.add_argument("folder", type=Path, help="that `eurollm ablate` made, such as studies/NAME")
    compare = command(study, "compare", _compare, "print several studies side by side")
    compare.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="such as studies/NAME")


def _ablate(arguments: argparse.Namespace) -> None:
    with signals_end_at_once():
        began = time.perf_counter()

        from eurollm_jax.ablation.study_file import load_study

        study, question = load_study(arguments.study)  # which may refuse, before the imports below
        if arguments.name is not None:
            study = replace(study, name=arguments.name)

        from eurollm_jax.ablation.run import ablate, describe, train_share
        from eurollm_jax.ablation.trained import Share
        from eurollm_jax.parallel.programs import keep_programs

        keep_programs()
        if arguments.dry_run:
            _print_design(question, describe(study, question, timed=not arguments.untimed))
            return
        if arguments.ensembles is not None:
            share = Share.parse(arguments.ensembles)
            count = train_share(study, question, share, time_limit=arguments.time_limit, began=began)
            print(f"share {arguments.ensembles} is trained: {count} ensembles in {study.folder / 'proxies'}")
            return
        _print_answer(ablate(study, question, time_limit=arguments.time_limit, began=began))


def _print_design(question: str, described: dict[str, Any]) -> None:
    from eurollm_jax.ablation.report.terminal import design_tables

    console = Console()
    console.print(question, highlight=False, markup=False)
    for part in design_tables(described):
        console.print(part, highlight=False, markup=False)


def _print_answer(folder: Path) -> None:
    from eurollm_jax.ablation.report.terminal import answer_table

    said, table = answer_table(folder)
    console = Console()
    if table is not None:
        console.print(table)
    console.print(said, highlight=False, markup=False)
    print(f"Open {folder / 'report.html'} in a browser.")


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.ablation.report import write_report

    write_report(arguments.folder)
    _print_answer(arguments.folder)


def _compare(arguments: argparse.Namespace) -> None:
    from eurollm_jax.ablation.compare import compare

    tables, differences = compare(arguments.folders)
    console = Console()
    for table in tables:
        console.print(table)
    for sentence in differences:
        console.print(sentence, highlight=False, markup=False)
