"""Gemma 2 and 3, and the text model of a Gemma 3 with images, against transformers."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import BY_ARCHITECTURE, family_for
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.families.gemma import GEMMA2, GEMMA3, GEMMA3_IMAGES
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.model.config import Attention, Gated, LinearScaling, Norm, Rope, TransformerConfig
from eurollm_jax.model.families import GEMMA3_1B, GEMMA3_4B
from tests.hf.parity import (
    assert_bijection,
    assert_comes_back,
    assert_config_comes_back,
    assert_same_function,
    assert_trains,
    exported_again,
    random_model,
    saved,
    tensors_of,
    variants,
)

FULL, SLIDING = "full_attention", "sliding_attention"
# three heads of ten in a width of 24, one key/value head: nothing is width / heads
NARROW = dict(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    num_hidden_layers=3,
    max_position_embeddings=512,
    query_pre_attn_scalar=7,
)
WIDE = NARROW | dict(
    hidden_size=40, intermediate_size=56, num_attention_heads=10, num_key_value_heads=5, head_dim=6, rms_norm_eps=0.1
)
EVEN = NARROW | dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
LINEAR = {
    FULL: dict(rope_type="linear", factor=3.0, rope_theta=500.0),
    SLIDING: dict(rope_type="default", rope_theta=77.0),
}

CASES = {
    # caps that bend every product and logit
    "gemma2": ("Gemma2", NARROW | dict(sliding_window=5, attn_logit_softcapping=1.5, final_logit_softcapping=2.0)),
    "gemma2, no caps, biases, untied, another pattern": (
        "Gemma2",
        WIDE
        | dict(
            sliding_window=200,
            layer_types=[FULL, SLIDING, SLIDING],
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=77.0),
        ),
    ),
    "gemma3": ("Gemma3Text", NARROW | dict(sliding_window=5, sliding_window_pattern=2, rope_parameters=LINEAR)),
    "gemma3, cap, biases, untied": (
        "Gemma3Text",
        WIDE | dict(sliding_window=200, final_logit_softcapping=2.0, attention_bias=True, tie_word_embeddings=False),
    ),
    "gemma3, another pattern": (
        "Gemma3Text",
        NARROW
        | dict(
            num_hidden_layers=4,
            query_pre_attn_scalar=10,
            sliding_window=2,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            rope_parameters=LINEAR,
            hidden_activation="silu",
        ),
    ),
}
NOT_READ = ("_sliding_window_pattern", "sliding_window_pattern")  # where layer_types are given


def folder_of(name, fields, tmp_path):
    config = getattr(transformers, f"{name}Config")(**fields)
    model = random_model(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM"), config)
    return model, saved(model, tmp_path / "theirs", max_shard_size="10KB")


@pytest.mark.parametrize("case", variants(CASES, fast=("gemma2", "gemma3")))
def test_import_computes_the_same_and_comes_back(case, tmp_path):
    name, fields = CASES[case]
    model, folder = folder_of(name, fields, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert name != "Gemma2" or model.config._attn_implementation == "eager"  # nothing else applies a cap
    hub = assert_same_function(model, folder)
    assert_bijection(hub)
    assert_comes_back(hub, tmp_path / "ours")
    assert_config_comes_back(hub, without_effect=NOT_READ)


@pytest.mark.parametrize("name", [pytest.param("Gemma2", marks=pytest.mark.slow), "Gemma3Text"])
def test_one_step_on_eight_devices_and_back(name, tmp_path):
    _, folder = folder_of(name, EVEN | dict(sliding_window=5), tmp_path)
    assert_trains(HubFolder(folder), tmp_path / "ours")


# --------------------------------------------------------------------------------------------------- with images

# What google/gemma-3-4b-pt says is of this kind: the rest of the text model's fields are left out.
TEXT = dict(
    model_type="gemma3_text",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    head_dim=10,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    sliding_window=5,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The model, and its folder with a config.json as the published ones have."""
    tokens = dict(boi_token_index=90, eoi_token_index=91, image_token_index=92)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    model = random_model(transformers.Gemma3ForConditionalGeneration, config)
    folder = saved(model, tmp_path_factory.mktemp("images") / "theirs", max_shard_size="1GB")
    raw = dict(
        architectures=["Gemma3ForConditionalGeneration"],
        model_type="gemma3",
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=4,
        eos_token_id=[1, 5],
        initializer_range=0.02,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        **tokens,
    )
    (folder / "config.json").write_text(json.dumps(raw))
    return model, folder


