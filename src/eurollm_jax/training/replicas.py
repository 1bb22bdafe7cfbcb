"""Replicas: devices that hold the same part of a state hold the same bits, or one of them has computed wrongly.

Faulty processors give wrong results without an error (Dixit et al. 2021, arXiv:2102.11245). Where a leaf of the state
has copies, a checksum of the bits of each is compared; what has none, as all that fsdp alone splits, cannot be checked.
Copies are the same because all of them take in the same sums of gradients, and compute the same from them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, UInt32

from eurollm_jax.errors import LostError
from eurollm_jax.parallel.distributed import fetched, host_names

NAMED = 4  # leaves and devices that a message names


@dataclass(frozen=True, eq=False)
class ReplicaCheck:
    """For states of the shapes and shardings of `state`, a tree of jax.ShapeDtypeStruct on one mesh."""

    state: Any

    @cached_property
    def copies(self) -> dict[str, int]:
        """How many devices hold each part of a leaf, by the leaf's path."""
        return {path: int(np.bincount(parts).min()) for path, parts in self._parts.items()}

    @property
    def checked(self) -> int:
        """How many leaves have copies."""
        return sum(number > 1 for number in self.copies.values())

    def check(self, state: Any) -> None:
        """Raises LostError that names the leaves whose copies differ, and the devices that hold another one than most.
        All processes call this; where no leaf has copies, nothing is done."""
        if not self.checked:
            return
        sums = fetched(self._checksums(jax.tree.leaves(state)))
        odd = {path: _odd(parts, sums[:, leaf]) for leaf, (path, parts) in enumerate(self._parts.items())}
        known = {device for clear, _ in odd.values() for device in clear}
        found: dict[int, list[str]] = {}
        for path, (clear, unclear) in odd.items():
            for device in [*clear, *(unclear if known.isdisjoint(unclear) else known.intersection(unclear))]:
                found.setdefault(device, []).append(path)
        if found:
            raise LostError(self._in_words(found))

    def _in_words(self, found: dict[int, list[str]]) -> str:
        hosts, devices = host_names(), self._mesh.devices.flat
        said = []
        for index, leaves in sorted(found.items(), key=lambda item: -len(item[1]))[:NAMED]:
            device = devices[index]
            named = ", ".join(leaves[:NAMED]) + (" ..." if len(leaves) > NAMED else "")
            said.append(
                f"device {device.id} of process {device.process_index} ({hosts[device.process_index]}) in "
                f"{len(leaves)} of {len(self.copies)} leaves ({named})"
            )
        more = f" and {len(found) - NAMED} more devices" if len(found) > NAMED else ""
        return (
            f"copies of the state differ, so a device has computed wrongly without an error: {'; '.join(said)}{more}. "
            "Of two copies either may be wrong. Take that machine out and start the run again: it goes on from its "
            "newest checkpoint. Where it comes again on other machines, the program is not deterministic on these "
            "devices: set watch.replicas_every=None."
        )

    @cached_property
    def _mesh(self) -> Mesh:
        mesh: Mesh = jax.tree.leaves(self.state)[0].sharding.mesh
        return mesh

    @cached_property
    def _parts(self) -> dict[str, Int[np.ndarray, " devices"]]:
        """Which part of a leaf each device of the mesh holds, by the leaf's path."""
        parts = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.state):
            held = leaf.sharding.devices_indices_map(leaf.shape)
            places = [str(held[device]) for device in self._mesh.devices.flat]
            parts[jax.tree_util.keystr(path, simple=True, separator="/")] = np.unique(places, return_inverse=True)[1]
        return parts

    @cached_property
    def _checksums(self) -> Any:
        """Jitted: leaves -> uint32 [devices, leaves, 2], in the order of the mesh."""
        leaves = jax.tree.leaves(self.state)
        every = PartitionSpec(self._mesh.axis_names)

        def of_device(held: list[Array]) -> UInt32[Array, "1 leaves 2"]:
            return jnp.stack([checksum(part) for part in held])[None]

        of_all = jax.shard_map(
            of_device,
            mesh=self._mesh,
            in_specs=([leaf.sharding.spec for leaf in leaves],),
            out_specs=every,
            check_vma=False,
        )
        return jax.jit(of_all)


def checksum(x: Array) -> UInt32[Array, "2"]:
    """Of the bits: the sum of their words, which any one flipped bit changes, and a sum of hashes of each word and its
    place (the finaliser of MurmurHash3, Appleby 2011), which several changes do not leave as it was either."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    words = words.astype(jnp.uint32).reshape(-1)
    mixed = words ^ (jnp.arange(words.size, dtype=jnp.uint32) * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)])


def _odd(parts: Int[np.ndarray, " devices"], sums: UInt32[np.ndarray, "devices 2"]) -> tuple[list[int], list[int]]:
    """The devices whose checksum is not that of most devices with the same part, and all of those parts of which no
    checksum is that of most."""
    clear: list[int] = []
    unclear: list[int] = []
    for part in np.unique(parts):
        devices = np.flatnonzero(parts == part)
        _, kind, counts = np.unique(sums[devices], axis=0, return_inverse=True, return_counts=True)
        usual = counts == counts.max()
        if len(counts) > 1 and usual.sum() == 1:
            clear += devices[~usual[kind]].tolist()
        elif len(counts) > 1:
            unclear += devices.tolist()
    return clear, unclear
