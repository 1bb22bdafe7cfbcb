"""How our weights and configuration correspond to those of a Hugging Face model, as one table read in both directions.

Adding a family means adding a table beside LLAMA and its fields to the two config functions.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from einops import rearrange

from eurollm_jax.errors import UserError
from eurollm_jax.model.param import Param, flatten
from eurollm_jax.model.transformer import TransformerConfig, specs

type ExportDtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[str, ...] = get_args(ExportDtype.__value__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # which tensor is in which file, where there are several

# Where readers look for the rotary positions: version 5 of transformers, and before.
ROPE_FIELDS = ("rope_parameters", "rope_scaling")

# our path -> (name there, with {} for the layer; how the axes move, ours -> theirs), in the order of the files
LLAMA: Mapping[str, tuple[str, str]] = {
    "embedding": ("model.embed_tokens.weight", "vocab embed -> vocab embed"),
    "layers/attention_norm": ("model.layers.{}.input_layernorm.weight", "embed -> embed"),
    "layers/query": ("model.layers.{}.self_attn.q_proj.weight", "embed heads head_dim -> (heads head_dim) embed"),
    "layers/key": ("model.layers.{}.self_attn.k_proj.weight", "embed kv_heads head_dim -> (kv_heads head_dim) embed"),
    "layers/value": ("model.layers.{}.self_attn.v_proj.weight", "embed kv_heads head_dim -> (kv_heads head_dim) embed"),
    "layers/output": ("model.layers.{}.self_attn.o_proj.weight", "heads head_dim embed -> embed (heads head_dim)"),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "embed -> embed"),
    "layers/gate": ("model.layers.{}.mlp.gate_proj.weight", "embed mlp -> mlp embed"),
    "layers/up": ("model.layers.{}.mlp.up_proj.weight", "embed mlp -> mlp embed"),
    "layers/down": ("model.layers.{}.mlp.down_proj.weight", "mlp embed -> embed mlp"),
    "final_norm": ("model.norm.weight", "embed -> embed"),
    "head": ("lm_head.weight", "embed vocab -> vocab embed"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and which part of which of our weights it is."""

    name: str
    path: str  # of our weight
    layer: int | None  # index on its leading axis, where it is stacked
    pattern: str  # "axes of ours -> axes of theirs"
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape over there."""
        groups = re.findall(r"\(.*?\)|\w+", self.pattern.split("->")[1])
        return tuple(math.prod(self.sizes[axis] for axis in group.strip("()").split()) for group in groups)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_hf(self, weight: Any) -> np.ndarray:
        """Their tensor out of our whole weight, a numpy or jax array; only this layer leaves the device."""
        part = weight if self.layer is None else weight[self.layer]
        return rearrange(np.asarray(part), self.pattern, **self.sizes)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Our layer's weight (or whole weight, where it is not stacked) out of their tensor."""
        ours, theirs = self.pattern.split("->")
        return rearrange(tensor, f"{theirs} -> {ours}", **self.sizes)


def tensors(config: TransformerConfig) -> list[Tensor]:
    """Every tensor of the model's checkpoint, layer by layer: embedding, layers 0, 1, ..., final norm, head."""
    weights: dict[str, Param] = flatten(specs(config))
    if unmapped := weights.keys() - LLAMA.keys():
        raise ValueError(f"no Hugging Face name for {sorted(unmapped)}")
    found = []
    paths = [path for path in LLAMA if path in weights]
    for stacked, group in groupby(paths, key=lambda path: "layers" in weights[path].axes):
        together = list(group)
        for layer in range(config.depth) if stacked else [None]:
            for path in together:
                name, pattern = LLAMA[path]
                sizes = {axis: size for axis, size in weights[path].sizes.items() if axis != "layers"}
                found.append(Tensor(name.format(layer), path, layer, pattern, sizes))
    return found


