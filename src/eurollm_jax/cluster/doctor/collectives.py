"""Sums over all devices of a job: whether they are exact, and how fast. Imports jax: probe.py alone calls it."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eurollm_jax.cluster.doctor.finding import Finding, failed, passed, unchecked, warned
from eurollm_jax.cluster.site import Site

PATTERN = 1021  # values repeat after so many, a prime: shifted or swapped parts do not look alike
TIMES = 5
LOW = 0.3  # share of what the site's network could carry
ACCELERATOR_BYTES, CPU_BYTES = 256 << 20, 1 << 20  # of each device


def all_reduces(hosts: Sequence[str], site: Site | None) -> list[Finding]:
    """The sum over the devices of each node, and that over all; `hosts` are those of the processes, in their order.

    All processes call this.
    """
    groups: dict[str, list[jax.Device]] = {}
    for device in jax.devices():
        groups.setdefault(hosts[device.process_index], []).append(device)
    nodes = list(groups.values())
    size = CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES
    link = site.link_bandwidth if site is not None else None
    network = site.network_bandwidth if site is not None else None
    each = {len(node) for node in nodes}
    found = []
    if each == {1}:
        found.append(unchecked("all-reduce in a node", "one device a node"))
    elif len(each) == 1:
        found.append(all_reduce("all-reduce in a node", nodes, "device", size, link))
    else:
        found.append(unchecked("all-reduce in a node", "the nodes have different numbers of devices"))
    if len(nodes) == 1:
        return [*found, unchecked("all-reduce of all", "one node")]
    bounds = [bound for bound in (link, network) if bound]
    every = [[device for node in nodes for device in node]]
    return [*found, all_reduce("all-reduce of all", every, "device", size, min(bounds, default=None))]


def all_reduce(
    check: str, groups: Sequence[Sequence[jax.Device]], axis: str, size: int, bound: float | None
) -> Finding:
    """The sum within each group of devices at once, of `size` bytes a device; `bound` in bytes/s, one way.

    Bandwidth is that of the bus, 2 (n - 1) / n * bytes / seconds, which an ideal ring takes whatever n is:
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    mesh = Mesh(np.asarray(groups), ("group", axis))
    count, elements = len(groups[0]), size // 4
    rows = NamedSharding(mesh, PartitionSpec(("group", axis)))
    pattern = np.arange(elements, dtype=np.int32) % PATTERN

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return (pattern + (index[0].start or 0) % count)[None]

    given = jax.make_array_from_callback((len(groups) * count, elements), rows, of_device)
    spec = PartitionSpec(("group", axis))
    summed = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    expected = count * pattern + count * (count - 1) // 2
    result = summed(given)
    for shard in result.addressable_shards:
        differs = np.flatnonzero(np.asarray(shard.data)[0] != expected)
        if len(differs):
            return failed(
                check,
                f"{len(differs)} of {elements} sums are wrong on device {shard.device}, the first at {differs[0]}",
                "exclude this node: its links or memory compute wrongly",
            )
    best = min(_seconds(summed, given) for _ in range(TIMES))
    bus = 2 * (count - 1) / count * size / best
    seen = f"exact over {count} devices{f', {len(groups)} nodes at once' if len(groups) > 1 else ''}; {_rate(bus)}"
    if bound and bus < LOW * bound:
        remedy = "see which network the library has chosen: NCCL_DEBUG=INFO; compare the site's variables"
        return warned(check, f"{seen}, {bus / bound:.0%} of the {_rate(bound)} of the site's profile", remedy)
    return passed(check, seen + (f", {bus / bound:.0%} of the site's {_rate(bound)}" if bound else ""))


def _seconds(summed: jax.stages.Wrapped, given: jax.Array) -> float:
    began = time.perf_counter()
    jnp.asarray(summed(given)).block_until_ready()
    return time.perf_counter() - began


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.3g} GB/s"
