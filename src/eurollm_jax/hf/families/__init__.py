"""The architectures of transformers that our decoder covers, one value each."""

from collections.abc import Mapping
from typing import Any

from eurollm_jax.errors import UserError
from eurollm_jax.hf.families.apertus import APERTUS
from eurollm_jax.hf.families.family import Family
from eurollm_jax.hf.families.gemma import GEMMA2, GEMMA3, GEMMA3_IMAGES
from eurollm_jax.hf.families.llama import LLAMA, MISTRAL
from eurollm_jax.hf.families.moe import GLM4_MOE, MIXTRAL, QWEN3_MOE
from eurollm_jax.hf.families.olmo import OLMO2, OLMO3
from eurollm_jax.hf.families.qwen import QWEN2, QWEN3
from eurollm_jax.hf.families.smollm import SMOLLM3
from eurollm_jax.model.config import TransformerConfig

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN3,
    QWEN2,
    APERTUS,
    SMOLLM3,
    MIXTRAL,
    QWEN3_MOE,
    GLM4_MOE,
    OLMO2,
    OLMO3,
    GEMMA2,
    GEMMA3,
    GEMMA3_IMAGES,
)
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def family_of_folder(raw: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names. Raises UserError where it is none of ours, or two names disagree."""
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{where}: architectures is {named!r}, and must be a list of names.")
    by_type = [family for family in FAMILIES if family.model_type == raw.get("model_type")]
    found = [BY_ARCHITECTURE[name] for name in named if name in BY_ARCHITECTURE] or ([] if named else by_type)
    if not found:
        asked = ", ".join(named) or f"model_type {raw.get('model_type')!r}"
        raise UserError(f"{where}: {asked} is not supported, only {', '.join(sorted(BY_ARCHITECTURE))}.")
    if raw.get("model_type") not in (None, found[0].model_type):
        raise UserError(
            f"{where}: architectures says {found[0].architecture} and model_type {raw['model_type']!r}: correct one."
        )
    return found[0]


def family_for(config: TransformerConfig, architecture: str | None = None) -> Family:
    """The first family that can say all of a model, or the one asked for. Raises UserError where it cannot."""
    exported = {family.architecture: family for family in FAMILIES if family.exported_as is None}
    if architecture is not None and architecture not in exported:
        raise UserError(f"architecture {architecture} is not supported: choose one of {', '.join(sorted(exported))}.")
    candidates = exported.values() if architecture is None else (exported[architecture],)
    lacking = {family.architecture: family.lacks(config) for family in candidates}
    if found := next((name for name, lacks in lacking.items() if not lacks), None):
        return BY_ARCHITECTURE[found]
    nearest = min(lacking, key=lambda name: (BY_ARCHITECTURE[name].mlp is not type(config.mlp), len(lacking[name])))
    missing = ", ".join(lacking[nearest])
    if architecture is not None:
        raise UserError(f"{architecture} cannot say this model's {missing}: leave the architecture to be chosen.")
    raise UserError(
        f"no architecture of transformers that we know can say this model; the nearest, {nearest}, lacks its "
        f"{missing}: change the model."
    )
