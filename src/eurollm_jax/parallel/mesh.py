"""The device mesh, and the two tables that say where each logical axis of a parameter or an activation lives.

Model code names logical axes only ("embed", "heads", "batch"). Here they meet the mesh axes, from the slowest network
to the fastest:

    replica  copies of the model in parts of the machine that a slow network joins; each has its own rows
    data     copies of the model, each with its own rows
    fsdp     rows are split as over `data`, and so are parameters and optimizer state, gathered as they are used
    expert   rows are split as over `data`; each device holds some of the experts, and is sent the tokens for them
    context  each row is split along its sequence; keys and values are gathered for attention
    tensor   heads, the hidden axis of the MLP, and the vocabulary are split; between the halves of a layer, where norms
             and sums are, the sequence is split instead (Korthikanti et al. 2022, arXiv:2205.05198)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eurollm_jax.errors import UserError
from eurollm_jax.parallel.hardware import Backend

type MeshAxes = str | tuple[str, ...] | None

MESH_AXES = ("replica", "data", "fsdp", "expert", "context", "tensor")

PARAMETER_AXES: Mapping[str, MeshAxes] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "slope": None,
    "vocab": "tensor",
}
ACTIVATION_AXES: Mapping[str, MeshAxes] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "sequence": "context",
    "residual_sequence": ("context", "tensor"),
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}

SEQUENCES = ("sequence", "residual_sequence")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis takes; -1 on one axis takes all that are left."""

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all). Raises UserError where the numbers do not multiply to their count."""
        devices = jax.devices() if devices is None else devices
        shape = [getattr(self, axis) for axis in MESH_AXES]
        sizes = _described(shape)
        if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
            raise UserError(f"mesh {sizes}: each axis takes one device or more, and at most one axis may be -1.")
        known = math.prod(size for size in shape if size != -1)
        if len(devices) % known or (-1 not in shape and known != len(devices)):
            raise UserError(
                f"mesh {sizes} needs {'a multiple of ' if -1 in shape else ''}{known} devices, "
                f"and there are {len(devices)}: change the number of devices, or take "
                f"{' or '.join(_described(near) for near in _nearest(shape, len(devices)))}."
            )
        shape = [len(devices) // known if size == -1 else size for size in shape]
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _described(shape: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))


def _nearest(shape: Sequence[int], devices: int, count: int = 2) -> list[tuple[int, ...]]:
    """The meshes of so many devices whose sizes differ by the smallest factors from those asked for (-1: from none)."""
    meshes: list[tuple[int, ...]] = [()]
    for _ in shape[1:]:
        meshes = [(*some, size) for some in meshes for size in _divisors(devices // math.prod(some))]
    meshes = [(*some, devices // math.prod(some)) for some in meshes]

    def distance(mesh: tuple[int, ...]) -> float:
        pairs = zip(mesh, shape, strict=True)
        return round(sum(abs(math.log(size / wanted)) for size, wanted in pairs if wanted != -1), 9)

    return sorted(meshes, key=distance)[:count]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True)
class Layout:
    """A mesh with the two tables: turns logical axes into shardings.

    `lowered_for` names the backend that a program is made for where that is not the mesh's own. `whole` is the mesh
    with its devices, where `mesh` is a view of it from inside a `shard_map`; `apart` are those of the axes of that
    `shard_map` along which the rows of one batch lie.
    """

    mesh: Mesh
    lowered_for: Backend | None = None
    whole: Mesh | None = None
    apart: tuple[str, ...] = ()

    def inside(self, apart: tuple[str, ...] = ()) -> "Layout":
        """The same for arrays inside a `shard_map` over some of the axes: split along the others alone."""
        return Layout(cast(Mesh, jax.sharding.get_abstract_mesh()), self.lowered_for, self.whole or self.mesh, apart)

    def parameter(self, axes: Sequence[str]) -> NamedSharding:
        return NamedSharding(self.mesh, _partition(axes, PARAMETER_AXES))

    def activation(self, axes: Sequence[str], shape: Sequence[int] | None = None) -> NamedSharding:
        """With a `shape`, a sequence is split over the first of its mesh axes, as many as divide it: the one new
        position of a text that is being written stays whole."""
        entries: list[MeshAxes] = [self._open(names) or None for names in _partition(axes, ACTIVATION_AXES)]
        for at, (axis, size) in enumerate(zip(axes, shape, strict=True) if shape is not None else ()):
            names = self._open(entries[at])
            while axis in SEQUENCES and size % math.prod(self.mesh.shape[name] for name in names):
                names = names[:-1]
            entries[at] = names
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def backend(self) -> Backend:
        """What the program runs on: kernels are chosen by it."""
        if self.lowered_for is not None:
            return self.lowered_for
        if self.device.platform != "gpu":
            return "cpu"
        return "rocm" if "rocm" in self.device.client.platform_version.lower() else "cuda"

    @property
    def device(self) -> jax.Device:
        """One of the mesh's devices, which are all of one kind."""
        device: jax.Device = (self.whole or self.mesh).devices.flat[0]
        return device

    @property
    def rows(self) -> NamedSharding:
        """Of anything whose first axis is the batch."""
        return self.activation(("batch",))

    def place_rows(self, tree: Any, part: int = 0, parts: int = 1) -> Any:
        """Numpy arrays whose first axis is the batch, as global arrays dealt out by rows. Of a batch in so many `parts`
        this process has one, which holds the rows of its devices (see `part_of_rows`)."""
        return jax.tree.map(lambda rows: self._place(rows, part, parts), tree)

    def _place(self, rows: np.ndarray, part: int, parts: int) -> jax.Array:
        before = part * len(rows)

        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(parts * len(rows))
            return rows[(slice(start - before, stop - before), *index[1:])]

        return jax.make_array_from_callback((parts * len(rows), *rows.shape[1:]), self.rows, of_device)

    def part_of_rows(self, sizes: Sequence[int]) -> tuple[int, int]:
        """(part, parts): into how many equal parts batches of these sizes fall so that one of them holds all rows of
        this process's devices, and which one does. Processes that share a row, as those of a tensor axis do, have the
        same part."""
        ways = self.ways("batch")
        mine = self.rows.addressable_devices_indices_map((ways,))
        places = [index[0].indices(ways) for index in mine.values() if index is not None]
        first, last = min(start for start, _, _ in places), max(stop for _, stop, _ in places) - 1
        for parts in reversed(_divisors(ways)):
            if first * parts // ways == last * parts // ways and all(size % parts == 0 for size in sizes):
                return first * parts // ways, parts
        return 0, 1

    def constrain(self, x: Array, *axes: str) -> Array:
        """`x` with the sharding that its logical axes ask for, stated to the compiler."""
        return jax.lax.with_sharding_constraint(x, self.activation(axes, x.shape))

    def parameters(self, specs: Any) -> Any:
        """The sharding of each weight of a tree of `Param`s; UserError where a mesh axis does not divide a size."""
        return jax.tree.map(self._parameter, specs)

    def _parameter(self, spec: Any) -> NamedSharding:
        for axis, size in spec.sizes.items():
            if size % (ways := self.ways(axis, PARAMETER_AXES)):
                fitting = [f"{PARAMETER_AXES[axis]}={part}" for part in _divisors(size) if part < 2 * ways][-3:]
                raise UserError(
                    f"the mesh splits {axis} {ways} ways, and the model's {axis}={size} does not divide by that: "
                    f"choose {' or '.join(fitting)}, or a model with {axis}={size + -size % ways}."
                )
        return self.parameter(spec.axes)

    def require_batches(self, sizes: Sequence[int], length: int | None = None) -> None:
        """UserError where batches of so many rows, each of `length` tokens, cannot be dealt out evenly."""
        ways, parts = self.ways("batch"), self.ways("residual_sequence")
        for size in sizes:
            if size % ways:
                below = size // ways * ways
                raise UserError(
                    f"a batch of {size} rows does not divide over {ways} devices ({self._ways_of('batch')}): "
                    f"use {f'{below} or ' if below else ''}{below + ways} rows, or a mesh with fewer ways."
                )
        if length is not None and length % parts:
            below = length // parts * parts
            raise UserError(
                f"rows of {length} tokens do not divide over {parts} devices ({self._ways_of('residual_sequence')}): "
                f"use {f'{below} or ' if below else ''}{below + parts} tokens, or a mesh with fewer ways."
            )

    def _ways_of(self, axis: str) -> str:
        return " x ".join(f"{name}={self.mesh.shape[name]}" for name in _names(ACTIVATION_AXES[axis]))

    def ways(self, axis: str, table: Mapping[str, MeshAxes] = ACTIVATION_AXES) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self._open(table[axis]))

    def splitting(self, axes: MeshAxes) -> tuple[str, ...]:
        """The mesh axes that an entry of a table or of a PartitionSpec names, without those that have one device: over
        these nothing is sent."""
        return tuple(name for name in self._open(axes) if self.mesh.shape[name] > 1)

    def _open(self, axes: MeshAxes) -> tuple[str, ...]:
        """Without those that a `shard_map` around has split already."""
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        return tuple(name for name in _names(axes) if types[name] != AxisType.Manual)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _partition(axes: Sequence[str], table: Mapping[str, MeshAxes]) -> PartitionSpec:
    """Refuses two logical axes of one array on the same mesh axis: the compiler's own message names neither."""
    used = [name for axis in axes for name in _names(table[axis])]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} would use a mesh axis twice: {used}")
    return PartitionSpec(*(table[axis] for axis in axes))
