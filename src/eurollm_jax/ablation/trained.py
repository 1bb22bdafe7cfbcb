"""What a study trains, and what was measured of it: its runs in ensembles, of which each is trained once."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from eurollm_jax.ablation.prepared import PreparedStudy, ensembles
from eurollm_jax.ablation.table import Phase, Replica, write_results
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.errors import StoppedError
from eurollm_jax.evaluation.perplexity import bits_per_byte
from eurollm_jax.experiment import Experiment
from eurollm_jax.training.ensemble import Measurement, is_finished, train_ensemble
from eurollm_jax.training.ensemble_inputs import recorded_members
from eurollm_jax.training.ensemble_measurements import read_measurements

log = logging.getLogger(__name__)

COSTS: dict[Phase, str] = {"proxy": "proxies", "confirmation": "confirmation"}  # the names of their cost


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

    def _parts(
        self, folder: Path, runs: Sequence[tuple[Replica, Experiment]]
    ) -> Iterator[tuple[str, Sequence[tuple[Replica, Experiment]]]]:
        """The names and the runs of the ensembles: those that are finished, and the rest."""
        left = {replica.name: (replica, experiment) for replica, experiment in runs}
        place = {name: number for number, name in enumerate(left, 1)}
        for path in sorted(folder.glob("*/ensemble.json")):
            names = recorded_members(path.parent)
            if all(name in left for name in names) and is_finished(read_measurements(path.parent), names):
                yield path.parent.name, [left.pop(name) for name in names]
        devices = jax.local_device_count()
        for part in ensembles(list(left.values()), self.prepared.study.at_once, devices) if left else ():
            yield f"{place[part[0][0].name]:02d}-{place[part[-1][0].name]:02d}", part

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
                cost["seconds"] = (cost["seconds"] or 0.0) + time.perf_counter() - start
                write_json(self.folder / "study.json", record)

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
