"""Study: what is asked about a mixture, and with what means. Inputs only; what follows is in the files beside.

A study moves the shares of a few groups of sources and leaves the shares within each group as its prior has them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.recipe import Level
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment

Target = Literal["uniform", "official"]
LAWS = ("auto", "log-linear", "power")


@dataclass(frozen=True)
class Design:
    """Which mixtures are tried. All draws follow from `seed`."""

    draws: int = 24  # from Dirichlet distributions around the prior
    concentrations: tuple[float, float] = (1.0, 20.0)  # of these; low ones reach far from the prior
    zeroed: float = 0.25  # share of the draws in which some groups are left out
    candidates: int = 16  # drawn for each one kept: those that are kept fill the space of shares
    prior_runs: int = 3  # of the prior, each with another seed: what differs among them is noise
    leave_one_out: bool = False  # also the prior without each group
    one_at_a_time: float | None = None  # also the prior with each group's share times this factor, such as 2
    listed: tuple[Mapping[str, float], ...] = ()  # and shares by group, each summing to 1
    seed: int = 0


@dataclass(frozen=True)
class Constraints:
    """What every mixture tried, and the one proposed, must keep. Shares are of tokens, by group."""

    max_epochs: float | None = None  # of any source, in a run of `tokens`
    tokens: int | None = None  # of the run that the mixture is for; default: of the confirmation, or of a proxy
    floors: Mapping[str, float] = field(default_factory=dict)  # at least
    ceilings: Mapping[str, float] = field(default_factory=dict)  # at most
    fixed: Mapping[str, float] = field(default_factory=dict)  # exactly


@dataclass(frozen=True)
class Analysis:
    """How the law is fitted, and when a study declines to recommend."""

    law: Literal["auto", "log-linear", "power"] = "auto"  # auto: whichever predicts left-out runs better
    kl: float = 0.01  # bits per byte that a nat of Kullback-Leibler divergence from the prior must win
    bootstraps: int = 200  # of the runs
    confidence: float = 0.9  # of every interval
    min_rho: float = 0.8  # Spearman's, of what was predicted for runs that were left out
    folds: int = 5  # of the runs, each left out once to be predicted
    starts: int = 8  # of each fit
    seed: int = 0

    def __post_init__(self) -> None:
        _check(0 < self.confidence < 1, f"analysis: confidence={self.confidence} must lie between 0 and 1, such as 0.9")
        _check(-1 <= self.min_rho <= 1, f"analysis: min_rho={self.min_rho} must lie between -1 and 1")
        _check(math.isfinite(self.kl) and self.kl >= 0, f"analysis: kl={self.kl} must be 0 or more")
        _check(self.law in LAWS, f"analysis: law={self.law!r} must be one of {', '.join(LAWS)}")
        for name, least in (("bootstraps", 10), ("folds", 2), ("starts", 1), ("seed", 0)):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= least, f"analysis: {name}={value} must be {least} or more")


@dataclass(frozen=True)
class Confirmation:
    """Prior and proposal, trained again at another size."""

    experiment: Experiment  # its mixture is replaced; its seeds, of weights and of data, are the first pair's
    seeds: int = 3  # pairs
    baselines: tuple[str, ...] = ()  # trained beside them, such as "UniMax"
    when_declined: bool = False  # also where the study does not recommend its proposal

    def __post_init__(self) -> None:
        _check(self.seeds >= 1, f"confirmation: seeds={self.seeds} must be 1 or more, and 2 for an interval")
        names = ("prior", "proposal", *self.baselines)
        twice = next((name for name in names if names.count(name) > 1), None)
        _check(twice is None, f"confirmation: {twice!r} is trained once: prior and proposal always are")


@dataclass(frozen=True)
class Study:
    """The proxies differ from `proxy` in mixture, seed and name alone."""

    name: str
    proxy: Experiment
    groups: Level | Mapping[str, tuple[str, ...]]  # a level, or names of sources, languages and families by group
    prior: Mixture | None = None  # default: the proxy's mixture
    design: Design = Design()
    targets: Target | Mapping[str, float] = "uniform"  # weights over held-out languages, by code
    constraints: Constraints = field(default_factory=Constraints)
    analysis: Analysis = field(default_factory=Analysis)
    confirmation: Confirmation | None = None
    budget: float | None = None  # FLOP of all proxies and the confirmation; a study beyond it is refused
    at_once: int = 8  # proxies that are trained in one program; 1: one after the other
    studies: str = "studies"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            raise UserError(f"study {self.name!r}: the name becomes a folder; use letters, digits, . _ and -.")
        whole = isinstance(self.at_once, int) and self.at_once >= 1
        _check(whole, f"study {self.name!r}: at_once={self.at_once} must be a whole number, 1 or more")
        affordable = self.budget is None or (math.isfinite(self.budget) and self.budget > 0)
        _check(affordable, f"study {self.name!r}: budget={self.budget} must be above 0 (FLOP), or None")

    @property
    def folder(self) -> Path:
        return Path(self.studies) / self.name


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"{message}.")
