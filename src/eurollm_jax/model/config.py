"""TransformerConfig: what a decoder is made of. Each choice is a type or a named literal, and holds only what it needs.

One decoder covers the families that European laboratories train: a plain Llama says nothing but its sizes, and the
others say where they differ.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp

from eurollm_jax.errors import UserError

type Dtype = Literal["float32", "bfloat16"]
type Activation = Literal["silu", "gelu", "gelu_tanh"]
type AttentionKernel = Literal["reference", "blockwise", "cudnn", "pallas"]


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3, arXiv:2407.21783)."""

    factor: float
    original_positions: int  # that the model was trained with before
    low_frequency: float = 1.0  # turns in the original positions, up to which a frequency is slow
    high_frequency: float = 4.0  # from which on it is fast


@dataclass(frozen=True)
class YarnScaling:
    """Like Llama 3's, but blended along the dimensions (Peng et al. 2023, arXiv:2309.00071).

    Queries and keys grow, too: `attention_factor` multiplies cosine and sine; None takes 0.1 ln(factor) + 1.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0  # turns in the original positions from which on a frequency is kept
    beta_slow: float = 1.0  # up to which it is divided
    attention_factor: float | None = None
    truncate: bool = True  # the bounds between which frequencies are blended are whole dimensions


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    theta: float = 1e4
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    fraction: float = 1.0  # of the head's dimensions, the first ones, that are turned

    def turned(self, head_dim: int) -> int:
        """How many of a head's dimensions are turned."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class Attention:
    """What the attention of a layer sees, and how it tells positions apart."""

    window: int | None = None  # keys that a query sees, its own included; None: all before it
    rope: Rope | None = field(default_factory=Rope)  # None: no positions (Kazemnejad et al. 2023, arXiv:2305.19466)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, and where a layer has it: before each half, after it (before it is added), or both."""

    place: Literal["pre", "post", "both"] = "pre"
    eps: float = 1e-5
    gain: Literal["weight", "one_plus_weight"] = "weight"


@dataclass(frozen=True)
class Gated:
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class Ungated:
    """down(xielu(up(x))), xIELU with two learnt slopes for each layer (Huang & Schlag 2024, arXiv:2411.13010)."""

    hidden: int


@dataclass(frozen=True)
class BalanceLoss:
    """Adds weight * experts * sum over experts of (share of tokens * mean probability) to the loss (Fedus et al. 2021,
    arXiv:2101.03961), which is `weight * top_k` where tokens are spread evenly. The mean over the layers is taken."""

    weight: float


@dataclass(frozen=True)
class BalanceBias:
    """A bias on each expert's score, for the choice alone, which moves by `rate` after each step towards an even load
    (Wang et al. 2024, arXiv:2408.15664)."""

    rate: float = 1e-3


@dataclass(frozen=True)
class MoE:
    """Mixture of gated experts: each token goes to the `top_k` with the highest scores, none is dropped.

    Their outputs are weighted by softmax or sigmoid of the router's logits, which are made to sum to one where
    `normalised`, times `scale`.
    """

    experts: int
    top_k: int
    hidden: int  # of each expert
    activation: Activation = "silu"
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    shared: int = 0  # hidden size of an expert that every token goes to; 0: there is none
    balance: BalanceLoss | BalanceBias | None = None
    z_loss: float = 0.0  # weight of the mean of logsumexp(router logits)^2 (Zoph et al. 2022, arXiv:2202.08906)


type Remat = Literal["none", "dots", "attention", "full", "offload"]
"""What the backward pass finds of a layer, from the fastest to what takes least memory of the device:

    none       all that it needs
    dots       the results of products with weights
    attention  the layer's input, queries, keys, values, and what was attended
    full       the layer's input: everything in it is computed twice
    offload    the same as "attention", in the memory of the host
"""


@dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    mlp: Gated | Ungated | MoE
    pattern: tuple[Attention, ...] = (Attention(),)  # of the layers; it repeats down the depth
    norm: Norm = Norm()
    qk_norm: Literal["none", "head", "full"] = "none"  # of queries and keys: over each head, or all heads together
    attention_bias: Literal["none", "qkv", "all"] = "none"  # "all": on the output, too
    attention_scale: float | None = None  # of the products of queries and keys; None: head_dim^-1/2
    attention_cap: float | None = None  # they become cap * tanh(product / cap)
    logit_cap: float | None = None  # and so do the logits
    embedding_scale: float = 1.0  # embeddings are multiplied by it
    tied: bool = False  # the output head is the embedding, transposed
    compute: Dtype = "bfloat16"  # of activations and products; parameters are kept in float32
    remat: Remat = "full"  # what the backward pass finds of a layer; the rest is computed again
    attention_kernel: AttentionKernel | Literal["auto"] = "auto"  # how attention is computed, not what it is

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "max_positions"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be 1 or more")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: change one",
        )
        _require(self.mlp.hidden >= 1, f"mlp.hidden={self.mlp.hidden} must be 1 or more")
        _require(
            1 <= len(self.pattern) <= self.depth,
            f"a pattern of {len(self.pattern)} layers does not fit a depth of {self.depth}: give one layer at least, "
            "and at most all of them",
        )
        for kind in self.pattern:
            _require(kind.window is None or kind.window >= 1, f"window={kind.window} must be 1 or more, or None")
            if kind.rope is not None:
                turned = kind.rope.turned(self.head_dim)
                _require(
                    0 < turned <= self.head_dim and turned % 2 == 0,
                    f"rotary positions turn pairs, and fraction={kind.rope.fraction} of head_dim={self.head_dim} is "
                    f"{turned} dimensions: choose an even number of them",
                )
                if isinstance(scaling := kind.rope.scaling, Llama3Scaling):
                    _require(
                        scaling.low_frequency < scaling.high_frequency,
                        f"low_frequency={scaling.low_frequency} must be below high_frequency={scaling.high_frequency}",
                    )
        for name in ("attention_scale", "attention_cap", "logit_cap", "embedding_scale"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name}={value} must be above 0")
        if isinstance(self.mlp, MoE):
            _require(
                1 <= self.mlp.top_k <= self.mlp.experts,
                f"top_k={self.mlp.top_k} of experts={self.mlp.experts}: choose from 1 to all of them",
            )
            _require(self.mlp.shared >= 0, f"mlp.shared={self.mlp.shared} must be 0 or more")

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.compute)

    def kind(self, layer: int) -> Attention:
        """What the attention of a layer sees, counted from 0."""
        return self.pattern[layer % len(self.pattern)]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(f"model: {otherwise}.")