def test_the_text_model_is_read_from_beside_the_images(images, tmp_path, caplog):
    model, folder = images
    with caplog.at_level(logging.WARNING, logger="eurollm_jax"):
        hub = assert_same_function(model, folder)
    before = tensors_of(folder)
    text = {name for name in before if name.startswith("language_model.")}
    assert f"{len(before) - len(text)} of its {len(before)} tensors are left out" in caplog.text
    assert {tensor.name for tensor in hub.tensors} == text

    out = exported_again(hub, tmp_path / "ours")
    after = tensors_of(out)
    assert after.keys() == {name.removeprefix("language_model.") for name in text}
    assert all(after[name.removeprefix("language_model.")].tobytes() == before[name].tobytes() for name in text)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"]) == (["Gemma3ForCausalLM"], "gemma3_text")
    assert_same_function(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), out)


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_of_later_files_are_read_too(images, tied, tmp_path):
    """As versions of transformers from 4.52 have them in memory, with or without a second copy of the embedding."""
    _, folder = images
    head = np.ones((96, 32), np.float32)
    renamed = {
        name.replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model.")
        else f"model.{name}": value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    embedding = renamed["model.language_model.embed_tokens.weight"]
    renamed["lm_head.weight"] = embedding.copy() if tied else head
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    hub, published = HubFolder(tmp_path), HubFolder(folder)
    assert hub.config == replace(published.config, tied=tied)
    ours = {(path, index): value for path, index, value in hub.pieces()}
    wanted = {(path, index): value for path, index, value in published.pieces()} | (
        {} if tied else {("head", ()): head.T}
    )
    assert ours.keys() == wanted.keys()
    assert all(np.array_equal(ours[key], wanted[key]) for key in wanted)


def test_a_text_config_that_says_little_means_what_transformers_takes_it_to_mean(images):
    _, folder = images
    raw = json.loads((folder / "config.json").read_text())
    for said in ({}, {"text_config": {"model_type": "gemma3_text"}}, {"text_config": TEXT}):
        raw = {name: value for name, value in raw.items() if name != "text_config"} | said
        theirs = transformers.Gemma3Config.from_dict(raw)
        assert GEMMA3_IMAGES.config(raw) == GEMMA3.config(theirs.text_config.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": TEXT | {"odd": 1}}, "text_config: odd may change"),
        ({"text_config": TEXT | {"model_type": "gemma2"}}, "model_type is 'gemma2', and only 'gemma3_text'"),
        ({"text_config": TEXT | {"final_logit_softcapping": 30.0}}, "final_logit_softcapping is not what every"),
        ({"text_config": TEXT | {"tie_word_embeddings": False}, "tie_word_embeddings": True}, "tie_word_embeddings is"),
        ({"text_config": [TEXT]}, "must be an object"),
        ({"odd": 1}, "odd may change"),
    ],
)
def test_unsupported_config_with_images_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        GEMMA3_IMAGES.config({"text_config": TEXT, "vision_config": VISION} | change)


def test_exports_are_of_the_text_model_alone():
    assert family_for(GEMMA3_4B) is GEMMA3
    with pytest.raises(UserError, match=r"Gemma3ForConditionalGeneration is not supported: choose .*Gemma3ForCausalLM"):
        family_for(GEMMA3_4B, "Gemma3ForConditionalGeneration")
    assert BY_ARCHITECTURE["Gemma3ForConditionalGeneration"].exported_as == "Gemma3ForCausalLM"


# ------------------------------------------------------------------------------------------------------- config.json

ONLY_SIZES = dict(vocab_size=90, hidden_size=64, intermediate_size=30, num_hidden_layers=7, num_attention_heads=32)
LOCAL, GLOBAL = Attention(window=7, rope=Rope(1e4)), Attention(rope=Rope(1e6, LinearScaling(8.0)))
GEMMA3_SMALL = TransformerConfig(
    vocab_size=40,
    width=24,
    depth=5,
    heads=3,
    kv_heads=1,
    mlp=Gated(20, "gelu_tanh"),
    head_dim=10,
    max_positions=64,
    pattern=(LOCAL, LOCAL, GLOBAL),
    norm=Norm("both", eps=3e-6, gain="one_plus_weight"),
    qk_norm="head",
    embedding_scale=24**0.5,
    tied=True,
)
GEMMA2_SMALL = replace(
    GEMMA3_SMALL,
    pattern=(LOCAL, Attention(rope=Rope(1e4))),
    qk_norm="none",
    attention_cap=50.0,
    logit_cap=30.0,
)
SMALL = {GEMMA2.model_type: GEMMA2_SMALL, GEMMA3.model_type: GEMMA3_SMALL}


@pytest.mark.parametrize("family", [GEMMA2, GEMMA3], ids=lambda family: family.model_type)
def test_fields_left_out_mean_what_transformers_takes_them_to_mean(family):
    theirs = getattr(transformers, family.architecture).config_class(**ONLY_SIZES | {"num_key_value_heads": 4})
    ours = family.config(ONLY_SIZES)
    assert ours == family.config(theirs.to_dict())
    assert (ours.kv_heads, ours.head_dim, ours.norm.eps, ours.tied) == (4, 256, 1e-6, True)
    assert (ours.attention_cap, ours.logit_cap) == ((50.0, 30.0) if family is GEMMA2 else (None, None))
    assert (ours.max_positions, ours.attention_scale) == (theirs.max_position_embeddings, None)
    windows = [4096, None] * 3 + [4096] if family is GEMMA2 else [4096] * 5 + [None, 4096]
    assert [ours.kind(layer).window for layer in range(7)] == windows


def test_null_is_no_cap():
    nulls = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = GEMMA2.config(ONLY_SIZES | nulls)
    assert (config.attention_cap, config.logit_cap) == (None, None)
    assert GEMMA2.lacks(config) == []


