"""Where the doctor's processes meet before jax connects them: each tells process 0 what it has found so far.

JAX's own service ends every process where one does not come, and does not say which; and a process that cannot import
jax never reaches it. So they meet over a plain connection first, at the address that JAX's service is to have
afterwards.
"""

import json
import re
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from eurollm_jax.cluster.doctor.finding import Report

type Verdict = dict[str, Any]

GREETING = "eurollm doctor "  # of a line that is meant for us, before its JSON
LONGEST = 1 << 20  # bytes of a line
AGAIN = 0.2  # seconds between two tries to reach process 0
PORTS, FIRST_PORT = 1 << 12, 65536 - (1 << 12)  # as JAX chooses by the number of a job


def address_of(by_hand: str | None, environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Process 0's host and port: as given, or as JAX finds them for Slurm and Open MPI; None where that is unknown."""
    if by_hand is not None:
        host, _, port = by_hand.rpartition(":")
        return host.strip("[]"), int(port)
    if uri := environment.get("OMPI_MCA_orte_hnp_uri"):
        found = re.match(r"(\d+)\..*?tcp6?://\[?([^,:\]]+)", uri)
        return (found[2], int(found[1]) // PORTS % PORTS + FIRST_PORT) if found else None
    nodes, job = environment.get("SLURM_STEP_NODELIST"), environment.get("SLURM_JOB_ID", "")
    if not nodes or not job.isdigit():
        return None
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)  # nid001, nid[001-004], nid[001,007-009],other
    return (first[1] + (first[2] or ""), int(job) % PORTS + FIRST_PORT) if first else None


def receive(
    port: int, own: Report, processes: int, seconds: float, judge: Callable[[Sequence[Report | None]], Verdict]
) -> tuple[list[Report | None], Verdict]:
    """In process 0: the reports of those that come within so many seconds, and the verdict, which each is told."""
    reports: list[Report | None] = [own, *[None] * (processes - 1)]
    connections: list[socket.socket] = []
    with _server(port, processes) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ, b"")
        until = time.monotonic() + seconds
        while None in reports and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ, b"")
                    continue
                assert isinstance(key.fileobj, socket.socket)
                unread = key.data + _received(key.fileobj)
                if unread != key.data and not unread.endswith(b"\n") and len(unread) < LONGEST:
                    selector.modify(key.fileobj, selectors.EVENT_READ, unread)
                    continue
                selector.unregister(key.fileobj)
                report = _report(unread, processes)
                if report is None:  # a stranger
                    key.fileobj.close()
                else:
                    reports[report.process] = report
                    connections.append(key.fileobj)
    verdict = judge(reports)
    for connection in connections:
        with connection, suppress(OSError):  # gone again
            connection.settimeout(seconds)
            connection.sendall(json.dumps(verdict).encode() + b"\n")
    return reports, verdict


def report_to(address: tuple[str, int], own: Report, seconds: float) -> Verdict | None:
    """In the others: process 0's verdict; None where it cannot be reached, or does not answer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with socket.create_connection(address, max(0.1, until - time.monotonic())) as connection:
                connection.sendall(f"{GREETING}{own.to_json()}\n".encode())
                connection.settimeout(2 * seconds + 10)  # it waits for others
                answer = connection.makefile().readline()
        except OSError:
            answer = ""
        if answer:
            verdict: Verdict = json.loads(answer)
            return verdict
        time.sleep(AGAIN)
    return None


def _server(port: int, processes: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=processes, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=processes)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def _report(line: bytes, processes: int) -> Report | None:
    try:
        text = line.decode()
        report = Report.from_json(text.removeprefix(GREETING)) if text.startswith(GREETING) else None
    except (ValueError, TypeError, KeyError):
        return None
    return report if report is not None and 0 < report.process < processes else None
