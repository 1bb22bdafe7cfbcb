"""Experiment: the frozen tree of all that a run needs, and the directory that the run lives in."""

import dataclasses
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.model.transformer import TransformerConfig
from eurollm_jax.parallel.mesh import MeshConfig
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.schedule import WSD, Cosine


@dataclass(frozen=True)
class Experiment:
    """Inputs only: whatever follows from them is computed where it is needed."""

    name: str
    tokenizer: str  # folder or model file
    data: DataConfig
    heldout: str  # token store
    model: TransformerConfig
    schedule: WSD | Cosine
    steps: int
    batch_size: int  # rows, over all devices
    optimizer: AdamW = AdamW()
    z_loss: float = 1e-4
    seed: int = 0  # of the initial weights; the data have their own
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10  # steps
    evaluate_every: int = 1000
    evaluate_rows: int = 16  # of each source, at intervals; the evaluation at the end reads all
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    runs: str = "runs"

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise UserError(f"experiment {self.name!r}: {field}={getattr(self, field)} must be 1 or more.")
        if self.checkpoint_every % self.log_every:
            raise UserError(
                f"experiment {self.name!r}: checkpoint_every={self.checkpoint_every} is not a multiple of "
                f"log_every={self.log_every}, so a resumed run would log an interval twice: change one of them."
            )
        if self.data.sequence_length > self.model.max_positions:
            raise UserError(
                f"experiment {self.name!r}: rows of {self.data.sequence_length} tokens exceed the model's "
                f"max_positions={self.model.max_positions}: change one of them."
            )

    @property
    def total_rows(self) -> int:
        return self.steps * self.batch_size

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.runs) / self.name


RECORDED_PACKAGES = ("eurollm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

RECORDED_PACKAGES = ("eurollm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

NOT_IDENTITY = frozenset(
    ("mesh", "runs", "log_every", "evaluate_every", "evaluate_rows", "checkpoint_every", "keep_checkpoints")
)
"""Fields that do not change what is learnt: where it is computed, and how often one looks."""


def encode(value: Any) -> Any:
    """A configuration as JSON-able values; dataclasses carry their type's name."""
    if isinstance(value, Mixture):
        return value.describe()
    if dataclasses.is_dataclass(value):
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return value


def identity(experiment: Experiment, inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what the run learns; `inputs` are the hashes of what the paths point to."""
    fields = {name: value for name, value in encode(experiment).items() if name not in NOT_IDENTITY}
    return {**fields, "inputs": dict(inputs)}


def fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def claim_run(experiment: Experiment, docstring: str, inputs: Mapping[str, str], facts: Mapping[str, Any]) -> Path:
    """Makes the run directory, or refuses one that belongs to another experiment, naming the differences."""
    run, mine = experiment.run, identity(experiment, inputs)
    record_path = run / "experiment.json"
    if record_path.exists():
        if differing := differences(read_record(run)["identity"], mine):
            raise UserError(
                f"{run} holds another experiment ({'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}): "
                "give this one another name, or move that directory away."
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
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "code": _commit(),
    }
    write_json(record_path, record)
    return run


def read_record(run: Path) -> dict[str, Any]:
    """experiment.json of a run directory."""
    path = run / "experiment.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{run} is not a run directory (no experiment.json): train an experiment first.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not JSON ({error.msg}): restore it from a backup.") from None


def recorded_model(record: Mapping[str, Any]) -> TransformerConfig:
    """The model of a recorded run."""
    fields = {name: value for name, value in record["experiment"]["model"].items() if name != "type"}
    return TransformerConfig(**fields)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One phrase for each leaf that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if before == now else [f"{path} was {json.dumps(before)} and is {json.dumps(now)}"]


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def load_experiment(path: Path) -> tuple[Experiment, str]:
    """The `EXPERIMENT` of a Python file, and the file's docstring, which states its question."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of an experiment, such as experiments/quickstart.py.")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # so that experiments import each other as `experiments.name`
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: give the path of an experiment.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no `EXPERIMENT = Experiment(...)`: add one (see experiments/quickstart.py).")
    return experiment, (module.__doc__ or "").strip()


def _commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
