import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from eurollm_jax.errors import UserError
from eurollm_jax.hf.export import export as export_weights
from eurollm_jax.hf.load import load as load_sharded
from eurollm_jax.hf.mapping import InMemory
from eurollm_jax.hf.verify import verify as verify_weights
from eurollm_jax.hf.verify import verify_table
from eurollm_jax.model.config import Attention, Gated, Norm, Rope, TransformerConfig
from eurollm_jax.model.param import flatten, map_with_path
from eurollm_jax.model.transformer import forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

# nothing here is a default of transformers, and head_dim is not width / heads
AWKWARD = TransformerConfig(
    vocab_size=640,
    width=36,
    depth=3,
    heads=3,
    kv_heads=1,
    mlp=Gated(50),
    head_dim=10,
    max_positions=300,
    pattern=(Attention(rope=Rope(theta=5e5)),),
    norm=Norm(eps=3e-6),
    compute="float32",
)
CONFIGS = {
    "untied, one key head": AWKWARD,
    "tied, three key heads": replace(
        AWKWARD, tied=True, kv_heads=3, pattern=(Attention(rope=Rope(theta=77.0)),), norm=Norm(eps=3e-4)
    ),
    "wide heads": replace(AWKWARD, heads=6, kv_heads=2, head_dim=16, depth=1),
}
TEXTS = ["Übermorgen fährt keine Straßenbahn.  " * 12, "Ο άνεμος έσπασε ένα κλαδί <s> \n\n", "İ"]


def export(params, *arguments, **options):
    return export_weights(InMemory(params), *arguments, **options)


def verify(folder, params, *arguments, **options):
    return verify_weights(folder, InMemory(params), *arguments, **options)


def load(folder):
    return load_sharded(folder, Layout(MeshConfig().build(jax.devices()[:1])))


def random_params(config, seed=0):
    """With gains that differ, and logits far from uniform."""
    dice = np.random.default_rng(seed)

    def value(path, spec):
        noise = dice.normal(size=spec.shape).astype(np.float32)
        return 1.2 * np.float32(spec.std) * noise if spec.fan_in else 1 + 0.2 * noise

    return map_with_path(value, specs(config))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failed(rows):
    return [row.check for row in rows if not row.ok]


@pytest.fixture
def exported(tokenizer, tmp_path):
    """An export in bfloat16 over several shards, and what it was made from."""
    params = random_params(AWKWARD)
    export(params, AWKWARD, tokenizer, tmp_path / "export", dtype="bfloat16", max_shard_bytes=20_000)
    return tmp_path / "export", params


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_computes_the_same_logits(config, tokenizer, tmp_path):
    import torch
    import transformers

    params = random_params(config)
    export(params, config, tokenizer, tmp_path / "export", dtype="float32")

    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 300), dtype=np.int32)
    positions = jnp.broadcast_to(jnp.arange(300), ids.shape)
    layout = Layout(MeshConfig().build(jax.devices()[:1]))

    @jax.jit
    def our_logits(params, ids):
        hidden, _ = forward(params, ids, jnp.ones_like(ids), positions, config, layout)
        return logits(params, hidden, config)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    assert np.std(theirs) > 1  # so that 1e-4 means something
    np.testing.assert_allclose(our_logits(params, ids), theirs, rtol=0, atol=1e-4)


def test_how_a_model_was_computed_does_not_keep_it_from_being_exported(tokenizer, tmp_path):
    computed = replace(AWKWARD, remat="attention", attention_kernel="blockwise")
    export(random_params(computed), computed, tokenizer, tmp_path / "a")
    assert replace(load(tmp_path / "a")[0], compute="float32") == AWKWARD


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 10**9])
def test_load_gives_back_what_was_exported_rounded_to_its_dtype(dtype, max_shard_bytes, tokenizer, tmp_path):
    params = random_params(AWKWARD)
    files = export(params, AWKWARD, tokenizer, tmp_path / "a", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert files == sorted((tmp_path / "a").iterdir())
    config, loaded = load(tmp_path / "a")
    assert replace(config, compute="float32") == AWKWARD
    for path, weight in flatten(params).items():
        np.testing.assert_array_equal(flatten(loaded)[path], weight.astype(jnp.dtype(dtype)).astype(np.float32))

    export(loaded, config, tokenizer, tmp_path / "b", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_weights_on_eight_devices_are_exported_as_from_one(tokenizer, tmp_path):
    config = replace(AWKWARD, heads=6, kv_heads=2)
    params = random_params(config)
    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]))
    spread = jax.device_put(params, layout.parameters(specs(config)))
    export(params, config, tokenizer, tmp_path / "one")
    export(spread, config, tokenizer, tmp_path / "eight")
    assert contents(tmp_path / "one") == contents(tmp_path / "eight")


