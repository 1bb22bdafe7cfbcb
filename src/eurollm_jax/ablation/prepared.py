"""A study opened: its inputs checked, its space and arms laid out, and the runs that it will train, with their cost."""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from eurollm_jax.ablation.design import Arm, arms, require_feasible
from eurollm_jax.ablation.laws import choose_law
from eurollm_jax.ablation.space import Space, open_space
from eurollm_jax.ablation.study import Confirmation, Study
from eurollm_jax.ablation.table import Phase
from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode, fingerprint, identity
from eurollm_jax.model.param import count
from eurollm_jax.model.transformer import flops_per_token, specs
from eurollm_jax.training.ensemble_inputs import require_alike
from eurollm_jax.training.ensemble_step import build_ensemble, layout_of
from eurollm_jax.training.inputs import Inputs, open_inputs


@dataclass(frozen=True)
class Cost:
    """What training takes, before it is trained. Held-out text is read besides."""

    runs: int
    parameters: int
    tokens: int  # of all runs
    flops: float

    @classmethod
    def of(cls, experiment: Experiment, runs: int) -> "Cost":
        length = experiment.data.sequence_length
        tokens = runs * experiment.total_rows * length
        flops = tokens * flops_per_token(experiment.model, length)
        return cls(runs, count(specs(experiment.model)), tokens, flops)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PreparedStudy:
    """All that follows from a study and its stores before anything is trained."""

    study: Study
    inputs: Inputs
    larger: Inputs | None  # of the confirmation, if there is one
    space: Space
    arms: tuple[Arm, ...]
    costs: dict[str, Cost]  # "proxies", and "confirmation" where there is one

    @property
    def proxies(self) -> list[tuple[Arm, Experiment]]:
        """Each arm with the run that tries it."""
        proxy = self.study.proxy
        return [(arm, self._member(proxy, arm.name, arm.shares, proxy.seed + arm.seed)) for arm in self.arms]

    def confirming(self, name: str, shares: Sequence[float]) -> list[Experiment]:
        """The larger runs of one mixture, each with a seed of its initial weights and one of the order of its data."""
        confirmation = self.study.confirmation
        assert confirmation is not None
        larger = confirmation.experiment
        plain = name.replace(" ", "-")
        found = []
        for number in range(confirmation.seeds):
            ordered = replace(larger, data=replace(larger.data, seed=larger.data.seed + number))
            seed = larger.seed + number
            found.append(self._member(ordered, f"{plain}-seed-{seed}", shares, seed))
        return found

    def _member(self, experiment: Experiment, name: str, shares: Sequence[float], seed: int) -> Experiment:
        return _with(experiment, self.space, name, shares, seed)

    def fingerprint_of(self, phase: Phase, experiment: Experiment) -> str:
        """What the run would have in its experiment.json, were it trained alone."""
        return fingerprint(identity(experiment, _hashes(self.inputs if phase == "proxy" else self.larger)))

    def identity(self) -> dict[str, Any]:
        """All that decides what the proxies learn, as JSON-able values. What is made of them may change."""
        groups = zip(self.space.groups, self.space.within, strict=True)
        return {
            "name": self.study.name,
            "proxy": identity(self.study.proxy, _hashes(self.inputs)),
            "groups": [[group, sorted(within)] for group, within in groups],
            "arms": {arm.name: {"seed": arm.seed, "shares": list(arm.shares)} for arm in self.arms},
        }

    @property
    def fingerprint(self) -> str:
        """Of all that the study is, its analysis and its confirmation among it."""
        study, larger = self.study, self.study.confirmation
        asked = {name: encode(getattr(study, name)) for name in ("targets", "constraints", "analysis", "confirmation")}
        hashes = None if larger is None else identity(larger.experiment, _hashes(self.larger))
        return fingerprint({**self.identity(), **asked, "larger": hashes})


