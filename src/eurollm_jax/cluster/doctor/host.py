"""What a node gives a process: drivers, variables, limits, network interfaces. Nothing here needs jax."""

import ctypes
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from eurollm_jax.cluster.doctor.finding import Finding, failed, passed, unchecked, warned
from eurollm_jax.cluster.site import Site
from eurollm_jax.parallel.hardware import Backend

# The oldest driver that runs programs of a CUDA release by NVIDIA's rule of minor-version compatibility:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER: Mapping[int, int] = {12: 525, 13: 580}
# Libraries in front of an older driver's, for GPUs of data centers, in packages cuda-compat-MAJOR-MINOR:
FORWARD = "https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html"
IN_USE = 2 << 30  # bytes of a device's memory before we begin, above which another program computes there
FILES = 4096  # that one process may open: process 0 keeps a connection to each of the others
SOCKET_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
QUERY_SECONDS = 30


def driver(
    expected: Backend | None, cuda: int | None, root: Path = Path("/"), libcuda: str = "libcuda.so.1"
) -> list[Finding]:
    """The kernel's driver of the accelerators; `cuda` is the release that jax's plug-in is built for, and `libcuda`
    the library of the driver's that programs load, which may be newer than the kernel's part."""
    nvidia, amd = nvidia_driver(root), amd_driver(root)
    there = [f"NVIDIA {nvidia}"] * bool(nvidia) + [f"amdgpu {amd}"] * bool(amd)
    if expected == "cuda" and nvidia is None:
        remedy = "ask the scheduler for a GPU; in a container, start it with --nv"
        return [failed("driver", f"no NVIDIA driver on this host{', but ' + there[0] if there else ''}", remedy)]
    if expected == "rocm" and amd is None:
        remedy = "ask the scheduler for a GPU; in a container, bind /dev/kfd and /dev/dri (or --rocm)"
        return [failed("driver", f"no AMD driver on this host{', but ' + there[0] if there else ''}", remedy)]
    oldest = OLDEST_DRIVER.get(cuda) if cuda is not None else None
    if nvidia and cuda and oldest and int(nvidia.partition(".")[0]) < oldest:
        if (library_release(libcuda) or 0) >= cuda:
            seen = f"NVIDIA {nvidia}, with forward-compatibility libraries for CUDA {cuda}"
            return [passed("driver", seen)]
        return [
            failed(
                "driver",
                f"NVIDIA {nvidia}; jax's plug-in is built for CUDA {cuda}, which needs {oldest} or newer",
                f"a driver of series {oldest} or newer, which the site installs; on GPUs of data centers a container"
                f" with NVIDIA's forward-compatibility libraries (cuda-compat-{cuda}-*) may do: {FORWARD}",
            )
        ]
    return [passed("driver", ", ".join(there) or "none: no accelerator")]


def library_release(libcuda: str) -> int | None:
    """The newest major release of CUDA that the driver's library speaks, as it says; None without one."""
    release = ctypes.c_int(0)
    try:
        status = ctypes.CDLL(libcuda).cuDriverGetVersion(ctypes.byref(release))
    except (OSError, AttributeError):
        return None
    return release.value // 1000 if status == 0 else None


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Its version, such as 580.65.06; None without one. The kernel says it where it is loaded, or nvidia-smi does."""
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(root / "proc/driver/nvidia/version"))
    if found:
        return found[1]
    rows = nvidia_smi("driver_version") if root == Path("/") else []
    return rows[0][0] if rows else None


def amd_driver(root: Path = Path("/")) -> str | None:
    """Its version; "of the kernel" where it is the kernel's own, which has none; None without one."""
    if not (root / "dev/kfd").exists():
        return None
    return _read(root / "sys/module/amdgpu/version").strip() or "of the kernel"


