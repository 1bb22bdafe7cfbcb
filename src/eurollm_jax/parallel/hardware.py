"""What a device can do at best, by its maker's figures: the denominators of every utilisation and of every plan.

This module does not import jax, so that job scripts can be written where it is not installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

type Backend = Literal["cpu", "cuda", "rocm"]

GB, TB = 1e9, 1e12
GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: an MI250X is two, one for each of its dies. None: not known.

    Memory is what is soldered on. A driver keeps some of it: of the A100's 40 GiB it hands out 39.5, of the H100's 80
    GiB 79.6 (81,559 MiB).
    """

    name: str
    kinds: tuple[str, ...]  # what `jax.Device.device_kind` holds of it
    backend: Backend
    bfloat16: float | None  # dense FLOP/s; makers state twice as much, for products with half of the entries zero
    memory: int | None  # bytes
    bandwidth: float | None  # bytes/s of that memory
    watts: float | None  # at most, of the device and what is on its module
    source: str


A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf"
H100 = "https://www.nvidia.com/en-us/data-center/h100/"
H100_PCIE = "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcs22/data-center/h100/PB-11133-001_v01.pdf"
H200 = "https://www.nvidia.com/en-us/data-center/h200/"
GH200 = "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"
MI250X = "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html"
MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
MI300A = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300a.html"

# More exact kinds stand before those that they contain: the first that matches is taken.
CHIPS = (
    Chip("H100 PCIe", ("H100 PCIe",), "cuda", 756e12, 80 * GIB, 2.0 * TB, 350, H100_PCIE),
    Chip("H100 NVL", ("H100 NVL",), "cuda", 835e12, 94 * GIB, 3.9 * TB, 400, H100),
    Chip("GH200", ("GH200",), "cuda", 989e12, 96 * GIB, 4.0 * TB, 1000, GH200),
    Chip("H100", ("H100",), "cuda", 989e12, 80 * GIB, 3.35 * TB, 700, H100),
    Chip("H200 NVL", ("H200 NVL",), "cuda", 835e12, 141 * GIB, 4.8 * TB, 600, H200),
    Chip("H200", ("H200",), "cuda", 989e12, 141 * GIB, 4.8 * TB, 700, H200),
    Chip("A100 40 GB", ("A100-SXM4-40GB",), "cuda", 312e12, 40 * GIB, 1.555 * TB, 400, A100),
    Chip("A100 PCIe 40 GB", ("A100-PCIE-40GB",), "cuda", 312e12, 40 * GIB, 1.555 * TB, 250, A100),
    Chip("A100 PCIe", ("A100 80GB PCIe",), "cuda", 312e12, 80 * GIB, 1.935 * TB, 300, A100),
    Chip("A100", ("A100",), "cuda", 312e12, 80 * GIB, 2.039 * TB, 400, A100),
    Chip("MI250X", ("MI250X",), "rocm", 191.5e12, 64 * GIB, 1.6384 * TB, 280, MI250X),
    Chip("MI300X", ("MI300X",), "rocm", 1307.4e12, 192 * GIB, 5.3 * TB, 750, MI300X),
    Chip("MI300A", ("MI300A",), "rocm", 980.6e12, 128 * GIB, 5.3 * TB, 760, MI300A),
)

CHIPS_BY_NAME: Mapping[str, Chip] = {chip.name: chip for chip in CHIPS}


def chip_of(device_kind: str) -> Chip | None:
    """The device's figures; None for one that is not listed, such as a CPU."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)
