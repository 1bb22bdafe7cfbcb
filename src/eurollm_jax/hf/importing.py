"""Makes a run directory of a model in Hugging Face format, from which one can train on, generate and export.

Weights go from file to file, a tensor or less at a time: importing takes neither accelerators nor memory for the model.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from eurollm_jax.corpus.folders import full_disk_is_named, new_folder, write_json
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import encode, fingerprint
from eurollm_jax.hf.export import GENERATION_NAME, Imported
from eurollm_jax.hf.folder import HubFolder, few, read_object
from eurollm_jax.hf.mapping import Index
from eurollm_jax.hf.tokenizer import import_tokenizer
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.training.checkpoint import write_checkpoint


def import_folder(folder: Path, run: Path) -> HubFolder:
    """Make the run directory `run` of the model in `folder`; it appears only when it is whole.

    Raises UserError, with nothing left at `run`, where the folder is not one that `HubFolder` reads, where its files
    are not those of its list of hashes, where its tokenizer has ids that the model lacks, or where `run` is there.
    """
    hub = HubFolder(folder)
    with full_disk_is_named(run, "nothing is left at that place; import again"), new_folder(run) as staged:
        before, hashes = _states(hub), hub.hashes()
        tokenizer = import_tokenizer(folder, staged / "tokenizer")
        if tokenizer is not None:
            tokenizer.spare_rows(hub.config.vocab_size)
        shapes = {path: spec.shape for path, spec in flatten(specs(hub.config)).items()}
        write_checkpoint(staged / "checkpoints", 0, shapes, _shown(hub), {"row": 0, "seconds": 0.0, "tokens": []})
        if changed := [path.name for path, state in _states(hub).items() if before.get(path) != state]:
            raise UserError(f"{folder}: {few(changed)} changed while it was read: import again.")
        write_json(staged / "experiment.json", _record(hub, run.name, hashes, tokenizer))
    return hub


def _states(hub: HubFolder) -> dict[Path, tuple[int, int]]:
    """Size and time of each file of weights."""
    paths = {file.path for file in hub.files.values()}
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def imported_of(record: dict[str, Any]) -> Imported | None:
    """What a run's experiment.json says of the folder that it was imported from; None where it was trained here."""
    said = record.get("imported")
    if said is None:
        return None
    return Imported(said["exported_as"], said["dtype"], said["config"], said["generation_config"])


def _record(hub: HubFolder, name: str, hashes: dict[str, str], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """experiment.json: the same places as a trained run's for what both have."""
    generation = hub.folder / GENERATION_NAME
    identity = {"imported": hashes, "model": encode(hub.config)}
    return {
        "name": name,
        "docstring": f"Imported from {hub.folder.name}.",
        "fingerprint": fingerprint(identity),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "experiment": {"name": name, "model": encode(hub.config)},
        "identity": identity,
        "parameters": hub.parameters,
        "imported": {
            "folder": str(hub.folder.resolve()),
            "architecture": hub.family.architecture,
            "exported_as": hub.family.exported_as or hub.family.architecture,
            "dtype": hub.dtype,
            "sha256": hashes,
            "tokenizer": tokenizer is not None,
            "config": hub.raw,
            "generation_config": read_object(generation) if generation.is_file() else None,
        },
    }


def _shown(hub: HubFolder) -> Iterator[tuple[str, Index, np.ndarray]]:
    """The weights, a tensor or less at a time, and how far we are."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading weights", total=4 * hub.parameters)
        for piece in _one_ahead(hub.pieces()):
            yield piece
            progress.advance(task, piece[2].nbytes)


def _one_ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(T, item)
