"""Reads a Hugging Face folder into our configuration and weights, and refuses by name what it does not understand."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from eurollm_jax.errors import UserError
from eurollm_jax.hf.mapping import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, config_from_hf, from_hf, tensors
from eurollm_jax.model.param import Params, unflatten
from eurollm_jax.model.transformer import TransformerConfig

_FLOATS = ("BF16", "F16", "F32")


def load(folder: Path) -> tuple[TransformerConfig, Params]:
    """Configuration, and weights as a tree of numpy float32, of a folder of safetensors, in one file or in shards.

    Raises UserError where a file is missing or damaged, where the index and the shards disagree, where a tensor is
    missing, unknown, of another shape or not of floats, and where config.json asks for what our decoder does not do.
    """
    config = config_from_hf(read_object(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    files = {name: shard for shard in _shards(folder) for name in shard.names}
    wanted = {tensor.name: tensor for tensor in tensors(config)}
    if missing := [name for name in wanted if name not in files]:
        raise UserError(f"{folder} lacks {_few(missing)}, which its config.json calls for: fetch or export it again.")
    if unknown := [name for name in files if name not in wanted]:
        raise UserError(f"{folder} holds {_few(unknown)}, which a model of its config.json does not have.")
    for name, tensor in wanted.items():
        files[name].check(name, tensor.shape)
    return config, unflatten(from_hf(lambda name: files[name].file.get_tensor(name), config))


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


class _Shard:
    """One safetensors file: its header is read at once, each tensor when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="np")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: fetch or export the folder again.") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): fetch or export it again.") from None
        self.names: list[str] = list(self.file.keys())

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        header = self.file.get_slice(name)
        if (found := tuple(header.get_shape())) != shape:
            raise UserError(f"{self.path}: {name} has shape {found}, and config.json calls for {shape}.")
        if (dtype := header.get_dtype()) not in _FLOATS:
            raise UserError(f"{self.path}: {name} is stored as {dtype}, and only {', '.join(_FLOATS)} are supported.")


def _shards(folder: Path) -> list[_Shard]:
    """The files of the folder, as the index names them where there is one."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [_Shard(folder / WEIGHTS_NAME)]
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index} has no weight_map: fetch or export it again.")
    shards = [_Shard(folder / name) for name in sorted(set(places.values()))]
    held = {name: shard.path.name for shard in shards for name in shard.names}
    if differing := sorted(name for name in held.keys() | places.keys() if held.get(name) != places.get(name)):
        raise UserError(f"{index} and the files it lists disagree about {_few(differing)}: fetch or export it again.")
    return shards


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
