"""Raw text: the documents that a run's rows hold, as their corpus wrote them, each once an epoch."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from eurollm_jax.corpus.reading.sources import read_documents, write_documents
from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.raw_text import texts
from eurollm_jax.data.removal import Removal
from eurollm_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus(corpus_dir):
    """Document by id, as the corpus files have it."""
    lines = (json.loads(line) for file in corpus_dir.iterdir() for line in file.read_text().splitlines())
    return {record["id"]: record for record in lines}


@pytest.fixture(scope="module")
def config(store):
    """Shares in proportion to rows: all sources end an epoch together, give or take a row."""
    return DataConfig(store=str(store.path), mixture=Mixture.proportional(), sequence_length=48)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_an_epoch_holds_every_document_once_as_it_was(config, corpus, tokenizer, packing):
    config = dataclasses.replace(config, packing=packing, mixture=Mixture.shares({"el": 0.5, "de": 0.5}))
    data = open_data(config, 100)
    for name in ("el", "de"):
        source, rows = np.array(data.source_names.index(name)), data.sizes[name].rows
        stop = int(data.order.index(source, np.array(rows - 1))) + 1  # its first epoch ends here
        found = [document for document in texts(data, tokenizer, 0, stop) if document.language == name]
        wanted = {id for id, record in corpus.items() if record["language"] == name}
        assert Counter(document.id for document in found) == Counter(wanted)
        for document in found:
            record = corpus[document.id]
            assert document.text == record["text"]
            assert (document.source, document.licence) == (record["source"], record["licence"])
            assert document.url == record.get("url", "")


def test_the_order_is_that_of_the_rows(config, tokenizer):
    """Read off the batches: a document stands where the row has its beginning mark."""
    data = open_data(config, 60)
    (bos,) = {int(source.read(0, 1)[0]) for source in data.sources.values()}
    expected = []
    for row in range(60):
        batch = data.batch(row, 1)
        expected += [(row, int(place)) for place in np.flatnonzero(batch.tokens[0] == bos)]
    found = [(row, document.text) for row in range(60) for document in texts(data, tokenizer, row, row + 1)]
    assert [row for row, _ in found] == [row for row, _ in expected]
    for (row, place), (_, text) in zip(expected, found, strict=True):
        tokens = data.batch(row, 1).tokens[0, place:]
        stop = np.flatnonzero(tokens[1:] == bos)
        shown = tokenizer.decode_bytes(tokens[: stop[0] + 1] if len(stop) else tokens)
        assert text.encode().startswith(shown) or shown.startswith(text.encode())
    assert [text for _, text in found] == [document.text for document in texts(data, tokenizer, 0, 60)]


def test_removed_documents_are_left_out_from_their_row_on(config, corpus, tokenizer, tmp_path):
    data = open_data(config, 200)
    every = list(texts(data, tokenizer, 0, 200))
    gone = {document.id for document in every[::2]}
    hashes = [hashlib.sha256(corpus[id]["text"].encode()).hexdigest() for id in gone]
    (tmp_path / "blocked.txt").write_text("\n".join(hashes))
    config = dataclasses.replace(config, removed=(Removal(str(tmp_path / "blocked.txt"), from_row=80),))
    data = open_data(config, 200)
    before = list(texts(data, tokenizer, 0, 80))
    assert list(texts(data, tokenizer, 0, 200)) == before + [
        document for document in every[len(before) :] if document.id not in gone
    ]
    assert gone & {document.id for document in before}
    assert gone & {document.id for document in every[len(before) :]}


def test_a_tokenizer_can_be_trained_on_what_is_written(config, tokenizer, tmp_path):
    data = open_data(config, 200)
    path = tmp_path / "texts" / "sample.jsonl.zst"
    count = write_documents(path, texts(data, tokenizer, 0, 200))
    assert list(read_documents(path)) == list(texts(data, tokenizer, 0, 200))
    assert count == len(list(read_documents(path)))
    assert train_tokenizer(path.parent, tmp_path / "other", vocab_size=500).vocab_size == 500


def test_rows_and_tokenizers_that_do_not_fit_are_refused(config, tokenizer, corpus_dir, tmp_path):
    data = open_data(config, 200)
    with pytest.raises(UserError, match="no rows from 9 to 3"):
        next(texts(data, tokenizer, 9, 3))
    other = train_tokenizer(corpus_dir, tmp_path / "other", vocab_size=450)
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        next(texts(data, other, 0, 3))
