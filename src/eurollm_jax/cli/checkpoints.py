"""Checkpoints of a run: listed, verified, thinned out. No device is started: it may be done beside the training."""

import argparse
import dataclasses
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from eurollm_jax.cli.arguments import Subcommands, command, group
from eurollm_jax.errors import UserError

if TYPE_CHECKING:
    from eurollm_jax.training.saving import Saving


def add(commands: Subcommands) -> None:
    checkpoint = group(commands, "checkpoint", "list, verify and thin out the checkpoints of a run")
    listing = command(checkpoint, "list", _list, "print a run's checkpoints")
    listing.add_argument("run", type=Path, help="a run directory")
    listing.add_argument("--verify", action="store_true", help="read them all, and say which are as they were written")

    verify = command(checkpoint, "verify", _verify, "compare all files with their hashes; exits with 1 on any damage")
    verify.add_argument("run", type=Path, help="a run directory")
    verify.add_argument("--step", type=int, metavar="N", help="of one checkpoint (default: of all)")

    prune = command(checkpoint, "prune", _prune, "delete the checkpoints that the run's rule does not keep")
    prune.add_argument("run", type=Path, help="a run directory in which nothing is training")
    prune.add_argument("--last", type=int, metavar="N", help="keep the newest N (default: as the experiment says)")
    prune.add_argument("--every", type=int, metavar="N", help="keep those at multiples of N steps (default: the same)")
    prune.add_argument(
        "--best", type=int, metavar="N", help="keep the N of the lowest held-out score (default: the same)"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _list(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.report.text import duration
    from eurollm_jax.training.commit import saved_in
    from eurollm_jax.training.manifest import faults

    folder = _folder(arguments.run)
    table = Table(title=f"Checkpoints of {arguments.run}")
    for name in ("step", "kind", "size", "age", "bits per byte", *(["files"] if arguments.verify else [])):
        table.add_column(name, justify="left" if name in ("kind", "files") else "right")
    for saved in saved_in(folder):
        path = folder / str(saved.step)
        score = "" if saved.score is None else f"{saved.score:.4f}"
        with suppress(FileNotFoundError):  # a run that trains has removed it meanwhile
            cells = (_size(path), duration(time.time() - path.stat().st_mtime), score)
            table.add_row(str(saved.step), saved.kind, *cells, *([_sound(faults(path))] if arguments.verify else []))
    Console().print(table)
    for path in sorted(folder.glob("[0-9]*.*")):
        print(f"{path.name} is no checkpoint ({_size(path)}): it is unfinished, or was set aside.")


def _verify(arguments: argparse.Namespace) -> int:
    from eurollm_jax.training.commit import saved_in
    from eurollm_jax.training.manifest import faults

    folder = _folder(arguments.run)
    steps = [saved.step for saved in saved_in(folder)]
    if not steps or arguments.step not in (None, *steps):
        there = ", ".join(map(str, steps)) or "none"
        which = "" if arguments.step is None else f" of step {arguments.step}"
        raise UserError(f"{folder} holds no checkpoint{which}: there are {there}.")
    damaged = 0
    for step in steps if arguments.step is None else [arguments.step]:
        problems = faults(folder / str(step))
        damaged += bool(problems)
        print(f"step {step}: {_sound(problems)} ({_size(folder / str(step))})")
    return 1 if damaged else 0


def _prune(arguments: argparse.Namespace) -> None:
    from eurollm_jax.experiment import read_record
    from eurollm_jax.training.commit import removable, remove, saved_in
    from eurollm_jax.training.lock import locked
    from eurollm_jax.training.manifest import faults

    folder = _folder(arguments.run)
    rule = _rule(read_record(arguments.run)["experiment"].get("saving"), arguments)
    said = f"the rule is last={rule.last}, every={rule.every}, best={rule.best}, before_decay={rule.before_decay}"
    if arguments.dry_run:
        for step in removable(folder, rule):
            print(f"step {step} would be deleted ({_size(folder / str(step))})")
        print(said)
        return
    with locked(arguments.run):
        going = removable(folder, rule)
        newest = max((saved.step for saved in saved_in(folder)), default=None)
        if going and (problems := faults(folder / str(newest))):
            raise UserError(
                f"{folder / str(newest)} is the newest checkpoint and damaged ({problems[0]}): nothing is deleted; "
                "move it away first, so that the one before it is kept in its place."
            )
        for step in going:
            size = _size(folder / str(step))
            remove(folder / str(step))
            print(f"step {step} is deleted ({size})")
    left = ", ".join(str(saved.step) for saved in saved_in(folder)) or "none"
    print(f"{folder}: left are {left} ({said})")


def _rule(recorded: dict[str, object] | None, arguments: argparse.Namespace) -> "Saving":
    """The experiment's, but for what the options say."""
    from eurollm_jax.training.saving import Saving

    known = {field.name for field in dataclasses.fields(Saving)}
    rule = Saving(**{name: value for name, value in (recorded or {}).items() if name in known})  # type: ignore[arg-type]
    options = {name: getattr(arguments, name) for name in ("last", "every", "best")}
    return dataclasses.replace(rule, **{name: value for name, value in options.items() if value is not None})


def _folder(run: Path) -> Path:
    from eurollm_jax.experiment import read_record

    read_record(run)  # says so where it is no run
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no checkpoint: train the run first.")
    return run / "checkpoints"


def _sound(problems: list[str]) -> str:
    return "DAMAGED: " + "; ".join(problems[:3]) + " ..." * (len(problems) > 3) if problems else "sound"


def _size(path: Path) -> str:
    from eurollm_jax.evaluation.report.text import size

    return size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