def test_the_published_models_are_said_and_read():
    for config in (GEMMA3_1B, GEMMA3_4B):
        assert family_for(config) is GEMMA3
        assert canonical(GEMMA3.config(GEMMA3.write(config))) == canonical(config)


def test_a_published_gemma_2_is_read():
    """google/gemma-2-27b, whose heads are not scaled by their size; the first files say the window twice."""
    raw = ONLY_SIZES | dict(
        head_dim=128,
        query_pre_attn_scalar=144,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096,
        sliding_window_size=4096,
        cache_implementation="hybrid",
    )
    config = GEMMA2.config(raw)
    assert config.attention_scale == 144**-0.5
    assert GEMMA2.lacks(config) == []
    assert GEMMA2.write(config)["query_pre_attn_scalar"] == 144


@pytest.mark.parametrize(
    ("pattern", "period"),
    [
        ((LOCAL, LOCAL, GLOBAL), 3),
        ((GLOBAL,), 1),
        ((LOCAL,), 6),
        ((LOCAL, LOCAL, LOCAL, LOCAL, GLOBAL), 5),
        ((GLOBAL, LOCAL), None),
        ((LOCAL, GLOBAL, GLOBAL), None),
    ],
)
def test_windows_are_said_to_readers_of_either_field(pattern, period):
    config = replace(GEMMA3_SMALL, pattern=pattern)
    assert GEMMA3.lacks(config) == []
    written = GEMMA3.write(config)
    assert written["sliding_window_pattern"] == period
    if period is not None:
        del written["layer_types"]
        assert canonical(GEMMA3.config(written)) == config
        theirs = transformers.Gemma3TextConfig.from_dict(dict(written))
        assert theirs.layer_types == GEMMA3.write(config)["layer_types"]


@pytest.mark.parametrize("family", [GEMMA2, GEMMA3], ids=lambda family: family.model_type)
@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"norm": Norm("both")}, "norm"),
        ({"embedding_scale": 4.9}, "embedding_scale"),
        ({"attention_scale": 0.3}, "attention_scale"),
        ({"qk_norm": "full"}, "qk_norm"),
        ({"mlp": Gated(20, bias=True)}, "mlp"),
        ({"pattern": (LOCAL, replace(LOCAL, window=9))}, "pattern"),
        ({"pattern": (LOCAL, Attention(rope=None))}, "pattern"),
        ({"width": 25}, "hidden_size (width) 25 is not a multiple"),
    ],
)
def test_what_it_cannot_say(family, change, lacking):
    assert family.lacks(SMALL[family.model_type]) == []
    assert any(lacking in said for said in family.lacks(replace(SMALL[family.model_type], **change)))


def test_what_one_of_them_cannot_say():
    assert GEMMA2.lacks(replace(GEMMA2_SMALL, pattern=(LOCAL, GLOBAL))) == ["pattern"]
    assert GEMMA3.lacks(replace(GEMMA3_SMALL, attention_cap=50.0)) == ["attention_cap"]
    scaled = replace(GEMMA3_SMALL, pattern=(replace(LOCAL, rope=GLOBAL.rope), GLOBAL))
    assert "layers with a window have no scaling" in GEMMA3.lacks(scaled)[0]


BOTH = {FULL: {"rope_type": "default", "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, and only False"),
        (GEMMA2, {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        (GEMMA2, {"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'gelu_pytorch_tanh'"),
        (GEMMA2, {"sliding_window_size": 9}, "sliding_window_size is 9, and only 7"),
        (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        (GEMMA2, {"query_pre_attn_scalar": 7.5}, "query_pre_attn_scalar is 7.5"),
        (GEMMA2, {"rope_parameters": BOTH}, "rope_parameters are given by kind of layer"),
        (GEMMA2, {"layer_types": [SLIDING]}, "layer_types is ["),
        (GEMMA2, {"head_dim": None}, "head_dim is null"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, and only None"),
        (GEMMA3, {"sliding_window_pattern": 2}, "sliding_window_pattern 2 and layer_types disagree"),
        (GEMMA3, {"layer_types": [FULL] * 5}, "sliding_window_pattern 3 and layer_types disagree"),
        (GEMMA3, {"layer_types": None, "_sliding_window_pattern": 2}, "_sliding_window_pattern is 2"),
        (GEMMA3, {"sliding_window": None}, "sliding_window is null, and 4 layers have a window"),
        (GEMMA3, {"rope_local_base_freq": 2e4}, "rope_local_base_freq 20000.0 and rope_parameters"),
        (GEMMA3, {"rope_theta": 2e4}, "rope_theta 20000.0 and rope_parameters"),
        (GEMMA3, {"rope_parameters": BOTH}, "rope_scaling {"),
        (GEMMA3, {"rope_parameters": BOTH[FULL]}, "must have full_attention and sliding_attention"),
        (GEMMA3, {"rope_parameters": {FULL: BOTH[FULL]}}, "must have full_attention and sliding_attention"),
    ],
)
def test_unsupported_config_is_refused_by_name(family, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        family.config(family.write(SMALL[family.model_type]) | change)
