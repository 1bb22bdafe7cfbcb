"""Processes that train until they are asked to stop, for test_stopping.py; forked after the imports.

Usage: python stops.py FOLDER. Process i of a case appends what it does after each step to FOLDER/CASE-i, where the test
can watch it. Standard input ends them all.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from eurollm_jax.parallel.distributed import Coordination, connect
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.stopping import SPARE_SECONDS, Stopping, Wish

# case -> (processes, options of the process by its number)
CASES = {
    "terminated": (1, lambda _: {}),
    "signalled": (1, lambda _: {}),
    "repeated": (1, lambda _: {}),
    "insisted": (1, lambda _: {}),
    "one_of_two": (2, lambda _: {}),
    "limited": (2, lambda index: {"time_limit": SPARE_SECONDS + (4 if index else 1000)}),
    "saving": (2, lambda index: {"save_minutes": 1e-9 if index == 0 else None}),
}


def process(case, index, port, said):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes, options = CASES[case]
    connect(Coordination(f"localhost:{port}", processes, index))
    layout = Layout(MeshConfig().build())
    sharding = NamedSharding(layout.mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((4 * processes,), sharding, lambda index: jnp.ones(8)[index[0]])
    step = jax.jit(lambda x: x / x.sum(), out_shardings=sharding)
    step(x).block_until_ready()
    with said.open("a", buffering=1) as file, Stopping(layout, **options(index)) as stopping:
        for number in range(1, 100_000):
            stopping.ask()
            x = step(x)
            time.sleep(0.02)
            wish = stopping.answer()
            print(f"{number} {wish.name} {stopping.reason}", file=file)
            if wish is Wish.STOP or (case == "saving" and number == 20):
                break
            if wish is Wish.SAVE and number == 10:
                stopping.saved(0.0)
        while case == "insisted":
            time.sleep(0.1)
    if processes > 1:
        jax.distributed.shutdown()
    os._exit(0)


def main(folder):
    pids = []
    for case, (processes, _) in CASES.items():
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        for index in range(processes):
            pid = os.fork()
            if pid == 0:
                try:
                    process(case, index, port, folder / f"{case}-{index}")
                finally:
                    os._exit(99)
            pids.append(pid)
            print(f"{case}-{index} {pid}", flush=True)
    print("all", flush=True)
    sys.stdin.read()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
