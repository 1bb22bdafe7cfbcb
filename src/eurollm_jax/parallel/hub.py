"""Process 0's side of the roll call: it hears all processes, and tells all what one of them ended by."""

import json
import logging
import resource
import secrets
import select
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from eurollm_jax.errors import LostError

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0  # between two signs of life
MEET_SECONDS = 120.0  # that process 0 waits for the others at the start
LINGER_SECONDS = 5.0  # that process 0 leaves the others for their end: JAX aborts them once its service is gone
HELLO_SECONDS = 10.0  # that a new connection has to say whose it is, and process 0 to answer
HELLO_BYTES = 4096  # above what that takes
SEND_SECONDS = 10.0  # that the other end has to make room for a message

type Message = dict[str, Any]


class Line:
    """Messages over a socket, a line of JSON each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_SECONDS)
        self._connection, self._unread, self._sending = connection, b"", threading.Lock()
        self._poll = select.poll()  # select() itself knows no file beyond the thousandth
        self._poll.register(connection, select.POLLIN)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def send(self, message: Message) -> None:
        """To one that is gone, nothing: that is noticed where its answer is awaited."""
        with self._sending, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    @property
    def begun(self) -> int:
        """Bytes of a message whose end is still to come."""
        return len(self._unread)

    def answers(self, seconds: float) -> bool:
        """Whether something comes within so many seconds, which is then still to be received."""
        return bool(self._poll.poll(1000 * seconds)) and bool(self._connection.recv(1, socket.MSG_PEEK))

    def receive(self, seconds: float) -> list[Message] | None:
        """The messages that have come, after at most so many seconds of waiting; None once the other end is gone, or
        speaks otherwise."""
        try:
            if not self._poll.poll(1000 * seconds):
                return []
            part = self._connection.recv(1 << 16)
            *lines, self._unread = (self._unread + part).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if part and all(isinstance(message, dict) for message in messages) else None


@dataclass
class _Member:
    """What process 0 knows of a process."""

    line: Line
    host: str
    phase: str = "starting"
    since: float = field(default_factory=time.monotonic)  # that it is there
    heard: float = field(default_factory=time.monotonic)
    done: bool = False
    gone: bool = False
    failed: Message | None = None


class Hub:
    """Process 0's thread that hears all processes, and its own, and tells all what one of them ended by."""

    def __init__(self, processes: int, silence: float, own: Line) -> None:
        self._processes, self._silence, self._token = processes, silence, secrets.token_hex(16)
        self._server = listening(0, processes)
        self._members = {0: _Member(own, socket.gethostname())}
        self._judged: Message | None = None
        self._closed = threading.Event()

    def invitation(self, coordinator: str) -> Message:
        """Where the others find this process: first by the name that JAX has found it by."""
        hosts = dict.fromkeys((coordinator.rpartition(":")[0].strip("[]"), socket.gethostname(), _address()))
        return {
            "host": socket.gethostname(),
            "hosts": list(hosts),
            "port": self._server.getsockname()[1],
            "token": self._token,
        }

    def start(self) -> None:
        threading.Thread(target=self._run, name="roll call of all", daemon=True).start()

    def linger(self) -> None:
        """Until all other processes have ended, or have had the time to."""
        self._closed.wait(LINGER_SECONDS)

    def _run(self) -> None:
        try:
            if self._watch():
                self._tell({"done": True})
        except Exception:  # a defect of ours: the others would find this process gone
            log.exception("process 0 does not watch the others any more")
        self._server.close()
        self._closed.set()

    def _watch(self) -> bool:
        """Until all are done: True; or until the others have ended after a verdict: False."""
        began = beat = time.monotonic()
        unknown: dict[Line, float] = {}  # until when they may say whose they are
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._members[0].line, selectors.EVENT_READ, 0)
            while True:
                for key, _ in selector.select(BEAT_SECONDS):
                    if key.fileobj is self._server:
                        with suppress(OSError):  # gone already
                            line = Line(self._server.accept()[0])
                            selector.register(line, selectors.EVENT_READ, None)
                            unknown[line] = time.monotonic() + HELLO_SECONDS
                    elif isinstance(key.fileobj, Line) and key.data is None:
                        messages = key.fileobj.receive(0)
                        if messages == [] and key.fileobj.begun <= HELLO_BYTES:
                            continue  # the rest is under way
                        del unknown[key.fileobj]
                        selector.unregister(key.fileobj)
                        joined = self._admitted(key.fileobj, messages)
                        if joined is None:
                            key.fileobj.close()
                        else:
                            selector.register(key.fileobj, selectors.EVENT_READ, joined)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                for line in [line for line, until in unknown.items() if until < time.monotonic()]:
                    del unknown[line]
                    selector.unregister(line)
                    line.close()
                if self._judged is None and (verdict := self._verdict(time.monotonic() - began)) is not None:
                    self._judged = verdict
                    self._tell(verdict)
                all_here = len(self._members) == self._processes
                if self._judged and all_here and all(self._members[i].gone for i in range(1, self._processes)):
                    return False
                if all_here and all(member.done for member in self._members.values()):
                    return True
                if (now := time.monotonic()) >= beat + BEAT_SECONDS:
                    self._tell({"beat": True})
                    beat = now

    def _admitted(self, line: Line, messages: list[Message] | None) -> int | None:
        """The number of the process that has come; None for a stranger, who does not know the word."""
        hello = next(iter(messages or []), {})
        if not secrets.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            return None
        line.send({"beat": True})
        if self._judged is not None:  # too late for it
            line.send(self._judged)
        self._members[hello["process"]] = _Member(line, hello["host"])
        return int(hello["process"])

    def _hear(self, index: int) -> bool:
        """Whether the process is still there."""
        member = self._members[index]
        messages = member.line.receive(0)
        if messages is None:
            member.gone = True
            return False
        member.heard = time.monotonic()
        for message in messages:
            member.done |= "done" in message
            if "fail" in message and member.failed is None:
                member.failed = message
            if message.get("phase", member.phase) != member.phase:
                member.phase, member.since = message["phase"], member.heard
        return True

    def _verdict(self, age: float) -> Message | None:
        """What the run ends by, if it does: the first to fail, else one that is gone, else one that is silent."""
        now = time.monotonic()
        for index, member in self._members.items():
            if member.failed is not None:
                hang = member.failed["hang"]
                said = f"{self._name(index)}: {member.failed['fail']}" + (f" Now {self._phases()}" if hang else "")
                return {"verdict": said, "status": member.failed["status"], "hang": hang}
        for index, member in self._members.items():
            if member.gone and not member.done:
                return _lost(f"{self._name(index)} is gone: it was killed, or it crashed; it was at: {member.phase}.")
            silent = now - member.heard
            if silent > max(self._silence, 2 * BEAT_SECONDS):
                said = f"{self._name(index)} has not answered for {silent:.0f} s, at: {member.phase}"
                return _lost(f"{said}; it is stopped, its host is down, or a file system holds it up.")
        missing = [index for index in range(self._processes) if index not in self._members]
        if missing and age > MEET_SECONDS:
            return _lost(f"process {', '.join(map(str, missing))} has not come within {MEET_SECONDS:.0f} s.")
        return None

    def _name(self, index: int) -> str:
        return f"process {index} of {self._processes} on {self._members[index].host}"

    def _phases(self) -> str:
        """Where all processes stand, those at the same place together, and since when."""
        places: dict[str, list[str]] = {}
        now = time.monotonic()
        for index, member in sorted(self._members.items()):
            places.setdefault(member.phase, []).append(f"{index} ({now - member.since:.0f} s)")
        return "; ".join(f"at {phase}: process {', '.join(there)}" for phase, there in places.items()) + "."

    def _tell(self, message: Message) -> None:
        for member in self._members.values():
            member.line.send(message)


def connected(invitation: Message, hello: Message) -> Line | None:
    """The way to process 0, over the first of its names that leads there."""
    hello |= {"token": invitation["token"], "host": socket.gethostname()}
    for host in invitation["hosts"]:
        with suppress(OSError, ValueError):
            line = Line(socket.create_connection((host, invitation["port"]), timeout=SEND_SECONDS))
            line.send(hello)
            if line.answers(HELLO_SECONDS):
                return line
            line.close()
    return None


def listening(port: int, processes: int) -> socket.socket:
    """At a port, 0 for one that the system chooses, for so many processes."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # each process is one, and a usual limit is 1024
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=processes)
    return socket.create_server(("", port), backlog=processes)


def _address() -> str:
    """Of this host, as seen from outside; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of a network that is reserved for documentation (RFC 5737)
        return str(probe.getsockname()[0])
    return "localhost"


def _lost(line: str) -> Message:
    return {"verdict": line, "status": LostError.status, "hang": False}
