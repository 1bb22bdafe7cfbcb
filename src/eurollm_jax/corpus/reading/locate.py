"""From what a user names (files, folders, patterns, saved datasets, TFDS) to what is read, in order."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from eurollm_jax.corpus.reading import saved_datasets, text_files, tfds_files
from eurollm_jax.corpus.reading.documents import did_you_mean
from eurollm_jax.errors import UserError

SUFFIXES = (*text_files.LINES, *text_files.TEXTS, ".parquet", ".arrow")
_KINDS = ".jsonl, .txt (either also as .gz or .zst), .parquet or .arrow"

# A folder that holds one of these beside files we can read is refused, for half a corpus would go missing in silence.
_OTHER_DATA = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".ndjson", ".csv", ".tsv")


def find_inputs(given: Sequence[str | Path]) -> list[str]:
    """The path of each file, and the resolved address of each TFDS dataset, that the inputs `given` name, in order.

    The files of a folder or a pattern are sorted by name. Subfolders of a folder are not entered: a corpus keeps its
    held-out text in one. Raises UserError when an input has nothing to read, for a file of data that cannot be read,
    and for what is given twice.
    """
    found: dict[str, str] = {}
    for one in map(str, given):
        for name in _found(one):
            if name in found:
                raise UserError(f"{name} is given twice, by {found[name]!r} and {one!r}; name it once")
            found[name] = one
    return list(found)


def _found(given: str) -> list[str]:
    if given.startswith(tfds_files.SCHEME):
        return [tfds_files.resolve_uri(given)]
    path, marked, split = given.partition("?split=")
    return [str(file) for file in (_files(path, split) if marked else _files(given, None))]


def _files(given: str, split: str | None) -> list[Path]:
    """The files of a path or pattern; with `split`, those of saved datasets alone."""
    path = Path(given)
    if path.is_dir() and saved_datasets.is_saved_dataset(path):
        return saved_datasets.saved_files(path, split)
    if split is not None and path.exists():
        raise UserError(f"{path} is no folder saved by Hugging Face datasets; leave ?split={split} off")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is of no kind that can be read here; give {_KINDS}")
        return [path]
    if path.is_dir():
        return _folder_files(path)
    if glob.has_magic(given):
        return _pattern_files(given, split)
    raise UserError(_missing(path))


def _folder_files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    found = _readable([entry for entry in entries if entry.is_file()], folder)
    if not found:
        inside = [entry for entry in entries if entry.is_dir() and _has_text(entry)]
        meant = f"did you mean {_either(map(str, inside[:12]))}?" if inside else "give a folder of such files"
        raise UserError(f"{folder} has no {_KINDS} file; {meant}")
    return found


def _pattern_files(pattern: str, split: str | None) -> list[Path]:
    """The files that match, and those of the saved datasets whose folders match."""
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    saved = [match for match in matches if match.is_dir() and saved_datasets.is_saved_dataset(match)]
    found = {file for folder in saved for file in saved_datasets.saved_files(folder, split)}
    if split is None:
        files = _readable([match for match in matches if match.is_file()], pattern)
        found |= {file for file in files if not saved_datasets.is_cache(file)}
    if not found:
        what = f"matches no {_KINDS} file" if matches else "matches nothing"
        raise UserError(f"{pattern!r} {what}; give a pattern that does")
    return sorted(found)


def _readable(files: list[Path], within: str | Path) -> list[Path]:
    """Those of `files` that can be read here; UserError for another that looks like data beside them."""
    found = [file for file in files if file.name.endswith(SUFFIXES)]
    strays = [file for file in files if file.suffix in _OTHER_DATA and not file.name.endswith(SUFFIXES)]
    if found and strays:
        raise UserError(f"{strays[0]} cannot be read here; convert it to {_KINDS} or move it out of {within}")
    return found


def _has_text(folder: Path) -> bool:
    return saved_datasets.is_saved_dataset(folder) or any(entry.name.endswith(SUFFIXES) for entry in folder.iterdir())


def _missing(path: Path) -> str:
    while not path.parent.exists():
        path = path.parent
    hint = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"{path} does not exist{hint or '; give a file or folder that does'}"


def _either(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
