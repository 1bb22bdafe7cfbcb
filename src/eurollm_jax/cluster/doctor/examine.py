"""One process's examination: the checks without jax, the probe with it, and what both have found."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from eurollm_jax.cluster.doctor import compare, host, scratch, versions
from eurollm_jax.cluster.doctor.checks import OF_ALL, OF_PROBE
from eurollm_jax.cluster.doctor.finding import Finding, Report, failed, guarded, unchecked
from eurollm_jax.cluster.doctor.shared import hold
from eurollm_jax.cluster.site import Site
from eurollm_jax.parallel.hardware import Backend
from eurollm_jax.parallel.launcher import address_of, bound_to, local_number, node_of, several_nodes, started_as
from eurollm_jax.parallel.rendezvous import Arrival, Fault, come, receive

type Verdict = dict[str, Any]

FIRST_BYTES, OTHER_BYTES = 64 << 20, 1 << 20  # written as a trial, by the first process of a host and by others
PATIENCE = 120.0  # seconds beyond two stages' that the probe may be silent: an import from a busy file system;
# docs/doctor.md and --help say so
PIPES: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
LAST_WORDS = 600  # characters of what a probe that has died said


@dataclass(frozen=True)
class Question:
    """What is to be examined."""

    site: Site | None
    site_name: str | None  # as the user named it
    scratch: Path | None
    seconds: float  # that any one stage may take
    by_hand: tuple[str, int, int] | None  # address, processes, process

    @property
    def place(self) -> tuple[int, int]:
        """(process, processes)"""
        if self.by_hand is not None:
            return self.by_hand[2], self.by_hand[1]
        return started_as(os.environ)


@dataclass
class Examination:
    """What this process knows: its own report, and in process 0 the others', with what they show together."""

    own: Report
    others: list[Report] = field(default_factory=list)
    joint: list[Finding] = field(default_factory=list)
    told: bool = False  # in other processes than 0: whether process 0 knows all that is known here
    stopped: str = ""  # why devices were not asked for
    stage: str = "its start"  # of the probe


def examine(question: Question) -> Examination:
    """All checks of this process."""
    before, folder, accelerators = before_jax(question)
    asked = {
        "site": question.site_name,
        "scratch": None if folder is None else str(folder.absolute()),
        "seconds": question.seconds,
        "by_hand": question.by_hand,
        "accelerators": accelerators,
        "report": before.to_json(),
    }
    address = question.by_hand[0] if question.by_hand else address_of(os.environ)
    with ExitStack() as held:
        return probed(before, asked, question.seconds, lambda found: joined(found, address, folder, question, held))


def joined(
    found: Examination, address: str | None, folder: Path | None, question: Question, held: ExitStack
) -> Verdict | None:
    """What process 0 says when all have come, or as many as do; None where nothing can come of it."""
    process, processes = question.place
    if processes == 1:
        return {"stop": "", "hosts": [found.own.host], "folder": None}
    if address is None:
        remedy = "start it under Slurm or Open MPI 4, or with --coordinator, --processes and --process"
        found.own = found.own.with_(failed("connection", "where process 0 is cannot be told", remedy))
        return None
    own = Arrival(process, processes, found.own.host, found.own.to_json())

    def judge(arrivals: Sequence[Arrival | None], fault: Fault | None) -> Verdict:
        reports = [found.own, *map(_report_of, arrivals[1:])]
        there = [report for report in reports if report is not None]
        found.others = there[1:]
        if fault is not None:  # which ends the wait for others
            found.joint.append(failed("processes there", fault.what, fault.remedy))
        else:
            found.joint += compare.all_there(reports, "itself", question.seconds)
        found.joint += compare.alike(there)
        name = None
        with suppress(OSError):  # which the checks of the folder tell
            name = None if folder is None else held.enter_context(hold(folder)).name
        stop = fault.what if fault is not None else compare.obstacle(reports)
        return {"stop": stop, "hosts": [report.host for report in there], "folder": name}

    try:
        if process:
            return dict(come(address, own, question.seconds))
        return dict(receive(address, own, question.seconds, judge, bound=bound_to(os.environ)))
    except ConnectionError as error:
        remedy = "see what process 0 prints, and whether the network lets others through to it"
        found.own = found.own.with_(failed("connection", str(error), remedy))
    except OSError as error:
        seen = f"{address} cannot be listened at ({os.strerror(error.errno or 0).lower()})"
        found.own = found.own.with_(failed("connection", seen, "give another port, or end what listens there"))
    return None


def _report_of(arrival: Arrival | None) -> Report | None:
    """What a process has found; None of one that has not come, or that is no doctor."""
    try:
        return None if arrival is None else Report.from_json(arrival.said)
    except (ValueError, TypeError, KeyError):
        return None


def before_jax(question: Question) -> tuple[Report, Path | None, list[Backend]]:
    """The report on all that needs no jax, the folder that was looked at, and the backends that have a driver."""
    site, (process, processes) = question.site, question.place
    nvidia, amd = host.nvidia_driver(), host.amd_driver()
    drivers: dict[Backend, str | None] = {"cuda": nvidia, "rocm": amd}
    accelerators = [backend for backend, driver in drivers.items() if driver]
    expected = site.chip.backend if site is not None else next(iter(accelerators), None)
    findings: list[Finding] = list(versions.version_findings(expected))
    findings += guarded("driver", lambda: host.driver(expected, versions.cuda_release()))
    if nvidia and local_number(os.environ) == 0 and processes == 1:
        findings += guarded("devices free", host.devices_in_use)
    if site is not None:
        findings.append(host.site_variables(site, os.environ))
    findings += guarded("network interfaces", lambda: host.interfaces(os.environ, host.interface_names()))
    findings += guarded("limits", lambda: host.limits(several_nodes(os.environ)))
    folder = scratch.scratch_folder(question.scratch, site, os.environ)
    if isinstance(folder, Finding):
        findings.append(folder)
    else:
        size = FIRST_BYTES if local_number(os.environ) == 0 else OTHER_BYTES
        findings += scratch.scratch_findings(folder, size)
    facts = {
        **versions.version_facts(),
        "driver": ", ".join(filter(None, (nvidia, amd))) or "none",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
    }
    report = Report(process, node_of(os.environ), tuple(findings), facts, {"processes": [processes]})
    return report, None if isinstance(folder, Finding) else folder, accelerators


