"""Tokenizers of other makers: equal to transformers', copied into a run, and written back byte for byte."""

import json
import logging
import shutil

import pytest
from transformers import AutoTokenizer

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.tokenizing.sentencepiece_tokenizer import SentencePieceTokenizer
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.hf.tokenizer import (
    generation_config,
    import_tokenizer,
    recorded_chat_template,
    write_hf_tokenizer,
)

KINDS = ("qwen", "qwen without NFC", "llama 3", "olmo", "llama 2", "mistral", "gemma")
ODD = [
    "a \n b   c    d",
    "Ħobż u żejt, ქართული",
    "e\u0301 against é",
    "👩‍👩‍👧",
    "<s> </s> <|endoftext|> <bos>",
    "\n\n\n",
]


@pytest.fixture(scope="module")
def texts(corpus_dir):
    return ODD + [document.text for document in read_documents(corpus_dir)][::5]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_marks_are_those_of_transformers(hub_folders, texts, kind):
    ours, theirs = Tokenizer.load(hub_folders[kind]), AutoTokenizer.from_pretrained(hub_folders[kind])
    ids = [found.tolist() for found in ours.encode_batch(texts)]
    assert theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    front = [] if ours.bos_id is None else [ours.bos_id]
    assert theirs(texts, split_special_tokens=True)["input_ids"] == [front + found for found in ids]
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos_id, ours.vocab_size)
    assert set(theirs.all_special_ids) <= {i for i, piece in enumerate(ours.pieces) if piece.kind == "control"}
    assert theirs.batch_decode(ids) == [ours.decode(found) for found in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_one_is_written_back_byte_for_byte(hub_folders, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(hub_folders[kind], folder)
    for name in ("added_tokens.json", "merges.txt", "chat_template.jinja", "vocab.json"):
        (folder / name).write_bytes(b'{"\xc3\xa9": 1}\r\n')
    (folder / "model.safetensors").write_bytes(b"weights")
    imported = import_tokenizer(folder, tmp_path / "run" / "tokenizer")
    again = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert again.sha256 == imported.sha256
    assert (again.bos_id, again.eos_ids, again.pad_id) == (imported.bos_id, imported.eos_ids, imported.pad_id)
    write_hf_tokenizer(again, tmp_path / "export", model_max_length=64)
    others = {"generation_config.json", "config.json", "model.safetensors"}
    came = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in others}
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == came


def test_a_chat_template_is_where_new_and_old_versions_look(tokenizer, hub_folders, tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    for number, one in enumerate((tokenizer, Tokenizer.load(hub_folders["llama 2"]))):
        folder = tmp_path / str(number)
        write_hf_tokenizer(one, folder, model_max_length=64, chat_template=template)
        auto = AutoTokenizer.from_pretrained(folder)
        message = [{"role": "user", "content": "so"}]
        assert auto.apply_chat_template(message, tokenize=False) == "so</s>"
        assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template
        assert recorded_chat_template(folder) == template
        (folder / "chat_template.jinja").unlink()
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(message, tokenize=False) == "so</s>"
        assert recorded_chat_template(folder) == template
    assert recorded_chat_template(hub_folders["llama 2"]) is None
    assert recorded_chat_template(tmp_path) is None


def test_ours_comes_back_from_its_export_as_ours(tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, tmp_path / "export", model_max_length=64, chat_template="{{ messages }}")
    again = import_tokenizer(tmp_path / "export", tmp_path / "run")
    assert isinstance(again, SentencePieceTokenizer)
    assert Tokenizer.load(tmp_path / "run").sha256 == tokenizer.sha256
    assert recorded_chat_template(tmp_path / "run") == "{{ messages }}"


def test_weights_may_come_without_a_tokenizer_and_it_is_said(tmp_path, caplog):
    (tmp_path / "model").mkdir()
    with caplog.at_level(logging.WARNING):
        assert import_tokenizer(tmp_path / "model", tmp_path / "run") is None
    assert "put the model's tokenizer.json and tokenizer_config.json there" in caplog.text
    assert not (tmp_path / "run").exists()
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"of another kind")
    with caplog.at_level(logging.WARNING):
        assert import_tokenizer(tmp_path / "model", tmp_path / "run") is None
    assert "give the folder with its tokenizer.json" in caplog.text
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == b"of another kind"


def test_the_generation_config_has_every_end_or_is_the_recorded_one(tokenizer, hub_folders):
    assert generation_config(tokenizer) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    qwen = Tokenizer.load(hub_folders["qwen"])
    assert generation_config(qwen) == {"eos_token_id": list(qwen.eos_ids), "pad_token_id": qwen.pad_id}
    recorded = json.loads((hub_folders["qwen"] / "generation_config.json").read_text())
    assert generation_config(qwen, recorded) == recorded
