"""Family: all that sets one Hugging Face architecture apart, as a value. And what the families have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from eurollm_jax.errors import UserError
from eurollm_jax.hf.fields import Fields
from eurollm_jax.hf.mapping import Table
from eurollm_jax.model.config import Activation, Attention, BalanceBias, Gated, MoE, TransformerConfig, Ungated
from eurollm_jax.model.param import flatten
from eurollm_jax.model.transformer import specs


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, which our decoder can be where its options say so.

    `read` makes our configuration of the fields of config.json, and `write` the reverse, with the fields of the older
    and of the newer schema. `write` may be given any configuration with this family's kind of MLP: what it cannot say
    shows when it is read back.
    """

    architecture: str  # the class, such as LlamaForCausalLM
    model_type: str
    table: Table
    read: Callable[[Fields], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    mlp: type[Gated | Ungated | MoE] = Gated
    constants: Mapping[str, float] = field(default_factory=dict)
    """Tensors that hold a number which is part of the code, by name with {layers}: checked, and written again."""
    exported_as: str | None = None
    """For what is only read, the text model of one with images: the architecture that its exports are."""
    spellings: tuple[Mapping[str, str], ...] = ({},)
    """Ways in which files begin the names of the table: the beginnings, and what stands in their place."""
    set_aside: tuple[str, ...] = ()
    """How names begin of tensors of other parts of the model, which are left out."""

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
        """The model that a config.json describes; UserError names the field that our decoder cannot follow."""
        fields = Fields(raw, where)
        config = self.read(fields)
        fields.refuse_rest()
        return config

    def lacks(self, config: TransformerConfig) -> list[str]:
        """The fields of `config` that this architecture cannot say; empty where it can say all."""
        if type(config.mlp) is not self.mlp:
            return ["mlp"]
        wanted = canonical(config)
        try:
            said = canonical(self.config(self.write(config), self.architecture))
        except UserError as error:
            return [str(error)]
        differing = _differing(wanted, said)
        unnamed = [] if differing else sorted(flatten(specs(config)).keys() - self.table.keys())
        return differing + unnamed


def _differing(wanted: Any, said: Any, under: str = "") -> list[str]:
    """The names of the fields that differ; of options of one type, the names of theirs."""
    names = []
    for name, value in vars(wanted).items():
        other = getattr(said, name)
        if is_dataclass(value) and type(value) is type(other):
            names += _differing(value, other, f"{under}{name}.")
        elif value != other:
            names.append(under + name)
    return names


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The same function from tokens to logits, written in one way: without what only training knows."""
    mlp = config.mlp
    if isinstance(mlp, MoE):
        mlp = replace(mlp, z_loss=0.0, balance=BalanceBias() if isinstance(mlp.balance, BalanceBias) else None)
    pattern = shortest_pattern([config.kind(layer) for layer in range(config.depth)])
    scale = None if config.attention_scale == config.head_dim**-0.5 else config.attention_scale
    computed = dict(compute="bfloat16", remat="full", attention_kernel="auto")
    return replace(config, mlp=mlp, pattern=pattern, attention_scale=scale, **computed)  # type: ignore[arg-type]


def shortest_pattern(kinds: list[Attention]) -> tuple[Attention, ...]:
    """The shortest pattern that repeats down the depth to these kinds of layers."""
    periods = range(1, len(kinds) + 1)
    period = next(p for p in periods if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    return tuple(kinds[:period])


def read_sizes(fields: Fields, *, max_positions: int, head_dim: int | None = None, kv_heads: int | None = None) -> Any:
    """The fields of the same name in all families, as keywords; the arguments are what a family takes for left out."""
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = heads if fields.null("num_key_value_heads") else kv_heads or heads
    return dict(
        vocab_size=fields.count("vocab_size"),
        width=width,
        depth=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", kv_heads),
        head_dim=fields.count("head_dim", head_dim or width // heads),
        max_positions=fields.count("max_position_embeddings", max_positions),
    )


def write_sizes(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied,
    }


ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_gated(fields: Fields, *, bias: bool = False) -> Gated:
    """The MLP of a family that takes any activation for its gate."""
    return Gated(fields.count("intermediate_size"), read_activation(fields), bias)


def write_gated(config: TransformerConfig) -> dict[str, Any]:
    """Beside the size, which `write_sizes` says."""
    assert isinstance(config.mlp, Gated)
    return write_activation(config.mlp.activation)


def read_activation(fields: Fields) -> Activation:
    return ACTIVATIONS[fields.only("hidden_act", *ACTIVATIONS)]


def write_activation(activation: Activation) -> dict[str, Any]:
    return {"hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == activation)}


def layer_types(config: TransformerConfig) -> list[str]:
    """Of each layer, as transformers names them."""
    kinds = (config.kind(layer) for layer in range(config.depth))
    return ["full_attention" if kind.window is None else "sliding_attention" for kind in kinds]


def read_layer_types(fields: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Which layers have a sliding window: as `layer_types` says, and `otherwise` where it is left out."""
    names = {"full_attention": False, "sliding_attention": True}
    said = fields.take("layer_types", None)
    if said is None:
        return list(otherwise)
    if not isinstance(said, list) or len(said) != len(otherwise) or any(kind not in names for kind in said):
        raise fields.error(
            f"layer_types is {said!r}, and must be a list with {' or '.join(names)} for each of {len(otherwise)} layers"
        )
    return [names[kind] for kind in said]


def width_over_heads(fields: Fields) -> None:
    """Refuses what transformers refuses of some architectures, whatever their head_dim."""
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if width % heads:
        raise fields.error(
            f"hidden_size (width) {width} is not a multiple of num_attention_heads (heads) {heads}, which transformers "
            "demands of this architecture whatever its head_dim"
        )