def prepare(study: Study) -> PreparedStudy:
    """Raises UserError for whatever of the study cannot be done as it is written, its budget among it."""
    proxy = study.proxy
    if study.prior is not None:
        proxy = replace(proxy, data=replace(proxy.data, mixture=study.prior))
        study = replace(study, proxy=proxy)
    inputs = open_inputs(proxy)
    proxy.schedule.build(proxy.steps)
    require_alike([proxy])
    space = open_space(study, inputs.data, inputs.heldout)
    found = tuple(arms(study.design, space))
    require_feasible(space, found, proxy.total_rows)
    choose_law(study.analysis.law, len(found), len(space.groups))  # refuses too few runs before any is trained
    costs = {"proxies": Cost.of(proxy, len(found))}
    larger = None
    if study.confirmation is not None:
        larger = _opened(study, study.confirmation, inputs, space)
        mixtures = 2 + len(study.confirmation.baselines)
        costs["confirmation"] = Cost.of(study.confirmation.experiment, mixtures * study.confirmation.seeds)
    total = math.fsum(cost.flops for cost in costs.values())
    if study.budget is not None and total > study.budget:
        raise UserError(
            f"study {study.name!r} takes {total:.3g} FLOP, and its budget is {study.budget:.3g}: take fewer draws or "
            "steps, or a larger budget."
        )
    return PreparedStudy(study, inputs, larger, space, found, costs)


def _opened(study: Study, confirmation: Confirmation, inputs: Inputs, space: Space) -> Inputs:
    """What the confirmation's experiment names, with the prior as its mixture. Raises UserError where it could not be
    trained, or could not be compared with the proxies."""
    larger = _with(confirmation.experiment, space, "prior", space.prior.tolist(), confirmation.experiment.seed)
    require_alike([larger])
    larger.schedule.build(larger.steps)
    opened = open_inputs(larger)
    mine, theirs = _hashes(opened), _hashes(inputs)
    if differing := [name for name in ("tokenizer", "heldout") if mine[name] != theirs[name]]:
        raise UserError(
            f"study {study.name!r}: the confirmation has another {' and '.join(differing)} than the proxies, and bits "
            "per byte could not be compared: take both from the proxy experiment."
        )
    for name in confirmation.baselines:
        space.baseline(name, tokens_of_the_run(study))  # refuses one that is not there
    return opened


def _with(experiment: Experiment, space: Space, name: str, shares: Sequence[float], seed: int) -> Experiment:
    """The experiment with shares of the study's groups as its mixture."""
    return replace(experiment, name=name, data=replace(experiment.data, mixture=space.mixture(shares)), seed=seed)


def _hashes(inputs: Inputs | None) -> dict[str, str]:
    """Of what an experiment's paths point to."""
    assert inputs is not None
    heldout = inputs.heldout.store.fingerprint
    return {"tokenizer": inputs.tokenizer.sha256, "store": inputs.data.fingerprint, "heldout": heldout}


def tokens_of_the_run(study: Study) -> int:
    """Of the run that the mixture is for."""
    if study.constraints.tokens is not None:
        return study.constraints.tokens
    return Cost.of(study.proxy if study.confirmation is None else study.confirmation.experiment, 1).tokens


def ensembles[T](runs: Sequence[T], at_once: int, devices: int = 1) -> list[tuple[T, ...]]:
    """The runs in parts of at most `at_once`, as equal in size as can be: a part of another size is another program.
    Where `at_once` allows it, all parts but the last fill the devices."""
    unit = devices if at_once >= devices else 1
    units, at_most = -(-len(runs) // unit), at_once // unit
    parts = -(-units // at_most)
    sizes = [unit * (units // parts + (part < units % parts)) for part in range(parts)]
    stops = [0, *itertools.accumulate(sizes)]
    return [tuple(runs[start:stop]) for start, stop in itertools.pairwise(stops)]


def seconds_per_step(experiments: Sequence[Experiment], inputs: Inputs, steps: int = 3) -> tuple[float, float]:
    """(compiling, a step) in seconds of an ensemble of these on this machine, found by training a few steps of it on
    zeros, which are forgotten."""
    first = experiments[0]
    members = len(experiments)
    program = build_ensemble(
        first.model,
        layout_of(members, jax.devices()),
        first.optimizer,
        [experiment.schedule for experiment in experiments],
        steps=first.steps,
        token_bytes=inputs.tokenizer.piece_bytes,
        sources=len(inputs.data.source_names),
        heldout_sources=1,
        z_loss=first.z_loss,
        ema=first.ema,
        skip=first.skip,
    )
    rows, length = first.batch_size, first.data.sequence_length
    start = time.perf_counter()
    train = program.compile_train(rows, length)
    compiling = time.perf_counter() - start
    tokens = np.ones((members, rows, length), np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    source = np.zeros((members, rows), np.int32)
    batch = program.place(Batch(tokens, tokens, tokens, places, tokens > 0, source))
    state = program.init(program.place(jax.random.split(jax.random.key(0), members)))
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = train(state, batch)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - start)
    return compiling, min(taken)
