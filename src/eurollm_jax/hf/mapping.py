"""How our weights correspond to the tensors of a Hugging Face model: a table, read in both directions.

A line of a table is `our path: (name there, "our axes -> their axes")`, the axes as an einops pattern. Axes of ours
that the pattern leaves out are spread over tensors of their own, and stand in the name: {layers}, {experts}.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol, get_args

import jax
import numpy as np
from einops import rearrange

from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Param, Params, flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.training.weights import Index

type Table = Mapping[str, tuple[str, str]]
type ExportDtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[str, ...] = get_args(ExportDtype.__value__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # which tensor is in which file, where there are several


class Weights(Protocol):
    """Weights by path, wherever they lie."""

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """A weight, or its part at `index` of its leading axes, in float32. Last in `index` may stand a slice."""


@dataclass(frozen=True)
class InMemory:
    """A tree of numpy or jax arrays as `Weights`; only what is asked for leaves the devices."""

    params: Params

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        return np.asarray(jax.device_get(flatten(self.params)[path][index]), np.float32)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and which part of which of our weights it is."""

    name: str
    path: str  # of our weight
    index: tuple[int, ...]  # on its leading axes
    pattern: str  # "axes of ours -> axes of theirs"
    sizes: Mapping[str, int]  # of the axes in the pattern

    @property
    def groups(self) -> list[list[str]]:
        """Our axes in each dimension over there."""
        return [group.strip("()").split() for group in re.findall(r"\(.*?\)|\w+", self.pattern.split("->")[1])]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape over there."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> str:
        """Of our weight, for people."""
        return self.path + (f"[{', '.join(map(str, self.index))}]" if self.index else "")

    def from_hf(self, theirs: np.ndarray, wanted: Sequence[slice] | None = None) -> np.ndarray:
        """Our part out of their tensor, or out of the piece of it that `their_slices(wanted)` cuts."""
        ours, there = self.pattern.split("->")
        sizes = dict(self.sizes)
        cut: tuple[slice, ...] = ()
        if wanted is not None:
            axes = ours.split()
            for axis, part in zip(axes, wanted, strict=True):
                if axis in self._cut_there():
                    sizes[axis] = len(range(*part.indices(self.sizes[axis])))
            cut = tuple(
                slice(None) if axis in self._cut_there() else part for axis, part in zip(axes, wanted, strict=True)
            )
        return rearrange(theirs, f"{there} -> {ours}", **sizes)[cut]

    def their_slices(self, wanted: Sequence[slice]) -> tuple[slice, ...]:
        """What to read of their tensor for the slices `wanted` of our axes."""
        by_axis = dict(zip(self.pattern.split("->")[0].split(), wanted, strict=True))
        slices = []
        for group in self.groups:
            within = math.prod(self.sizes[axis] for axis in group[1:])
            start, stop, _ = by_axis[group[0]].indices(self.sizes[group[0]]) if group else (0, 1, 1)
            slices.append(slice(start * within, stop * within))
        return tuple(slices)

    def _cut_there(self) -> set[str]:
        """The axes of which a slice of ours is a slice of theirs: those that lead a dimension."""
        return {group[0] for group in self.groups if group}


def tensors(table: Table, config: TransformerConfig) -> list[Tensor]:
    """Every tensor of the model's checkpoint, layer by layer: embedding, layers 0, 1, ..., final norm, head."""
    weights: dict[str, Param] = flatten(specs(config))
    if unmapped := weights.keys() - table.keys():
        raise ValueError(f"the table has no name for {sorted(unmapped)}")
    found = []
    for at, path in enumerate(path for path in table if path in weights):
        name, pattern = table[path]
        axes = pattern.split("->")[0].split()
        spread = {axis: size for axis, size in weights[path].sizes.items() if axis not in axes}
        sizes = {axis: weights[path].sizes[axis] for axis in axes}
        for index in product(*map(range, spread.values())):
            tensor = Tensor(name.format(**dict(zip(spread, index, strict=True))), path, index, pattern, sizes)
            found.append((_order(path, index, at), tensor))
    return [tensor for _, tensor in sorted(found, key=lambda pair: pair[0])]


def _order(path: str, index: tuple[int, ...], at: int) -> tuple[int, ...]:
    """What stands before the layers, the layers one by one and in each its experts, and what stands after them."""
    if path.startswith("layers/"):
        return (1, *index[:1], at if len(index) == 1 else 10**6, *index[1:], at)
    return (0 if path == "embedding" else 2, at)
