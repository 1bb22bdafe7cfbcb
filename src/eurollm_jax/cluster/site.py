"""Site: what a plan, a job script and the doctor must know of a machine, as plain values, each with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from eurollm_jax.parallel.hardware import Chip

type Scheduler = Literal["slurm", "none"]


@dataclass(frozen=True)
class Container:
    """How a process runs inside an image."""

    command: str  # before the program: "singularity exec --rocm"
    binds: tuple[str, ...] = ()  # paths of the host that must be seen inside, with shell variables


@dataclass(frozen=True)
class Site:
    """One machine, or one partition of it. None says that a figure is not known, and what needs it says so."""

    name: str  # that --site takes
    title: str
    chip: Chip  # with this site's own memory where it had its own made
    devices_per_node: int  # as JAX counts them
    processes_per_node: int  # tasks that a job script starts on a node; they share its devices evenly
    cores_per_node: int | None  # that a job may have
    scheduler: Scheduler
    node_memory: int | None = None  # bytes of the host's memory
    nodes: int | None = None  # that one job may have at most
    link_bandwidth: float | None = None  # bytes/s one way, from a device to the others of its node together
    network_bandwidth: float | None = None  # bytes/s one way, of a node to the network, over all its adapters
    storage_bandwidth: float | None = None  # bytes/s that one job writes to the parallel file system at best
    node_watts: float | None = None  # of a node without its devices
    pue: float | None = None  # power usage effectiveness of the building
    partition: str | None = None
    qos: str | None = None
    account: bool = False  # whether a job must name the project that pays for it
    time_limit: str | None = None  # that a job may have at most, HH:MM:SS
    options: tuple[str, ...] = ()  # further #SBATCH lines, such as "--gpus-per-node=8"
    step_options: tuple[str, ...] = ()  # further arguments of srun, such as a CPU mask
    modules: tuple[str, ...] = ()  # for `module load`
    environment: Mapping[str, str] = field(default_factory=dict)  # exported in the job script, with shell variables
    container: Container | None = None
    internet: Literal["everywhere", "login", "nowhere"] = "everywhere"
    scratch: str | None = None  # folder for runs and caches, with shell variables
    notes: tuple[str, ...] = ()  # what a user of this site must know
    sources: Mapping[str, str] = field(default_factory=dict)  # field -> where its value is from
    unverified: Mapping[str, str] = field(default_factory=dict)  # field -> why it could not be checked


def for_bash(text: str) -> str:
    """A text with shell variables between double quotes: they are replaced, and what comes of it is one word."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'
