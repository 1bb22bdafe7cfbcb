"""Slow hosts: which device computes, or which process waits for its data, far longer than the others.

All processes of a run end a step together, so the time of steps does not tell which of them the others wait for. Each
therefore times the same small product on each of its own devices, and tells how long it waited for data.
"""

import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from eurollm_jax.parallel.distributed import gathered, host_names, is_first

log = logging.getLogger(__name__)

BEYOND = 1.5  # times the median
NOISE = 0.01  # share of the time: less waiting than that slows nobody down


def slow_hosts(waited: float, seconds: float) -> dict[str, Any]:
    """Measures, and says in the log what is beyond `BEYOND` times the median; returns all as JSON-able values.

    `waited` are the seconds that this process waited for data in the last `seconds`. All processes call this, while
    none of their devices computes; it takes some milliseconds for each device of a process.
    """
    devices = _own_devices()
    most = max(sum(device.process_index == index for device in jax.devices()) for index in range(jax.process_count()))
    mine = np.full(most + 1, np.nan, np.float32)
    mine[0] = waited
    mine[1 : 1 + len(devices)] = [_product_seconds(device) for device in devices]
    of_all, hosts = gathered(mine), host_names()
    waits, products = of_all[:, 0], of_all[:, 1:]
    found = slow(waits, products, seconds)
    for process, reason in found if is_first() else ():
        log.warning("SLOW: process %d (%s) %s", process, hosts[process], reason)
    return {
        "product_seconds": [[round(float(value), 6) for value in row if not np.isnan(value)] for row in products],
        "data_wait_seconds": [round(float(wait), 3) for wait in waits],
        "slow": [{"process": process, "host": hosts[process], "reason": reason} for process, reason in found],
    }


def slow(
    waits: Float[np.ndarray, " processes"], products: Float[np.ndarray, "processes devices"], seconds: float
) -> list[tuple[int, str]]:
    """The processes that the others wait for, and why. A product of NaN is of no device; of two processes the faster is
    the usual one."""
    usual_wait = float(np.quantile(waits, 0.5, method="lower"))
    usual_product = float(np.nanquantile(products, 0.5, method="lower"))
    found = []
    for process, (wait, times) in enumerate(zip(waits.tolist(), products.tolist(), strict=True)):
        for device, product in enumerate(times):
            if product > BEYOND * usual_product:
                found.append(
                    (
                        process,
                        f"takes {product * 1e3:.3g} ms on its device {device} for a product that takes "
                        f"{usual_product * 1e3:.3g} ms as a rule: look at its clock rate, its heat and its neighbours",
                    )
                )
        if wait > BEYOND * usual_wait + NOISE * seconds:
            found.append(
                (
                    process,
                    f"waited {wait:.3g} s of {seconds:.3g} for data, and others {usual_wait:.3g} s as a rule: look at "
                    "its file system, or give it more data.workers",
                )
            )
    return found


def _own_devices() -> list[jax.Device]:
    """Those of a CPU are all the same cores."""
    return jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]


def _product_seconds(device: jax.Device, times: int = 5) -> float:
    """The best of a few on this device: what else a machine does at times is not its speed."""
    size = 256 if device.platform == "cpu" else 4096
    kind = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    x = jax.device_put(np.ones((size, size), kind), device)
    _product(x).block_until_ready()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        _product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    for _ in range(4):
        x = (x @ x) / x.shape[0]
    return x
