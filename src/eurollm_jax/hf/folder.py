"""A folder in Hugging Face format, opened: its configuration and headers are read and checked, its tensors when they
are asked for. What we do not understand is refused by name."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import family_of_folder
from eurollm_jax.hf.mapping import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, Index, Tensor, tensors
from eurollm_jax.hf.tensor_file import DTYPES, TensorFile
from eurollm_jax.hf.transposing import copy_to, row_blocks
from eurollm_jax.model.config import TransformerConfig

log = logging.getLogger(__name__)

HASHES_NAME = "SHA256SUMS"
COMPUTED = ("*.rotary_emb.inv_freq",)  # what old files keep although it follows from the configuration
TIED_HEAD = "lm_head.weight"  # some files hold it beside the embedding that it is


class HubFolder:
    """Raises UserError where a file is missing or damaged, where the index and the shards disagree, where a tensor is
    missing, unknown, of another shape or not of floats, and where config.json asks for what our decoder does not do.

    Of a model with images the text model is read; the log says how many tensors were left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = read_object(folder / CONFIG_NAME)
        self.family = family_of_folder(self.raw, str(folder / CONFIG_NAME))
        self.config: TransformerConfig = self.family.config(self.raw, str(folder / CONFIG_NAME))
        self.files = {name: file for file in _files(folder) for name in file.entries}
        wanted = tensors(self.family.table, self.config)
        self.tensors: list[Tensor] = [replace(tensor, name=self._spelled(tensor.name)) for tensor in wanted]
        self.set_aside = [name for name in self.files if name.startswith(self.family.set_aside)]
        self._check_names()
        for tensor in self.tensors:
            self._check(tensor.name, tensor.shape)
        self._check_constants()
        if self.set_aside:
            log.warning(
                "%s: %d of its %d tensors are left out (%s), and only the text model is read.",
                *(folder, len(self.set_aside), len(self.files), few(sorted(self.set_aside))),
            )

    @cached_property
    def dtype(self) -> str:
        """The type of the weights: float32, float16 or bfloat16; the widest of them, where files mix them."""
        found = {self.files[tensor.name].entries[tensor.name].dtype for tensor in self.tensors}
        widest = next(name for name in DTYPES if name in found) if len(found) == 1 else "F32"
        return DTYPES[widest].name

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def read(self, tensor: Tensor, wanted: Sequence[slice] | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Our part of a weight, or the slices `wanted` of its axes, in float32: new, or in `out`."""
        file = self.files[tensor.name]
        if wanted is None:
            found = tensor.from_hf(file.read(tensor.name))
        else:
            found = tensor.from_hf(file.read(tensor.name, tensor.their_slices(wanted)), wanted)
        value = np.empty(found.shape, np.float32) if out is None else out
        copy_to(value, found)
        return value

    def pieces(self) -> Iterator[tuple[str, Index, np.ndarray]]:
        """(our path, index on its leading axes, value in float32) of every tensor, a large one in parts of it."""
        for tensor in self.tensors:
            found = tensor.from_hf(self.files[tensor.name].read(tensor.name))
            for part in row_blocks(found.shape):
                value = np.empty(found[part].shape, np.float32)
                copy_to(value, found[part])
                yield tensor.path, (*tensor.index, *part), value

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the configuration and of each file of weights, by name, and of whatever the folder's own list of
        hashes names. Raises UserError where a file is not what that list says; without one, nothing can be compared."""
        recorded = recorded_hashes(self.folder) if (self.folder / HASHES_NAME).is_file() else {}
        _require_inside(recorded, self.folder / HASHES_NAME)
        of_weights = {file.path.relative_to(self.folder).as_posix() for file in self.files.values()}
        names = sorted({CONFIG_NAME, *of_weights, *recorded})
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise UserError(f"{self.folder / missing[0]} is missing, though {HASHES_NAME} lists it: fetch it again.")
        with ThreadPoolExecutor() as pool:
            found = dict(zip(names, pool.map(lambda name: file_sha256(self.folder / name), names), strict=True))
        if differing := [name for name in names if recorded.get(name, found[name]) != found[name]]:
            raise UserError(f"{self.folder}: {few(differing)} is not what {HASHES_NAME} lists: fetch the folder again.")
        return found

    def _check_names(self) -> None:
        wanted = {tensor.name for tensor in self.tensors} | self._constants.keys() | {*self.set_aside}
        if missing := [name for name in [tensor.name for tensor in self.tensors] if name not in self.files]:
            raise UserError(
                f"{self.folder} lacks {few(missing)}, which its config.json calls for: fetch or export it again."
            )
        unknown = [name for name in self.files if name not in wanted and not self._needless(name)]
        if unknown:
            raise UserError(f"{self.folder} holds {few(unknown)}, which a model of its config.json does not have.")

    def _needless(self, name: str) -> bool:
        """What may be left unread: numbers that follow from the configuration, and a second copy of the embedding."""
        if name == self._spelled(TIED_HEAD) and self.config.tied:
            embedding = next(tensor.name for tensor in self.tensors if tensor.path == "embedding")
            if not self._same(name, embedding):
                raise UserError(
                    f"{self.folder}: {name} is not {embedding}, though config.json says tie_word_embeddings: "
                    "correct it."
                )
            return True
        return any(fnmatchcase(name, pattern) for pattern in COMPUTED)

    def _same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal, compared some rows at a time."""
        shape = self.files[one].entries[one].shape
        return shape == self.files[other].entries[other].shape and all(
            np.array_equal(self.files[one].read(one, part), self.files[other].read(other, part))
            for part in row_blocks(shape)
        )

    def _spelled(self, name: str) -> str:
        """A name of the table as this folder has it."""
        first = next((beginning for beginning in self._spelling if name.startswith(beginning)), "")
        return self._spelling.get(first, "") + name.removeprefix(first)

    @cached_property
    def _spelling(self) -> Mapping[str, str]:
        """The family's first way of beginning names under which the folder has an embedding."""
        ways = self.family.spellings
        name, _ = self.family.table["embedding"]
        held = (way for way in ways for old, new in way.items() if new + name.removeprefix(old) in self.files)
        return next(held, ways[0])

    @cached_property
    def _constants(self) -> dict[str, float]:
        return {
            name.format(layers=layer): value
            for name, value in self.family.constants.items()
            for layer in range(self.config.depth)
        }

    def _check_constants(self) -> None:
        for name, value in self._constants.items():
            if name not in self.files:
                continue
            found = self.files[name].read(name)
            rounded = [np.asarray(value, dtype).astype(found.dtype) for dtype in DTYPES.values()]  # files get converted
            if not any(np.array_equal(found, number) for number in rounded):
                raise UserError(f"{self.files[name].path}: {name} is {found}, and only {value} is supported.")

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        file = self.files[name]
        entry = file.entries[name]
        if entry.shape != shape:
            raise UserError(f"{file.path}: {name} has shape {entry.shape}, and config.json calls for {shape}.")
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{file.path}: {name} is stored as {entry.dtype}, and only {', '.join(DTYPES)} are supported."
            )


