"""What a run begins with: weights drawn from its seed, or those of another run, imported or trained.

Or a whole checkpoint of another run, which it goes on from with a schedule of its own: a branch. As a schedule is a
function of the step, a branch with a decay is the straight run with that decay, and several may share one trunk.
"""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import differences
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode, identity, read_record, recorded_model
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout
from eurollm_jax.training import schedule as schedules
from eurollm_jax.training.checkpoint import MANIFEST, Checkpoints
from eurollm_jax.training.step import Program, TrainState, abstract_params

log = logging.getLogger(__name__)


def first_state(experiment: Experiment, program: Program, layout: Layout) -> TrainState:
    """The state before the first step of a run that is claimed. Raises UserError where `start_from` has other weights
    than when it was.

    What its model says differently, such as the rotary base of a longer context, is logged.
    """
    if experiment.start_from is None:
        return program.init(jax.random.key(experiment.seed))
    start = Path(experiment.start_from)
    model = _fitting_model(experiment, start)
    if differing := differences(encode(model), encode(experiment.model)):
        log.warning("THE MODEL IS NOT QUITE THE ONE OF %s: %s", start, "; ".join(differing))
    with closing(Checkpoints(start / "checkpoints", read_only=True)) as checkpoints:
        if _hash(checkpoints) != read_record(experiment.run)["identity"]["inputs"]["start"]:
            raise UserError(
                f"{start} holds other weights than when {experiment.run} began: give the experiment another name."
            )
        params, _ = checkpoints.restore_params(abstract_params(experiment.model, layout))
        log.info("begins with the weights of %s, step %s", start, checkpoints.latest)
    return program.start(params)


def branched_state(experiment: Experiment, program: Program) -> tuple[TrainState, dict[str, Any]]:
    """The state and the progress of the checkpoint that a claimed run goes on from. Raises UserError where it is
    another one than when the run was claimed."""
    parent, step = _checkpoint(experiment)
    with closing(Checkpoints(parent / "checkpoints", read_only=True)) as checkpoints:
        if _hash(checkpoints, step) != read_record(experiment.run)["identity"]["inputs"]["branch"]:
            raise UserError(
                f"{experiment.branch_from} is another checkpoint than when {experiment.run} began: give the experiment "
                "another name."
            )
        state, progress = checkpoints.restore(program.state, step)
    log.info("goes on from step %s of %s", step, parent)
    return state, progress


def require_branch(experiment: Experiment, inputs: Mapping[str, str]) -> None:
    """Raises UserError where a branch that is to begin differs from its parent in more than name, steps, schedule, and
    the batch sizes that follow; `inputs` are the hashes of what its paths point to."""
    if experiment.branch_from is None or (experiment.run / "experiment.json").is_file():
        return
    parent, step = _checkpoint(experiment)
    record = read_record(parent)
    if record.get("imported"):
        raise UserError(f"{parent} was imported and never trained: begin with it by start_from={str(parent)!r}.")
    if step >= experiment.steps:
        raise UserError(
            f"experiment {experiment.name!r} ends at step {experiment.steps}, and {experiment.branch_from} has {step} "
            f"behind it: set steps to {step + 1} or more, which counts from the first step of {parent}."
        )
    if differing := differences(_so_far(record["identity"], step), _so_far(identity(experiment, inputs), step)):
        raise UserError(
            f"experiment {experiment.name!r} goes on from {experiment.branch_from} and differs from that run in more "
            f"than the schedule ({'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}): take these from "
            f"there, or begin with the weights alone by start_from={str(parent)!r}."
        )
    if found := first_other_rate(experiment, record["experiment"], step):
        raise UserError(
            f"experiment {experiment.name!r} goes on from step {step} of {parent}, and its schedule has a rate of "
            f"{found.now:.4g} at step {found.step}, where that run had {found.was:.4g}: "
            f"{keeping_rates(experiment, step)}."
        )


@dataclass(frozen=True)
class OtherRate:
    """A step that is done, with its learning rate as it was and as a schedule would have it."""

    step: int
    was: float
    now: float


def first_other_rate(experiment: Experiment, recorded: Mapping[str, Any], steps: int) -> OtherRate | None:
    """The first of so many steps to which the experiment's schedule gives another rate than the recorded one's did: a
    decay that begins before they are done would jump behind them."""
    fields = {name: value for name, value in recorded["schedule"].items() if name != "type"}
    schedule = getattr(schedules, recorded["schedule"]["type"])(**fields)
    done = jnp.arange(steps)
    rates = schedule.build(recorded["steps"]), experiment.schedule.build(experiment.steps)
    was, now = (np.asarray(jax.vmap(rate)(done)) for rate in rates)
    others = np.flatnonzero(~np.isclose(was, now, rtol=1e-6, atol=0))
    return OtherRate(int(others[0]) + 1, float(was[others[0]]), float(now[others[0]])) if len(others) else None


