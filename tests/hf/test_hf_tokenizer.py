"""The exported tokenizer gives our ids and our text, through `tokenizers` and through `transformers`."""

import json
from random import Random

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer
from eurollm_jax.hf.tokenizer import write_hf_tokenizer

ODD = [
    "",
    " ",
    "\n",
    " \n  \n\n",
    "two  spaces   three ",
    " leading",
    "trailing  ",
    "CR\r\nLF\rCR",
    "tab\t\tbed",
    "nul\0l",
    "Добро утро, съседе!",
    "Καλημέρα, φίλε· ΐ",
    "Il-ħobż tiegħi ġdid, ċar u żejt",
    "👩‍👩‍👧‍👦 🇪🇺 ❤️ ✊🏽",
    "a\u0301 á ﬁ Å",
    "0123456789 1.000,50 2026-11-22",
    "▁ ▁▁ a▁b ▁ c",
    "<0x0A> <|x|>",
    "\u00a0\u2028\u3000\ufeff",
    "\U0010fffd\ue000\uffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "שלום עולם مرحبا 你好",
]


def random_texts(tokenizer, count):
    """Runs of a few letters, of pieces of the vocabulary, and of any characters at all."""
    dice = Random(0)
    pieces = [piece.content.decode() for piece in tokenizer.pieces if piece.kind == "text"]
    texts = []
    for number in range(count):
        length = dice.randint(0, 40)
        if number % 3 == 0:
            letters = dice.choice(["ae", "tn ", "а о", " \n", "ηι ▁", "".join(dice.sample(pieces, 3))])
            texts.append("".join(dice.choices(letters, k=length)))
        elif number % 3 == 1:
            texts.append("".join(dice.choices(pieces, k=length)))
        else:
            ranges = [(0, 0x80), (0x80, 0x530), (0x530, 0xD800), (0xE000, 0xFDD0), (0xFDD1, 0x110000)]
            texts.append("".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(length)))
    return texts


@pytest.fixture(scope="module")
def texts(tokenizer, corpus_dir):
    return ODD + random_texts(tokenizer, 2400) + [document.text for document in read_documents(corpus_dir)]


@pytest.fixture(scope="module")
def export(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_hf_tokenizer(tokenizer, folder, model_max_length=2048)
    # As it lies beside a model: `transformers` looks here for the kind of tokenizer, too.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def test_ids_and_text_are_equal_through_tokenizers(tokenizer, export, texts):
    fast = tokenizers.Tokenizer.from_file(str(export / "tokenizer.json"))
    ours = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    theirs = [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []
    assert fast.decode_batch(ours) == texts
    assert fast.get_vocab_size() == tokenizer.vocab_size


def test_ids_are_those_of_the_sentencepiece_model_beside_it(export, texts):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(export / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(export / "tokenizer.json"))
    without_mark = [text for text in texts if "▁" not in text]
    theirs = [encoding.ids for encoding in fast.encode_batch(without_mark, add_special_tokens=False)]
    assert plain.encode(without_mark) == theirs


def test_ids_and_text_are_equal_through_transformers(tokenizer, export, texts):
    auto = AutoTokenizer.from_pretrained(export)
    ours = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    theirs = auto(texts, add_special_tokens=False)["input_ids"]
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []
    assert auto.batch_decode(ours) == texts


def test_a_text_begins_with_one_bos_as_documents_do(tokenizer, export):
    auto = AutoTokenizer.from_pretrained(export)
    assert auto("Il-baħar")["input_ids"] == [1, *tokenizer.encode("Il-baħar").tolist()]
    assert auto("")["input_ids"] == [1]
    pair = auto("a", "b")["input_ids"]
    assert pair == [1, *tokenizer.encode("a").tolist(), 1, *tokenizer.encode("b").tolist()]
    assert auto.decode([1, *tokenizer.encode("x  y").tolist(), 2], skip_special_tokens=True) == "x  y"


def test_special_tokens_and_length_are_told(tokenizer, export):
    auto = AutoTokenizer.from_pretrained(export)
    assert (auto.unk_token_id, auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 1, 2, 3)
    assert (auto.model_max_length, len(auto)) == (2048, tokenizer.vocab_size)
    assert (export / "tokenizer.model").read_bytes() == tokenizer.model_path.read_bytes()


def test_text_that_spells_a_special_token_is_text_when_asked(tokenizer, export):
    auto = AutoTokenizer.from_pretrained(export)
    text = "<s>struck</s> through"
    ours = tokenizer.encode(text).tolist()
    assert auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours
    assert auto(text, add_special_tokens=False)["input_ids"][0] == 1


def test_it_stays_equal_after_being_saved_again(tokenizer, export, tmp_path):
    AutoTokenizer.from_pretrained(export).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ours = [[1, *ids.tolist()] for ids in tokenizer.encode_batch(ODD)]
    assert again(ODD)["input_ids"] == ours


def test_further_special_tokens_keep_their_ids(corpus_dir, tmp_path):
    special = ("<|user|>", "<|end|>")
    tokenizer = train_tokenizer(corpus_dir, tmp_path / "tokenizer", vocab_size=620, special_tokens=special)
    write_hf_tokenizer(tokenizer, tmp_path / "export", model_max_length=512)
    auto = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert auto.convert_tokens_to_ids(list(special)) == [4, 5]
    assert len(auto) == 620
    assert auto("<|user|>a<|end|>", add_special_tokens=False)["input_ids"] == [4, *tokenizer.encode("a").tolist(), 5]
