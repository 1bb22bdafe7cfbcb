"""Whether all processes of a run live: where one fails, is killed or falls silent, all end, and all say which one.

A collective that waits for a process that is gone waits for ever, or fails with a network error that names nobody. So
every process keeps a connection to process 0, beside JAX's own. A process whose connection the kernel closes is gone:
that is known at once, and for certain. One that keeps it open and says nothing is stopped, or its host is down. Process
0 decides which it was and tells all; where process 0 is the one, each of the others finds that out by itself.

JAX's own service would notice a silent process after a minute, and abort without its name. It is there before any
device is, and serves to exchange the address (its client is not public in JAX: a test guards what is used of it).
"""

import ctypes
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Self

import jax

from eurollm_jax.errors import LostError, StoppedError, UserError
from eurollm_jax.parallel.hub import BEAT_SECONDS, LINGER_SECONDS, MEET_SECONDS, Hub, Line, connected

log = logging.getLogger(__name__)

SILENCE_SECONDS = 120.0  # above what a compiler, a library, or a file system that fails over may hold the interpreter
CULPRIT_SECONDS = 5.0  # that a process waits for another's name, whose own error may follow from that one's end
HOOK_SECONDS = 4.0  # that the stacks, and the note of the end, may take: the run's file system may be what hangs
WRITE_SECONDS = 0.1  # that a line may take which another thread writes
FORCE_SECONDS = 10.0  # after which a process ends, said or not: sooner than JAX aborts it, which process 0's end begins

# The beginning of what XLA says, which jit raises as a ValueError, too.
_OF_XLA = re.compile("(UNKNOWN|INTERNAL|ABORTED|CANCELLED|UNAVAILABLE|DEADLINE_EXCEEDED): ")
_calls = itertools.count()


class RollCall:
    """`with RollCall() as roll:` around all that several processes do together; nothing where there is one.

    An exception that leaves the block ends every process with one line and one status: that of errors.py, and 76 where
    a process was lost. The block does not return then, since the interpreter's ordinary end would wait minutes for the
    others. A block that ends well, or by StoppedError, which all raise after the same step, waits for the others'.
    """

    def __init__(self, silence: float = SILENCE_SECONDS) -> None:
        self.on_hang: Callable[[], object] = lambda: None
        """Called before this process is ended because it, or another one, makes no progress."""
        self.on_end: Callable[[str], object] = lambda line: None
        """Called before this process is ended by an error or a loss, with the line that says which."""
        self._silence = silence
        self._phase = "starting"
        self._hub: Hub | None = None  # of process 0
        self._line: Line | None = None  # to the hub; None in a single process
        self._host_of_hub = ""
        self._all_done = threading.Event()
        self._ending = threading.Event()
        self._leaving = threading.Lock()  # never released: who comes second waits for the end

    def __enter__(self) -> Self:
        if jax.distributed.is_initialized() and _jax_state().num_processes > 1:
            self._join(f"eurollm/roll_call/{next(_calls)}")
            threading.Thread(target=self._listen, name="roll call", daemon=True).start()
            _delay_aborts()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._line is None:
            return
        if error is None or isinstance(error, StoppedError):
            self._line.send({"done": True})
            self._all_done.wait()
            _abort_at_once()
            return
        if _may_follow_from_another(error):
            self._ending.wait(CULPRIT_SECONDS)
        if self._ending.is_set():  # another's error or end is why; the thread that knows ends this process
            time.sleep(FORCE_SECONDS + 2 * LINGER_SECONDS)
        reason, status = _reason_and_status(error)
        if not isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            _end_by_force(status, FORCE_SECONDS + 2 * LINGER_SECONDS)
            traceback.print_exception(error)
        self._fail(reason, status)

    def phase(self, name: str) -> None:
        """What this process does from now on; told where one of them makes no progress."""
        self._phase = name

    def hang(self, reason: str) -> NoReturn:
        """Ends all processes, since this one makes no progress."""
        if self._line is None:
            self._leave(reason, LostError.status, hang=True)
        self._fail(reason, LostError.status, hang=True)

    def _join(self, key: str) -> None:
        state = _jax_state()
        if state.process_id == 0:
            mine, its = socket.socketpair()
            self._hub = Hub(state.num_processes, self._silence, Line(its))
            state.client.key_value_set(key, json.dumps(self._hub.invitation(state.coordinator_address)))
            self._line, self._host_of_hub = Line(mine), socket.gethostname()
            self._hub.start()
        else:
            try:
                invitation = json.loads(state.client.blocking_key_value_get(key, int(1000 * MEET_SECONDS)))
            except jax.errors.JaxRuntimeError:
                self._leave(f"process 0 has not come within {MEET_SECONDS:.0f} s: see what it says.", LostError.status)
            self._line, self._host_of_hub = connected(invitation, {"process": state.process_id}), invitation["host"]
            if self._line is None:
                hosts = " or ".join(invitation["hosts"])
                self._leave(
                    f"process {state.process_id} cannot reach process 0 at port {invitation['port']} of {hosts}: let "
                    "the hosts of a job connect to each other at any port.",
                    UserError.status,
                )

    def _listen(self) -> None:
        """In a thread: says that this process lives and what it does, and hears of the others."""
        assert self._line is not None
        heard = time.monotonic()
        next_beat = heard
        while True:
            if (now := time.monotonic()) >= next_beat:
                self._line.send({"phase": self._phase})
                next_beat = now + BEAT_SECONDS
            messages = self._line.receive(next_beat - now)
            if messages is None:
                self._leave(
                    f"process 0 on {self._host_of_hub} is gone: it was killed, or it crashed.", LostError.status
                )
            if messages:
                heard = time.monotonic()
            for message in messages:
                if "verdict" in message:
                    self._leave(message["verdict"], message["status"], hang=message["hang"])
                if "done" in message:
                    self._all_done.set()
                    return
            silent = time.monotonic() - heard
            if silent > max(self._silence, 2 * BEAT_SECONDS):
                said = f"process 0 on {self._host_of_hub} has not answered for {silent:.0f} s"
                self._leave(f"{said}; it is stopped, its host is down, or a file system holds it up.", LostError.status)

    def _fail(self, reason: str, status: int, *, hang: bool = False) -> NoReturn:
        """Tells process 0, whose verdict ends all, this one too."""
        assert self._line is not None
        self._line.send({"fail": reason, "status": status, "hang": hang})
        time.sleep(LINGER_SECONDS)
        self._leave(reason, status, hang=hang)

    def _leave(self, line: str, status: int, *, hang: bool = False) -> NoReturn:
        self._leaving.acquire()
        self._ending.set()
        _end_by_force(status, FORCE_SECONDS + (LINGER_SECONDS if self._hub is not None else 0))
        if hang:
            _call(self.on_hang)
        _call(lambda: self.on_end(line))
        if self._hub is not None:
            self._hub.linger()
        end_process(line, status)


