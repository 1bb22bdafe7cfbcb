"""Writes a model as a folder that `transformers` loads: safetensors, configuration, tokenizer, card, list of hashes.

A few tensors are in memory at a time, and the folder appears under its name only when it is whole.
"""

import logging
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from eurollm_jax.corpus.folders import file_sha256, full_disk_is_named, new_folder, write_json
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import family_for
from eurollm_jax.hf.families.family import Family
from eurollm_jax.hf.folder import HASHES_NAME, recorded_hashes
from eurollm_jax.hf.mapping import CONFIG_NAME, DTYPES, INDEX_NAME, WEIGHTS_NAME, ExportDtype, Tensor, Weights, tensors
from eurollm_jax.hf.tensor_file import write_tensor_file
from eurollm_jax.hf.tokenizer import generation_config, write_hf_tokenizer
from eurollm_jax.hf.transposing import copy_to, row_blocks
from eurollm_jax.model.config import TransformerConfig, YarnScaling

log = logging.getLogger(__name__)

CARD_NAME = "README.md"
GENERATION_NAME = "generation_config.json"
# Of an imported config.json, what is not the architecture and goes out as it came in.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache")

_AHEAD = 2  # tensors that are made while one is written


@dataclass(frozen=True)
class Imported:
    """What a model keeps of the folder that it was imported from."""

    architecture: str
    dtype: ExportDtype
    config: Mapping[str, Any]  # its config.json
    generation_config: Mapping[str, Any] | None


def export(
    weights: Weights,
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    dtype: ExportDtype = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
    architecture: str | None = None,
    imported: Imported | None = None,
    chat_template: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the model to the folder `out` and return its files.

    Its architecture is the one asked for, else the one it was imported as, else the first that can say all of it. With
    `overwrite` an earlier export at `out` is replaced once the new one is whole: two renames, and a failure before or
    between them leaves the earlier one in place. Raises UserError, with nothing touched, where `out` holds anything
    that no export of ours wrote, where no architecture or not the one asked for can say the model, where the tokenizer
    has ids that the model lacks, or where a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: choose one of {', '.join(DTYPES)}.")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes} must be 1 or more.")
    if tokenizer is not None:
        tokenizer.spare_rows(config.vocab_size)
    _warn_of_yarn(config)
    family = family_for(config, architecture or (imported.architecture if imported else None))
    earlier = out.is_dir() and any(out.iterdir())
    if earlier and not (overwrite and is_export(out)):
        raise UserError(
            f"{out} holds an export already: choose another folder, or overwrite it (--overwrite)."
            if is_export(out)
            else f"{out} holds files that no export of ours wrote, and stays as it is: choose another folder."
        )

    staged = out.with_name(f".{out.name}.new") if earlier else out
    if earlier and staged.exists():
        shutil.rmtree(staged)  # whole, but its process was killed before it took its place
    kept = "the earlier export stays as it is" if earlier else "nothing is left at that place"
    with full_disk_is_named(out, f"{kept}; export again"), new_folder(staged) as folder:
        hashes = _write_weights(weights, family, config, folder, np.dtype(jnp.dtype(dtype)), max_shard_bytes)
        marks = _write_descriptions(folder, tokenizer, config, imported, chat_template)
        write_json(folder / CONFIG_NAME, config_json(family, config, dtype, marks))
        if card is not None:
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
        names = sorted(file.name for file in folder.iterdir())
        sums = "".join(f"{hashes.get(name) or file_sha256(folder / name)}  {name}\n" for name in names)
        (folder / HASHES_NAME).write_text(sums, encoding="utf-8")
    if earlier:
        _replace(out, staged)
    return [out / name for name in sorted([*names, HASHES_NAME])]


