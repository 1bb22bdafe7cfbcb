"""Slurm's commands as a user types them: submit a script, see which jobs of it are there, follow their logs."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from eurollm_jax.cluster.launch.job import Job
from eurollm_jax.errors import UserError

FOLLOW_SECONDS = 5.0  # between two looks at a log; the scheduler is asked at every sixth
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # of the variables of a job that launches another one


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs."""

    id: str  # of an array, that of the whole
    state: str
    script: str  # as sbatch was given it


def submit(job: Job, after: str | None = None) -> str:
    """Hands the script, which is written, to sbatch and returns the job's number; it starts once the job `after` has
    ended well, all tasks of it. Raises UserError with what sbatch says where it refuses."""
    options = ["--parsable"]
    if after is not None:
        options += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return _said_by("sbatch", *options, str(job.script)).strip().partition(";")[0]


def queued() -> list[Queued]:
    """The user's jobs that wait or run."""
    lines = _said_by("squeue", "--noheader", "--me", "--format=%F|%T|%o").splitlines()
    return list(dict.fromkeys(Queued(*line.strip().split("|", 2)) for line in lines if line.count("|") >= 2))


def _said_by(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in KEPT}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} here: launch from a login node of the site, or add --dry-run for the script."
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise UserError(f"{command[0]} refuses ({said}): mend that, or add --dry-run and look at the script.")
    return done.stdout


def follow(jobs: Sequence[tuple[str, Job]], out: TextIO | None = None) -> int:
    """Copies to `out`, by default standard output, what is added to the logs of the jobs (number, job) until none of
    them waits or runs, also where they are queued again in between. Returns the status that the processes of the last
    one ended with, or 1 where they have not."""
    log = _Logs(jobs, sys.stdout if out is None else out)
    looks, states = 0, ""
    while True:
        log.copy()
        if looks % 6 == 0:
            there = _states([number for number, _ in jobs])
            if there is not None and (said := ", ".join(f"job {number}: {state}" for number, state in there)) != states:
                states = said
                print(said or "no job is left", file=sys.stderr)
            if there == []:
                break
        looks += 1
        time.sleep(FOLLOW_SECONDS)
    log.copy()
    number, last = jobs[-1]
    try:
        return int((last.logs / f"{number}.status").read_text())
    except (FileNotFoundError, ValueError):
        print(f"job {number} has ended before its processes did: scontrol show job {number} says why", file=sys.stderr)
        return 1


def _states(numbers: Sequence[str]) -> list[tuple[str, str]] | None:
    """(number, state) of those that wait or run; None where the scheduler does not answer just now."""
    try:
        return [(one.id, one.state) for one in queued() if one.id in numbers]
    except UserError:
        return None


class _Logs:
    """The logs of jobs, each read on from where it was."""

    def __init__(self, jobs: Sequence[tuple[str, Job]], out: TextIO) -> None:
        self._jobs, self._out = jobs, out
        self._read: dict[Path, int] = {}
        self._shown: Path | None = None

    def copy(self) -> None:
        for number, job in self._jobs:
            for path in sorted((*job.logs.glob(f"{number}.out"), *job.logs.glob(f"{number}_*.out"))):
                self._copy(path)
        self._out.flush()

    def _copy(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            new = file.read()
        self._read[path] = self._read.get(path, 0) + len(new)
        if new:
            if self._shown not in (None, path):
                self._out.write(f"==> {path.name} <==\n")
            self._shown = path
            self._out.write(new.decode(errors="replace"))
