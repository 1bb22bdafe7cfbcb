"""Reads a run directory into checked values, so that the report never meets a field it did not expect.

The files are JSON (or one JSON object a line) and the dataclasses below are their schemas. Whoever writes the files may
add fields; a field that is missing or of another type is an error that names the file, the line and the field.
"""

import functools
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from eurollm_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class ExperimentRecord:
    name: str
    docstring: str
    fingerprint: str
    created: str  # ISO 8601
    experiment: dict[str, Any]  # the resolved configuration
    parameters: int
    parameters_non_embedding: int
    versions: dict[str, str]
    devices: str
    code: str | None  # commit of the code, if it came from a repository


@dataclass(frozen=True, slots=True)
class PlanSource:
    language: str
    share: float  # of all rows
    rows: int
    tokens: int
    bytes: int
    epochs: float
    first_repeat: int | None  # global row at which the second epoch begins
    store_tokens: int
    store_bytes: int
    store_documents: int
    licences: dict[str, int]  # licence -> bytes of the store


@dataclass(frozen=True, slots=True)
class ShareStep:
    start: int  # global row
    shares: dict[str, float]  # source -> share of the rows from there to the next step


@dataclass(frozen=True, slots=True)
class Plan:
    total_rows: int
    sequence_length: int
    stages: list[ShareStep]
    sources: dict[str, PlanSource]


@dataclass(frozen=True, slots=True)
class SourceProgress:
    rows: int  # since the start of the run
    tokens: int  # since the start of the run
    nats: float  # of this interval
    bytes: int  # of this interval


@dataclass(frozen=True, slots=True)
class TrainRecord:
    step: int
    row: int
    tokens: int  # since the start of the run
    loss: float  # nats per token
    bits_per_byte: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None  # model-FLOP utilisation
    data_wait: float  # share of the time
    seconds: float  # of training since the start of the run
    sources: dict[str, SourceProgress]


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    step: int
    row: int
    seconds: float
    bits_per_byte: dict[str, float]
    macro_bits_per_byte: float


@dataclass(frozen=True, slots=True)
class RestartRecord:
    step: int
    time: str  # ISO 8601


@dataclass(frozen=True, slots=True)
class OtherRecord:
    """Of a kind that is read by people, not shown here: "start", "first_step", "checkpoint" and "skipped"."""

    step: int


@dataclass(frozen=True, slots=True)
class Baselines:
    xz: float  # bits per byte
    order0: float  # bits per byte


@dataclass(frozen=True, slots=True)
class LanguageResult:
    name: str
    status: str
    documents: int
    bytes: int
    tokens: int
    nats: float
    bits_per_byte: float
    baselines: Baselines

    @property
    def gain(self) -> float:
        """Share of the bits of `xz` that the model saves; negative where `xz` is better."""
        return 1 - self.bits_per_byte / self.baselines.xz


@dataclass(frozen=True, slots=True)
class BeatsXz:
    official: int
    official_total: int
    all: int
    all_total: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    step: int
    definition: str
    languages: dict[str, LanguageResult]
    beats_xz: BeatsXz

    @property
    def macro(self) -> float:
        """Mean bits per byte over the languages, each counting once."""
        return sum(r.bits_per_byte for r in self.languages.values()) / max(1, len(self.languages))


@dataclass(frozen=True, slots=True)
class Sample:
    language: str
    prompt: str
    continuation: str
    temperature: float


