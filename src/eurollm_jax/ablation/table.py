"""results.parquet: what every run of a study measured, as one table for pandas, DuckDB and whatever reads Parquet.

Each row is one measurement of one held-out source, or of a language, whose nats and bytes are the sums of its sources':
its bits per byte are one sum over another, never a mean of ratios. A run that diverged keeps its rows, and says so.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from eurollm_jax.errors import UserError

if TYPE_CHECKING:
    from eurollm_jax.training.ensemble_measurements import Measurement

Phase = Literal["proxy", "confirmation"]

_WORDS = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("study", _WORDS),
        ("phase", _WORDS),
        ("replica", _WORDS),  # name of the run
        ("kind", _WORDS),  # why its mixture was tried
        ("seed", pa.int64()),  # of its initial weights
        ("step", pa.int64()),
        ("rows", pa.int64()),  # trained on so far, as the next
        ("tokens", pa.int64()),
        ("complete", pa.bool_()),  # whether all held-out text was read
        ("diverged", pa.string()),  # "" of a sound run, otherwise why
        ("fingerprint", _WORDS),  # of the run's experiment
        ("level", _WORDS),  # "language" or "source"
        ("name", _WORDS),  # of the language (its code) or the held-out source
        ("language", _WORDS),
        ("bytes", pa.int64()),  # raw UTF-8 bytes of the held-out text
        ("nats", pa.float64()),  # null where not finite
        ("bits_per_byte", pa.float64()),  # nats / ln 2 / bytes
        ("shares", pa.map_(pa.string(), pa.float64())),  # of the tokens, by group
    ]
)


@dataclass(frozen=True)
class Replica:
    """What the table says of a run in each of its rows."""

    phase: Phase
    name: str
    kind: str
    seed: int
    fingerprint: str
    shares: Mapping[str, float]


def write_results(
    path: Path,
    study: str,
    fingerprint: str,
    runs: Iterable[tuple[Replica, Sequence["Measurement"]]],
    languages: Mapping[str, str],
) -> None:
    """Write the measurements of `runs` as the Parquet file `path`, whole or not at all.

    Args:
        study, fingerprint: of the study; they stand in the file's metadata under these names too.
        languages: code of the language of each held-out source.
    """
    rows = [row for replica, measured in runs for row in _rows(study, replica, measured, languages)]
    described = SCHEMA.with_metadata({"study": study, "fingerprint": fingerprint})
    table = pa.Table.from_pylist(rows, schema=described)
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _rows(
    study: str, replica: Replica, measured: Sequence["Measurement"], languages: Mapping[str, str]
) -> Iterable[dict[str, Any]]:
    for one in measured:
        said = {
            "study": study,
            "phase": replica.phase,
            "replica": replica.name,
            "kind": replica.kind,
            "seed": replica.seed,
            "step": one.step,
            "rows": one.rows,
            "tokens": one.tokens,
            "complete": one.complete,
            "diverged": one.diverged,
            "fingerprint": replica.fingerprint,
            "shares": list(replica.shares.items()),
        }
        sources: dict[str, list[str]] = {}
        for name in sorted(one.bytes):
            sources.setdefault(languages[name], []).append(name)
        for code in sorted(sources):
            yield {**said, "level": "language", "name": code, "language": code, **_sums(one, sources[code])}
        for code in sorted(sources):
            for name in sources[code]:
                yield {**said, "level": "source", "name": name, "language": code, **_sums(one, [name])}


def _sums(measured: "Measurement", names: Sequence[str]) -> dict[str, Any]:
    size = sum(measured.bytes[name] for name in names)
    nats = math.fsum(measured.nats[name] for name in names)
    finite = math.isfinite(nats)
    bits = nats / math.log(2) / size if finite and size else None
    return {"bytes": size, "nats": nats if finite else None, "bits_per_byte": bits}


def remedy(file: str) -> str:
    """Of a damaged file of a study's folder, which follows from what was trained; that must stay."""
    return f"remove {file}; `eurollm ablate` makes it again"


def read_results(path: Path) -> pa.Table:
    """The table, dictionaries and all. Raises UserError where the file is none of ours."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: `eurollm ablate` writes it as the runs of a study end.") from None
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:  # of a damaged page Arrow says OSError
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is damaged or not Parquet ({why}): {remedy(path.name)}.") from None
    absent = [name for name in SCHEMA.names if name not in table.column_names]
    if absent:
        raise UserError(f"{path} lacks the columns {', '.join(absent)}: {remedy(path.name)}.")
    table = table.select(SCHEMA.names)
    other = [field.name for field in SCHEMA if table.schema.field(field.name).type != field.type]
    if other:
        raise UserError(f"{path} has columns of other types, {', '.join(other)}: {remedy(path.name)}.")
    return table


@dataclass(frozen=True)
class Curve:
    """A run's bits per byte by language at each of its measurements, in the order of steps."""

    replica: str
    phase: str
    diverged: str  # why, or ""
    tokens: tuple[int, ...]
    complete: tuple[bool, ...]
    bits_per_byte: tuple[Mapping[str, float], ...]  # a language that was not finite is left out

    @property
    def ended(self) -> bool:
        return bool(self.complete) and self.complete[-1]

    @property
    def final(self) -> Mapping[str, float]:
        """Of all held-out text at the end; empty where the run diverged or has not ended."""
        return self.bits_per_byte[-1] if self.ended and not self.diverged else {}

    @property
    def along(self) -> tuple[tuple[int, Mapping[str, float]], ...]:
        """(tokens, bits per byte) along the run, all over one part of the held-out text."""
        measured = zip(self.tokens, self.complete, self.bits_per_byte, strict=True)
        return tuple((tokens, bits) for tokens, complete, bits in measured if not complete)


def curves(table: pa.Table, phase: Phase) -> dict[str, Curve]:
    """Every run of the phase, by name."""
    wanted = ("replica", "phase", "step", "tokens", "complete", "diverged", "level", "name", "bits_per_byte")
    found: dict[str, dict[tuple[int, bool], dict[str, Any]]] = {}  # the last step has two: of a part, and of all text
    for row in table.select(wanted).to_pylist():
        if row["phase"] != phase or row["level"] != "language":
            continue
        at = found.setdefault(row["replica"], {}).setdefault((row["step"], row["complete"]), {**row, "bits": {}})
        if row["bits_per_byte"] is not None:
            at["bits"][row["name"]] = row["bits_per_byte"]
    return {name: _curve(name, phase, [points[at] for at in sorted(points)]) for name, points in found.items()}


def _curve(name: str, phase: Phase, points: Sequence[Mapping[str, Any]]) -> Curve:
    return Curve(
        name,
        phase,
        next((point["diverged"] for point in points if point["diverged"]), ""),
        tuple(point["tokens"] for point in points),
        tuple(point["complete"] for point in points),
        tuple(point["bits"] for point in points),
    )


def weighted(bits_per_byte: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The study's objective, in bits per byte; NaN where a language that counts was not measured."""
    if any(code not in bits_per_byte for code, weight in weights.items() if weight):
        return math.nan
    return math.fsum(weight * bits_per_byte[code] for code, weight in weights.items() if weight)
