"""What this machine's CPU can do that decides how products are computed on it."""

from functools import cache
from pathlib import Path


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has units for matrices of bfloat16 (AMX); where Linux does not tell, it has none."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
