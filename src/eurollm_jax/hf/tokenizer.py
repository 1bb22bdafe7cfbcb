"""Tokenizers in Hugging Face format: ours written as files that give the same ids and the same text back, imported ones
kept and written as they came.

Our fast tokenizer is built by hand, since automatic conversion adds a space in front of every text or picks another
algorithm without saying so. A BPE of Hugging Face has ranked merges where SentencePiece has ranked pieces: every way to
make a piece of two others is a merge, in the order of the pieces.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.corpus.tokenizing.hub_tokenizer import CHAT_TEMPLATE_NAME, CONFIG_NAME, MAP_NAME, TOKENIZER_FILES
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import STAND_IN, SentencePieceTokenizer
from eurollm_jax.corpus.tokenizing.tokenizer import JSON_NAME, MODEL_NAME, Tokenizer
from eurollm_jax.corpus.tokenizing.words import SPACE_MARK
from eurollm_jax.errors import UserError

log = logging.getLogger(__name__)

_SPECIAL = {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": 3}


def write_hf_tokenizer(
    tokenizer: Tokenizer, out_dir: Path, *, model_max_length: int, chat_template: str | None = None
) -> None:
    """Write the tokenizer's files into `out_dir`.

    An imported one is written byte for byte as it came. Ours becomes tokenizer.json, tokenizer_config.json,
    special_tokens_map.json and tokenizer.model: encoding gives `[bos, *ids]`, as our documents begin; with
    `add_special_tokens=False`, exactly `tokenizer.encode`. The one difference: text that spells a special token, such
    as "</s>", becomes that token, as is the custom of `transformers`, unless its caller passes
    `split_special_tokens=True`; here such text is text.

    A `chat_template` (Jinja) is written into chat_template.jinja and into tokenizer_config.json, where older versions
    of `transformers` look for it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_ours(tokenizer, out_dir, model_max_length)
    else:
        for name in TOKENIZER_FILES:
            if name in tokenizer.files:
                (out_dir / name).write_bytes(tokenizer.files[name])
    if chat_template is not None:
        config = out_dir / CONFIG_NAME
        said = json.loads(config.read_bytes()) if config.is_file() else {}
        write_json(config, said | {"chat_template": chat_template})
        (out_dir / CHAT_TEMPLATE_NAME).write_bytes(chat_template.encode())


def import_tokenizer(folder: Path, out_dir: Path) -> Tokenizer | None:
    """Copy the tokenizer files of a folder in Hugging Face format into `out_dir`, from where `Tokenizer.load` reads
    them, and return the tokenizer.

    Where there is none, or one that cannot be used here, this is logged, its files are copied all the same, and None is
    returned: a model's weights need no tokenizer.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / name).write_bytes((folder / name).read_bytes())
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        there = any((folder / name).is_file() for name in (JSON_NAME, MODEL_NAME))
        log.warning(
            "NO TOKENIZER COMES WITH %s: %s",
            folder,
            error if there else "put the model's tokenizer.json and tokenizer_config.json there to have one",
        )
        return None
    tokenizer.save(out_dir)  # with the ids of its marks, which other files of the folder may tell
    return tokenizer


def recorded_chat_template(folder: Path) -> str | None:
    """The chat template among the tokenizer files of a folder, as Jinja; None where there is none."""
    if (folder / CHAT_TEMPLATE_NAME).is_file():
        return (folder / CHAT_TEMPLATE_NAME).read_bytes().decode()
    if not (folder / CONFIG_NAME).is_file():
        return None
    template = json.loads((folder / CONFIG_NAME).read_bytes()).get("chat_template")
    return template if isinstance(template, str) else None


def generation_config(tokenizer: Tokenizer, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of generation_config.json: the one that was `recorded` when the model was imported, unchanged, or
    else the ids of the tokenizer's marks. What ends a text is a list where several tokens do."""
    if recorded is not None:
        return dict(recorded)
    ends = tokenizer.eos_ids
    marks = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in marks.items() if value is not None}


def _write_ours(tokenizer: SentencePieceTokenizer, out_dir: Path, model_max_length: int) -> None:
    special = {name: tokenizer.pieces[index].name for name, index in _SPECIAL.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "add_bos_token": True,
        "add_eos_token": False,
        # Read by the classes for Llama, which otherwise put a space in front of each text.
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    fast_tokenizer(tokenizer).save(str(out_dir / JSON_NAME))
    write_json(out_dir / CONFIG_NAME, config)
    write_json(out_dir / MAP_NAME, special)
    (out_dir / MODEL_NAME).write_bytes(tokenizer.model)


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> FastTokenizer:
    """The same tokenizer for the `tokenizers` package."""
    vocab = {piece.name: index for index, piece in enumerate(tokenizer.pieces)}
    unk, bos = tokenizer.pieces[tokenizer.unk_id].name, tokenizer.pieces[tokenizer.bos_id].name
    fast = FastTokenizer(models.BPE(vocab, merges(tokenizer), unk_token=unk, byte_fallback=True, fuse_unk=True))
    # A U+2581 of the text is not a space: sentencepiece_tokenizer.py says what stands in for it.
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(SPACE_MARK, STAND_IN), normalizers.Replace(" ", SPACE_MARK)]
    )
    if tokenizer.cuts_at_spaces:
        unit = Regex(f"{SPACE_MARK}*[^{SPACE_MARK}\n]+|{SPACE_MARK}+|\n")
        fast.pre_tokenizer = pre_tokenizers.Split(unit, "isolated")
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(STAND_IN, SPACE_MARK),
        ]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    control = [piece.name for piece in tokenizer.pieces if piece.kind == "control"]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return fast


def merges(tokenizer: SentencePieceTokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, in the order in which SentencePiece would merge them."""
    names = {piece.name for piece in tokenizer.pieces if piece.kind == "text"}
    return [
        (piece.name[:cut], piece.name[cut:])
        for piece in tokenizer.pieces
        if piece.kind == "text"
        for cut in range(1, len(piece.name))
        if piece.name[:cut] in names and piece.name[cut:] in names
    ]