def keeping_rates(experiment: Experiment, steps: int) -> str:
    """What to do where there is another rate in the first so many steps."""
    return (
        f"take its peak and warm-up, and let the decay begin at step {steps} or later "
        f"(decay={1 - steps / experiment.steps:.3g} or less of {experiment.steps} steps)"
    )


def _so_far(of_run: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What of a run's identity has decided its first `step` steps, but for the schedule."""
    sizes = BatchSizes(of_run["batch_size"], tuple((row, size) for row, size in of_run["batch_ramp"]))
    kept = {name: value for name, value in of_run.items() if name not in ("name", "steps", "schedule")}
    begun = encode(sizes.until(sizes.row_of_step(step)).changes)
    inputs = {name: value for name, value in of_run["inputs"].items() if name not in ("start", "branch")}
    return kept | {"batch_ramp": begun, "inputs": inputs}


def _checkpoint(experiment: Experiment) -> tuple[Path, int]:
    """The run and the step that `branch_from` names."""
    folder = Path(str(experiment.branch_from))
    if folder.parent.name != "checkpoints" or not folder.name.isdecimal():
        raise UserError(
            f"branch_from={folder} names no checkpoint: give its folder, such as runs/base/checkpoints/1000."
        )
    parent = folder.parent.parent
    if parent.resolve() == experiment.run.resolve():
        raise UserError(
            f"experiment {experiment.name!r} would branch off from its own run, {parent}: give it another name."
        )
    return parent, int(folder.name)


def hash_of_start(experiment: Experiment) -> dict[str, str]:
    """What identifies the weights that a run begins with, under the name "start", or the checkpoint that it goes on
    from, under "branch"; nothing where weights are drawn.

    A run that has begun needs them no more: it is asked only whether it began from the same path. Raises UserError
    where there are no weights, or weights of other names or shapes than the model's.
    """
    field, name = ("branch_from", "branch") if experiment.start_from is None else ("start_from", "start")
    if getattr(experiment, field) is None:
        return {}
    if (experiment.run / "experiment.json").is_file():
        record = read_record(experiment.run)
        if record["experiment"].get(field) == getattr(experiment, field) and "inputs" in record["identity"]:
            return {name: record["identity"]["inputs"].get(name, "")}
    if experiment.start_from is None:
        parent, step = _checkpoint(experiment)
        read_record(parent)
        with closing(Checkpoints(parent / "checkpoints", read_only=True)) as checkpoints:
            return {"branch": _hash(checkpoints, step)}
    start = Path(experiment.start_from)
    if start.resolve() == experiment.run.resolve():
        raise UserError(f"experiment {experiment.name!r} would begin with its own run, {start}: give it another name.")
    _fitting_model(experiment, start)
    if not (start / "checkpoints").is_dir():
        raise UserError(f"start_from={start} holds no checkpoint: train it first, or import it.")
    with closing(Checkpoints(start / "checkpoints", read_only=True)) as checkpoints:
        return {"start": _hash(checkpoints)}


def _fitting_model(experiment: Experiment, start: Path) -> TransformerConfig:
    """The model of the run `start`."""
    model = recorded_model(read_record(start))
    if differing := differences(_shapes(model), _shapes(experiment.model)):
        raise UserError(
            f"experiment {experiment.name!r}: {start} has other weights than the model ({'; '.join(differing[:3])}): "
            f"choose the model that it was made with, which {start / 'experiment.json'} states."
        )
    return model


def _hash(checkpoints: Checkpoints, step: int | None = None) -> str:
    """Of the newest checkpoint, or of another one."""
    if checkpoints.latest is None:
        raise UserError(f"{checkpoints.folder} holds no sound checkpoint: train the run first, or import it again.")
    if step is not None:
        checkpoints.weights(step)  # says so where there is none
    newest = checkpoints.latest if step is None else step
    return hashlib.sha256((checkpoints.folder / str(newest) / MANIFEST).read_bytes()).hexdigest()


def _shapes(model: TransformerConfig) -> dict[str, list[int]]:
    return {path: list(spec.shape) for path, spec in flatten(specs(model)).items()}
