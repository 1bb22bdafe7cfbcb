"""Reads a config.json field by field, and refuses by name what nobody read.

A field that a reader ignores can change what the model computes: a peer lost 0.77 nats per token to one. So each family
takes the fields that it knows, and what is left over is an error.
"""

import math
from collections.abc import Mapping
from typing import Any

from eurollm_jax.errors import UserError

# Fields that change nothing about the function from tokens to logits, or are read elsewhere.
NEUTRAL = frozenset(
    (
        *("_name_or_path", "transformers_version", "transformers.js_config", "architectures", "model_type", "auto_map"),
        *("dtype", "torch_dtype", "initializer_range", "attention_dropout", "use_cache", "cache_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "_attn_implementation"),
        *("_attn_implementation_autoset", "_commit_hash"),
        *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("id2label", "label2id", "problem_type", "tokenizer_class", "hidden_dropout", "classifier_dropout"),
    )
)

_MISSING = object()


class Fields:
    """The fields of one config.json. A field that is null counts as left out, but for those where a family asks."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = {name: value for name, value in raw.items() if value is not None}
        self._null = raw.keys() - self.raw.keys()
        self.where = where
        self._read: set[str] = set()

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field; UserError where it is left out and has no default."""
        self._read.add(name)
        if name in self.raw:
            return self.raw[name]
        if default is _MISSING:
            raise self.error(f"{name} is missing")
        return default

    def null(self, name: str) -> bool:
        """Whether a field is given as null. Transformers takes that for none, and a field left out for its default."""
        return name in self._null

    def count(self, name: str, default: Any = _MISSING) -> int:
        """A whole number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{name} is {value!r}, and must be a positive integer")
        return value

    def real(self, name: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(f"{name} is {value!r}, and must be a positive number")
        return float(value)

    def real_or_none(self, name: str) -> float | None:
        return self.real(name) if name in self.raw else self.take(name, None)

    def flag(self, name: str, default: bool) -> bool:
        value = None if default and self.null(name) else self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {value!r}, and must be true or false")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """Refuses all values but these; the field may be left out."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise self.error(f"{name} is {value!r}, and only {' or '.join(map(repr, allowed))} is supported")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that this family keeps for reasons of its own."""
        self._read.update(names)

    def refuse_rest(self) -> None:
        """Raises UserError with the names of fields that were never read."""
        if rest := sorted(self.raw.keys() - self._read - NEUTRAL):
            raise self.error(
                f"{', '.join(rest)} may change what the model computes and is not supported: delete the field if you "
                "know that it does not matter"
            )

    def error(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}.")
