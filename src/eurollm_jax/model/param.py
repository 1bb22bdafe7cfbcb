"""Param: one weight, declared in one line. Everything else about weights is a map over the tree of these lines.

`Param(embed=2048, heads=16, head_dim=128, fan_in="embed")` states shape, logical axes and initialisation at once. From
the tree of specs follow initial values, shapes for restoring, shardings, counts, the mask of weight decay and the
tables that the tests compare with.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray

type Specs = Mapping[str, "Param | Specs"]
type Params = dict[str, Any]  # the same tree with arrays for leaves


@dataclass(frozen=True, init=False)
class Param:
    """The declaration of one weight.

    Keyword order is dimension order; each keyword names a logical axis and gives its size. `fan_in` names the axes that
    a product with this weight sums over: the initial standard deviation is `scale / sqrt(product of their sizes)`.
    Without it the weight is a gain or a bias: it starts at `start` everywhere.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    fan_in: tuple[str, ...]
    scale: float
    start: float

    def __init__(
        self, *, fan_in: str | tuple[str, ...] = (), scale: float = 1.0, start: float = 1.0, **sizes: int
    ) -> None:
        fan_in = (fan_in,) if isinstance(fan_in, str) else fan_in
        if unknown := set(fan_in) - set(sizes):
            raise ValueError(f"fan_in names {sorted(unknown)}, which are not axes of {tuple(sizes)}")
        object.__setattr__(self, "axes", tuple(sizes))
        object.__setattr__(self, "shape", tuple(sizes.values()))
        object.__setattr__(self, "fan_in", fan_in)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "start", start)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.shape, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def embeds(self) -> bool:
        """Whether it is a table of vectors that tokens are looked up in."""
        return self.axes[0] == "vocab"

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: to matrices, not to gains, biases and embeddings, tied ones included."""
        return bool(self.fan_in) and not self.embeds

    @property
    def std(self) -> float:
        """Initial standard deviation; 0 where the weight starts at the same value everywhere."""
        return self.scale / math.sqrt(math.prod(self.sizes[axis] for axis in self.fan_in)) if self.fan_in else 0.0

    def stacked(self, **leading: int) -> "Param":
        """The same weight with leading axes, such as `layers=24`; its fan-in stays as it is."""
        return Param(fan_in=self.fan_in, scale=self.scale, start=self.start, **leading, **self.sizes)


def stack(specs: Specs, **leading: int) -> Specs:
    """Every weight of a tree with leading axes, such as `layers=24`."""
    return jax.tree.map(lambda spec: spec.stacked(**leading), specs)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/query": leaf, ...} in the tree's order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep="/")


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def owner(path: tuple[Any, ...], weights: Mapping[str, Any]) -> str | None:
    """The weight, of a flat tree, that a leaf at some place of an optimizer's state belongs to: the one whose path its
    own ends with."""
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    ends = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((end for end in ends if end in weights), None)


def init(specs: Specs, key: PRNGKeyArray) -> Params:
    """Initial values, in float32. A weight's key follows from its path, so adding one never changes the others."""

    def value(path: str, spec: Param) -> Array:
        if not spec.fan_in:
            return jnp.full(spec.shape, spec.start, jnp.float32)
        path_key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big"))
        return spec.std * jax.random.normal(path_key, spec.shape, jnp.float32)

    return map_with_path(value, specs)


def count(specs: Specs) -> int:
    return sum(spec.size for spec in flatten(specs).values())


def decay_mask(specs: Specs) -> dict[str, Any]:
    """True where weight decay applies."""
    return jax.tree.map(lambda spec: spec.decayed, specs)


def table(specs: Specs) -> str:
    """One line per weight: path, shape with axis names, initial values, decay. The form of the golden tables."""
    lines = []
    for path, spec in flatten(specs).items():
        shape = " ".join(f"{axis}={size}" for axis, size in spec.sizes.items())
        constant = {0.0: "zeros", 1.0: "ones"}.get(spec.start, f"all {spec.start:.6g}")
        start = f"normal({spec.std:.6g})" if spec.fan_in else constant
        lines.append(f"{path:24s} {shape}  {start}  {'decayed' if spec.decayed else 'not decayed'}")
    return "\n".join([*lines, f"total {count(specs)}", ""])
