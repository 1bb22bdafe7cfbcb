"""What the tests of the doctor share: installations that are planted, and real processes of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import free_port

LIMIT = 120.0
QUICK = "--xla_backend_optimization_level=0"  # a compiler that is


def distribution(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> Path:
    """The metadata of an installed distribution, without its modules; `folder` is for PYTHONPATH."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), ""]))
    return folder


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str
    found: dict[str, Any]  # what --json has; empty where there is none

    def rows(self, check: str) -> list[dict[str, Any]]:
        return [row for row in self.found["rows"] if row["check"] == check]

    def row(self, check: str) -> dict[str, Any]:
        (row,) = self.rows(check)
        return row

    def failing(self) -> set[str]:
        return {row["check"] for row in self.found["rows"] if row["status"] == "fail"}


class Doctors:
    """Processes of one call each, which are killed when the block ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []

    def __enter__(self) -> "Doctors":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.started:
            for number in (signal.SIGCONT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    break
            process.communicate()

    def start(self, *options: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """In a process group of its own, with scratch in the folder unless the options say otherwise."""
        scratch = () if "--scratch" in options else ("--scratch", self.folder)
        command = [sys.executable, "-P", "-m", "eurollm_jax", "doctor", *map(str, (*options, *scratch))]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**variables, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, **(environment or {})},
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str], found: Path | None = None) -> Said:
        out, err = process.communicate(timeout=LIMIT)
        there = found is not None and found.exists()
        return Said(process.returncode, out, err, json.loads(found.read_text()) if there and found else {})

    def alone(self, *options: str | Path, environment: Mapping[str, str] | None = None) -> Said:
        """One process to its end."""
        found = self.folder / f"found-{len(self.started)}.json"
        return self.end(self.start(*options, "--json", found, environment=environment), found)

    def together(
        self,
        processes: int,
        *options: str | Path,
        of_process: Mapping[int, Mapping[str, str]] | None = None,
        absent: Sequence[int] = (),
    ) -> list[subprocess.Popen[str]]:
        """Several that find each other, but those that are `absent`; process 0 writes found.json in the folder."""
        port, started = free_port(), []
        for process in range(processes):
            if process in absent:
                continue
            joining = f"--coordinator localhost:{port} --processes {processes} --process {process}".split()
            found = ("--json", self.folder / "found.json") if process == 0 else ()
            variables = (of_process or {}).get(process)
            started.append(self.start(*joining, *options, *found, environment=variables))
        return started

    def all_ended(self, started: Sequence[subprocess.Popen[str]]) -> list[Said]:
        return [self.end(process, self.folder / "found.json") for process in started]