def config_json(
    family: Family, config: TransformerConfig, dtype: ExportDtype, marks: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of config.json, with each field in every form that a version of transformers reads.

    Version 4 takes `rope_theta` and `torch_dtype` where version 5 takes `rope_parameters` and `dtype`; a reader that
    misses one falls back to its own default without a word.
    """
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(config),
        "attention_dropout": 0.0,
        "use_cache": True,
        **marks,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _warn_of_yarn(config: TransformerConfig) -> None:
    for scaling in {kind.rope.scaling for kind in config.pattern if kind.rope}:
        if isinstance(scaling, YarnScaling) and scaling.factor != config.max_positions / scaling.original_positions:
            log.warning(
                "YaRN's factor %g is not max_positions / original_positions = %g, with which some versions of "
                "transformers compute",
                scaling.factor,
                config.max_positions / scaling.original_positions,
            )


def is_export(folder: Path) -> bool:
    """Whether each file of the folder is one that an export wrote there, so that nothing else is lost with it."""
    if not (folder / HASHES_NAME).is_file():
        return False
    return {file.name for file in folder.iterdir()} == {HASHES_NAME, *recorded_hashes(folder)}


def _write_descriptions(
    folder: Path,
    tokenizer: Tokenizer | None,
    config: TransformerConfig,
    imported: Imported | None,
    chat_template: str | None,
) -> dict[str, Any]:
    """Writes the tokenizer and generation_config.json; returns what config.json says beside the architecture."""
    recorded = imported.generation_config if imported else None
    carried = {name: imported.config[name] for name in CARRIED if name in imported.config} if imported else {}
    if tokenizer is not None:
        write_hf_tokenizer(tokenizer, folder, model_max_length=config.max_positions, chat_template=chat_template)
        described = generation_config(tokenizer, recorded)
    elif chat_template is not None:
        raise UserError("a chat template belongs to a tokenizer, and this model has none: leave it out.")
    else:
        described = dict(recorded or {})
    write_json(folder / GENERATION_NAME, described)
    return {name: value for name, value in described.items() if name.endswith("_token_id")} | carried


def _write_weights(
    weights: Weights,
    family: Family,
    config: TransformerConfig,
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Writes the shards and, where there are several, their index; returns each shard's SHA-256."""
    wanted = [*tensors(family.table, config), *_constants(family, config)]
    shards = list(_shards(wanted, dtype.itemsize, max_shard_bytes))
    hashes: dict[str, str] = {}
    index: dict[str, str] = {}
    with _progress() as progress:
        task = progress.add_task("writing weights", total=sum(tensor.size for tensor in wanted) * dtype.itemsize)

        def values() -> Iterator[np.ndarray]:
            for value in _made_ahead(wanted, weights, family, dtype):
                yield value
                progress.advance(task, value.nbytes)

        made = values()
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS_NAME
            shapes = {tensor.name: tensor.shape for tensor in shard}
            hashes[name] = write_tensor_file(folder / name, shapes, dtype, islice(made, len(shard)))
            index |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in wanted)
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": index})
    return hashes


def _constants(family: Family, config: TransformerConfig) -> list[Tensor]:
    """The numbers that the architecture keeps among its tensors; their path is their name in the family."""
    return [
        Tensor(name.format(layers=layer), name, (layer,), "->", {})
        for name in family.constants
        for layer in range(config.depth)
    ]


def _made_ahead(wanted: list[Tensor], weights: Weights, family: Family, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors as they are to be written, in order; the next ones are made while one is written and hashed."""
    made: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for tensor in wanted:
                made.append(pool.submit(_made, tensor, weights, family, dtype))
                if len(made) > _AHEAD:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            for future in made:
                future.cancel()


def _made(tensor: Tensor, weights: Weights, family: Family, dtype: np.dtype) -> np.ndarray:
    """A tensor as it is to be written. Raises UserError where it is not finite."""
    value = np.empty(tensor.shape, dtype)
    if tensor.path in family.constants:
        value[...] = family.constants[tensor.path]
        return value
    ours = tensor.from_hf(value)  # a view: what is written to it is in its place over there
    for part in row_blocks(ours.shape):
        copy_to(ours[part], weights.read(tensor.path, (*tensor.index, *part)))
    if not _all_finite(value):
        raise UserError(
            f"{tensor.place} holds values that are not finite in {dtype.name}: export another checkpoint, or with "
            "dtype float32."
        )
    return value


def _shards(wanted: list[Tensor], itemsize: int, max_bytes: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of at most `max_bytes` each; a tensor larger than that is a shard of its own."""
    shard: list[Tensor] = []
    filled = 0
    for tensor in wanted:
        size = tensor.size * itemsize
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += size
    yield shard


def _all_finite(value: np.ndarray) -> bool:
    """As `np.isfinite(value).all()`, several times as fast: of the bits of all floats, as signed integers those of +inf
    and the positive NaNs are the largest, and as unsigned ones those of -inf and the negative NaNs."""
    size = value.dtype.itemsize
    bits, infinities = value.reshape(-1), np.array([np.inf, -np.inf], value.dtype)
    positive, negative = infinities[0].view(f"i{size}"), infinities[1].view(f"u{size}")
    return not bits.size or bool(bits.view(f"i{size}").max() < positive and bits.view(f"u{size}").max() < negative)


def _replace(out: Path, staged: Path) -> None:
    previous = out.with_name(f".{out.name}.previous")
    if previous.exists():
        shutil.rmtree(previous)
    out.rename(previous)
    try:
        staged.rename(out)
    except BaseException:
        previous.rename(out)
        raise
    shutil.rmtree(previous)


def _progress() -> Progress:
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
