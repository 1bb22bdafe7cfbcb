"""Llama, Mistral, Qwen2 and Qwen3, against transformers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import family_for, family_of_folder
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.families.llama import LLAMA, MISTRAL
from eurollm_jax.hf.families.qwen import QWEN2, QWEN3
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.rope import write_rope
from eurollm_jax.model import families
from eurollm_jax.model.config import (
    Attention,
    Gated,
    LinearScaling,
    Llama3Scaling,
    Norm,
    Rope,
    TransformerConfig,
    Ungated,
    YarnScaling,
)
from tests.hf.parity import (
    assert_in_and_out,
    assert_same_function,
    assert_trains,
    random_folder,
    saved,
    variants,
)

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden" / "published.json").read_text())
SIZES = dict(vocab_size=96, num_hidden_layers=3, bos_token_id=None, eos_token_id=None)  # a continuation has no end
# three heads of ten in a width of 24, one key/value head: nothing is width / heads
NARROW = SIZES | dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=3, num_key_value_heads=1, head_dim=10, rms_norm_eps=3e-4
)
WIDE = SIZES | dict(hidden_size=40, intermediate_size=56, num_attention_heads=10, num_key_value_heads=5)
EVEN = SIZES | dict(hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
# most of the frequencies are divided, and some blended, well within the texts of the tests
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=8)

CASES = {
    "llama biases, gelu, linear": (
        "Llama",
        NARROW
        | dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")
        | dict(rope_parameters=dict(rope_type="linear", rope_theta=321.0, factor=3.0)),
    ),
    "llama tied, scaled": ("Llama", WIDE | dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama tanh, yarn of mscale": (
        "Llama",
        WIDE
        | dict(hidden_act="gelu_pytorch_tanh")
        | dict(rope_parameters=YARN | dict(mscale=2.0, mscale_all_dim=0.7, truncate=False)),
    ),
    "mistral, window longer than the text": (
        "Mistral",
        NARROW
        | dict(hidden_size=25, sliding_window=200)
        | dict(rope_parameters=YARN | dict(beta_fast=3.0, beta_slow=0.5, attention_factor=1.3)),
    ),
    "mistral, window shorter than the text": ("Mistral", WIDE | dict(sliding_window=5, tie_word_embeddings=True)),
    "qwen2 windows": (
        "Qwen2",
        NARROW
        | dict(
            use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True, rms_norm_eps=0.1
        ),
    ),
    "qwen3 biases, tied, yarn": (
        "Qwen3",
        NARROW | dict(hidden_size=25, attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN),
    ),
    "qwen3 windows": (
        "Qwen3",
        WIDE
        | dict(num_hidden_layers=5, head_dim=6, use_sliding_window=True, sliding_window=3)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]),
    ),
}


def folder_of(name, fields, tmp_path, **changes):
    return random_folder(name, dict(max_position_embeddings=512) | fields | changes, tmp_path / "theirs")


@pytest.mark.parametrize(
    "case",
    variants(
        CASES,
        fast=(
            "llama biases, gelu, linear",
            "mistral, window shorter than the text",
            "qwen2 windows",
            "qwen3 biases, tied, yarn",
        ),
    ),
)
def test_import_computes_the_same_and_comes_back(case, tmp_path):
    model, folder = folder_of(*CASES[case], tmp_path)
    assert_in_and_out(model, folder, tmp_path / "ours", without_effect=("max_window_layers",))


@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Mistral", "Qwen2", "Qwen3"))]
)
def test_one_step_on_eight_devices_and_back(name, tmp_path):
    biases = {"Llama": dict(mlp_bias=True), "Mistral": dict(sliding_window=5)}.get(name, {})
    _, folder = folder_of(name, EVEN | biases, tmp_path)
    assert_trains(HubFolder(folder), tmp_path / "ours")


# ------------------------------------------------------------------------------------------------------- config.json

CONFIG = TransformerConfig(
    vocab_size=40,
    width=24,
    depth=3,
    heads=3,
    kv_heads=1,
    mlp=Gated(20),
    head_dim=10,
    max_positions=64,
    pattern=(Attention(rope=Rope(theta=5e5)),),
    norm=Norm(eps=3e-6),
)
ONLY_SIZES = dict(vocab_size=90, hidden_size=64, intermediate_size=30, num_hidden_layers=30, num_attention_heads=32)


@pytest.mark.parametrize("family", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda family: family.model_type)
def test_fields_left_out_mean_what_transformers_takes_them_to_mean(family):
    theirs = getattr(transformers, family.architecture).config_class(**ONLY_SIZES)
    ours = family.config(ONLY_SIZES)
    assert ours == family.config(theirs.to_dict())
    assert ours.kv_heads == theirs.num_key_value_heads
    assert (ours.head_dim, ours.pattern[0].window) == (
        getattr(theirs, "head_dim", None) or 2,
        getattr(theirs, "sliding_window", None),
    )
    assert (ours.norm.eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.pattern[0].rope == Rope(theirs.rope_parameters["rope_theta"])


def test_null_is_none_and_not_left_out():
    assert LLAMA.config(ONLY_SIZES | {"num_key_value_heads": None, "head_dim": None}) == LLAMA.config(ONLY_SIZES)
    assert MISTRAL.config(ONLY_SIZES | {"num_key_value_heads": None}).kv_heads == 32
    assert MISTRAL.config(ONLY_SIZES | {"sliding_window": None}).pattern[0].window is None
    windows = ONLY_SIZES | {"use_sliding_window": True}
    assert {kind.window for kind in QWEN3.config(windows).pattern} == {None, 4096}
    assert {kind.window for kind in QWEN3.config(windows | {"sliding_window": None}).pattern} == {None}


FOUND_IN_THE_WILD = [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, LinearScaling(2.0))),
    ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, Rope(1e4, LinearScaling(2.0))),
    ({"rope_scaling": None, "rope_theta": 500000}, Rope(5e5)),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000.0}, Rope(5e5)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 1.0}}, Rope(7.0)),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}, Rope(1e4, YarnScaling(4.0, 64))),
    (
        {"rope_theta": 50.0, "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"}},
        Rope(50.0, Llama3Scaling(8.0, 16)),
    ),
]


@pytest.mark.parametrize(("fields", "rope"), FOUND_IN_THE_WILD)
def test_rotary_positions_as_files_say_them(fields, rope):
    raw = ONLY_SIZES | fields | {"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 1}
    assert LLAMA.config(raw).pattern == (Attention(rope=rope),)
    theirs = transformers.LlamaConfig.from_dict({**raw, "rope_scaling": dict(raw.get("rope_scaling") or {}) or None})
    assert LLAMA.config(theirs.to_dict()).pattern == (Attention(rope=rope),)


@pytest.mark.parametrize(
    "scaling", [None, LinearScaling(2.0), Llama3Scaling(8.0, 16), YarnScaling(4.0, 16, truncate=False)]
)
@pytest.mark.parametrize("family", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda family: family.model_type)
def test_either_schema_says_the_same(family, scaling):
    config = replace(CONFIG, tied=True, pattern=(Attention(rope=Rope(5e5, scaling)),))
    config = replace(
        config, **{"qwen2": {"attention_bias": "qkv"}, "qwen3": {"qk_norm": "head"}}.get(family.model_type, {})
    )
    assert family.lacks(config) == []
    written = family.write(config)
    older = {name: value for name, value in written.items() if name not in ("rope_parameters", "layer_types")}
    newer = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert family.config(older) == family.config(newer) == family.config(written) == canonical(config)


def test_windows_from_a_layer_on_are_said_in_both_schemas():
    kinds = [Attention(window, Rope(5e5)) for window in (None, None, 6)]
    written = QWEN3.write(replace(CONFIG, qk_norm="head", pattern=tuple(kinds)))
    assert (written["max_window_layers"], written["sliding_window"], written["use_sliding_window"]) == (2, 6, True)
    del written["layer_types"]
    assert [QWEN3.config(written).kind(layer) for layer in range(3)] == kinds


@pytest.mark.parametrize(
    ("change", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"width": 25}, "MistralForCausalLM"),
        ({"pattern": (Attention(window=7),)}, "MistralForCausalLM"),
        ({"attention_bias": "all"}, "LlamaForCausalLM"),
        ({"attention_bias": "qkv"}, "Qwen2ForCausalLM"),
        ({"qk_norm": "head"}, "Qwen3ForCausalLM"),
        ({"qk_norm": "head", "pattern": (Attention(), Attention(window=7))}, "Qwen3ForCausalLM"),
        ({"mlp": Gated(20, "gelu_tanh", bias=True)}, "LlamaForCausalLM"),
        ({"mlp": Ungated(20), "qk_norm": "head"}, "ApertusForCausalLM"),
        ({"pattern": (Attention(), Attention(rope=None))}, "SmolLM3ForCausalLM"),
    ],
)
def test_the_first_architecture_that_can_say_a_model(change, architecture):
    assert family_for(replace(CONFIG, **change)).architecture == architecture


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"pattern": (Attention(rope=Rope(fraction=0.6)),)}, "partial_rotary_factor is 0.6"),
        ({"pattern": (Attention(rope=None),)}, "pattern"),
        ({"pattern": (Attention(window=3), Attention())}, "pattern"),
        ({"qk_norm": "full"}, "qk_norm"),
        ({"norm": Norm("post")}, "norm"),
        ({"attention_cap": 30.0}, "attention_cap"),
        ({"embedding_scale": 2.0}, "embedding_scale"),
        ({"width": 25}, "hidden_size (width) 25 is not a multiple"),
        ({"mlp": Ungated(20)}, "mlp"),
    ],
)
def test_llama_cannot_say_it(change, lacking):
    assert any(lacking in said for said in LLAMA.lacks(replace(CONFIG, **change)))
    with pytest.raises(UserError, match=re.escape(lacking)):
        family_for(replace(CONFIG, **change), "LlamaForCausalLM")


SCALED = Rope(5e5, Llama3Scaling(8.0, 16))
OTHER_SCALING = {"rope_parameters": write_rope(Rope(5e5, LinearScaling(2.0)))["rope_parameters"]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (LLAMA, {"hidden_act": "relu"}, "hidden_act is 'relu', and only 'silu' or 'gelu'"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias is 'yes', and must be true or false"),
        (LLAMA, {"sliding_window": 512}, "sliding_window may change what the model computes"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config may change"),
        (LLAMA, {"layer_types": ["full_attention"] * 3}, "layer_types may change"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved is True"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size is '24', and must be a positive integer"),
        (LLAMA, {"hidden_size": 25}, "hidden_size (width) 25 is not a multiple of num_attention_heads (heads) 3"),
        (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (LLAMA, {"num_key_value_heads": 2}, "heads=3 is not a multiple of kv_heads=2"),
        (LLAMA, {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        (LLAMA, {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, and must be a positive number"),
        (LLAMA, {"rope_theta": 1e4}, "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, and must be a positive number"),
        (LLAMA, {"rope_theta": "1e4"}, "rope_theta is '1e4', and must be a positive number"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling {'type': 'linear', 'factor': 2.0} and",
        ),
        (LLAMA, OTHER_SCALING, "rope_scaling None and rope_parameters"),
        (LLAMA, OTHER_SCALING | {"rope_scaling": {"type": "linear", "factor": 3.0}}, "disagree"),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' rotary positions are not"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' rotary positions are not supported"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "correct one"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, and must be a positive number"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "odd may change"),
        (LLAMA, {"rope_scaling": [1]}, "rope_scaling is [1], and must be an object"),
        (
            LLAMA,
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}},
            "rope_theta 500000.0 and rope_scaling.rope_theta 7.0 disagree",
        ),
        (LLAMA, write_rope(SCALED) | {"original_max_position_embeddings": 9}, "is 9, and 16 in the scaling"),
        (LLAMA, {"partial_rotary_factor": 0.6}, "partial_rotary_factor is 0.6"),
        (LLAMA, {"untie_embeddings_and_output_weights": False}, "untie_embeddings_and_output_weights is False"),
        (MISTRAL, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (MISTRAL, {"attention_bias": True}, "attention_bias may change"),
        (QWEN2, {"use_mrope": True}, "use_mrope is True"),
        (QWEN2, {"attention_bias": False}, "attention_bias may change"),
        (QWEN3, {"head_dim": None}, "head_dim is null"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "layer_types asks for sliding windows"),
        (
            QWEN3,
            {"layer_types": ["full_attention"] * 2},
            "layer_types is ['full_attention', 'full_attention'], and must",
        ),
        (QWEN3, {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types is ['full"),
        (QWEN3, {"max_window_layers": "two"}, "max_window_layers is 'two'"),
    ],
)
def test_unsupported_config_is_refused_by_name(family, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        family.config(family.write(CONFIG) | change)


@pytest.mark.parametrize("name", ["VIKING_7B", "SMOLLM3_3B", "APERTUS_8B"])
def test_published_configs_are_read_with_what_else_their_files_hold(name):
    beside = {"_attn_implementation_autoset": True, "auto_map": {}, "pretraining_tp": 2, "torch_dtype": "bfloat16"}
    beside |= {"max_window_layers": 28} if name == "SMOLLM3_3B" else {}
    raw = PUBLISHED[name] | beside
    assert canonical(family_of_folder(raw, name).config(raw, name)) == canonical(getattr(families, name))


def test_the_original_positions_are_said_where_llama_cpp_looks_for_them():
    written = LLAMA.write(replace(CONFIG, pattern=(Attention(rope=SCALED),)))
    assert written["original_max_position_embeddings"] == 16
    theirs = transformers.LlamaConfig.from_dict(written)
    assert theirs.rope_parameters["original_max_position_embeddings"] == 16


def test_unsupported_architecture_is_refused_by_name():
    for raw, message in [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel is not supported"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', and must be a list of names"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "architectures says LlamaForCausalLM and"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            family_of_folder(raw, "config.json")
    assert family_of_folder({"model_type": "qwen2"}, "config.json") is QWEN2


# ---------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight, which its config.json calls for"),
        (lambda tensors: tensors.update({"model.layers.0.odd": np.ones(1)}), "holds model.layers.0.odd, which a model"),
        (lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": np.ones(1)}), "holds model.layers.3.mlp"),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(9, np.float32)}),
            "has shape (9,), and config.json",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(24)}),
            "is stored as F64, and only F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(change, message, tmp_path):
    model, _ = folder_of("Llama", NARROW, tmp_path)
    folder = saved(model, tmp_path / "one", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(message)):
        HubFolder(folder)


def test_what_old_files_keep_beside_the_weights_is_passed_over(tmp_path):
    model, _ = folder_of("Llama", NARROW, tmp_path, tie_word_embeddings=True)
    folder = saved(model, tmp_path / "one", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same_function(model, folder)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, though config"):
        HubFolder(folder)
