"""Stores made with tokenizers of other makers: every byte counted, and what does not come back named."""

import hashlib
import io
import json
import unicodedata

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.corpus.inspect import inspect_store
from eurollm_jax.corpus.megatron import export_megatron
from eurollm_jax.corpus.megatron_import import import_megatron
from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare
from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.corpus.tokenizing.tokenizer_report import tokenizer_report
from eurollm_jax.data.packing import ConcatPacking, pack
from eurollm_jax.errors import UserError

KINDS = ("qwen", "qwen without NFC", "llama 3", "olmo", "llama 2", "mistral", "gemma")


@pytest.fixture(scope="module")
def loaded(hub_folders):
    return {kind: Tokenizer.load(folder) for kind, folder in hub_folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_holds_every_text_with_exact_counts(loaded, corpus_dir, tmp_path, kind):
    tokenizer = loaded[kind]
    store = prepare(corpus_dir, tokenizer, tmp_path / "store", workers=1)
    assert (store.tokenizer_sha256, store.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
    texts = {document.id: document.text for document in read_documents(corpus_dir)}
    for source in store.sources.values():
        for index in range(0, source.documents, 9):
            tokens, text = source.document_tokens(index), texts[source.document(index).id]
            assert (tokens[0], tokens[-1]) == (tokenizer.begin_id, tokenizer.eos_id)
            assert tokens[1:-1].tolist() == tokenizer.encode(text).tolist()
            assert tokenizer.decode_bytes(tokens) == text.encode()
            # What the model is charged for: everything but a document's first token.
            assert tokenizer.piece_bytes[tokens[1:]].sum() == source.byte_lengths[index] == len(text.encode())


def test_a_normal_form_is_said_and_its_bytes_are_counted(loaded, tmp_path, capsys):
    texts = ["cafe\u0301 au lait", "café au lait", "<think>\u0338 odd"]
    lines = [{"text": text, "id": str(i), "language": "fr"} for i, text in enumerate(texts)]
    (tmp_path / "fr.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = PrepareOptions(deduplicate=True)
    store = prepare(tmp_path / "fr.jsonl", loaded["qwen"], tmp_path / "store", options, workers=1)
    assert "brings text into NFC: the store's texts, bytes and hashes are those after it" in capsys.readouterr().err
    source = store.sources["fr"]
    found = [loaded["qwen"].decode(source.document_tokens(i)) for i in range(source.documents)]
    written = [unicodedata.normalize("NFC", text) for text in texts]
    assert found == [written[0], written[2]]  # the first two are the same text
    assert source.byte_lengths.tolist() == [len(text.encode()) for text in found]
    prepare(tmp_path / "fr.jsonl", loaded["llama 3"], tmp_path / "other", workers=1)
    assert "NFC" not in capsys.readouterr().err


def test_a_blocklist_may_name_a_text_as_it_was(loaded, tmp_path):
    texts = ["cafe\u0301", "thé"]
    lines = [{"text": text, "id": text, "language": "fr"} for text in texts]
    (tmp_path / "fr.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, spelt in enumerate(("cafe\u0301", "café")):
        blocked = tmp_path / f"blocked-{number}.txt"
        blocked.write_text(hashlib.sha256(spelt.encode()).hexdigest() + "\n")
        options = PrepareOptions(blocklist=blocked)
        store = prepare(tmp_path / "fr.jsonl", loaded["qwen"], tmp_path / f"store-{number}", options, workers=1)
        assert store.sources["fr"].documents == 1


@pytest.mark.parametrize(("kind", "text"), [("llama 2", "a ▁ mark"), ("mistral", " begins with a space")])
def test_a_document_that_does_not_come_back_is_named(loaded, tmp_path, kind, text):
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": text, "id": "odd", "language": "en"}) + "\n")
    with pytest.raises(UserError, match=r"en\.jsonl, document odd does not decode to its own text"):
        prepare(tmp_path / "en.jsonl", loaded[kind], tmp_path / "store", workers=1)


def test_a_report_of_it_counts_bytes_and_fallbacks(loaded, corpus_dir):
    rows = {row.language: row for row in tokenizer_report(loaded["llama 3"], corpus_dir)}
    size = sum(len(document.text.encode()) for document in read_documents(corpus_dir) if document.language == "el")
    assert rows["el"].bytes == size
    assert 0 <= rows["en"].fallback < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_that_rows_predict_are_those_of_the_texts(loaded, corpus_dir, tmp_path, kind):
    """What bits per byte are divided by: every byte of every document, each predicted once."""
    tokenizer = loaded[kind]
    store = prepare(corpus_dir / "el.jsonl", tokenizer, tmp_path / "store", workers=1)
    packing = ConcatPacking(store.sources["el"], 37)
    batch = pack([packing], np.zeros(packing.rows, int), np.arange(packing.rows))
    predicted = tokenizer.piece_bytes[batch.targets][batch.mask].sum()
    assert predicted == sum(len(document.text.encode()) for document in read_documents(corpus_dir / "el.jsonl"))
    begins = int((batch.tokens == tokenizer.begin_id)[batch.positions == 0].sum())
    assert begins >= store.sources["el"].documents


@pytest.mark.parametrize("kind", ["qwen", "llama 2"])
def test_documents_are_shown_as_they_were(loaded, hub_folders, corpus_dir, tmp_path, kind):
    store = prepare(corpus_dir, loaded[kind], tmp_path / "store", workers=1)
    console = Console(file=io.StringIO(), width=2000)
    inspect_store(store, console, find="mt-17", tokenizer=hub_folders[kind])
    text = next(document.text for document in read_documents(corpus_dir) if document.id == "mt-17")
    assert f"\n\n{text}\n" in "\n".join(line.rstrip(" ") for line in console.file.getvalue().split("\n"))


@pytest.mark.parametrize("kind", ["qwen", "llama 2"])
def test_an_exported_dataset_has_the_same_counts_when_it_is_imported(loaded, corpus_dir, tmp_path, kind):
    store = prepare(corpus_dir / "el.jsonl", loaded[kind], tmp_path / "store", workers=1)
    export_megatron(store.sources["el"], tmp_path / "ell_Grek")
    (source,) = import_megatron([tmp_path / "ell_Grek"], loaded[kind], tmp_path / "again").sources.values()
    assert source.byte_lengths.tolist() == store.sources["el"].byte_lengths.tolist()
    for figure in ("bytes", "characters", "fallback", "tokens"):
        assert getattr(source, figure) == getattr(store.sources["el"], figure)