def test_shards_are_no_larger_than_asked_and_the_index_finds_each_tensor(exported):
    folder, _ = exported
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(shards) > 3
    assert all(len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000 for held in shards.values())
    assert {name: file for file, held in shards.items() for name in held} == index["weight_map"]
    assert sum(t.nbytes for held in shards.values() for t in held.values()) == index["metadata"]["total_size"]


def test_hash_list_is_what_sha256sum_checks(exported):
    folder, _ = exported
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(contents(folder)) - {"SHA256SUMS"}


def test_only_one_tensor_is_held_in_memory(tokenizer, tmp_path):
    config = replace(AWKWARD, width=258, mlp=Gated(1024), depth=8)
    params = random_params(config)
    assert sum(weight.nbytes for weight in flatten(params).values()) > 25e6
    tracemalloc.start()
    export(params, config, tokenizer, tmp_path / "export", dtype="float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # the largest tensor has 1.06e6 bytes, and the hashing is one behind the writing


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda params: params["layers"]["up"].__setitem__((1, 2, 3), np.nan), r"layers/up\[1\] holds values"),
        (
            lambda params: params["final_norm"].__setitem__(0, 1e5),
            "final_norm holds values that are not fin",
        ),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(spoil, message, tokenizer, tmp_path):
    params = jax.tree.map(np.array, random_params(AWKWARD))
    spoil(params)
    with pytest.raises(UserError, match=message):
        export(params, AWKWARD, tokenizer, tmp_path / "export", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer, tmp_path):
    config = replace(AWKWARD, vocab_size=639)
    with pytest.raises(UserError, match=r"has 640 tokens and the model's vocab_size is 639"):
        export(random_params(config), config, tokenizer, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    larger = replace(AWKWARD, vocab_size=704)  # vocabularies are padded to round numbers
    export(random_params(larger), larger, tokenizer, tmp_path / "export")


def test_an_export_is_replaced_only_when_asked(exported, tokenizer):
    folder, params = exported
    before = contents(folder)
    with pytest.raises(UserError, match="holds an export already"):
        export(params, AWKWARD, tokenizer, folder)
    assert contents(folder) == before
    files = export(params, AWKWARD, tokenizer, folder, dtype="float32", overwrite=True)
    assert sorted(folder.iterdir()) == files
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    np.testing.assert_array_equal(load(folder)[1]["final_norm"], params["final_norm"])


def test_a_folder_with_anything_else_in_it_is_never_replaced(exported, tokenizer):
    folder, params = exported
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(UserError, match="holds files that no export of ours wrote"):
        export(params, AWKWARD, tokenizer, folder, overwrite=True)
    assert contents(folder) == before


def test_a_failure_leaves_the_earlier_export(exported, tokenizer):
    folder, params = exported
    before = contents(folder)
    params["final_norm"] = np.full_like(params["final_norm"], np.inf)
    with pytest.raises(UserError, match="final_norm"):
        export(params, AWKWARD, tokenizer, folder, overwrite=True)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.hf.export import export
from eurollm_jax.hf.folder import HubFolder

hub = HubFolder(Path(sys.argv[1]))
pieces = {(path, index): value for path, index, value in hub.pieces()}

class Killed:
    def read(self, path, index=()):
        if path == "final_norm":
            os.kill(os.getpid(), signal.SIGKILL)
        return pieces[path, index]

tokenizer = Tokenizer.load(Path(sys.argv[1]))
export(Killed(), hub.config, tokenizer, Path(sys.argv[2]), max_shard_bytes=1, overwrite=True)
"""


def test_a_kill_leaves_the_earlier_export_and_nothing_that_looks_whole(exported, tokenizer):
    folder, params = exported
    before = contents(folder)
    for out in (folder, folder.parent / "other"):
        done = subprocess.run([sys.executable, "-c", KILLED, folder, out], env=os.environ | {"JAX_PLATFORMS": "cpu"})
        assert done.returncode == -signal.SIGKILL
    assert contents(folder) == before
    left = [entry for entry in folder.parent.iterdir() if entry != folder]
    assert all(entry.name.startswith(".") and not (entry / "SHA256SUMS").exists() for entry in left)
    assert any(entry.glob("model-*.safetensors") for entry in left)  # it was killed amid the weights
    export(params, AWKWARD, tokenizer, folder, overwrite=True)
    export(params, AWKWARD, tokenizer, folder.parent / "other")
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["export", "other"]


SECOND = "model-00002-of-00005.safetensors"


def drop_shard(folder):
    (folder / SECOND).unlink()


def truncate(folder):
    file = folder / SECOND
    file.write_bytes(file.read_bytes()[:-1])


def edit(name, change):
    def apply(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def retype(folder):
    file = folder / SECOND
    save_file({name: np.zeros(value.shape, np.int32) for name, value in load_file(file).items()}, file)


INDEX = "model.safetensors.index.json"
Q2 = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, f"{SECOND} is missing"),
        (truncate, f"{SECOND} is damaged"),
        (retype, r"is stored as I32, and only F32, F16, BF16"),
        (edit(INDEX, lambda index: index["weight_map"].pop(Q2)), f"disagree about {Q2}"),
        (edit(INDEX, lambda index: index["weight_map"].update(more=SECOND)), "about more"),
        (edit(INDEX, lambda index: index.pop("weight_map")), "has no weight_map"),
        (
            edit("config.json", lambda c: c.update(num_hidden_layers=4)),
            "lacks model.layers.3.input.* and 6 more",
        ),
        (edit("config.json", lambda c: c.update(num_hidden_layers=2)), "holds model.layers.2.* does not have"),
        (
            edit("config.json", lambda c: c.update(tie_word_embeddings=True)),
            "lm_head.weight is not model.embed_tokens.weight, though",
        ),
        (edit("config.json", lambda c: c.update(intermediate_size=51)), r"has shape \(50, 36\), and .* \(51, 36\)"),
        (
            edit("config.json", lambda c: c.update(attention_bias=True)),
            r"lacks .*q_proj.bias.* and 9 more, which its config.json calls for",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    ],
)
def test_damaged_folders_are_refused_by_name(damage, message, exported):
    folder, _ = exported
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_verify_passes_a_good_export_and_prints_a_table(exported, tokenizer, monkeypatch):
    folder, params = exported

    def refuse(*_):
        raise AssertionError("verify went to the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    rows = verify(folder, params, AWKWARD, tokenizer, texts=TEXTS)
    assert failed(rows) == []
    assert len(rows) == 9
    console = Console(width=160, file=io.StringIO())
    console.print(verify_table(rows))
    assert console.file.getvalue().count(" ok ") == 9


RESHASH = "sha256sum $(ls | grep -v SHA256SUMS) > SHA256SUMS"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            edit("config.json", lambda c: (c.update(rope_theta=1e4), c["rope_parameters"].update(rope_theta=1e4))),
            {"configuration read back", "logits, float32"},
        ),
        (edit("config.json", lambda c: c.update(rms_norm_eps=1e-2)), {"configuration read back", "logits, float32"}),
        (edit("config.json", lambda c: c.update(rope_theta=1e4)), {"reads back"}),
        (edit("config.json", lambda c: c.update(max_position_embeddings=4096)), {"configuration read back"}),
        (edit("tokenizer.json", lambda t: t["model"]["merges"].reverse()), {"tokenizer, ids and text back"}),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), {"transformers loads it"}),
    ],
)
def test_verify_fails_an_export_that_was_altered(damage, expected, exported, tokenizer):
    folder, params = exported
    damage(folder)
    assert "files agree with SHA256SUMS" in failed(verify(folder, params, AWKWARD, tokenizer, texts=TEXTS))
    subprocess.run(RESHASH, shell=True, cwd=folder, check=True)
    found = set(failed(verify(folder, params, AWKWARD, tokenizer, texts=TEXTS)))
    assert "files agree with SHA256SUMS" not in found
    assert expected <= found


def test_verify_of_no_folder_says_so(tokenizer, tmp_path):
    with pytest.raises(UserError, match="none is no folder"):
        verify(tmp_path / "none", random_params(AWKWARD), AWKWARD, tokenizer, texts=TEXTS)


def test_verify_fails_other_weights(exported, tokenizer):
    folder, params = exported
    params["layers"]["down"] = params["layers"]["down"] * 1.01
    assert failed(verify(folder, params, AWKWARD, tokenizer, texts=TEXTS)) == ["weights read back"]


def test_verify_without_torch_says_what_to_install(exported, tokenizer, monkeypatch):
    folder, params = exported
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"uv pip install -c constraints.txt -e '\.\[verify\]'"):
        verify(folder, params, AWKWARD, tokenizer, texts=TEXTS)
