"""Gemma 2 and 3: norms before and after each half, gains of one plus the weight, scaled embeddings, windows, caps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eurollm_jax.hf.families.family import (
    ACTIVATIONS,
    Family,
    read_layer_types,
    read_sizes,
    width_over_heads,
    write_gated,
    write_sizes,
)
from eurollm_jax.hf.families.llama import ATTENTION, EMBEDDING, FINAL_NORM, GATED, HEAD
from eurollm_jax.hf.families.qwen import HEAD_NORMS
from eurollm_jax.hf.families.windows import (
    every,
    read_pattern,
    read_ropes,
    write_pattern,
    write_ropes,
)
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Gated, Norm, Rope, TransformerConfig

ATTENTION_NORMS = {
    "layers/attention_norm": ("model.layers.{layers}.input_layernorm.weight", "embed -> embed"),
    "layers/attention_post_norm": ("model.layers.{layers}.post_attention_layernorm.weight", "embed -> embed"),
}
MLP_NORMS = {
    "layers/mlp_norm": ("model.layers.{layers}.pre_feedforward_layernorm.weight", "embed -> embed"),
    "layers/mlp_post_norm": ("model.layers.{layers}.post_feedforward_layernorm.weight", "embed -> embed"),
}
TABLE = EMBEDDING | ATTENTION_NORMS | ATTENTION | MLP_NORMS | GATED | FINAL_NORM | HEAD
TABLE_3 = EMBEDDING | ATTENTION_NORMS | ATTENTION | HEAD_NORMS | MLP_NORMS | GATED | FINAL_NORM | HEAD


def _read(fields: Fields, pattern: tuple[Attention, ...], max_positions: int) -> TransformerConfig:
    """What both generations have in common."""
    width_over_heads(fields)
    activation = fields.only("hidden_activation", "gelu_pytorch_tanh", *ACTIVATIONS)
    fields.only("hidden_act", activation)  # in the first files, beside the field that counts
    fields.only("use_bidirectional_attention", False)
    for name in ("head_dim", "query_pre_attn_scalar"):
        if fields.null(name):
            raise fields.error(f"{name} is null, which this architecture has no meaning for: give a number")
    sizes = read_sizes(fields, max_positions=max_positions, head_dim=256, kv_heads=4)
    divisor = fields.count("query_pre_attn_scalar", 256)
    return TransformerConfig(
        **sizes,
        mlp=Gated(fields.count("intermediate_size"), ACTIVATIONS[activation]),
        pattern=pattern,
        norm=Norm(place="both", eps=fields.real("rms_norm_eps", 1e-6), gain="one_plus_weight"),
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        attention_scale=None if divisor == sizes["head_dim"] else divisor**-0.5,
        embedding_scale=sizes["width"] ** 0.5,
        tied=fields.flag("tie_word_embeddings", True),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    divisor = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return {
        **write_sizes(config),
        "hidden_activation": write_gated(config)["hidden_act"],
        "attention_bias": config.attention_bias == "all",
        "query_pre_attn_scalar": max(1, divisor),
        "final_logit_softcapping": config.logit_cap,
        **write_pattern(config),
    }


def _read_gemma2(fields: Fields) -> TransformerConfig:
    rope = read_rope(fields, theta=1e4)
    windowed = read_layer_types(fields, every(2, fields.count("num_hidden_layers")))
    pattern = read_pattern(fields, windowed, full=rope, sliding=rope)
    window = fields.take("sliding_window", 4096)
    fields.only("sliding_window_size", window)  # the same in the first files
    return replace(
        _read(fields, pattern, 8192),
        attention_cap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
    return None if fields.null(name) else fields.real(name, default)


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config.pattern[0].rope or Rope())
    return {**_write(config), "attn_logit_softcapping": config.attention_cap, **rope}


def _read_gemma3(fields: Fields) -> TransformerConfig:
    full, sliding = read_ropes(fields, theta=1e6, sliding_theta=1e4, sliding_name="rope_local_base_freq")
    fields.only("attn_logit_softcapping", None)  # transformers has the field, and its code passes over it
    config = _read(fields, read_pattern(fields, _windowed(fields), full=full, sliding=sliding), 131_072)
    return replace(config, qk_norm="head", logit_cap=fields.real_or_none("final_logit_softcapping"))


def _windowed(fields: Fields) -> list[bool]:
    """Which layers have a window. The first readers know `sliding_window_pattern` alone; later ones take it where
    `layer_types` is left out. `_sliding_window_pattern` is what transformers writes and never reads."""
    depth = fields.count("num_hidden_layers")
    period = fields.count("sliding_window_pattern", 6)
    windowed = read_layer_types(fields, every(period, depth))
    kept = fields.take("_sliding_window_pattern", period)
    if "sliding_window_pattern" in fields.raw and windowed != every(period, depth):
        raise fields.error(f"sliding_window_pattern {period} and layer_types disagree: correct one")
    if "layer_types" not in fields.raw and kept != period:
        raise fields.error(
            f"_sliding_window_pattern is {kept!r}, which readers pass over: call it sliding_window_pattern, or give "
            "layer_types"
        )
    return windowed


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    windowed = [config.kind(layer).window is not None for layer in range(config.depth)]
    period = [*windowed, False].index(False) + 1
    ropes = write_ropes(config, theta=1e6, sliding_theta=1e4)
    return {
        **_write(config),
        "attn_logit_softcapping": None,
        # Readers that do not know layer_types fail on null, where a number would have them compute another model.
        "sliding_window_pattern": period if windowed == every(period, config.depth) else None,
        **ropes,
        "rope_local_base_freq": ropes["rope_parameters"]["sliding_attention"]["rope_theta"],
    }


GEMMA2 = Family("Gemma2ForCausalLM", "gemma2", TABLE, _read_gemma2, _write_gemma2)
GEMMA3 = Family("Gemma3ForCausalLM", "gemma3_text", TABLE_3, _read_gemma3, _write_gemma3)

# What text_config leaves out, beside the fields that have a default anyway.
_TEXT_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
_IMAGES = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")


def _read_text_part(fields: Fields) -> TransformerConfig:
    fields.ignore(*_IMAGES)
    said = fields.take("text_config", {})
    if not isinstance(said, Mapping):
        raise fields.error(f"text_config is {said!r}, and must be an object")
    inner = Fields({**_TEXT_SIZES, **said}, f"{fields.where}: text_config")
    inner.only("model_type", "gemma3_text")
    config = _read_gemma3(inner)
    inner.refuse_rest()
    if config.logit_cap is not None:
        raise inner.error("final_logit_softcapping is not what every reader applies to this architecture's logits")
    tied = fields.flag("tie_word_embeddings", config.tied)
    if "tie_word_embeddings" in said and tied != config.tied:
        raise inner.error(f"tie_word_embeddings is {config.tied}, and {tied} outside of it: correct one")
    return replace(config, tied=tied)


GEMMA3_IMAGES = replace(
    GEMMA3,
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    read=_read_text_part,
    exported_as=GEMMA3.architecture,
    spellings=(
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "model.language_model."},
    ),
    set_aside=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
