"""What a tokenizer costs each language: tokens for its text, falls back to bytes, and the premium over English."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from rich import box
from rich.table import Table

from eurollm_jax.corpus.preparing.encoding import encode_documents
from eurollm_jax.corpus.reading.sources import Defaults, Fault, find_parts, read_part, stop_at
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.languages import LANGUAGES


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """One language's figures. A premium of 1.5 says: half as many tokens again as English for as much text.

    Without parallel text, "as much" is measured two ways, and neither is the same content. Per byte, a script of two
    bytes a character (Greek, Cyrillic) or three (Georgian) looks cheap beside English; per character it does not, but
    a language that needs more characters to say the same looks cheaper than it is. None without English.
    """

    language: str
    documents: int
    bytes: int
    characters: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    fertility: float  # tokens for each word, words being what whitespace separates
    fallback: float  # share of tokens that stand for one byte because no piece covers the character
    unused: float  # share of the vocabulary that this language's text never uses
    premium_per_character: float | None  # tokens per character, divided by the same of English
    premium_per_byte: float | None  # tokens per UTF-8 byte, divided by the same of English


@dataclass(slots=True)
class _Sums:
    used: Int64[np.ndarray, " vocab"]
    documents: int = field(default=0)
    bytes: int = field(default=0)
    characters: int = field(default=0)
    words: int = field(default=0)


def tokenizer_report(
    tokenizer: Tokenizer,
    inputs: str | Path | Sequence[str | Path],
    *,
    threads: int = 1,
    defaults: Defaults = Defaults(),  # noqa: B008
    fault: Fault = stop_at,
) -> list[LanguageRow]:
    """A row for each language of the documents of `inputs`, the language that pays most per character first.

    `inputs`, `defaults` and `fault` are those of `sources.find_parts` and `sources.read_part`. Raises UserError for bad
    inputs, with file and line.
    """
    sums: dict[str, _Sums] = {}
    for part in find_parts([inputs] if isinstance(inputs, str | Path) else inputs):
        documents = read_part(part, defaults, fault)
        for document, ids in encode_documents(documents, tokenizer, threads=threads, where=part.input, fault=fault):
            if document.language not in sums:
                sums[document.language] = _Sums(np.zeros(tokenizer.vocab_size, np.int64))
            language = sums[document.language]
            np.add.at(language.used, ids, 1)
            language.documents += 1
            language.bytes += len(document.text.encode())
            language.characters += len(document.text)
            language.words += len(document.text.split())
    english = sums.get("en")
    rows = [_row(language, total, english, tokenizer.is_byte) for language, total in sums.items()]
    return sorted(rows, key=lambda row: (row.characters_per_token, row.language))


def report_table(rows: Sequence[LanguageRow]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(
        title="What the tokenizer costs each language, dearest first",
        caption="premium: tokens per character, and per byte, relative to English (not parallel text)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("language", no_wrap=True, max_width=20)
    for name in ("bytes/\ntoken", "chars/\ntoken", "tokens/\nword", "fall-\nback", "unused", "premium", "by\nbyte"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.language} {LANGUAGES[row.language].name}",
            f"{row.bytes_per_token:.2f}",
            f"{row.characters_per_token:.2f}",
            f"{row.fertility:.2f}",
            f"{row.fallback:.2%}",
            f"{row.unused:.0%}",
            "-" if row.premium_per_character is None else f"{row.premium_per_character:.2f}",
            "-" if row.premium_per_byte is None else f"{row.premium_per_byte:.2f}",
        )
    return table


def report_json(tokenizer: Tokenizer, rows: Sequence[LanguageRow]) -> dict[str, Any]:
    """The rows as plain values, with the tokenizer's identity."""
    identity = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    return {"tokenizer": identity, "languages": [asdict(row) for row in rows]}


def _row(language: str, total: _Sums, english: _Sums | None, is_byte: Bool[np.ndarray, " vocab"]) -> LanguageRow:
    tokens = int(total.used.sum())
    per_character = per_byte = None
    if english is not None:
        english_tokens = int(english.used.sum())
        per_character = (tokens / total.characters) / (english_tokens / english.characters)
        per_byte = (tokens / total.bytes) / (english_tokens / english.bytes)
    return LanguageRow(
        language=language,
        documents=total.documents,
        bytes=total.bytes,
        characters=total.characters,
        tokens=tokens,
        bytes_per_token=total.bytes / tokens,
        characters_per_token=total.characters / tokens,
        fertility=tokens / total.words,
        fallback=int(total.used[is_byte].sum()) / tokens,
        unused=float((total.used == 0).mean()),
        premium_per_character=per_character,
        premium_per_byte=per_byte,
    )
