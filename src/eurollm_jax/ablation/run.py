"""A study from its first run to its report, in a folder of its own: studies/NAME.

study.json          what is asked, the arms and the cost, before anything is trained
proxies/01-08/      the ensembles, each with its checkpoints, so that a study goes on where it was stopped
results.parquet     what every run measured
findings.json       the laws, the proposal with its intervals, and whether it is recommended
mixture.py          the proposal to paste; datamix.txt beside it where it is recommended
confirmation/       prior and proposal again, larger; confirmation.json says whether the prediction held
report.html
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eurollm_jax.ablation.analysis import LAWS, analyse
from eurollm_jax.ablation.confirm import Arms, verdict
from eurollm_jax.ablation.finding import Finding
from eurollm_jax.ablation.laws import Observations, parameters
from eurollm_jax.ablation.outputs import write_outputs
from eurollm_jax.ablation.prepared import PreparedStudy, ensembles, prepare, seconds_per_step, tokens_of_the_run
from eurollm_jax.ablation.proposal import Problem
from eurollm_jax.ablation.report.page import write_report
from eurollm_jax.ablation.study import Study
from eurollm_jax.ablation.table import Replica, write_results
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.loader import differences
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.experiment import Experiment, encode, environment, fingerprint, identity
from eurollm_jax.training.ensemble import Measurement, train_ensemble
from eurollm_jax.training.lock import locked

log = logging.getLogger(__name__)


def describe(study: Study, question: str, *, timed: bool = True) -> dict[str, Any]:
    """What the study will do and cost, as it will stand in study.json. With `timed`, a few steps of one ensemble are
    trained here to know how long all will take."""
    prepared = prepare(study)
    expected = None
    if timed:
        members = [experiment for _, experiment in ensembles(prepared.proxies, study.at_once)[0]]
        expected = seconds_per_step(members, prepared.inputs), len(members)
    return _described(prepared, question, expected)


def ablate(study: Study, question: str, *, time_limit: float | None = None, began: float | None = None) -> Path:
    """Runs the study, or goes on with it, and returns its folder, whose report is written.

    Raises StoppedError where a signal or the `time_limit`, in seconds from `began`, ends it before; the same call then
    goes on. Raises UserError for what the user can mend.
    """
    began = time.perf_counter() if began is None else began
    prepared = prepare(study)
    folder = _claimed(prepared, question)
    with locked(folder):
        runs = _Runs(prepared, folder, question, time_limit, began)
        proxies = prepared.proxies
        for number, part in enumerate(ensembles(proxies, study.at_once)):
            first = sum(len(before) for before in ensembles(proxies, study.at_once)[:number]) + 1
            log.info("proxies %d to %d of %d", first, first + len(part) - 1, len(proxies))
            name = f"{first:02d}-{first + len(part) - 1:02d}"
            replicas = [_replica(prepared, "proxy", arm.kind, experiment, arm.shares) for arm, experiment in part]
            runs.train("proxies", name, replicas, [experiment for _, experiment in part])
        runs.write_table()
        finding = analyse(_observed(prepared, runs), _problem(prepared), study.analysis)
        write_json(folder / "findings.json", finding.to_json())
        write_outputs(
            folder,
            prepared.space.mixture(_proposal(finding)),
            prepared.space.sizes,
            _total_rows(prepared),
            study=study.name,
            fingerprint=prepared.fingerprint,
            declined=() if finding.recommended else finding.reasons,
        )
        if study.confirmation is not None and (finding.recommended or study.confirmation.when_declined):
            _confirm(prepared, runs, finding)
            runs.write_table()
        else:
            (folder / "confirmation.json").unlink(missing_ok=True)
        write_report(folder)
    return folder


@dataclass
class _Runs:
    """What the study trains, and what was measured of it."""

    prepared: PreparedStudy
    folder: Path
    question: str
    time_limit: float | None
    began: float
    measured: list[tuple[Replica, Sequence[Measurement]]] = field(default_factory=list)

    def train(self, cost: str, name: str, replicas: Sequence[Replica], experiments: Sequence[Experiment]) -> None:
        """Trains one ensemble, and adds its time to the study's cost."""
        start = time.perf_counter()
        try:
            found = train_ensemble(
                experiments,
                self.folder / cost / name,
                question=self.question,
                time_limit=self.time_limit,
                began=self.began,
            )
        finally:
            with suppress(OSError):  # which would take the place of the error
                self._add_seconds(cost, time.perf_counter() - start)
        by_member: dict[str, list[Measurement]] = {replica.name: [] for replica in replicas}
        for one in found:
            by_member[one.member].append(one)
        self.measured += [(replica, by_member[replica.name]) for replica in replicas]

    def sound(self, phase: str) -> dict[str, np.ndarray]:
        """Final bits per byte by language of each run that did not diverge."""
        return {
            replica.name: _final(self.prepared, measured)
            for replica, measured in self.measured
            if replica.phase == phase and not any(one.diverged for one in measured)
        }

    def write_table(self) -> None:
        sources = self.prepared.inputs.heldout.store.sources
        languages = {name: source.language for name, source in sources.items()}
        write_results(
            self.folder / "results.parquet",
            self.prepared.study.name,
            self.prepared.fingerprint,
            self.measured,
            languages,
        )

    def _add_seconds(self, cost: str, seconds: float) -> None:
        record = json.loads((self.folder / "study.json").read_text())
        kind = record["cost"][cost]
        kind["seconds"] = (kind["seconds"] or 0.0) + seconds
        write_json(self.folder / "study.json", record)


