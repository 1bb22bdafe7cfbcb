"""Words for a model card: a configuration and a declared mixture in sentences, and the Markdown of tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eurollm_jax.evaluation.report.text import share
from eurollm_jax.languages import LANGUAGES
from eurollm_jax.model.config import (
    Attention,
    BalanceBias,
    BalanceLoss,
    Gated,
    LinearScaling,
    Llama3Scaling,
    MoE,
    Rope,
    TransformerConfig,
    Ungated,
    YarnScaling,
)

NOT_RECORDED = "not recorded"


def cell(value: object) -> str:
    """Text that stays in its place in a table or a line, whatever it holds."""
    text = " ".join(str(value).split())
    for mark in "\\|<*_`[":
        text = text.replace(mark, f"\\{mark}")
    return text


def table(columns: Mapping[str, str], rows: Iterable[Sequence[object]]) -> str:
    """Column title -> "left" or "right". Cells are Markdown already."""
    rule = "|".join("---:" if side == "right" else "---" for side in columns.values())
    lines = [f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines)


def facts(rows: Mapping[str, object]) -> str:
    """A table of names and values."""
    return table({"": "left", " ": "left"}, rows.items())


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def call(described: Any) -> str:
    """A recorded dataclass as the Python that makes it: "AdamW(b1=0.9, ...)"."""
    if isinstance(described, Mapping) and "type" in described:
        fields = ", ".join(f"{name}={call(value)}" for name, value in described.items() if name != "type")
        return f"{described['type']}({fields})"
    return repr(described)


def language(code: str) -> str:
    """ "Maltese (mt)"."""
    if code in LANGUAGES:
        return f"{LANGUAGES[code].name} ({code})"
    return cell(code) if code else NOT_RECORDED


# ------------------------------------------------------------------------------------------------- architecture


def architecture(c: TransformerConfig) -> list[str]:
    """What the decoder is made of, a sentence for each part."""
    grouped = "one for each head" if c.kv_heads == c.heads else f"{c.kv_heads} of them for all heads"
    bias = {"none": "no biases", "qkv": "biases on queries, keys and values", "all": "biases on all four products"}
    qk = {
        "none": "",
        "head": ", RMSNorm of queries and keys over each head",
        "full": ", RMSNorm of queries and keys over all heads together",
    }
    scale = "" if c.attention_scale is None else f", products scaled by {c.attention_scale:g}"
    cap = "" if c.attention_cap is None else f", products capped by {c.attention_cap:g} tanh"
    place = {"pre": "before", "post": "after", "both": "before and after"}
    gain = "; its gain is 1 + weight" if c.norm.gain == "one_plus_weight" else ""
    head = "the embedding, transposed (tied)" if c.tied else "its own matrix (not tied to the embedding)"
    logit_cap = "" if c.logit_cap is None else f", logits capped by {c.logit_cap:g} tanh"
    embedding_scale = "" if c.embedding_scale == 1 else f"; embeddings are multiplied by {c.embedding_scale:g}"
    return [
        f"A decoder-only transformer of {c.depth} layers, {c.width:,} wide.",
        f"Attention: {c.heads} heads of {c.head_dim}; keys and values: {grouped}; {bias[c.attention_bias]}"
        f"{qk[c.qk_norm]}{scale}{cap}.",
        _layers(c),
        f"MLP: {_mlp(c.mlp)}.",
        f"RMSNorm (epsilon {c.norm.eps:g}) {place[c.norm.place]} each half of a layer{gain}.",
        f"Vocabulary: {c.vocab_size:,} tokens; output head: {head}{logit_cap}{embedding_scale}.",
        f"Context: up to {c.max_positions:,} tokens.",
    ]


def _layers(c: TransformerConfig) -> str:
    kinds = [_attention(kind) for kind in c.pattern]
    if len(set(kinds)) == 1:
        return f"Every layer: {kinds[0]}."
    return f"Layers, in a pattern that repeats every {len(kinds)}: {'; '.join(kinds)}."


def _attention(kind: Attention) -> str:
    sees = "attends to all tokens before" if kind.window is None else f"attends to a window of {kind.window:,} tokens"
    return f"{sees}, {'no positions' if kind.rope is None else _rope(kind.rope)}"


def _rope(rope: Rope) -> str:
    part = "" if rope.fraction == 1 else f" on {share(rope.fraction)} of each head"
    match rope.scaling:
        case None:
            scaling = ""
        case LinearScaling(factor):
            scaling = f", positions divided by {factor:g}"
        case Llama3Scaling(factor=factor, original_positions=original):
            scaling = f", scaled as in Llama 3 by {factor:g} from {original:,} positions"
        case YarnScaling(factor=factor, original_positions=original):
            scaling = f", scaled by YaRN by {factor:g} from {original:,} positions"
    return f"rotary positions (theta {rope.theta:,.10g}{scaling}){part}"


def _mlp(mlp: Gated | Ungated | MoE) -> str:
    names = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh form)"}
    match mlp:
        case Gated(hidden, activation, bias):
            return f"{names[activation]}, {hidden:,} hidden{', with biases' if bias else ''}"
        case Ungated(hidden):
            return f"ungated with xIELU, {hidden:,} hidden"
        case MoE():
            shared = f", and a shared expert of {mlp.shared:,} that every token goes to" if mlp.shared else ""
            match mlp.balance:
                case None:
                    balance = ""
                case BalanceLoss(weight):
                    balance = f"; balanced by a loss of weight {weight:g}"
                case BalanceBias(rate):
                    balance = f"; balanced by biases that move by {rate:g} a step"
            return (
                f"a mixture of {mlp.experts} experts ({names[mlp.activation]}, {mlp.hidden:,} hidden each), of which "
                f"each token goes to {mlp.top_k} ({mlp.score} router){shared}{balance}"
            )


# ----------------------------------------------------------------------------------------------------- mixture


def mixture(stage: Mapping[str, Any]) -> str:
    """The recipe of one stage of a mixture, as `Mixture.describe` gives it."""
    said = [_rule(stage)]
    for names in stage["only"]:
        said.append(f"only {_names(names)}")
    if stage["without"]:
        said.append(f"without {_names(stage['without'])}")
    for name, factor in _same_values(stage["scale"]):
        said.append(f"{name} times {factor:g}")
    for name, floor in _same_values(stage["floor"]):
        said.append(f"{name} at least {share(floor)}")
    for level, floor in stage["floor_of_each"].items():
        said.append(f"every {level} at least {share(floor)}")
    return "; ".join(said)


def _rule(rule: Mapping[str, Any]) -> str:
    over = f"each {rule['over']}" if rule["over"] else "each"
    if "temperature" in rule:
        alpha, unit = rule["temperature"], rule["unit"]
        power = {0.0: "alike", 1.0: f"in proportion to its {unit}"}
        dealt = f"{over} {power.get(alpha, f'in proportion to its {unit} ** {alpha:g}')}"
    elif "unimax" in rule:
        dealt = f"{over} as alike as {rule['unimax']:g} epochs allow (UniMax), in {rule['unit']}"
    else:
        shares = ", ".join(f"{cell(name)} {share(value)}" for name, value in rule["shares"].items())
        dealt = f"shares of the {rule['unit']}: {shares}"
    return dealt if rule["within"] is None else f"{dealt}; within it, {_rule(rule['within'])}"


def _same_values(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Names that share a value, together."""
    groups: dict[float, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return [(_names(names), value) for value, names in groups.items()]


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(cell, names))
