"""The decoder: the tree of weights that follows from its configuration, and the function from tokens to hidden states.

Read it top to bottom. A layer is two halves, attention and MLP, each of which adds to the residual stream `x`; the
options of config.py are taken where they apply. The layers' weights are stacked on a leading axis and run by one
`lax.scan` over the period of the layers' pattern, so a model compiles in the same time whatever its depth.

Shapes: B batch, T sequence, D embed, H heads, G key/value heads, K head_dim, F mlp, V vocabulary, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eurollm_jax.model.attention import attention, attention_choice, causal_mask, packed_attention
from eurollm_jax.model.config import Attention, Gated, MoE, TransformerConfig, Ungated
from eurollm_jax.model.embedding import look_up
from eurollm_jax.model.layers import activate, linear, rms_norm, rotary_tables, rotate, soft_cap, xielu, xielu_start
from eurollm_jax.model.moe import Routing, mixture_of_experts, moe_specs
from eurollm_jax.model.param import Param, Params, Specs, flatten, stack
from eurollm_jax.model.projections import RESIDUAL, addition, projections
from eurollm_jax.model.remat import layer_input, of_attention, rematerialised
from eurollm_jax.parallel.mesh import Layout

type Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# ---------------------------------------------------------------------------------------------------- the weights


def specs(c: TransformerConfig) -> Specs:
    """The weights of the model."""
    tree: dict[str, Param | Specs] = dict(
        embedding=Param(vocab=c.vocab_size, embed=c.width, fan_in="embed"),
        layers=stack(layer_specs(c), layers=c.depth),
        final_norm=_gain(c, embed=c.width),
    )
    if not c.tied:
        tree["head"] = Param(embed=c.width, vocab=c.vocab_size, fan_in="embed")
    return tree


def layer_specs(c: TransformerConfig) -> Specs:
    """The weights of one layer. What is added to the residual stream starts smaller the deeper the model."""
    residual = (2 * c.depth) ** -0.5
    norms = {"pre": ("norm",), "post": ("post_norm",), "both": ("norm", "post_norm")}[c.norm.place]
    return dict(
        **{f"{half}_{norm}": _gain(c, embed=c.width) for half in ("attention", "mlp") for norm in norms},
        **attention_specs(c, residual),
        **mlp_specs(c, residual),
    )


def attention_specs(c: TransformerConfig, residual: float) -> Specs:
    heads: dict[str, Any] = dict(heads=c.heads, head_dim=c.head_dim)
    kv_heads: dict[str, Any] = dict(kv_heads=c.kv_heads, head_dim=c.head_dim)
    tree = dict(
        query=Param(embed=c.width, **heads, fan_in="embed"),
        key=Param(embed=c.width, **kv_heads, fan_in="embed"),
        value=Param(embed=c.width, **kv_heads, fan_in="embed"),
        output=Param(**heads, embed=c.width, fan_in=("heads", "head_dim"), scale=residual),
    )
    if c.attention_bias != "none":
        tree |= dict(
            query_bias=Param(**heads, start=0.0),
            key_bias=Param(**kv_heads, start=0.0),
            value_bias=Param(**kv_heads, start=0.0),
        )
    if c.attention_bias == "all":
        tree |= dict(output_bias=Param(embed=c.width, start=0.0))
    match c.qk_norm:
        case "head":
            tree |= dict(query_norm=_gain(c, head_dim=c.head_dim), key_norm=_gain(c, head_dim=c.head_dim))
        case "full":
            tree |= dict(query_norm=_gain(c, **heads), key_norm=_gain(c, **kv_heads))
    return tree


def mlp_specs(c: TransformerConfig, residual: float) -> Specs:
    match c.mlp:
        case Gated(hidden, _, bias):
            tree = dict(
                gate=Param(embed=c.width, mlp=hidden, fan_in="embed"),
                up=Param(embed=c.width, mlp=hidden, fan_in="embed"),
                down=Param(mlp=hidden, embed=c.width, fan_in="mlp", scale=residual),
            )
            if bias:
                tree |= dict(
                    gate_bias=Param(mlp=hidden, start=0.0),
                    up_bias=Param(mlp=hidden, start=0.0),
                    down_bias=Param(embed=c.width, start=0.0),
                )
            return tree
        case Ungated(hidden):
            return dict(
                up=Param(embed=c.width, mlp=hidden, fan_in="embed"),
                down=Param(mlp=hidden, embed=c.width, fan_in="mlp", scale=residual),
                alpha_positive=Param(slope=1, start=xielu_start("positive")),
                alpha_negative=Param(slope=1, start=xielu_start("negative")),
            )
        case MoE():
            return moe_specs(c.width, c.mlp, residual)


def _gain(c: TransformerConfig, **axes: Any) -> Param:
    return Param(**axes, start=0.0 if c.norm.gain == "one_plus_weight" else 1.0)


# ------------------------------------------------------------------------------------------------------ one layer


class LayerOutput(NamedTuple):
    kept: Any  # what `attend` keeps of keys and values
    routing: Routing | None  # of a mixture of experts


def layer(
    x: Float[Array, "B T D"],
    weights: Params,
    rotary: tuple[Array, Array] | None,
    attend: Attend,
    real: Bool[Array, "B T"],
    c: TransformerConfig,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], LayerOutput]:
    """One decoder layer. `attend` maps query, key and value to what was attended and what is to be kept of them;
    `real` is False at padding, which a router does not count."""
    x = layer_input(x)
    w = {name: _cast(name, weight, c) for name, weight in weights.items()}

    def norm(x: Array, name: str) -> Array:
        return layout.constrain(rms_norm(x, w[name], c.norm), *RESIDUAL) if name in w else x

    with jax.named_scope("attention"):
        attended, kept = attention_half(norm(x, "attention_norm"), w, rotary, attend, c, layout)
        x = x + norm(attended, "attention_post_norm")

    with jax.named_scope("mlp"):
        h, routing = mlp_half(norm(x, "mlp_norm"), w, real, c, layout)
        x = x + norm(h, "mlp_post_norm")

    return x, LayerOutput(kept, routing)


def attention_half(
    h: Float[Array, "B T D"],
    w: Params,
    rotary: tuple[Array, Array] | None,
    attend: Attend,
    c: TransformerConfig,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Any]:
    q_BTHK, k_BTGK, v_BTGK = projections(h, w, ("query", "key", "value"), layout)
    if c.qk_norm == "head":
        q_BTHK, k_BTGK = rms_norm(q_BTHK, w["query_norm"], c.norm), rms_norm(k_BTGK, w["key_norm"], c.norm)
    elif c.qk_norm == "full":
        q_BTHK, k_BTGK = _norm_of_all_heads(q_BTHK, w["query_norm"], c), _norm_of_all_heads(k_BTGK, w["key_norm"], c)
    q_BTHK = layout.constrain(q_BTHK, "batch", "sequence", "heads", "head_dim")
    k_BTGK = layout.constrain(k_BTGK, "batch", "sequence", "kv_heads", "head_dim")
    v_BTGK = layout.constrain(v_BTGK, "batch", "sequence", "kv_heads", "head_dim")
    q_BTHK, k_BTGK = rotate(q_BTHK, rotary), rotate(k_BTGK, rotary)
    attended_BTHK, kept = attend(of_attention(q_BTHK), of_attention(k_BTGK), of_attention(v_BTGK))
    return addition(attended_BTHK, w, "output", layout, contract=2), kept


def mlp_half(
    h: Float[Array, "B T D"], w: Params, real: Bool[Array, "B T"], c: TransformerConfig, layout: Layout
) -> tuple[Float[Array, "B T D"], Routing | None]:
    match c.mlp:
        case MoE():
            out, routing = mixture_of_experts(h, w, real, c.mlp, layout)
            return layout.constrain(out, *RESIDUAL), routing
        case Gated(_, activation, _):
            up_BTF, gate_BTF = projections(h, w, ("up", "gate"), layout)
            hidden_BTF = activate(gate_BTF, activation) * up_BTF
        case Ungated():
            (up_BTF,) = projections(h, w, ("up",), layout)
            hidden_BTF = xielu(up_BTF, w["alpha_positive"], w["alpha_negative"])
    hidden_BTF = layout.constrain(hidden_BTF, "batch", "sequence", "mlp")
    return addition(hidden_BTF, w, "down", layout), None


def _norm_of_all_heads(x: Float[Array, "B T H K"], weight: Float[Array, "H K"], c: TransformerConfig) -> Array:
    return rms_norm(x.reshape(*x.shape[:2], -1), weight.reshape(-1), c.norm).reshape(x.shape)


def _cast(name: str, weight: Any, c: TransformerConfig) -> Any:
    """Weights in the type of the products; the router chooses in float32."""
    return weight if name.startswith("router") else jax.tree.map(lambda part: part.astype(c.dtype), weight)


# --------------------------------------------------------------------------------------------------- all of them


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    c: TransformerConfig,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Routing | None]:
    """Hidden states after the last norm, and how the layers' routers spread the tokens, where there are any.

    Attention is causal and stays within a segment; segment 0 is padding.
    """
    real = segments > 0
    kernel, _ = attention_choice(c, layout)
    rotary = {kind: _rotary(kind, positions, c) for kind in c.pattern}

    def step(kind: Attention, x: Array, weights: Params) -> tuple[Array, LayerOutput]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            how = dict(window=kind.window, scale=c.attention_scale, cap=c.attention_cap, kernel=kernel, layout=layout)
            return packed_attention(q, k, v, segments, **how), None  # type: ignore[arg-type]

        return layer(x, weights, rotary[kind], attend, real, c, layout)

    x, outputs = _over_layers(step, embed(params, tokens, c, layout), params["layers"], c)
    return rms_norm(x, params["final_norm"], c.norm), outputs.routing


def embed(params: Params, tokens: Int[Array, "B T"], c: TransformerConfig, layout: Layout) -> Float[Array, "B T D"]:
    x = look_up(params["embedding"], tokens, c.dtype, layout)
    return x if c.embedding_scale == 1.0 else x * jnp.asarray(c.embedding_scale, c.dtype)


def head(params: Params, c: TransformerConfig) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    return params["embedding"].T if c.tied else params["head"]


def logits(params: Params, hidden: Float[Array, "B T D"], c: TransformerConfig) -> Float[Array, "B T V"]:
    """Float32 logits, all at once: for looking at a model. The loss never holds them (see loss.py)."""
    return soft_cap(linear(hidden, head(params, c).astype(c.dtype)).astype(jnp.float32), c.logit_cap)


def _rotary(kind: Attention, positions: Array, c: TransformerConfig) -> tuple[Array, Array] | None:
    return None if kind.rope is None else rotary_tables(positions, c.head_dim, kind.rope)


def _over_layers(
    step: Callable[[Attention, Array, Any], tuple[Array, LayerOutput]], x: Array, stacked: Any, c: TransformerConfig
) -> tuple[Array, LayerOutput]:
    """Runs `step(kind, x, one layer of stacked)` down the depth; returns the last x and the stacked outputs.

    The scan runs over whole periods of the pattern. Layers left over at the end are run after it.
    """
    period = len(c.pattern)
    rounds, rest = divmod(c.depth, period)

    def one_layer(at: int, x: Array, part: Any) -> tuple[Array, LayerOutput]:
        """The layer's weights are taken here, within what is recomputed: taken outside, all layers' would be kept."""
        return step(c.pattern[at], x, jax.tree.map(lambda leaf: leaf[at], part))

    def one_round(x: Array, part: Any) -> tuple[Array, LayerOutput]:
        outputs = []
        for at in range(period):
            x, output = rematerialised(partial(one_layer, at), c.remat)(x, part)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    in_rounds = jax.tree.map(lambda leaf: leaf[: rounds * period].reshape(rounds, period, *leaf.shape[1:]), stacked)
    x, outputs = jax.lax.scan(one_round, x, in_rounds)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(rounds * period, *leaf.shape[2:]), outputs)
    left_over = []
    for at in range(rest):
        last = jax.tree.map(lambda leaf, at=at: leaf[rounds * period + at], stacked)
        x, output = rematerialised(partial(step, c.pattern[at]), c.remat)(x, last)
        left_over.append(output)
    if left_over:
        outputs = jax.tree.map(lambda leaves, *more: jnp.concatenate([leaves, jnp.stack(more)]), outputs, *left_over)
    return x, outputs


def flops_per_token(c: TransformerConfig, length: int) -> float:
    """Floating-point operations of one training token, forward and backward, in rows of `length` tokens.

    Six per matrix weight that the token meets, and twelve per layer, head dimension and key seen: on average half of
    the row, or less where a window is shorter. The embedding is a look-up and counts nothing; the head is a product and
    counts. Recomputation is not counted.
    """
    windows = [min(c.kind(layer).window or length, length) for layer in range(c.depth)]
    keys = sum(window * (1 - window / (2 * length)) for window in windows)
    return 6.0 * active_matrix_weights(c) + 12.0 * c.heads * c.head_dim * keys


def active_matrix_weights(c: TransformerConfig) -> int:
    """The weights that one token is multiplied with: of a mixture of experts, those of the experts it is sent to."""
    total = 0
    for path, spec in flatten(specs(c)).items():
        if spec.fan_in and (path != "embedding" or c.tied):
            total += spec.size * c.mlp.top_k // c.mlp.experts if "/experts/" in path else spec.size  # type: ignore[union-attr]
    return total


# ---------------------------------------------------------------------------------------------------- generation


class Cache(NamedTuple):
    """Keys and values of what was read so far, for generation: [layers, B, S, G, K] each, filled up to `lengths`."""

    keys: Float[Array, "L B S G K"]
    values: Float[Array, "L B S G K"]
    lengths: Int[Array, "B"]


def empty_cache(batch: int, capacity: int, c: TransformerConfig) -> Cache:
    shape = (c.depth, batch, capacity, c.kv_heads, c.head_dim)
    return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), jnp.zeros(batch, jnp.int32))


def extend(
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Int[Array, "B"],
    cache: Cache,
    c: TransformerConfig,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Reads T more tokens, of which the first `valid` of each row are meant, and returns their hidden states.

    Keys and values of the tokens past `valid` are written too, and overwritten before anything sees them: the cache has
    room for all T.
    """
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    places = jnp.arange(cache.keys.shape[2])
    seen = {kind: (causal_mask(positions, places, kind.window), _rotary(kind, positions, c)) for kind in c.pattern}
    write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (start, 0, 0)))

    def step(kind: Attention, x: Array, part: tuple[Params, Array, Array]) -> tuple[Array, LayerOutput]:
        weights, keys, values = part
        mask, rotary = seen[kind]

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            kept = write(keys, k, cache.lengths), write(values, v, cache.lengths)
            return attention(q, *kept, mask, scale=c.attention_scale, cap=c.attention_cap), kept

        return layer(x, weights, rotary, attend, jnp.ones_like(positions, bool), c, layout)

    stacked = (params["layers"], cache.keys, cache.values)
    x, outputs = _over_layers(step, embed(params, tokens, c, layout), stacked, c)
    keys, values = outputs.kept
    return rms_norm(x, params["final_norm"], c.norm), Cache(keys, values, cache.lengths + valid)
