"""What an ensemble measures of its members: held-out nats of every source, in measurements.jsonl, each once."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eurollm_jax.corpus.folders import full_disk_is_named
from eurollm_jax.evaluation.perplexity import HeldOut
from eurollm_jax.model.loss import SourceSums
from eurollm_jax.model.param import Params
from eurollm_jax.training.ensemble_step import EnsembleProgram

MEASUREMENTS = "measurements.jsonl"


@dataclass(frozen=True)
class Measurement:
    """Of one member after a step. Sources are those of the held-out store, by name; bits per byte of any of them
    together are the sum of their nats over ln 2 and the sum of their bytes (`perplexity.bits_per_byte`)."""

    member: str
    step: int
    rows: int  # read until then
    tokens: int  # trained on until then: those that were predicted
    complete: bool  # over all held-out text; else over the first `evaluate_rows` rows of each source
    diverged: str  # why, and since which step; "" for a member that is sound
    nats: dict[str, float]  # may be NaN of a member that has diverged
    tokens_heldout: dict[str, int]
    bytes: dict[str, int]

    def to_line(self) -> str:
        """A line of JSON, which has no word for NaN and infinity: null stands for both."""
        nats = {name: value if math.isfinite(value) else None for name, value in self.nats.items()}
        return json.dumps({**dataclasses.asdict(self), "nats": nats}, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Measurement":
        """Raises ValueError where it is none."""
        fields = json.loads(line)
        fields["nats"] = {name: math.nan if value is None else value for name, value in fields["nats"].items()}
        return cls(**fields)


def read_measurements(folder: Path) -> list[Measurement]:
    """Those of an ensemble's folder so far, in the order in which they were taken; a line cut short is left out."""
    path, found = folder / MEASUREMENTS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Measurement.from_line(line))
        except ValueError:
            break  # that was being written when the ensemble was killed
    return found


def is_finished(found: Sequence[Measurement], members: Sequence[str]) -> bool:
    """Whether all members, by name, were measured on all text, which is done last."""
    return {one.member for one in found if one.complete} == set(members)


def drop_measurements(folder: Path, step: int) -> None:
    """Takes away what was measured after `step`, and what was measured at the end, which is done once more."""
    path = folder / MEASUREMENTS
    temporary = path.with_name(f".{path.name}.tmp")
    _write(temporary, "w", [found for found in read_measurements(folder) if found.step <= step and not found.complete])
    temporary.replace(path)


def add_measurements(folder: Path, measured: Sequence[Measurement]) -> None:
    """They are on disk when this returns, before a checkpoint that comes after them."""
    _write(folder / MEASUREMENTS, "a", measured)


def _write(path: Path, mode: str, measured: Sequence[Measurement]) -> None:
    rescue = "and the same command goes on from the newest checkpoint"
    with full_disk_is_named(path, rescue), path.open(mode, encoding="utf-8") as file:
        file.writelines(one.to_line() for one in measured)
        file.flush()
        os.fsync(file.fileno())


def measure_members(
    program: EnsembleProgram,
    params: Params,
    heldout: HeldOut,
    rows_per_source: int | None = None,
    *,
    alive: Callable[[], None] = lambda: None,
) -> SourceSums:
    """Sums [K, sources] over the first rows of every source (default: all), in float64 and int64; sources as in
    `heldout.sources`. `alive` is called at each batch. Raises RuntimeError if not all bytes were predicted."""
    parts: list[Any] = []
    for batch in heldout.batches(rows_per_source, by="source"):
        parts.append(program.measure(params, program.replicate(batch)))
        jax.block_until_ready(parts[-2:-1])  # not all batches are to wait in memory for their turn
        alive()
    nats, tokens, byte_counts = (np.stack(field) for field in zip(*jax.device_get(parts), strict=True))
    sums = SourceSums(nats.sum(0, np.float64), tokens.sum(0, np.int64), byte_counts.sum(0, np.int64))
    if rows_per_source is None:
        stored = [source.bytes for source in heldout.sources]
        if not np.all(sums.bytes == stored):
            raise RuntimeError(f"predicted {sums.bytes.tolist()} bytes of {stored}, the sources' own")
    return sums
