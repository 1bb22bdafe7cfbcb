"""Folders that Hugging Face `datasets` saved with `save_to_disk`: which arrow files they hold, in order.

Nothing of the library is needed: each folder names its files in a `state.json`, and one of several splits the splits in
a `dataset_dict.json`.
"""

import json
from pathlib import Path
from typing import Any

from eurollm_jax.errors import UserError


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_cache(file: Path) -> bool:
    """Whether `file` lies in a saved dataset but is none of its own: the library keeps a cache beside them."""
    return is_saved_dataset(file.parent) and file not in saved_files(file.parent, None)


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The arrow files of a saved dataset in order, of its part `split` if it is a dictionary of several."""
    splits = _json(folder / "dataset_dict.json")["splits"] if (folder / "dataset_dict.json").is_file() else None
    if splits is not None:
        if split not in splits:
            wrong = f"has no split {split!r}" if split else "has several splits"
            raise UserError(f"{folder} {wrong}; end it with {' or '.join(f'?split={name}' for name in splits)}")
        return saved_files(folder / str(split), None)
    if split is not None:
        raise UserError(f"{folder} is one dataset without splits; leave ?split={split} off")
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} holds rows in another order than its files; save it again after flatten_indices()")
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {folder / 'state.json'} names it; copy the whole folder again")
    return files


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the whole folder again") from None
