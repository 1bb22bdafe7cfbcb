"""The decoder: its configuration, the tree of weights that follows, and the function from tokens to hidden states.

Read it top to bottom. It is a Llama-type transformer: pre-norm RMSNorm, rotary positions, grouped-query attention,
SwiGLU, no biases. The layers' weights are stacked on a leading axis and run by one `lax.scan`, so a model compiles in
the same time whatever its depth.

Shapes: B batch, T sequence, D embed, H heads, G key/value heads, K head_dim, F mlp, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eurollm_jax.errors import UserError
from eurollm_jax.model.attention import attention, document_mask
from eurollm_jax.model.layers import linear, rms_norm, rotary_tables, rotate, swiglu
from eurollm_jax.model.param import Param, Params, Specs, count, stack
from eurollm_jax.parallel.mesh import Layout

type Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int
    max_positions: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tied: bool = False  # the output head is the embedding, transposed
    compute: Dtype = "bfloat16"  # of activations and products; parameters are kept in float32
    remat: Literal["none", "dots", "full"] = "full"  # what a layer recomputes in the backward pass

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "depth", "heads", "kv_heads", "mlp", "head_dim", "max_positions"):
            if getattr(self, field) < 1:
                raise UserError(f"model: {field}={getattr(self, field)} must be 1 or more.")
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: change one of them.")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs: choose an even one.")

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.compute)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one training token, forward and backward, in rows of `length` tokens.

        Six per matrix weight, and twelve per layer, head dimension and key seen, of which the causal mask leaves half.
        The embedding is a look-up and counts nothing; the head is a product and counts. Recomputation is not counted.
        """
        norms = self.width * (2 * self.depth + 1)
        matrices = count(specs(self)) - norms - (0 if self.tied else self.vocab_size * self.width)
        return 6.0 * matrices + 12.0 * self.depth * self.heads * self.head_dim * length / 2


def layer_specs(c: TransformerConfig) -> Specs:
    """The weights of one layer. What is added to the residual stream starts smaller the deeper the model."""
    residual = (2 * c.depth) ** -0.5
    return dict(
        attention_norm=Param(embed=c.width),
        query=Param(embed=c.width, heads=c.heads, head_dim=c.head_dim, fan_in="embed"),
        key=Param(embed=c.width, kv_heads=c.kv_heads, head_dim=c.head_dim, fan_in="embed"),
        value=Param(embed=c.width, kv_heads=c.kv_heads, head_dim=c.head_dim, fan_in="embed"),
        output=Param(heads=c.heads, head_dim=c.head_dim, embed=c.width, fan_in=("heads", "head_dim"), scale=residual),
        mlp_norm=Param(embed=c.width),
        gate=Param(embed=c.width, mlp=c.mlp, fan_in="embed"),
        up=Param(embed=c.width, mlp=c.mlp, fan_in="embed"),
        down=Param(mlp=c.mlp, embed=c.width, fan_in="mlp", scale=residual),
    )


def specs(c: TransformerConfig) -> Specs:
    """The weights of the model."""
    tree: dict[str, Param | Specs] = dict(
        embedding=Param(vocab=c.vocab_size, embed=c.width, fan_in="embed"),
        layers=stack(layer_specs(c), layers=c.depth),
        final_norm=Param(embed=c.width),
    )
    if not c.tied:
        tree["head"] = Param(embed=c.width, vocab=c.vocab_size, fan_in="embed")
    return tree


def layer(
    x: Float[Array, "B T D"],
    weights: Params,
    rotary: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
    c: TransformerConfig,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Any]:
    """One decoder layer. `attend` maps query, key and value to what was attended and what is to be kept of them."""
    w = jax.tree.map(lambda weight: weight.astype(c.dtype), weights)

    with jax.named_scope("attention"):
        h = rms_norm(x, w["attention_norm"], c.norm_eps)
        q_BTHK = layout.constrain(linear(h, w["query"]), "batch", "sequence", "heads", "head_dim")
        k_BTGK = layout.constrain(linear(h, w["key"]), "batch", "sequence", "kv_heads", "head_dim")
        v_BTGK = layout.constrain(linear(h, w["value"]), "batch", "sequence", "kv_heads", "head_dim")
        attended_BTHK, kept = attend(rotate(q_BTHK, rotary), rotate(k_BTGK, rotary), v_BTGK)
        x = x + layout.constrain(linear(attended_BTHK, w["output"], contract=2), "batch", "sequence", "embed")

    with jax.named_scope("mlp"):
        h = rms_norm(x, w["mlp_norm"], c.norm_eps)
        hidden_BTF = swiglu(linear(h, w["gate"]), linear(h, w["up"]))
        hidden_BTF = layout.constrain(hidden_BTF, "batch", "sequence", "mlp")
        x = x + layout.constrain(linear(hidden_BTF, w["down"]), "batch", "sequence", "embed")

    return x, kept


def embed(params: Params, tokens: Int[Array, "B T"], c: TransformerConfig, layout: Layout) -> Float[Array, "B T D"]:
    # Gathered before the cast: the gradient is then summed in float32. In bfloat16 a token's sum stops growing at 256.
    return layout.constrain(params["embedding"][tokens].astype(c.dtype), "batch", "sequence", "embed")


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    c: TransformerConfig,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """Hidden states after the last norm. Attention is causal and stays within a segment."""
    rotary = rotary_tables(positions, c.head_dim, c.rope_theta)
    mask = document_mask(segments)

    def step(x: Array, weights: Params) -> tuple[Array, None]:
        return layer(x, weights, rotary, lambda q, k, v: (attention(q, k, v, mask), None), c, layout)

    x, _ = jax.lax.scan(_remat(step, c), embed(params, tokens, c, layout), params["layers"])
    return rms_norm(x, params["final_norm"], c.norm_eps)


def head(params: Params, c: TransformerConfig) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    return params["embedding"].T if c.tied else params["head"]


def logits(params: Params, hidden: Float[Array, "B T D"], c: TransformerConfig) -> Float[Array, "B T V"]:
    """Float32 logits, all at once: for looking at a model. The loss never holds them (see loss.py)."""
    return linear(hidden, head(params, c).astype(c.dtype)).astype(jnp.float32)


def _remat(step: Callable[..., Any], c: TransformerConfig) -> Callable[..., Any]:
    match c.remat:
        case "none":
            return step
        case "dots":
            return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "full":
            return jax.checkpoint(step)


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

    Keys and values of the tokens past `valid` are written too, and overwritten before anything sees them.
    """
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    rotary = rotary_tables(positions, c.head_dim, c.rope_theta)
    mask = jnp.arange(cache.keys.shape[2]) <= positions[:, :, None]

    def step(x: Array, per_layer: tuple[Params, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        weights, keys, values = per_layer

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            kept = write(keys, k, cache.lengths), write(values, v, cache.lengths)
            return attention(q, *kept, mask), kept

        return layer(x, weights, rotary, attend, c, layout)

    write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (start, 0, 0)))
    x, (keys, values) = jax.lax.scan(
        step, embed(params, tokens, c, layout), (params["layers"], cache.keys, cache.values)
    )
    return rms_norm(x, params["final_norm"], c.norm_eps), Cache(keys, values, cache.lengths + valid)
