"""Llama and Mistral: EuroLLM, Salamandra, Viking, HPLT, datamix; Minerva."""

from typing import Any

from eurollm_jax.hf.families.family import Family, read_gated, read_sizes, width_over_heads, write_gated, write_sizes
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Norm, Rope, TransformerConfig

EMBEDDING = {"embedding": ("model.embed_tokens.weight", "vocab embed -> vocab embed")}
HEAD = {"head": ("lm_head.weight", "embed vocab -> vocab embed")}
FINAL_NORM = {"final_norm": ("model.norm.weight", "embed -> embed")}
ATTENTION = {
    "layers/query": ("model.layers.{layers}.self_attn.q_proj.weight", "embed heads head_dim -> (heads head_dim) embed"),
    "layers/query_bias": ("model.layers.{layers}.self_attn.q_proj.bias", "heads head_dim -> (heads head_dim)"),
    "layers/key": (
        "model.layers.{layers}.self_attn.k_proj.weight",
        "embed kv_heads head_dim -> (kv_heads head_dim) embed",
    ),
    "layers/key_bias": ("model.layers.{layers}.self_attn.k_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"),
    "layers/value": (
        "model.layers.{layers}.self_attn.v_proj.weight",
        "embed kv_heads head_dim -> (kv_heads head_dim) embed",
    ),
    "layers/value_bias": ("model.layers.{layers}.self_attn.v_proj.bias", "kv_heads head_dim -> (kv_heads head_dim)"),
    "layers/output": (
        "model.layers.{layers}.self_attn.o_proj.weight",
        "heads head_dim embed -> embed (heads head_dim)",
    ),
    "layers/output_bias": ("model.layers.{layers}.self_attn.o_proj.bias", "embed -> embed"),
}
PRE_NORMS = {
    "layers/attention_norm": ("model.layers.{layers}.input_layernorm.weight", "embed -> embed"),
    "layers/mlp_norm": ("model.layers.{layers}.post_attention_layernorm.weight", "embed -> embed"),
}
GATED = {
    "layers/gate": ("model.layers.{layers}.mlp.gate_proj.weight", "embed mlp -> mlp embed"),
    "layers/gate_bias": ("model.layers.{layers}.mlp.gate_proj.bias", "mlp -> mlp"),
    "layers/up": ("model.layers.{layers}.mlp.up_proj.weight", "embed mlp -> mlp embed"),
    "layers/up_bias": ("model.layers.{layers}.mlp.up_proj.bias", "mlp -> mlp"),
    "layers/down": ("model.layers.{layers}.mlp.down_proj.weight", "mlp embed -> embed mlp"),
    "layers/down_bias": ("model.layers.{layers}.mlp.down_proj.bias", "embed -> embed"),
}
TABLE = EMBEDDING | PRE_NORMS | ATTENTION | GATED | FINAL_NORM | HEAD


def _read_llama(fields: Fields) -> TransformerConfig:
    width_over_heads(fields)
    fields.only("rope_interleaved", False)
    fields.ignore("is_llama_config")  # which SmolLM's files hold beside it
    tied = fields.flag("tie_word_embeddings", False)
    fields.only("untie_embeddings_and_output_weights", not tied)  # the same in Viking's files, by Megatron's name
    return TransformerConfig(
        **read_sizes(fields, max_positions=2048),
        mlp=read_gated(fields, bias=fields.flag("mlp_bias", False)),
        pattern=(Attention(rope=read_rope(fields, theta=1e4)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-6)),
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        tied=tied,
    )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_gated(config),
        "attention_bias": config.attention_bias == "all",
        "mlp_bias": getattr(config.mlp, "bias", False),
        **write_rope(config.pattern[0].rope or Rope()),
    }


def _read_mistral(fields: Fields) -> TransformerConfig:
    window = None if fields.null("sliding_window") else fields.count("sliding_window", 4096)
    return TransformerConfig(
        **read_sizes(fields, max_positions=131_072, kv_heads=8),
        mlp=read_gated(fields),
        pattern=(Attention(window=window, rope=read_rope(fields, theta=1e4)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-6)),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_gated(config),
        "sliding_window": config.pattern[0].window,
        **write_rope(config.pattern[0].rope or Rope()),
    }


LLAMA = Family("LlamaForCausalLM", "llama", TABLE, _read_llama, _write_llama)
MISTRAL = Family("MistralForCausalLM", "mistral", TABLE, _read_mistral, _write_mistral)
