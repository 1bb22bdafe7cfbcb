"""Mixtures of experts: Mixtral, Qwen3-MoE, GLM-4-MoE. In the files each expert's matrices are tensors of their own."""

from typing import Any

from eurollm_jax.hf.families.family import Family, read_activation, read_sizes, write_activation, write_sizes
from eurollm_jax.hf.families.llama import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, PRE_NORMS
from eurollm_jax.hf.families.qwen import HEAD_NORMS
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, write_rope
from eurollm_jax.model.config import Attention, BalanceBias, BalanceLoss, MoE, Norm, Rope, TransformerConfig


def _gated(path: str, module: str, gate: str, up: str, down: str) -> dict[str, tuple[str, str]]:
    return {
        f"{path}/gate": (f"{module}.{gate}.weight", "embed mlp -> mlp embed"),
        f"{path}/up": (f"{module}.{up}.weight", "embed mlp -> mlp embed"),
        f"{path}/down": (f"{module}.{down}.weight", "mlp embed -> embed mlp"),
    }


MODULE = "model.layers.{layers}.mlp"
GLU = ("gate_proj", "up_proj", "down_proj")
ROUTER = {"layers/router": (f"{MODULE}.gate.weight", "embed experts -> experts embed")}
ROUTER_BIAS = {"layers/router_bias": (f"{MODULE}.gate.e_score_correction_bias", "experts -> experts")}
SHARED = _gated("layers/shared", f"{MODULE}.shared_experts", *GLU)
EXPERTS = _gated("layers/experts", f"{MODULE}.experts.{{experts}}", *GLU)
AROUND = EMBEDDING | PRE_NORMS | ATTENTION | FINAL_NORM | HEAD

MIXTRAL_MODULE = "model.layers.{layers}.block_sparse_moe"
MIXTRAL_TABLE = (
    AROUND
    | {"layers/router": (f"{MIXTRAL_MODULE}.gate.weight", "embed experts -> experts embed")}
    | _gated("layers/experts", f"{MIXTRAL_MODULE}.experts.{{experts}}", "w1", "w3", "w2")
)
QWEN3_MOE_TABLE = AROUND | HEAD_NORMS | ROUTER | EXPERTS
GLM4_MOE_TABLE = QWEN3_MOE_TABLE | ROUTER_BIAS | SHARED


