"""Corpora that TensorFlow Datasets has prepared as array_record: read by index, without TensorFlow.

An input is `tfds:NAME/CONFIG:VERSION?split=train&data_dir=FOLDER`. CONFIG is left out where the dataset has none;
without VERSION the newest that is prepared is meant; `split` may be a slice (`train[:99%]`); and without `data_dir` the
data lie where TFDS puts them, in $TFDS_DATA_DIR or ~/tensorflow_datasets.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eurollm_jax.corpus.reading.documents import Document, Fault, Origin, did_you_mean, document, missing_text
from eurollm_jax.errors import UserError

SCHEME = "tfds:"

_BATCH = 64  # examples read at once


@dataclass(frozen=True, slots=True)
class Shard:
    """The examples [first, stop) of a split lie in `file`, and make up `bytes` of it."""

    file: Path
    first: int
    stop: int
    bytes: int


def resolve_uri(uri: str) -> str:
    """`uri` with its version and its folder written out, so that it means the same in another process.

    Raises UserError when it is malformed and when the dataset, its configuration, version or split is not prepared.
    """
    name, version, options = _parse(uri)
    folder = Path(options.get("data_dir") or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    at = folder.absolute()
    for step in name.split("/"):
        at = _inside(uri, at, step)
    if version:
        at = _inside(uri, at, version)
    else:
        versions = [entry.name for entry in at.iterdir() if _version(entry.name)]
        if not versions:
            below = sorted(entry.name for entry in at.iterdir() if entry.is_dir() and not entry.name.startswith("."))
            raise UserError(
                f"{uri!r}: {at} holds no version of a dataset; add one of its configurations, {_list(below)}"
            )
        at /= max(versions, key=_version)
    resolved = f"{SCHEME}{name}:{at.name}?split={options['split']}&data_dir={folder.absolute()}"
    _split(resolved)
    return resolved


def shards(uri: str) -> list[Shard]:
    """The files of the split that the resolved `uri` names, in order."""
    found, first = [], 0
    for instruction in _split(uri).file_instructions:
        file = Path(instruction.filename)
        if not file.is_file():
            raise UserError(f"{file} is missing, though {file.parent / 'dataset_info.json'} names it; prepare it again")
        taken = instruction.examples_in_shard if instruction.take < 0 else instruction.take
        size = file.stat().st_size * taken // max(1, instruction.examples_in_shard)
        found.append(Shard(file, first, first + taken, size))
        first += taken
    return found


def names(uri: str) -> tuple[str, list[str]]:
    """The dataset's name, and what of `uri` may name a language: the parts of its configuration, and its split.

    There are `c4/multilingual` with a split a language, and `wikipedia/20230601.fi`.
    """
    name, _, options = _parse(uri)
    name, _, configuration = name.partition("/")
    return name, [configuration, *configuration.split("."), options["split"].partition("[")[0]]


def read_examples(uri: str, first: int, stop: int | None, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The documents of the examples [first, stop) of the split that the resolved `uri` names."""
    split = _split(uri)
    builder = _builder(uri)
    if wrong := missing_text(builder.info.features, origin.names["text"]):
        raise UserError(f"{uri}{wrong}")
    if not split.num_examples:
        raise UserError(f"{uri} has no documents; give another split")
    source = builder.as_data_source(split=_parse(uri)[2]["split"])
    for start in range(first, len(source) if stop is None else stop, _BATCH):
        numbers = range(start, min(start + _BATCH, len(source) if stop is None else stop))
        for number, example in zip(numbers, _read(uri, source, numbers), strict=True):
            where = lambda number=number: f"{uri}, example {number}"  # noqa: E731
            try:
                found = document({name: _plain(value) for name, value in example.items()}, where, origin)
            except UserError as error:
                fault(error)
            else:
                yield found


def _read(uri: str, source: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    try:
        return source.__getitems__(numbers)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        place = f"examples {numbers[0]} to {numbers[-1]}"
        raise UserError(f"{uri}, {place} cannot be read ({reason}); prepare the dataset again") from None


def _plain(value: Any) -> Any:
    """A feature as Python has it: bytes that are UTF-8 as text, numpy's scalars and arrays as numbers and lists."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=8)
def _builder(uri: str) -> Any:
    import tensorflow_datasets as tfds

    name, version, options = _parse(uri)
    folder = Path(options["data_dir"]) / name / version
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of many kinds, from protobuf's to FileNotFoundError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is not a dataset that TFDS has prepared ({reason}); prepare it again") from None
    kind = builder.info.file_format.value if builder.info.file_format else "unknown"
    if kind != "array_record":
        raise UserError(f"{folder} is stored as {kind}; prepare it with file_format='array_record'")
    return builder


def _split(uri: str) -> Any:
    splits = _builder(uri).info.splits
    split = _parse(uri)[2]["split"]
    try:
        return splits[split]
    except (KeyError, ValueError):
        raise UserError(f"{uri!r} has no split {split!r}{did_you_mean(split, splits) or _has(splits)}") from None


@functools.lru_cache(maxsize=64)
def _parse(uri: str) -> tuple[str, str, dict[str, str]]:
    """Name with configuration, version or "", and options."""
    how = "write it as tfds:NAME/CONFIG:VERSION?split=train&data_dir=FOLDER"
    address, _, query = uri.removeprefix(SCHEME).partition("?")
    options = dict(option.partition("=")[::2] for option in query.split("&") if option)
    name, _, version = address.partition(":")
    if unknown := [option for option in options if option not in ("split", "data_dir")]:
        raise UserError(f"{uri!r} has an option {unknown[0]!r}; {how}")
    if not options.get("split"):
        raise UserError(f"{uri!r} names no split; {how}")
    if not name or any(step in ("", ".", "..") for step in name.split("/")):
        raise UserError(f"{uri!r} names no dataset; {how}")
    return name, version, options


def _inside(uri: str, folder: Path, name: str) -> Path:
    if (folder / name).is_dir():
        return folder / name
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    there = [entry for entry in there if not entry.startswith(".")]
    raise UserError(f"{uri!r}: {folder / name} does not exist{did_you_mean(name, there) or _has(there)}")


def _has(names: Iterable[str]) -> str:
    return f"; there is {_list(names)}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:12]) or "nothing"


def _version(name: str) -> tuple[int, ...]:
    numbers = name.split(".")
    return tuple(map(int, numbers)) if len(numbers) == 3 and all(number.isdigit() for number in numbers) else ()
