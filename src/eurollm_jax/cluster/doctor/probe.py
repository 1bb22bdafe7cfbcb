"""The part of the doctor that needs jax, as a process of its own: `python -m eurollm_jax.cluster.doctor.probe`.

It reads what is asked as a line of JSON from standard input, and another one when all processes are there. It writes
what it finds to standard output, a JSON object a line, as soon as it is known: {"begin": stage}, {"report": this
process's}, {"ready": true} before that other line, in process 0 {"others": their reports} and {"joint": findings on
all}, and {"end": true} when all is said. So whoever reads knows where it stood when it ended.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from eurollm_jax.cluster.doctor import compare
from eurollm_jax.cluster.doctor.finding import Finding, Report, failed, guarded, passed, said_by, unchecked
from eurollm_jax.cluster.doctor.meeting import Meeting
from eurollm_jax.cluster.doctor.shared import seen_by_another
from eurollm_jax.cluster.doctor.versions import release
from eurollm_jax.cluster.site import Site
from eurollm_jax.errors import UserError

SLACK_SECONDS = 15.0  # that processes begin a stage one after the other
FAREWELL_SECONDS = 5.0  # that process 0 waits for the others' end: its own ends their connection


class HungError(Exception):
    """Something has not returned in time; its thread is still there."""


def bounded[T](function: Callable[[], T], seconds: float) -> T:
    """What it returns or raises, within so many seconds; HungError otherwise."""
    done: list[tuple[bool, Any]] = []

    def call() -> None:
        try:
            done.append((True, function()))
        except BaseException as error:
            done.append((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise HungError(f"no answer within {seconds:g} s")
    returned, value = done[0]
    if not returned:
        raise value
    return value


class Probe:
    """One process's way through the stages."""

    def __init__(self, asked: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        from eurollm_jax.cluster.site_files import site_of

        self._write = write
        self._seconds: float = asked["seconds"]
        self._by_hand = asked["by_hand"]
        self._scratch = None if asked["scratch"] is None else Path(asked["scratch"])
        self._accelerators = asked["accelerators"]
        self._site: Site | None = None if asked["site"] is None else site_of(asked["site"])
        self._report = Report.from_json(asked["report"])
        self._warnings = _Warnings()

    def run(self, go_on: Callable[[], dict[str, Any] | None]) -> None:
        """Until the end, or until nothing more can be found out; `go_on` waits until all processes are there."""
        if not self._imported():
            return
        self._write({"ready": True})
        go = go_on()
        meeting = None if go is None else self._connected()
        if go is None or meeting is None:
            return
        if meeting.processes > 1:
            self._begin("clocks")
            clock = meeting.clock(time.monotonic() + self._seconds)
            if clock is not None:
                self._measure("clock", clock)
            self._shared_scratch(meeting, go["folder"])
        self._fact("usable", "yes" if self._devices() else "no")
        self._begin("what all have found of their devices")
        until = time.monotonic() + self._seconds + SLACK_SECONDS
        reports = self._heard(meeting, meeting.collected("devices", self._report.to_json(), until))
        ready = self._told(meeting, "ready", lambda: self._judge_devices(reports, go["hosts"]))
        if ready is None or ready["stop"]:
            why = ready["stop"] if ready else "process 0 has not answered"
            self._add(*(unchecked(check, why) for check in ("all-reduce in a node", "all-reduce of all")))
        else:
            self._all_reduces(ready["hosts"])
        self._begin("what all have found in the end")
        until = time.monotonic() + self._seconds + SLACK_SECONDS
        gone = [process for process, report in enumerate(reports) if report is None]
        self._end(meeting, self._heard(meeting, meeting.collected("after", self._report.to_json(), until, gone)))

    # ----------------------------------------------------------------------------------------------------- stages

    def _imported(self) -> bool:
        self._begin("the import of jax")
        try:
            import jax
            import jaxlib.version
        except BaseException as error:
            remedy = "mend what the checks of versions name; `python -c 'import jax'` shows the whole error"
            self._add(failed("import of jax", said_by(error), remedy))
            return False
        self._warnings.listen()
        mixed = [
            f"{name} is {version} and its metadata say {said}"
            for name, version in (("jax", jax.__version__), ("jaxlib", jaxlib.version.__version__))
            if release(said := self._report.facts.get(name, version)) != release(version)
        ]
        if mixed:
            remedy = "two installations are mixed: look at PYTHONPATH, and install anew"
            self._add(failed("import of jax", "; ".join(mixed), remedy))
        else:
            self._add(passed("import of jax", f"from {Path(jax.__file__).parent.parent}"))
        return True

    def _connected(self) -> Meeting | None:
        self._begin("the connection to the other processes")
        from eurollm_jax.parallel.distributed import Coordination, connect

        by_hand = None if self._by_hand is None else Coordination(*self._by_hand)
        try:
            connect(by_hand, max(1, int(self._seconds)))
        except UserError as error:
            remedy = "see what the others print; check that all were started, and that the network lets them through"
            self._add(failed("connection", str(error), remedy))
            return None
        from jax._src.distributed import (
            global_state,
        )  # no public name: tests/cluster/test_doctor_processes.py guards it

        process, processes = (global_state.process_id or 0), (global_state.num_processes or 1)
        client = global_state.client
        if client is None:
            process, processes = 0, 1
        started = self._report.process, int(self._report.measured["processes"][0])
        if (process, processes) != started:
            seen = f"process {process} of {processes} for JAX, and {started[0]} of {started[1]} for its launcher"
            self._add(failed("connection", seen, "unset the variables of an outer launcher"))
        else:
            what = f"all {processes} processes" if processes > 1 else "one process"
            self._add(passed("connection", what))
        return Meeting(client, process, processes)

    def _shared_scratch(self, meeting: Meeting, name: str | None) -> None:
        """Whether all processes see the file that process 0 has made, and whether its lock keeps them out."""
        if self._scratch is None or name is None:
            return
        self._begin("scratch, as the others see it")
        path = self._scratch / name
        if meeting.process:
            self._add(*guarded("scratch shared", lambda: seen_by_another(path)))
            meeting.say("scratch", "done")
            return
        until = time.monotonic() + self._seconds
        for process in range(1, meeting.processes):
            meeting.hear("scratch", process, until)
        self._add(passed("scratch shared", "as process 0 sees it"))

    def _devices(self) -> bool:
        """Findings on this process's devices; False where they cannot be used."""
        self._begin("devices")
        from eurollm_jax.cluster.doctor import devices

        try:
            here = bounded(devices.backend_here, self._seconds)
        except BaseException as error:
            hung = isinstance(error, HungError)
            why = str(error) if hung else said_by(error)
            reasons = [*(() if hung else devices.library_errors()), *self._warnings.texts]
            said = f" ({reasons[0][:300]})" if reasons else ""
            remedy = "see the driver, and whether another program holds the devices; JAX_PLATFORMS=cpu leaves them out"
            clash = devices.fractions_clash(os.environ)
            self._add(failed("backend", f"no device comes up: {why}{said}", clash or remedy))
            return False
        import jax

        local, kind = jax.local_devices(), jax.local_devices()[0].device_kind
        self._fact("backend", here)
        self._fact("device kind", kind)
        self._measure("devices", [len(local)])
        self._add(devices.backend_finding(self._site, self._accelerators, self._warnings.texts))
        self._add(devices.flags_finding(self._site.chip.backend if self._site else here, os.environ))
        if self._site is not None and self._site.chip.backend == here:
            self._add(*guarded("device kind", lambda: devices.kind_finding(self._site)))  # type: ignore[arg-type]
        same = self._site if self._site is not None and self._site.chip.backend == here else None
        self._add(*guarded("device memory", lambda: devices.memory_finding(same)))
        self._begin("products")
        try:
            rates = bounded(lambda: [devices.product_rate(device) for device in devices.own_devices()], self._seconds)
            self._measure("products", rates)
        except BaseException as error:
            self._add(failed("products", said_by(error), "the device cannot compute: see its driver and its memory"))
            return False
        self._begin("attention")
        remedy = "see the message; attention_kernel='blockwise' needs no library"
        self._add(*guarded("attention", lambda: bounded(devices.attention_findings, self._seconds), remedy))
        return True

    def _all_reduces(self, hosts: Sequence[str]) -> None:
        self._begin("all-reduce")
        from eurollm_jax.cluster.doctor.collectives import all_reduces

        remedy = "NCCL_DEBUG=INFO shows what the library tries; see interfaces, container and firewall"
        self._add(
            *guarded("all-reduce", lambda: bounded(lambda: all_reduces(hosts, self._site), self._seconds), remedy)
        )

    # ------------------------------------------------------------------------------------------- process 0's judgements

    def _judge_devices(self, reports: Sequence[Report | None], hosts: Sequence[str]) -> dict[str, Any]:
        there = [report for report in reports if report is not None]
        self._joint(compare.all_there(reports, "its devices", self._seconds))
        if any(len(report.measured.get("clock", ())) for report in there):
            self._joint([compare.clocks(there)])
        ready = [report for report in there if report.facts.get("usable") == "yes"]
        counted = [report for report in there if "devices" in report.measured]
        self._joint([compare.products(there)])
        if counted and len(counted) == len(reports):
            self._joint([compare.device_counts(counted, self._site)])
        of_devices = [
            Report(r.process, r.host, facts={n: r.facts[n] for n in DEVICE_FACTS if n in r.facts}) for r in counted
        ]
        self._joint([finding for finding in compare.alike(of_devices) if finding.status != "pass"])
        if len(ready) < len(reports):
            return {"stop": "not every process has devices that compute"}
        if len({report.facts["backend"] for report in ready}) > 1:
            return {"stop": "processes have different backends"}
        return {"stop": "", "hosts": hosts}

    def _told(self, meeting: Meeting, topic: str, judge: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What process 0 judges, in all processes; None where it does not say so."""
        text = json.dumps(judge()) if meeting.process == 0 else ""
        heard = meeting.told(topic, text, time.monotonic() + 2 * (self._seconds + SLACK_SECONDS))
        return None if heard is None else json.loads(heard)

    # ------------------------------------------------------------------------------------------------------- telling

    def _begin(self, stage: str) -> None:
        self._write({"begin": stage})

    def _add(self, *findings: Finding) -> None:
        self._report = self._report.with_(*findings)
        self._write({"report": self._report.to_json()})

    def _fact(self, name: str, value: str) -> None:
        r = self._report
        self._report = Report(r.process, r.host, r.findings, {**r.facts, name: value}, r.measured)

    def _measure(self, name: str, values: Sequence[float]) -> None:
        r = self._report
        self._report = Report(r.process, r.host, r.findings, r.facts, {**r.measured, name: list(values)})

    def _heard(self, meeting: Meeting, texts: Sequence[str | None]) -> list[Report | None]:
        """What the processes say; in process 0, it is passed on at once."""
        reports = [None if text is None else Report.from_json(text) for text in texts]
        if meeting.process == 0:
            self._write({"others": [text for text in texts[1:] if text is not None]})
        return reports

    def _joint(self, findings: Sequence[Finding]) -> None:
        self._write({"joint": [vars(finding) for finding in findings]})

    def _end(self, meeting: Meeting, reports: Sequence[Report | None]) -> None:
        """Process 0 tells what all have found; the others end once they know that it has."""
        if meeting.process == 0:
            if meeting.processes > 1:
                meeting.say("end", "told")
                until = time.monotonic() + FAREWELL_SECONDS
                for process in range(1, meeting.processes):
                    if reports[process] is not None:
                        meeting.hear("bye", process, until)
        elif meeting.hear("end", 0, time.monotonic() + 2 * (self._seconds + SLACK_SECONDS)) is None:
            return
        else:
            meeting.say("bye", "bye")
        self._write({"end": True})


DEVICE_FACTS = ("backend", "device kind")


class _Warnings(logging.Handler):
    """Keeps what JAX logs as a warning or worse, such as why a plug-in was left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def listen(self) -> None:
        logging.getLogger("jax").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        reason = f": {said_by(record.exc_info[1])}" if record.exc_info and record.exc_info[1] else ""
        try:
            text = record.getMessage()
        except TypeError:  # a message of JAX's that lacks its argument
            text = str(record.msg)
        self.texts.append(f"{text}{reason}")


def main() -> NoReturn:
    """Ends without the interpreter's own end, which would wait for threads that hang and for the other processes."""
    asked = json.loads(sys.stdin.readline())
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no finding
    Probe(asked, lambda line: print(json.dumps(line), file=lines, flush=True)).run(
        lambda: json.loads(sys.stdin.readline() or "null")
    )
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
