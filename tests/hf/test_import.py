"""From a Hugging Face folder to a run and back, as a user types it, and what is said of a folder that is not whole."""

import json
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from eurollm_jax.cli import main
from eurollm_jax.errors import UserError
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.importing import import_folder
from eurollm_jax.hf.tokenizer import write_hf_tokenizer
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.training.checkpoint import write_checkpoint
from tests.hf.parity import random_model, tensors_of

SIZES = dict(hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1)
FIRST, SECOND = (f"model-0000{number}-of-00005.safetensors" for number in (1, 2))  # in bfloat16
INDEX = "model.safetensors.index.json"


def make(folder, tokenizer, *, dtype="bfloat16", vocab_size=640, max_shard_size="20KB"):
    """A small Llama as transformers writes it, with our tokenizer, an id that ends texts, and a list of hashes."""
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=vocab_size, head_dim=10, max_position_embeddings=300, rope_theta=5e5, bos_token_id=1
    )
    model = random_model(transformers.LlamaForCausalLM, config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        write_hf_tokenizer(tokenizer, folder, model_max_length=300)
    list_hashes(folder)
    return folder


def list_hashes(folder):
    subprocess.run("rm -f SHA256SUMS; sha256sum $(ls) > SHA256SUMS", shell=True, cwd=folder, check=True)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A folder of five shards in bfloat16; read it, never write to it."""
    return make(tmp_path_factory.mktemp("whole") / "model", tokenizer)


@pytest.fixture(scope="module")
def imported(whole, tmp_path_factory):
    """The run of it; read it, never write to it."""
    run = tmp_path_factory.mktemp("imported") / "run"
    import_folder(whole, run)
    return run


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def call(capsys):
    def run(*argv):
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def refused(call):
    """The one sentence with which a command is refused."""

    def run(*argv):
        status, said = call(*argv)
        assert (status, said.out) == (1, ""), said
        (sentence,) = said.err.splitlines()
        return sentence.removeprefix("eurollm: ")

    return run


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_import_and_export_give_every_tensor_back_byte_for_byte(dtype, call, tokenizer, tmp_path):
    folder = make(tmp_path / "model", tokenizer, dtype=dtype)
    status, said = call("import", folder, tmp_path / "run")
    assert status == 0
    parameters = sum(value.size for value in tensors_of(folder).values())
    assert said.out.startswith(f"{tmp_path / 'run'}: LlamaForCausalLM, {parameters:,} parameters in {dtype}\n")
    status, said = call("export", tmp_path / "run", tmp_path / "out", "--max-shard-size", "50KB", "--verify")
    assert status == 0, said.out
    assert said.out.startswith(f"{tmp_path / 'out'}: written (as imported, {dtype})\n")

    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value.dtype, value.tobytes()) == (after[name].dtype, after[name].tobytes()), name
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_weight_larger_than_a_block_comes_and_goes_in_parts(tmp_path, monkeypatch):
    """In blocks of 1 kB every matrix is cut, with a shorter block last."""
    make(tmp_path / "model", None, max_shard_size="1GB")
    monkeypatch.setattr("eurollm_jax.hf.transposing._BLOCK_BYTES", 1000)
    hub = import_folder(tmp_path / "model", tmp_path / "run")
    assert len(list(hub.pieces())) > 200
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert {name: value.tobytes() for name, value in before.items()} == {
        name: value.tobytes() for name, value in after.items()
    }


def test_an_imported_model_continues_text_as_transformers_does(whole, imported, call, tokenizer):
    prompt = "Die Katze schläft"
    status, said = call("generate", imported, "--prompt", prompt, "--tokens", 12, "--temperature", 0)
    assert status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(whole)(prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0)
    new = written[0, ids["input_ids"].shape[1] :].tolist()
    if tokenizer.eos_id in new:
        new = new[: new.index(tokenizer.eos_id)]
    assert said.out == f"{prompt}{tokenizer.decode(np.array(new))}\n"


def test_a_folder_without_a_tokenizer_is_imported_loudly_and_exported(tmp_path, call, caplog):
    make(tmp_path / "model", None)
    with caplog.at_level(logging.WARNING):
        assert call("import", tmp_path / "model", tmp_path / "run")[0] == 0
    assert any("NO TOKENIZER COMES WITH" in record.message for record in caplog.records)
    assert call("export", tmp_path / "run", tmp_path / "out", "--verify")[0] == 0
    status, said = call("generate", tmp_path / "run", "--prompt", "a")
    assert (status, said.err) == (
        1,
        f"eurollm: {tmp_path / 'run'} was imported without a tokenizer, so no text can be continued.\n",
    )


def test_what_an_import_records_names_its_files(whole, imported):
    record = json.loads((imported / "experiment.json").read_text())
    listed = dict(reversed(line.split("  ")) for line in (whole / "SHA256SUMS").read_text().splitlines())
    assert record["imported"]["sha256"] == listed
    assert record["imported"]["config"] == json.loads((whole / "config.json").read_text())


# ------------------------------------------------------------------------------------------------- folders not whole


def flip(name, bit, *, from_end=False):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1 - bit // 8 if from_end else bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)

    return damage


def edit(name, change, *, hashes=True):
    def damage(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))
        if hashes:
            list_hashes(folder)

    return damage


def truncate(folder):
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])


def move_tensor(folder):
    """The files change places for one tensor, and the index does not know."""
    first, second = load_file(folder / FIRST), load_file(folder / SECOND)
    name = next(iter(first))
    second[name] = first.pop(name)
    for file, held in ((FIRST, first), (SECOND, second)):
        save_file(held, folder / file, {"format": "pt"})
    list_hashes(folder)


DAMAGES = {
    "missing shard": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing: fetch or export"),
    "truncated": (truncate, f"{SECOND} is damaged"),
    "bit of a weight": (flip(SECOND, 77, from_end=True), f"{SECOND} is not what SHA256SUMS lists: fetch the folder ag"),
    "bit of the tokenizer": (flip("tokenizer.model", 999), "tokenizer.model is not what SHA256SUMS lists"),
    "file of the list gone": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing, though"),
    "tensor elsewhere": (move_tensor, f"{INDEX} and the files it lists disagree about model.embed_tokens.weight"),
    "no such shard": (
        edit(INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "other.safetensors"})),
        "other.safetensors is missing",
    ),
    "architecture": (
        edit("config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"], model_type="gpt2")),
        "GPT2LMHeadModel",
    ),
    "field": (edit("config.json", lambda c: c.update(hidden_act="relu6")), "relu6"),
    "unknown field": (edit("config.json", lambda c: c.update(hyper_connections=4)), "hyper_connections"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_folder_that_is_not_whole_is_refused_by_name(damage, message, folder, refused, tmp_path):
    damage(folder)
    assert message in refused("import", folder, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_any_flipped_bit_of_a_header_is_found(folder, tmp_path):
    """Without a list of hashes too, but for a name that says nothing of the content: the metadata."""
    (folder / "SHA256SUMS").unlink()
    content = (folder / SECOND).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = content.index(b'"__metadata__"'), content.index(b"}", content.index(b'"__metadata__"'))
    dice = np.random.default_rng(0)
    for bit in [*range(64), *dice.integers(64, 8 * (8 + length), 120)]:
        if metadata[0] <= bit // 8 <= metadata[1] or content[bit // 8] == 0x20:
            continue  # metadata, and the spaces behind the header
        (folder / SECOND).write_bytes(content)
        flip(SECOND, int(bit))(folder)
        with pytest.raises(UserError, match=re.escape(str(folder))):
            HubFolder(folder)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refused, tokenizer, tmp_path):
    folder = make(tmp_path / "model", tokenizer, vocab_size=639)
    assert "has 640 tokens and the model's vocab_size is 639" in refused("import", folder, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_run_that_is_there_is_left_alone(folder, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert f"{tmp_path / 'run'} is there already" in refused("import", folder, tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_no_folder_at_all(refused, tmp_path):
    assert "config.json is missing" in refused("import", tmp_path / "none", tmp_path / "run")


# ------------------------------------------------------------------------------------------- full disks and kills


def limited(limit, *argv):
    """A command in a process that cannot write files of more than `limit` bytes."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from eurollm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""},
    )


