"""What the names of files and folders say about a corpus: its language and what it is called.

Corpora of many shards often say neither in their records (CulturaX and mC4 name the language in the path alone), and a
shard's own name (`train-00007-of-00032`) is no name for where a text comes from.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from eurollm_jax.errors import UserError
from eurollm_jax.languages import resolve

# Folders between a corpus or a language and its files.
_SPLITS = ("train", "training", "test", "valid", "validation", "dev", "heldout", "data", "default")
# Words that tell one shard from the next; so do numbers with leading zeros or five digits, which years have not.
_SHARD_WORDS = ("part", "shard", "chunk", "split", "tfrecord", "of", *_SPLITS)
_SHARD_NUMBER = re.compile(r"0\d+|\d{5}")

# `fi`, `fin_Latn`, `pt-BR`, `sr_Latn_ME`, `Finnish`: more narrow than `resolve`, to which `no_filter` is Norwegian.
_TAG = re.compile(r"[A-Za-z]{2,3}([-_][A-Z][a-z]{3})?([-_][A-Z]{2})?|[A-Z][a-z]+")
_MC4 = re.compile(r"c4-(?P<language>[A-Za-z-]+)\.tfrecord")


def language_of(path: Path, suffixes: Sequence[str]) -> str:
    """The code of the language that the name of a file or of its folder says, or "".

    A file's name says it at its beginning (`fi.txt`, `fin_Latn-news.jsonl`, `fi_part_00001.parquet`) or where mC4
    writes it (`c4-fi.tfrecord-00000-of-00500.json.gz`), a folder's name as a whole; folders named after a split are
    passed over (`fin_Latn/train/000_00001.parquet`). Raises UserError when file and folder say different languages.
    """
    stem = _stem(path, suffixes)
    mc4 = _MC4.match(stem)
    by_file = leading_language(mc4["language"] if mc4 else stem)
    by_folder = tag_language(next((name for name in _folders(path) if name.casefold() not in _SPLITS), ""))
    if by_file and by_folder and by_file != by_folder:
        raise UserError(f"{path} is {by_file!r} by its name and {by_folder!r} by its folder's; rename either")
    return by_file or by_folder


def corpus_of(path: Path, suffixes: Sequence[str]) -> str:
    """What the corpus of a file is called: the file's name without what tells one shard from the next.

    When nothing else is in it, that of the nearest folder which is not named after a language, a split or a number
    (`fineweb-2/data/fin_Latn/train/000_00001.parquet` is of `fineweb-2`); failing both, the file's name.
    """
    stem = _stem(path, suffixes)
    return _without_shard(stem) or next((name for name in _folders(path) if _without_shard(name)), stem)


def leading_language(name: str) -> str:
    """The code that the longest possible start of `name`, up to a hyphen, an underscore or a dot, stands for; or ""."""
    ends = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] in "-_.")]
    return next((code for end in ends if (code := tag_language(name[:end]))), "")


def tag_language(name: str) -> str:
    """The code that `name` as a whole stands for, or ""."""
    with suppress(UserError):
        return resolve(name).code if _TAG.fullmatch(name) else ""
    return ""


def _without_shard(name: str) -> str:
    """`name` without the words at its end that tell one shard from the next, "" when there is no more to it.

    A language before such words goes too (`c4-fi.tfrecord-00000-of-00512` is of `c4`).
    """
    words = re.split(r"([-_.])", name)
    if all(word.isdigit() or _tells_shards(word) or tag_language(word) for word in words[::2]):
        return ""
    count = len(words)
    while _tells_shards(words[-1]):
        del words[-2:]
    if len(words) < count and len(words) > 2 and tag_language(words[-1]):
        del words[-2:]
    left = "".join(words)
    return "" if tag_language(left) else left


def _tells_shards(word: str) -> bool:
    return word.casefold() in _SHARD_WORDS or bool(_SHARD_NUMBER.fullmatch(word))


def _folders(path: Path) -> list[str]:
    """The names of the folders around a file, the nearest first."""
    return [folder.name for folder in path.absolute().parents if folder.name]


def _stem(path: Path, suffixes: Sequence[str]) -> str:
    return next((path.name.removesuffix(end) for end in suffixes if path.name.endswith(end)), path.stem)
