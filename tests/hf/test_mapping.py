import re
from dataclasses import replace

import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.hf.mapping import LLAMA, config_from_hf, config_to_hf, from_hf, tensors, to_hf
from eurollm_jax.model.families import EUROLLM_1_7B, EUROLLM_9B, NANO
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import TransformerConfig, specs

# three heads of ten in a width of 24, one key/value head: nothing here is width / heads
AWKWARD = TransformerConfig(
    vocab_size=40,
    width=24,
    depth=3,
    heads=3,
    kv_heads=1,
    mlp=20,
    head_dim=10,
    max_positions=64,
    rope_theta=5e5,
    norm_eps=3e-6,
)
IDS = dict(dtype="bfloat16", bos_id=1, eos_id=2, pad_id=3)
BOTH = pytest.mark.parametrize("config", [AWKWARD, replace(AWKWARD, tied=True)], ids=["untied", "tied"])


def random_weights(config):
    dice = np.random.default_rng(0)
    return {path: dice.normal(size=spec.shape).astype(np.float32) for path, spec in flatten(specs(config)).items()}


@BOTH
def test_every_weight_goes_to_tensors_of_the_same_number_of_elements_and_back(config):
    weights = random_weights(config)
    there = dict(to_hf(weights, config))
    assert sum(tensor.size for tensor in there.values()) == sum(weight.size for weight in weights.values())
    assert {name: value.shape for name, value in there.items()} == {t.name: t.shape for t in tensors(config)}
    back = from_hf(there.__getitem__, config)
    assert back.keys() == weights.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(back[path], weight, err_msg=path)


def test_the_table_and_the_specs_name_the_same_weights():
    assert LLAMA.keys() == flatten(specs(AWKWARD)).keys()
    assert LLAMA.keys() - {"head"} == flatten(specs(replace(AWKWARD, tied=True))).keys()
    assert len({name for name, _ in LLAMA.values()}) == len(LLAMA)


def test_heads_are_laid_one_after_the_other_in_the_rows_of_the_projection():
    config = AWKWARD
    weights = random_weights(config)
    there = dict(to_hf(weights, config))
    for head in range(config.heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        ours = weights["layers/query"][2, :, head]  # embed, head_dim
        np.testing.assert_array_equal(there["model.layers.2.self_attn.q_proj.weight"][rows], ours.T)


@BOTH
def test_names_and_shapes_are_those_of_transformers(config):
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_hf(config, **IDS)))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tied:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert {tensor.name: tensor.shape for tensor in tensors(config)} == theirs


@pytest.mark.parametrize("config", [AWKWARD, replace(AWKWARD, tied=True), EUROLLM_1_7B, EUROLLM_9B, NANO])
def test_config_there_and_back(config):
    raw = config_to_hf(config, **IDS)
    assert config_from_hf(raw) == replace(config, compute="bfloat16", remat="full")
    older = {field: value for field, value in raw.items() if field not in ("rope_parameters", "dtype")}
    newer = {field: value for field, value in raw.items() if field not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_hf(older) == config_from_hf(newer) == config_from_hf(raw)


def test_config_that_leaves_fields_out_means_what_transformers_takes_it_to_mean():
    import transformers

    raw = dict(vocab_size=90, hidden_size=48, intermediate_size=30, num_hidden_layers=2, num_attention_heads=4)
    theirs = transformers.LlamaConfig(**raw)
    ours = config_from_hf(raw)
    assert ours == config_from_hf(theirs.to_diff_dict())
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.norm_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (ours.rope_theta, ours.tied) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', and only 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSeq"),
        ({"attention_bias": True}, "attention_bias is True, and only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": LLAMA3}, "rope_parameters asks for 'llama3' rotary positions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            "rope_parameters holds partial_rotary_factor",
        ),
        ({"rope_theta": 1e4}, "rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 disagree"),
        ({"sliding_window": 512}, "sliding_window may change what the model computes"),
        ({"quantization_config": {"bits": 4}}, "quantization_config may change"),
        ({"hidden_size": "24"}, "hidden_size is '24', and must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 2}, "heads=3 is not a multiple of kv_heads=2"),
    ],
)
def test_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_hf(config_to_hf(AWKWARD, **IDS) | change)


def test_width_that_transformers_would_refuse_is_refused_before_the_export():
    with pytest.raises(UserError, match="width=25 is not a multiple of heads=3"):
        config_to_hf(replace(AWKWARD, width=25), **IDS)
