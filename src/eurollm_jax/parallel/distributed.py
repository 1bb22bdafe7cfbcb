"""Several processes that are one run: how they find each other, and how they agree.

Every process executes the same program over the global mesh and calls what is here in the same order. Process 0 writes
what a run has once: records, metrics, evaluations. All of it holds for one process, too, where nothing is sent.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from eurollm_jax.errors import UserError

VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # set by launchers and schedulers
START_SECONDS = 300  # that processes wait for each other at the start
HEARTBEAT_SECONDS = 180  # after which JAX aborts all without a name: later than parallel/liveness.py finds out


@dataclass(frozen=True)
class Coordination:
    """Where processes meet when they are started by hand: process 0 listens at `address`, host:port."""

    address: str
    processes: int
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.processes:
            raise UserError(
                f"process {self.index} of {self.processes} is none: give --process a number from 0 to "
                f"{self.processes - 1}."
            )
        if ":" not in self.address:
            raise UserError(f"--coordinator {self.address} has no port: write it as host:port.")


def connect(by_hand: Coordination | None = None, seconds: int = START_SECONDS) -> None:
    """Joins this process to the others of its job; call it before any device is used.

    Without `by_hand`, an Open MPI launch or a Slurm step of several tasks is recognised by its variables; everything
    else is one process. A process uses all devices that it sees, or its share of them where it has others beside it on
    its host. They are waited for so many `seconds`. Raises UserError where the others cannot be reached.
    """
    launcher = None if by_hand is not None else _launcher()
    if launcher is None and (by_hand is None or by_hand.processes == 1):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which training/stopping.py does
    initialize = partial(
        jax.distributed.initialize,
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    try:
        if by_hand is not None:
            where = by_hand.address, by_hand.processes, by_hand.index
            initialize(*where, cluster_detection_method="deactivate")
        else:
            initialize(cluster_detection_method=launcher, local_device_ids=_own_devices())
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0]}): check that all were "
            "started, with one address, and that the network lets them through."
        ) from error


def _launcher() -> str | None:
    """JAX's name of what has started this process as one of several."""
    if _number("OMPI_COMM_WORLD_SIZE") > 1:  # first, for its processes have Slurm's variables of the one that began it
        return "ompi"
    if "SLURM_STEP_NODELIST" not in os.environ:
        return None  # a shell in an allocation of several tasks is one process
    return "slurm" if _number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1 else None


def _own_devices() -> Sequence[int]:
    """Which of the devices that a process sees are its own: none named are all of them.

    JAX would take the one that has the process's number on its host, for one task a node the first of many, and for
    tasks that each see a single device one that is not there.
    """
    here = _number("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    own = _number("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", default=0)
    seen = next((len(os.environ[name].split(",")) for name in VISIBLE if os.environ.get(name)), here)
    share = seen // here
    return () if here == 1 or share == 0 or seen == 1 else range(own * share, (own + 1) * share)


def _number(*names: str, default: int = 1) -> int:
    """What the first of these that is there begins with: Slurm writes 4(x2) for 4 tasks on each of 2 nodes."""
    found = next((os.environ[name] for name in names if name in os.environ), "")
    digits = re.match(r"\d+", found)
    return int(digits[0]) if digits else default


def is_first() -> bool:
    """Whether this is the process that writes what a run has once."""
    return jax.process_index() == 0


def gathered(value: Any) -> np.ndarray:
    """The values of all processes, stacked on a new first axis; all call this, with arrays of one shape and type."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.asarray(value)))


def any_process(flag: bool) -> bool:
    """Whether it is so in any process; all call this."""
    return bool(gathered(np.int32(flag)).any())


def wait_for_all(name: str) -> None:
    """Until every process is here; `name` is in the error of those that wait in vain."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def host_names() -> list[str]:
    """The machine of each process; all call this."""
    name = np.zeros(64, np.uint8)
    raw = platform.node().encode()[:64]
    name[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered(name)]


def require_same(what: str, content: Any) -> None:
    """Raises UserError where `content`, JSON-able, is not the same in all processes; all call this."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    digests = [bytes(row) for row in gathered(np.frombuffer(digest, np.uint8))]
    usual = max(digests, key=digests.count)
    if others := [str(index) for index, found in enumerate(digests) if found != usual]:
        hosts = host_names()
        raise UserError(
            f"{what} of process {', '.join(others[:8])} ({hosts[int(others[0])]}) differs from that of the others: "
            "start all processes from the same files and the same environment."
        )


def fetched(array: jax.Array) -> np.ndarray:
    """An array of the global mesh, whole, in every process; all call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
