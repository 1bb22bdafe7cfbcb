"""Where the processes of a job meet before JAX connects them, and find out who does not come.

JAX's own service ends all processes by SIGABRT where one of them does not come, and names nobody. So they meet over
plain connections first, at the address that the service is to have afterwards: each tells process 0 its number, its
host and what else it has to say, once; process 0 makes a verdict of that, and tells all. Nothing here imports jax.
"""

import errno
import random
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from eurollm_jax.errors import UserError
from eurollm_jax.parallel.hub import Line, Message, listening

START_SECONDS = 300  # that processes wait for each other at the start
SERVICE_SECONDS = 60.0  # that JAX's service may take to begin once all have met
TRY_SECONDS = 10.0  # that one try to reach process 0 may take
PAUSES = (0.05, 2.0)  # seconds between two tries at least, and at most: many processes may wait for process 0
LATE_SECONDS = 5.0  # after a fault is found, in which others come and are told of it, too
LONGEST = 1 << 20  # bytes of what a process says
NAMED = 6  # processes or hosts by name in one line

type Judge = Callable[[Sequence["Arrival | None"], "Fault | None"], Any]


@dataclass(frozen=True)
class Arrival:
    """A process as it presents itself. `said` is anything that JSON can hold."""

    process: int
    processes: int
    host: str
    said: Any = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))  # tells two that claim one number apart


@dataclass(frozen=True)
class Fault:
    """Why the processes cannot begin, and what to do about it."""

    what: str
    remedy: str
    lost: bool  # a later start may find all of them


def divided(address: str) -> tuple[str, int]:
    """Host and port of host:port; UserError where it is none."""
    found = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise UserError(f"{address} is no address of a process: write it as host:port.")
    return found[1], int(found[2])


def come(address: str, own: Arrival, seconds: float) -> Any:
    """In each process: process 0's verdict. Raises ConnectionError where it cannot be reached within so many seconds,
    or is gone before it has said one."""
    began, why = time.monotonic(), ""
    while (waited := time.monotonic() - began) < seconds:
        patience = min(TRY_SECONDS, seconds - waited)
        try:
            line = Line(socket.create_connection(divided(address), patience))
        except (OSError, UnicodeError) as error:  # the latter for what can be no name of a host
            why = str(getattr(error, "strerror", None) or error).lower()
        else:
            with closing(line):
                line.send(vars(own))
                heard = _heard(line, seconds - waited, 2 * seconds + TRY_SECONDS)
            if len(heard) > 1:
                return heard[1].get("verdict")
            if heard:
                time.sleep(LATE_SECONDS)  # a signal that has ended process 0 may be on its way to this one, too
                raise ConnectionError(f"process 0 on {heard[0].get('host')} was there, and is gone or silent")
            why = "what listens there does not answer as one that waits for others"
        time.sleep(min(max(PAUSES[0], waited / 8), PAUSES[1]) * random.uniform(0.5, 1.0))
    raise ConnectionError(f"process 0 cannot be reached at {address} within {seconds:g} s ({why})")


def _heard(line: Line, first: float, then: float) -> list[Message]:
    """What process 0 says, which is two messages: that it has heard, and its verdict; the seconds are those that each
    may take. Fewer where it falls silent, is gone, or is none."""
    heard: list[Message] = []
    until = time.monotonic() + first
    while len(heard) < 2:
        messages = line.receive(max(0.0, until - time.monotonic()))
        if not messages and (messages is None or time.monotonic() >= until):
            break
        if messages and not heard:
            until = time.monotonic() + then
        heard += messages
    return heard


def wait_for_service(address: str, seconds: float) -> None:
    """Until somebody listens at process 0's address again: a client of JAX's that comes before the service does waits
    for a second before it tries again. Raises ConnectionError where nobody does within so many seconds."""
    until, pause = time.monotonic() + seconds, PAUSES[0] / 5
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(divided(address), TRY_SECONDS):
            return
        time.sleep(pause)
        pause = min(2 * pause, PAUSES[1])
    raise ConnectionError(f"process 0 was there, and has not begun to connect all at {address} within {seconds:g} s")


