"""Experiment: the frozen tree of all that a run needs, and the directory that the run lives in."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import DataConfig, differences
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.model import config as model_config
from eurollm_jax.model.config import BalanceLoss, MoE, TransformerConfig
from eurollm_jax.parallel.distributed import is_first
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training.optimizer import Adafactor, AdamW, AdEMAMix, Lion, Muon
from eurollm_jax.training.rollback import RollBack
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD, Constant, Cosine, Linear
from eurollm_jax.training.skipping import SkipStep
from eurollm_jax.training.watchdog import Watch

RECORDED_PACKAGES = ("eurollm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

CADENCE = ("log_every", "evaluate_every", "evaluate_rows", "checkpoint_every")
COUNTS = ("steps", "batch_size", "accumulate", *CADENCE)
PATHS = ("tokenizer", "heldout", "start_from", "branch_from", "runs")  # the hashes of what they point to decide

NOT_IDENTITY = frozenset(("mesh", "accumulate", "parity", "saving", "watch", "rollback", *CADENCE, *PATHS))
"""Fields that do not change what is learnt: where it is computed, what may be begun, how often one looks, and how a run
is kept from being lost. (What a roll-back did is in the checkpoints.)"""

NOT_IDENTITY_OF_DATA = ("store", "workers", "removed")
"""Of `data`, the same. Stores are known by their hashes, and removals may come in the middle of a run: the checkpoint
says which it has seen (`Data.require_same`)."""


NOT_IDENTITY_OF_MODEL = ("remat", "attention_kernel")
"""Of `model`, the same: how it is computed."""

CHANGEABLE = ("steps", "schedule", "batch_size", "batch_ramp", "data.mixture")
"""What may change in the course of a run, for what is not trained yet."""


@dataclass(frozen=True)
class Experiment:
    """Inputs only: whatever follows from them is computed where it is needed."""

    name: str
    tokenizer: str  # folder or model file
    data: DataConfig
    heldout: str  # token store
    model: TransformerConfig
    schedule: WSD | Cosine | Linear | Constant
    steps: int
    batch_size: int  # rows, over all devices
    batch_ramp: tuple[tuple[int, int], ...] = ()  # (from row, batch size): changes in the course of the run
    optimizer: AdamW | Muon | AdEMAMix | Lion | Adafactor = AdamW()
    z_loss: float = 1e-4
    skip: SkipStep | None = dataclasses.field(default_factory=SkipStep)  # steps that are not finite, or spikes
    ema: float | None = None  # what a moving average of the parameters keeps of itself at each step, such as 0.999
    start_from: str | None = None  # a run, imported or trained, whose parameters this one begins with
    branch_from: str | None = None  # a checkpoint that this one goes on from, such as runs/base/checkpoints/1000
    seed: int = 0  # of the initial weights; the data have their own
    mesh: MeshConfig = MeshConfig()
    accumulate: int = 1  # micro-batches that a batch is read in, one after the other
    parity: Parity = dataclasses.field(default_factory=Parity)
    log_every: int = 10  # steps
    evaluate_every: int = 1000
    evaluate_rows: int = 16  # of each source, at intervals; the evaluation at the end reads all
    checkpoint_every: int = 1000
    saving: Saving = dataclasses.field(default_factory=Saving)
    watch: Watch = dataclasses.field(default_factory=Watch)
    rollback: RollBack | None = dataclasses.field(default_factory=RollBack)  # what a run does that diverges
    runs: str = "runs"

    def __post_init__(self) -> None:
        for field in COUNTS:
            if getattr(self, field) < 1:
                raise UserError(f"experiment {self.name!r}: {field}={getattr(self, field)} must be 1 or more.")
        try:
            BatchSizes(self.batch_size, self.batch_ramp)
        except UserError as error:
            raise UserError(f"experiment {self.name!r}: batch_ramp: {error}.") from None
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"experiment {self.name!r}: ema={self.ema} must be above 0 and below 1, such as 0.999.")
        if self.start_from is not None and self.branch_from is not None:
            raise UserError(
                f"experiment {self.name!r}: start_from={self.start_from} and branch_from={self.branch_from} exclude "
                "each other: a branch takes all of its checkpoint, so set start_from=None."
            )
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            raise UserError(f"experiment {self.name!r}: the name becomes a folder; use letters, digits, . _ and -.")
        if self.data.sequence_length > self.model.max_positions:
            raise UserError(
                f"experiment {self.name!r}: rows of {self.data.sequence_length} tokens exceed the model's "
                f"max_positions={self.model.max_positions}: change one of them."
            )

    @property
    def batch_sizes(self) -> BatchSizes:
        return BatchSizes(self.batch_size, self.batch_ramp)

    @property
    def total_rows(self) -> int:
        return self.batch_sizes.row_of_step(self.steps)

    def has_permanent_checkpoint(self, step: int) -> bool:
        """Whether the run saves its state after `step` whatever the clock says, for good or among the last few."""
        cadences = [every for every in (self.checkpoint_every, self.saving.every) if every is not None]
        return step in (self.steps, self.decay_begins) or any(step % every == 0 for every in cadences)

    @property
    def decay_begins(self) -> int | None:
        """Steps that are done when the schedule's cooldown begins, where it has one and that is to be kept."""
        if not self.saving.before_decay or not isinstance(self.schedule, WSD):
            return None
        return self.schedule.decay_begins(self.steps)

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.runs) / self.name


def encode(value: Any) -> Any:
    """A configuration as JSON-able values; dataclasses carry their type's name."""
    if isinstance(value, Mixture):
        return value.describe()
    if dataclasses.is_dataclass(value):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [encode(element) for element in value]
    return value


