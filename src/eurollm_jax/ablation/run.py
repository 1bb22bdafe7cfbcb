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
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
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
from eurollm_jax.ablation.table import Phase, Replica
from eurollm_jax.ablation.trained import Share, Trained
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.data.loader import differences
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode, environment, fingerprint
from eurollm_jax.training.lock import locked

log = logging.getLogger(__name__)


def describe(study: Study, question: str, *, timed: bool = True) -> dict[str, Any]:
    """What the study will do and cost, as it will stand in study.json. With `timed`, a few steps of one ensemble are
    trained here to know how long all will take."""
    prepared = prepare(study)
    return _described(prepared, question, _expected(prepared) if timed else {})


def ablate(study: Study, question: str, *, time_limit: float | None = None, began: float | None = None) -> Path:
    """Runs the study, or goes on with it, and returns its folder, whose report is written.

    Raises StoppedError where a signal or the `time_limit`, in seconds from `began`, ends it before; the same call then
    goes on. Raises UserError for what the user can mend.
    """
    began = time.perf_counter() if began is None else began
    prepared = prepare(study)
    folder = _folder(study)
    with locked(folder):
        _claim(prepared, question)
        runs = Trained(prepared, folder, question, time_limit, began)
        runs.train("proxy", "proxies", _proxies(prepared))
        runs.require_time()
        finding = _found(prepared, runs)
        write_outputs(
            folder,
            prepared.space.mixture(_proposal(finding)),
            prepared.space.sizes,
            _total_rows(prepared),
            study=study.name,
            fingerprint=prepared.fingerprint,
            declined=() if finding.recommended else finding.reasons,
        )
        failed = None
        if study.confirmation is not None and (finding.recommended or study.confirmation.when_declined):
            failed = _confirm(prepared, runs, finding)
        else:
            (folder / "confirmation.json").unlink(missing_ok=True)
        write_report(folder)
    if failed:
        raise UserError(failed)
    return folder


def train_share(
    study: Study, question: str, share: Share, *, time_limit: float | None = None, began: float | None = None
) -> int:
    """Trains a share of the study's proxies, while others do so with theirs, and returns how many ensembles that is.
    Once all shares are trained, `ablate` makes of them what it makes of its own. Raises as `ablate` does."""
    began = time.perf_counter() if began is None else began
    prepared = prepare(study)
    folder = _folder(study)
    _claim(prepared, question, alone=False)
    return Trained(prepared, folder, question, time_limit, began).train_share(share, "proxies", _proxies(prepared))


def _folder(study: Study) -> Path:
    """The study's, which is there now; UserError where it is something else's."""
    folder = study.folder
    ours = (folder / "study.json").exists() or (folder / "proxies").exists()
    if not ours and folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no study.json: choose another name, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _proxies(prepared: PreparedStudy) -> list[tuple[Replica, Experiment]]:
    return [(_told(prepared, "proxy", arm.kind, arm.shares, run), run) for arm, run in prepared.proxies]


