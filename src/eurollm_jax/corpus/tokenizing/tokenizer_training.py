"""Train a tokenizer on a language-balanced sample, so that small languages get pieces of their own.

SentencePiece BPE (Kudo and Richardson, 2018) with identity normalisation, byte fallback and single digits. The same
inputs and options give the same model, byte for byte.
"""

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import sentencepiece
from rich.console import Console

from eurollm_jax.corpus.folders import differences, file_sha256, new_folder, read_json, write_json
from eurollm_jax.corpus.preparing.input_files import file_names
from eurollm_jax.corpus.reading.sources import Defaults, Fault, Part, find_parts, read_part, stop_at
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    STAND_IN,
    UNK_ID,
    SentencePieceTokenizer,
)
from eurollm_jax.corpus.tokenizing.tokenizer import MODEL_NAME
from eurollm_jax.corpus.tokenizing.words import SPACE_MARK
from eurollm_jax.errors import UserError

RECORD_NAME = "training.json"

# SentencePiece counts positions within a word in 16 bits, and is slow on long words, so no line may be long.
_LONGEST_LINE = 4096

# U+2585 means something else to the trainer, which skips each line that holds one; it encodes as bytes.
_NEVER_PIECES = frozenset(f"\n \u2585{SPACE_MARK}{STAND_IN}")