def identity(experiment: Experiment, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what the run learns; `inputs` are the hashes of what the paths point to."""
    fields = {name: value for name, value in encode(experiment).items() if name not in NOT_IDENTITY}
    for name in NOT_IDENTITY_OF_DATA:
        del fields["data"][name]
    for name in NOT_IDENTITY_OF_MODEL:
        del fields["model"][name]
    if isinstance(experiment.model.mlp, MoE) and isinstance(experiment.model.mlp.balance, BalanceLoss):
        fields["accumulate"] = experiment.accumulate  # each micro-batch is balanced by itself
    fields["batch_ramp"] = encode(experiment.batch_sizes.until(experiment.total_rows).changes)
    return {**fields, "inputs": dict(inputs)}


def fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def claim_run(
    experiment: Experiment,
    docstring: str,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
    *,
    accept_changes: bool = False,
) -> Path:
    """Makes the run directory, or refuses one that belongs to another experiment, naming the differences.

    With `accept_changes`, differences in what may change in the course of a run are left to `training.amend`.
    """
    run, mine = experiment.run, identity(experiment, inputs)
    record_path = run / "experiment.json"
    if record_path.exists():
        if read_record(run).get("imported"):
            raise UserError(
                f"{run} holds a model that was imported: give this experiment another name "
                f"(it begins with that model where start_from={str(run)!r})."
            )
        differing = differences(read_record(run)["identity"], mine)
        fixed = [difference for difference in differing if not _may_change(difference)]
        if fixed or (differing and not accept_changes):
            named = fixed if accept_changes else differing
            accepting = "; --accept-changes goes on with it where what is trained already stays as it was"
            raise UserError(
                f"{run} holds another experiment ({'; '.join(named[:4])}{' ...' if len(named) > 4 else ''}): "
                f"give this one another name, or move that directory away{'' if fixed else accepting}."
            )
        return run
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no experiment.json: choose another name, or move it away.")
    run.mkdir(parents=True, exist_ok=True)
    record = {
        "name": experiment.name,
        "docstring": docstring,
        "fingerprint": fingerprint(mine),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "experiment": encode(experiment),
        "identity": mine,
        **facts,
        **environment(),
    }
    write_json(record_path, record)
    return run


def _may_change(difference: str) -> bool:
    return any(difference.startswith((f"{field} ", f"{field}.", f"{field}[")) for field in CHANGEABLE)


def refresh_record(experiment: Experiment) -> None:
    """Has experiment.json state the fields that are no part of a run's identity as they are now."""
    record, now = read_record(experiment.run), encode(experiment)
    if record["experiment"] != now:
        write_json(experiment.run / "experiment.json", {**record, "experiment": now})


def source_hash() -> str:
    """SHA-256 of the library's own code: whether two processes run the same."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(path.relative_to(here).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What computes: recorded when a run begins and whenever it goes on."""
    cores = f" of {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}{cores}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "code": _commit() if is_first() else None,
    }


def read_record(run: Path) -> dict[str, Any]:
    """experiment.json of a run directory."""
    path = run / "experiment.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run} is not a run directory (no experiment.json): train an experiment, or import a model, first."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not JSON ({error.msg}): restore it from a backup.") from None
    if not isinstance(record, dict) or not {"identity", "experiment"} <= record.keys():
        raise UserError(f"{path} was written by something else: choose another run directory.")
    return record


def recorded_model(record: Mapping[str, Any]) -> TransformerConfig:
    """The model of a recorded run."""
    model: TransformerConfig = decode(record["experiment"]["model"])
    return model


def decode(value: Any) -> Any:
    """The configuration of a model that `encode` wrote."""
    if isinstance(value, dict):
        fields = {name: decode(field) for name, field in value.items() if name != "type"}
        return getattr(model_config, value["type"])(**fields)
    return tuple(map(decode, value)) if isinstance(value, list) else value


def load_experiment(path: Path) -> tuple[Experiment, str]:
    """The `EXPERIMENT` of a Python file, and the file's docstring, which states its question."""
    return load_constant(path, "EXPERIMENT", Experiment, "experiment", "experiments/quickstart.py")


def load_constant[T](path: Path, name: str, kind: type[T], noun: str, example: str) -> tuple[T, str]:
    """The value of this type that a Python file calls `name`, and the file's docstring.

    `noun` says in messages what the file is of, `example` which file is one. Raises UserError for a file that is not
    there, fails, or defines nothing of the kind.
    """
    article = "an" if noun[0] in "aeiou" else "a"
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file of {article} {noun}, such as {example}.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of {article} {noun}, such as {example}.")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # so that experiments import each other as `experiments.name`
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: give the path of {article} {noun}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(_located(error, path)) from error
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise UserError(f"{path} defines no `{name} = {kind.__name__}(...)`: add one (see {example}).")
    return value, (module.__doc__ or "").strip()


def _located(error: Exception, path: Path) -> str:
    """What is wrong with an experiment's file, and in which line of it, or of a file beside it that it imports."""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        lines.append((error.filename, error.lineno))
    beside = [(Path(file), line) for file, line in lines if Path(file).resolve().parent == path.resolve().parent]
    where = f"{path.parent / beside[-1][0].name} line {beside[-1][1]}" if beside else str(path)
    if isinstance(error, UserError):
        return f"{where}: {error}"
    if isinstance(error, SyntaxError):  # whose full text draws the line below the message
        return f"mend {where}: {type(error).__name__}: {error.msg}"
    said = traceback.TracebackException.from_exception(error).format_exception_only()  # with its "Did you mean"
    return f"mend {where}: {next(said).strip()}"


def _commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
