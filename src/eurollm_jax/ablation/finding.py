"""Finding: what a study found, with intervals; findings.json and the report hold nothing else."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation.bootstrap import Estimate
from eurollm_jax.ablation.validation import Score


@dataclass(frozen=True)
class HeldOutRun:
    """Weighted bits per byte of a run, and what the law fitted without its fold foretold."""

    name: str
    predicted: float
    observed: float


@dataclass(frozen=True)
class Contender:
    """A mixture under the fitted law: weighted bits per byte, and how many fewer than the prior's."""

    shares: Mapping[str, float]
    objective: Estimate
    gain: Estimate


@dataclass(frozen=True)
class Finding:
    """Bits per byte, and shares of tokens. Values at the proposal are rid of the optimism of having chosen it."""

    law: str
    runs: int
    confidence: float  # of all intervals
    bootstraps: int
    proposal: Mapping[str, Estimate]  # by group
    gain: Estimate  # of the proposal over the prior, in weighted bits per byte; positive: better
    gain_of_law: float  # as the fitted law has it, optimism included
    predicted: Mapping[str, Mapping[str, Estimate]]  # "prior" and "proposal" -> language -> bits per byte
    changes: Mapping[str, Estimate]  # by language, from prior to proposal; negative: better
    transfer: Mapping[str, Mapping[str, Estimate]]  # language -> group; see `laws.transfer_matrix`; NaN: not known
    transfer_law: str  # that it is of: the log-linear one, the only one that knows any, where the runs suffice
    scores: Mapping[str, Score]  # by law, and of the trees
    heldout: Mapping[str, tuple[HeldOutRun, ...]]  # by law, and of the trees
    baselines: Mapping[str, Contender]  # with "prior" and "proposal"
    noise: float | None  # standard deviation of the weighted bits per byte of equal mixtures; None: none was repeated
    recommended: bool
    reasons: tuple[str, ...]
    further: str  # what runs would settle it; empty where it is settled
    caveats: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = _known(asdict(self))
        for contender in found["baselines"].values():
            contender.update(contender.pop("objective"))
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Finding":
        def estimates(by_name: Mapping[str, Any]) -> dict[str, Estimate]:
            return {name: Estimate.from_json(value) for name, value in by_name.items()}

        def contender(value: Mapping[str, Any]) -> Contender:
            return Contender(dict(value["shares"]), Estimate.from_json(value), Estimate.from_json(value["gain"]))

        return cls(
            law=found["law"],
            runs=found["runs"],
            confidence=found["confidence"],
            bootstraps=found["bootstraps"],
            proposal=estimates(found["proposal"]),
            gain=Estimate.from_json(found["gain"]),
            gain_of_law=found["gain_of_law"],
            predicted={at: estimates(losses) for at, losses in found["predicted"].items()},
            changes=estimates(found["changes"]),
            transfer={language: estimates(entries) for language, entries in found["transfer"].items()},
            transfer_law=found["transfer_law"],
            scores={law: Score.from_json(value) for law, value in found["scores"].items()},
            heldout={law: tuple(HeldOutRun(**run) for run in runs) for law, runs in found["heldout"].items()},
            baselines={name: contender(value) for name, value in found["baselines"].items()},
            noise=found["noise"],
            recommended=found["recommended"],
            reasons=tuple(found["reasons"]),
            further=found["further"],
            caveats=tuple(found["caveats"]),
        )


def _known(found: Any) -> Any:
    """With null for what is not a finite number, which JSON has no word for."""
    if isinstance(found, dict):
        return {name: _known(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_known(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def named(
    names: tuple[str, ...],
    values: tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"], Float[np.ndarray, "M"]],
) -> dict[str, Estimate]:
    """(values, lows, highs) by name."""
    return {
        name: Estimate(float(value), float(low), float(high))
        for name, value, low, high in zip(names, *values, strict=True)
    }
