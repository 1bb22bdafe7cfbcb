"""Processes that call the roll, for test_liveness.py: several at once for each case, forked after the imports.

Usage: python roll_calls.py FOLDER CASE ... Process i of a case writes what it says to FOLDER/CASE-i; the exit statuses
of all are printed as JSON, None for one that was stopped and stays so.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.parallel import hub, liveness
from eurollm_jax.parallel.distributed import Coordination, connect, gathered
from eurollm_jax.parallel.liveness import RollCall

PROCESSES = 3
LIMIT = 100.0


def fine(index, roll):
    time.sleep(index)


def asked_to_stop(index, roll):
    time.sleep(index)
    raise StoppedError("all is saved.")


def user_error(index, roll):
    if index == 1:
        raise UserError("store/de line 7 is damaged: prepare it again.")
    time.sleep(LIMIT)


def defect(index, roll):
    if index == 0:
        raise ValueError("no such thing")
    time.sleep(LIMIT)


def killed(index, roll):
    roll.phase("step 12")
    time.sleep(5)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT)


def first_killed(index, roll):
    time.sleep(1)
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT)


def killed_in_a_collective(index, roll):
    gathered(np.int32(index))
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    gathered(np.int32(index))
    time.sleep(LIMIT)


def killed_while_another_fails(index, roll):
    """What jit raises where the other end of a collective is gone is no JaxRuntimeError."""
    time.sleep(1)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")


def stopped(index, roll):
    if index == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LIMIT)


def first_stopped(index, roll):
    time.sleep(1)
    if index == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LIMIT)


def hangs(index, roll):
    roll.on_hang = lambda: print(f"the stacks of {index}", file=sys.stderr)
    roll.phase("saving" if index == 1 else "step 12")
    time.sleep(5)
    if index == 2:
        roll.hang("no progress for 30 minutes.")
    time.sleep(LIMIT)


def cannot_say(index, roll):
    """All note the end; where the lock of the log is taken, that is all that is left to do."""
    roll.on_end = lambda line: print(f"noted: {line}", file=sys.stderr)
    if index == 1:
        logging.getLogger().handlers[0].acquire()
    time.sleep(2)
    if index == 2:
        raise UserError("store/de line 7 is damaged: prepare it again.")
    time.sleep(LIMIT)


def noisy(index, roll):
    """From when a process knows of the end, a thread writes as JAX's do; the run's log is on a slow file system."""

    class Slow(logging.Handler):
        def emit(self, record):
            time.sleep(0.3)

    def write():
        roll._ending.wait()
        while True:
            os.write(2, b"noise\n")
            time.sleep(0.001)

    logging.getLogger("eurollm_jax").addHandler(Slow())
    threading.Thread(target=write, daemon=True).start()
    user_error(index, roll)


def absent(index, roll):
    time.sleep(LIMIT)


def strangers(index, roll):
    """Come by with nothing, with noise, with somebody else's word, and stay or go."""
    if index == 0:
        for said in (b"", b"\xff\xfe\n", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "?", "process": 1}\n', b"[]\n", b"{"):
            with socket.create_connection(("localhost", port_of(roll))) as stranger:
                stranger.sendall(said)
                time.sleep(0.1)
        with socket.create_connection(("localhost", port_of(roll))) as endless, suppress(OSError):
            while True:  # until it is closed
                endless.sendall(b"?" * hub.HELLO_BYTES)
        silent = socket.create_connection(("localhost", port_of(roll)))
    time.sleep(3)
    if index == 0:
        assert silent.recv(1) == b""  # has had its time


def in_two_parts(index, roll):
    time.sleep(3)


def port_of(roll):
    return roll._hub._server.getsockname()[1]


CASES = {act.__name__: act for act in (fine, asked_to_stop, user_error, defect, killed, first_killed)}
CASES |= {
    act.__name__: act
    for act in (killed_in_a_collective, killed_while_another_fails, stopped, first_stopped, hangs, cannot_say)
}


CASES |= {act.__name__: act for act in (noisy, absent, strangers, in_two_parts)}


class InTwoParts(hub.Line):
    def send(self, message):
        text = json.dumps(message).encode() + b"\n"
        for part in (text[:20], text[20:]):
            self._connection.sendall(part)
            time.sleep(0.5)


def process(case, index, port, said):
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if case == "absent":
        hub.MEET_SECONDS = 3.0
    if case == "strangers":
        hub.HELLO_SECONDS = 2.0
    if case == "in_two_parts" and index:
        hub.Line = InTwoParts
    liveness.FORCE_SECONDS = 8.0
    connect(Coordination(f"localhost:{port}", PROCESSES, index))
    if case == "absent" and index == 2:
        time.sleep(LIMIT)
    silence = 8.0 if "stopped" in case else 60.0
    try:
        with RollCall(silence) as roll:
            CASES[case](index, roll)
    except StoppedError as error:
        print(f"{error} after {index} s", file=sys.stderr)
        jax.distributed.shutdown()
        os._exit(error.status)
    print("went on", file=sys.stderr)
    jax.distributed.shutdown()
    os._exit(0)


def main(folder, cases):
    pids = {}
    for case in cases:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        for index in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                try:
                    process(case, index, port, folder / f"{case}-{index}")
                finally:
                    os._exit(99)
            pids[pid] = (case, index)
    statuses = {case: [None] * PROCESSES for case in cases}
    end = time.monotonic() + LIMIT
    stay = {("stopped", 2), ("first_stopped", 0), ("absent", 2)}
    while any(member not in stay for member in pids.values()) and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            case, index = pids.pop(pid)
            statuses[case][index] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