def _reason_and_status(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted from the keyboard.", 130
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}.", error.code if isinstance(error.code, int) else 1
    said = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {said[:500]} (its own output has the traceback).", 1


def _may_follow_from_another(error: BaseException) -> bool:
    """Whether it may be what this process saw of another one's end: a collective or a barrier that failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError) or _OF_XLA.match(str(cause)):
            return "RESOURCE_EXHAUSTED" not in str(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def end_process(line: str, status: int) -> NoReturn:
    """Says why, and ends this process now: what the interpreter does at its end would wait for the other processes."""
    _end_by_force(status, FORCE_SECONDS)
    _last_word(line)
    log.critical("%s", line)  # to files alone
    for flushed in (*logging.getLogger().handlers, *logging.getLogger("eurollm_jax").handlers, sys.stdout):
        with suppress(Exception):
            flushed.flush()
    os._exit(status)


def _last_word(line: str) -> None:
    """On standard error, where nothing follows: JAX's threads log what they see of an end for as long as they run."""
    stderr = 2
    with suppress(OSError):  # no more files
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(WRITE_SECONDS)
    with suppress(OSError):
        os.write(stderr, f"{line}\n".encode(errors="backslashreplace"))


def _end_by_force(status: int, seconds: float) -> None:
    """Ends this process after so long, whatever blocks until then: a log's lock, a full pipe, the run's file system."""

    def wait_and_end() -> None:
        time.sleep(seconds)
        os._exit(status)

    with suppress(RuntimeError):  # no more threads
        threading.Thread(target=wait_and_end, name="end", daemon=True).start()


def _call(hook: Callable[[], object]) -> None:
    """For so long that the rest still has its time."""

    def call() -> None:
        with suppress(Exception):
            hook()

    with suppress(RuntimeError):
        called = threading.Thread(target=call, name="at the end", daemon=True)
        called.start()
        called.join(HOOK_SECONDS)


def _delay_aborts() -> None:
    """Where process 0 is gone, JAX's client aborts at once, faster than that can be said. So whoever aborts sleeps
    before: the C library's `sleep` handles the signal, and takes its number, 6, for the seconds."""
    _handle_aborts(ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p))


def _abort_at_once() -> None:
    _handle_aborts(ctypes.c_void_p(signal.SIG_DFL))


def _handle_aborts(handler: ctypes.c_void_p) -> None:
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, handler)


def _jax_state() -> Any:
    from jax._src import distributed

    return distributed.global_state
