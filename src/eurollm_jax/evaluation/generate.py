"""Continues prompts with a model: all at once, and each token computed once, thanks to a cache of keys and values."""

import codecs
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer, half_surrogate
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Params, map_with_path
from eurollm_jax.model.transformer import Cache, empty_cache, extend, logits
from eurollm_jax.parallel.distributed import fetched
from eurollm_jax.parallel.mesh import Layout

PAD_TO = 32  # prompts are padded to a multiple of this, so that most calls find the program compiled
LOOK_EVERY = 16  # tokens from one search for stop strings to the next


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen: at temperature 0 the likeliest; above, by a draw from softmax(logits / temperature).

    The draw is among the `top_k` likeliest tokens (Fan et al. 2018, arXiv:1805.04833), and of what these hold together,
    among the likeliest with a share of `top_p` (Holtzman et al. 2020, arXiv:1904.09751). Tokens that are as likely as
    the last of them are in.
    """

    temperature: float = 0.0
    top_k: int | None = None  # None: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}: it must be 0, for the likeliest token, or above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be 1 or more; leave it out to draw among all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and not above 1.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed is {self.seed}: it must be from 0 to {2**32 - 1}.")


GREEDY = Sampling()


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    `text` ends before what ended it, an end-of-text token or a stop string; `tokens` are all that were drawn, the last
    of them the one that did. Bytes that are no UTF-8 are U+FFFD in the text; a character that the limit of tokens cut
    off is left out.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Literal["eos", "stop", "length"]


def generate(
    params: Params,
    config: TransformerConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> list[Continuation]:
    """What the model writes after each prompt, up to an end-of-text token, a stop string or `max_new_tokens`.

    The first token that completes a stop string is the last, and the text ends before the string, wherever in a token
    that begins. A prompt's draws depend on the seed and on its place in the list, not on the other prompts. Raises
    UserError where a prompt and its new tokens exceed the model's positions, where an empty prompt has no beginning
    mark to begin with, and for a stop string that no text can hold.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be 1 or more.")
    stops = [_stop_bytes(text) for text in stop]
    if not prompts:
        return []
    encoded = _encode(tokenizer, prompts, max_new_tokens, config.max_positions)

    spare = -len(prompts) % layout.ways("batch")  # rows that only make the batch divisible among the devices
    lengths = np.array([len(ids) for ids in encoded] + [1] * spare, np.int32)
    tokens = np.zeros((len(lengths), -(-lengths.max() // PAD_TO) * PAD_TO), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    ended = np.arange(len(lengths)) >= len(prompts)

    vocabulary = min(tokenizer.vocab_size, config.vocab_size)
    program = _Program(
        config,
        layout,
        new=max_new_tokens,
        vocabulary=vocabulary,
        eos_ids=tuple(tokenizer.eos_ids),
        greedy=sampling.temperature == 0,
        cut=sampling.top_k is not None or sampling.top_p < 1,
    )
    dice = _Dice(
        jax.random.key(sampling.seed),
        sampling.temperature or 1.0,
        min(sampling.top_k or vocabulary, vocabulary),
        sampling.top_p,
    )
    params = _cast(params, config)
    state = _read(params, tokens, lengths, dice, program)
    look_every = LOOK_EVERY if stops else max_new_tokens
    written: list[Continuation] = []
    for until in range(look_every, max_new_tokens + look_every, look_every):
        state = _write(params, state, ended, min(until, max_new_tokens), dice, program)
        rows = fetched(state.written)[: len(prompts), :until].tolist()
        written = [_continuation(row, tokenizer, stops) for row in rows]
        ended[: len(prompts)] = [continuation.reason != "length" for continuation in written]
        if ended.all():
            break
    return written


def _encode(tokenizer: Tokenizer, prompts: Sequence[str], new: int, positions: int) -> list[list[int]]:
    """The ids of each prompt, after the beginning mark if there is one."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = [begin + tokenizer.encode(prompt).tolist() for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise UserError(
                f"prompt {number} is empty, and the tokenizer has no beginning mark that could stand for it: "
                "give it a first word."
            )
        if len(ids) + new > positions:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, and with {new} new ones they exceed the model's "
                f"{positions} positions: shorten the prompt or ask for fewer new tokens."
            )
    return encoded


def _stop_bytes(text: str) -> bytes:
    if not text:
        raise UserError("a stop string is empty: every text has that at its beginning; leave it out.")
    if reason := half_surrogate(text):
        raise UserError(f"the stop string {text!r} cannot occur in any text: {reason}.")
    return text.encode()


def _continuation(ids: list[int], tokenizer: Tokenizer, stops: Sequence[bytes]) -> Continuation:
    """What these ids say, up to the first that ends them.

    Stop strings are looked for in bytes: those of a whole character never begin or end within another's.
    """
    eos = next((place for place, token in enumerate(ids) if token in tokenizer.eos_ids), None)
    before = ids[:eos]
    text = tokenizer.decode_bytes(before, continues=True)
    if any(stop in text for stop in stops):

        def complete(count: int) -> bool:
            part = tokenizer.decode_bytes(before[:count], continues=True)
            return any(stop in part for stop in stops)

        count = bisect_left(range(len(before) + 1), True, key=complete)
        text = tokenizer.decode_bytes(before[:count], continues=True)
        text = text[: min(text.index(stop) for stop in stops if stop in text)]
        return Continuation(text.decode("utf-8", "replace"), tuple(before[:count]), "stop")
    if eos is not None:
        return Continuation(text.decode("utf-8", "replace"), tuple(ids[: eos + 1]), "eos")
    return Continuation(codecs.getincrementaldecoder("utf-8")("replace").decode(text), tuple(ids), "length")


class _Dice(NamedTuple):
    """What draws are made with."""

    key: PRNGKeyArray
    temperature: Float[Array, ""] | float
    top_k: Int[Array, ""] | int
    top_p: Float[Array, ""] | float


@dataclass(frozen=True)
class _Program:
    """What the compiled functions are made for."""

    config: TransformerConfig
    layout: Layout
    new: int
    vocabulary: int  # the tokens that the tokenizer knows and the model has room for
    eos_ids: tuple[int, ...]
    greedy: bool
    cut: bool  # draws are not among all tokens


class _State(NamedTuple):
    filled: Int[Array, ""]  # tokens written in each row
    written: Int[Array, "B new"]
    cache: Cache
    done: Bool[Array, "B"]  # what a row holds after its first end-of-text token means nothing


@partial(jax.jit, static_argnames="config")
def _cast(params: Params, config: TransformerConfig) -> Params:
    """The weights in the type that the products have, once and not for each token; without those that the model reads
    in float32."""

    def cast(path: str, weight: Array) -> Array:
        return weight if path == "final_norm" or path.startswith("layers/router") else weight.astype(config.dtype)

    return map_with_path(cast, params)


@partial(jax.jit, static_argnames="program")
def _read(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], dice: _Dice, program: _Program
) -> _State:
    """Reads the prompts, and writes the first token after each."""
    batch, longest = tokens.shape
    cache = empty_cache(batch, longest + program.new, program.config)
    hidden, cache = extend(params, tokens, lengths, cache, program.config, program.layout)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    token = _choose(params, last, jnp.int32(0), dice, program)
    written = jnp.zeros((batch, program.new), jnp.int32).at[:, 0].set(token)
    return _State(jnp.int32(1), written, cache, _is_eos(token, program))


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def _write(
    params: Params, state: _State, ended: Bool[Array, "B"], until: Int[Array, ""], dice: _Dice, program: _Program
) -> _State:
    """Writes on, until there are so many tokens or every row is done or is said to have ended."""

    def unfinished(state: _State) -> Array:
        return (state.filled < until) & ~(state.done | ended).all()

    def write(state: _State) -> _State:
        filled, written, cache, done = state
        last = jax.lax.dynamic_slice_in_dim(written, filled - 1, 1, axis=1)
        hidden, cache = extend(params, last, jnp.ones(len(last), jnp.int32), cache, program.config, program.layout)
        token = _choose(params, hidden[:, 0], filled, dice, program)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], filled, axis=1)
        return _State(filled + 1, written, cache, done | _is_eos(token, program))

    return jax.lax.while_loop(unfinished, write, state)


def _is_eos(token: Int[Array, "B"], program: _Program) -> Bool[Array, "B"]:
    return (token[:, None] == jnp.array(program.eos_ids, jnp.int32)).any(axis=-1)


def _choose(
    params: Params, hidden: Float[Array, "B D"], count: Int[Array, ""], dice: _Dice, program: _Program
) -> Int[Array, "B"]:
    scores = logits(params, hidden[:, None], program.config)[:, 0, : program.vocabulary]
    if program.greedy:
        return jnp.argmax(scores, axis=-1)
    scores = scores / dice.temperature
    if program.cut:
        scores = _likeliest(scores, dice.top_k, dice.top_p)
    rows = jnp.arange(len(scores))
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(dice.key, row), count))(rows)
    return jax.vmap(jax.random.categorical)(keys, scores)


def _likeliest(
    scores: Float[Array, "B V"], top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """The scores, with -inf for those outside the `top_k` highest, and outside the smallest set of the likeliest of
    these that holds `top_p`."""
    ranked = jnp.sort(scores, axis=-1, descending=True)
    lowest = jnp.take(ranked, jnp.array([top_k - 1]), axis=-1)
    ranked = jnp.where(ranked >= lowest, ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # so the first is always kept
    kept = (before < top_p) | (top_p >= 1)  # rounded sums reach 1 too early
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= jnp.maximum(least, lowest), scores, -jnp.inf)