def _claimed(prepared: PreparedStudy, question: str) -> Path:
    """The study's folder, made or recognised; UserError where another study has it."""
    folder, mine = prepared.study.folder, prepared.identity()
    path = folder / "study.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if differing := differences(found["identity"], json.loads(json.dumps(mine))):
            raise UserError(
                f"{folder} holds another study ({'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}): "
                "give this one another name, or move that folder away."
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no study.json: choose another name, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_described(prepared, question, None), "identity": mine})
    return folder


def _described(
    prepared: PreparedStudy, question: str, expected: tuple[tuple[float, float], int] | None
) -> dict[str, Any]:
    study, space = prepared.study, prepared.space
    costs: dict[str, Any] = {"confirmation": None}
    for name, cost in prepared.costs.items():
        costs[name] = {**cost.to_json(), "expected_seconds": None, "rate": "", "seconds": None}
    if expected is not None:
        (compiling, step), members = expected
        parts = len(ensembles(prepared.proxies, study.at_once))
        costs["proxies"]["expected_seconds"] = parts * (compiling + study.proxy.steps * step)
        costs["proxies"]["rate"] = (
            f"{members} at once, timed here: {step:.2f} s a step, {compiling:.0f} s to compile; without held-out text"
        )
    return {
        "name": study.name,
        "question": question,
        "fingerprint": prepared.fingerprint,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "study": encode(study),
        "targets": _by(space.languages, space.weights),
        "target": study.targets if isinstance(study.targets, str) else "given",
        "groups": {
            group: {"prior": prior, "lower": lower, "upper": upper, "sources": dict(within)}
            for group, prior, lower, upper, within in zip(
                space.groups,
                space.prior.tolist(),
                space.lower.tolist(),
                space.upper.tolist(),
                space.within,
                strict=True,
            )
        },
        "holds": {code: _by(space.groups, row) for code, row in zip(space.languages, space.holds, strict=True)},
        "arms": [
            {"name": arm.name, "kind": arm.kind, "seed": arm.seed, "shares": _by(space.groups, arm.shares)}
            for arm in prepared.arms
        ],
        "laws": {law: parameters(law, len(space.groups)) for law in LAWS},
        "cost": {"devices": environment()["devices"], "device_count": jax.device_count(), **costs},
        "versions": environment()["versions"],
        "code": environment()["code"],
    }


def _replica(
    prepared: PreparedStudy, phase: Any, kind: str, experiment: Experiment, shares: Sequence[float]
) -> Replica:
    return Replica(
        phase,
        experiment.name,
        kind,
        experiment.seed,
        fingerprint(identity(experiment, prepared.hashes)),
        _by(prepared.space.groups, shares),
    )


