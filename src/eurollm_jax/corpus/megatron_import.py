"""Existing Megatron datasets as the sources of a token store, where they lie: the tokens are read once and not copied.

What a store knows of its documents beyond their tokens is counted here: how many bytes each stands for. Their ids, urls
and hashes are not in a Megatron dataset, and what begins and ends a document there is taken as it is.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from eurollm_jax.corpus.folders import file_sha256, new_folder
from eurollm_jax.corpus.megatron import bin_file, read_index
from eurollm_jax.corpus.preparing.processes import run_jobs
from eurollm_jax.corpus.reading.path_names import tag_language
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.store_writer import write_manifest
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.languages import resolve

_AT_ONCE = 1 << 20  # tokens
_FOLDERS = 3  # above a dataset, in whose names its language is looked for
_NO_CORPUS = {"megatron-lm", "megatron", "tokenized", "tokens", "data", "datasets", "train", "bin", "merged"}
_ENDINGS = re.compile(r"(^|_)(text|content)_(document|sentence)$")  # what Megatron's own tool appends


def import_megatron(
    prefixes: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    processes: int | None = None,
) -> TokenStore:
    """Make the store `out` of the datasets `prefix`.bin and `prefix`.idx, one source each; the .bin stays where it is.

    `names` and `languages`, one for each prefix, are by default those of `source_names` and `path_language`. A document
    without any token is left out. Documents are read as they are: a beginning mark that is not there is not added.
    Raises UserError for a dataset that `read_index` refuses, is empty, or has ids beyond the tokenizer's vocabulary,
    and for a tokenizer that loses text.
    """
    tokenizer.require_lossless()
    paths = [Path(prefix).absolute() for prefix in prefixes]
    codes = path_languages(paths, languages)
    chosen = source_names(paths, codes, names)
    for path in paths:
        if not len(read_index(path).lengths):
            raise UserError(f"{bin_file(path)} has no tokens; leave it out")
    processes = processes or min(len(paths), len(os.sched_getaffinity(0)))
    with new_folder(out) as folder, _bar() as progress:
        total = sum(bin_file(path).stat().st_size for path in paths)
        bar = progress.add_task("reading", total=total)
        tables = Tables.of(tokenizer)
        tasks = [Task(path, name, code, folder, tables) for path, name, code in zip(paths, chosen, codes, strict=True)]
        entries = run_jobs(
            register,
            tasks,
            workers=processes or len(os.sched_getaffinity(0)),
            show=lambda octets: progress.update(bar, completed=octets),
            rescue="import the datasets again",
        )
        identity = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
        write_manifest(folder, identity, dict(sorted(entries)))
    return TokenStore.open(out)


def path_languages(prefixes: Sequence[Path | str], given: Sequence[str] | None = None) -> list[str]:
    """The code of each dataset's language: the one `given`, or else that with which its name begins, or that of the
    nearest of three folders above it that has one. Raises UserError where there is none."""
    if given is None:
        return [_path_language(Path(prefix)) for prefix in prefixes]
    if len(given) != len(prefixes):
        raise UserError(f"{len(given)} languages are given for {len(prefixes)} datasets; give one for each")
    return [resolve(tag).code for tag in given]


def source_names(
    prefixes: Sequence[Path | str], languages: Sequence[str], given: Sequence[str] | None = None
) -> list[str]:
    """A name for each dataset: the one `given`, or else its language, the nearest folder that names a corpus, and what
    more its own name says.

    `.../hplt/megatron-lm/fin_Latn` is "fi/hplt", `.../hplt/fin_Latn_part1_text_document` "fi/hplt-part1". A name
    follows from the path alone, so that it stays when the list changes; where two would be the same, both get eight
    digits of the hash of their path. Raises UserError for a given name that cannot be used.
    """
    if given is not None:
        return _checked_names(prefixes, given)
    paths = [Path(prefix).absolute() for prefix in prefixes]
    names = [_source_name(path, code) for path, code in zip(paths, languages, strict=True)]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        for name, path in zip(names, paths, strict=True)
    ]


@dataclass(frozen=True)
class Tables:
    """What is counted for each token id."""

    piece_bytes: Int32[np.ndarray, " vocab"]
    characters: Int64[np.ndarray, " vocab"]  # a byte that goes on with a character begun before counts as none
    is_byte: Bool[np.ndarray, " vocab"]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Tables":
        begins = [sum(byte & 0xC0 != 0x80 for byte in piece.content) for piece in tokenizer.pieces]
        characters = np.array(begins, np.int64)
        characters[tokenizer.eos_id] -= len(tokenizer.prefix)  # as in `piece_bytes`
        return cls(tokenizer.piece_bytes, characters, tokenizer.is_byte)


@dataclass(frozen=True)
class Task:
    """One dataset to register."""

    prefix: Path
    name: str  # of the source
    language: str
    folder: Path  # of the store
    tables: Tables


def register(task: Task, advance: Callable[[int], None]) -> tuple[str, dict[str, Any]]:
    """Write the index files of one source and return its name and its entry in the manifest.

    One pass over the .bin counts bytes, characters and byte fallbacks and makes the hash; `advance` is told of the
    bytes that were read.
    """
    index, path, tables = read_index(task.prefix), bin_file(task.prefix), task.tables
    offsets = np.unique(index.offsets)  # drops documents without tokens
    byte_lengths = np.zeros(len(offsets) - 1, np.int64)
    counts = np.zeros(len(tables.piece_bytes), np.int64)
    digest, start, total = hashlib.sha256(), 0, int(offsets[-1])
    with path.open("rb") as file:
        while start < total:
            tokens = np.fromfile(file, index.dtype, min(_AT_ONCE, total - start))
            if not len(tokens):
                raise UserError(f"{path} became shorter while it was read; leave it alone and import it again")
            digest.update(tokens)
            _check_ids(path, tokens, start, len(counts))
            counts += np.bincount(tokens, minlength=len(counts))
            stop = start + len(tokens)
            first, last = offsets.searchsorted(start, side="right") - 1, offsets.searchsorted(stop)
            begins = np.maximum(offsets[first:last], start) - start
            byte_lengths[first:last] += np.add.reduceat(tables.piece_bytes[tokens], begins, dtype=np.int64)
            advance(tokens.nbytes)
            start = stop
    folder = task.folder / task.name
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "bytes.npy", byte_lengths)
    written = {name: folder / name for name in ("bytes.npy", "offsets.npy")}
    octets = int(byte_lengths.sum())
    entry = {
        "language": task.language,
        "dtype": index.dtype.name,
        "megatron": True,
        "documents": len(byte_lengths),
        "tokens": total,
        "bytes": octets,
        "characters": int(counts @ tables.characters),
        "fallback": int(counts[tables.is_byte].sum()),
        "shards": [{"file": str(path), "tokens": total}],
        "origins": [
            {"origin": str(task.prefix), "licence": "unknown", "documents": len(byte_lengths), "bytes": octets}
        ],
        "files": {
            **{name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for name, file in written.items()},
            str(path): {"size": total * index.dtype.itemsize, "sha256": digest.hexdigest()},
        },
    }
    return task.name, entry


def _check_ids(path: Path, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return
    at = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise UserError(
        f"{path}: token {start + at:,} is {tokens[at]}, and the tokenizer has ids from 0 to {vocab_size - 1}; "
        "give the tokenizer that made it"
    )


def _path_language(prefix: Path) -> str:
    path = prefix.absolute()
    for name in [path.name, *(folder.name for folder in list(path.parents)[:_FOLDERS])]:
        if code := _split_language(name)[0]:
            return code
    raise UserError(f"{prefix} says no language; begin its name or its folder's with a code, or say which it is")


def _checked_names(prefixes: Sequence[Path | str], names: Sequence[str]) -> list[str]:
    if len(names) != len(prefixes):
        raise UserError(f"{len(names)} names are given for {len(prefixes)} datasets; give one for each")
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name):
            raise UserError(f"{name!r} cannot be the name of a source; use letters, digits, '-', '_', '.' and '/'")
        if names.count(name) > 1:
            raise UserError(f"two datasets are named {name!r}; give each a name of its own")
    return list(names)


def _source_name(path: Path, language: str) -> str:
    words = _split_language(path.name)[1].strip("-_.")
    folders = (folder.name for folder in path.parents if folder.name.casefold() not in _NO_CORPUS)
    corpus = next((name for name in folders if _split_language(name)[1]), "")  # not named after a language alone
    parts = [re.sub(r"[^\w.-]+", "-", part).strip(".") for part in (corpus, words)]
    return "/".join(filter(None, [language, "-".join(filter(None, parts))]))


def _split_language(name: str) -> tuple[str, str]:
    """The code that the longest start of `name`, up to a hyphen, an underscore or a dot, stands for, and the rest."""
    name = _ENDINGS.sub("", name)
    ends = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] in "-_.")]
    return next(((code, name[end:]) for end in ends if (code := tag_language(name[:end]))), ("", name))


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
