"""What StoreWriter promises beside what a store gives back: where shards are cut, and how it refuses bad tokens."""

import hashlib

import numpy as np
import pytest

from eurollm_jax.corpus.reading.documents import Document
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.store_writer import StoreWriter


def write(folder, lengths, **options):
    folder.mkdir()
    writer = StoreWriter(folder, tokenizer_sha256="f" * 64, vocab_size=70_000, **options)
    for number, length in enumerate(lengths):
        writer.add(
            "fi",
            Document(f"{number}", f"{number}", "fi", "web", "CC0-1.0"),
            np.full(length, 65_536 + number),
            byte_length=1,
            characters=1,
            fallback=0,
            sha256=hashlib.sha256(b"").digest(),
        )
    writer.close()
    return TokenStore.open(folder)


def test_a_shard_holds_whole_documents_and_no_more_tokens_than_it_may(tmp_path):
    store = write(tmp_path / "store", [4, 6, 1, 12, 3, 7, 10], shard_tokens=10)
    source = store.sources["fi"]
    sizes = [path.stat().st_size // 4 for path in sorted((tmp_path / "store" / "fi").glob("tokens-*.bin"))]
    assert sizes == [10, 1, 12, 10, 10]  # the document of 12 has a file of its own
    assert source.dtype == np.uint32
    stream = np.repeat(65_536 + np.arange(7), [4, 6, 1, 12, 3, 7, 10])
    assert source.read(0, source.tokens).tolist() == stream.tolist()


@pytest.mark.parametrize("token", [-1, 70_000])
def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path, token):
    writer = StoreWriter(tmp_path, tokenizer_sha256="f" * 64, vocab_size=70_000)
    document = Document("x", "7", "fi", "web", "CC0-1.0")
    with pytest.raises(ValueError, match="token ids of document 7 are outside the vocabulary of 70000"):
        writer.add("fi", document, np.array([1, token, 2]), byte_length=1, characters=1, fallback=0, sha256=b"\0" * 32)
