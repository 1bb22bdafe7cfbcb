"""Several processes that are one run: how they find each other, and how they agree.

Every process executes the same program over the global mesh and calls what is here in the same order. Process 0 writes
what a run has once: records, metrics, evaluations. All of it holds for one process, too, where nothing is sent.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from eurollm_jax.errors import LostError, UserError
from eurollm_jax.parallel.launcher import address_of, bound_to, launcher_of, node_of, nodes_of, own_devices, started_as
from eurollm_jax.parallel.rendezvous import (
    SERVICE_SECONDS,
    START_SECONDS,
    Arrival,
    Fault,
    absence,
    come,
    divided,
    receive,
    wait_for_service,
)

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
        divided(self.address)


def connect(by_hand: Coordination | None = None, seconds: int = START_SECONDS) -> None:
    """Joins this process to the others of its job; call it before any device is used.

    Without `by_hand`, an Open MPI launch or a Slurm step of several tasks is recognised by its variables; everything
    else is one process. A process uses all devices that it sees, or its share of them where it has others beside it on
    its host. They are waited for so many `seconds`. Where one does not come, LostError names it in all that do;
    UserError is raised where another start would go no better.
    """
    launcher = None if by_hand is not None else launcher_of(os.environ)
    if launcher is None and (by_hand is None or by_hand.processes == 1):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which training/stopping.py does
    options: dict[str, Any] = {} if by_hand is not None else {"local_device_ids": own_devices(os.environ)}
    if (place := by_hand or _launched()) is None:
        options["cluster_detection_method"] = launcher
    else:
        _meet(place, seconds)
        options["cluster_detection_method"] = "deactivate"
        options |= {
            "coordinator_address": place.address,
            "num_processes": place.processes,
            "process_id": place.index,
        }
    try:
        jax.distributed.initialize(
            initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **options
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this run do not find each other ({str(error).splitlines()[0]}): check that all were "
            "started, with one address, and that the network lets them through."
        ) from error


def _launched() -> Coordination | None:
    """This process's place as its launcher tells it; None where the address of process 0 is not known beforehand."""
    address, (process, processes) = address_of(os.environ), started_as(os.environ)
    return None if address is None else Coordination(address, processes, process)


def _meet(place: Coordination, seconds: float) -> None:
    """Until all processes have come to process 0; where they do not, all that have raise the same error."""
    own = Arrival(place.index, place.processes, node_of(os.environ))

    def judge(arrivals: Sequence[Arrival | None], fault: Fault | None) -> Mapping[str, Any]:
        found = fault or absence(arrivals, seconds, nodes_of(os.environ))
        return {} if found is None else {"error": f"{found.what}: {found.remedy}.", "lost": found.lost}

    try:
        if own.process:
            verdict = come(place.address, own, seconds)
        else:
            verdict = receive(place.address, own, seconds, judge, bound=bound_to(os.environ))
        if own.process and not verdict:
            wait_for_service(place.address, min(seconds, SERVICE_SECONDS))
    except ConnectionError as error:
        raise LostError(
            f"{error}: see what process 0 says, and whether its host is reached from {own.host}."
        ) from error
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {place.address} on {own.host} ({os.strerror(error.errno or 0).lower()}): end "
            "what listens there, or choose another port."
        ) from error
    if verdict:
        raise (LostError if verdict["lost"] else UserError)(verdict["error"])


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
