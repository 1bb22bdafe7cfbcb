"""Not a byte is lost, every token knows its bytes, and a model that would lose some is refused."""

import hashlib
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing import sentencepiece_tokenizer, words
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
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


BITS = [*"ab \n ▁é\0", "  ", "   ", " \n", "\n ", "the", " cat", "dog", "Ω", "12", "====", "\r\n", "the cat sat"]
PROSE = st.lists(st.sampled_from(BITS), max_size=60).map("".join)


@cache
def model_of(split_by_whitespace):
    return other_model(split_by_whitespace=split_by_whitespace, vocab_size=310)


def by_sentencepiece(tokenizer, text):
    """The ids as SentencePiece finds them in the whole text: it takes U+2581 for a space, so we put U+FDD0 there."""
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    return plain.encode(text.replace("▁", "\ufdd0"))


@given(batches=st.lists(st.lists(PROSE, max_size=4), max_size=4), kept=st.sampled_from([0, 3, 1000]))
@settings(max_examples=200, deadline=None)
def test_what_was_encoded_before_changes_no_ids(tokenizer, batches, kept):
    fresh = SentencePieceTokenizer(tokenizer.model_path, tokenizer.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_KEPT_WORDS", kept)
        for texts in batches:
            for text, ids in zip(texts, fresh.encode_batch(texts), strict=True):
                assert ids.tolist() == by_sentencepiece(tokenizer, text)


@pytest.mark.parametrize("split_by_whitespace", [True, False])
@given(texts=st.lists(PROSE, min_size=1, max_size=3), size=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_a_text_that_is_cut_has_the_ids_of_the_whole(split_by_whitespace, texts, size):
    tokenizer = SentencePieceTokenizer(Path("other.model"), model_of(split_by_whitespace))
    assert tokenizer.cuts_at_spaces is split_by_whitespace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_tokenizer, "_PART_CHARACTERS", size)
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == by_sentencepiece(tokenizer, text)
            assert tokenizer.decode_bytes(ids) == text.encode()


def test_a_run_that_cannot_be_cut_is_refused_by_its_place(tokenizer, monkeypatch):
    monkeypatch.setattr(sentencepiece_tokenizer, "_PART_CHARACTERS", 10)
    monkeypatch.setattr(sentencepiece_tokenizer, "_LONGEST_RUN", 40)
    run = "the" * 20 if "eth" in "".join(piece.name for piece in tokenizer.pieces) else "en" * 30
    assert all(run[i : i + 2] in tokenizer._neighbours for i in range(len(run) - 1))
    assert tokenizer.decode(tokenizer.encode(f"a \n{run[:40]} b")) == f"a \n{run[:40]} b"
    with pytest.raises(UserError, match="from character 4 on it has 40 in which no word ends"):
        tokenizer.encode(f"a \n{run} b")


def test_threads_may_share_a_tokenizer(tokenizer, corpus_dir):
    texts = [document.text for document in read_documents(corpus_dir)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    fresh = SentencePieceTokenizer(tokenizer.model_path, tokenizer.model)
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(fresh.encode, texts)] == expected


@pytest.mark.slow
def test_a_document_of_200_megabytes_with_nuls_comes_back(tokenizer):
    text = ("In principio\0 ħobż, καλημέρα.  Добро утро\n" * 4_000_000)[:155_000_000]
    assert len(text.encode()) > 200_000_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert int(tokenizer.piece_bytes[ids].sum()) == len(text.encode())


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
            tokenizer.decode_bytes(ids)
    with pytest.raises(ValueError, match="the vocabulary from 0 to 639"):
        tokenizer.decode([-1])


def test_what_a_model_with_spare_rows_writes_there_is_nothing(tokenizer):
    ids = tokenizer.encode("Il-baħar").tolist()
    assert tokenizer.decode([*ids, tokenizer.vocab_size, *ids, 10**9]) == "Il-baħar" * 2


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


def test_one_that_is_saved_is_found_in_its_folder_whatever_its_file_was_called(tmp_path):
    (tmp_path / "other.model").write_bytes(other_model())
    tokenizer = Tokenizer.load(tmp_path / "other.model")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").sha256 == tokenizer.sha256


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*missing"):
        Tokenizer.load(tmp_path / "missing")
    for content in (b"", b"hello world" * 9):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path)
