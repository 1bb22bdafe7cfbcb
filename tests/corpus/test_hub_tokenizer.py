"""Tokenizers of other makers: their own ids, exact bytes, and what they do to a text is said."""

import json
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import tokenizers as hub
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing.hub_tokenizer import HubTokenizer
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.hf.tokenizer import write_hf_tokenizer

BYTE_LEVEL = ("qwen", "qwen without NFC", "llama 3", "olmo")
PREFIXED = ("llama 2", "mistral")
KINDS = (*BYTE_LEVEL, *PREFIXED, "gemma")

ODD = [
    "",
    "\n",
    "\n\n a\n",
    "a \n b   c    d",
    "CR\r\nLF\ttab\t\t",
    "nul\0inside",
    "Ħobż u żejt, Καλημέρα, съседе, ქართული",
    "e\u0301 against é, \u212b",
    "👩‍👩‍👧 and 🇪🇺",
    "1234567890 3.14",
    "▅ ⁇ \u00a0\u3000\u2028",
    "<s> </s> <unk> <pad> <0x0A> <think> <|endoftext|> <|im_end|> <bos>",
    "\ufeffmark \U0010ffff",
    "Ġ Ċ é",
    "x" * 20_000,
    "trailing  ",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("atenо η\n  é\u0301<|>/s")))


@pytest.fixture(scope="module")
def loaded(hub_folders):
    return {kind: Tokenizer.load(folder) for kind, folder in hub_folders.items()}


def comes_back(kind, text):
    """What decoding the ids of a text must give."""
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    if kind not in BYTE_LEVEL:
        text = text.replace("▁", " ")  # the mark of a space
    if kind == "mistral" and text.startswith(" "):
        return text[1:]  # no space is put in front of one that is there
    return text


def check(kind, tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    if kind == "qwen" and any(name in text for name in ("<think>", "</think>")):
        return  # cut out before a text is normalised, see below
    back = comes_back(kind, text)
    assert tokenizer.decode(ids) == back
    assert tokenizer.decode_bytes(ids) == back.encode()
    if text:
        document = [tokenizer.begin_id, *ids, tokenizer.eos_id]
        assert tokenizer.piece_bytes[document[1:]].sum() == len(back.encode())
        assert tokenizer.decode(document) == back


@pytest.mark.parametrize("kind", KINDS)
def test_odd_text_comes_back_with_its_bytes(loaded, kind):
    for text in ODD:
        check(kind, loaded[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_with_its_bytes(loaded, kind, text):
    check(kind, loaded[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_a_text_that_is_normalised_comes_back_as_it_is(loaded, kind, text):
    tokenizer = loaded[kind]
    if kind in (*PREFIXED, "gemma"):
        text = text.replace("▁", "").lstrip(" ")
    written = tokenizer.normalised(text)
    assert tokenizer.normalised(written) == written
    assert tokenizer.decode(tokenizer.encode(written)) == written


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_bytes_are_those_of_the_library(loaded, hub_folders, corpus_dir, kind):
    tokenizer = loaded[kind]
    fast = hub.Tokenizer.from_file(str(hub_folders[kind] / "tokenizer.json"))
    texts = [document.text for document in read_documents(corpus_dir)][::7]
    theirs = [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)]
    for threads in (1, 2):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts, threads)] == theirs
    assert [tokenizer.decode(ids) for ids in theirs] == fast.decode_batch(theirs)
    assert tokenizer.vocab_size == fast.get_vocab_size()
    for index, piece in enumerate(tokenizer.pieces):
        if piece.kind == "text" and b"\xef\xbf\xbd" not in (alone := fast.decode([index]).encode()):
            assert tokenizer.decode_bytes([index]) == alone


def test_marks_are_told(loaded):
    def marks(kind):
        tokenizer = loaded[kind]
        ids = (tokenizer.bos_id, tokenizer.begin_id, tokenizer.pad_id, *tokenizer.eos_ids)
        assert tokenizer.eos_id == tokenizer.eos_ids[0]
        return [None if index is None else tokenizer.pieces[index].name for index in ids]

    assert marks("qwen") == [None, "<|im_end|>", "<|endoftext|>", "<|im_end|>", "<|endoftext|>"]
    assert marks("llama 3") == ["<|begin_of_text|>", "<|begin_of_text|>", None, "<|end_of_text|>"]
    assert marks("olmo") == [None, "<|endoftext|>", "<|pad|>", "<|endoftext|>"]
    assert marks("llama 2") == ["<s>", "<s>", "<unk>", "</s>"]
    assert marks("gemma") == ["<bos>", "<bos>", "<pad>", "<eos>", "<end_of_turn>"]


def test_our_own_has_the_same_marks_as_ever(tokenizer):
    assert (tokenizer.bos_id, tokenizer.begin_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (
        (1, 1, 2, (2,), 3)
    )
    assert (tokenizer.prefix, tokenizer.normal_form, tokenizer.losses) == ("", None, ())


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_never_spelt_and_have_no_bytes(loaded, kind):
    tokenizer = loaded[kind]
    control = {index for index, piece in enumerate(tokenizer.pieces) if piece.kind == "control"}
    assert {tokenizer.begin_id, *tokenizer.eos_ids} <= control
    spelt = tokenizer.encode("".join(tokenizer.pieces[index].name for index in control))
    assert not control & set(spelt.tolist())
    assert {len(tokenizer.pieces[index].content) for index in control} == {0}


def test_bytes_for_want_of_a_piece_are_told(loaded):
    for kind in KINDS:
        tokenizer = loaded[kind]
        assert tokenizer.is_byte[tokenizer.encode("ქ")].sum() == 3
        assert not tokenizer.is_byte[tokenizer.encode("Il-qattus")].any()


def test_what_goes_on_after_other_ids_keeps_its_space(loaded):
    for kind in KINDS:
        tokenizer = loaded[kind]
        ids = tokenizer.encode("The ferry leaves at noon")
        for cut in range(1, len(ids)):
            first, second = tokenizer.decode_bytes(ids[:cut]), tokenizer.decode_bytes(ids[cut:], continues=True)
            assert first + second == b"The ferry leaves at noon"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_after_being_pickled_and_saved(loaded, tmp_path, kind):
    tokenizer = loaded[kind]
    tokenizer.save(tmp_path / "kept")
    for copy in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path / "kept")):
        assert copy.sha256 == tokenizer.sha256
        assert (copy.bos_id, copy.eos_ids, copy.pad_id) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id)
        assert copy.encode("Il-ħobż <s>").tolist() == tokenizer.encode("Il-ħobż <s>").tolist()
    assert not list((tmp_path / "kept").glob(".*"))


