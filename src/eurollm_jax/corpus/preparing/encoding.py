"""Encode a stream of documents; for a store also prove that each decodes to its own text, and count its parts.

Documents are encoded in batches of a size at which the tokenizer is fast. One that is larger than a batch comes alone,
and what is computed from its tokens is computed piece by piece, so that it needs little more memory than its text.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from eurollm_jax.corpus.reading.documents import Document
from eurollm_jax.corpus.store_writer import token_dtype
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer, refusal
from eurollm_jax.errors import UserError

BATCH_CHARACTERS = 4_000_000


class Incoming(NamedTuple):
    """A document to encode, `text_sha256` of its text, and which input it comes from, for errors."""

    document: Document
    sha256: bytes
    input: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document with its `tokens`, `[bos, *ids, eos]`; the counts are those of `StoreWriter.add`."""

    document: Document
    tokens: Shaped[np.ndarray, " tokens"]
    byte_length: int
    characters: int
    fallback: int
    sha256: bytes


def text_sha256(text: str) -> bytes:
    """SHA-256 of the text in UTF-8, without a copy of a long text."""
    digest = hashlib.sha256()
    for start in range(0, len(text), BATCH_CHARACTERS):
        digest.update(text[start : start + BATCH_CHARACTERS].encode())
    return digest.digest()


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, threads: int, where: object
) -> Iterator[tuple[Document, Int32[np.ndarray, " tokens"]]]:
    """Each document with its ids, in order. `where` says in errors which input the documents come from."""

    def stop(_: str, error: UserError) -> None:
        raise error

    for batch in _batches(_usable((Incoming(document, b"", str(where)) for document in documents), stop)):
        texts = [document.text for document, _, _ in batch]
        for (document, _, _), ids in zip(batch, tokenizer.encode_batch(texts, threads), strict=True):
            yield document, ids


def encode_for_store(
    documents: Iterable[Incoming], tokenizer: Tokenizer, *, threads: int, fault: Callable[[str, UserError], None]
) -> Iterator[Encoded]:
    """Each document as tokens, in order.

    `fault` is called with the input's name for a document that holds what cannot be encoded, or that does not decode to
    its own text; it may raise.
    """
    for batch in _batches(_usable(documents, fault)):
        is_long = len(batch[0].document.text) > BATCH_CHARACTERS
        try:
            encoded = (
                [_encode_long(batch[0], tokenizer, threads)] if is_long else _encode_batch(batch, tokenizer, threads)
            )
        except UserError as error:  # what only shows on the way is said of a document that is alone
            if len(batch) > 1:
                raise
            fault(batch[0].input, UserError(f"{batch[0].input}, document {batch[0].document.id}: {error}"))
            continue
        for (document, _, name), found in zip(batch, encoded, strict=True):
            if found is not None:
                yield found
                continue
            what = f"{name}, document {document.id} does not decode to its own text with {tokenizer.model_path}"
            fault(name, UserError(f"{what}; train another tokenizer, or remove the document"))


def _usable(documents: Iterable[Incoming], fault: Callable[[str, UserError], None]) -> Iterator[Incoming]:
    for incoming in documents:
        if reason := refusal(incoming.document.text):
            fault(incoming.input, UserError(f"{incoming.input}, document {incoming.document.id}: {reason}"))
        else:
            yield incoming


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


def _encode_batch(batch: list[Incoming], tokenizer: Tokenizer, threads: int) -> list[Encoded | None]:
    """The documents of `batch`, None for one that does not decode to its own text."""
    texts = [document.text for document, _, _ in batch]
    encoded = tokenizer.encode_batch(texts, threads)
    ids = np.concatenate(encoded)
    ends = np.cumsum([0, *map(len, encoded)])
    byte_lengths = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    decoded_lengths = np.diff(_cumulated(tokenizer.piece_bytes[ids])[ends])
    fallback = np.diff(_cumulated(tokenizer.is_byte[ids])[ends])
    # Whole and of the right lengths is the same as right one by one, and far faster to find out.
    right = decoded_lengths.tolist() == byte_lengths and tokenizer.decode_bytes(ids) == "".join(texts).encode()

    tokens = np.empty(len(ids) + 2 * len(batch), token_dtype(tokenizer.vocab_size))
    starts = ends + 2 * np.arange(len(ends))
    tokens[starts[:-1]], tokens[starts[1:] - 1] = tokenizer.bos_id, tokenizer.eos_id
    inner = np.ones(len(tokens), bool)
    inner[starts[:-1]] = inner[starts[1:] - 1] = False
    tokens[inner] = ids
    return [
        Encoded(document, tokens[start:stop], byte_length, len(document.text), count, sha256)
        if right or tokenizer.decode_bytes(own) == document.text.encode()
        else None
        for (document, sha256, _), own, start, stop, byte_length, count in zip(
            batch, encoded, starts, starts[1:], byte_lengths, fallback.tolist(), strict=False
        )
    ]


def _encode_long(incoming: Incoming, tokenizer: Tokenizer, threads: int) -> Encoded | None:
    document, sha256, _ = incoming
    ids = tokenizer.encode_batch([document.text], threads)[0]
    digest = hashlib.sha256()
    byte_length = fallback = start = 0
    while start < len(ids):
        stop = min(start + BATCH_CHARACTERS, len(ids))
        while stop < len(ids) and tokenizer.is_byte[ids[stop]]:
            stop += 1  # a character of several byte tokens stays whole, for U+FDD0 is taken back as one
        some = ids[start:stop]
        content = tokenizer.decode_bytes(some)
        digest.update(content)
        byte_length += len(content)
        fallback += int(tokenizer.is_byte[some].sum())
        start = stop
    if digest.digest() != sha256:
        return None
    tokens = np.empty(len(ids) + 2, token_dtype(tokenizer.vocab_size))
    tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
    return Encoded(document, tokens, byte_length, len(document.text), fallback, sha256)


def _cumulated(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
