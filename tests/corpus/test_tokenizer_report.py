"""The report's figures against plain counting."""

import io
import json
import shutil

import pytest
from rich.console import Console

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing.tokenizer_report import report_json, report_table, tokenizer_report
from eurollm_jax.languages import LANGUAGES


def test_figures_are_those_of_plain_counting(tokenizer, corpus_dir):
    rows = {row.language: row for row in tokenizer_report(tokenizer, corpus_dir, threads=2)}
    assert set(rows) == {"bg", "de", "el", "en", "mt"}
    english = [document.text for document in read_documents(corpus_dir / "en.jsonl")]
    english_ids = [index for text in english for index in tokenizer.encode(text).tolist()]
    for language, row in rows.items():
        texts = [document.text for document in read_documents(corpus_dir / f"{language}.jsonl")]
        ids = [index for text in texts for index in tokenizer.encode(text).tolist()]
        characters, utf8 = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        assert (row.documents, row.tokens, row.characters, row.bytes) == (len(texts), len(ids), characters, utf8)
        assert row.bytes_per_token == pytest.approx(utf8 / len(ids))
        assert row.characters_per_token == pytest.approx(characters / len(ids))
        assert row.fertility == pytest.approx(len(ids) / sum(len(text.split()) for text in texts))
        assert row.unused == pytest.approx(1 - len(set(ids)) / tokenizer.vocab_size)
        assert row.premium_per_character == pytest.approx(
            len(ids) / characters / (len(english_ids) / sum(map(len, english)))
        )
        assert row.premium_per_byte == pytest.approx(
            len(ids) / utf8 / (len(english_ids) / sum(len(text.encode()) for text in english))
        )
        assert row.fallback == 0
    assert rows["en"].premium_per_character == rows["en"].premium_per_byte == 1


def test_fallback_counts_byte_tokens_and_not_newlines(tokenizer, tmp_path):
    text = "a\n\n☃"
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": text, "language": "en"}))
    (row,) = tokenizer_report(tokenizer, tmp_path)
    assert row.tokens == 6
    assert row.fallback == 3 / 6


def test_without_english_there_is_no_premium(tokenizer, corpus_dir, tmp_path):
    for language in ("mt", "el"):
        shutil.copy(corpus_dir / f"{language}.jsonl", tmp_path)
    rows = tokenizer_report(tokenizer, tmp_path)
    assert [row.premium_per_character for row in rows] == [None, None]


def test_the_table_shows_the_dearest_language_first(tokenizer, corpus_dir):
    rows = tokenizer_report(tokenizer, corpus_dir)
    per_character = [row.tokens / row.characters for row in rows]
    assert per_character == sorted(per_character, reverse=True)
    out = io.StringIO()
    Console(file=out, width=80).print(report_table(rows))
    printed = [line.split()[0] for line in out.getvalue().splitlines() if line.strip()]
    assert [word for word in printed if word in LANGUAGES] == [row.language for row in rows]
    assert "mt Maltese" in out.getvalue()
    assert "…" not in out.getvalue()
    assert json.loads(json.dumps(report_json(tokenizer, rows)))["languages"][0]["language"] == rows[0].language
