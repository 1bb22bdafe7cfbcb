"""Continues prompts with a model: all at once, and each token computed once, thanks to a cache of keys and values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.model.param import Params
from eurollm_jax.model.transformer import Cache, TransformerConfig, empty_cache, extend, logits
from eurollm_jax.parallel.mesh import Layout

PAD_TO = 32  # prompts are padded to a multiple of this, so that most calls find the program compiled


def generate(
    params: Params,
    config: TransformerConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """What the model writes after each prompt, up to its end of document or to `max_new_tokens`.

    At temperature 0 the likeliest token is taken. Above, tokens are drawn from softmax(logits / temperature), of which
    only the likeliest tokens that together hold `top_p` are kept (Holtzman et al. 2020, arXiv:1904.09751). A prompt's
    draws depend on `seed` and on its place in the list, not on the other prompts. Raises UserError where a prompt and
    its new tokens exceed the model's positions.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, temperature {temperature} and top_p {top_p}: "
            f"they must be at least 1, at least 0, and above 0 but not above 1."
        )
    if not prompts:
        return []
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if len(ids) + max_new_tokens > config.max_positions:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, and with {max_new_tokens} new ones they exceed the model's "
                f"{config.max_positions} positions: shorten the prompt or ask for fewer new tokens."
            )

    ways = layout.ways("batch")
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    spare = -len(prompts) % ways  # rows that only make the batch divisible among the devices
    lengths = np.pad(lengths, (0, spare), constant_values=1)
    longest = -(-lengths.max() // PAD_TO) * PAD_TO
    tokens = np.full((len(lengths), longest), tokenizer.bos_id, np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    wanted = np.arange(len(lengths)) < len(prompts)

    written = _continue(
        params,
        tokens,
        lengths,
        wanted,
        jax.random.key(seed),
        temperature or 1.0,
        top_p,
        new=max_new_tokens,
        eos=tokenizer.eos_id,
        greedy=temperature == 0,
        config=config,
        layout=layout,
    )
    rows = np.asarray(written)[: len(prompts)].tolist()
    return [tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row) for row in rows]


@partial(jax.jit, static_argnames=("new", "eos", "greedy", "config", "layout"))
def _continue(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    wanted: Array,
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    new: int,
    eos: int,
    greedy: bool,
    config: TransformerConfig,
    layout: Layout,
) -> Int[Array, "B new"]:
    """The new tokens of each row; what follows the first `eos` means nothing. Ends when every row has one."""
    params = jax.tree.map(lambda weight: weight.astype(config.dtype), params)  # once, not for each token
    batch, longest = tokens.shape

    def choose(hidden: Float[Array, "B D"], step: Int[Array, ""]) -> Int[Array, "B"]:
        scores = logits(params, hidden[:, None], config)[:, 0]
        if greedy:
            return jnp.argmax(scores, axis=-1)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(batch))
        return jax.vmap(jax.random.categorical)(keys, _likeliest(scores / temperature, top_p))

    def unfinished(state: tuple[Array, Array, Cache, Array]) -> Array:
        step, _, _, done = state
        return (step < new) & ~done.all()

    def write(state: tuple[Array, Array, Cache, Array]) -> tuple[Array, Array, Cache, Array]:
        step, written, cache, done = state
        last = jax.lax.dynamic_slice_in_dim(written, step - 1, 1, axis=1)
        hidden, cache = extend(params, last, jnp.ones_like(lengths), cache, config, layout)
        token = choose(hidden[:, 0], step)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], step, axis=1)
        return step + 1, written, cache, done | (token == eos)

    hidden, cache = extend(params, tokens, lengths, empty_cache(batch, longest + new, config), config, layout)
    ends = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    token = jnp.where(wanted, choose(ends, jnp.int32(0)), eos)
    written = jnp.full((batch, new), eos).at[:, 0].set(token)
    _, written, _, _ = jax.lax.while_loop(unfinished, write, (jnp.int32(1), written, cache, token == eos))
    return written


def _likeliest(scores: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """The scores, with -inf for those outside the smallest set of likeliest tokens that holds `top_p`."""
    ranked = jnp.sort(scores, axis=-1, descending=True)
    shares = jax.nn.softmax(ranked, axis=-1)
    kept = jnp.cumsum(shares, axis=-1) - shares < top_p  # what is before a token; so the first is always kept
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= least, scores, -jnp.inf)
