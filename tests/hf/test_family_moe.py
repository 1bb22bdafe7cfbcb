"""Mixtral, Qwen3-MoE and GLM-4-MoE, as transformers computes and stores them."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families import family_for
from eurollm_jax.hf.families.moe import GLM4_MOE, MIXTRAL, QWEN3_MOE
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.model.config import Attention, BalanceBias, BalanceLoss, MoE, Rope, TransformerConfig, YarnScaling
from tests.hf.parity import (
    assert_bijection,
    assert_comes_back,
    assert_config_comes_back,
    assert_same_function,
    assert_trains,
    random_model,
    saved,
    variants,
)

SIZES = dict(vocab_size=98, num_hidden_layers=3, max_position_embeddings=64, intermediate_size=20, use_cache=True)
YARN = dict(rope_type="yarn", rope_theta=5e3, factor=4.0, original_max_position_embeddings=16, truncate=False)


def mixtral(**options):
    sizes = SIZES | dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_local_experts=5)
    return MixtralForCausalLM, MixtralConfig(**(sizes | options))


def qwen(**options):
    sizes = SIZES | dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    experts = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=12)
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**(sizes | experts | options))


def glm(**options):
    sizes = SIZES | dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    experts = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=0)
    return Glm4MoeForCausalLM, Glm4MoeConfig(**(sizes | experts | dict(num_mtp_layers=0) | options))


MODELS = {
    "mixtral": mixtral(),
    "mixtral-odd": mixtral(
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        num_experts_per_tok=1,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="linear", rope_theta=321.0, factor=2.0),
        hidden_act="gelu",
    ),
    "mixtral-window": mixtral(sliding_window=7, num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True),
    "qwen": qwen(),
    "qwen-normalised": qwen(norm_topk_prob=True, attention_bias=True, rms_norm_eps=1e-4, tie_word_embeddings=True),
    "qwen-without-head-dim": qwen(
        head_dim=6, num_experts_per_tok=1, rope_parameters=YARN, hidden_act="gelu_pytorch_tanh"
    ),
    "glm": glm(),
    "glm-odd": glm(
        attention_bias=True,
        use_qk_norm=True,
        n_shared_experts=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=False,
        num_experts_per_tok=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="default", rope_theta=777.0, partial_rotary_factor=0.25),
    ),
    "glm-whole-heads": glm(
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=777.0, partial_rotary_factor=1.0),
    ),
}


@pytest.fixture(scope="module", params=variants(MODELS, fast=("mixtral", "qwen-normalised", "glm-odd")))
def model(request):
    """With routers that tell experts apart, so that no rounding changes the choice, and biases that matter to it."""
    model_class, config = MODELS[request.param]
    built = random_model(model_class, config)
    with torch.no_grad():
        for name, weight in built.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                weight.copy_(torch.randn_like(weight) * 0.3)
            if name.endswith("gate.weight"):
                weight.normal_(std=0.5)
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("model"))


def test_computes_what_transformers_computes_and_comes_back(model, folder, tmp_path):
    hub = assert_same_function(model, folder)
    assert_bijection(hub)
    assert_comes_back(hub, tmp_path / "again")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("mixtral-window", marks=pytest.mark.slow),
        "qwen-normalised",
        pytest.param("glm", marks=pytest.mark.slow),
    ],
    indirect=True,
)
def test_trains_on_eight_devices_and_transformers_loads_it(model, folder, tmp_path):
    assert_trains(HubFolder(folder), tmp_path / "trained")


def test_transformers_reads_our_configuration_as_the_one_we_read(folder):
    hub = HubFolder(folder)
    assert hub.family.lacks(hub.config) == []
    only_of_dense_layers = () if hub.family is MIXTRAL else ("intermediate_size",)
    assert_config_comes_back(hub, without_effect=only_of_dense_layers)


FAMILY = {family.model_type: family for family in (MIXTRAL, QWEN3_MOE, GLM4_MOE)}
OLDER = {
    "mixtral": dict(
        # Of Mixtral-8x7B-v0.1 as published, with fewer layers.
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        num_key_value_heads=8,
        num_local_experts=8,
        output_router_logits=False,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.36.0.dev0",
        use_cache=True,
        vocab_size=32000,
    ),
    "qwen3_moe": dict(
        # Of Qwen3-30B-A3B as published, with fewer layers.
        architectures=["Qwen3MoeForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        decoder_sparse_step=1,
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=6144,
        max_position_embeddings=40960,
        max_window_layers=48,
        mlp_only_layers=[],
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=3,
        num_key_value_heads=4,
        output_router_logits=False,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.51.0",
        use_cache=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "glm4_moe": dict(
        # Of GLM-4.5-Air as published, without its dense layer and its layer for the token after the next.
        architectures=["Glm4MoeForCausalLM"],
        attention_bias=True,
        attention_dropout=0.0,
        pad_token_id=151329,
        eos_token_id=[151329, 151336, 151338],
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        partial_rotary_factor=0.5,
        initializer_range=0.02,
        intermediate_size=10944,
        max_position_embeddings=131072,
        model_type="glm4_moe",
        moe_intermediate_size=1408,
        n_group=1,
        topk_group=1,
        n_routed_experts=128,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_attention_heads=96,
        num_experts_per_tok=8,
        first_k_dense_replace=0,
        num_hidden_layers=3,
        num_key_value_heads=8,
        num_nextn_predict_layers=0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=1000000,
        routed_scaling_factor=1.0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.54.0",
        use_cache=True,
        use_qk_norm=False,
        vocab_size=151552,
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_the_older_schema_says_what_the_newer_says(name, tmp_path):
    older, family = OLDER[name], FAMILY[name]
    (tmp_path / "config.json").write_text(json.dumps(older))
    newer = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))
    assert "rope_theta" not in newer
    assert newer["rope_parameters"]["rope_theta"] == 1e6
    read = family.config(older)
    assert read == family.config(newer)
    assert family.lacks(read) == []


def test_what_the_published_files_say():
    def options(name):
        return FAMILY[name].config(OLDER[name]).mlp

    assert options("mixtral") == MoE(8, 2, 14336, balance=BalanceLoss(0.02))
    assert options("qwen3_moe") == MoE(128, 8, 768, balance=BalanceLoss(0.001))
    assert options("glm4_moe") == MoE(128, 8, 1408, score="sigmoid", shared=1408, balance=BalanceBias())
    assert GLM4_MOE.config(OLDER["glm4_moe"]).pattern[0].rope.fraction == 0.5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mixtral", "router_jitter_noise", 0.1),
        ("mixtral", "num_experts", 4),
        ("mixtral", "hidden_act", "relu"),
        ("mixtral", "router_aux_loss_coef", -1.0),
        ("mixtral", "attention_bias", True),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen3_moe", "num_local_experts", 64),
        ("qwen3_moe", "n_shared_experts", 1),
        ("glm4_moe", "first_k_dense_replace", 1),
        ("glm4_moe", "first_k_dense_replace", None),  # left out, it is 1
        ("glm4_moe", "n_group", 2),
        ("glm4_moe", "topk_group", 2),
        ("glm4_moe", "num_nextn_predict_layers", 1),
        ("glm4_moe", "n_shared_experts", 0),
        ("glm4_moe", "scoring_func", "softmax"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(name, field, value):
    raw = {said: what for said, what in (OLDER[name] | {field: value}).items() if what is not None}
    with pytest.raises(UserError, match=rf"config\.json: .*{field}"):
        FAMILY[name].config(raw)


def test_the_family_of_a_mixture_is_the_one_that_can_say_it():
    def sized(**options):
        return TransformerConfig(
            vocab_size=50, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, max_positions=32, **options
        )

    plain = MoE(4, 2, 8, balance=BalanceLoss(0.01), z_loss=1e-3)
    assert family_for(sized(mlp=plain)) is MIXTRAL
    assert family_for(sized(mlp=plain, pattern=(Attention(window=8),))) is MIXTRAL
    assert family_for(sized(mlp=plain, qk_norm="head")) is QWEN3_MOE
    assert family_for(sized(mlp=MoE(4, 2, 8, normalised=False), qk_norm="head")) is QWEN3_MOE
    biased = MoE(4, 2, 8, score="sigmoid", shared=16, scale=2.0, balance=BalanceBias(1e-2))
    assert family_for(sized(mlp=biased)) is GLM4_MOE
    for lacking in (
        sized(mlp=MoE(4, 2, 8, score="sigmoid", shared=12, balance=BalanceBias())),  # not a multiple of an expert's
        sized(mlp=MoE(4, 2, 8, score="sigmoid", balance=BalanceBias())),  # always has a shared expert
        sized(mlp=MoE(4, 2, 8, score="sigmoid", shared=8)),  # always has the bias
        sized(mlp=plain, qk_norm="full"),
        sized(mlp=plain, pattern=(Attention(window=8), Attention())),
    ):
        with pytest.raises(UserError, match="can say this model"):
            family_for(lacking)


def test_yarn_is_read_whole(tmp_path):
    _, config = MODELS["qwen-without-head-dim"]
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = QWEN3_MOE.config(raw | {"architectures": ["Qwen3MoeForCausalLM"]}).pattern[0].rope
    assert rope == Rope(5e3, YarnScaling(4.0, 16, truncate=False))