def test_truncation_and_padding_that_a_file_asks_for_are_not_done(hub_folders, tmp_path):
    fast = hub.Tokenizer.from_file(str(hub_folders["llama 3"] / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    shutil.copytree(hub_folders["llama 3"], tmp_path / "cut")
    fast.save(str(tmp_path / "cut" / "tokenizer.json"))
    text = "The ferry leaves at noon"
    expected = Tokenizer.load(hub_folders["llama 3"]).encode(text).tolist()
    assert Tokenizer.load(tmp_path / "cut").encode(text).tolist() == expected


def test_the_same_file_with_other_marks_is_another_tokenizer(hub_folders, tmp_path):
    shutil.copytree(hub_folders["qwen"], tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|endoftext|>"}))
    chat, base = Tokenizer.load(hub_folders["qwen"]), Tokenizer.load(tmp_path / "base")
    assert base.begin_id != chat.begin_id
    assert base.sha256 != chat.sha256


def test_half_a_surrogate_pair_is_refused(loaded):
    for tokenizer in loaded.values():
        with pytest.raises(UserError, match="character 2 is half a surrogate pair"):
            tokenizer.encode("a\ud800")


def test_a_model_may_have_rows_to_spare_but_not_too_few(loaded):
    tokenizer = loaded["qwen"]
    assert tokenizer.spare_rows(tokenizer.vocab_size + 267) == 267
    assert tokenizer.spare_rows(tokenizer.vocab_size) == 0
    with pytest.raises(UserError, match=f"has {tokenizer.vocab_size} tokens and the model's vocab_size is 512"):
        tokenizer.spare_rows(512)
    ids = tokenizer.encode("so").tolist()
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "so"


# Which kind a folder holds.


def test_ours_stays_ours_where_an_export_put_more_beside_it(tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, tmp_path, model_max_length=64)
    again = Tokenizer.load(tmp_path)
    assert isinstance(again, SentencePieceTokenizer)
    assert again.sha256 == tokenizer.sha256


def test_an_export_of_ours_that_got_more_tokens_is_taken_with_them(tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, tmp_path, model_max_length=64)
    fast = hub.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.add_special_tokens(["<|user|>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    more = Tokenizer.load(tmp_path)
    assert isinstance(more, HubTokenizer)
    assert (more.vocab_size, more.bos_id, more.eos_ids, more.losses) == (tokenizer.vocab_size + 1, 1, (2,), ())
    for text in ODD:
        assert more.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert more.decode(more.encode(text)) == text
    assert more.decode(more.encode("a ▁ b")) == "a ▁ b"


def test_a_model_needs_no_rows_for_control_tokens_at_the_end(hub_folders, tmp_path):
    """Gemma 3 1B has 262,144 rows, and its tokenizer one token more, which stands for an image."""
    folder, rows = hub_folders["gemma"], Tokenizer.load(hub_folders["gemma"]).vocab_size
    more = changed(folder, tmp_path / "image", lambda fast: fast.add_special_tokens(["<image_soft_token>"]))
    assert (more.vocab_size, more.spare_rows(rows)) == (rows + 1, 0)
    assert more.encode("an <image_soft_token>").max() < rows
    text = changed(folder, tmp_path / "text", lambda fast: fast.add_tokens(["<image_soft_token>"]))
    with pytest.raises(UserError, match=f"has {rows + 1} tokens and the model's vocab_size is {rows}"):
        text.spare_rows(rows)
    config = tmp_path / "image" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "<image_soft_token>"}))
    with pytest.raises(UserError, match=f"has {rows + 1} tokens and the model's vocab_size is {rows}"):
        Tokenizer.load(tmp_path / "image").spare_rows(rows)


def test_a_sentencepiece_model_of_others_needs_its_json(hub_folders, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"of another kind")
    with pytest.raises(UserError, match=r"not a SentencePiece model.*give the folder with its tokenizer\.json"):
        Tokenizer.load(tmp_path)
    shutil.copy(hub_folders["llama 2"] / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="does not say which token ends a text"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert isinstance(Tokenizer.load(tmp_path), HubTokenizer)
    assert isinstance(Tokenizer.load(tmp_path / "tokenizer.json"), HubTokenizer)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", "is not JSON"),
        ("tokenizer.json", b"[]", "no JSON object"),
        ("tokenizer.json", b'{"model": {}}', "no tokenizer that can be read"),
        ("tokenizer_config.json", b'{"eos_token": "</end>"}', "has no token '</end>', named as eos_token"),
        ("generation_config.json", b"no", r"generation_config\.json is not JSON"),
    ],
)
def test_damaged_files_are_named(hub_folders, tmp_path, file, content, message):
    shutil.copytree(hub_folders["llama 2"], tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "damaged")


def test_a_tokenizer_whose_bytes_are_not_known_is_refused(hub_folders, tmp_path):
    for fast in (
        hub.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        hub.Tokenizer(models.BPE({"a": 0, "</w>": 1}, [], end_of_word_suffix="</w>")),
        hub.Tokenizer(models.BPE({"a": 0}, [])),
    ):
        fast.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match=r"do not say their bytes|bytes of a token are not known"):
            Tokenizer.load(tmp_path)


