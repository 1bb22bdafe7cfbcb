"""The named models are the published ones, by their config.json, by transformers' own count and by published counts.

golden/published.json holds the architectural fields of each model's config.json; docs/families.md says where each was
read, and which were derived. transformers reads them and builds the model without memory, on torch's meta device.
"""

import functools
import json
from pathlib import Path

import pytest

from eurollm_jax.model import families
from eurollm_jax.model.config import (
    Attention,
    BalanceLoss,
    Gated,
    LinearScaling,
    Llama3Scaling,
    MoE,
    Rope,
    TransformerConfig,
    Ungated,
    YarnScaling,
)
from eurollm_jax.model.param import count, table
from eurollm_jax.model.transformer import specs

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED = json.loads((GOLDEN / "published.json").read_text())
FAMILIES = {name: value for name, value in vars(families).items() if isinstance(value, TransformerConfig)}


@functools.cache
def published(name):
    """transformers' reading of a config.json."""
    import transformers

    fields = dict(PUBLISHED[name])
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


@functools.cache
def parameters(name):
    """Sizes by name of what transformers builds of it."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(published(name))
    return {path: parameter.numel() for path, parameter in model.named_parameters()}  # a tied head is not counted twice


def test_every_family_is_compared_with_what_was_published():
    assert set(FAMILIES) - set(PUBLISHED) == {"NANO"}


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_table(name):
    written = (GOLDEN / f"{name.lower()}.txt").read_text()
    assert table(specs(FAMILIES[name])) == written, f"write the new table to {GOLDEN} if the change is meant"


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_transformers_counts(name):
    assert count(specs(FAMILIES[name])) == sum(parameters(name).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_constants_are_those_of_the_config(name):
    ours, theirs = FAMILIES[name], published(name)
    heads = theirs.num_attention_heads
    assert (ours.vocab_size, ours.width, ours.depth) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.num_hidden_layers,
    )
    assert (ours.heads, ours.kv_heads) == (heads, theirs.num_key_value_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert (ours.max_positions, ours.norm.eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.tied == theirs.tie_word_embeddings
    assert (ours.attention_cap, ours.logit_cap, ours.attention_bias) == (None, None, "none")


@pytest.mark.parametrize("name", PUBLISHED)
def test_norms_are_where_transformers_has_them(name):
    ours, sizes = FAMILIES[name], parameters(name)
    before = any(path.endswith((".input_layernorm.weight", ".attention_layernorm.weight")) for path in sizes)
    after = any(path.endswith(".post_feedforward_layernorm.weight") for path in sizes)
    assert ours.norm.place == {(True, False): "pre", (False, True): "post", (True, True): "both"}[before, after]

    of_queries = sizes.get("model.layers.0.self_attn.q_norm.weight")
    assert ours.qk_norm == {None: "none", ours.head_dim: "head", ours.heads * ours.head_dim: "full"}[of_queries]


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_gemma_scales_embeddings_and_adds_one_to_gains(name):
    gemma = published(name).model_type == "gemma3_text"
    assert FAMILIES[name].norm.gain == ("one_plus_weight" if gemma else "weight")
    assert FAMILIES[name].embedding_scale == (published(name).hidden_size ** 0.5 if gemma else 1.0)
    assert FAMILIES[name].attention_scale is None  # of queries and keys: head_dim^-1/2, as Gemma's says with a number
    assert getattr(published(name), "query_pre_attn_scalar", None) in (None, FAMILIES[name].head_dim)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_mlp_is_that_of_the_config(name):
    mlp, theirs = FAMILIES[name].mlp, published(name)
    match theirs.model_type:
        case "apertus":
            assert mlp == Ungated(theirs.intermediate_size)
        case "gemma3_text":
            assert theirs.hidden_activation == "gelu_pytorch_tanh"
            assert mlp == Gated(theirs.intermediate_size, "gelu_tanh")
        case "mixtral" | "qwen3_moe":
            hidden = theirs.intermediate_size if theirs.model_type == "mixtral" else theirs.moe_intermediate_size
            assert mlp == MoE(
                experts=theirs.num_experts,
                top_k=theirs.num_experts_per_tok,
                hidden=hidden,
                normalised=getattr(theirs, "norm_topk_prob", True),
                balance=BalanceLoss(theirs.router_aux_loss_coef),
            )
        case _:
            assert theirs.hidden_act == "silu"
            assert mlp == Gated(theirs.intermediate_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_sees_what_the_config_says(name):
    ours, theirs = FAMILIES[name], published(name)
    for layer in range(ours.depth):
        kind = (getattr(theirs, "layer_types", None) or {layer: "full_attention"})[layer]
        rope = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        turned = getattr(theirs, "no_rope_layers", {layer: 1})[layer]
        assert ours.kind(layer) == Attention(
            window=theirs.sliding_window if kind == "sliding_attention" else None,
            rope=Rope(rope["rope_theta"], scaling(rope)) if turned else None,
        )


def scaling(rope):
    match rope["rope_type"]:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope["factor"])
        case "llama3":
            return Llama3Scaling(
                rope["factor"],
                rope["original_max_position_embeddings"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
            )
        case "yarn":
            return YarnScaling(
                rope["factor"],
                rope["original_max_position_embeddings"],
                rope["beta_fast"],
                rope["beta_slow"],
                rope["attention_factor"],
            )


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # measured when the models were evaluated: github.com/utter-project/eurollm-evaluation, model_num_parameters
        ("EUROLLM_9B", 9_152_319_488),
        ("OLMO2_7B", 7_298_617_344),
        ("SALAMANDRA_7B", 7_768_117_248),  # and its card
        # its card
        ("SALAMANDRA_2B", 2_253_490_176),
        # the hub's count of its weights
        ("MINERVA_7B", 7_399_018_496),
        # github.com/keras-team/keras-hub, the presets of each model
        ("GEMMA3_1B", 999_885_952),
        ("QWEN3_0_6B", 596_049_920),
        ("QWEN3_1_7B", 1_720_574_976),
        ("QWEN3_4B", 4_022_468_096),
        ("QWEN3_8B", 8_190_735_360),
        ("QWEN3_30B_A3B", 30_532_122_624),
        ("MIXTRAL_8X7B", 46_702_792_704),
        # it counts 262144 rows of the vocabulary, and the weights have 262208
        ("GEMMA3_4B", 3_880_099_328 + 64 * 2560),
        # it counts the frequencies of rotary positions, 64 in each layer
        ("SMOLLM3_3B", 3_075_100_928 - 36 * 64),
    ],
)
def test_exact_counts_that_others_published(name, total):
    assert count(specs(FAMILIES[name])) == total


@pytest.mark.parametrize(
    ("name", "billions", "half_a_digit"),
    [
        ("EUROLLM_1_7B", 1.657, 0.0005),
        ("EUROLLM_9B", 9.15, 0.005),
        ("EUROLLM_22B", 22.6, 0.05),
        ("HPLT_2B", 2.15, 0.005),
        ("DATAMIX_2B", 2.15, 0.005),
        ("OPENEUROLLM_9B", 9.1, 0.05),
        ("VIKING_7B", 7.55, 0.005),
        ("APERTUS_8B", 8, 0.5),
        ("QWEN3_0_6B", 0.6, 0.05),
        ("QWEN3_1_7B", 1.7, 0.05),
        ("QWEN3_4B", 4.0, 0.05),
        ("QWEN3_8B", 8.2, 0.05),
        ("QWEN3_30B_A3B", 30.5, 0.05),
        ("OLMO3_7B", 7, 0.5),
        ("SMOLLM3_3B", 3.08, 0.005),
        ("MIXTRAL_8X7B", 46.7, 0.05),
    ],
)
def test_rounded_counts_on_the_cards(name, billions, half_a_digit):
    assert count(specs(FAMILIES[name])) / 1e9 == pytest.approx(billions, abs=half_a_digit)


# Qwen's card cuts 3.35 off after one digit
@pytest.mark.parametrize(
    ("name", "published_billions", "within"), [("MIXTRAL_8X7B", 12.9, 0.05), ("QWEN3_30B_A3B", 3.3, 0.06)]
)
def test_parameters_that_a_token_of_a_mixture_of_experts_meets(name, published_billions, within):
    moe = FAMILIES[name].mlp
    idle = (moe.experts - moe.top_k) * 3 * moe.hidden * FAMILIES[name].width * FAMILIES[name].depth
    ours = count(specs(FAMILIES[name])) - idle
    assert ours == sum(
        size * moe.top_k // moe.experts if ".experts." in path else size for path, size in parameters(name).items()
    )
    assert ours / 1e9 == pytest.approx(published_billions, abs=within)


def test_the_22b_card_contradicts_itself_about_its_layers():
    from dataclasses import replace

    layers_54, layers_56 = (count(specs(replace(families.EUROLLM_22B, depth=depth))) / 1e9 for depth in (54, 56))
    assert (round(layers_54, 1), round(layers_56, 1)) == (22.6, 23.4)  # the card: 56 layers, 22.6 billion
