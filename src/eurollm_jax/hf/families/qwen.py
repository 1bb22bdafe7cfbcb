"""Qwen2 and Qwen3: Llama, with biases on queries, keys and values in the one, and in the other a norm on each head's
queries and keys, and heads as wide as one likes. OpenEuroLLM 9B has the shape of Qwen3."""

from typing import Any, Literal

from eurollm_jax.hf.families.family import (
    Family,
    layer_types,
    read_gated,
    read_layer_types,
    read_sizes,
    shortest_pattern,
    write_gated,
    write_sizes,
)
from eurollm_jax.hf.families.llama import TABLE as LLAMA_TABLE
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Norm, Rope, TransformerConfig

HEAD_NORMS = {
    "layers/query_norm": ("model.layers.{layers}.self_attn.q_norm.weight", "head_dim -> head_dim"),
    "layers/key_norm": ("model.layers.{layers}.self_attn.k_norm.weight", "head_dim -> head_dim"),
}


def _read_qwen2(fields: Fields) -> TransformerConfig:
    fields.only("use_mrope", False)
    return _read(fields, head_dim=None, qk_norm="none", attention_bias="qkv")


def _read_qwen3(fields: Fields) -> TransformerConfig:
    if fields.null("head_dim"):
        raise fields.error("head_dim is null, which this architecture has no meaning for: give a number")
    bias = fields.flag("attention_bias", False)
    return _read(fields, head_dim=128, qk_norm="head", attention_bias="all" if bias else "none")


def _read(
    fields: Fields,
    *,
    head_dim: int | None,
    qk_norm: Literal["none", "head"],
    attention_bias: Literal["none", "qkv", "all"],
) -> TransformerConfig:
    return TransformerConfig(
        **read_sizes(fields, max_positions=32_768, head_dim=head_dim, kv_heads=32),
        mlp=read_gated(fields),
        pattern=_read_pattern(fields),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-6)),
        qk_norm=qk_norm,
        attention_bias=attention_bias,
        tied=fields.flag("tie_word_embeddings", False),
    )


def _read_pattern(fields: Fields) -> tuple[Attention, ...]:
    """`layer_types`, or what stands for it where it is left out: windows from layer `max_window_layers` on."""
    depth, rope = fields.count("num_hidden_layers"), read_rope(fields, theta=1e4)
    window = None if fields.null("sliding_window") else fields.count("sliding_window", 4096)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.take("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise fields.error(f"max_window_layers is {first!r}, and must be an integer")
    kinds = read_layer_types(fields, [window is not None and layer >= first for layer in range(depth)])
    if any(kinds) and window is None:
        raise fields.error("layer_types asks for sliding windows, and use_sliding_window and sliding_window give none")
    return shortest_pattern([Attention(window if sliding else None, rope) for sliding in kinds])


def _write(config: TransformerConfig) -> dict[str, Any]:
    windows = [config.kind(layer).window for layer in range(config.depth)]
    sliding = next(((layer, window) for layer, window in enumerate(windows) if window), None)
    return {
        **write_sizes(config),
        **write_gated(config),
        "use_sliding_window": sliding is not None,
        "sliding_window": sliding and sliding[1],
        "max_window_layers": sliding[0] if sliding else config.depth,
        "layer_types": layer_types(config),
        **write_rope(config.pattern[0].rope or Rope()),
    }


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return {**_write(config), "attention_bias": config.attention_bias == "all"}


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", LLAMA_TABLE, _read_qwen2, _write)
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", LLAMA_TABLE | HEAD_NORMS, _read_qwen3, _write_qwen3)
