"""Rotary positions in config.json, in the older and the newer schema.

Version 4 of transformers has `rope_theta` and `rope_scaling`, version 5 has both in `rope_parameters`, by kind of layer
where these differ. We write both and read either; a file in which they disagree would be another model to each reader.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from eurollm_jax.hf.fields import Fields
from eurollm_jax.model.config import LinearScaling, Llama3Scaling, Rope, YarnScaling

type Scaling = LinearScaling | Llama3Scaling | YarnScaling

_YARN_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", "truncate")


def read_rope(fields: Fields, *, theta: float, fraction: float | None = None, scaling: Scaling | None = None) -> Rope:
    """The rotary positions of a model, or of a kind of its layers; `theta` and the others are the family's defaults.

    A family without `fraction` always turns all of a head: what its files say of a fraction must be 1.
    """
    newer = fields.take("rope_parameters", None)
    if newer is not None and not isinstance(newer, Mapping):
        raise fields.error(f"rope_parameters is {newer!r}, and must be an object")
    if newer is not None and any(isinstance(value, Mapping) for value in newer.values()):
        raise fields.error(
            f"rope_parameters are given by kind of layer ({', '.join(newer)}), and only one is supported"
        )
    older_theta, older_scaling = fields.real_or_none("rope_theta"), fields.take("rope_scaling", None)
    outer_fraction = fields.real_or_none("partial_rotary_factor")
    plain = Rope(older_theta or theta, None, outer_fraction or fraction or 1.0)
    older = plain if fields.null("rope_scaling") else replace(plain, scaling=scaling)
    if older_scaling is not None:
        older = _rope(fields, older_scaling, "rope_scaling", plain)
        if older.theta != plain.theta:
            raise fields.error(
                f"rope_theta {plain.theta}{'' if older_theta else ' (as it is left out)'} and rope_scaling.rope_theta "
                f"{older.theta} disagree, so readers would compute different models: correct one"
            )
    rope = older if newer is None else _rope(fields, newer, "rope_parameters", plain)
    _agrees_outside(fields, rope, outer_fraction)
    if fraction is None and rope.fraction != 1:
        raise fields.error(f"partial_rotary_factor is {rope.fraction}, and this architecture turns all of a head")
    if newer is None:
        return rope
    if (older_theta or older_scaling) and older.theta != rope.theta:
        raise fields.error(
            f"rope_theta {older.theta}{'' if older_theta else ' (as it is left out)'} and rope_parameters.rope_theta "
            f"{rope.theta} disagree, so readers would compute different models: correct one"
        )
    if (older_theta or older_scaling or fields.null("rope_scaling")) and replace(older, theta=rope.theta) != rope:
        raise fields.error(
            f"rope_scaling {older_scaling} and rope_parameters {dict(newer)} disagree, so readers would compute "
            "different models: correct one"
        )
    return rope


def _agrees_outside(fields: Fields, rope: Rope, fraction: float | None) -> None:
    """Refuses what the file says a second time, outside of the objects, where it differs."""
    if fraction not in (None, rope.fraction):
        raise fields.error(
            f"partial_rotary_factor is {fraction}, and {rope.fraction} beside the rotary base, so readers would "
            "compute different models: correct one"
        )
    original = fields.take("original_max_position_embeddings", None)
    scaled = getattr(rope.scaling, "original_positions", original)
    if original != scaled and original is not None:
        raise fields.error(
            f"original_max_position_embeddings is {original!r}, and {scaled} in the scaling, so readers would compute "
            "different models: correct one"
        )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The fields of both schemas."""
    scaling = _scaling(rope)
    fraction = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    # llama.cpp's converter looks for it here alone, and takes 8192 where it is not (conversion/llama.py, 2026)
    outside = {}
    if isinstance(rope.scaling, Llama3Scaling):
        outside = {"original_max_position_embeddings": rope.scaling.original_positions}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        **fraction,
        **outside,
        "rope_parameters": rope_parameters(rope),
    }


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The object of the newer schema."""
    fraction = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.theta, **fraction, **(_scaling(rope) or {"rope_type": "default"})}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    match rope.scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, original, low, high):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case YarnScaling(factor, original):
            optional = {name: getattr(rope.scaling, name) for name in _YARN_OPTIONAL}
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                **{name: value for name, value in optional.items() if value is not None},
            }


def _rope(fields: Fields, said: Any, name: str, otherwise: Rope) -> Rope:
    """The rotary positions that one object of either schema describes; what it may leave out is as `otherwise`."""
    if not isinstance(said, Mapping):
        raise fields.error(f"{name} is {said!r}, and must be an object")
    inner = Fields(said, f"{fields.where}: {name}")
    kind = inner.take("rope_type", inner.take("type", "default"))
    if inner.take("type", kind) != kind:
        raise inner.error(f"rope_type is {kind!r} and type, its older name, {inner.raw['type']!r}: correct one")
    theta = inner.real("rope_theta", otherwise.theta)
    fraction = inner.real("partial_rotary_factor", otherwise.fraction)
    scaling: Scaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(inner.real("factor"))
        case "llama3":
            scaling = Llama3Scaling(
                inner.real("factor"),
                inner.count("original_max_position_embeddings"),
                inner.real("low_freq_factor"),
                inner.real("high_freq_factor"),
            )
        case "yarn":
            scaling = _yarn(inner, fields)
        case _:
            raise inner.error(f"{kind!r} rotary positions are not supported, only default, linear, llama3 and yarn")
    inner.refuse_rest()
    return Rope(theta, scaling, fraction)


def _yarn(inner: Fields, outer: Fields) -> YarnScaling:
    factor = inner.real("factor")
    attention_factor = inner.real_or_none("attention_factor")
    mscale, mscale_all = inner.real_or_none("mscale"), inner.real_or_none("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all and factor > 1:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    original = inner.take("original_max_position_embeddings", None)
    return YarnScaling(
        factor,
        outer.count("max_position_embeddings") if original is None else inner.count("original_max_position_embeddings"),
        inner.real("beta_fast", 32.0),
        inner.real("beta_slow", 1.0),
        attention_factor,
        inner.flag("truncate", True),
    )
