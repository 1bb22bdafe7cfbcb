"""What a run begins with: weights drawn from its seed, or those of another run, imported or trained."""

import hashlib
import logging
from contextlib import closing
from pathlib import Path

import jax

from eurollm_jax.data.loader import differences
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode, read_record, recorded_model
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout
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


def hash_of_start(experiment: Experiment) -> dict[str, str]:
    """What identifies the weights that a run begins with, under the name "start"; nothing where they are drawn.

    A run that has begun needs them no more: it is asked only whether it began from the same path. Raises UserError
    where there are no weights, or weights of other names or shapes than the model's.
    """
    if experiment.start_from is None:
        return {}
    if (experiment.run / "experiment.json").is_file():
        record = read_record(experiment.run)
        if record["experiment"].get("start_from") == experiment.start_from and "inputs" in record["identity"]:
            return {"start": record["identity"]["inputs"].get("start", "")}
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


def _hash(checkpoints: Checkpoints) -> str:
    """Of the newest checkpoint."""
    if checkpoints.latest is None:
        raise UserError(f"{checkpoints.folder} holds no sound checkpoint: train the run first, or import it again.")
    return hashlib.sha256((checkpoints.folder / str(checkpoints.latest) / MANIFEST).read_bytes()).hexdigest()


def _shapes(model: TransformerConfig) -> dict[str, list[int]]:
    return {path: list(spec.shape) for path, spec in flatten(specs(model)).items()}
