"""Validation: does a law foretell runs that it has not seen? Spearman's rho and R2 on runs left out of the fit.

Of K folds, and of each run by itself (leave-one-out). Gradient-boosted trees (RegMix, arXiv:2407.01492) are fitted to
the same folds as a cross-check: where they foretell much better than a law, the law has the wrong form.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from eurollm_jax.ablation.fitting import Fit
from eurollm_jax.ablation.laws import Observations

TREES = "trees"


@dataclass(frozen=True)
class Score:
    """Of the weighted objective and, by language, of each language's bits per byte. None where not computed."""

    rho_heldout: float
    r2_heldout: float
    rho_loo: float | None
    r2_loo: float | None
    languages: dict[str, dict[str, float]]  # language -> {"rho_heldout", "r2_heldout"}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Score":
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


def folds(runs: int, count: int, seed: int) -> Int[np.ndarray, "N"]:
    """The fold of each run: equal in size but for one, by chance."""
    return np.random.default_rng(seed).permutation(np.arange(runs) % min(count, runs))


def foretold(fit: Fit, *divisions: Int[np.ndarray, "N"]) -> list[Float[np.ndarray, "N L"]]:
    """Each run's loss as foretold by the law fitted without its fold, for each division of the runs into folds."""
    weights = np.concatenate([fold != np.arange(fold.max() + 1)[:, None] for fold in divisions])  # [K + ..., N]
    predicted = fit.predicted_by(fit.again(weights=weights.astype(np.float64)))
    found, first = [], 0
    for fold in divisions:
        found.append(predicted[first + fold, np.arange(len(fold))])
        first += int(fold.max()) + 1
    return found


def foretold_by_trees(runs: Observations, fold: Int[np.ndarray, "N"], seed: int) -> Float[np.ndarray, "N L"]:
    """As `foretold`, by gradient-boosted regression trees of scikit-learn, for each language."""
    from sklearn.ensemble import GradientBoostingRegressor  # a second to import

    predicted = np.empty_like(runs.losses, dtype=np.float64)
    for left_out in range(int(fold.max()) + 1):
        seen, unseen = fold != left_out, fold == left_out
        for language in range(len(runs.languages)):
            trees = GradientBoostingRegressor(
                n_estimators=100, learning_rate=0.1, max_depth=2, subsample=0.7, random_state=seed
            )
            trees.fit(runs.shares[seen], runs.losses[seen, language])
            predicted[unseen, language] = trees.predict(runs.shares[unseen])
    return predicted


def spearman(predicted: Float[np.ndarray, "N"], observed: Float[np.ndarray, "N"]) -> float:
    """Rank correlation; 0 where either is constant."""
    if np.ptp(predicted) == 0 or np.ptp(observed) == 0:
        return 0.0
    return float(stats.spearmanr(predicted, observed).statistic)


def r_squared(predicted: Float[np.ndarray, "N"], observed: Float[np.ndarray, "N"]) -> float:
    """Share of the variance foretold; below 0 where the mean of all runs foretells better. 0 where there is none."""
    spread = ((observed - observed.mean()) ** 2).sum()
    return float(1 - ((observed - predicted) ** 2).sum() / spread) if spread > 0 else 0.0


def score(
    runs: Observations,
    weights: Float[np.ndarray, "L"],
    heldout: Float[np.ndarray, "N L"],
    leave_one_out: Float[np.ndarray, "N L"] | None,
) -> Score:
    observed = runs.losses @ weights
    return Score(
        rho_heldout=spearman(heldout @ weights, observed),
        r2_heldout=r_squared(heldout @ weights, observed),
        rho_loo=None if leave_one_out is None else spearman(leave_one_out @ weights, observed),
        r2_loo=None if leave_one_out is None else r_squared(leave_one_out @ weights, observed),
        languages={
            language: {
                "rho_heldout": spearman(heldout[:, index], runs.losses[:, index]),
                "r2_heldout": r_squared(heldout[:, index], runs.losses[:, index]),
            }
            for index, language in enumerate(runs.languages)
        },
    )
