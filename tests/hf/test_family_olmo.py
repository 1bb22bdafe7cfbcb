"""OLMo-2 and OLMo-3, against transformers."""

import re
from dataclasses import replace

import pytest
import transformers

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import family_for
from eurollm_jax.hf.families.family import canonical
from eurollm_jax.hf.families.olmo import OLMO2, OLMO3
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.model.config import Attention, Gated, LinearScaling, Norm, Rope, TransformerConfig, YarnScaling
from eurollm_jax.model.families import OLMO2_7B, OLMO3_7B
from tests.hf.parity import (
    assert_in_and_out,
    assert_trains,
    random_folder,
    variants,
)

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = dict(vocab_size=96, pad_token_id=1, bos_token_id=0, eos_token_id=2)
# three heads of ten in a width of 25, one key/value head: nothing is width / heads
NARROW = SIZES | dict(
    hidden_size=25, intermediate_size=20, num_attention_heads=3, num_key_value_heads=1, head_dim=10, num_hidden_layers=3
)
WIDE = SIZES | dict(
    hidden_size=40, intermediate_size=56, num_attention_heads=10, num_key_value_heads=5, num_hidden_layers=3
)
EVEN = SIZES | dict(
    hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
)
# some frequencies are divided, some kept and some blended, well within the texts of the tests
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=3.0, beta_slow=0.5)


def by_kind(theta, full=None):
    full = full or {"rope_type": "default"}
    return {FULL: full | {"rope_theta": theta}, SLIDING: {"rope_type": "default", "rope_theta": theta}}


CASES = {
    "olmo2": ("Olmo2", NARROW | dict(rms_norm_eps=3e-4, rope_parameters=dict(rope_type="default", rope_theta=77.0))),
    "olmo2 tied, biases": ("Olmo2", WIDE | dict(tie_word_embeddings=True, attention_bias=True, rms_norm_eps=0.1)),
    "olmo2 yarn, gelu": (
        "Olmo2",
        NARROW | dict(hidden_act="gelu", rope_parameters=YARN | dict(rope_theta=500.0, attention_factor=1.3)),
    ),
    "olmo3": ("Olmo3", WIDE | dict(num_hidden_layers=5, sliding_window=5, rope_parameters=by_kind(5e5, YARN))),
    "olmo3, other theta": (
        "Olmo3",
        WIDE
        | dict(
            layer_types=[SLIDING, FULL, SLIDING],
            sliding_window=5,
            rope_parameters=by_kind(50.0, YARN),
            rms_norm_eps=0.1,
        ),
    ),
    "olmo3, window of two": ("Olmo3", NARROW | dict(sliding_window=2, tie_word_embeddings=True)),
    "olmo3, another pattern": (
        "Olmo3",
        WIDE
        | dict(
            sliding_window=200,
            layer_types=[FULL, SLIDING, SLIDING],
            attention_bias=True,
            rope_parameters=by_kind(5e5, dict(rope_type="linear", factor=3.0)),
        ),
    ),
}


def folder_of(name, fields, tmp_path):
    return random_folder(name, dict(max_position_embeddings=512) | fields, tmp_path / "theirs")


@pytest.mark.parametrize("case", variants(CASES, fast=("olmo2", "olmo3")))
def test_import_computes_the_same_and_comes_back(case, tmp_path):
    model, folder = folder_of(*CASES[case], tmp_path)
    assert_in_and_out(model, folder, tmp_path / "ours", older_alone=case != "olmo3, other theta")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("Olmo2", EVEN), marks=pytest.mark.slow, id="Olmo2"),
        pytest.param(("Olmo3", EVEN | dict(sliding_window=5)), id="Olmo3"),
    ],
)
def test_one_step_on_eight_devices_and_back(case, tmp_path):
    _, folder = folder_of(*case, tmp_path)
    assert_trains(HubFolder(folder), tmp_path / "ours")


# ------------------------------------------------------------------------------------------------------- config.json

ONLY_SIZES = dict(vocab_size=90, hidden_size=64, intermediate_size=30, num_hidden_layers=6, num_attention_heads=32)
CONFIG = TransformerConfig(
    vocab_size=40,
    width=24,
    depth=5,
    heads=3,
    kv_heads=1,
    mlp=Gated(20),
    head_dim=10,
    max_positions=64,
    pattern=(Attention(rope=Rope(5e5)),),
    norm=Norm("post", eps=3e-6),
    qk_norm="full",
)
WINDOW = Attention(window=7, rope=Rope(5e5))
YARN_4 = Rope(5e5, YarnScaling(4.0, 16))
WINDOWS = replace(CONFIG, pattern=(WINDOW, WINDOW, Attention(rope=YARN_4)))


def test_fields_left_out_mean_what_transformers_takes_them_to_mean():
    for family, given in ((OLMO2, ONLY_SIZES), (OLMO3, ONLY_SIZES | {"rope_theta": 5e5})):
        theirs = getattr(transformers, family.architecture).config_class(**given)
        ours = family.config(given)
        assert ours == family.config(theirs.to_dict())
        assert (ours.norm.eps, ours.max_positions, ours.kv_heads, ours.head_dim) == (1e-5, 2048, 32, 2)
    assert ours.pattern == (*3 * (Attention(4096, Rope(5e5)),), Attention(rope=Rope(5e5)))


