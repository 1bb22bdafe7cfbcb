"""Tokenizer: text to token ids and back, knowing how many bytes of text each token stands for.

Everything that counts bits per byte rests on that exactness. Two kinds share what is here: our own
(`sentencepiece_tokenizer`), which lose nothing of any text, and those of models that others trained
(`hub_tokenizer`), which are taken as they are and say what they do to a text.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from eurollm_jax.corpus.tokenizing.words import take
from eurollm_jax.errors import UserError

MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"

_DECODED_TOKENS = 1 << 18  # what is decoded at once

type Kind = Literal["text", "control", "byte"]


class Piece(NamedTuple):
    """One entry of the vocabulary, by the name that the tokenizer gives it.

    `content` is the bytes of text it stands for, which may be a part of a character; none for a control token. A piece
    of kind "byte" stands for a single byte, for want of one that covers the character.
    """

    name: str
    kind: Kind
    content: bytes


class Tokenizer(ABC):
    """Text to ids and back. Picklable.

    Text that spells a control token, such as "</s>", is text: it never becomes that token.
    """

    model_path: Path  # for messages
    pieces: Sequence[Piece]
    bos_id: int | None  # what the model expects in front of a text; None where it expects nothing
    eos_id: int  # ends a document
    eos_ids: tuple[int, ...]  # that end what a model writes; eos_id is the first
    pad_id: int | None

    prefix: str = ""
    """What stands in front of the text that the ids of a text spell: "" or, in tokenizers of Llama 2's kind, " "."""

    normal_form: str | None = None
    """The normal form of Unicode into which text is brought, such as "NFC"; None where it stays as it is."""

    losses: tuple[str, ...] = ()
    """Why some texts do not come back from their ids, beyond `normal_form`."""

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        """The tokenizer in a folder, or of a file of one.

        Ours is a `tokenizer.model`, and stays ours where an export put a `tokenizer.json` of the same vocabulary beside
        it. Any other folder's tokenizer is its `tokenizer.json`. Raises UserError when there is none, or when it is
        neither.
        """
        # These two modules stand on this one.
        from eurollm_jax.corpus.tokenizing.hub_tokenizer import HubTokenizer
        from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer

        if path.name == JSON_NAME:
            return HubTokenizer.read(path.parent)
        file = path / MODEL_NAME if path.is_dir() else path
        described = path / JSON_NAME
        if not file.is_file() and not described.is_file():
            raise UserError(f"there is no tokenizer at {file}; make one with 'eurollm tokenizer train'")
        if not file.is_file():
            return HubTokenizer.read(path)
        try:
            ours = SentencePieceTokenizer.read(file)
        except UserError as error:
            if described.is_file():
                return HubTokenizer.read(path)
            raise UserError(f"{error}; of one that others trained give the folder with its {JSON_NAME}") from None
        if described.is_file() and _vocabulary(described) != {piece.name: i for i, piece in enumerate(ours.pieces)}:
            return HubTokenizer.read(path)
        return ours

    @property
    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files that `save` writes."""

    @property
    @abstractmethod
    def identity(self) -> bytes:
        """What decides the tokens of a document."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text. Many texts at once may be far faster than one by one."""

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The ids of `text`, without bos and eos. Raises UserError for a text that has none."""
        return self.encode_batch([text])[0]

    def save(self, folder: Path) -> None:
        """Write into `folder` what `load` needs to read the same tokenizer from there."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)

    def normalised(self, text: str) -> str:
        """The text in `normal_form`: what comes back from its ids."""
        return text

    @property
    def begin_id(self) -> int:
        """What stands in front of each document of a store, so that its first token can be predicted: bos, or eos where
        there is none, as in the models whose documents are separated by eos alone."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model may have more rows of embeddings: see `spare_rows`."""
        return len(self.pieces)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `identity`, in hex."""
        return hashlib.sha256(self.identity).hexdigest()

    @cached_property
    def piece_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """How many UTF-8 bytes of text each token stands for; 0 for control tokens.

        Where each text gets a `prefix`, eos takes its byte back, so that the sum over a document, `[*ids, eos]`, is the
        length of its text.
        """
        counted = self._lengths.astype(np.int32)
        counted[self.eos_id] -= len(self.prefix)
        return counted

    @cached_property
    def is_byte(self) -> Bool[np.ndarray, " vocab"]:
        """Which tokens stand for a single byte, for want of a piece that covers the character."""
        return np.array([piece.kind == "byte" for piece in self.pieces])

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> str:
        """The text of `ids`, where a cut-off character becomes U+FFFD. See `decode_bytes`.

        Control tokens are left out, and so are ids beyond the vocabulary, which a model with spare rows may write.
        """
        ids = _array(ids)
        return self.decode_bytes(ids[ids < self.vocab_size], continues=continues).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, continues: bool = False) -> bytes:
        """The exact UTF-8 bytes of `ids`, which may begin or end within a character.

        `continues` says that other ids of the same text stand before these, so that there is no `prefix` to leave out.
        Raises ValueError for ids beyond the vocabulary.
        """
        ids = _array(ids)
        if ids.size == 0:
            return b""
        if not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}, the vocabulary from 0 to {self.vocab_size - 1}")
        content, starts = self._content
        parts = [take(content, starts[some], self._lengths[some]) for some in _slices(ids)]
        joined = b"".join(part.tobytes() for part in parts)
        return self._read_back(joined if continues else joined.removeprefix(self.prefix.encode()))

    def require_lossless(self) -> None:
        """Raises UserError where texts do not come back from their ids, but for their `normal_form`: the bytes of a
        corpus could not be counted."""
        if self.losses:
            raise UserError(
                f"{self.model_path} cannot give back every text exactly ({', '.join(self.losses)}), so that the bytes "
                "of a corpus could not be counted; use another tokenizer for corpora"
            )

    def spare_rows(self, rows: int) -> int:
        """How many of a model's `rows` of embeddings no token has: a vocabulary may be padded to a round number.

        The last control tokens may lack a row, for no text is encoded to them: Gemma 3 1B has none for its tokenizer's
        mark of an image. Raises UserError where others lack one.
        """
        marks = (self.begin_id, self.eos_id, self.pad_id or 0)
        if max(marks) >= rows or any(piece.kind != "control" for piece in self.pieces[rows:]):
            raise UserError(
                f"{self.model_path} has {self.vocab_size} tokens and the model's vocab_size is {rows}: change the "
                "model, or give the tokenizer that it was trained with"
            )
        return max(0, rows - self.vocab_size)

    def _read_back(self, content: bytes) -> bytes:
        """The decoded bytes with what stood in for a character of the text taken back."""
        return content

    @cached_property
    def _lengths(self) -> Int64[np.ndarray, " vocab"]:
        return np.array([len(piece.content) for piece in self.pieces], np.int64)

    @cached_property
    def _content(self) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " vocab"]]:
        """The bytes of all pieces one after the other, and where each piece's begin."""
        joined = np.frombuffer(b"".join(piece.content for piece in self.pieces), np.uint8)
        return joined, self._lengths.cumsum() - self._lengths


def half_surrogate(text: str) -> str | None:
    """Why `text` cannot be written in UTF-8 and what to do, or None when it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half a surrogate pair, which no UTF-8 can store; mend it"
    return None


def _vocabulary(file: Path) -> dict[str, int] | None:
    """Name -> id of the tokens of a tokenizer.json; None if it is none."""
    try:
        described = json.loads(file.read_bytes())
        added = {token["content"]: token["id"] for token in described["added_tokens"]}
        return {**described["model"]["vocab"], **added}
    except (ValueError, KeyError, TypeError):
        return None


def _array(ids: Iterable[int]) -> np.ndarray:
    return ids if isinstance(ids, np.ndarray) else np.array(list(ids), np.int64)


def _slices(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _DECODED_TOKENS] for start in range(0, len(ids), _DECODED_TOKENS))
