"""The device mesh, and the two tables that say where each logical axis of a parameter or an activation lives.

Model code names logical axes only ("embed", "heads", "batch"). Here they meet the mesh axes, from the slowest network
to the fastest:

    replica  copies of the model in parts of the machine that a slow network joins; each has its own rows
    data     copies of the model, each with its own rows
    fsdp     rows are split as over `data`, and so are parameters and optimizer state, gathered as they are used
    expert   rows are split as over `data`; each device holds some of the experts, and is sent the tokens for them
    context  each row is split along its sequence; keys and values are gathered for attention
    tensor   heads, the hidden axis of the MLP, and the vocabulary are split
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eurollm_jax.errors import UserError

type MeshAxes = str | tuple[str, ...] | None
type Backend = Literal["cpu", "cuda", "rocm"]

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
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


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
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
            raise UserError(f"mesh {sizes}: each axis takes one device or more, and at most one axis may be -1.")
        known = math.prod(size for size in shape if size != -1)
        if len(devices) % known or (-1 not in shape and known != len(devices)):
            raise UserError(
                f"mesh {sizes} needs {'a multiple of ' if -1 in shape else ''}{known} devices, "
                f"and there are {len(devices)}: change the mesh or the number of devices."
            )
        shape = [len(devices) // known if size == -1 else size for size in shape]
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@dataclass(frozen=True)
class Layout:
    """A mesh with the two tables: turns logical axes into shardings.

    `lowered_for` names the backend that a program is made for where that is not the mesh's own.
    """

    mesh: Mesh
    lowered_for: Backend | None = None

    def parameter(self, axes: Sequence[str]) -> NamedSharding:
        return NamedSharding(self.mesh, _partition(axes, PARAMETER_AXES))

    def activation(self, axes: Sequence[str]) -> NamedSharding:
        return NamedSharding(self.mesh, _partition(axes, ACTIVATION_AXES))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def backend(self) -> Backend:
        """What the program runs on: kernels are chosen by it."""
        device = self.mesh.devices.flat[0]
        gpu: Backend = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
        return self.lowered_for or (gpu if device.platform == "gpu" else "cpu")

    @property
    def rows(self) -> NamedSharding:
        """Of anything whose first axis is the batch."""
        return self.activation(("batch",))

    def place_rows(self, tree: Any) -> Any:
        """Numpy arrays whose first axis is the batch, as device arrays dealt out by rows."""
        return jax.device_put(tree, self.rows)

    def constrain(self, x: Array, *axes: str) -> Array:
        """`x` with the sharding that its logical axes ask for, stated to the compiler."""
        return jax.lax.with_sharding_constraint(x, self.activation(axes))

    def parameters(self, specs: Any) -> Any:
        """The sharding of each weight of a tree of `Param`s; UserError where a mesh axis does not divide a size."""
        return jax.tree.map(self._parameter, specs)

    def _parameter(self, spec: Any) -> NamedSharding:
        for axis, size in spec.sizes.items():
            if size % (ways := self.ways(axis, PARAMETER_AXES)):
                raise UserError(
                    f"the mesh splits {axis} {ways} ways, and the model's {axis}={size} does not divide by that: "
                    f"choose a mesh axis {PARAMETER_AXES[axis]} that divides {size}."
                )
        return self.parameter(spec.axes)

    def ways(self, axis: str, table: Mapping[str, MeshAxes] = ACTIVATION_AXES) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in _names(table[axis]))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _partition(axes: Sequence[str], table: Mapping[str, MeshAxes]) -> PartitionSpec:
    """Refuses two logical axes of one array on the same mesh axis: the compiler's own message names neither."""
    used = [name for axis in axes for name in _names(table[axis])]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} would use a mesh axis twice: {used}")
    return PartitionSpec(*(table[axis] for axis in axes))
