"""The oracle of the tests of preparing: the store as one plain loop over all documents writes it."""

import hashlib

import numpy as np
import pytest

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.store_writer import StoreWriter


@pytest.fixture
def plain_loop():
    """Writes the store without units, processes or batches, and returns its files; `wanted` says which documents."""

    def write(
        inputs, tokenizer, folder, by=lambda document: document.language, wanted=lambda document: True, **options
    ):
        folder.mkdir()
        writer = StoreWriter(folder, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, **options)
        for document in filter(wanted, read_documents(inputs)):
            ids = tokenizer.encode(document.text)
            text = document.text.encode()
            writer.add(
                by(document),
                document,
                np.array([1, *ids, 2]),
                byte_length=len(text),
                characters=len(document.text),
                fallback=sum(tokenizer.pieces[i].kind == "byte" for i in ids),
                sha256=hashlib.sha256(text).digest(),
            )
        writer.close()
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return write
