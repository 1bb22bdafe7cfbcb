"""Our own tokenizers: SentencePiece BPE models that lose no byte of any text.

A model that normalises, strips or otherwise forgets text is refused when it is loaded.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Int32
from sentencepiece import sentencepiece_model_pb2

from eurollm_jax.corpus.tokenizing.tokenizer import MODEL_NAME, Kind, Piece, Tokenizer, half_surrogate
from eurollm_jax.corpus.tokenizing.words import SPACE_MARK, Words
from eurollm_jax.errors import UserError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3

# SentencePiece writes a space as U+2581 inside its pieces and so takes a U+2581 in the text for a space. We put U+FDD0
# in its place before encoding, which becomes three byte tokens, and take it back after decoding: both are three bytes
# of UTF-8, so byte counts stay exact. U+FDD0 is a noncharacter, reserved by Unicode for use inside programs; a text
# that holds one is refused. hf/tokenizer.py does the same.
STAND_IN = "\ufdd0"

# Where no piece runs across one of these units, a text's words can be encoded one by one, and each distinct one once.
_UNIT = re.compile(" *[^ \n]+| +|\n")

_PART_CHARACTERS = 1 << 22  # what is encoded at once; a longer text is cut where no piece could run across
_LONGEST_RUN = 1 << 24  # characters without such a place: SentencePiece takes 70 bytes of memory for each

# SentencePiece numbers the kinds of its pieces; an unused one stands for nothing, as a control token does.
_KINDS: dict[int, Kind] = {1: "text", 2: "control", 3: "control", 5: "control", 6: "byte"}


class SentencePieceTokenizer(Tokenizer):
    """A lossless SentencePiece BPE model with `<unk>`, `<s>`, `</s>`, `<pad>` at ids 0 to 3. Picklable."""

    unk_id, bos_id, eos_id, pad_id = UNK_ID, BOS_ID, EOS_ID, PAD_ID
    eos_ids = (EOS_ID,)

    def __init__(self, model_path: Path, model: bytes) -> None:
        self.model_path = model_path
        self.model = model
        self.pieces = _parse(model_path, model)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.cuts_at_spaces = all(
            piece.kind != "text" or _UNIT.fullmatch(piece.name.replace(SPACE_MARK, " ")) for piece in self.pieces
        )

    @classmethod
    def read(cls, file: Path) -> "SentencePieceTokenizer":
        """The tokenizer in a .model file. Raises UserError when it is no SentencePiece model, is not lossless, or has
        other special ids."""
        return cls(file, file.read_bytes())

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[Path, bytes]]:
        return SentencePieceTokenizer, (self.model_path, self.model)

    @property
    def files(self) -> dict[str, bytes]:
        return {MODEL_NAME: self.model}

    @property
    def identity(self) -> bytes:
        return self.model

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text. Many texts at once are far faster than one by one.

        Words that were met before are looked up, so the speed grows over the first megabytes.
        """
        for text in texts:
            if reason := refusal(text):
                raise UserError(f"the text cannot be encoded: {reason}")
        cuts = [self._cuts(text) for text in texts]
        parts = (text[i:j] for text, at in zip(texts, cuts, strict=True) for i, j in pairwise(at))
        encoded = chain.from_iterable(self._encode(group, threads) for group in _groups(parts))
        return [_joined([next(encoded) for _ in at[1:]]) for at in cuts]

    def _encode(self, texts: list[str], threads: int) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of each text, as views of one array where words are looked up."""
        texts = [text.replace(SPACE_MARK, STAND_IN) for text in texts]
        if self.cuts_at_spaces:
            return self._words.encode(texts, threads)
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=threads)]

    def _cuts(self, text: str) -> list[int]:
        """Where to cut `text` so that its parts' ids are together its own: between characters that no piece has side by
        side. SentencePiece merges neighbours only into pieces."""
        cuts = [0]
        while len(text) - cuts[-1] > _PART_CHARACTERS:
            best, furthest = cuts[-1] + _PART_CHARACTERS, min(cuts[-1] + _LONGEST_RUN, len(text))
            places = chain(range(best, cuts[-1], -1), range(best + 1, furthest + 1))
            place = next((at for at in places if text[at - 1 : at + 1] not in self._neighbours), None)
            if place is None:
                raise UserError(
                    f"the text cannot be encoded: from character {cuts[-1] + 1} on it has {_LONGEST_RUN:,} in which "
                    "no word ends; remove them"
                )
            cuts.append(place)
        return cuts if cuts[-1] == len(text) > 0 else [*cuts, len(text)]

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Pairs of characters that stand side by side in some piece."""
        names = [piece.name.replace(SPACE_MARK, " ") for piece in self.pieces if piece.kind == "text"]
        return frozenset(name[i : i + 2] for name in names for i in range(len(name) - 1))

    @cached_property
    def _words(self) -> Words:
        return Words(self._processor)

    def _read_back(self, content: bytes) -> bytes:
        return content.replace(STAND_IN.encode(), SPACE_MARK.encode())


def _groups(parts: Iterable[str]) -> Iterator[list[str]]:
    """The parts, several at a time: about `_PART_CHARACTERS` characters."""
    group: list[str] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part)
        if characters >= _PART_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def refusal(text: str) -> str | None:
    """Why `text` cannot be encoded without loss and what to do, or None when it can."""
    if STAND_IN in text:
        where = text.index(STAND_IN) + 1
        return f"character {where} is U+FDD0, a noncharacter that Unicode reserves for use inside programs; remove it"
    return half_surrogate(text)


def _parse(path: Path, model: bytes) -> list[Piece]:
    """The vocabulary of a SentencePiece model, which is checked to be one that loses nothing."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
        proto.ParseFromString(model)
    except RuntimeError:
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"{path} is not a SentencePiece model; give the tokenizer.model of a tokenizer")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    special = (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id)
    if special != (UNK_ID, BOS_ID, EOS_ID, PAD_ID):
        raise UserError(
            f"{path} has unk, bos, eos and pad at {special}; they must be at (0, 1, 2, 3), so train another"
        )
    faults = {
        "its model is not BPE": trainer.model_type != trainer.BPE,
        "it has no byte fallback": not trainer.byte_fallback,
        "it normalises text": bool(normalizer.precompiled_charsmap),
        "it adds a space in front": normalizer.add_dummy_prefix,
        "it drops repeated spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
    }
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise UserError(f"{path} cannot give back every text exactly ({', '.join(found)}); train another")
    if any(piece.type not in _KINDS for piece in proto.pieces):
        raise UserError(f"{path} has user-defined pieces, which break the order of merges; train another without them")
    return [Piece(piece.piece, kind := _KINDS[piece.type], _content(piece.piece, kind)) for piece in proto.pieces]


def _content(name: str, kind: Kind) -> bytes:
    """The bytes of text that a piece stands for; SentencePiece writes a byte as "<0x0A>"."""
    match kind:
        case "text":
            return name.replace(SPACE_MARK, " ").encode()
        case "byte":
            return bytes([int(name[3:5], 16)])
        case "control":
            return b""
