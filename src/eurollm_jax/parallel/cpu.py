"""What JAX needs on a CPU and nowhere else."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, instead of giving it back to the kernel and fetching it again at each step.

    XLA frees a program's scratch memory whenever it has run. Faulting the pages in again took a quarter of a training
    step (docs/decisions.md). Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)
