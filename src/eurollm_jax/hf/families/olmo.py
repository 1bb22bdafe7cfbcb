"""OLMo-2: norms after each half, and one over all of a layer's queries and keys. OLMo-3: the same, with windows.

Both take what was attended from full-width queries and keys, so these norms come before the heads are split.
"""

from typing import Any

from eurollm_jax.hf.families.family import (
    Family,
    read_gated,
    read_layer_types,
    read_sizes,
    write_gated,
    write_sizes,
)
from eurollm_jax.hf.families.llama import ATTENTION, EMBEDDING, FINAL_NORM, GATED, HEAD
from eurollm_jax.hf.families.windows import (
    every,
    read_pattern,
    read_ropes,
    write_pattern,
    write_ropes,
)
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Norm, Rope, TransformerConfig

THETA = 5e5  # of OLMo-3
FULL_WIDTH_NORMS = {
    "layers/query_norm": ("model.layers.{layers}.self_attn.q_norm.weight", "heads head_dim -> (heads head_dim)"),
    "layers/key_norm": ("model.layers.{layers}.self_attn.k_norm.weight", "kv_heads head_dim -> (kv_heads head_dim)"),
}
POST_NORMS = {
    "layers/attention_post_norm": ("model.layers.{layers}.post_attention_layernorm.weight", "embed -> embed"),
    "layers/mlp_post_norm": ("model.layers.{layers}.post_feedforward_layernorm.weight", "embed -> embed"),
}
TABLE = EMBEDDING | ATTENTION | FULL_WIDTH_NORMS | GATED | POST_NORMS | FINAL_NORM | HEAD


def _read(fields: Fields, pattern: tuple[Attention, ...]) -> TransformerConfig:
    return TransformerConfig(
        **read_sizes(fields, max_positions=2048),
        mlp=read_gated(fields),
        pattern=pattern,
        norm=Norm(place="post", eps=fields.real("rms_norm_eps", 1e-5)),
        qk_norm="full",
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {**write_sizes(config), **write_gated(config), "attention_bias": config.attention_bias == "all"}


def _read_olmo2(fields: Fields) -> TransformerConfig:
    return _read(fields, (Attention(rope=read_rope(fields, theta=1e4)),))


def _write_olmo2(config: TransformerConfig) -> dict[str, Any]:
    return {**_write(config), **write_rope(config.pattern[0].rope or Rope())}


def _read_olmo3(fields: Fields) -> TransformerConfig:
    if not fields.raw.keys() & {"rope_theta", "rope_parameters"}:
        raise fields.error("rope_theta is missing, for which readers of this architecture take different values")
    full, sliding = read_ropes(fields, theta=THETA, sliding_theta=THETA)
    if sliding.theta != full.theta:
        raise fields.error(
            f"rope_theta is {full.theta} for layers without a window and {sliding.theta} for others (left out, it is "
            f"{THETA} to version 5 of transformers), and version 4 takes the first for all layers: give both the same "
            "in rope_parameters"
        )
    windowed = read_layer_types(fields, every(4, fields.count("num_hidden_layers")))
    return _read(fields, read_pattern(fields, windowed, full=full, sliding=sliding))


def _write_olmo3(config: TransformerConfig) -> dict[str, Any]:
    theta = (config.pattern[0].rope or Rope()).theta  # one for all layers, also for a kind that there is none of
    return {**_write(config), **write_pattern(config), **write_ropes(config, theta=theta, sliding_theta=theta)}


OLMO2 = Family("Olmo2ForCausalLM", "olmo2", TABLE, _read_olmo2, _write_olmo2)
OLMO3 = Family("Olmo3ForCausalLM", "olmo3", TABLE, _read_olmo3, _write_olmo3)
