"""Apertus: xIELU without a gate, and a norm on each head's queries and keys (arXiv:2509.14233)."""

from typing import Any

from eurollm_jax.hf.families.family import Family, read_sizes, write_sizes
from eurollm_jax.hf.families.llama import ATTENTION, EMBEDDING, FINAL_NORM, HEAD
from eurollm_jax.hf.families.qwen import HEAD_NORMS
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, Llama3Scaling, Norm, Rope, TransformerConfig, Ungated
from eurollm_jax.model.layers import XIELU_BETA

NORMS = {
    "layers/attention_norm": ("model.layers.{layers}.attention_layernorm.weight", "embed -> embed"),
    "layers/mlp_norm": ("model.layers.{layers}.feedforward_layernorm.weight", "embed -> embed"),
}
XIELU = {
    "layers/up": ("model.layers.{layers}.mlp.up_proj.weight", "embed mlp -> mlp embed"),
    "layers/alpha_positive": ("model.layers.{layers}.mlp.act_fn.alpha_p", "slope -> slope"),
    "layers/alpha_negative": ("model.layers.{layers}.mlp.act_fn.alpha_n", "slope -> slope"),
    "layers/down": ("model.layers.{layers}.mlp.down_proj.weight", "mlp embed -> embed mlp"),
}
TABLE = EMBEDDING | NORMS | ATTENTION | HEAD_NORMS | XIELU | FINAL_NORM | HEAD
CONSTANTS = {
    "model.layers.{layers}.mlp.act_fn.beta": XIELU_BETA,
    "model.layers.{layers}.mlp.act_fn.eps": -1e-6,  # keeps their exponential from overflowing, and changes nothing else
}

THETA = 1.2e7
SCALING = Llama3Scaling(factor=8.0, original_positions=8192, low_frequency=1.0, high_frequency=4.0)


def _read(fields: Fields) -> TransformerConfig:
    fields.only("hidden_act", "xielu")
    fields.only("mlp_bias", False)
    fields.only("post_norm", False)
    fields.only("qk_norm", True)
    return TransformerConfig(
        **read_sizes(fields, max_positions=65_536),
        mlp=Ungated(fields.count("intermediate_size")),
        pattern=(Attention(rope=_read_rope(fields)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-5)),
        qk_norm="head",
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        tied=fields.flag("tie_word_embeddings", False),
    )


def _read_rope(fields: Fields) -> Rope:
    """Scaled where nothing is said, and then by version 5 of transformers from its own theta, whatever is given."""
    unsaid = not fields.take("rope_parameters", None) and not fields.take("rope_scaling", None)
    if unsaid and (fields.null("rope_scaling") or fields.real("rope_theta", THETA) != THETA):
        raise fields.error(
            "rope_scaling is null or left out beside a rope_theta, which is one model to version 4 of transformers and "
            "another to version 5: give rope_scaling"
        )
    return read_rope(fields, theta=THETA, scaling=SCALING)


def _write(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config.pattern[0].rope or Rope())
    return {
        **write_sizes(config),
        "hidden_act": "xielu",
        "attention_bias": config.attention_bias == "all",
        **rope,
        "rope_scaling": rope["rope_scaling"] or {"rope_type": "default"},  # null would mean SCALING to version 5
    }


APERTUS = Family("ApertusForCausalLM", "apertus", TABLE, _read, _write, mlp=Ungated, constants=CONSTANTS)
