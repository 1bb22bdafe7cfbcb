"""What else a folder holds or names: files elsewhere, links as in the hub's cache, a chat template."""

import json
import shutil

import pytest
import torch
import transformers

from eurollm_jax.cli import main
from eurollm_jax.errors import UserError
from eurollm_jax.hf.folder import HASHES_NAME, HubFolder
from eurollm_jax.hf.importing import import_folder
from eurollm_jax.hf.mapping import INDEX_NAME
from eurollm_jax.hf.tokenizer import recorded_chat_template, write_hf_tokenizer
from tests.hf.parity import random_model

SIZES = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=640)
NOT_IN_THE_FOLDER = ["../other/model.safetensors", "/etc/passwd", "", "sub/../../x"]


@pytest.fixture
def folder(tmp_path):
    """A small Llama in two shards, the second in a folder of its own."""
    model = random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="1KB")
    index = json.loads((tmp_path / "model" / INDEX_NAME).read_text())
    last = max(index["weight_map"].values())
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / last).rename(tmp_path / "model" / "sub" / last)
    index["weight_map"] = {name: f"sub/{at}" if at == last else at for name, at in index["weight_map"].items()}
    (tmp_path / "model" / INDEX_NAME).write_text(json.dumps(index))
    return tmp_path / "model"


@pytest.mark.parametrize("name", NOT_IN_THE_FOLDER)
def test_an_index_that_names_files_elsewhere_is_refused(name, folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json names '.*', and only files in its folder are read"):
        HubFolder(folder)


@pytest.mark.parametrize("name", NOT_IN_THE_FOLDER)
def test_hashes_of_files_elsewhere_are_refused(name, folder):
    (folder / HASHES_NAME).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match=r"SHA256SUMS names '.*', and only files in its folder are read"):
        HubFolder(folder).hashes()


def test_a_folder_of_links_into_a_store_of_blobs_is_read(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blobs / str(number))
        link.symlink_to(blobs / str(number))
    hub = import_folder(snapshot, tmp_path / "run")
    assert {name for name in hub.hashes() if name.startswith("sub/")}
    assert (tmp_path / "run" / "experiment.json").is_file()


def test_the_chat_template_of_an_export_of_ours_comes_back(folder, tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, folder, model_max_length=2048, chat_template="{{ messages }}")
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert recorded_chat_template(tmp_path / "out") == "{{ messages }}"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