def probed(
    before: Report, asked: dict[str, Any], seconds: float, join: Callable[[Examination], Verdict | None]
) -> Examination:
    """Runs the probe to its end, or for as long as it may be silent; what it has said by then counts.

    `join` is called when it has imported jax, or has failed to, and says what it is told then.
    """
    found = Examination(before)
    command = [sys.executable, "-P", "-m", "eurollm_jax.cluster.doctor.probe"]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(command, stderr=said, errors="replace", **PIPES) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        lines, reader = _lines_of(child.stdout)
        patience = 2 * seconds + PATIENCE
        try:
            _say(child.stdin, asked)
            last = _listen(found, lines, patience)
            if last != "ready":
                found.own = found.own.with_(*_unfinished(found, last, child, said))
            verdict = join(found)
            found.stopped = verdict["stop"] if verdict is not None else "the processes are not connected"
            found.told = bool(verdict and found.stopped)
            if last == "ready" and not found.stopped:
                _say(child.stdin, verdict)
                last = _listen(found, lines, patience)
                found.told = last == "end"
                if last != "end":
                    found.own = found.own.with_(*_unfinished(found, last, child, said))
        finally:
            child.kill()
            child.wait()
            reader.join()
            with suppress(BrokenPipeError):  # it has died with words unread
                child.stdin.close()
    missing = [unchecked(check, found.stopped or f"the probe ended at {found.stage}") for check in _not_made(found)]
    if before.process == 0:
        found.joint += missing
    else:
        found.own = found.own.with_(*missing)
    return found


def _say(stream: IO[str], line: Any) -> None:
    with suppress(BrokenPipeError):  # it has died already
        print(json.dumps(line), file=stream, flush=True)


def _listen(found: Examination, lines: "queue.Queue[dict[str, Any] | None]", patience: float) -> str:
    """Takes the probe's lines up to the next "ready" or "end"; "dead" where it ends, "silent" where it says nothing."""
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            return "silent"
        if line is None:
            return "dead"
        _heard(found, line)
        for last in ("ready", "end"):
            if last in line:
                return last


def _heard(found: Examination, line: dict[str, Any]) -> None:
    """Takes one line of the probe's."""
    match line:
        case {"begin": str(stage)}:
            found.stage = stage
        case {"report": str(text)}:
            found.own = Report.from_json(text)
        case {"others": list(texts)}:
            told = [Report.from_json(text) for text in texts]
            earlier = {report.process: report for report in found.others}  # of one that has ended since, too
            found.others = list((earlier | {report.process: report for report in told}).values())
        case {"joint": list(findings)}:
            found.joint += [Finding(**finding) for finding in findings]


def _lines_of(stream: IO[str]) -> tuple["queue.Queue[dict[str, Any] | None]", threading.Thread]:
    """The probe's lines as they come, None at their end, and the thread that reads them."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            with suppress(ValueError):  # a library's own
                if isinstance(said := json.loads(line), dict):
                    lines.put(said)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return lines, reader


def _unfinished(found: Examination, last: str, child: "subprocess.Popen[str]", said: IO[str]) -> list[Finding]:
    """Why a probe has not come to its end, unless it has said so itself."""
    if last == "silent":
        child.kill()
    status = child.wait()
    said.seek(0)
    text = said.read()
    unknown = [line.strip() for line in text.splitlines() if "Unknown flag" in line]
    if unknown:
        return [failed("XLA_FLAGS", unknown[0][-LAST_WORDS:], "remove from XLA_FLAGS what this version does not know")]
    words = last_words(text)
    if last == "silent":
        remedy = "see the driver and the network; --seconds N waits longer"
        return [failed("probe", f"no answer at {found.stage}, and it was ended{_quoted(words)}", remedy)]
    if status == 0:
        return []  # it has said why
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    remedy = "python -X faulthandler -c 'import jax; jax.devices()' shows where; see driver, plug-in and container"
    return [failed("probe", f"ended {how} at {found.stage}{_quoted(words)}", remedy)]


def last_words(text: str) -> str:
    """What a process has said at its end, without the addresses of its stack; the fatal line of a C++ library first."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.match(r"\s*(@|\*\*\*)", line)]
    fatal = next((number for number, line in enumerate(lines) if re.match(r"F\d{4} ", line)), None)
    return " ".join(lines[fatal:] if fatal is not None else lines[-6:])[:LAST_WORDS]


def _quoted(words: str) -> str:
    return f": {words}" if words else ""


def _not_made(found: Examination) -> Sequence[str]:
    """The checks that belong to a whole examination, and have no finding."""
    made = {finding.check for finding in (*found.joint, *found.own.findings)}
    several = OF_ALL if found.own.process == 0 and found.own.measured["processes"][0] > 1 else ()
    return [check for check in (*OF_PROBE, *several) if check not in made]


def summed_up(found: Examination) -> dict[str, Any]:
    """For --json: the reports as they are."""
    reports = [json.loads(report.to_json()) for report in (found.own, *found.others)]
    return {"reports": reports, "joint": [vars(finding) for finding in found.joint]}
