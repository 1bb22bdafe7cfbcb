"""Studies whose law is known: what a study finds of them can be held against the truth."""

from dataclasses import asdict, dataclass

import numpy as np

from eurollm_jax.ablation.bootstrap import bootstrap, estimate, estimate_chosen, gain
from eurollm_jax.ablation.fitting import fit
from eurollm_jax.ablation.laws import Law, LawName, LogLinear, Observations, Power, transfer_matrix
from eurollm_jax.ablation.proposal import Problem, objective, propose


@dataclass(frozen=True, eq=False)
class Planted:
    law: Law
    problem: Problem
    shares: np.ndarray  # [N, G]
    noise: float  # of the loss
    shared: float = 0.5  # of the noise's variance, that all languages of a run have in common

    def observe(self, rng: np.random.Generator) -> Observations:
        losses = self.law.predict(self.shares)
        own = rng.standard_normal(losses.shape) * np.sqrt(1 - self.shared)
        common = rng.standard_normal((len(losses), 1)) * np.sqrt(self.shared)
        runs, languages = losses.shape
        return Observations(
            groups=tuple(f"g{j}" for j in range(self.shares.shape[1])),
            languages=tuple(f"l{i}" for i in range(languages)),
            shares=self.shares,
            losses=losses * (1 + self.noise * (own + common)),
            names=tuple(f"run-{n}" for n in range(runs)),
        )


def planted(
    languages: int,
    groups: int,
    *,
    runs_per_group: int = 4,
    noise: float = 0.005,
    effect: float = 1.0,
    power: bool = False,
    kl: float = 0.01,
    seed: int = 0,
) -> Planted:
    """Each language is of one group, which helps it most; others help it a little, or harm it.

    Losses from 1.2 to 2.2 bits per byte at the prior. `effect` 0: no mixture matters.
    """
    rng = np.random.default_rng(seed)
    prior = uneven(rng, groups)
    of = np.arange(languages) % groups
    holds = np.zeros((languages, groups))
    for group in range(groups):
        members = np.flatnonzero(of == group)
        holds[members, group] = rng.dirichlet(np.full(len(members), 3.0))
    at_prior = rng.uniform(1.2, 2.2, languages)
    if power:
        exponent = effect * rng.uniform(0.05, 0.2, languages)
        offset = rng.uniform(0.003, 0.02, languages)
        law: Law = Power(at_prior * (holds @ prior + offset) ** exponent, exponent, offset, holds)
    else:
        transfer = rng.normal(0, 0.25, (languages, groups))
        transfer[np.arange(languages), of] -= rng.uniform(1.0, 2.5, languages)
        transfer = effect * (transfer - (transfer @ prior)[:, None])
        floor = at_prior * rng.uniform(0.3, 0.7, languages)
        law = LogLinear(floor, np.log(at_prior - floor), transfer)
    problem = Problem(
        weights=np.full(languages, 1 / languages),
        prior=prior,
        lower=np.zeros(groups),
        upper=np.ones(groups),
        kl=kl,
        holds=holds,
        baselines={"prior": prior, "uniform": np.full(groups, 1 / groups)},
    )
    return Planted(law, problem, design(rng, prior, runs_per_group * groups), noise)


def uneven(rng: np.random.Generator, groups: int) -> np.ndarray:
    sizes = np.exp(rng.normal(0, 0.8, groups))
    return sizes / sizes.sum()


def design(rng: np.random.Generator, prior: np.ndarray, runs: int) -> np.ndarray:
    """Three of the prior; the rest drawn around it, a quarter of them with some groups left out."""
    rows = [prior] * 3
    while len(rows) < runs:
        around = prior * np.exp(rng.uniform(np.log(len(prior)), np.log(20.0 * len(prior))))
        if len(rows) % 4 == 0:
            around = np.where(rng.random(len(prior)) < 0.25, 0.0, around)
        kept = around > 0
        if kept.sum() < 2:
            continue
        row = np.zeros_like(prior)
        row[kept] = rng.dirichlet(around[kept])
        rows.append(row)
    return np.array(rows)


@dataclass(frozen=True)
class Coverage:
    """Of nominal 90 % intervals, over simulations: how often they hold the truth. Entries are averaged over."""

    gain: float
    optimum_gain: float  # the gain of the true optimum instead of the proposal's own
    shares: float
    least_share: float  # of the group whose interval is worst
    transfer: float
    least_transfer: float  # of the worst 5 % of entries (quantile)
    predicted: float  # bits per byte of languages at the proposal
    claimed: float  # how often the gain's interval excludes 0
    width: float  # median of the gain's interval
    true_gain: float  # median over simulations, of the proposals
    error: float  # median of |share - optimum|

    def row(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in asdict(self).items())


def coverage(study: Planted, simulations: int, *, bootstraps: int = 59, name: LawName = "log-linear") -> Coverage:
    problem, law, confidence = study.problem, study.law, 0.9
    optimum, transfer = propose(law, problem), transfer_matrix(law, problem.prior)
    best = won(law, problem, optimum)
    rows: dict[str, list] = {}

    def note(**found: object) -> None:
        for key, value in found.items():
            rows.setdefault(key, []).append(value)

    for simulation in range(simulations):
        runs = study.observe(np.random.default_rng([7, simulation]))
        fitted = fit(name, runs, problem.prior, problem.holds, starts=4, seed=0)
        samples = bootstrap(fitted, problem, bootstraps, confidence, simulation)
        _, low, high = gain(samples, confidence)
        true = won(law, problem, samples.proposal)
        _, share_low, share_high = estimate(samples.proposal, samples.proposals, confidence)
        entries = estimate(
            transfer_matrix(samples.fitted, problem.prior), transfer_matrix(samples.laws, problem.prior), confidence
        )
        errors = samples.laws.predict(samples.proposals) - samples.fitted.predict(samples.proposals)
        _, loss_low, loss_high = estimate_chosen(samples.fitted.predict(samples.proposal), errors, confidence)
        losses = law.predict(samples.proposal)
        note(
            gain=low <= true <= high,
            optimum_gain=low <= best <= high,
            shares=(share_low <= optimum) & (optimum <= share_high),
            transfer=(entries[1] <= transfer) & (transfer <= entries[2]),
            predicted=((loss_low <= losses) & (losses <= loss_high)).mean(),
            claimed=low > 0,
            width=high - low,
            true_gain=true,
            error=np.abs(samples.proposal - optimum).mean(),
        )
    return Coverage(
        gain=float(np.mean(rows["gain"])),
        optimum_gain=float(np.mean(rows["optimum_gain"])),
        shares=float(np.mean(rows["shares"])),
        least_share=float(np.mean(rows["shares"], axis=0).min()),
        transfer=float(np.mean(rows["transfer"])),
        least_transfer=float(np.quantile(np.mean(rows["transfer"], axis=0), 0.05)),
        predicted=float(np.mean(rows["predicted"])),
        claimed=float(np.mean(rows["claimed"])),
        width=float(np.median(rows["width"])),
        true_gain=float(np.median(rows["true_gain"])),
        error=float(np.median(rows["error"])),
    )


def won(law: Law, problem: Problem, shares: np.ndarray) -> float:
    return float(objective(law, problem, problem.prior) - objective(law, problem, shares))
