"""Tokenizers of models that others trained, read from a `tokenizer.json` and what lies beside it.

They are taken as they are: the ids are those that the model was trained with, whatever that costs a text. What it costs
is said (`normal_form`, `losses`), for bits per byte need exact bytes.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as FastTokenizer

from eurollm_jax.corpus.tokenizing.pipeline import Pipeline, read_pipeline
from eurollm_jax.corpus.tokenizing.tokenizer import JSON_NAME, MODEL_NAME, Kind, Piece, Tokenizer, half_surrogate
from eurollm_jax.errors import UserError

CONFIG_NAME, MAP_NAME = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_NAME = "generation_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_FILES = (
    JSON_NAME,
    CONFIG_NAME,
    MAP_NAME,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    MODEL_NAME,
    CHAT_TEMPLATE_NAME,
)
"""What a folder in Hugging Face format says of its tokenizer."""

_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HubTokenizer(Tokenizer):
    """A byte-level BPE, or a model of SentencePiece's kind, as the `tokenizers` library runs it. Picklable.

    The end of a document is the `eos_token` that tokenizer_config.json or special_tokens_map.json name, else the first
    `eos_token_id` of generation_config.json or config.json; all of these end what a model writes. bos is what the
    tokenizer puts in front of a text: by its own post-processor, unless tokenizer_config.json decides `add_bos_token`.
    One that is named and never put there is none.
    """

    def __init__(self, model_path: Path, files: Mapping[str, bytes]) -> None:
        """`files` are those that `read` finds. Raises UserError for what is not JSON or cannot be used."""
        self.model_path = model_path
        self._files = dict(files)
        described = _object(self._files[JSON_NAME], model_path)
        try:
            self._fast = FastTokenizer.from_buffer(self._files[JSON_NAME])
            pipeline = read_pipeline(described, model_path)
        except UserError:
            raise
        except Exception as error:  # the library raises this very type
            raise UserError(f"{model_path} is no tokenizer that can be read ({error}); fetch it again") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._names = {**self._named(MAP_NAME), **self._named(CONFIG_NAME)}
        # Before the marks are told apart from text: what the post-processor adds.
        self.bos_id = self._bos()
        ends = self._ends()
        self.eos_id, self.eos_ids = ends[0], tuple(dict.fromkeys(ends))
        pads = [self._fast.token_to_id(self._names.get("pad_token", "")), self._recorded.get("pad_token_id")]
        self.pad_id = next((pad for pad in pads if isinstance(pad, int) and pad >= 0), None)
        self._set_apart()
        unk = described["model"].get("unk_token")
        self.pieces = _pieces(
            self._fast, pipeline, described["model"].get("unk_id") if unk is None else self._fast.token_to_id(unk)
        )
        self.prefix, self.normal_form, self.losses = pipeline.prefix, pipeline.normal_form, pipeline.losses
        self._stand_ins = pipeline.stand_ins

    @classmethod
    def read(cls, folder: Path) -> "HubTokenizer":
        """The tokenizer of a folder in Hugging Face format, or of one that `save` wrote.

        Raises UserError where there is no tokenizer.json, or it cannot be used, or nothing says what ends a text.
        """
        names = [name for name in (*TOKENIZER_FILES, GENERATION_NAME) if (folder / name).is_file()]
        if JSON_NAME not in names:
            raise UserError(f"{folder} has no {JSON_NAME}; give the folder of a tokenizer in Hugging Face format")
        files = {name: (folder / name).read_bytes() for name in names}
        beside = _object(files.get(GENERATION_NAME, b"{}"), folder / GENERATION_NAME)
        if missing := _config_marks(folder / "config.json", [mark for mark in _MARKS if beside.get(mark) is None]):
            files[GENERATION_NAME] = (json.dumps(beside | missing, indent=2) + "\n").encode()
        return cls(folder / JSON_NAME, files)

    def __reduce__(self) -> tuple[type["HubTokenizer"], tuple[Path, Mapping[str, bytes]]]:
        return HubTokenizer, (self.model_path, self._files)

    @property
    def files(self) -> Mapping[str, bytes]:
        """Those that it came with, and a generation_config.json that has the ids which only config.json told."""
        return self._files

    @property
    def identity(self) -> bytes:
        """tokenizer.json, and the marks that documents get: one file may serve models with different ones."""
        return self._files[JSON_NAME] + f"\nbegin={self.begin_id} end={self.eos_id}".encode()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[Int32[np.ndarray, " tokens"]]:
        """`encode` of each text. With several `threads` the library takes as many as RAYON_NUM_THREADS allows."""
        for text in texts:
            if reason := half_surrogate(text):
                raise UserError(f"the text cannot be encoded: {reason}")
        if threads > 1 and len(texts) > 1:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        else:
            encodings = [self._fast.encode(text, add_special_tokens=False) for text in texts]
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def normalised(self, text: str) -> str:
        return text if self.normal_form is None else normalizers.NFC().normalize_str(text)

    def _read_back(self, content: bytes) -> bytes:
        for written, shown in self._stand_ins:
            content = content.replace(written.encode(), shown.encode())
        return content

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        return _object(self._files.get(GENERATION_NAME, b"{}"), self.model_path.with_name(GENERATION_NAME))

    def _named(self, file: str) -> dict[str, str]:
        """The special tokens that a file names: "eos_token" -> "</s>"."""
        said = _object(self._files.get(file, b"{}"), self.model_path.with_name(file))
        named = {key: value.get("content") if isinstance(value, dict) else value for key, value in said.items()}
        return {key: name for key, name in named.items() if key.endswith("_token") and isinstance(name, str)}

    def _bos(self) -> int | None:
        adds = _object(self._files.get(CONFIG_NAME, b"{}"), self.model_path.with_name(CONFIG_NAME)).get("add_bos_token")
        if adds is not None:
            return self._id_of("bos_token") if adds else None
        plain, marked = (self._fast.encode("a", add_special_tokens=marks).ids for marks in (False, True))
        return None if marked[:1] == plain[:1] else marked[0]

    def _ends(self) -> list[int]:
        said = self._recorded.get("eos_token_id")
        recorded = said if isinstance(said, list) else [said]
        named = [self._id_of("eos_token")] if "eos_token" in self._names else []
        if ends := [end for end in [*named, *recorded] if isinstance(end, int) and end >= 0]:
            return ends
        raise UserError(
            f"{self.model_path.parent} does not say which token ends a text; name it as eos_token in {CONFIG_NAME}"
        )

    def _id_of(self, mark: str) -> int:
        name = self._names.get(mark)
        if name is not None and (index := self._fast.token_to_id(name)) is not None:
            return index
        raise UserError(f"{self.model_path} has no token {name!r}, named as {mark} beside it; fetch the folder again")

    def _set_apart(self) -> None:
        """Text that spells a control token is text."""
        marks = [self._fast.id_to_token(index) for index in {self.bos_id, self.eos_id} if index is not None]
        names = [name for name in (*self._names.values(), *marks) if name and self._fast.token_to_id(name) is not None]
        self._fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in set(names)])
        self._fast.encode_special_tokens = True


def _pieces(fast: FastTokenizer, pipeline: Pipeline, unk: int | None) -> list[Piece]:
    """The vocabulary by id. Ids that no token has are control tokens without a name."""
    added = fast.get_added_tokens_decoder()
    own = {index: name for name, index in fast.get_vocab(with_added_tokens=False).items()}
    control = {index for index, token in added.items() if token.special} | {unk}
    pieces = [Piece("", "control", b"")] * (1 + max([*added, *own]))
    for index in own.keys() | added.keys():
        name = own[index] if index in own else added[index].content
        kind: Kind = "control" if index in control else "text"
        pieces[index] = pipeline.piece(name, kind, is_added=index not in own)
    return pieces


def _config_marks(config: Path, wanted: list[str]) -> dict[str, Any]:
    """Those of the ids `wanted` that a model's config.json has; a model of text and images has them one level down."""
    if not wanted or not config.is_file():
        return {}
    said = _object(config.read_bytes(), config)
    inner = said.get("text_config") or {}
    found = {mark: said.get(mark, inner.get(mark)) for mark in wanted}
    return {mark: value for mark, value in found.items() if value is not None}


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return value
