"""Verdict: whether a study supports its proposal, in plain sentences, and what would settle it if not."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from eurollm_jax.ablation.bootstrap import Estimate
from eurollm_jax.ablation.laws import LawName, Observations, parameters
from eurollm_jax.ablation.validation import TREES, Score

AFFORDABLE = 10  # times the runs of a study: more of them are not proposed
FULL_DESIGN = 5  # runs for each group, beyond which runs are not what a law lacks


@dataclass(frozen=True)
class Evidence:
    law: LawName
    runs: Observations
    confidence: float
    gain: Estimate
    scores: dict[str, Score]
    min_rho: float
    spread: float  # standard deviation of the runs' weighted bits per byte
    noise: float | None  # of that of equal mixtures

    @property
    def rho(self) -> float:
        return self.scores[self.law].rho_heldout


def noise_of_repeats(shares: Float[np.ndarray, "N G"], objective: Float[np.ndarray, "N"]) -> tuple[float | None, int]:
    """(standard deviation among runs of equal mixtures, its degrees of freedom); (None, 0) if none was repeated."""
    _, mixture = np.unique(np.round(shares, 9), axis=0, return_inverse=True)
    means = np.bincount(mixture, objective) / np.bincount(mixture)
    free = len(objective) - len(means)
    if free == 0:
        return None, 0
    return float(np.sqrt(((objective - means[mixture]) ** 2).sum() / free)), free


def verdict(evidence: Evidence) -> tuple[bool, tuple[str, ...], str]:
    """(recommended, reasons, further). Declines where the gain's interval reaches 0 or the held-out rho is too low."""
    gain, rho = evidence.gain, evidence.rho
    said = f"{gain.value:+.4f} bits per byte ({evidence.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f})"
    sure, foretells = gain.low > 0, rho >= evidence.min_rho
    reasons = [
        f"The proposal's gain over the prior is {said}"
        + ("." if sure else ", which does not exclude that there is none."),
        f"The {evidence.law} law ranks runs that it has not seen with a Spearman rho of {rho:.2f}, "
        + ("no less" if foretells else "less")
        + f" than the {evidence.min_rho:.2f} asked for.",
    ]
    further = []
    if not sure:
        further.append(_for_the_gain(evidence))
    if not foretells:
        further.append(_for_rho(evidence))
    return sure and foretells, tuple(reasons), " ".join(dict.fromkeys(further))


def _for_the_gain(evidence: Evidence) -> str:
    """The interval narrows with the square root of the runs."""
    gain, runs = evidence.gain, len(evidence.runs.names)
    needed = runs * ((gain.value - gain.low) / gain.value) ** 2 if gain.value > 0 else math.inf
    if needed <= AFFORDABLE * runs:
        more = max(1, math.ceil(needed) - runs)
        return f"About {more} more runs like these would tell a gain of {gain.value:.4f} from none."
    if gain.high <= 0:
        return (
            "More runs are not likely to help: keep the prior, or let the mixtures depart further from it (smaller kl)."
        )
    return (
        f"A gain, if there is one, is at most {gain.high:.4f} bits per byte, and more than {AFFORDABLE} times the runs "
        "would be needed to see it: keep the prior, or train the proxies longer so that noise is less of what differs."
    )


def _for_rho(evidence: Evidence) -> str:
    law, groups, runs = evidence.law, len(evidence.runs.groups), len(evidence.runs.names)
    if evidence.noise is not None:
        reliable = math.sqrt(max(0.0, 1 - (evidence.noise / evidence.spread) ** 2)) if evidence.spread > 0 else 0.0
        if reliable < evidence.min_rho:
            return (
                f"Runs of equal mixtures differ by {evidence.noise:.4f} bits per byte (standard deviation), all runs "
                f"by {evidence.spread:.4f}: even the true law would correlate only {reliable:.2f} with them. Train the "
                "proxies longer, or draw mixtures further from the prior (lower concentrations)."
            )
    trees = evidence.scores.get(TREES)
    if trees is not None and trees.rho_heldout >= max(evidence.min_rho, evidence.rho + 0.05):
        return (
            f"The trees rank the same runs with {trees.rho_heldout:.2f}, so the {law} law has the wrong form here: "
            "draw mixtures nearer to the prior (higher concentrations), or group the sources otherwise."
        )
    if runs < FULL_DESIGN * groups:
        return (
            f"The {law} law has {parameters(law, groups)} parameters for each language and {runs} runs: "
            f"{FULL_DESIGN * groups - runs} more would make it {FULL_DESIGN} runs for each of {groups} groups."
        )
    return (
        f"{runs} runs are enough for {groups} groups, so more of them are not what the law lacks: train the proxies "
        "longer, or draw mixtures nearer to the prior (higher concentrations)."
    )


def caveats(
    evidence: Evidence, proposal: Float[np.ndarray, "G"], misfit: Float[np.ndarray, "N"], free: float
) -> tuple[str, ...]:
    """What a reader must know of the law. `misfit`: the residuals of the runs' objective, `free` their degrees."""
    found = []
    groups = evidence.runs.groups
    if evidence.law == "power":
        scores = evidence.scores
        found.append(
            "The power law, which proposes here, has no transfer between languages. "
            + (
                f"Of runs that were left out it has an R2 of {scores['power'].r2_heldout:.2f}, the log-linear law "
                f"{scores['log-linear'].r2_heldout:.2f}."
                if "log-linear" in scores
                else f"{len(evidence.runs.names)} runs of {len(groups)} groups are too few for the log-linear law."
            )
        )
    low, high = evidence.runs.shares.min(0), evidence.runs.shares.max(0)
    beyond = [name for name, share, a, b in zip(groups, proposal, low, high, strict=True) if not a <= share <= b]
    if beyond:
        found.append(f"The proposal extrapolates: no run had such a share of {', '.join(beyond)}.")
    noise, repeats = noise_of_repeats(evidence.runs.shares, misfit)
    if noise is not None and noise > 0:
        residual = math.sqrt(float((misfit**2).sum()) / max(free, 1.0))
        if residual > noise * math.sqrt(stats.f.ppf(0.99, max(free, 1.0), repeats)):
            found.append(
                f"The law misses runs by {residual:.4f} bits per byte, though equal mixtures differ by {noise:.4f}: "
                "its form does not fit well far from the prior."
            )
    return tuple(found)