def train_tokenizer(
    inputs: str | Path | Sequence[str | Path],
    out: Path,
    *,
    vocab_size: int,
    alpha: float = 0.3,
    sample_bytes: int | None = None,
    coverage: float = 0.9999,
    seed: int = 0,
    special_tokens: tuple[str, ...] = (),
    defaults: Defaults = Defaults(),  # noqa: B008
    fault: Fault = stop_at,
) -> SentencePieceTokenizer:
    """Train on the documents of `inputs` and write `tokenizer.model` and `training.json` to the folder `out`.

    `inputs`, `defaults` and `fault`, which is called once for each document that cannot be used, are those of
    `sources.find_parts` and `sources.read_part`.

    Of each language the sample has bytes in proportion to (its bytes)^`alpha`, but never more than there are, and
    `sample_bytes` in all: unless given, a sixth of the text, but at least 1 MB and at most 100 MB, for a sample of all
    there is could not be balanced. Lines are drawn at random with `seed`. The characters that make up the share
    `coverage` of each language's sample get pieces of their own, however small the language; the rest are written as
    bytes. The newline is one piece. `special_tokens` are control tokens beyond `<unk>`, `<s>`, `</s>` and `<pad>`.

    When `out` holds the result of the same call, it is returned and nothing is trained. Raises UserError when it holds
    that of another, when `vocab_size` is too small for the alphabets or too large for the sample, and for bad inputs.
    """
    _check_options(vocab_size, alpha, sample_bytes, coverage, special_tokens)
    parts = find_parts([inputs] if isinstance(inputs, str | Path) else inputs)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "alpha": alpha,
        "sample_bytes": sample_bytes,
        "coverage": coverage,
        "seed": seed,
        "special_tokens": list(special_tokens),
        "language": defaults.language,
        "fields": dict(defaults.fields),
        "sentencepiece": sentencepiece.__version__,
    }
    fingerprint = _fingerprint(parts)
    if (out / RECORD_NAME).is_file():
        return _existing(out, options, fingerprint)

    console = Console(stderr=True)
    with new_folder(out) as folder:
        with console.status("reading text for the tokenizer"):
            sizes = language_bytes(parts, defaults, fault)
            if not sizes:
                raise UserError(f"no document is left to train {out} on: all are refused; give other text")
            total = sample_bytes or min(max(sum(sizes.values()) // 6, 1_000_000), 100_000_000)
            sample = draw_sample(parts, sample_sizes(sizes, alpha, total), sizes, seed, defaults)
        alphabet = sorted(set().union(*(_alphabet(lines, coverage) for lines in sample.values())) - _NEVER_PIECES)
        fixed = 4 + len(special_tokens) + 256 + 2  # newline and space
        if fixed + len(alphabet) > vocab_size:
            raise UserError(
                f"vocab_size {vocab_size} is too small: the alphabets of {', '.join(sizes)} have {len(alphabet)} "
                f"characters and {fixed} tokens are fixed, so ask for {fixed + len(alphabet)} or more, or for a lower "
                f"coverage than {coverage}"
            )
        with console.status(f"training a tokenizer of {vocab_size} pieces"):
            model = _train(sample, vocab_size, "".join(alphabet), special_tokens)
        (folder / MODEL_NAME).write_bytes(model)
        languages = {
            language: {"bytes": sizes[language], "sample_bytes": sum(len(line.encode()) + 1 for line in lines)}
            for language, lines in sample.items()
        }
        record = {"options": options, "inputs": fingerprint, "languages": languages}
        write_json(folder / RECORD_NAME, record | {"model_sha256": file_sha256(folder / MODEL_NAME)})
    tokenizer = SentencePieceTokenizer.read(out / MODEL_NAME)
    read = sum(language["sample_bytes"] for language in languages.values()) / 1e6
    what = f"tokenizer of {vocab_size} pieces trained on {read:.1f} MB in {len(languages)} languages"
    print(f"{what}: {out}", file=sys.stderr)
    return tokenizer


def _fingerprint(parts: Sequence[Part]) -> dict[str, str]:
    """Name -> SHA-256 of each file, and the slices of TFDS datasets, which are not known by their files alone."""
    hashes = {name: file_sha256(file) for file, name in file_names(parts).items()}
    slices = dict.fromkeys(part.input.partition("&data_dir=")[0] for part in parts if part.input.startswith("tfds:"))
    return hashes | dict.fromkeys(slices, "read")


def language_bytes(
    parts: Sequence[Part],
    defaults: Defaults = Defaults(),  # noqa: B008
    fault: Fault = stop_at,
) -> dict[str, int]:
    """Language code -> UTF-8 bytes of its documents, sorted by code."""
    sizes: Counter[str] = Counter()
    for part in parts:
        for document in read_part(part, defaults, fault):
            sizes[document.language] += len(document.text.encode())
    return dict(sorted(sizes.items()))


def sample_sizes(sizes: Mapping[str, int], alpha: float, total: int) -> dict[str, float]:
    """Bytes to take of each language: min(size, c * size^alpha), with c such that they sum to `total`.

    When there is no more than `total`, all of it is taken.
    """
    weights = {language: size**alpha for language, size in sizes.items()}
    taken: dict[str, float] = {}
    left = float(total)
    # The language with the least text for its weight runs out first; what it leaves goes to those after it.
    for language in sorted(sizes, key=lambda name: sizes[name] / weights[name]):
        rate = left / sum(weights[name] for name in sizes if name not in taken)
        taken[language] = min(float(sizes[language]), rate * weights[language])
        left -= taken[language]
    return {language: taken[language] for language in sizes}


def draw_sample(
    parts: Sequence[Part],
    wanted: Mapping[str, float],
    sizes: Mapping[str, int],
    seed: int,
    defaults: Defaults = Defaults(),  # noqa: B008
) -> dict[str, list[str]]:
    """Language code -> random lines of its documents, about `wanted` bytes of the `sizes` there are.

    Documents that cannot be used are passed over, for `language_bytes` has told of them.
    """
    sample: dict[str, list[str]] = {language: [] for language in sizes}
    dice = {language: Random(f"{seed}/{language}") for language in sizes}
    for part in parts:
        for document in read_part(part, defaults, lambda _: None):
            share = wanted[document.language] / sizes[document.language]
            roll = dice[document.language].random
            lines = (line for line in _lines(document.text) if share >= 1 or roll() < share)
            sample[document.language].extend(lines)
    return sample


def _lines(text: str) -> Iterator[str]:
    for line in text.replace(SPACE_MARK, STAND_IN).split("\n"):
        for start in range(0, len(line), _LONGEST_LINE):
            yield line[start : start + _LONGEST_LINE]


def _alphabet(lines: list[str], coverage: float) -> set[str]:
    """The most frequent characters that together make up `coverage` of the text, and digits."""
    codes = np.frombuffer("".join(lines).encode("utf-32-le"), np.uint32)
    counts = np.bincount(codes)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    needed = order[(before < coverage * len(codes)) & (counts[order] > 0)]
    return set(map(chr, needed)) | set("0123456789")


def _train(sample: Mapping[str, list[str]], vocab_size: int, alphabet: str, special_tokens: tuple[str, ...]) -> bytes:
    model = io.BytesIO()
    # Rare characters are cut out here and every other one kept by the trainer, whose own `required_chars` are lost
    # once the ones before them cover enough of the text.
    rare = re.compile(f"[^{re.escape(alphabet)} ]")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                part for lines in sample.values() for line in lines for part in rare.split(line) if part
            ),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # The trainer never sees a newline, which ends a line for it; asking for the character gives it a piece.
            required_chars="\n0123456789",
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            control_symbols=list(special_tokens),
            max_sentence_length=8 * _LONGEST_LINE,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        if limit := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise UserError(
                f"vocab_size {vocab_size} is too large for the sample of this text: ask for {limit[1]} or fewer, "
                "or give more text"
            ) from None
        raise
    return model.getvalue()


def _check_options(
    vocab_size: int, alpha: float, sample_bytes: int | None, coverage: float, special_tokens: tuple[str, ...]
) -> None:
    if vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size}; it must be positive")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; it must be from 0 (all languages alike) to 1 (as much as there is of each)")
    if sample_bytes is not None and sample_bytes < 1:
        raise UserError(f"sample_bytes is {sample_bytes}; it must be positive")
    if not 0 < coverage <= 1:
        raise UserError(f"coverage is {coverage}; it must be above 0 and at most 1")
    names = ("<unk>", "<s>", "</s>", "<pad>", *special_tokens)
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"special token {name!r} is there twice; name each once, and <unk>, <s>, </s>, <pad> not at all"
            )
        if not name or any(character.isspace() or character in (SPACE_MARK, STAND_IN) for character in name):
            raise UserError(f"special token {name!r} is empty or holds a space; give it another name")


def _existing(out: Path, options: dict[str, Any], inputs: dict[str, str]) -> SentencePieceTokenizer:
    record = read_json(out / RECORD_NAME)
    if difference := differences(record["options"], options) or differences(record["inputs"], inputs):
        raise UserError(f"{out} holds another tokenizer: {difference}; choose another folder or delete it")
    model = out / MODEL_NAME
    if not model.is_file() or file_sha256(model) != record["model_sha256"]:
        raise UserError(f"{model} is damaged, for its hash is not the one recorded; delete {out} and train again")
    print(f"{out} holds this tokenizer already", file=sys.stderr)
    return SentencePieceTokenizer.read(out / MODEL_NAME)
