"""Held-out bits per byte for each language: the sum of nats over the sum of raw UTF-8 bytes, and nothing else.

Every document is read as the model reads its training text: first a beginning mark, then each token predicted from
those before it in its row, then the end mark. All predictions are charged, the end mark's too, so 2^-bits is a
probability over whole documents and the figure can stand beside a compressor's. Each token is predicted exactly once;
context does not reach beyond the start of a row.
"""

import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import batched, pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from eurollm_jax.corpus.store import Source, TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.packing import ConcatPacking, pack
from eurollm_jax.languages import resolve
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.loss import SourceSums, batch_loss, sum_by_source
from eurollm_jax.model.param import Params
from eurollm_jax.parallel.mesh import Layout

DEFINITION = (
    "Bits per byte = sum of nats / ln 2 / raw UTF-8 bytes of the held-out documents; every token and the end of each "
    "document are charged, each predicted once from the tokens before it in its row. xz: `xz -9e` over the same "
    "documents joined by newlines. Order 0: the entropy of their byte frequencies, a bound for every fixed code "
    "of single bytes."
)


@dataclass(frozen=True)
class HeldOut:
    """A store of held-out text, read in rows of the training data's length. Sources of one language are measured
    together."""

    store: TokenStore
    length: int
    batch_size: int

    @cached_property
    def languages(self) -> dict[str, list[Source]]:
        """The sources of each language, by its code."""
        found: dict[str, list[Source]] = {}
        for source in sorted(self.store.sources.values(), key=lambda source: (source.language, source.name)):
            found.setdefault(source.language, []).append(source)
        return found

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """All sources, those of a language together."""
        return tuple(source for found in self.languages.values() for source in found)

    def batches(
        self, rows_per_source: int | None = None, *, by: Literal["language", "source"] = "language"
    ) -> Iterator[Batch]:
        """The first rows of every source (default: all), source after source, the last batch filled up with padding.

        `source` of these batches is the number of the language among `languages`, or of the source among `sources`.
        """
        owners = [number for number, found in enumerate(self.languages.values()) for _ in found]
        numbers = np.array(owners if by == "language" else range(len(self.sources)), np.int32)
        packings = [ConcatPacking(source, self.length) for source in self.sources]
        counts = [p.rows if rows_per_source is None else min(p.rows, rows_per_source) for p in packings]
        places = ((index, row) for index, count in enumerate(counts) for row in range(count))
        for some in batched(places, self.batch_size):
            missing = (0, self.batch_size - len(some))
            batch = pack(packings, *np.array(some).T)
            batch = batch._replace(source=numbers[batch.source])
            yield Batch._make(np.pad(field, [missing, (0, 0)][: field.ndim]) for field in batch)


type Measure = Callable[[Params, Batch], SourceSums]


def build_measure(
    config: TransformerConfig, layout: Layout, token_bytes: Int[np.ndarray, "V"], languages: int
) -> Measure:
    """The compiled function from parameters and a placed batch to the sums of each source."""

    def measure(params: Params, batch: Batch) -> SourceSums:
        _, nats, _ = batch_loss(params, batch, config, layout)
        return sum_by_source(batch, nats, jnp.asarray(token_bytes), languages)

    return jax.jit(measure, out_shardings=layout.replicated)


def measure_heldout(
    measure: Measure,
    params: Params,
    heldout: HeldOut,
    layout: Layout,
    rows_per_source: int | None = None,
    *,
    alive: Callable[[], None] = lambda: None,
) -> SourceSums:
    """Sums over the first rows of every source (default: all), in float64 and int64. `alive` is called at each batch:
    all of a large store takes longer than a watchdog waits."""
    parts = []
    for batch in heldout.batches(rows_per_source):
        parts.append(measure(params, layout.place_rows(batch)))
        alive()
    nats, tokens, byte_counts = (np.stack(field) for field in zip(*jax.device_get(parts), strict=True))
    return SourceSums(nats.sum(0, np.float64), tokens.sum(0, np.int64), byte_counts.sum(0, np.int64))


def evaluation(heldout: HeldOut, sums: SourceSums, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """The content of evaluation.json: each language's exact figures beside those of coders that learnt nothing.

    Raises RuntimeError if the bytes that were predicted are not those of the documents, byte for byte.
    """
    languages = {}
    for (code, sources), nats, tokens, predicted in zip(heldout.languages.items(), *sums, strict=True):
        byte_count = sum(source.bytes for source in sources)
        if predicted != byte_count:
            raise RuntimeError(f"{code}: predicted {predicted} bytes of {byte_count}")
        language = resolve(code)
        languages[code] = {
            "name": language.name,
            "status": language.status,
            "documents": sum(source.documents for source in sources),
            "bytes": byte_count,
            "tokens": int(tokens),
            "nats": float(nats),
            "bits_per_byte": bits_per_byte(float(nats), byte_count),
            "baselines": baselines(sources, tokenizer),
        }
    official = [figures for figures in languages.values() if figures["status"] == "official"]
    return {
        "step": step,
        "definition": DEFINITION + _of_normal_form(tokenizer),
        "languages": languages,
        "beats_xz": {
            "official": sum(map(_beats_xz, official)),
            "official_total": len(official),
            "all": sum(map(_beats_xz, languages.values())),
            "all_total": len(languages),
        },
    }


def _of_normal_form(tokenizer: Tokenizer) -> str:
    """What a tokenizer that changes texts makes of the bytes."""
    form = tokenizer.normal_form
    return (
        ""
        if form is None
        else f" The bytes are those of the text in {form}, which this tokenizer brings it into first."
    )


def _beats_xz(figures: Mapping[str, Any]) -> bool:
    return figures["bits_per_byte"] < figures["baselines"]["xz"]


def bits_per_byte(nats: float, byte_count: int) -> float:
    return nats / math.log(2) / byte_count


def xz_bits_per_byte(text: bytes) -> float:
    """Of `xz -9e`, container included."""
    return 8 * len(lzma.compress(text, lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def order0_bits_per_byte(text: bytes) -> float:
    """The entropy of the byte frequencies of the text itself."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def baselines(sources: Sequence[Source], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of coders that have seen nothing but this text, over the bytes that the model is charged for."""
    documents = [
        tokenizer.decode(stream[start + 1 : stop - 1])
        for source in sources
        for stream in [source.read(0, source.tokens)]
        for start, stop in pairwise(source.offsets)
    ]
    text = "\n".join(documents).encode()
    scale = len(text) / sum(source.bytes for source in sources)
    return {"xz": xz_bits_per_byte(text) * scale, "order0": order0_bits_per_byte(text) * scale}
