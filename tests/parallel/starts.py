"""Processes that connect to each other, for test_distributed.py: several for each case, forked after the imports.

Usage: python starts.py FOLDER. Member i of a case, whose host is called host{i}, writes what it says to FOLDER/CASE-i;
the exit statuses of all are printed as JSON.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import jax

from eurollm_jax.errors import UserError
from eurollm_jax.parallel import distributed
from eurollm_jax.parallel.distributed import Coordination, connect
from tests.processes import free_port

SOON, LATE, LIMIT = 3, 50, 60.0  # seconds
ELSEWHERE = "192.0.2.1"  # of a network that is reserved for documentation (RFC 5737)


def starts(process, processes, *, after=0.0, killed=None, host="localhost", seconds=SOON):
    """A member that connects as this process of so many, or is killed so many seconds after it began to."""

    def start(port):
        time.sleep(after)
        if killed is not None:
            threading.Timer(killed, os.kill, (os.getpid(), signal.SIGKILL)).start()
        connect(Coordination(f"{host}:{port}", processes, process), seconds)
        state = jax._src.distributed.global_state
        print(f"connected as {state.process_id} of {state.num_processes}")
        jax.distributed.shutdown()

    return start


def strangers(port):
    """Come by with nothing, with noise, with less than a process says, with half a line; then the last one comes."""
    while True:
        with suppress(ConnectionRefusedError):
            silent = socket.create_connection(("localhost", port))
            break
    beyond = json.dumps({"process": 7, "processes": 3, "host": "host9"}).encode() + b"\n"
    for said in (b"\xff\xfe\n", b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1}\n', b"[]\n", beyond):
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(said)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    silent.sendall(b"{")
    socket.create_connection(("localhost", port)).close()
    starts(2, 3, seconds=LATE)(port)


def listens(port):
    with socket.create_server(("", port)):
        time.sleep(3)


CASES = {
    "all": [starts(0, 3, after=1, seconds=LATE), starts(1, 3, seconds=LATE), starts(2, 3, seconds=LATE)],
    "one absent": [starts(0, 3), starts(1, 3)],
    "two absent": [starts(0, 4), starts(2, 4)],
    "first absent": [starts(1, 3), starts(2, 3)],
    "twice": [starts(0, 3), starts(1, 3), starts(1, 3)],
    "first twice": [starts(0, 3), starts(0, 3, after=1), starts(1, 3)],
    "other count": [starts(0, 3), starts(1, 3), starts(5, 6)],
    "strangers": [starts(0, 3, seconds=LATE), starts(1, 3, seconds=LATE), strangers],
    "gone": [starts(0, 4), starts(1, 4), starts(2, 4, killed=1)],
    "first gone": [starts(0, 3, killed=1), starts(1, 3)],
    "elsewhere": [starts(0, 2, host=ELSEWHERE), starts(1, 2, host=ELSEWHERE)],
    "taken": [listens, starts(0, 2, after=0.5)],
}


def process(act, port, host, said):
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    distributed.node_of = lambda environment: host
    try:
        act(port)
    except UserError as error:
        print(error)
        return error.status
    return 0


def main(folder):
    pids = {}
    for case, members in CASES.items():
        port = free_port()
        for index, act in enumerate(members):
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    status = process(act, port, f"host{index}", folder / f"{case}-{index}")
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            pids[pid] = (case, index)
    statuses = {case: [None] * len(members) for case, members in CASES.items()}
    end = time.monotonic() + LIMIT
    while pids and time.monotonic() < end:
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
    main(Path(sys.argv[1]))
