"""Analysis: from what the proxies showed to a proposal with intervals, or to the reasons why there is none."""

import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation import validation
from eurollm_jax.ablation.bootstrap import Estimate, Samples, bootstrap, estimate, estimate_chosen, gain
from eurollm_jax.ablation.finding import Contender, Finding, HeldOutRun, named
from eurollm_jax.ablation.fitting import Fit, fit
from eurollm_jax.ablation.laws import LawName, Observations, choose_law, runs_needed, transfer_matrix
from eurollm_jax.ablation.proposal import Problem, objective
from eurollm_jax.ablation.study import Analysis
from eurollm_jax.ablation.verdict import Evidence, caveats, noise_of_repeats, verdict

LAWS: tuple[LawName, ...] = ("log-linear", "power")


def analyse(observations: Observations, problem: Problem, settings: Analysis) -> Finding:
    """Fit, validate, propose, and judge. Raises UserError if there are fewer runs than the law needs.

    The law that proposes is `settings.law`; "auto" is the one, of those that the runs suffice for, that predicts the
    objective of runs that were left out with the smaller squared error. The others are fitted too, and only scored.
    """
    runs, groups = len(observations.names), len(observations.groups)
    needed = choose_law(settings.law, runs, groups)
    fits = {
        name: fit(name, observations, problem.prior, problem.holds, starts=settings.starts, seed=settings.seed)
        for name in LAWS
        if name == needed or runs >= runs_needed(name, groups)
    }
    scores, heldout = _validate(fits, observations, problem, settings)
    law = max(fits, key=lambda name: np.nan_to_num(scores[name].r2_heldout, nan=-np.inf))
    law = law if settings.law == "auto" else needed
    samples = bootstrap(fits[law], problem, settings.bootstraps, settings.confidence, settings.seed)
    of_transfer: LawName = "log-linear" if "log-linear" in fits else law
    transferring = samples
    if of_transfer != law:
        transferring = bootstrap(fits[of_transfer], problem, settings.bootstraps, settings.confidence, settings.seed)
    won = Estimate(*gain(samples, settings.confidence))
    observed = observations.losses @ problem.weights
    noise, _ = noise_of_repeats(observations.shares, observed)
    evidence = Evidence(
        law, observations, settings.confidence, won, scores, settings.min_rho, float(observed.std(ddof=1)), noise
    )
    recommended, reasons, further = verdict(evidence)
    misfit = (observations.losses - fits[law].predicted) @ problem.weights
    free = runs - float(fits[law].leverage.sum(0) @ problem.weights)
    predicted, changes = _by_language(samples, observations, settings.confidence)
    return Finding(
        law=law,
        runs=runs,
        confidence=settings.confidence,
        bootstraps=settings.bootstraps,
        proposal=named(observations.groups, estimate(samples.proposal, samples.proposals, settings.confidence)),
        gain=won,
        gain_of_law=_won(samples, samples.proposal),
        predicted=predicted,
        changes=changes,
        transfer=_transfer(transferring, observations, settings.confidence),
        transfer_law=of_transfer,
        scores=scores,
        heldout=heldout,
        baselines=_contenders(samples, observations, settings.confidence, won),
        noise=noise,
        recommended=recommended,
        reasons=reasons,
        further=further,
        caveats=caveats(evidence, samples.proposal, misfit, free),
    )


def _validate(
    fits: dict[LawName, Fit], runs: Observations, problem: Problem, settings: Analysis
) -> tuple[dict[str, validation.Score], dict[str, tuple[HeldOutRun, ...]]]:
    fold = validation.folds(len(runs.names), settings.folds, settings.seed)
    each = np.arange(len(runs.names))
    foretold = {name: validation.foretold(f, fold, each) for name, f in fits.items()}
    by_trees = validation.foretold_by_trees(runs, fold, settings.seed)
    heldout: dict[str, Float[np.ndarray, "N L"]] = {name: of_folds for name, (of_folds, _) in foretold.items()}
    left_one_out = {str(name): one_by_one for name, (_, one_by_one) in foretold.items()}
    heldout[validation.TREES] = by_trees
    scores = {
        name: validation.score(runs, problem.weights, of_folds, left_one_out.get(name))
        for name, of_folds in heldout.items()
    }
    observed = runs.losses @ problem.weights
    return scores, {
        name: tuple(
            HeldOutRun(run, float(predicted), float(seen))
            for run, predicted, seen in zip(runs.names, of_folds @ problem.weights, observed, strict=True)
        )
        for name, of_folds in heldout.items()
    }


def _won(samples: Samples, shares: Float[np.ndarray, "G"]) -> float:
    law, problem = samples.fitted, samples.problem
    return float(objective(law, problem, problem.prior) - objective(law, problem, shares))


def _by_language(
    samples: Samples, runs: Observations, confidence: float
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate]]:
    prior, fitted, laws = samples.problem.prior, samples.fitted, samples.laws
    at_prior, at_proposal = fitted.predict(prior), fitted.predict(samples.proposal)
    errors_at_prior = laws.predict(prior) - at_prior
    errors = laws.predict(samples.proposals) - fitted.predict(samples.proposals)
    predicted = {
        "prior": named(runs.languages, estimate(at_prior, laws.predict(prior), confidence)),
        "proposal": named(runs.languages, estimate_chosen(at_proposal, errors, confidence)),
    }
    changes = estimate_chosen(at_proposal - at_prior, errors - errors_at_prior, confidence)
    return predicted, named(runs.languages, changes)


def _transfer(samples: Samples, runs: Observations, confidence: float) -> dict[str, dict[str, Estimate]]:
    prior = samples.problem.prior
    values, lows, highs = estimate(
        transfer_matrix(samples.fitted, prior, runs.moved), transfer_matrix(samples.laws, prior, runs.moved), confidence
    )
    return {
        language: named(runs.groups, (values[index], lows[index], highs[index]))
        for index, language in enumerate(runs.languages)
    }


def _contenders(samples: Samples, runs: Observations, confidence: float, won: Estimate) -> dict[str, Contender]:
    """Of the proposal, the objective's interval is that of a mixture which was chosen for it."""
    problem, fitted, laws = samples.problem, samples.fitted, samples.laws

    def shares_by_group(shares: Float[np.ndarray, "G"]) -> dict[str, float]:
        return {name: float(share) for name, share in zip(runs.groups, shares, strict=True)}

    found = {}
    at_prior = objective(laws, problem, problem.prior)
    for name, shares in {"prior": problem.prior, **problem.baselines}.items():
        value, values = objective(fitted, problem, shares), objective(laws, problem, shares)
        found[name] = Contender(
            shares_by_group(shares),
            Estimate(*(float(x) for x in estimate(value, values, confidence))),
            Estimate(*(float(x) for x in estimate(np.asarray(_won(samples, shares)), at_prior - values, confidence))),
        )
    errors = objective(laws, problem, samples.proposals) - objective(fitted, problem, samples.proposals)
    chosen = estimate_chosen(objective(fitted, problem, samples.proposal), errors, confidence)
    return {
        "prior": found.pop("prior"),
        "proposal": Contender(shares_by_group(samples.proposal), Estimate(*(float(x) for x in chosen)), won),
        **found,
    }
