"""The fake scheduler as a test has it: commands on PATH, jobs to look at, and nothing that is left running."""

import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.cluster.fake_slurm import slurm

LIMIT = 180.0  # seconds that any wait may take


class Cluster:
    """`with Cluster(folder, monkeypatch) as cluster:`"""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        programs, self._state = folder / "bin", folder / "state"
        programs.mkdir(parents=True)
        self._state.mkdir()
        for name in slurm.COMMANDS:
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {slurm.__file__} {name} "$@"\n')
            program.chmod(0o755)
        (self._state / "first").write_text(str(_number_of_a_free_port()))
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(self._state))
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            monkeypatch.delenv(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs():
            if job["state"] in slurm.LIVE:
                (self._state / f"{job['number']}.cancel").touch()
        self.until(lambda: all(job["state"] not in slurm.LIVE for job in self.jobs()))

    def jobs(self) -> list[dict[str, Any]]:
        return slurm.Jobs().all()

    def until(self, reached: Callable[[], object], limit: float = LIMIT) -> None:
        end = time.monotonic() + limit
        while not reached():
            assert time.monotonic() < end, f"not within {limit:g} s: {self.jobs()}"
            time.sleep(0.02)

    def ended(self) -> list[dict[str, Any]]:
        """All jobs, once none is left."""
        self.until(lambda: all(job["state"] not in slurm.LIVE for job in self.jobs()))
        return self.jobs()


def _number_of_a_free_port() -> int:
    """JAX derives the port at which the processes of a step meet from the job's number: 61440 + number modulo 4096."""
    while True:
        number = random.SystemRandom().randrange(1_000_000, 9_000_000)
        with socket.socket() as found:
            try:
                found.bind(("localhost", 61440 + number % 4096))
            except OSError:
                continue
            return number
