"""Encode a stream of documents in batches of a size at which the tokenizer is fast, naming any that it refuses."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from eurollm_jax.corpus.sources import Document
from eurollm_jax.corpus.tokenizer import Tokenizer, refusal
from eurollm_jax.errors import UserError

_BATCH_CHARACTERS = 4_000_000


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, threads: int, where: object
) -> Iterator[tuple[Document, Int32[np.ndarray, " tokens"]]]:
    """Each document with its ids, in order. `where` says in errors which file the documents come from."""
    for batch in _batches(documents):
        for document in batch:
            if reason := refusal(document.text):
                raise UserError(f"{where}, document {document.id}: {reason}")
        yield from zip(batch, tokenizer.encode_batch([document.text for document in batch], threads), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
