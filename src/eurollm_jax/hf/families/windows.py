"""What families share whose layers are of two kinds, with a sliding window and without, each with positions of its own.

The older schema has one field for the theta of each kind, or one for both, and scales layers without a window alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eurollm_jax.hf.families.family import layer_types, shortest_pattern
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.rope import read_rope, rope_parameters, write_rope
from eurollm_jax.model.config import Attention, Rope, TransformerConfig, YarnScaling

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 4096  # where it is left out


def every(period: int, depth: int) -> list[bool]:
    """Windows in all layers but each `period`-th."""
    return [bool((layer + 1) % period) for layer in range(depth)]


def read_pattern(fields: Fields, windowed: Sequence[bool], *, full: Rope, sliding: Rope) -> tuple[Attention, ...]:
    """The pattern of layers with and without a window."""
    fields.ignore("sliding_window")
    window = None
    if any(windowed):
        if fields.null("sliding_window"):
            raise fields.error(f"sliding_window is null, and {sum(windowed)} layers have a window by layer_types")
        window = fields.count("sliding_window", WINDOW)
    return shortest_pattern([Attention(window, sliding) if has else Attention(rope=full) for has in windowed])


def write_pattern(config: TransformerConfig) -> dict[str, Any]:
    windows = [kind.window for kind in config.pattern if kind.window is not None]
    return {"sliding_window": windows[0] if windows else WINDOW, "layer_types": layer_types(config)}


def read_ropes(
    fields: Fields, *, theta: float, sliding_theta: float, sliding_name: str | None = None
) -> tuple[Rope, Rope]:
    """The positions of layers without and with a window. The thetas are the family's defaults, and `sliding_name` is
    the older schema's field for the theta of layers with a window, where it has one."""
    newer = fields.take("rope_parameters", {})
    if not isinstance(newer, Mapping) or newer.keys() not in (set(), {FULL, SLIDING}):
        raise fields.error(f"rope_parameters is {newer!r}, and must have {FULL} and {SLIDING} for this architecture")
    full = read_rope(_view(fields, newer, FULL, "rope_theta", "rope_scaling"), theta=theta)
    older = fields.real_or_none(sliding_name) if sliding_name else None
    sliding = read_rope(_view(fields, newer, SLIDING), theta=older or sliding_theta)
    if older not in (None, sliding.theta):
        raise fields.error(
            f"{sliding_name} {older} and rope_parameters.{SLIDING}.rope_theta {sliding.theta} disagree, so readers "
            "would compute different models: correct one"
        )
    if sliding.scaling is not None:
        raise fields.error(
            f"rope_parameters.{SLIDING} is {newer[SLIDING]!r}, and in the older schema layers with a window have no "
            "scaling, so readers would compute different models"
        )
    if isinstance(full.scaling, YarnScaling) and not full.scaling.truncate:
        raise fields.error(
            "truncate is false in the scaling of layers without a window, where version 4 of transformers heeds it and "
            "version 5 does not: set it to true"
        )
    return full, sliding


def write_ropes(config: TransformerConfig, *, theta: float, sliding_theta: float) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_parameters`; the thetas are for a kind that no layer is of."""
    full = _first(config, windowed=False) or Rope(theta)
    sliding = _first(config, windowed=True) or Rope(sliding_theta)
    newer = {FULL: rope_parameters(full), SLIDING: rope_parameters(sliding)}
    older = write_rope(full)
    older.pop("original_max_position_embeddings", None)  # vLLM would put it among the kinds of layers
    return {**older, "rope_parameters": newer}


def _first(config: TransformerConfig, *, windowed: bool) -> Rope | None:
    return next((kind.rope for kind in config.pattern if (kind.window is not None) == windowed), None)


def _view(fields: Fields, newer: Mapping[str, Any], kind: str, *older: str) -> Fields:
    """The fields of one kind of layers, as where there is only one kind."""
    raw: dict[str, Any] = {"rope_parameters": newer[kind]} if newer else {}
    for name in ("max_position_embeddings", *older):
        value = fields.take(name, None)
        if value is not None or fields.null(name):
            raw[name] = value
    return Fields(raw, f"{fields.where}: {kind}")
