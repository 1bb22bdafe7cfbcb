"""Not a byte is lost, every token knows its bytes, and a model that would lose some is refused."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.sources import read_documents
from eurollm_jax.corpus.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

ODD = [
    "",
    " ",
    "  two  spaces  ",
    "\n",
    "\n\n a\n",
    "a \n b",
    "CR\r\nLF",
    "\ttab\t\t",
    "nul\0inside",
    "Ħobż u żejt",
    "Καλημέρα κόσμε",
    "Добро утро, съседе",
    "ქართული",
    "e\u0301 against é",
    "👩‍👩‍👧 and 🇪🇺",
    "1234567890 3.14",
    "▁ and▁▁",
    "▅ ⁇ \u00a0\u3000\u2028",
    "<s> </s> <unk> <pad> <0x0A>",
    "\ufeffmark \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaa",
    "x" * 20_000,
]
TEXT = st.text().filter(lambda text: "\ufdd0" not in text)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert ids.dtype == np.int32


@given(text=TEXT | st.text("aten \n▁éо,1"))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    assert len(ids) == 0 or ids.min() > tokenizer.pad_id


def test_ids_are_those_of_sentencepiece(tokenizer, corpus_dir):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.model_path))
    texts = [document.text for document in read_documents(corpus_dir)]
    texts += [text for text in ODD if "▁" not in text]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts, threads=2)] == plain.encode(texts)
    assert [tokenizer.decode(ids) for ids in plain.encode(texts)] == texts


def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer):
    for got, text in zip(tokenizer.encode_batch(ODD), ODD, strict=True):
        np.testing.assert_array_equal(got, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []
    assert [ids.tolist() for ids in tokenizer.encode_batch(["", ""])] == [[], []]


def test_a_newline_is_one_token_of_its_own_and_digits_are_single(tokenizer):
    assert len(tokenizer.encode("\n")) == 1
    assert tokenizer.encode("a\n\nb").tolist() == np.concatenate([tokenizer.encode(c) for c in "a\n\nb"]).tolist()
    assert len(tokenizer.encode("2026")) == 4


def test_bytes_of_tokens_that_hold_part_of_a_character(tokenizer):
    ids = tokenizer.encode("😀")
    assert tokenizer.piece_bytes[ids].tolist() == [1, 1, 1, 1]
    assert tokenizer.decode_bytes(ids[:3]) == "😀".encode()[:3]
    assert tokenizer.decode(ids[:3]) == "�"
    assert tokenizer.piece_bytes[:4].tolist() == [0, 0, 0, 0]
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2, 3]) == "a"


def test_what_no_id_stands_for_is_an_error(tokenizer):
    for ids in ([-1], [tokenizer.vocab_size], [5, 10**9]):
        with pytest.raises(ValueError, match="the vocabulary from 0 to 639"):
            tokenizer.decode(ids)


def test_text_that_cannot_be_kept_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"character 3 is U\+FDD0"):
        tokenizer.encode("ab\ufdd0")
    with pytest.raises(UserError, match="character 2 is half a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_pickling_keeps_everything_even_when_the_file_is_gone(tokenizer, tmp_path):
    file = tmp_path / "copy.model"
    file.write_bytes(tokenizer.model_path.read_bytes())
    pickled = pickle.dumps(Tokenizer.load(file))
    file.unlink()
    copy = pickle.loads(pickled)
    assert copy.encode("Il-ħobż ▁").tolist() == tokenizer.encode("Il-ħobż ▁").tolist()
    assert copy.sha256 == tokenizer.sha256 == hashlib.sha256(tokenizer.model_path.read_bytes()).hexdigest()


def other_model(**options):
    model = io.BytesIO()
    lossless = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "pad_id": 3,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "vocab_size": 275,
        "hard_vocab_limit": False,
        "minloglevel": 3,
    }
    sentences = ["the cat sat on the mat", "the dog and the cat"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **lossless | options
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_dummy_prefix": True}, "adds a space in front"),
        ({"remove_extra_whitespaces": True}, "drops repeated spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"byte_fallback": False, "vocab_size": 30}, "no byte fallback"),
        ({"model_type": "unigram"}, "not BPE"),
        ({"pad_id": -1}, r"at \(0, 1, 2, -1\)"),
        ({"bos_id": 2, "eos_id": 1}, r"at \(0, 2, 1, 3\)"),
        ({"user_defined_symbols": ["cat"]}, "user-defined pieces"),
    ],
)
def test_a_model_that_would_lose_text_is_refused(tmp_path, options, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(other_model(**options))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_lossless_model_of_another_maker_is_taken(tmp_path):
    file = tmp_path / "other.model"
    file.write_bytes(other_model())
    tokenizer = Tokenizer.load(file)
    assert tokenizer.decode(tokenizer.encode(" the cat\n ▁ ü")) == " the cat\n ▁ ü"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*missing"):
        Tokenizer.load(tmp_path / "missing")
    for content in (b"", b"hello world" * 9):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path)
