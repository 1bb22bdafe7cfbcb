"""Raw text: the documents of a run in the order of its mixture, as text, for experiments with other tokenizers.

A tokenizer should be trained on what its model will read. The store is lossless, so the same mixture, seed and row
numbers give the texts back, whichever tokenizer the store was prepared with.
"""

from collections.abc import Iterator

import numpy as np
from rich.progress import track

from eurollm_jax.corpus.reading.documents import Document
from eurollm_jax.corpus.store import Source
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.loader import Data
from eurollm_jax.data.removal import Removed
from eurollm_jax.errors import UserError

_BLOCK = 1024  # rows that are located at once


def texts(
    data: Data, tokenizer: Tokenizer, first_row: int, stop_row: int, *, progress: bool = False
) -> Iterator[Document]:
    """The documents of global rows `first_row` to `stop_row`, each whole, at the row that holds its first token.

    So a document comes once an epoch of its source, with what the store knows of it. Documents that the run has removed
    by that row are left out. Raises UserError for rows that do not exist, another tokenizer than the store's, and a
    document that is not text.
    """
    if not 0 <= first_row <= stop_row:
        raise UserError(f"there are no rows from {first_row} to {stop_row}; give a first row and a later one")
    for store in data.stores:
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{store.path} was prepared with another tokenizer than {tokenizer.model_path}")
    blocks = range(first_row, stop_row, _BLOCK)
    for start in track(blocks, f"texts of {stop_row - first_row:,} rows", disable=not progress):
        numbers = np.arange(start, min(start + _BLOCK, stop_row))
        sources, _, rows = data.order.rows(numbers)
        for number, index, row in zip(numbers.tolist(), sources.tolist(), rows.tolist(), strict=True):
            source = data.sources[data.source_names[index]]
            removed = [entry for entry in data.removed if number >= entry.from_row]
            for span in data.packings[index].documents(row):
                if span.first == 0 and not _names(removed, index, int(source.offsets[span.document])):
                    yield _document(source, span.document, tokenizer)


def _names(removed: list[Removed], source: int, begin: int) -> bool:
    """Whether the document that begins there in the stream of the source is one of the removed."""
    return any(begin in entry.begins[source] for entry in removed)


def _document(source: Source, index: int, tokenizer: Tokenizer) -> Document:
    try:
        text = tokenizer.decode_bytes(source.document_tokens(index)).decode()
    except UnicodeDecodeError:
        raise UserError(
            f"document {index} of source {source.name} is not text any more; run 'eurollm corpus verify' on its store"
        ) from None
    if not source.has_records:
        return Document(text, f"{source.name}/{index}", source.language, source.name, "unknown")
    known = source.document(index)
    return Document(text, known.id, source.language, known.origin, known.licence, known.url, known.collected)