def _files(folder: Path) -> list[TensorFile]:
    """The files of the folder, as the index names them where there is one."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [TensorFile(folder / WEIGHTS_NAME)]
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map: fetch or export it again.")
    _require_inside(places.values(), index)
    files = [TensorFile(folder / name) for name in sorted(set(places.values()))]
    held: dict[str, str] = {}
    for file in files:
        if twice := sorted(held.keys() & file.entries.keys()):
            raise UserError(
                f"{file.path} and {held[twice[0]]} both hold {few(twice)}: fetch or export the folder again."
            )
        held |= dict.fromkeys(file.entries, file.path.relative_to(folder).as_posix())
    if differing := sorted(name for name in held.keys() | places.keys() if held.get(name) != places.get(name)):
        raise UserError(f"{index} and the files it lists disagree about {few(differing)}: fetch or export it again.")
    return files


def _require_inside(names: Iterable[str], where: Path) -> None:
    """A folder from elsewhere has no say in what is read outside of it."""
    if outside := [name for name in sorted(set(names)) if not name or name[0] == "/" or ".." in name.split("/")]:
        raise UserError(f"{where} names {few(outside)!r}, and only files in its folder are read: fetch it again.")


def recorded_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, as written with an export. Raises UserError where the list is damaged."""
    lines = (folder / HASHES_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    if damaged := [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]:
        raise UserError(f"{folder / HASHES_NAME}, line {damaged[0]}: expected a hash, two spaces and a file name.")
    return {name: digest for digest, name in pairs}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder with a model in Hugging Face format.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch or export it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch or export it again.")
    return value


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
