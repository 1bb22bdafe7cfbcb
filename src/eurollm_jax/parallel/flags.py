"""XLA's flags for each backend, with the reason for each: the one place from which job scripts and containers take them.

They are environment variables of a job, which its script shows, and not set by the library: a process that changes how its
own compiler works is hard to reproduce.
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