def to_hf(weights: Mapping[str, Any], config: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of each tensor, one at a time, out of our weights by path (`param.flatten`)."""
    for tensor in tensors(config):
        yield tensor.name, tensor.to_hf(weights[tensor.path])


def from_hf(read: Callable[[str], np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """Our weights by path, in float32; `read` gives the tensor of a name and is called once for each."""
    weights = {path: np.empty(spec.shape, np.float32) for path, spec in flatten(specs(config)).items()}
    for tensor in tensors(config):
        weights[tensor.path][... if tensor.layer is None else tensor.layer] = tensor.from_hf(read(tensor.name))
    return weights


# field there -> field here; a default of None must be given
_NUMBERS: Mapping[str, tuple[str, float | None]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("width", None),
    "intermediate_size": ("mlp", None),
    "num_hidden_layers": ("depth", None),
    "num_attention_heads": ("heads", None),
    "max_position_embeddings": ("max_positions", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
}
# What our decoder does, which a file may say or leave out; any other value is refused.
_FIXED: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
# Fields that change nothing about the function from tokens to logits.
_NEUTRAL = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
_OTHERS = {"num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", *ROPE_FIELDS}


def config_to_hf(
    config: TransformerConfig, *, dtype: ExportDtype, bos_id: int, eos_id: int, pad_id: int
) -> dict[str, Any]:
    """The content of config.json, with each field in every form that a version of transformers reads.

    Version 4 takes `rope_theta` and `torch_dtype` where version 5 takes `rope_parameters` and `dtype`; a reader that
    misses one falls back to its own default without a word. Raises UserError for a shape that transformers refuses.
    """
    if config.width % config.heads:
        raise UserError(
            f"width={config.width} is not a multiple of heads={config.heads}, which transformers demands of a Llama "
            f"model whatever its head_dim: choose another width or number of heads."
        )
    return {
        **_FIXED,
        **{theirs: getattr(config, ours) for theirs, (ours, _) in _NUMBERS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def config_from_hf(raw: Mapping[str, Any], where: str = CONFIG_NAME) -> TransformerConfig:
    """The model that a config.json describes; `compute` and `remat`, which it does not hold, take their defaults.

    What is left out has the default of transformers' Llama. Raises UserError that names the field where the file asks
    for what our decoder does not do, or holds a field whose meaning we do not know.
    """
    for field, value in _FIXED.items():
        if raw.get(field, value) != value:
            raise UserError(f"{where}: {field} is {raw[field]!r}, and only {value!r} is supported.")
    known = {*_FIXED, *_NUMBERS, *_NEUTRAL, *_OTHERS}
    if unknown := sorted(field for field in raw.keys() - known if raw[field] is not None):
        raise UserError(
            f"{where}: {', '.join(unknown)} may change what the model computes and is not supported: "
            f"delete the field if you know that it does not matter."
        )
    fields = {ours: _number(raw, theirs, where, default) for theirs, (ours, default) in _NUMBERS.items()}
    heads = _number(raw, "num_attention_heads", where)
    return TransformerConfig(
        **fields,
        kv_heads=_number(raw, "num_key_value_heads", where, heads),
        head_dim=_number(raw, "head_dim", where, fields["width"] // heads),
        rope_theta=_rope_theta(raw, where),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def _number(raw: Mapping[str, Any], field: str, where: str, default: float | None = None) -> Any:
    value = default if raw.get(field) is None else raw[field]
    if value is None:
        raise UserError(f"{where}: {field} is missing.")
    whole = field != "rms_norm_eps"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
        raise UserError(f"{where}: {field} is {value!r}, and must be a positive {'integer' if whole else 'number'}.")
    return value


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """The base of the rotary frequencies, from whichever of the fields of both schemas are there."""
    thetas = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for field in ROPE_FIELDS:
        rope = raw.get(field) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {field} is {rope!r}, and must be an object.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {field} asks for {kind!r} rotary positions, and only 'default' is supported.")
        if more := sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
            raise UserError(f"{where}: {field} holds {', '.join(more)}, which is not supported.")
        if "rope_theta" in rope:
            thetas[f"{field}.rope_theta"] = rope["rope_theta"]
    if len(set(thetas.values())) > 1:
        said = " and ".join(f"{field} {theta}" for field, theta in thetas.items())
        raise UserError(f"{where}: {said} disagree, so readers would compute different models: correct one.")
    return float(next(iter(thetas.values()), 1e4))