def devices_in_use() -> Finding:
    """Whether other programs hold memory of this host's devices; asked before this one uses any."""
    rows = nvidia_smi("index", "memory.used")
    if not rows:
        return unchecked("devices free", "nvidia-smi is not there, or names no device")
    used = {index: int(mib) << 20 for index, mib in rows if mib.isdigit()}
    busy = [f"GPU {index} ({size / 2**30:.1f} GiB)" for index, size in used.items() if size > IN_USE]
    if busy:
        return warned(
            "devices free", f"another program holds memory of {', '.join(busy)}", "see nvidia-smi for whose it is"
        )
    return passed("devices free", f"{len(used)} GPUs, none in use")


def nvidia_smi(*fields: str) -> list[list[str]]:
    """A row for each GPU; none where the tool is not there, or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def site_variables(site: Site, environment: Mapping[str, str]) -> Finding:
    """The variables that the site's job scripts export."""
    wanted = {name: value for name, value in site.environment.items() if name != "XLA_FLAGS"}
    missing = [f"{name} is not set" for name in wanted if name not in environment]
    other = [
        f"{name}={environment[name]}, the site has {value}"
        for name, value in wanted.items()
        if name in environment and "$" not in value and environment[name] != value
    ]
    if not missing and not other:
        return passed("site's variables", f"all {len(wanted)} as in the site's profile" if wanted else "none needed")
    exports = " ".join(f"{name}={value}" for name, value in wanted.items() if environment.get(name) != value)
    return warned("site's variables", "; ".join([*missing, *other]), f"export {exports}")


def interfaces(environment: Mapping[str, str], names: Sequence[str]) -> list[Finding]:
    """Whether the network interfaces that the variables choose are among `names`, those of this host."""
    found = []
    for variable in SOCKET_VARIABLES:
        if chosen := environment.get(variable):
            found.append(_interface(variable, chosen, names))
    return found or [passed("network interfaces", f"left to the libraries; there are {', '.join(names)}")]


def interface_names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _interface(variable: str, chosen: str, names: Sequence[str]) -> Finding:
    """NCCL's rule (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html): prefixes, separated by commas;
    ^ in front of all excludes them, = in front makes them whole names."""
    excludes, exact = chosen.startswith("^"), chosen.lstrip("^").startswith("=")
    parts = [part for part in chosen.lstrip("^=").split(",") if part]
    fits = {part: [name for name in names if (name == part if exact else name.startswith(part))] for part in parts}
    if excludes:
        left = [name for name in names if not any(name in fitting for fitting in fits.values()) and name != "lo"]
        if left:
            return passed("network interfaces", f"{variable}={chosen} leaves {', '.join(left)}")
        missing = "every interface"
        return failed("network interfaces", f"{variable}={chosen} excludes {missing}", f"unset {variable}")
    none = [part for part in parts if not fits[part]]
    if not none:
        return passed("network interfaces", f"{variable}={chosen}: all there")
    seen = f"{variable}={chosen}, and this host has no {', '.join(none)} among {', '.join(names)}"
    remedy = f"name interfaces that are there in {variable}, or unset it"
    if len(none) < len(parts):
        return warned("network interfaces", seen, remedy)
    return failed("network interfaces", seen, remedy)


def limits(between_nodes: bool) -> list[Finding]:
    """How many files a process may open, and how much memory it may pin for a fabric's adapters."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    _, pinned = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files != resource.RLIM_INFINITY and files < FILES:
        opened = warned("open files", f"at most {files} a process", "raise the hard limit: ulimit -Hn 65536")
    else:
        opened = passed("open files", f"at most {files if files != resource.RLIM_INFINITY else 'unlimited'} a process")
    if pinned == resource.RLIM_INFINITY:
        return [opened, passed("pinned memory", "unlimited")]
    seen = f"at most {pinned / 2**20:.0f} MiB a process"
    if between_nodes:
        return [opened, warned("pinned memory", f"{seen}: adapters may refuse more", "ulimit -l unlimited")]
    return [opened, passed("pinned memory", f"{seen}; it matters between nodes")]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
