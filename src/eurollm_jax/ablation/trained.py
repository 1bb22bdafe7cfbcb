"""What a study trains, and what was measured of it: its runs in ensembles, of which each is trained once."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation.prepared import PreparedStudy, ensembles
from eurollm_jax.ablation.table import Phase, Replica, write_results
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.experiment import Experiment
from eurollm_jax.training.ensemble import Measurement, is_finished, train_ensemble
from eurollm_jax.training.ensemble_inputs import recorded_members
from eurollm_jax.training.ensemble_measurements import read_measurements

log = logging.getLogger(__name__)

COSTS: dict[Phase, str] = {"proxy": "proxies", "confirmation": "confirmation"}  # the names of their cost
SECONDS = "seconds"  # the file in an ensemble's folder that says how long a share of a study has trained it


@dataclass(frozen=True)
class Share:
    """The ensembles whose number, from 0, leaves `index` when it is divided by `of`: what one of several jobs does."""

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise UserError(f"--ensembles {self.index}/{self.of}: there is none: of {self.of} the first is 0.")

    @classmethod
    def parse(cls, text: str) -> "Share":
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal()):
            raise UserError(f"--ensembles {text}: write it as 0/8, the first of eight.")
        return cls(int(index), int(of))


@dataclass
class Trained:
    """The runs of a study in its folder."""

    prepared: PreparedStudy
    folder: Path
    question: str
    time_limit: float | None  # seconds from `began`
    began: float  # of time.perf_counter()
    measured: list[tuple[Replica, Sequence[Measurement]]] = field(default_factory=list)

    def train(self, phase: Phase, folder: str, runs: Sequence[tuple[Replica, Experiment]]) -> None:
        """Trains what is not trained yet of a phase in the study's `folder`, as many at once as the study says.

        Ensembles that were finished are kept, also where as many are no longer trained at once. The table is written
        after each. Raises StoppedError as `train_ensemble` does.
        """
        before, found = list(self.measured), {replica.name: list[Measurement]() for replica, _ in runs}
        if len(found) < len(runs):
            raise ValueError("two runs of a phase have one name")
        for name, part in self._parts(self.folder / folder, runs):
            log.info("%s: %d of %d runs", folder, len(part), len(runs))
            for one in self._train(phase, self.folder / folder / name, [experiment for _, experiment in part]):
                found[one.member].append(one)
            self.measured = before + [(replica, found[replica.name]) for replica, _ in runs if found[replica.name]]
            self.write_table()

    def train_share(self, share: Share, folder: str, runs: Sequence[tuple[Replica, Experiment]]) -> int:
        """Trains the share's ensembles of a phase, and returns how many these are. What their numbers are does not
        depend on which are trained already, for several jobs train at once; of what all share nothing is written."""
        members = {replica.name: experiment for replica, experiment in runs}
        places = {name: number for number, name in enumerate(members, 1)}
        trained = {name for _, names in _finished(self.folder / folder, dict(members)) for name in names}
        parts = ensembles(list(members), self.prepared.study.at_once, jax.local_device_count())
        mine = parts[share.index :: share.of]
        for part in mine:
            if not (left := [name for name in part if name not in trained]):
                continue
            path = self.folder / folder / _named(places[left[0]], places[left[-1]])
            log.info("%s: %d of %d runs", path, len(left), len(runs))
            self.require_time()
            start = time.perf_counter()
            try:
                train_ensemble(
                    [members[name] for name in left],
                    path,
                    question=self.question,
                    time_limit=self.time_limit,
                    began=self.began,
                )
            finally:
                with suppress(OSError):  # which would take the place of the error
                    (path / SECONDS).write_text(str(_seconds(path) + time.perf_counter() - start))
        return len(mine)

    def _parts(
        self, folder: Path, runs: Sequence[tuple[Replica, Experiment]]
    ) -> Iterator[tuple[str, Sequence[tuple[Replica, Experiment]]]]:
        """The names and the runs of the ensembles: those that are finished, and the rest."""
        left = {replica.name: (replica, experiment) for replica, experiment in runs}
        place = {name: number for number, name in enumerate(left, 1)}
        for finished, names in _finished(folder, left):
            yield finished, [left.pop(name) for name in names]
        devices = jax.local_device_count()
        for part in ensembles(list(left.values()), self.prepared.study.at_once, devices) if left else ():
            yield _named(place[part[0][0].name], place[part[-1][0].name]), part

    def _train(self, phase: Phase, folder: Path, experiments: Sequence[Experiment]) -> list[Measurement]:
        """Trains one ensemble, and adds its time to the study's cost."""
        self.require_time()
        start = time.perf_counter()
        try:
            return train_ensemble(
                experiments, folder, question=self.question, time_limit=self.time_limit, began=self.began
            )
        finally:
            with suppress(OSError, ValueError, LookupError, TypeError):  # which would take the place of the error
                record = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
                cost = record["cost"][COSTS[phase]]
                cost["seconds"] = (cost["seconds"] or 0.0) + _seconds(folder) + time.perf_counter() - start
                write_json(self.folder / "study.json", record)
                (folder / SECONDS).unlink(missing_ok=True)

    def require_time(self) -> None:
        """Raises StoppedError where the time limit has come."""
        if self.time_limit is not None and time.perf_counter() - self.began > self.time_limit:
            raise StoppedError(
                f"stopped by the time limit; all is saved in {self.folder}, and the same command goes on."
            )

    def final(self, phase: Phase) -> dict[str, Float[np.ndarray, "L"]]:
        """Bits per byte by language, over all held-out text after the last step, of each run that did not diverge."""
        return {
            replica.name: self._final(measured)
            for replica, measured in self.measured
            if replica.phase == phase and not any(one.diverged for one in measured)
        }

    def diverged(self, phase: Phase) -> dict[str, str]:
        """Why, of each run that did."""
        return {
            replica.name: next(one.diverged for one in measured if one.diverged)
            for replica, measured in self.measured
            if replica.phase == phase and any(one.diverged for one in measured)
        }

    def _final(self, measured: Sequence[Measurement]) -> Float[np.ndarray, "L"]:
        (last,) = (one for one in measured if one.complete)
        by_language = self.prepared.inputs.heldout.languages
        sources = [[source.name for source in by_language[code]] for code in self.prepared.space.languages]
        sums = [(sum(last.nats[name] for name in names), sum(last.bytes[name] for name in names)) for names in sources]
        return np.array([bits_per_byte(nats, byte_count) for nats, byte_count in sums])

    def write_table(self) -> None:
        sources = self.prepared.inputs.heldout.store.sources
        write_results(
            self.folder / "results.parquet",
            self.prepared.study.name,
            self.prepared.fingerprint,
            self.measured,
            {name: source.language for name, source in sources.items()},
        )


def _named(first: int, last: int) -> str:
    """The folder of the ensemble of runs with these numbers."""
    return f"{first:02d}-{last:02d}"


def _finished(folder: Path, left: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The names of the ensembles that are trained, and of their members, as long as all of these are `left`."""
    for path in sorted(folder.glob("*/ensemble.json")):
        names = recorded_members(path.parent)
        if all(name in left for name in names) and is_finished(read_measurements(path.parent), names):
            yield path.parent.name, names


def _seconds(folder: Path) -> float:
    """That shares of the study have trained an ensemble and no cost holds yet."""
    with suppress(OSError, ValueError):
        return float((folder / SECONDS).read_text())
    return 0.0
