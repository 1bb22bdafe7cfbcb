"""Real processes of one run on this machine: started together, looked at, signalled, killed, and never waited for too
long.

A start of Python costs seconds of imports. So a server, this file run as a script, imports everything once and forks
for each process; what is forked is the real thing, the command line from its first line to the interpreter's end, in a
process group of its own. `fresh` processes do their own imports.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

TIMES = {"seconds", "tokens_per_second", "mfu", "data_wait", "evaluation_seconds"}  # of a record
LIMIT = 120.0  # seconds that any wait may take: a hang is a failure

# After an experiment: the samples at a run's end compile for seconds, and few tests are about them.
WITHOUT_SAMPLES = "import eurollm_jax.training.run\neurollm_jax.training.run.sample = lambda *of: []\n"

type Phases = list[tuple[float, str]]  # (when, of time.time(); name), the newest last


class Group:
    """The processes of one start; those that still run are killed when the block ends."""

    def __init__(self, server: "Server", pids: Sequence[int], logs: Sequence[Path]) -> None:
        self._server, self.pids, self._logs = server, tuple(pids), tuple(logs)
        self._ended: dict[int, int] = {}
        self.began = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.signal(signal.SIGKILL)
        while not all(status is not None for status in self.statuses()):
            time.sleep(0.002)

    def statuses(self) -> list[int | None]:
        """Of each process: None while it runs, what it ended with, or less than 0 for the signal that ended it."""
        for pid in self.pids:
            if pid not in self._ended and (status := self._server.ask(poll=pid)["status"]) is not None:
                self._ended[pid] = status
        return [self._ended.get(pid) for pid in self.pids]

    def wait(self, limit: float = LIMIT) -> list[int]:
        """What all ended with; AssertionError with the end of what they said where one is still there at the limit."""
        end = time.monotonic() + limit
        while None in (statuses := self.statuses()):
            if time.monotonic() > end:
                raise AssertionError(f"not all have ended within {limit:g} s: {statuses}\n{self.last_words()}")
            time.sleep(0.005)
        return [status for status in statuses if status is not None]

    def until(self, reached: Callable[[], object], limit: float = LIMIT) -> None:
        """Waits for something that the processes do; AssertionError where one ends before, or none does it."""
        end = time.monotonic() + limit
        while not reached():
            assert self.statuses() == [None] * len(self.pids), f"ended early: {self.statuses()}\n{self.last_words()}"
            assert time.monotonic() < end, f"not within {limit:g} s\n{self.last_words()}"
            time.sleep(0.002)

    def until_ended(self, process: int, limit: float = LIMIT) -> None:
        """Waits for one of them; AssertionError where it does not end."""
        end = time.monotonic() + limit
        while self.statuses()[process] is None:
            assert time.monotonic() < end, f"process {process} has not ended within {limit:g} s\n{self.last_words()}"
            time.sleep(0.005)

    def signal(self, number: signal.Signals, *processes: int) -> None:
        """Sends it to some processes or, as a scheduler does, to all of them and to all that they have started."""
        for process in processes or range(len(self.pids)):
            if self.pids[process] not in self._ended:
                with suppress(ProcessLookupError):
                    os.killpg(self.pids[process], number)

    def said(self, process: int = 0) -> str:
        """Its standard error so far."""
        return self._logs[process].with_suffix(".err").read_text()

    def phases(self, process: int = 0) -> Phases:
        """What the loop has said of itself so far; what a killed process was in is the last."""
        lines = self._logs[process].with_suffix(".phases").read_text().splitlines()
        return [(float(when), name) for when, _, name in (line.partition(" ") for line in lines)]

    def last_words(self) -> str:
        """The end of what each process said."""
        return "\n".join(f"--- process {i}:\n{self.said(i)[-3000:]}" for i in range(len(self.pids)))


class Server:
    """Starts processes. `folder` takes what they write to standard output and standard error."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # its threads would not survive a fork
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()  # ends it, and all that it has started
        self._process.wait(LIMIT)
        self._process.stdout.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        *argv: str | Path,
        processes: int = 1,
        devices: int = 2,
        environment: Mapping[str, str] | None = None,
        of_process: Mapping[int, Mapping[str, str]] | None = None,
        fresh: bool = False,
    ) -> Group:
        """`eurollm` with the arguments `argv`, the first of them the command, in several processes that find each other
        on a free port, each with so many devices; `of_process` are variables that one process alone has."""
        port, pids, logs = free_port(), [], []
        for process in range(processes):
            self._started += 1
            log = self._folder / f"start-{self._started:04d}-process-{process}"
            for suffix in (".out", ".err", ".phases"):
                log.with_suffix(suffix).touch()
            joining = f"--coordinator localhost:{port} --processes {processes} --process {process}"
            variables = {"XLA_FLAGS": flags(devices), **(environment or {}), **(of_process or {}).get(process, {})}
            command = [str(argv[0]), *(joining.split() if processes > 1 else ()), *map(str, argv[1:])]
            pids.append(self.ask(argv=command, environment=variables, log=str(log), fresh=fresh)["pid"])
            logs.append(log)
        return Group(self, pids, logs)