def _claim(prepared: PreparedStudy, question: str, *, alone: bool = True) -> None:
    """Writes study.json, or brings it up to date; UserError where the folder has another study's proxies.

    More draws, another analysis and another confirmation are welcome: what is trained stays. Where others may do the
    same, a study.json that is there is left as it is.
    """
    folder, mine = prepared.study.folder, json.loads(json.dumps(prepared.identity()))
    path = folder / "study.json"
    described = {**_described(prepared, question, {}), "identity": mine}
    if not path.is_file():
        own = path if alone else path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        write_json(own, described)
        own.replace(path)
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        theirs, cost = recorded["identity"], recorded["cost"]
        described["created"] = recorded["created"]
        for kind in ("proxies", "confirmation"):
            if described["cost"][kind] is not None and cost[kind] is not None:
                described["cost"][kind]["seconds"] = cost[kind]["seconds"]
        same_arms = {name: mine["arms"].get(name) for name in theirs["arms"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{path} is damaged: remove that one file, and the same command makes it again and goes on with what is "
            "trained."
        ) from None
    rest = {name: value for name, value in mine.items() if name != "arms"}
    if differing := differences({**theirs, "arms": None}, {**rest, "arms": None}) or differences(
        theirs["arms"], same_arms, "arms"
    ):
        raise UserError(
            f"{folder} holds another study ({'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}): "
            "give this one another name, or move that folder away."
        )
    if alone:
        write_json(path, described)


def _expected(prepared: PreparedStudy) -> dict[str, tuple[float, str]]:
    """Seconds that each phase will take, and how that is known."""
    phases = {"proxies": (prepared.inputs, [experiment for _, experiment in prepared.proxies])}
    if prepared.larger is not None:
        seeds = prepared.confirming("prior", prepared.space.prior.tolist())
        phases["confirmation"] = prepared.larger, seeds * (prepared.costs["confirmation"].runs // len(seeds))
    found = {}
    for name, (inputs, experiments) in phases.items():
        parts = ensembles(experiments, prepared.study.at_once, jax.local_device_count())
        compiling, step = seconds_per_step(parts[0], inputs)
        found[name] = (
            len(parts) * (compiling + experiments[0].steps * step),
            f"{len(parts[0])} at once, timed here: {step:.2f} s a step, {compiling:.0f} s to compile; without held-out "
            "text",
        )
    return found


def _described(prepared: PreparedStudy, question: str, expected: Mapping[str, tuple[float, str]]) -> dict[str, Any]:
    study, space = prepared.study, prepared.space
    costs: dict[str, Any] = {"confirmation": None}
    for name, cost in prepared.costs.items():
        seconds, rate = expected.get(name, (None, ""))
        costs[name] = {**cost.to_json(), "expected_seconds": seconds, "rate": rate, "seconds": None}
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


def _told(prepared: PreparedStudy, phase: Phase, kind: str, shares: Sequence[float], run: Experiment) -> Replica:
    """What the table says of a run."""
    by_group = _by(prepared.space.groups, shares)
    return Replica(phase, run.name, kind, run.seed, prepared.fingerprint_of(phase, run), by_group)


def _observed(prepared: PreparedStudy, runs: Trained) -> Observations:
    losses = runs.final("proxy")
    shares = {arm.name: arm.shares for arm in prepared.arms}
    if not losses:
        raise UserError(
            f"study {prepared.study.name!r}: all {len(shares)} proxies diverged: lower the proxy's learning rate."
        )
    if missing := len(shares) - len(losses):
        log.warning("%d OF %d PROXIES HAVE DIVERGED and are left out of all that follows", missing, len(shares))
    return Observations(
        groups=prepared.space.groups,
        languages=prepared.space.languages,
        shares=np.array([shares[name] for name in losses]),
        losses=np.stack(list(losses.values())),
        names=tuple(losses),
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


def _found(prepared: PreparedStudy, runs: Trained) -> Finding:
    """What the proxies show. What was found of the same stays, though another machine would find other last digits: a
    confirmation may have begun with its proposal."""
    path = runs.folder / "findings.json"
    observed, problem, settings = _observed(prepared, runs), _problem(prepared), prepared.study.analysis
    made_of = fingerprint({"observed": _lists(observed), "problem": _lists(problem), "analysis": encode(settings)})
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it is missing or damaged: made again
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["made_of"] == made_of:
            return Finding.from_json(found)
    finding = analyse(observed, problem, settings)
    write_json(path, {**finding.to_json(), "made_of": made_of})
    return finding


def _lists(value: Any) -> dict[str, Any]:
    """The fields of a dataclass of arrays and mappings of arrays, as JSON-able values."""

    def plain(field: Any) -> Any:
        if isinstance(field, Mapping):
            return {name: plain(part) for name, part in field.items()}
        return field.tolist() if isinstance(field, np.ndarray) else field

    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def _proposal(finding: Finding) -> list[float]:
    return [share.value for share in finding.proposal.values()]


def _confirm(prepared: PreparedStudy, runs: Trained, finding: Finding) -> str:
    """Trains prior, proposal and what else is asked for at the larger size, and says whether the prediction held; what
    went wrong, if it did."""
    confirmation, space = prepared.study.confirmation, prepared.space
    assert confirmation is not None
    tokens = tokens_of_the_run(prepared.study)
    arms: dict[str, Sequence[float]] = {
        "prior": space.prior.tolist(),
        "proposal": _proposal(finding),
        **{name: space.baseline(name, tokens).tolist() for name in confirmation.baselines},
    }
    members = {name: prepared.confirming(name, shares) for name, shares in arms.items()}
    of_pair = [prepared.fingerprint_of("confirmation", members[name][0]) for name in ("prior", "proposal")]
    runs.train(
        "confirmation",
        # What another proposal has begun stays beside it; so does what was trained when all pairs read one order.
        f"confirmation/{fingerprint({'pair': of_pair, 'order': 'of each seed'})[:8]}",
        [
            (_told(prepared, "confirmation", name, shares, run), run)
            for name, shares in arms.items()
            for run in members[name]
        ],
    )
    final = runs.final("confirmation")
    losses = {
        arm: {one.seed: final[one.name] for one in of_arm if one.name in final} for arm, of_arm in members.items()
    }
    path = runs.folder / "confirmation.json"
    if not losses["prior"].keys() & losses["proposal"].keys():
        path.unlink(missing_ok=True)
        return (
            f"study {prepared.study.name!r}: in every seed of the confirmation the prior's run or the proposal's "
            "diverged, so nothing is confirmed: lower the rate of its experiment, and the same command trains it again."
        )
    foretold = (finding.gain.value, finding.gain.low, finding.gain.high)
    said = verdict(Arms(space.languages, space.weights, losses), foretold, prepared.study.analysis.confidence)
    told = {
        "shares": {name: _by(space.groups, shares) for name, shares in arms.items()},
        "diverged": runs.diverged("confirmation"),
    }
    write_json(path, {**said, **told})
    return ""


def _total_rows(prepared: PreparedStudy) -> int:
    confirmation = prepared.study.confirmation
    return (prepared.study.proxy if confirmation is None else confirmation.experiment).total_rows


def _by(names: Sequence[str], values: Any) -> Mapping[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
