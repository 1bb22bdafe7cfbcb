"""Reads a study's folder into checked values, so that no section of its report meets a field it did not expect.

The dataclasses are the schemas of study.json, findings.json and confirmation.json; results.parquet is table.py's.
Whoever writes the files may add fields; one that is missing or of another type is an error that names the file and the
field. A number that is not known is null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurollm_jax.ablation.table import Curve, curves, read_results, remedy, weighted
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report.records import parse

FILES = ("study.json", "results.parquet", "findings.json", "confirmation.json", "mixture.py", "datamix.txt")
BACKUP = "restore it from a backup, or remove that one file, and `eurollm ablate` makes it again"  # of study.json
UNKNOWN = ("value", "predicted", "observed")  # fields of findings.json in which null stands for a number: NaN


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its interval, of the study's confidence."""

    value: float  # NaN where it is not known
    low: float | None
    high: float | None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None and math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def covers_zero(self) -> bool:
        """Also where the interval is not known: the figure cannot be told from 0."""
        return not self.known or self.low <= 0 <= self.high  # type: ignore[operator]

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high; the figure itself where they are not known."""
        return (self.low, self.high) if self.known else (self.value, self.value)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    prior: float  # share of the tokens
    lower: float  # bounds of the share, from floors, fixed shares, ceilings and epoch caps
    upper: float
    sources: dict[str, float]  # share of each source within the group


@dataclass(frozen=True, slots=True)
class ArmRecord:
    name: str
    kind: str
    seed: int
    shares: dict[str, float]  # of the tokens, by group


@dataclass(frozen=True, slots=True)
class CostRecord:
    runs: int
    parameters: int  # of each run's model
    tokens: int  # of all runs
    flops: float  # of all runs
    expected_seconds: float | None
    rate: str  # how that is known
    seconds: float | None  # measured, of the starts that ended in order; null before


@dataclass(frozen=True, slots=True)
class Costs:
    devices: str
    device_count: int
    proxies: CostRecord
    confirmation: CostRecord | None


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """study.json: what is known before anything is trained."""

    name: str
    question: str  # the docstring of the study's file
    fingerprint: str
    created: str  # ISO 8601
    study: dict[str, Any]  # the study as it was declared
    target: str  # "uniform", "official" or "given"
    targets: dict[str, float]  # weight of each held-out language
    groups: dict[str, GroupRecord]
    holds: dict[str, dict[str, float]]  # by held-out language: the share of each group's tokens that are of it
    arms: list[ArmRecord]
    laws: dict[str, int]  # free parameters that each law fits to a language
    cost: Costs
    versions: dict[str, str]
    code: str | None  # commit of the code, if it came from a repository


@dataclass(frozen=True, slots=True)
class Prediction:
    """A run that was left out of the fit: weighted bits per byte at the end."""

    name: str
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """How well a law predicts the weighted bits per byte of runs that it was not fitted to: by folds, or one by one."""

    rho_heldout: float | None  # Spearman's
    r2_heldout: float | None
    rho_loo: float | None
    r2_loo: float | None


@dataclass(frozen=True, slots=True)
class BaselineRecord:
    shares: dict[str, float]
    value: float  # predicted weighted bits per byte
    low: float | None
    high: float | None
    gain: Interval  # how many fewer than the prior's

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Predicted:
    """Bits per byte by held-out language."""

    prior: dict[str, Interval]
    proposal: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Findings:
    """findings.json: what the law says."""

    law: str
    runs: int  # that it was fitted to
    confidence: float
    bootstraps: int
    proposal: dict[str, Interval]  # shares by group
    gain: Interval  # weighted bits per byte that the proposal saves
    predicted: Predicted
    changes: dict[str, Interval]  # bits per byte from prior to proposal by held-out language; negative: better
    transfer: dict[str, dict[str, Interval]]  # by held-out language and group: bits per byte for a point of the tokens
    transfer_law: str
    scores: dict[str, ScoreRecord]  # by law
    heldout: dict[str, list[Prediction]]  # by law
    baselines: dict[str, BaselineRecord]  # with the prior and the proposal
    noise: float | None  # standard deviation of weighted bits per byte among runs of one mixture
    recommended: bool
    reasons: list[str]  # sentences
    further: str  # what runs would settle it; may be empty
    caveats: list[str]  # sentences


@dataclass(frozen=True, slots=True)
class MeanInterval:
    mean: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)


@dataclass(frozen=True, slots=True)
class PairedGain:
    """Over pairs of runs that begin with the same weights and read each source in the same order."""

    mean: float
    low: float | None
    high: float | None
    of_seeds: list[float]

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Observed:
    """The runs of one mixture in the confirmation that did not diverge. The lists are in the order of `seeds`."""

    seeds: list[int]
    objective: list[float]  # weighted bits per byte
    bits_per_byte: dict[str, list[float]]  # by held-out language

    def mean(self, language: str) -> float:
        values = self.bits_per_byte.get(language, [])
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class ConfirmationRecord:
    """confirmation.json: what came of the prior and the proposal at another size."""

    held: str  # "yes", "no" or "undecided"
    sentence: str
    confidence: float
    gain: PairedGain
    predicted_gain: MeanInterval
    arms: dict[str, Observed]  # "prior", "proposal" and baselines
    diverged: dict[str, str]  # why, by run

    @property
    def pairs(self) -> int:
        """Seeds of which the prior's run and the proposal's are both sound."""
        return len(self.gain.of_seeds)


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """What a study's folder holds; None stands for a file that is not there yet."""

    path: Path
    study: StudyRecord
    identity: dict[str, Any]  # of study.json: all that decides what the study finds; empty where it was not written
    proxies: dict[str, Curve] | None  # of results.parquet, by name
    findings: Findings | None
    confirmation: ConfirmationRecord | None
    mixture: str | None  # text of mixture.py
    datamix: str | None  # text of datamix.txt

    @property
    def weights(self) -> dict[str, float]:
        """Of the held-out languages."""
        return self.study.targets

    @property
    def ended(self) -> int:
        """Proxies that were trained to their end, soundly or not."""
        return sum(curve.ended for curve in (self.proxies or {}).values())

    def declared(self, *names: str) -> Any:
        """A field of the study's own declaration; None where it has none."""
        return field_of(self.study.study, *names)

    @property
    def objectives(self) -> dict[str, float]:
        """Weighted bits per byte at the end, of each proxy that ended soundly."""
        ended = {name: curve.final for name, curve in (self.proxies or {}).items() if curve.final}
        found = {name: weighted(final, self.weights) for name, final in ended.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @property
    def diverged(self) -> dict[str, str]:
        """Why, by the name of each proxy that did."""
        return {name: curve.diverged for name, curve in (self.proxies or {}).items() if curve.diverged}


def read_study(folder: Path) -> StudyFolder:
    """Read every file of the study in `folder` that its report needs.

    Raises UserError where `folder` is not a study's, or where a file in it is malformed or of another study.
    """
    if not (folder / "study.json").is_file():
        raise UserError(
            f"{folder} is not the folder of a study, it has no study.json: name one that `eurollm ablate` made."
        )
    written = _json(folder / "study.json", BACKUP)
    study: StudyRecord = _parsed(written, StudyRecord, folder / "study.json", BACKUP)
    findings: Findings | None = _optional(folder / "findings.json", Findings)
    results = read_results(folder / "results.parquet") if (folder / "results.parquet").is_file() else None
    if results is not None:
        made_by = (results.schema.metadata or {}).get(b"fingerprint", b"").decode()
        if made_by != study.fingerprint:
            raise UserError(
                f"{folder / 'results.parquet'} is of the study {made_by[:12] or 'without a fingerprint'}, study.json "
                f"of {study.fingerprint[:12]}: run `eurollm ablate` again, which writes the table anew."
            )
    if findings is not None and list(findings.proposal) != list(study.groups):
        raise UserError(
            f"{folder / 'findings.json'} proposes shares of {', '.join(findings.proposal)}, and the groups of "
            f"study.json are {', '.join(study.groups)}: {remedy('findings.json')}."
        )
    return StudyFolder(
        path=folder,
        study=study,
        identity=_identity(written, folder / "study.json"),
        proxies=None if results is None else curves(results, "proxy"),
        findings=findings,
        confirmation=_optional(folder / "confirmation.json", ConfirmationRecord),
        mixture=_text(folder / "mixture.py"),
        datamix=_text(folder / "datamix.txt"),
    )


def field_of(found: Any, *names: str) -> Any:
    """A field within objects of JSON; None where one of them is not there."""
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _identity(written: Any, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _parsed(written.get("identity", {}), dict[str, Any], path, BACKUP, "identity")
    return found


def _optional(path: Path, schema: Any) -> Any:
    if not path.is_file():
        return None
    return _parsed(_with_nan(_json(path, remedy(path.name))), schema, path, remedy(path.name))


def _parsed(value: Any, schema: Any, path: Path, mend: str, field: str = "") -> Any:
    try:
        return parse(value, schema, str(path), field)
    except UserError as error:
        what = str(error).rpartition(": ")[0]  # without what helps with files of a run
        raise UserError(f"{what}: {mend}.") from None


def _json(path: Path, mend: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {mend}.") from None


def _with_nan(found: Any) -> Any:
    if isinstance(found, dict):
        return {k: math.nan if v is None and k in UNKNOWN else _with_nan(v) for k, v in found.items()}
    return [_with_nan(value) for value in found] if isinstance(found, list) else found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: {remedy(path.name)}.") from None