def test_the_published_models_are_said_and_read():
    for config, architecture in ((OLMO2_7B, "Olmo2ForCausalLM"), (OLMO3_7B, "Olmo3ForCausalLM")):
        family = family_for(config)
        assert family.architecture == architecture
        assert canonical(family.config(family.write(config))) == canonical(config)


def test_scaling_in_the_older_schema_is_of_layers_without_a_window():
    """As Olmo-3-1025-7B has it, from before there was `rope_parameters`."""
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    raw = OLMO3.write(WINDOWS) | {"rope_theta": 5e5, "rope_scaling": scaling}
    del raw["rope_parameters"]
    assert OLMO3.config(raw) == WINDOWS
    theirs = transformers.Olmo3Config.from_dict(raw)
    assert OLMO3.config(theirs.to_dict()) == WINDOWS


def test_theta_in_the_older_schema_is_refused_where_versions_of_transformers_disagree():
    """Version 4 has one theta for all layers; version 5 takes it for those without a window alone."""
    raw = {name: value for name, value in OLMO3.write(WINDOWS).items() if name != "rope_parameters"}
    theirs = transformers.Olmo3Config.from_dict(raw | {"rope_theta": 7e3})
    assert theirs.rope_parameters[SLIDING]["rope_theta"] == 5e5
    with pytest.raises(UserError, match=r"rope_theta is 7000\.0 for layers without a window and 500000\.0 for others"):
        OLMO3.config(raw | {"rope_theta": 7e3})


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"pattern": (WINDOW, Attention(rope=Rope(1e4)))}, "rope_theta is 10000.0 for layers without a window"),
        ({"pattern": (replace(WINDOW, rope=YARN_4), Attention(rope=YARN_4))}, "layers with a window have no scaling"),
        ({"pattern": (WINDOW, Attention(window=9, rope=Rope(5e5)))}, "pattern"),
        ({"pattern": (WINDOW, Attention(rope=None))}, "pattern"),
        ({"norm": Norm("pre")}, "norm"),
        ({"norm": Norm("post", gain="one_plus_weight")}, "norm"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"attention_scale": 0.5}, "attention_scale"),
        ({"mlp": Gated(20, bias=True)}, "mlp"),
    ],
)
def test_what_olmo_3_cannot_say(change, lacking):
    assert OLMO3.lacks(WINDOWS) == []
    assert any(lacking in said for said in OLMO3.lacks(replace(WINDOWS, **change)))


def test_windows_alone_keep_their_theta():
    config = replace(CONFIG, pattern=(replace(WINDOW, rope=Rope(7e3)),))
    assert OLMO3.lacks(config) == []
    assert transformers.Olmo3Config.from_dict(OLMO3.write(config)).rope_parameters[SLIDING]["rope_theta"] == 7e3


def test_the_usual_scale_is_the_same_as_none():
    assert OLMO2.lacks(replace(CONFIG, attention_scale=10**-0.5)) == []


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (OLMO2, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (OLMO2, {"clip_qkv": 8.0}, "clip_qkv may change"),
        (OLMO2, {"sliding_window": 5}, "sliding_window may change"),
        (OLMO2, {"rope_theta": 1e4}, "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree"),
        (OLMO2, {"rope_parameters": by_kind(5e5)}, "rope_parameters are given by kind of layer"),
        (OLMO3, {"rope_theta": 1e4}, "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree"),
        (OLMO3, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "disagree"),
        (
            OLMO3,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "must have full_attention and sliding",
        ),
        (OLMO3, {"rope_parameters": by_kind(5e5) | {"chunked_attention": {}}}, "must have full_attention and sliding"),
        (OLMO3, {"rope_parameters": by_kind(5e5), "rope_theta": 5e5}, "rope_scaling {"),
        (OLMO3, {"rope_parameters": None, "rope_theta": None}, "rope_theta is missing"),
        (OLMO3, {"layer_types": [SLIDING] * 4}, "layer_types is ["),
        (OLMO3, {"layer_types": [SLIDING] * 4 + ["linear_attention"]}, "layer_types is ["),
        (OLMO3, {"sliding_window": None}, "sliding_window is null, and 4 layers have a window"),
        (OLMO3, {"sliding_window": 0}, "sliding_window is 0"),
        (OLMO3, {"sliding_window_pattern": 4}, "sliding_window_pattern may change"),
        (OLMO3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor may change"),
        (
            OLMO3,
            {"rope_parameters": by_kind(5e5, YARN | {"truncate": False}), "rope_scaling": YARN | {"truncate": False}},
            "truncate is false in the scaling of layers without a window",
        ),
    ],
)
def test_unsupported_config_is_refused_by_name(family, change, message):
    written = family.write(CONFIG if family is OLMO2 else WINDOWS)
    with pytest.raises(UserError, match=re.escape(message)):
        family.config(written | change)


def test_linear_scaling_of_layers_without_a_window_alone():
    config = replace(WINDOWS, pattern=(WINDOW, Attention(rope=Rope(5e5, LinearScaling(3.0)))))
    theirs = transformers.Olmo3Config.from_dict(OLMO3.write(config))
    assert theirs.rope_parameters[SLIDING] == {"rope_type": "default", "rope_theta": 5e5}
    assert theirs.rope_parameters[FULL] == {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}