def _observed(prepared: PreparedStudy, runs: _Runs) -> Observations:
    losses = runs.sound("proxy")
    shares = {arm.name: arm.shares for arm in prepared.arms}
    if not losses:
        raise UserError(
            f"study {prepared.study.name!r}: all {len(shares)} proxies diverged: lower the proxy's learning rate."
        )
    return Observations(
        groups=prepared.space.groups,
        languages=prepared.space.languages,
        shares=np.array([shares[name] for name in losses]),
        losses=np.stack(list(losses.values())),
        names=tuple(losses),
    )


def _final(prepared: PreparedStudy, measured: Sequence[Measurement]) -> np.ndarray:
    """Bits per byte by language over all held-out text after the last step."""
    (last,) = (one for one in measured if one.complete)
    languages = prepared.inputs.heldout.languages
    return np.array(
        [
            bits_per_byte(
                sum(last.nats[source.name] for source in languages[code]),
                sum(last.bytes[source.name] for source in languages[code]),
            )
            for code in prepared.space.languages
        ]
    )


def _problem(prepared: PreparedStudy) -> Problem:
    space, study = prepared.space, prepared.study
    return Problem(
        weights=space.weights,
        prior=space.prior,
        lower=space.lower,
        upper=space.upper,
        kl=study.analysis.kl,
        holds=space.holds,
        baselines=space.baselines(tokens_of_the_run(prepared.study)),
    )


def _proposal(finding: Finding) -> list[float]:
    return [share.value for share in finding.proposal.values()]


def _confirm(prepared: PreparedStudy, runs: _Runs, finding: Finding) -> None:
    """Trains prior, proposal and what else is asked for at the larger size, and says whether the prediction held."""
    confirmation, space = prepared.study.confirmation, prepared.space
    assert confirmation is not None
    tokens = tokens_of_the_run(prepared.study)
    arms: dict[str, Sequence[float]] = {
        "prior": space.prior.tolist(),
        "proposal": _proposal(finding),
        **{name: space.baseline(name, tokens).tolist() for name in confirmation.baselines},
    }
    experiments, replicas = [], []
    for name, shares in arms.items():
        for experiment in prepared.confirming(name, shares):
            experiments.append(experiment)
            replicas.append(_replica(prepared, "confirmation", name, experiment, shares))
    of_arms = fingerprint({name: list(shares) for name, shares in arms.items()})[:8]
    pairs = list(zip(replicas, experiments, strict=True))
    for number, part in enumerate(ensembles(pairs, prepared.study.at_once), 1):
        log.info("confirmation: %d of %d runs", len(part), len(pairs))
        runs.train("confirmation", f"{of_arms}-{number}", *map(list, zip(*part, strict=True)))
    losses = runs.sound("confirmation")
    names = {arm: [experiment.name for experiment in prepared.confirming(arm, arms[arm])] for arm in arms}
    whole = [seed for seed in range(confirmation.seeds) if all(of_arm[seed] in losses for of_arm in names.values())]
    if not whole:
        raise UserError(
            f"study {prepared.study.name!r}: in every seed of the confirmation a run diverged: lower its learning rate."
        )
    table = {arm: np.stack([losses[of_arm[seed]] for seed in whole]) for arm, of_arm in names.items()}
    foretold = (finding.gain.value, finding.gain.low, finding.gain.high)
    said = verdict(Arms(space.languages, space.weights, table), foretold, prepared.study.analysis.confidence)
    diverged = {
        replica.name: next(one.diverged for one in measured if one.diverged)
        for replica, measured in runs.measured
        if replica.phase == "confirmation" and replica.name not in losses
    }
    told = {"shares": {name: _by(space.groups, shares) for name, shares in arms.items()}, "diverged": diverged}
    write_json(runs.folder / "confirmation.json", {**said, **told})


def _total_rows(prepared: PreparedStudy) -> int:
    confirmation = prepared.study.confirmation
    return (prepared.study.proxy if confirmation is None else confirmation.experiment).total_rows


def _by(names: Sequence[str], values: Any) -> Mapping[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