def receive(address: str, own: Arrival, seconds: float, judge: Judge, *, bound: str | None = None) -> Any:
    """In process 0: the verdict, once all have come, or so many seconds are over; all that have come are told.

    `judge` makes it, of who has come, in their order, and of what is wrong beside that some have not. Process 0 itself
    comes like all others, for the address may lead elsewhere; it listens at the port of `bound`, if that is another.
    Raises OSError where it cannot.
    """
    hall = _Hall(own)
    with listening(divided(bound or address)[1], own.processes) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        threading.Thread(target=_visit, args=(address, own, seconds), name="meeting", daemon=True).start()
        until = time.monotonic() + seconds
        while hall.waits and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if isinstance(key.fileobj, Line):
                    if not hall.hear(key.fileobj):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                else:
                    try:
                        selector.register(Line(server.accept()[0]), selectors.EVENT_READ)
                    except OSError as error:  # most are of one that is gone already
                        if error.errno in (errno.EMFILE, errno.ENFILE):
                            hall.blame(_out_of_files(own))
                            selector.unregister(server)
            if hall.fault is not None:
                until = min(until, hall.fault_since + LATE_SECONDS)
        lines = [key.fileobj for key in selector.get_map().values() if isinstance(key.fileobj, Line)]
    verdict = judge([hall.came.get(process) for process in range(own.processes)], hall.fault or hall.astray(address))
    for line in lines:
        with closing(line):
            if line in hall.lines:
                line.send({"verdict": verdict})
    return verdict


def _out_of_files(own: Arrival) -> Fault:
    what = f"process 0 on {own.host} may open too few files for {own.processes} processes"
    return Fault(what, "raise its hard limit (ulimit -Hn)", lost=False)


def _visit(address: str, own: Arrival, seconds: float) -> None:
    with suppress(OSError):
        come(address, own, seconds)


class _Hall:
    """Who has come to process 0."""

    def __init__(self, own: Arrival) -> None:
        self._own = own
        self.came = {own.process: own}
        self.lines: dict[Line, Arrival] = {}
        self.fault: Fault | None = None
        self.fault_since = 0.0  # of time.monotonic()

    @property
    def waits(self) -> bool:
        """For those that have not come; or, after a fault, for those that are to be told."""
        there = {arrival.token for arrival in self.lines.values()}
        return self.fault is not None or len(there) < self._own.processes

    def hear(self, line: Line) -> bool:
        """Takes what a connection says; False where no more is to be heard of it."""
        messages = line.receive(0)
        if messages == [] and line.begun <= LONGEST:
            return True
        if (known := self.lines.pop(line, None)) is not None:  # it has nothing more to say
            where = f"process {known.process} of {known.processes} on {known.host}"
            self.blame(Fault(f"{where} came and is gone: it was killed, or it crashed", "see what it said", lost=True))
            return False
        arrival = _arrival(messages)
        if arrival is None:  # a stranger
            return False
        self.lines[line] = arrival
        line.send({"host": self._own.host})
        self._compare(arrival)
        self.came.setdefault(arrival.process, arrival)
        return True

    def astray(self, address: str) -> Fault | None:
        """Where process 0 has not come to itself."""
        if any(arrival.token == self._own.token for arrival in self.lines.values()):
            return None
        what = f"process 0 is on {self._own.host}, and {address} does not lead to it"
        return Fault(what, "give all processes an address by which it is reached, from its own host, too", lost=True)

    def _compare(self, new: Arrival) -> None:
        """With those that are here already."""
        if new.processes != self._own.processes:
            self.blame(
                Fault(
                    f"process {new.process} on {new.host} is one of {new.processes}, and process 0 on {self._own.host} "
                    f"one of {self._own.processes}",
                    "start all with one number of processes",
                    lost=False,
                )
            )
        elif (other := self.came.get(new.process, new)).token != new.token:
            hosts = f"both on {new.host}" if new.host == other.host else f"on {other.host} and on {new.host}"
            what = f"process {new.process} of {new.processes} is there twice, {hosts}"
            self.blame(Fault(what, "give each process a number of its own", lost=False))

    def blame(self, fault: Fault) -> None:
        """The first fault is the one that is told: others may follow from it."""
        if self.fault is None:
            self.fault, self.fault_since = fault, time.monotonic()


def _arrival(messages: Sequence[Message] | None) -> Arrival | None:
    """None of a stranger."""
    try:
        arrival = Arrival(**(messages or [{}])[0])
        return arrival if 0 <= arrival.process < arrival.processes else None
    except TypeError:
        return None


def absence(arrivals: Sequence[Arrival | None], seconds: float, nodes: Sequence[str]) -> Fault | None:
    """Those that have not come within so many seconds; `nodes` are the hosts of the job, where they are known."""
    missing = [str(process) for process, arrival in enumerate(arrivals) if arrival is None]
    if not missing:
        return None
    hosts = list(dict.fromkeys(arrival.host for arrival in arrivals if arrival is not None))
    empty = [node for node in nodes if node not in hosts] if set(hosts) <= set(nodes) else []
    which = f"process {missing[0]} of {len(arrivals)} has"
    if len(missing) > 1:
        which = f"{len(missing)} of {len(arrivals)} processes ({_some(missing)}) have"
    where = f"none came from {_some(empty)}" if empty else f"those that came are on {_some(hosts)}"
    what = f"{which} not come within {seconds:g} s ({where})"
    return Fault(what, "see what was said there, and leave out a host that is down", lost=True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
