"""datamix.txt, the list of datasets and ratios that Megatron-LM reads, as a token store and a Mixture, and back.

The file is `<ratio> <path>` for each dataset, split at white space, where <path>.bin and <path>.idx are the dataset. A
ratio is a share of the samples. Every sample there is full, so that is a share of the tokens, which it is here too;
our rows follow, which differ where the last row of an epoch is padded. Ratios are divided by their sum, as Megatron
does. What it refuses is refused: ratios that are not above zero. A `#` at the start of a word begins a comment;
Megatron knows none, so none is written.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eurollm_jax.corpus.megatron_import import import_megatron, path_languages, source_names
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.schedule import Schedule
from eurollm_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class Part:
    """One dataset of a blend."""

    ratio: float
    path: str
    line: int  # of the path in the file


def datamix(path: Path | str, *, names: Sequence[str] | None = None, languages: Sequence[str] | None = None) -> Mixture:
    """The ratios of the datamix.txt `path` as shares of tokens, for the store that `import_datamix` makes of the same
    file. `names` or `languages` are those given there. Raises UserError as `read_datamix` does."""
    return _mixture(read_datamix(path), names, languages)


def import_datamix(
    path: Path | str,
    tokenizer: Tokenizer,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    processes: int | None = None,
) -> tuple[TokenStore, Mixture]:
    """A store `out` of all datasets of the datamix.txt `path`, read in place, and the mixture of its ratios.

    `names` and `languages` are as in `import_megatron`, in the order of the file. Relative paths start at the working
    directory, as they do for Megatron.
    """
    parts = read_datamix(path)
    mixture = _mixture(parts, names, languages)
    prefixes = [part.path for part in parts]
    store = import_megatron(prefixes, tokenizer, out, names=names, languages=languages, processes=processes)
    return store, mixture


def read_datamix(path: Path | str) -> list[Part]:
    """The datasets of a datamix.txt, in its order.

    Raises UserError, with the line, for a ratio that is no number above zero, a ratio without a path, and a path that
    stands twice.
    """
    words = list(_words(Path(path)))
    if not words:
        raise UserError(f"{path} names no dataset; write '<ratio> <path>' for each")
    parts: list[Part] = []
    lines: dict[str, int] = {}
    for (line, ratio), following in zip(words[::2], [*words[1::2], None], strict=False):
        where = f"{path}, line {line}"
        value = _number(ratio)
        if value is None:
            raise UserError(f"{where}: {ratio!r} is where a ratio is due; write '<ratio> <path>' for each dataset")
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{where}: the ratio {ratio} is not above 0; give another, or leave the dataset out")
        if following is None or _number(following[1]) is not None:
            raise UserError(f"{where}: the ratio {ratio} has no path after it; write '<ratio> <path>'")
        line, dataset = following
        if dataset in lines:
            raise UserError(
                f"{path}, line {line}: {dataset} stands in line {lines[dataset]} already; name it once, with the sum "
                "of both ratios"
            )
        lines[dataset] = line
        parts.append(Part(value, dataset, line))
    return parts


def write_datamix(
    path: Path, schedule: Schedule, sizes: Mapping[str, SourceSize], prefixes: Mapping[str, Path | str]
) -> None:
    """Write a compiled mixture of one stage as a datamix.txt of the datasets `prefixes`, by source name.

    The ratios are of tokens, in twelve digits, largest first. Raises UserError when the mixture has several stages, a
    source has no prefix, or a prefix holds white space.
    """
    if len(schedule.stages) > 1:
        raise UserError(
            "the mixture changes in the course of the run, and a datamix.txt holds one; write each stage's mixture to "
            "a file of its own"
        )
    shares = dict(zip(schedule.names, schedule.stages[0].shares, strict=True))
    tokens = {name: share * sizes[name].tokens / sizes[name].rows for name, share in shares.items() if share}
    for name in tokens:
        if name not in prefixes:
            raise UserError(f"the source {name!r} has no dataset; export it with 'eurollm corpus export'")
        if len(str(prefixes[name]).split()) != 1:
            raise UserError(f"{str(prefixes[name])!r} holds white space, which ends a path in datamix.txt; rename it")
    total = math.fsum(tokens.values())
    lines = [
        f"{amount / total:.12g} {prefixes[name]}\n"
        for name, amount in sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    ]
    path.write_text("".join(lines), encoding="utf-8")


def _mixture(parts: list[Part], names: Sequence[str] | None, languages: Sequence[str] | None) -> Mixture:
    paths = [part.path for part in parts]
    names = source_names(paths, path_languages(paths, languages), names)
    total = math.fsum(part.ratio for part in parts)
    return Mixture.shares({n: p.ratio / total for n, p in zip(names, parts, strict=True)}, over="source")


def _words(path: Path) -> Iterator[tuple[int, str]]:
    """Each word with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {path}; give the path of a datamix.txt") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; give a datamix.txt") from None
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        for word in line.split():
            if word.startswith("#"):
                break
            yield number, word


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
