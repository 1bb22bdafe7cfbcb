"""Places the weights of a Hugging Face folder on devices: of the files, each device's part is read and nothing more."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.mapping import Tensor
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Param, Params, flatten, map_with_path
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout

_AT_ONCE = 4  # tensors that are read


def load(folder: Path | HubFolder, layout: Layout) -> tuple[TransformerConfig, Params]:
    """Configuration and float32 weights of a folder of safetensors, sharded as `layout` says.

    The host holds one device's part of one weight at a time, and up to four of its tensors as they are in the files.
    Raises UserError as `HubFolder` does.
    """
    hub = HubFolder(folder) if isinstance(folder, Path) else folder
    parts: dict[str, list[Tensor]] = {}
    for tensor in hub.tensors:
        parts.setdefault(tensor.path, []).append(tensor)
    weights = specs(hub.config)
    shardings = layout.parameters(weights)

    def place(path: str, spec: Param) -> jax.Array:
        return jax.make_array_from_callback(spec.shape, at[path], _reader(hub, parts[path], spec))

    at = flatten(shardings)
    return hub.config, map_with_path(place, weights)


def _reader(hub: HubFolder, parts: list[Tensor], spec: Param) -> Callable[[Any], np.ndarray]:
    """The function from slices of one weight to its values."""
    by_index = {tensor.index: tensor for tensor in parts}
    leading = len(parts[0].index)

    def read(wanted: Sequence[slice] | None) -> np.ndarray:
        wanted = tuple(wanted or ()) or tuple(slice(None) for _ in spec.shape)
        ranges = [range(*part.indices(size)) for part, size in zip(wanted[:leading], spec.shape, strict=False)]
        rest = wanted[leading:]
        shape = [len(range(*part.indices(size))) for part, size in zip(wanted, spec.shape, strict=True)]
        value = np.empty(shape, np.float32)
        places = zip(product(*(range(len(r)) for r in ranges)), product(*ranges), strict=True)
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # waits for files, copies: neither holds the interpreter's lock
            for _ in pool.map(lambda at: hub.read(by_index[at[1]], rest, value[(*at[0], ...)]), places):
                pass
        return value

    return read