def _read_mixtral(fields: Fields) -> TransformerConfig:
    fields.only("router_jitter_noise", 0.0)
    window = fields.count("sliding_window") if fields.take("sliding_window", None) is not None else None
    return TransformerConfig(
        **read_sizes(fields, max_positions=131_072, kv_heads=8),
        mlp=MoE(
            experts=_experts(fields, 8),
            top_k=fields.count("num_experts_per_tok", 2),
            hidden=fields.count("intermediate_size"),
            activation=read_activation(fields),
            balance=_balance(fields),
        ),
        pattern=(Attention(window=window, rope=read_rope(fields, theta=1e6)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-5)),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    moe = _of(config)
    return {
        **write_sizes(config),
        **_write_balance(moe),
        **write_activation(moe.activation),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": config.pattern[0].window,
        **write_rope(config.pattern[0].rope or Rope()),
    }


def _read_qwen(fields: Fields) -> TransformerConfig:
    fields.only("use_sliding_window", False)
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    fields.ignore("sliding_window", "max_window_layers")  # without effect where use_sliding_window is false
    fields.ignore("intermediate_size")  # of the layers without experts, of which there are none
    return TransformerConfig(
        **read_sizes(fields, max_positions=32_768, kv_heads=4),
        mlp=MoE(
            experts=_experts(fields, 128),
            top_k=fields.count("num_experts_per_tok", 8),
            hidden=fields.count("moe_intermediate_size", 768),
            normalised=fields.flag("norm_topk_prob", False),
            activation=read_activation(fields),
            balance=_balance(fields),
        ),
        pattern=(Attention(rope=read_rope(fields, theta=1e4)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-6)),
        qk_norm="head",
        attention_bias="all" if fields.flag("attention_bias", False) else "none",
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    moe = _of(config)
    return {
        **write_sizes(config),
        **_write_balance(moe),
        **write_activation(moe.activation),
        "attention_bias": config.attention_bias == "all",
        "num_experts": moe.experts,  # in the older schema
        "num_local_experts": moe.experts,  # in the newer
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        **write_rope(config.pattern[0].rope or Rope()),
    }


def _read_glm(fields: Fields) -> TransformerConfig:
    fields.only("n_group", 1)
    fields.only("topk_group", 1)
    if dense := fields.take("first_k_dense_replace", 1):
        raise fields.error(f"first_k_dense_replace is {dense!r}, and only 0 is supported: layers are all of one kind")
    if extra := fields.take("num_nextn_predict_layers", 0) or fields.take("num_mtp_layers", 0):
        raise fields.error(
            f"num_nextn_predict_layers is {extra!r}, and only 0 is supported: delete the layers that predict further "
            "tokens (those from num_hidden_layers on), and set it to 0"
        )
    fields.ignore("output_router_logits")
    fields.ignore("intermediate_size")  # of the layers without experts, of which there are none
    hidden = fields.count("moe_intermediate_size", 1408)
    return TransformerConfig(
        **read_sizes(fields, max_positions=131_072, kv_heads=8),
        mlp=MoE(
            experts=_experts(fields, 128, "n_routed_experts", "num_local_experts"),
            top_k=fields.count("num_experts_per_tok", 8),
            hidden=hidden,
            score="sigmoid",
            normalised=fields.flag("norm_topk_prob", True),
            scale=fields.real("routed_scaling_factor", 1.0),
            shared=hidden * fields.count("n_shared_experts", 1),
            activation=read_activation(fields),
            balance=BalanceBias(),
        ),
        pattern=(Attention(rope=read_rope(fields, theta=1e4, fraction=0.5)),),
        norm=Norm(eps=fields.real("rms_norm_eps", 1e-5)),
        qk_norm="head" if fields.flag("use_qk_norm", False) else "none",
        attention_bias="qkv" if fields.flag("attention_bias", False) else "none",
        tied=fields.flag("tie_word_embeddings", False),
    )


def _write_glm(config: TransformerConfig) -> dict[str, Any]:
    moe, rope = _of(config), config.pattern[0].rope or Rope()
    written = write_rope(rope)
    fraction = {"partial_rotary_factor": rope.fraction}  # even where it is 1: left out, it is a half
    return {
        **write_sizes(config),
        **write_activation(moe.activation),
        "attention_bias": config.attention_bias == "qkv",
        "use_qk_norm": config.qk_norm == "head",
        "n_routed_experts": moe.experts,
        "n_shared_experts": max(1, moe.shared // moe.hidden),
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.normalised,
        "routed_scaling_factor": moe.scale,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        **written,
        **fraction,
        "rope_parameters": written["rope_parameters"] | fraction,
    }


def _of(config: TransformerConfig) -> MoE:
    assert isinstance(config.mlp, MoE)
    return config.mlp


def _experts(fields: Fields, default: int, *names: str) -> int:
    """How many experts there are, which the older and the newer schema call by different names."""
    names = names or ("num_experts", "num_local_experts")
    said = {name: fields.count(name) for name in names if fields.take(name, None) is not None}
    if len(set(said.values())) > 1:
        raise fields.error(
            f"{' and '.join(names)} disagree ({said}), so readers would compute different models: correct one"
        )
    return next(iter(said.values()), default)


def _balance(fields: Fields) -> BalanceLoss | None:
    """The loss that keeps the experts' load even; output_router_logits only says whether transformers returns it."""
    fields.ignore("output_router_logits")
    weight = fields.take("router_aux_loss_coef", 0.001)
    return BalanceLoss(fields.real("router_aux_loss_coef", 0.001)) if weight != 0 else None


def _write_balance(moe: MoE) -> dict[str, Any]:
    return {"router_aux_loss_coef": moe.balance.weight if isinstance(moe.balance, BalanceLoss) else 0.0}


MIXTRAL = Family("MixtralForCausalLM", "mixtral", MIXTRAL_TABLE, _read_mixtral, _write_mixtral, mlp=MoE)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", QWEN3_MOE_TABLE, _read_qwen, _write_qwen, mlp=MoE)
GLM4_MOE = Family("Glm4MoeForCausalLM", "glm4_moe", GLM4_MOE_TABLE, _read_glm, _write_glm, mlp=MoE)
