"""Files of tensors in the safetensors format, read and written one tensor at a time.

The library of that name maps files into memory when reading, which a machine counts as memory in use, and takes all of
a file's tensors at once when writing. The format is small: eight bytes with the header's length, the header in JSON
with each tensor's type, shape and place, and the tensors' bytes one after the other
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from eurollm_jax.errors import UserError

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class TensorFile:
    """An open file, its header read and checked against its size. Raises UserError where they do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = os.fstat(file.fileno()).st_size
                if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                    raise ValueError("it has no header; is it a pointer of Git LFS?")
                header = json.loads(file.read(length), object_pairs_hook=_object)
                self.entries = _entries(header, 8 + length, size)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"{path} is missing: fetch or export the folder again.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): fetch or export it again.") from None

    def read(self, name: str, slices: Sequence[slice] | None = None) -> np.ndarray:
        """A tensor, or a part of it, in the type it is stored in; of the first axis only what is asked for is read."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: {name} is stored as {entry.dtype}, and only {', '.join(DTYPES)} are supported."
            )
        dtype, shape, start = DTYPES[entry.dtype], entry.shape, entry.start
        if slices:
            first, stop, _ = slices[0].indices(shape[0])
            row = math.prod(shape[1:]) * dtype.itemsize
            start, shape = start + first * row, (max(stop - first, 0), *shape[1:])
        content = np.empty(shape, dtype)
        view = memoryview(content.reshape(-1).view(np.uint8))
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while view:
                if not (count := file.readinto(view)):
                    raise UserError(f"{self.path} became shorter while it was read: fetch or export it again.")
                view = view[count:]
        return content[(slice(None), *slices[1:])] if slices else content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice in its header")
    return found


def _entries(header: Any, start: int, size: int) -> dict[str, Entry]:
    entries = {}
    for name, said in header.items():
        if name == "__metadata__":
            continue
        begin, end = said["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *said["shape"])):
            raise ValueError(f"{name} lies at {begin} to {end} in shape {said['shape']}, which are no places and sizes")
        entry = Entry(said["dtype"], tuple(said["shape"]), start + begin, start + end)
        itemsize = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if itemsize is not None and end - begin != itemsize * math.prod(entry.shape):
            raise ValueError(f"{name} has {end - begin} bytes, which is not its shape {entry.shape} in {entry.dtype}")
        entries[name] = entry
    stop = start
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1][2:]):
        if entry.start != stop or entry.stop < entry.start:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        stop = entry.stop
    if stop != size:
        raise ValueError(f"it has {size} bytes, and its header speaks of {stop}")
    return entries


def write_tensor_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, values: Iterable[np.ndarray]
) -> str:
    """Write tensors of one type, given one after the other in the order of `shapes`; returns the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    # Hashing lets go of the interpreter's lock, so it runs beside the writing and the making of the next tensor.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(digest.update, len(text).to_bytes(8, "little") + text)
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, value in zip(shapes.values(), values, strict=True):
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"expected {shape} {dtype}, not {value.shape} {value.dtype}")
            content = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            hashed.result()
            hashed = hasher.submit(digest.update, content)
            while content:
                content = content[file.write(content) :]
        hashed.result()
    return digest.hexdigest()
