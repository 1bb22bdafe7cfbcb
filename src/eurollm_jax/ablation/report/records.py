"""Reads a study's folder into checked values, so that no section of its report meets a field it did not expect.

The dataclasses are the schemas of study.json, findings.json and confirmation.json; results.parquet is table.py's.
Whoever writes the files may add fields; one that is missing or of another type is an error that names the file and the
field. A number that is not known is null.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurollm_jax.ablation.table import Curve, curves, read_results, weighted
from eurollm_jax.corpus.folders import read_json
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report.records import parse

FILES = ("study.json", "results.parquet", "findings.json", "confirmation.json", "mixture.py", "datamix.txt")


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its interval, of the study's confidence."""

    value: float
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
    seconds: float | None  # measured, of all starts; null before


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
class Observed:
    """The runs of one mixture in the confirmation, seed by seed."""

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
    gain: MeanInterval
    predicted_gain: MeanInterval
    arms: dict[str, Observed]  # "prior", "proposal" and baselines
    diverged: dict[str, str]  # why, by run


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
    study: StudyRecord = _read(folder / "study.json", StudyRecord)
    findings: Findings | None = _read(folder / "findings.json", Findings)
    results = read_results(folder / "results.parquet") if (folder / "results.parquet").is_file() else None
    if results is not None:
        made_by = (results.schema.metadata or {}).get(b"fingerprint", b"").decode()
        if made_by != study.fingerprint:
            raise UserError(
                f"{folder / 'results.parquet'} is of the study {made_by[:12] or 'without a fingerprint'}, study.json "
                "of "
                f"{study.fingerprint[:12]}: run `eurollm ablate` again, which writes the table anew."
            )
    if findings is not None and list(findings.proposal) != list(study.groups):
        raise UserError(
            f"{folder / 'findings.json'} proposes shares of {', '.join(findings.proposal)}, and the groups of "
            f"study.json are {', '.join(study.groups)}: remove it and run `eurollm ablate` again."
        )
    return StudyFolder(
        path=folder,
        study=study,
        identity=read_json(folder / "study.json").get("identity", {}),
        proxies=None if results is None else curves(results, "proxy"),
        findings=findings,
        confirmation=_read(folder / "confirmation.json", ConfirmationRecord),
        mixture=_text(folder / "mixture.py"),
        datamix=_text(folder / "datamix.txt"),
    )


def _read(path: Path, schema: Any) -> Any:
    return parse(read_json(path), schema, str(path)) if path.is_file() else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