@dataclass(frozen=True, slots=True)
class Metrics:
    train: tuple[TrainRecord, ...]  # by step, each step once
    evaluation: tuple[EvaluationRecord, ...]  # by step, each step once
    restarts: tuple[RestartRecord, ...]  # as they happened
    cut_line: int | None  # number of an unfinished last line, which is left out


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds; None stands for a file that is not there yet."""

    path: Path
    experiment: ExperimentRecord
    plan: Plan | None
    metrics: Metrics | None
    evaluation: Evaluation | None
    samples: list[Sample] | None


def read_run(path: Path) -> Run:
    """Read every file of the run directory `path` that the report needs.

    Raises UserError where `path` is not a run directory or where a file in it is malformed.
    """
    if not (path / "experiment.json").is_file():
        raise UserError(
            f"{path} is not a run directory, it has no experiment.json: name a folder that `eurollm train` made."
        )
    return Run(
        path=path,
        experiment=parse(_json(path / "experiment.json"), ExperimentRecord, str(path / "experiment.json")),
        plan=_optional(path / "plan.json", Plan),
        metrics=_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else None,
        evaluation=_optional(path / "evaluation.json", Evaluation),
        samples=_optional(path / "samples.json", list[Sample]),
    )


def _optional(path: Path, schema: Any) -> Any:
    return parse(_json(path), schema, str(path)) if path.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: make the file again, or remove it.") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON at line {error.lineno} ({error.msg}): make the file again, or remove it."
        ) from None


_KINDS = {
    "train": TrainRecord,
    "evaluation": EvaluationRecord,
    "restart": RestartRecord,
    **dict.fromkeys(("start", "first_step", "checkpoint", "skipped"), OtherRecord),
}


def _metrics(path: Path) -> Metrics:
    """Read metrics.jsonl. A resumed run repeats some steps: the last record of a step is the one that counts."""
    train: dict[int, TrainRecord] = {}
    evaluation: dict[int, EvaluationRecord] = {}
    restarts: list[RestartRecord] = []
    cut_line = None
    text = _text(path)
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            # Only the last line can lack its newline: the run was killed while it wrote, which is no fault of the file.
            if number == len(lines):
                cut_line = number
                break
            raise UserError(f"{where} is not JSON ({error.msg}): mend or remove that line.") from None
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind not in _KINDS:
            raise UserError(
                f"{where}: `kind` is {kind!r} but should be one of {', '.join(_KINDS)}: mend or remove that line."
            )
        match parse(value, _KINDS[kind], where):
            case TrainRecord() as record:
                train[record.step] = record
            case EvaluationRecord() as record:
                evaluation[record.step] = record
            case RestartRecord() as record:
                restarts.append(record)
    return Metrics(
        train=tuple(train[step] for step in sorted(train)),
        evaluation=tuple(evaluation[step] for step in sorted(evaluation)),
        restarts=tuple(restarts),
        cut_line=cut_line,
    )


def parse(value: Any, schema: Any, where: str, field: str = "") -> Any:
    """Check `value` (as `json.loads` gave it) against `schema` and build the dataclasses that it names.

    `schema` is a dataclass, `dict[str, X]`, `list[X]`, `X | None`, `str`, `bool`, `int`, `float` or `Any`; a whole
    number is a float too.
    """
    if schema is Any:
        return value
    if isinstance(schema, types.UnionType):
        options = [option for option in get_args(schema) if option is not type(None)]
        return None if value is None else parse(value, options[0], where, field)
    if is_dataclass(schema) and isinstance(schema, type):
        _expect(isinstance(value, Mapping), value, "an object", where, field)
        built = {}
        for key, hint in _hints(schema).items():
            name = f"{field}.{key}" if field else key
            if key not in value:
                raise UserError(f"{where} lacks the field `{name}`: make the file again, or remove it.")
            built[key] = parse(value[key], hint, where, name)
        return schema(**built)
    if get_origin(schema) is dict:
        _expect(isinstance(value, Mapping), value, "an object", where, field)
        return {key: parse(item, get_args(schema)[1], where, f"{field}.{key}") for key, item in value.items()}
    if get_origin(schema) is list:
        _expect(isinstance(value, list), value, "a list", where, field)
        return [parse(item, get_args(schema)[0], where, f"{field}[{i}]") for i, item in enumerate(value)]
    if schema is bool:
        _expect(isinstance(value, bool), value, "true or false", where, field)
        return value
    if schema is float:
        _expect(isinstance(value, int | float) and not isinstance(value, bool), value, "a number", where, field)
        return float(value)
    if schema is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), value, "a whole number", where, field)
        return value
    _expect(isinstance(value, str), value, "a string", where, field)
    return value


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _expect(holds: bool, value: Any, wanted: str, where: str, field: str) -> None:
    if not holds:
        shown = json.dumps(value)
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        what = f"`{field}`" if field else "the content"
        raise UserError(f"{where}: {what} is {shown} but should be {wanted}: make the file again, or remove it.")
