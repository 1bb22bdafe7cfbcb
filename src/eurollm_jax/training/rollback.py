"""Going back: a run that diverges returns to a checkpoint from before, and leaves out the rows that it failed with.

That was done for PaLM by hand (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): the same rows from another state
gave no spike, and the same state with other rows gave none either. What is decided here follows from steps and rows
alone, so a run that is killed while it goes back, or anywhere after, goes on to the same weights.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.jumps import Jumps
from eurollm_jax.errors import UserError
from eurollm_jax.parallel.distributed import gathered, is_first, wait_for_all
from eurollm_jax.training.skipping import DivergedError

log = logging.getLogger(__name__)

RECORD = "rollbacks.json"
SET_ASIDE = ".before-rollback-"  # ends a checkpoint's name, with the number of the time


@dataclass(frozen=True)
class RollBack:
    """Goes back to the newest permanent checkpoint from before the first of the steps that were skipped in a row, and
    leaves out all rows from there to the last of them.

    Temporary checkpoints depend on the wall clock, and are passed over.
    """

    at_most: int = 2  # to one checkpoint; then the run stops

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise UserError(f"rollback: at_most={self.at_most} must be 1 or more; rollback=None never goes back.")


@dataclass(frozen=True)
class RolledBack:
    """That a run went back once. Rows are data rows but for `row`, which are those consumed until `step`."""

    step: int  # of the checkpoint
    row: int
    left_out_from: int
    left_out_until: int  # the first that is read again
    first_skipped: int  # steps
    last_skipped: int
    loss: float | None  # of the last; None where it is not finite
    grad_norm: float | None


@dataclass(frozen=True)
class Rollbacks:
    """How often a run went back, in order."""

    taken: tuple[RolledBack, ...] = ()

    @classmethod
    def of(cls, described: Iterable[Mapping[str, Any]]) -> "Rollbacks":
        """The inverse of `describe`."""
        return cls(tuple(RolledBack(**entry) for entry in described))

    def describe(self) -> list[dict[str, Any]]:
        """As JSON-able values."""
        return [dataclasses.asdict(entry) for entry in self.taken]

    @property
    def jumps(self) -> Jumps:
        jumps = Jumps()
        for entry in self.taken:
            jumps = jumps.back(entry.row, entry.left_out_until)
        return jumps

    def then(self, rule: RollBack, error: DivergedError, step: int | None, sizes: BatchSizes) -> "Rollbacks":
        """With going back after `error` to `step`, that of the newest sound permanent checkpoint before it, if any.

        Raises UserError where there is none to go back to, or where the rule allows no more.
        """
        if step is None:
            raise UserError(f"{error} No permanent checkpoint is older than step {error.first_step}.") from error
        again = sum(entry.step >= step for entry in self.taken)
        if again >= rule.at_most:
            raise UserError(
                f"{error} The run has gone back {again} times to step {step} or later (rollback.at_most)."
            ) from error
        row, jumps = sizes.row_of_step(step), self.jumps
        until = jumps.data_row(sizes.row_of_step(error.last_step) - 1) + 1
        entry = RolledBack(
            step,
            row,
            jumps.data_row(row),
            until,
            error.first_step,
            error.last_step,
            _finite(error.loss),
            _finite(error.grad_norm),
        )
        return Rollbacks((*self.taken, entry))


def roll_back(run: Path, rollbacks: Rollbacks) -> None:
    """Records the last of `rollbacks`, and sets aside the checkpoints that came after the one gone back to; these must
    be closed. All processes call this."""
    last = rollbacks.taken[-1]
    if is_first():
        log.error(
            "THE RUN GOES BACK TO STEP %d: steps %d to %d were skipped. Rows %d to %d of the data are left out for "
            "good, as %s says; checkpoints from after that step become %s, to be looked at or deleted",
            last.step,
            last.first_skipped,
            last.last_skipped,
            last.left_out_from,
            last.left_out_until - 1,
            run / RECORD,
            run / "checkpoints" / f"*{SET_ASIDE}{len(rollbacks.taken)}",
        )
        write_json(run / RECORD, {"under_way": True, "rollbacks": rollbacks.describe()})
        _finish(run, rollbacks)
    wait_for_all("going back")


def recorded_rollbacks(run: Path) -> Rollbacks:
    """Those of a run directory, before its checkpoints are opened; what a killed process had begun is finished. All
    processes call this, and have what the first one reads.

    Raises UserError for a record that cannot be read.
    """
    path, text = run / RECORD, ""
    if is_first() and path.exists():
        text = path.read_text()
    text = _of_first(text)
    if not text:
        return Rollbacks()
    try:
        record = json.loads(text)
        rollbacks = Rollbacks.of(record["rollbacks"])
        under_way = record["under_way"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by a run ({error}): restore it from a backup.") from None
    if under_way:
        if is_first():
            _finish(run, rollbacks)
        wait_for_all("going back")
    return rollbacks


def going_on(recorded: Rollbacks, progress: Mapping[str, Any], run: Path) -> Rollbacks:
    """Those that a run goes on with: what is recorded, or what a checkpoint's progress says where that is more, as of a
    branch that begins.

    Raises UserError where one contradicts the other, as a checkpoint does that the run went back behind.
    """
    saved = Rollbacks.of(progress.get("rollbacks", ()))
    common = min(len(saved.taken), len(recorded.taken))
    outdated = any(entry.row < progress["row"] for entry in recorded.taken[common:])
    if saved.taken[:common] != recorded.taken[:common] or outdated:
        raise UserError(
            f"{run / RECORD} and the newest checkpoint of {run / 'checkpoints'} do not agree on which rows were left "
            "out: restore both from one backup, or move that directory away."
        )
    return max(saved, recorded, key=lambda rollbacks: len(rollbacks.taken))


def _finish(run: Path, rollbacks: Rollbacks) -> None:
    """Sets aside what came after the last checkpoint gone back to; nothing was saved since that was chosen."""
    step, number = rollbacks.taken[-1].step, len(rollbacks.taken)
    for path in (run / "checkpoints").glob("*"):
        if path.name.isdecimal() and int(path.name) > step:
            path.rename(path.with_name(f"{path.name}{SET_ASIDE}{number}"))
    write_json(run / RECORD, {"under_way": False, "rollbacks": rollbacks.describe()})


def _of_first(text: str) -> str:
    """The text that process 0 has."""
    mine = np.frombuffer(text.encode(), np.uint8)
    size = int(gathered(np.int32(len(mine)))[0])
    padded = np.zeros(size, np.uint8)
    padded[: len(mine)] = mine[:size]
    return gathered(padded)[0].tobytes().decode() if size else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
