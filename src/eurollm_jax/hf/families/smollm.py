"""SmolLM3: Llama without positions in every fourth layer."""

from typing import Any

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
from eurollm_jax.hf.families.llama import TABLE
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Norm, Rope, TransformerConfig


def _read(fields: Fields) -> TransformerConfig:
    fields.ignore("max_window_layers")  # in its published file, and read by nobody
    return TransformerConfig(
        **read_sizes(fields, max_positions=32_768, kv_heads=4),
        mlp=read_gated(fields, bias=fields.flag("mlp_bias", False)),
        pattern=_read_pattern(fields),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-6)),
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        tied=fields.flag("tie_word_embeddings", True),
    )


def _read_pattern(fields: Fields) -> tuple[Attention, ...]:
    """Where nothing else is said, each fourth layer has no positions, and if any layers have a window then those."""
    depth, rope = fields.count("num_hidden_layers"), read_rope(fields, theta=2e6)
    interval = fields.count("no_rope_layer_interval", 4)
    turned = fields.take("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(depth)])
    if not isinstance(turned, list) or len(turned) < depth or any(flag not in (0, 1) for flag in turned):
        raise fields.error(f"no_rope_layers is {turned!r}, and must be a list with 0 or 1 for each of {depth} layers")
    turned = turned[:depth]
    window = fields.count("sliding_window") if fields.take("sliding_window", None) is not None else None
    window = window if fields.flag("use_sliding_window", False) else None
    kinds = read_layer_types(fields, [window is not None and not flag for flag in turned])
    if any(kinds) and window is None:
        raise fields.error("layer_types asks for sliding windows, and use_sliding_window and sliding_window give none")
    return shortest_pattern(
        [
            Attention(window if sliding else None, rope if flag else None)
            for sliding, flag in zip(kinds, turned, strict=True)
        ]
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = [config.kind(layer) for layer in range(config.depth)]
    window = next((kind.window for kind in kinds if kind.window), None)
    turned = [int(kind.rope is not None) for kind in kinds]
    return {
        **write_sizes(config),
        **write_gated(config),
        "attention_bias": config.attention_bias == "all",
        "mlp_bias": getattr(config.mlp, "bias", False),
        "no_rope_layers": turned,
        **_interval(turned),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types(config),
        "pad_token_id": None,  # left out it is 128004, and transformers refuses a vocabulary without it
        **write_rope(next((kind.rope for kind in kinds if kind.rope), Rope())),
    }


def _interval(turned: list[int]) -> dict[str, int]:
    """The shorter form of `no_rope_layers`, for readers that know no other, where it has one."""
    interval = (turned.index(0) if 0 in turned else len(turned)) + 1
    regular = turned == [int((layer + 1) % interval != 0) for layer in range(len(turned))]
    return {"no_rope_layer_interval": interval} if regular else {}


SMOLLM3 = Family("SmolLM3ForCausalLM", "smollm3", TABLE, _read, _write)
