"""Encode a stream of documents; for a store also prove that each decodes to its own text, and count its parts.

Documents are encoded in batches of a size at which the tokenizer is fast. One that is larger than a batch comes alone,
and what is decoded to prove it is decoded piece by piece, so that it needs little more memory than its text.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from eurollm_jax.corpus.reading.documents import Document, Fault, stop_at
from eurollm_jax.corpus.store_writer import token_dtype
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

BATCH_CHARACTERS = 4_000_000


class Incoming(NamedTuple):
    """A document to encode, `text_digest` of its text, and which input it comes from, for errors."""

    document: Document
    sha256: bytes
    byte_length: int
    input: str


class Encoded(NamedTuple):
    """A document with its `tokens`, `[begin, *ids, eos]`; the counts are those of `StoreWriter.add`."""

    document: Document
    tokens: Shaped[np.ndarray, " tokens"]
    byte_length: int
    characters: int
    fallback: int
    sha256: bytes


InputFault = Callable[[str, UserError], None]
"""Called with the input's name for a document that cannot be encoded or does not decode to its own text; may raise."""


def text_digest(text: str) -> tuple[bytes, int]:
    """SHA-256 of the text in UTF-8, and its length in bytes, without a copy of a long text."""
    digest, length = hashlib.sha256(), 0
    for start in range(0, len(text), BATCH_CHARACTERS):
        content = text[start : start + BATCH_CHARACTERS].encode()
        digest.update(content)
        length += len(content)
    return digest.digest(), length


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, threads: int, where: object, fault: Fault = stop_at
) -> Iterator[tuple[Document, Int32[np.ndarray, " tokens"]]]:
    """Each document with its ids, in order. `where` says in errors which input the documents come from, and `fault` is
    called for one that cannot be encoded."""
    for batch in _batches(Incoming(document, b"", 0, str(where)) for document in documents):
        for incoming, ids in zip(*_ids(batch, tokenizer, threads, lambda _, error: fault(error)), strict=True):
            yield incoming.document, ids


def encode_for_store(
    documents: Iterable[Incoming], tokenizer: Tokenizer, *, threads: int, fault: InputFault
) -> Iterator[Encoded]:
    """Each document as tokens, in order."""
    for batch in _batches(documents):
        usable, ids = _ids(batch, tokenizer, threads, fault)
        for incoming, found in zip(usable, _checked(usable, ids, tokenizer), strict=True):
            if found is not None:
                yield found
                continue
            what = f"{incoming.input}, document {incoming.document.id} does not decode to its own text"
            how = "train another tokenizer, or remove the document"
            fault(incoming.input, UserError(f"{what} with {tokenizer.model_path}; {how}"))


def _batches(documents: Iterable[Incoming]) -> Iterator[list[Incoming]]:
    batch: list[Incoming] = []
    characters = 0
    for incoming in documents:
        if batch and characters + len(incoming.document.text) > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(incoming)
        characters += len(incoming.document.text)
    if batch:
        yield batch


def _ids(
    batch: list[Incoming], tokenizer: Tokenizer, threads: int, fault: InputFault
) -> tuple[list[Incoming], list[Int32[np.ndarray, " tokens"]]]:
    """The documents of the batch that can be encoded, and their ids."""
    try:
        return batch, tokenizer.encode_batch([incoming.document.text for incoming in batch], threads)
    except UserError as error:
        if len(batch) == 1:
            fault(batch[0].input, UserError(f"{batch[0].input}, document {batch[0].document.id}: {error}"))
            return [], []
    alone = [_ids([incoming], tokenizer, threads, fault) for incoming in batch]  # to find out which it is
    return [one for found, _ in alone for one in found], [one for _, found in alone for one in found]


def _checked(
    batch: list[Incoming], encoded: list[Int32[np.ndarray, " tokens"]], tokenizer: Tokenizer
) -> list[Encoded | None]:
    """The documents of `batch` with their ids `encoded`; None for one that does not decode to its own text."""
    if not batch:
        return []
    ids = _joined(encoded)
    ends = np.cumsum([0, *map(len, encoded)])
    fallback = np.diff(np.flatnonzero(tokenizer.is_byte[ids]).searchsorted(ends))
    prefix = tokenizer.prefix
    decoded_lengths = np.add.reduceat(tokenizer.piece_bytes[ids], ends[:-1], dtype=np.int32)
    # Whole and of the right lengths is the same as right one by one, and far faster to find out.
    right = decoded_lengths.tolist() == [incoming.byte_length + len(prefix) for incoming in batch] and _is_text_of(
        ids, "".join([prefix + incoming.document.text for incoming in batch]), tokenizer
    )
    tokens = np.empty(len(ids) + 2 * len(batch), token_dtype(tokenizer.vocab_size))
    starts = ends + 2 * np.arange(len(ends))
    tokens[starts[:-1]], tokens[starts[1:] - 1] = tokenizer.begin_id, tokenizer.eos_id
    inner = np.ones(len(tokens), bool)
    inner[starts[:-1]] = inner[starts[1:] - 1] = False
    tokens[inner] = ids
    return [
        Encoded(document, tokens[start:stop], byte_length, len(document.text), count, sha256)
        if right or _is_text_of(own, prefix + document.text, tokenizer)
        else None
        for (document, sha256, byte_length, _), own, (start, stop), count in zip(
            batch, encoded, pairwise(starts.tolist()), fallback.tolist(), strict=True
        )
    ]


def _is_text_of(ids: Int32[np.ndarray, " tokens"], text: str, tokenizer: Tokenizer) -> bool:
    """Whether `ids` decode to `text`, with what the tokenizer puts in front of it."""
    content = text.encode()
    start = done = 0
    while start < len(ids):
        stop = min(start + BATCH_CHARACTERS, len(ids))
        while stop < len(ids) and tokenizer.is_byte[ids[stop]]:
            stop += 1  # a character of several byte tokens stays whole, for U+FDD0 is taken back as one
        decoded = tokenizer.decode_bytes(ids[start:stop], continues=True)
        if not content.startswith(decoded, done):
            return False
        start, done = stop, done + len(decoded)
    return done == len(content)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