def test_a_full_disk_in_mid_import_is_said_and_leaves_nothing(folder, tmp_path):
    said = limited(60_000, "import", folder, tmp_path / "run")
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    assert re.match(rf"eurollm: there is no room to write {tmp_path / 'run'} \(file too large\)", said.stderr)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier one"])
def test_a_full_disk_in_mid_export_is_said_and_leaves_what_was_there(earlier, imported, call, tmp_path):
    if earlier:
        assert call("export", imported, tmp_path / "out")[0] == 0
    before = {file.name: file.read_bytes() for file in tmp_path.glob("out/*")}
    said = limited(60_000, "export", imported, tmp_path / "out", "--overwrite")
    assert (said.returncode, said.stderr.count("\n")) == (1, 1), said.stderr
    left = "the earlier export stays as it is" if earlier else "nothing is left at that place"
    assert f"there is no room to write {tmp_path / 'out'} (file too large)" in said.stderr
    assert left in said.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.glob("out/*")} == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if earlier else [])


KILLED = """
import os, signal, sys
from pathlib import Path
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.importing import import_folder

pieces = HubFolder.pieces

def dying(self):
    for number, piece in enumerate(pieces(self)):
        if number == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece

HubFolder.pieces = dying
import_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [0, 7, 29])
def test_a_kill_in_mid_import_leaves_nothing_at_that_place(number, folder, call, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, run, str(number)], env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == -signal.SIGKILL
    assert not run.exists()
    assert call("generate", run, "--prompt", "a")[0] == 1
    assert call("import", folder, run)[0] == 0  # and what the killed process left is gone
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "run"]


# ------------------------------------------------------------------------------- which weights; the comparison


@pytest.fixture
def several(whole, imported, tmp_path):
    """A run with checkpoints 0, 10, 20 of different weights, and those weights."""
    run = shutil.copytree(imported, tmp_path / "run")
    config = HubFolder(whole).config
    shapes = {path: spec.shape for path, spec in flatten(specs(config)).items()}
    dice = np.random.default_rng(0)
    held = [{path: dice.normal(size=shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(3)]
    shutil.rmtree(run / "checkpoints")
    for step, weights in zip((0, 10, 20), held, strict=True):
        pieces = ((path, (), value) for path, value in weights.items())
        write_checkpoint(run / "checkpoints", step, shapes, pieces, {"row": 0, "seconds": 0.0, "tokens": []})
    return run, held


@pytest.mark.parametrize("last", [1, 2, 3])
def test_average_last_is_the_mean_of_the_newest_checkpoints(last, several, call, tmp_path):
    run, held = several
    assert call("export", run, tmp_path / "out", "--average-last", last, "--dtype", "float32")[0] == 0
    mean = {
        path: np.mean([weights[path].astype(np.float64) for weights in held[-last:]], axis=0).astype(np.float32)
        for path in held[0]
    }
    found = HubFolder(tmp_path / "out")
    assert len(found.tensors) == 3 * 9 + 3
    for path, index, value in found.pieces():
        np.testing.assert_array_equal(value, mean[path][index], err_msg=path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"mean of the last {last} checkpoints" in card


def test_an_average_of_more_checkpoints_than_there_are_is_refused(several, refused, tmp_path):
    run, _ = several
    sentence = refused("export", run, tmp_path / "out", "--average-last", 4)
    assert "holds 3 sound checkpoints, too few for an average of the last 4" in sentence
    assert "ask for 1 or more" in refused("export", run, tmp_path / "out", "--average-last", 0)
    assert "holds no moving average" in refused("export", run, tmp_path / "out", "--ema")
    assert not (tmp_path / "out").exists()


def test_the_exit_status_of_verify_says_whether_folder_and_run_agree(imported, several, folder, call):
    status, said = call("hf", "verify", folder, imported)
    assert status == 0, said.out
    run, _ = several
    status, said = call("hf", "verify", folder, run)
    assert status == 1
    assert "weights read back" in said.out
    flip(SECOND, 77, from_end=True)(folder)
    status, said = call("hf", "verify", folder, imported)
    assert status == 1
    assert "files agree with" in said.out
    assert "differ: " in said.out
