"""Write a tokenizer as Hugging Face files that give the same ids and the same text back.

The fast tokenizer is built by hand, since automatic conversion adds a space in front of every text or picks another
algorithm without saying so. A BPE of Hugging Face has ranked merges where SentencePiece has ranked pieces: every way to
make a piece of two others is a merge, in the order of the pieces.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from eurollm_jax.corpus.folders import write_json
from eurollm_jax.corpus.tokenizing.tokenizer import SPACE_MARK, STAND_IN, Tokenizer

_SPECIAL = {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": 3}


def write_hf_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, model_max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model into `out_dir`.

    Encoding gives `[bos, *ids]`, as our documents begin; with `add_special_tokens=False`, exactly `tokenizer.encode`.
    The one difference: text that spells a special token, such as "</s>", becomes that token, as is the custom of
    `transformers`, unless its caller passes `split_special_tokens=True`; here such text is text.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
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
    fast_tokenizer(tokenizer).save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "tokenizer_config.json", config)
    write_json(out_dir / "special_tokens_map.json", special)
    (out_dir / "tokenizer.model").write_bytes(tokenizer.model)


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """The same tokenizer for the `tokenizers` package."""
    vocab = {piece.name: index for index, piece in enumerate(tokenizer.pieces)}
    unk, bos = tokenizer.pieces[tokenizer.unk_id].name, tokenizer.pieces[tokenizer.bos_id].name
    fast = FastTokenizer(models.BPE(vocab, merges(tokenizer), unk_token=unk, byte_fallback=True, fuse_unk=True))
    # A U+2581 of the text is not a space: corpus/tokenizer.py says what stands in for it.
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


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, in the order in which SentencePiece would merge them."""
    names = {piece.name for piece in tokenizer.pieces if piece.kind == "text"}
    return [
        (piece.name[:cut], piece.name[cut:])
        for piece in tokenizer.pieces
        if piece.kind == "text"
        for cut in range(1, len(piece.name))
        if piece.name[:cut] in names and piece.name[cut:] in names
    ]
