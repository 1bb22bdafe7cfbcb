"""XLA's flags and its share of memory for each backend: where scripts, plans and the doctor find them.

They are environment variables of a job, which its script shows, and not set by the library: a process that changes how
its own compiler works is hard to reproduce.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from eurollm_jax.parallel.hardware import Backend


@dataclass(frozen=True)
class Flag:
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


FRACTION_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEMORY_FRACTION = 0.9  # of a GPU's memory that JAX takes at its start in our jobs; the rest is for NCCL or RCCL
JAX_FRACTION = 0.75  # and what it takes unless told otherwise: https://docs.jax.dev/en/latest/201/gpu-memory.html

OVERLAP = Flag(
    "xla_gpu_enable_latency_hiding_scheduler",
    "true",
    "gathers of weights and reductions of gradients run beside products",
)
NO_COMMAND_BUFFERS = Flag(
    "xla_gpu_enable_command_buffer",
    "",
    "a loop that is replayed as a HIP graph has ended with a segmentation fault (https://github.com/openxla/xla/issues/46952)",
)

FLAGS: Mapping[Backend, tuple[Flag, ...]] = {"cpu": (), "cuda": (OVERLAP,), "rocm": (OVERLAP, NO_COMMAND_BUFFERS)}


def xla_flags(backend: Backend) -> str:
    """What XLA_FLAGS is set to."""
    return " ".join(map(str, FLAGS[backend]))