def flags(devices: int) -> str:
    """XLA's, for so many devices of a CPU and a quick compiler."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def write_experiment(experiment: Any, folder: Path, after: str = "") -> Path:
    """The file of an experiment, for processes of their own; the lines `after` it are run by each of them."""
    path = folder / "experiments" / f"{experiment.name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "import dataclasses\n"
        "import os\n"
        "from eurollm_jax.experiment import *\n"
        "from eurollm_jax.model.config import *\n"
        "from eurollm_jax.data.loader import DataConfig\n"
        "from eurollm_jax.corpus.tokenizing.parity import Parity\n"
        f"EXPERIMENT = {experiment!r}\n{after}"
    )
    return path


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that may not depend on how often it was stopped, by name: arrays of its last checkpoint as hashes,
    what it read, the records but for their times, and what it wrote at its end."""
    arrays = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in state_of(run).items()}
    step = newest(run)
    progress = json.loads((run / "checkpoints" / str(step) / "progress" / "metadata").read_text())
    ended = {name: json.loads((run / name).read_text()) for name in ("evaluation.json", "samples.json")}
    return {
        **arrays,
        "step": step,
        "progress": {name: value for name, value in progress.items() if name not in ("seconds", "lap")},
        "records": records(run),
        **ended,
    }


def newest(run: Path) -> int:
    """The step of its newest checkpoint."""
    from eurollm_jax.training.checkpoint import Checkpoints

    step = Checkpoints(run / "checkpoints", read_only=True).latest
    assert step is not None
    return step


def state_of(run: Path) -> dict[str, Any]:
    """All arrays of its newest checkpoint by path, whole."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    saved = run / "checkpoints" / str(newest(run)) / "state"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(saved).tree)
    restored = handler.restore(saved, args=ocp.args.PyTreeRestore(restore_args=whole))
    handler.close()
    return {"/".join(map(str, path)): np.asarray(value) for path, value in ocp.tree.to_flat_dict(restored).items()}


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Of these kinds, without times; by default those that a run has once, however often it was stopped."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] in (kinds or ("train", "evaluation", "skipped"))]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A phrase for each part of an outcome that is not as expected."""
    named = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if "records" in named:
        pairs = zip(expected["records"], found["records"], strict=False)
        first = next((f"{ours} is {theirs}" for ours, theirs in pairs if ours != theirs), "one has more")
        named.append(f"{len(expected['records'])} records are {len(found['records'])}; the first that differs: {first}")
    return named


def _serve() -> None:
    """Answers requests, a line of JSON each, until standard input ends; then kills what it started."""
    import eurollm_jax.cli
    import eurollm_jax.parallel.programs
    import eurollm_jax.training.run
    import eurollm_jax.training.trace  # noqa: F401

    for module in ("grain", "tensorboardX", "tyro", "jax.experimental.multihost_utils"):
        __import__(module)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what is forked has one of them alone"
    running: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                _become(**request)
            os.setpgid(pid, pid)  # here, so that it may be signalled at once
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _become(argv: Sequence[str], environment: Mapping[str, str], log: str, fresh: bool) -> None:
    """Turns this process, which was forked just now, into the one that is asked for, and ends with it."""
    os.environ.update(environment)
    ends = {0: os.open(os.devnull, os.O_RDONLY)}
    for number, suffix in ((1, ".out"), (2, ".err")):
        ends[number] = os.open(log + suffix, os.O_WRONLY | os.O_APPEND)
    for number, opened in ends.items():
        os.dup2(opened, number)
        os.close(opened)
    if fresh:
        os.execv(sys.executable, [sys.executable, "-P", __file__, "run", log, *argv])
    logging.getLogger().handlers.clear()  # of what was imported
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    _run(log, argv)


def _run(log: str, argv: Sequence[str]) -> None:
    """The command line, with its phases in a file, which outlives a kill."""
    phases = logging.getLogger("eurollm_jax.phases")
    phases.setLevel(logging.DEBUG)
    phases.propagate = False
    file = os.open(f"{log}.phases", os.O_WRONLY | os.O_APPEND)

    class ToFile(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.write(file, f"{time.time()} {record.getMessage().removeprefix('PHASE ')}\n".encode())

    phases.addHandler(ToFile())
    from eurollm_jax.cli import main

    sys.exit(main(argv))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        _run(sys.argv[2], sys.argv[3:])
