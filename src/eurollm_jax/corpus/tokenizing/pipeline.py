"""What a `tokenizer.json` does to a text, read from its description: how to take the bytes of a token from its name,
and whether every text comes back from its ids.

The format is that of the `tokenizers` library: a normalizer, a pre-tokenizer, a model and a decoder, each of which may
be a sequence of several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eurollm_jax.corpus.tokenizing.tokenizer import Kind, Piece
from eurollm_jax.corpus.tokenizing.words import SPACE_MARK
from eurollm_jax.errors import UserError

_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
}  # their names for what a sequence holds

# Decoders of SentencePiece's kind: they turn the mark back into a space and byte tokens into bytes.
_OF_PIECES = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

_MODELS = {"BPE", "Unigram"}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes: those that Latin-1 can print stand for themselves, the others are
    written, in order, as U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Pipeline:
    """How text and pieces belong together."""

    byte_level: bool  # a piece is written in GPT-2's alphabet of bytes; else as SentencePiece writes it
    byte_tokens: bool  # pieces such as "<0x0A>" are bytes
    prefix: str  # " " where a space is put in front of each text, else ""
    normal_form: str | None
    stand_ins: tuple[tuple[str, str], ...]  # what decoding puts for what, in the joined text
    losses: tuple[str, ...]

    def piece(self, name: str, kind: Kind, *, is_added: bool) -> Piece:
        """The entry `name` of the vocabulary; `is_added` says that it was added to the model's own."""
        if kind == "control":
            return Piece(name, kind, b"")
        if self.byte_level:
            known = not is_added and all(character in _BYTES for character in name)
            content = bytes(_BYTES[character] for character in name) if known else name.encode()
            return Piece(name, "byte" if len(content) == 1 and content[0] >= 0x80 else kind, content)
        if self.byte_tokens and not is_added and (byte := _byte_of(name)) is not None:
            return Piece(name, "byte", bytes([byte]))
        return Piece(name, kind, name.replace(SPACE_MARK, " ").encode())


def read_pipeline(described: Mapping[str, Any], where: object) -> Pipeline:
    """The pipeline of a tokenizer.json. Raises UserError, naming it `where`, for a model or a decoder under which the
    bytes of a token are not known."""
    decoders = _flat(described, "decoder")
    kinds = [decoder["type"] for decoder in decoders]
    model = described["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind not in _MODELS or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{where} is a tokenizer of kind {kind} whose tokens do not say their bytes; give a BPE")
    byte_level = "ByteLevel" in kinds
    if not kinds or not set(kinds) <= ({"ByteLevel", "Fuse"} if byte_level else _OF_PIECES):
        raise UserError(
            f"{where} decodes with {', '.join(kinds) or 'nothing'}, under which the bytes of a token are not known; "
            "only byte-level tokenizers and those of SentencePiece's kind are supported"
        )
    stand_ins = tuple(
        (decoder["pattern"]["String"], decoder["content"])
        for decoder in decoders
        if decoder["type"] == "Replace" and decoder["pattern"].get("String") != SPACE_MARK
    )
    normalizers, pre_tokenizers = _flat(described, "normalizer"), _flat(described, "pre_tokenizer")
    losses = [
        *_normalizer_losses(normalizers, {shown: written for written, shown in stand_ins}),
        *_pre_tokenizer_losses(pre_tokenizers),
        *_model_losses(model, byte_level, "ByteFallback" in kinds),
    ]
    prepends = any(part["type"] == "Prepend" for part in normalizers) or any(
        part["type"] == "Metaspace" and _prepend_scheme(part) != "never" for part in pre_tokenizers
    )
    return Pipeline(
        byte_level=byte_level,
        byte_tokens="ByteFallback" in kinds,
        prefix=" " if prepends else "",
        normal_form="NFC" if any(part["type"] == "NFC" for part in normalizers) else None,
        stand_ins=stand_ins,
        losses=tuple(losses),
    )


def _flat(described: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The steps of the part `part`, in order."""

    def steps(value: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
        if value is None:
            return []
        if value["type"] != "Sequence":
            return [value]
        return [step for inner in value[_PARTS[part]] for step in steps(inner)]

    return steps(described.get(part))


def _normalizer_losses(normalizers: Sequence[Mapping[str, Any]], written: Mapping[str, str]) -> list[str]:
    """`written` says what is put for a character that decoding gives back."""
    losses = []
    for step in normalizers:
        match step:
            case {"type": "NFC" | "ByteLevel"} | {"type": "Prepend", "prepend": "\u2581"}:
                pass
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Replace", "pattern": {"String": shown}, "content": content} if written.get(shown) == content:
                pass
            case _:
                losses.append(f"it normalises text by {step['type']}")
    return losses


def _pre_tokenizer_losses(pre_tokenizers: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = []
    for step in pre_tokenizers:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": True}:
                losses.append("it adds a space in front")
            case {"type": "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts"}:
                pass
            case {"type": "Split" | "Punctuation", "behavior": behavior} if behavior != "Removed":
                pass
            case _:
                losses.append(f"it may drop text by {step['type']}")
    return losses


def _model_losses(model: Mapping[str, Any], byte_level: bool, decodes_bytes: bool) -> list[str]:
    vocabulary = model["vocab"]
    names = set(vocabulary) if isinstance(vocabulary, Mapping) else {name for name, _ in vocabulary}
    if byte_level:
        missing = len(set(_BYTES) - names)
    elif model.get("byte_fallback") and decodes_bytes:
        missing = 256 - len({byte for name in names if (byte := _byte_of(name)) is not None})
    else:
        missing = 256
    losses = [f"it has no token for {missing} of the 256 bytes"] if missing else []
    return losses + ["it leaves out merges at random"] * bool(model.get("dropout"))


def _prepend_scheme(metaspace: Mapping[str, Any]) -> str:
    """Of old, `add_prefix_space` said it."""
    return metaspace.get("prepend_scheme") or ("always" if metaspace.get("add_prefix_space", True) else "never")


def _byte_of(name: str) -> int | None:
    """The byte that "<0x0A>" stands for."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return int(name[3:5], 16)
        except ValueError:
            return None
    return None
