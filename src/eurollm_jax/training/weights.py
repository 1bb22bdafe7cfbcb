"""The weights of a checkpoint as they lie on disk: read and written a piece at a time, in the memory of a few pieces.

A piece is a weight without its stacked axes: one layer of it, one expert of a layer. So a model far larger than the
memory is exported, averaged or imported. How Orbax lays a checkpoint out is known here and nowhere else, and
`tests/training/test_weights.py` fails where it changes: `state/` is an OCDBT store (one key space over many files), in
which each leaf of the saved tree is a zarr3 array named after its keys, with dots between them. Reading goes straight
to tensorstore, which starts no devices. Writing is Orbax's own save, in which a type handler takes the place of arrays.
"""

import os
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from eurollm_jax.errors import UserError

type Index = tuple[int | slice, ...]  # on leading axes; a slice only in the last place
type Item = Literal["params", "ema"]
ITEMS: tuple[str, ...] = get_args(Item.__value__)

STATE = "state"  # the folder of the arrays in a checkpoint
CHUNK_BYTES = 4 << 20  # what tensorstore reads or writes at once; larger ones save no faster and take more memory
_IN_FLIGHT = 32 << 20  # bytes handed over and not yet on disk
_NODE_CACHE = 32 << 20  # bytes: a store's directory, which would otherwise be read again with each chunk


class SavedWeights:
    """The parameters in a checkpoint folder, or their moving average; the folder's hashes are the caller's to check.

    A piece is all that a read brings into memory, where the checkpoint was saved with `save_args`. Raises UserError
    where the checkpoint does not hold `item`.
    """

    def __init__(self, checkpoint: Path, item: Item = "params") -> None:
        self.checkpoint = checkpoint.absolute()
        self.item = item
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},  # of chunks: each is read once
                "cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE},
                "data_copy_concurrency": {"limit": 2},
                "file_io_concurrency": {"limit": 2},
            }
        )
        self._stores: dict[str, Any] = {}
        keys = ts.KvStore.open(self._kvstore(""), context=self._context).result().list().result()
        start, end = f"{item}.", "/zarr.json"
        names = [name for name in (key.decode() for key in keys) if name.startswith(start) and name.endswith(end)]
        self._paths = sorted(name[len(start) : -len(end)].replace(".", "/") for name in names)
        if not names and item == "ema":
            raise UserError(f"{checkpoint} holds no moving average of the weights: train with `ema` in the experiment.")
        if not names:
            raise UserError(f"{checkpoint} holds no {item}: it is not a checkpoint of a run.")

    def paths(self) -> list[str]:
        """Of all weights, such as `embedding` and `layers/query`, in order."""
        return list(self._paths)

    def shape(self, path: str) -> tuple[int, ...]:
        """With the stacked axes."""
        return tuple(self.open(path).shape)

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """A weight, or its part at `index` of its leading axes, in float32."""
        return self.fetch(self.open(path)[index])

    def open(self, path: str) -> Any:
        """The tensorstore of a weight, opened once."""
        if path not in self._stores:
            if path not in self._paths:
                raise UserError(f"{self.checkpoint} holds no {self.item} {path}: it is of another model.")
            spec = {
                "driver": "zarr3",
                "kvstore": self._kvstore(f"{self.item}.{path.replace('/', '.')}/"),
                "fill_missing_data_reads": False,  # an error, rather than zeros
            }
            self._stores[path] = ts.open(spec, context=self._context, open=True, read=True).result()
        return self._stores[path]

    def fetch(self, view: Any) -> np.ndarray:
        """The content of a tensorstore, or of a part of it, in float32."""
        try:
            return np.asarray(view.read().result(), np.float32)
        except ValueError as error:
            if self.checkpoint.is_dir():
                raise
            raise UserError(
                f"{self.checkpoint} was removed while it was read: let the run end, or raise its saving.last."
            ) from error

    def _kvstore(self, path: str) -> dict[str, Any]:
        files = {"driver": "file", "path": f"{self.checkpoint / STATE}/"}
        return {"driver": "ocdbt", "base": files, "path": path, "cache_pool": "cache_pool#nodes"}


class AveragedWeights:
    """The mean of several checkpoints, weight by weight, summed in float64 (Izmailov et al. 2018, arXiv:1803.05407).

    Raises UserError where they do not hold the same weights in the same shapes.
    """

    def __init__(self, members: Sequence[SavedWeights]) -> None:
        self._members = list(members)
        first, *others = self._members
        shapes = {path: first.shape(path) for path in first.paths()}
        for other in others:
            found = {path: other.shape(path) for path in other.paths()}
            for path in sorted(shapes.keys() | found.keys()):
                if shapes.get(path) != found.get(path):
                    raise UserError(
                        f"{path} is {_shape(shapes.get(path))} in {first.checkpoint} and {_shape(found.get(path))} in "
                        f"{other.checkpoint}: only checkpoints of one model can be averaged."
                    )

    def paths(self) -> list[str]:
        return self._members[0].paths()

    def shape(self, path: str) -> tuple[int, ...]:
        return self._members[0].shape(path)

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """The mean, rounded once, to float32; the sums are of some rows at a time."""
        views = [(member, _part(member.open(path), index)) for member in self._members]
        shape = tuple(views[0][1].shape)
        mean = np.empty(shape, np.float32)
        rows = _block_rows(views[0][1]) if shape else 1
        for start in range(0, shape[0] if shape else 1, rows):
            block = slice(start, min(start + rows, shape[0])) if shape else ()
            total = np.zeros(mean[block].shape, np.float64)
            for member, view in views:
                total += member.fetch(view[block])
            mean[block] = total / len(views)
        return mean


class PieceHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax save a tree of `jax.ShapeDtypeStruct`, the arrays of which arrive in pieces while it saves.

    `pieces` are (path, index, array): the part of the weight at `path` that lies at `index` of its leading axes. They
    come in any order, but each weight is cut on the same axes throughout; where a slice stands last in `index`, all
    but its last are as long as the first. An array is not to be changed once it is handed over. Raises ValueError for
    pieces that do not fit the shapes, and for those that are missing in the end.
    """

    def __init__(self, pieces: Iterable[tuple[str, Index, np.ndarray]]) -> None:
        super().__init__()
        self._pieces = pieces

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        """Called once, with all leaves, in the thread that saves; when it returns, all is written."""
        for info in infos:
            await info.await_path_creation()
        leaves = {info.name: (value, info) for value, info in zip(values, infos, strict=True)}
        stores: dict[str, Any] = {}
        seen: defaultdict[str, dict[Index, int]] = defaultdict(dict)
        in_flight: deque[tuple[Any, int]] = deque()
        try:
            for path, index, piece in self._pieces:
                name = f"params.{path.replace('/', '.')}"
                value, info = leaves[name]
                shape = np.broadcast_to(0, value.shape)[index].shape
                if piece.shape != shape or index in seen[name] or any(len(index) != len(other) for other in seen[name]):
                    raise ValueError(f"{path}: {piece.shape} at {index} has no place in {value.shape}, or not twice.")
                seen[name][index] = piece.size
                if name not in stores:  # cut like the pieces, so that each is written at once and none read back
                    cut = (*(1 for _ in range(len(value.shape) - len(shape))), *shape)
                    chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
                    described = ocp.type_handlers.get_json_tspec_write(
                        info, True, value.shape, cut, value.dtype, process_index=0, arg=chunks
                    )
                    opening = ts.open(ts.Spec(described), create=True, open=True, context=info.ts_context)
                    stores[name] = await _done(opening)
                content = np.asarray(piece, value.dtype)
                write = stores[name][index].write(content, can_reference_source_data_indefinitely=True)
                in_flight.append((write, content.nbytes))
                while sum(size for _, size in in_flight) > _IN_FLIGHT:
                    await _done(in_flight.popleft()[0])
            while in_flight:
                await _done(in_flight.popleft()[0])
        except BaseException:
            for write, _ in in_flight:  # so that nothing is written once the folder is deleted
                with suppress(Exception):
                    await write
            raise
        for name, (value, _) in leaves.items():
            if (came := sum(seen[name].values())) != prod(value.shape):
                raise ValueError(f"{name}: pieces came of {came} of its {prod(value.shape)} numbers.")
        return []


async def _done(work: Any) -> Any:
    try:
        return await work
    except ValueError as error:
        if refused := system_error(error):
            raise refused from error
        raise


def system_error(error: BaseException) -> OSError | None:
    """That the system refused to read or write, where this is what an exception is about. tensorstore raises ValueError
    then, with the number of the system's error in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, ValueError) and (found := re.search(r"os_error_code='(\d+)'", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return system_error(error.__cause__) if error.__cause__ is not None else None


def leaves_to_write(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The tree of a checkpoint's state with nothing but parameters in float32, as `PieceHandler` takes it."""
    tree: dict[str, Any] = {"params": {}}
    for path, shape in shapes.items():
        *folders, name = path.split("/")
        node = tree["params"]
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    return tree


def save_args(state: Mapping[str, Any]) -> dict[str, Any]:
    """How Orbax lays out a state so that a read of one piece of its weights brings in only that piece."""

    def in_pieces(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        keys = {key.key for key in path}
        stacked = ("layers" in keys) + ("experts" in keys)
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(min(stacked, leaf.ndim))))

    return {
        name: jax.tree_util.tree_map_with_path(in_pieces, part)
        if name in ITEMS
        else jax.tree.map(lambda _: ocp.SaveArgs(), part)
        for name, part in state.items()
    }


def _block_rows(view: Any) -> int:
    """Rows of a tensorstore that hold about CHUNK_BYTES, in whole chunks."""
    fit = max(1, CHUNK_BYTES // (4 * prod(view.shape[1:])))
    chunk = view.chunk_layout.read_chunk.shape[0] or 1
    return -(-fit // chunk) * chunk


def _part(store: Any, index: Index) -> Any:
    """Counted from 0, as tensorstore does not."""
    part = store[index]
    return part[ts.d[:].translate_to[0]] if part.rank else part


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
