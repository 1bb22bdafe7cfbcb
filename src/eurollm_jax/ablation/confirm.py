"""Confirmation: did the proposal beat the prior where it was trained again, larger and with several seeds?

The pair of each seed begins with the same weights and reads every source in the same order, so their difference is the
mixture's; another seed has other weights and another order, so what differs among the pairs is all that chance does to
a run (Bouthillier et al. 2021, arXiv:2103.03098). The interval is Student's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

Held = Literal["yes", "no", "undecided"]


@dataclass(frozen=True, eq=False)
class Arms:
    """What was observed of each mixture: bits per byte by language, of each seed whose run is sound."""

    languages: tuple[str, ...]
    weights: Float[np.ndarray, "L"]
    losses: Mapping[str, Mapping[int, Float[np.ndarray, "L"]]]  # by mixture and seed

    def objective(self, arm: str) -> dict[int, float]:
        return {seed: float(losses @ self.weights) for seed, losses in self.losses[arm].items()}

    def gains(self, arm: str) -> list[float]:
        """By how much it is better than the prior, of each seed that has both."""
        prior, own = self.objective("prior"), self.objective(arm)
        return [prior[seed] - own[seed] for seed in sorted(prior.keys() & own.keys())]


def mean_interval(values: Sequence[float] | Float[np.ndarray, "S"], confidence: float) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t; of a single value the interval is the whole line."""
    found = np.asarray(values, np.float64)
    mean = float(found.mean())
    if len(found) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + confidence) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return mean, mean - half, mean + half


def verdict(arms: Arms, predicted: tuple[float, float, float], confidence: float) -> dict[str, Any]:
    """The content of confirmation.json; `predicted` is the gain that the proxies foretold, with its interval. At least
    one seed has both the prior and the proposal."""
    gains = arms.gains("proposal")
    gain, low, high = mean_interval(gains, confidence)
    held: Held = "yes" if low > 0 else "no" if high < 0 else "undecided"
    interval = f"{gain:+.4f} bits per byte, "
    if len(gains) > 1:
        interval += f"{100 * confidence:g} % interval {low:+.4f} to {high:+.4f}, {len(gains)} seeds"
    else:
        interval += "of one seed, which has no interval"
    told = f"the proxies foretold {predicted[0]:+.4f} ({predicted[1]:+.4f} to {predicted[2]:+.4f})"
    said = {
        "yes": f"The proposal won: it gains {interval}; {told}.",
        "no": f"The proposal lost: its gain is {interval}; {told}.",
        "undecided": f"The runs do not decide: the gain is {interval}; {told}. More seeds would narrow it.",
    }
    return {
        "held": held,
        "sentence": said[held],
        "confidence": confidence,
        "gain": {"mean": gain, "low": _finite(low), "high": _finite(high), "of_seeds": gains},
        "predicted_gain": {"mean": predicted[0], "low": predicted[1], "high": predicted[2]},
        "arms": {
            arm: {
                "seeds": list(losses),
                "objective": list(arms.objective(arm).values()),
                "bits_per_byte": dict(zip(arms.languages, np.stack(list(losses.values())).T.tolist(), strict=True)),
                **({} if arm == "prior" or not arms.gains(arm) else {"gain": float(np.mean(arms.gains(arm)))}),
            }
            for arm, losses in arms.losses.items()
            if losses
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
