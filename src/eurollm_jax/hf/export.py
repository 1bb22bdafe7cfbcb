"""Writes a model as a folder that `transformers` loads: safetensors, configuration, tokenizer, list of hashes.

One shard at a time is in memory, and the folder appears under its name only when it is whole.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file

from eurollm_jax.corpus.folders import file_sha256, new_folder, write_json
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.hf.mapping import (
    CONFIG_NAME,
    DTYPES,
    INDEX_NAME,
    WEIGHTS_NAME,
    ExportDtype,
    Tensor,
    config_to_hf,
    tensors,
)
from eurollm_jax.hf.tokenizer import write_hf_tokenizer
from eurollm_jax.model.param import Params, flatten
from eurollm_jax.model.transformer import TransformerConfig

HASHES_NAME = "SHA256SUMS"


def export(
    params: Params,
    config: TransformerConfig,
    tokenizer: Tokenizer,
    out: Path,
    *,
    dtype: ExportDtype = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> list[Path]:
    """Write the model to the folder `out` and return its files; `params` are numpy or jax arrays.

    With `overwrite` an earlier export at `out` is replaced once the new one is whole: two renames, and a failure
    before or between them leaves the earlier one in place. Raises UserError, with nothing touched, where `out` holds
    anything that no export of ours wrote, where the tokenizer's vocabulary is not the model's, or where a weight is
    not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: choose one of {', '.join(DTYPES)}.")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{tokenizer.model_path} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            f"give the tokenizer that the model was trained with."
        )
    description = config_to_hf(
        config, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
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
    with new_folder(staged) as folder:
        write_json(folder / CONFIG_NAME, description)
        write_json(folder / "generation_config.json", {k: v for k, v in description.items() if k.endswith("_token_id")})
        write_hf_tokenizer(tokenizer, folder, model_max_length=config.max_positions)
        _write_weights(flatten(params), tensors(config), folder, np.dtype(jnp.dtype(dtype)), max_shard_bytes)
        names = sorted(file.name for file in folder.iterdir())
        sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names)
        (folder / HASHES_NAME).write_text(sums, encoding="utf-8")
    if earlier:
        _replace(out, staged)
    return [out / name for name in sorted([*names, HASHES_NAME])]


def is_export(folder: Path) -> bool:
    """Whether each file of the folder is one that an export wrote there, so that nothing else is lost with it."""
    if not (folder / HASHES_NAME).is_file():
        return False
    return {file.name for file in folder.iterdir()} == {HASHES_NAME, *recorded_hashes(folder)}


def recorded_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, as written with the export. Raises UserError where the list is damaged."""
    lines = (folder / HASHES_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    if damaged := [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]:
        raise UserError(f"{folder / HASHES_NAME}, line {damaged[0]}: expected a hash, two spaces and a file name.")
    return {name: digest for digest, name in pairs}


def _write_weights(
    weights: Mapping[str, Any], wanted: list[Tensor], folder: Path, dtype: np.dtype, max_shard_bytes: int
) -> None:
    shards = list(_shards(wanted, dtype.itemsize, max_shard_bytes))
    total = sum(tensor.size for tensor in wanted)
    index: dict[str, str] = {}
    with _progress() as progress:
        task = progress.add_task("writing weights", total=total * dtype.itemsize)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS_NAME
            content = {}
            for tensor in shard:
                content[tensor.name] = _cast(tensor, weights[tensor.path], dtype)
                index[tensor.name] = name
                progress.advance(task, tensor.size * dtype.itemsize)
            save_file(content, folder / name, metadata={"format": "pt"})  # transformers refuses a file without it
            (folder / name).chmod(0o644)  # safetensors leaves it to its owner alone
    if len(shards) > 1:
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": index})


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


def _cast(tensor: Tensor, weight: Any, dtype: np.dtype) -> np.ndarray:
    """The tensor as it is written: safetensors takes the memory as it lies, so it must be contiguous."""
    with np.errstate(over="ignore"):  # refused below, by name
        value = np.ascontiguousarray(tensor.to_hf(weight).astype(dtype))
    if not np.isfinite(value).all():
        raise UserError(
            f"{tensor.path}{'' if tensor.layer is None else f', layer {tensor.layer}'}, holds values that are not "
            f"finite in {dtype.name}: export another checkpoint, or with dtype float32."
        )
    return value


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
