"""How a process was started: what Slurm and Open MPI tell it of its job, in their variables.

Nothing here imports jax: the doctor asks before it knows whether jax can be imported.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from typing import Literal

type Launcher = Literal["ompi", "slurm"]  # by JAX's names

VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # set by launchers and schedulers
PORTS, FIRST_PORT = 1 << 12, 65536 - (1 << 12)  # of which JAX takes one by the number of the job
_NODES = r"[^,\[\]]+(?:\[[\d,-]+\])?"  # nid007, nid[001-003,007]


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """What has started this process as one of several."""
    if _number(environment, "OMPI_COMM_WORLD_SIZE", default=1) > 1:
        return "ompi"  # first, for its processes have Slurm's variables of the one that began it
    if "SLURM_STEP_NODELIST" not in environment:
        return None  # a shell in an allocation of several tasks is one process
    return "slurm" if _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1) > 1 else None


def started_as(environment: Mapping[str, str]) -> tuple[int, int]:
    """(process, processes); (0, 1) for a process that no launcher started."""
    match launcher_of(environment):
        case "ompi":
            return _number(environment, "OMPI_COMM_WORLD_RANK"), _number(environment, "OMPI_COMM_WORLD_SIZE")
        case "slurm":
            processes = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
            return _number(environment, "SLURM_PROCID"), processes
        case None:
            return 0, 1


def address_of(environment: Mapping[str, str]) -> str | None:
    """Process 0's host:port as JAX finds them; None where that is unknown, as for Open MPI 5 and later."""
    if given := environment.get("JAX_COORDINATOR_ADDRESS"):
        return given
    launcher = launcher_of(environment)
    if launcher == "ompi":
        uri = re.match(r"(\d+)\..*?tcp6?://\[?([^,:\]]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
        if uri is None:
            return None
        host, job = uri[2], int(uri[1]) // PORTS
    elif launcher == "slurm" and environment.get("SLURM_JOB_ID", "").isdigit():
        first = re.match(r"([^,\[]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"])
        if first is None:
            return None
        host, job = first[1] + (first[2] or ""), int(environment["SLURM_JOB_ID"])
    else:
        return None
    return f"{host}:{environment.get('JAX_COORDINATOR_PORT') or job % PORTS + FIRST_PORT}"


def bound_to(environment: Mapping[str, str]) -> str | None:
    """The host:port at which JAX's service is to listen where that is not the address by which it is reached."""
    return environment.get("JAX_COORDINATOR_BIND_ADDRESS") or None


def own_devices(environment: Mapping[str, str]) -> Sequence[int]:
    """Which of the devices that a process sees are its own: none named are all of them.

    JAX would take the one that has the process's number on its host, for one task a node the first of many, and for
    tasks that each see a single device one that is not there.
    """
    here = _number(
        environment, "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", default=1
    )
    own = local_number(environment)
    seen = next((len(environment[name].split(",")) for name in VISIBLE if environment.get(name)), here)
    share = seen // here
    return () if here == 1 or share == 0 or seen == 1 else range(own * share, (own + 1) * share)


def local_number(environment: Mapping[str, str]) -> int:
    """Which process of its host this one is, as its launcher says; 0 where none does."""
    return _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def several_nodes(environment: Mapping[str, str]) -> bool:
    """Whether the launcher has started processes on more hosts than this one."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        here = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1)
        return _number(environment, "OMPI_COMM_WORLD_SIZE", default=1) > here
    return _number(environment, "SLURM_STEP_NUM_NODES", default=1) > 1


def node_of(environment: Mapping[str, str]) -> str:
    """This host, by the name that Slurm has for it where it has started this process."""
    node = environment.get("SLURMD_NODENAME") if launcher_of(environment) == "slurm" else None
    return node or socket.gethostname()


def nodes_of(environment: Mapping[str, str]) -> Sequence[str]:
    """The hosts of the Slurm step that this process belongs to; none where there is no step, or its list is of another
    form than nid[001-003,007],login1."""
    listed = environment.get("SLURM_STEP_NODELIST", "") if launcher_of(environment) == "slurm" else ""
    if not re.fullmatch(f"{_NODES}(?:,{_NODES})*", listed):
        return ()
    return [node for part in re.findall(_NODES, listed) for node in _expanded(part)]


def _expanded(nodes: str) -> Sequence[str]:
    """nid[001-003,007] -> nid001, nid002, nid003, nid007"""
    prefix, _, ranges = nodes.rstrip("]").partition("[")
    if not ranges:
        return [prefix]
    bounds = [part.partition("-")[::2] for part in ranges.split(",")]
    return [
        f"{prefix}{number:0{len(first)}d}"
        for first, last in bounds
        for number in range(int(first), int(last or first) + 1)
    ]


def _number(environment: Mapping[str, str], *names: str, default: int = 0) -> int:
    """What the first of these that is there begins with: Slurm writes 4(x2) for 4 tasks on each of 2 nodes."""
    found = next((environment[name] for name in names if name in environment), "")
    digits = re.match(r"\d+", found)
    return int(digits[0]) if digits else default
