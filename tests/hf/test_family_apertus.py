"""Apertus and SmolLM3, against transformers."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families.apertus import APERTUS
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.families.smollm import SMOLLM3
from eurollm_jax.hf.folder import HubFolder
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
    assert_comes_back,
    assert_in_and_out,
    assert_trains,
    random_folder,
    saved,
    tensors_of,
    variants,
)

SIZES = dict(
    vocab_size=96,
    num_hidden_layers=3,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# three heads of ten in a width of 24, one key/value head: nothing is width / heads
NARROW = SIZES | dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=3, num_key_value_heads=1, head_dim=10, rms_norm_eps=3e-4
)
WIDE = SIZES | dict(hidden_size=40, intermediate_size=56, num_attention_heads=10, num_key_value_heads=5)
EVEN = SIZES | dict(hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
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
    "apertus as left out": ("Apertus", NARROW),
    "apertus biases, scaled": ("Apertus", NARROW | dict(attention_bias=True, rope_parameters=LLAMA3)),
    "apertus tied, plain": (
        "Apertus",
        WIDE | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=321.0)),
    ),
    "smollm3 as left out": ("SmolLM3", NARROW | dict(num_hidden_layers=5)),
    "smollm3 windows where no positions are": (
        "SmolLM3",
        NARROW
        | dict(num_hidden_layers=5, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=4, mlp_bias=True),
    ),
    "smollm3 one by one": (
        "SmolLM3",
        WIDE
        | dict(
            num_hidden_layers=5,
            no_rope_layers=[0, 1, 1, 0, 1],
            layer_types=[
                "full_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            use_sliding_window=True,
            sliding_window=40,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=YARN,
        ),
    ),
}


def folder_of(name, fields, tmp_path, **changes):
    return random_folder(name, fields | changes, tmp_path / "theirs")


@pytest.mark.parametrize("case", variants(CASES, fast=("apertus biases, scaled", "smollm3 as left out")))
def test_import_computes_the_same_and_comes_back(case, tmp_path):
    model, folder = folder_of(*CASES[case], tmp_path)
    assert_in_and_out(model, folder, tmp_path / "ours", without_effect=("no_rope_layer_interval",))


@pytest.mark.parametrize("name", ["Apertus", pytest.param("SmolLM3", marks=pytest.mark.slow)])
def test_one_step_on_eight_devices_and_back(name, tmp_path):
    _, folder = folder_of(name, EVEN | dict(num_hidden_layers=5, attention_bias=True), tmp_path)
    assert_trains(HubFolder(folder), tmp_path / "ours")


# ----------------------------------------------------------------------------------------------------------- Apertus

APERTUS_CONFIG = TransformerConfig(
    vocab_size=40,
    width=25,
    depth=3,
    heads=3,
    kv_heads=1,
    mlp=Ungated(20),
    head_dim=10,
    max_positions=64,
    pattern=(Attention(rope=Rope(theta=5e5)),),
    norm=Norm(eps=3e-6),
    qk_norm="head",
)
ONLY_SIZES = dict(vocab_size=90, hidden_size=64, intermediate_size=30, num_hidden_layers=6, num_attention_heads=8)


def test_apertus_as_published_in_the_older_schema():
    scaling = dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192)
    older = ONLY_SIZES | dict(
        hidden_act="xielu",
        mlp_bias=False,
        post_norm=False,
        qk_norm=True,
        rope_theta=12000000,
        rope_scaling=scaling | dict(rope_type="llama3", type="llama3"),
    )
    theirs = transformers.ApertusConfig(**ONLY_SIZES)
    ours = APERTUS.config(older)
    assert ours.pattern == (Attention(rope=Rope(1.2e7, Llama3Scaling(8.0, 8192))),)
    assert ours == APERTUS.config(ONLY_SIZES) == APERTUS.config(theirs.to_dict())
    assert (ours.kv_heads, ours.norm.eps, ours.max_positions) == (
        8,
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
    )


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.0), Llama3Scaling(8.0, 16), YarnScaling(4.0, 16)])
def test_apertus_is_said_the_same_in_either_schema(scaling):
    config = replace(APERTUS_CONFIG, tied=True, attention_bias="all", pattern=(Attention(rope=Rope(5e5, scaling)),))
    assert APERTUS.lacks(config) == []
    written = APERTUS.write(config)
    older = {name: value for name, value in written.items() if name != "rope_parameters"}
    newer = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert APERTUS.config(older) == APERTUS.config(newer) == APERTUS.config(written) == canonical(config)


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"mlp": Gated(20)}, "mlp"),
        ({"qk_norm": "none"}, "qk_norm"),
        ({"attention_bias": "qkv"}, "attention_bias"),
        ({"pattern": (Attention(window=8),)}, "pattern"),
        ({"norm": Norm("both")}, "norm.place"),
    ],
)
def test_apertus_cannot_say_it(change, lacking):
    assert APERTUS.lacks(replace(APERTUS_CONFIG, **change)) == [lacking]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu', and only 'xielu' is supported"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"post_norm": True}, "post_norm is True"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"rope_theta": 5e5}, "another to version 5: give rope_scaling"),
        ({"rope_scaling": None}, "rope_scaling is null or left out"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, "rope_scaling None and rope_parameters"),
        ({"sliding_window": 8}, "sliding_window may change"),
    ],
)
def test_an_apertus_config_that_is_no_model_of_ours_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        APERTUS.config(ONLY_SIZES | fields)


def test_xielu_constants_are_written_again_and_others_refused(tmp_path):
    model, folder = folder_of("Apertus", NARROW, tmp_path)
    names = {f"model.layers.{layer}.mlp.act_fn.{name}" for layer in range(3) for name in ("beta", "eps")}
    assert names <= tensors_of(folder).keys()
    assert_comes_back(HubFolder(folder), tmp_path / "ours")

    # a bfloat16 file, read and saved again as float32, holds the rounded number
    with torch.no_grad():
        eps = model.model.layers[1].mlp.act_fn.eps
        eps.copy_(torch.tensor(-1e-6, dtype=torch.bfloat16).float())
    HubFolder(saved(model, tmp_path / "rounded"))
    with torch.no_grad():
        model.model.layers[2].mlp.act_fn.beta.fill_(0.25)
    with pytest.raises(UserError, match=re.escape("model.layers.2.mlp.act_fn.beta is 0.25, and only 0.5 is supported")):
        HubFolder(saved(model, tmp_path / "other"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_byte_for_byte(dtype, tmp_path):
    model, _ = folder_of("Apertus", NARROW, tmp_path)
    hub = HubFolder(saved(model.to(dtype), tmp_path / "half"))
    assert hub.dtype == str(dtype).removeprefix("torch.")
    out = tmp_path / "ours"
    assert_comes_back(hub, out)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- SmolLM3

SMOLLM3_CONFIG = TransformerConfig(
    vocab_size=40,
    width=25,
    depth=6,
    heads=3,
    kv_heads=1,
    mlp=Gated(20),
    head_dim=10,
    max_positions=64,
    pattern=(Attention(rope=Rope(theta=5e5)), Attention(window=7, rope=None)),
    norm=Norm(eps=3e-6),
    tied=True,
)


def test_smollm3_as_left_out():
    theirs = transformers.SmolLM3Config(**ONLY_SIZES)
    ours = SMOLLM3.config(ONLY_SIZES)
    assert ours == SMOLLM3.config(theirs.to_dict())
    assert [ours.kind(layer).rope for layer in range(6)] == [Rope(2e6)] * 3 + [None] + [Rope(2e6)] * 2
    assert (ours.kv_heads, ours.tied, ours.norm.eps) == (4, True, theirs.rms_norm_eps)
    assert ours.max_positions == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("pattern", "interval"),
    [
        ((Attention(),), 7),
        ((Attention(rope=None),), 1),
        ((Attention(), Attention(), Attention(rope=None)), 3),
        ((Attention(rope=None), Attention()), None),
    ],
)
def test_layers_without_positions_are_said_in_both_forms(pattern, interval):
    written = SMOLLM3.write(replace(SMOLLM3_CONFIG, pattern=pattern))
    assert written.get("no_rope_layer_interval") == interval
    for form in ("no_rope_layers", "no_rope_layer_interval"):
        if interval is not None or form == "no_rope_layer_interval":
            fields = {name: value for name, value in written.items() if name != form}
            assert SMOLLM3.config(fields).pattern == pattern


def test_smollm3_windows_need_no_layer_types():
    config = replace(SMOLLM3_CONFIG, attention_bias="all", mlp=Gated(20, "gelu", bias=True))
    assert SMOLLM3.lacks(config) == []
    written = SMOLLM3.write(config)
    del written["layer_types"]
    assert SMOLLM3.config(written) == canonical(config)
    # more entries than layers are allowed, and a window that is not used is none
    assert SMOLLM3.config(written | {"no_rope_layers": [1, 0] * 9}) == canonical(config)
    assert {kind.window for kind in SMOLLM3.config(written | {"use_sliding_window": False}).pattern} == {None}


def test_transformers_makes_a_model_of_a_vocabulary_without_its_usual_padding():
    config = transformers.SmolLM3Config.from_dict(SMOLLM3.write(SMOLLM3_CONFIG))
    assert transformers.SmolLM3ForCausalLM(config).get_input_embeddings().weight.shape == (40, 25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], and must be a list with 0 or 1 for each of 6 layers"),
        ({"no_rope_layers": [1, 0, 1, 0, 1, 2]}, "no_rope_layers is [1, 0, 1, 0, 1, 2]"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, and must be a positive integer"),
        (
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 6},
            "layer_types asks for sliding windows",
        ),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types is ['chunked_attention'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, and must be true or false"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_theta": 1e4}, "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree"),
    ],
)
def test_a_smollm3_config_that_is_no_model_of_ours_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        SMOLLM3.config(SMOLLM3.write(SMOLLM3_CONFIG) | fields)


def test_slopes_come_through_apart_from_their_start(tmp_path):
    model, folder = folder_of("Apertus", NARROW, tmp_path)
    slopes = [layer.mlp.act_fn.alpha_p.item() for layer in model.model.layers]
    found = [value[0] for path, _, value in HubFolder(folder).pieces() if path == "layers/alpha_positive"]
    assert len(set(slopes)) == 3
    np.testing.assert_array_equal(found, np.float32(slopes))