def changed(folder, out, change):
    """A copy of the folder whose tokenizer.json is changed."""
    shutil.copytree(folder, out)
    fast = hub.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(fast)
    fast.save(str(out / "tokenizer.json"))
    return Tokenizer.load(out)


@pytest.mark.parametrize(
    ("kind", "part", "value", "message"),
    [
        ("llama 3", "normalizer", normalizers.NFKC(), "normalises text by NFKC"),
        ("llama 3", "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), "by Lowercase"),
        ("llama 3", "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "adds a space in front"),
        (
            "llama 3",
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            "may drop text by Whitespace",
        ),
        ("gemma", "pre_tokenizer", pre_tokenizers.Split(" ", "removed"), "may drop text by Split"),
        ("gemma", "decoder", decoders.Replace("▁", " "), "no token for 256 of the 256 bytes"),
    ],
)
def test_one_that_loses_text_writes_but_makes_no_corpus(hub_folders, corpus_dir, tmp_path, kind, part, value, message):
    lossy = changed(hub_folders[kind], tmp_path / "lossy", lambda fast: setattr(fast, part, value))
    assert "ferry" in lossy.decode(lossy.encode("The ferry"))  # in generation it may serve
    with pytest.raises(UserError, match=f"cannot give back every text exactly .*{message}"):
        prepare(corpus_dir, lossy, tmp_path / "store")
    assert not (tmp_path / "store").exists()
