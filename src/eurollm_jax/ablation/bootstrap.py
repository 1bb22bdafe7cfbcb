"""Bootstrap over runs: how far a study's answers would differ, had its runs been made again.

With 3 to 5 runs for each group, the resampling of runs leaves designs that do not determine the law. Here the design
stays and the noise is drawn anew. Each sample has the losses

    y*_n = L(r_n) + v_n k_i e_m / (1 - h_m)^(3/4),   v_n = -1 or 1,   m = n or, as often, any run,

e the residuals and h the leverage that the fit gave each run. m = n alone is the wild bootstrap (Liu 1988), which holds
where some runs are noisier or worse fitted than others, but estimates the noise of the few runs that decide a group's
entries from these few; m = any is the residual bootstrap, which does not. v and m are drawn once for a run and all its
languages, as what moves one language of a run moves its others. Residuals are smaller than the noise: an exponent of
1/2 mends that (HC2 of MacKinnon and White 1985), of 1 over-mends it (HC3, the jackknife). It is between them because
the fitted optimum lies nearer to the bounds than the true one, where samples of it differ less; the coverage is
measured in tests/ablation/test_planted.py. k is the ratio of Student's quantile to the normal one, for the degrees of
freedom that the fit left. Quantiles are those of B + 1: the plain ones of 100 samples hold 88 % where they should 90.

Intervals. Of a quantity that the study estimates (a share of the optimum, a transfer entry, a prediction at given
shares): the percentiles of the samples. Of a quantity at the proposal, which was chosen because its estimate is good
(winner's curse): of the samples' errors D = (sample's law at the sample's proposal) - (fitted law at the sample's
proposal), which hold such optimism too; the interval is the estimate less the percentiles of D, and the value given is
less their mean. Of the gain both ends need more, as samples are about a fitted law, whose proposal is more extreme than
the true law's. Where the optimism was small, D holds too much of it: the upper end is a quarter of the way (which was
chosen for its coverage) from D's to that of shares that nobody chose. Where noise rules, D holds too little: unless an
F-test finds that the mixtures matter at all, the lower end is at most the estimate less what is won by chance, the
percentile of the gains that are found in samples of the same noise about a law without slopes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from eurollm_jax.ablation.fitting import Fit
from eurollm_jax.ablation.laws import Law
from eurollm_jax.ablation.proposal import Problem, objective, propose

UNCHOSEN = 1 / 4  # of the upper end of a gain's interval; see above


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Estimate":
        return cls(*(math.nan if found[name] is None else found[name] for name in ("value", "low", "high")))


@dataclass(frozen=True, eq=False)
class Samples:
    """The law and the proposal of each of B samples, beside the law fitted to the runs and its proposal."""

    problem: Problem
    fitted: Law
    laws: Law  # leading axis B
    proposal: Float[np.ndarray, "G"]
    proposals: Float[np.ndarray, "B G"]
    chance: Float[np.ndarray, "B"] | None  # gains found of noise alone; None where the mixtures surely matter


def noise(fit: Fit, count: int, confidence: float, rng: np.random.Generator) -> Float[np.ndarray, "B N L"]:
    """Of as many studies of the same design."""
    runs = len(fit.losses)
    free = np.maximum(runs - fit.leverage.sum(0), 1.0)  # [L]
    tail = (1 + confidence) / 2
    wider = stats.t.ppf(tail, free) / stats.norm.ppf(tail)
    errors = (fit.losses - fit.predicted) * wider / np.maximum(1 - fit.leverage, 0.05) ** 0.75
    own = np.broadcast_to(np.arange(runs), (count, runs))
    source = np.where(rng.random((count, runs)) < 0.5, own, rng.integers(0, runs, (count, runs)))
    signs = rng.choice((-1.0, 1.0), (count, runs, 1))
    return signs * errors[source]


def bootstrap(fit: Fit, problem: Problem, count: int, confidence: float, seed: int) -> Samples:
    drawn = noise(fit, count, confidence, np.random.default_rng(seed))
    laws, proposals = _refit(fit, problem, fit.predicted + drawn)
    chance = None
    if mixtures_matter(fit, problem) > 0.1 * (1 - confidence):
        of_noise, by_chance = _refit(fit, problem, fit.law.predict(problem.prior) + drawn)
        chance = objective(of_noise, problem, problem.prior) - objective(of_noise, problem, by_chance)
    return Samples(problem, fit.law, laws, propose(fit.law, problem), proposals, chance)


def _refit(fit: Fit, problem: Problem, losses: Float[np.ndarray, "B N L"]) -> tuple[Law, Float[np.ndarray, "B G"]]:
    laws = fit.law_of(fit.again(losses))
    return laws, np.stack([propose(laws[index], problem) for index in range(len(losses))])


def mixtures_matter(fit: Fit, problem: Problem) -> float:
    """Probability of a fit as good as this to the weighted bits per byte, if no mixture mattered (F-test)."""
    runs = len(fit.losses)
    observed = fit.losses @ problem.weights
    left = ((observed - fit.predicted @ problem.weights) ** 2).sum()
    explained = ((observed - observed.mean()) ** 2).sum() - left
    used = float(fit.leverage.sum(0) @ problem.weights) - 1
    free = max(runs - 1 - used, 1.0)
    if left <= 0 or used <= 0 or explained <= 0:
        return 0.0 if explained > 0 else 1.0
    return float(stats.f.sf((explained / used) / (left / free), used, free))


def estimate(
    value: Float[np.ndarray, "..."], samples: Float[np.ndarray, "B ..."], confidence: float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """(value, low, high) of a quantity that was not chosen for being good: percentiles."""
    low, high = _tails(samples, confidence)
    return value, np.minimum(low, value), np.maximum(high, value)


def estimate_chosen(
    value: Float[np.ndarray, "..."], errors: Float[np.ndarray, "B ..."], confidence: float
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """(value less the optimism, low, high) of a quantity at shares chosen for it, from the samples' errors."""
    low, high = _tails(errors, confidence)
    middle = np.clip(errors.mean(0), low, high)
    return value - middle, value - high, value - low


def _tails(samples: Float[np.ndarray, "B ..."], confidence: float) -> Float[np.ndarray, "2 ..."]:
    """Quantiles between which another sample falls with the probability `confidence`, whatever their number."""
    return np.quantile(samples, ((1 - confidence) / 2, (1 + confidence) / 2), axis=0, method="weibull")


def gain(samples: Samples, confidence: float) -> tuple[float, float, float]:
    """Weighted bits per byte that the proposal wins over the prior: (value, low, high)."""
    problem, prior = samples.problem, samples.problem.prior

    def won(law: Law, shares: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "..."]:
        return objective(law, problem, prior) - objective(law, problem, shares)

    errors = won(samples.laws, samples.proposals) - won(samples.fitted, samples.proposals)
    found = won(samples.fitted, samples.proposal)
    value, low, high = estimate_chosen(found, errors, confidence)
    unchosen = won(samples.laws, samples.proposal) - found
    high += UNCHOSEN * max(0.0, found - _tails(unchosen, confidence)[0] - high)
    if samples.chance is not None:
        low = min(low, found - _tails(samples.chance, confidence)[1])
    return float(value), float(low), float(high)
