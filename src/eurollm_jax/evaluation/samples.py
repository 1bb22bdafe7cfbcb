"""Continuations of held-out texts, one for each language: what no figure shows."""

from collections.abc import Sequence
from typing import Any

from eurollm_jax.corpus.store import Source
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.evaluation.generate import Sampling, generate
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Params
from eurollm_jax.parallel.mesh import Layout

PROMPT_CHARACTERS = 48


def opening(source: Source, tokenizer: Tokenizer) -> str:
    """The first words of the source's longest document."""
    lengths = source.byte_lengths
    text = tokenizer.decode(source.document_tokens(int(lengths.argmax()))[1:-1])
    start = text.replace("\n", " ")[:PROMPT_CHARACTERS]
    return start.rsplit(" ", 1)[0] if " " in start else start


def _fitting(text: str, tokenizer: Tokenizer, room: int) -> str:
    """The longest beginning of a text that takes at most `room` tokens."""
    while len(tokenizer.encode(text)) > room:
        text = text[:-1]
    return text


def sample(
    params: Params,
    config: TransformerConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    *,
    new_tokens: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.9,
) -> list[dict[str, Any]]:
    """The content of samples.json. In a model of few positions, prompts and continuations share them equally."""
    new_tokens = min(new_tokens, config.max_positions // 2)
    room = config.max_positions - new_tokens - 1  # a beginning mark stands before each prompt
    prompts = [_fitting(opening(source, tokenizer), tokenizer, room) for source in sources]
    continuations = generate(
        params,
        config,
        layout,
        tokenizer,
        prompts,
        max_new_tokens=new_tokens,
        sampling=Sampling(temperature, top_p=top_p),
    )
    return [
        {"language": source.language, "prompt": prompt, "continuation": continuation.text, "temperature": temperature}
        for source, prompt, continuation in zip(sources, prompts, continuations, strict=True)
    ]
