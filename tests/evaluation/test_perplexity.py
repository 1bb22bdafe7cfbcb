"""Held-out figures against the slow way: every document's tokens one by one, from whole logits in float64."""

import lzma
from itertools import pairwise

import jax
import numpy as np
import pytest

from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare
from eurollm_jax.evaluation.perplexity import (
    HeldOut,
    baselines,
    build_measure,
    evaluation,
    measure_heldout,
    order0_bits_per_byte,
)
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.param import init
from eurollm_jax.model.transformer import forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

LENGTH = 24


@pytest.fixture(scope="module")
def model(tokenizer):
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        depth=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        mlp=Gated(16),
        max_positions=LENGTH,
        compute="float32",
    )
    return config, init(specs(config), jax.random.key(0))


def nats_one_by_one(params, config, stream, starts, layout):
    """Row by row: a token's context is what precedes it in its row and document; a document's first costs nothing."""
    total, ones, at = 0.0, np.ones((1, LENGTH), int), np.arange(LENGTH)[None]
    scores_of = jax.jit(
        lambda params, inputs: logits(params, forward(params, inputs, ones, at, config, layout)[0], config)[0]
    )
    for first in range(0, len(stream) - 1, LENGTH):
        row = stream[first : first + LENGTH + 1]
        cuts = sorted({0, *(int(s) - first for s in starts if first < s < first + len(row)), len(row)})
        for begin, end in pairwise(cuts):
            piece = row[begin:end]
            if len(piece) < 2:
                continue
            inputs = np.zeros((1, LENGTH), int)
            inputs[0, : len(piece) - 1] = piece[:-1]
            scores = np.asarray(scores_of(params, inputs), np.float64)[: len(piece) - 1]
            log_z = np.log(np.exp(scores).sum(-1))
            total += (log_z - scores[np.arange(len(piece) - 1), piece[1:]]).sum()
    return total


def test_nats_and_bytes_are_exact(model, store, tokenizer):
    config, params = model
    layout = Layout(MeshConfig().build())
    heldout = HeldOut(store, LENGTH, batch_size=16)
    measure = build_measure(config, layout, tokenizer.piece_bytes, len(store.sources))
    sums = measure_heldout(measure, params, heldout, layout)
    result = evaluation(heldout, sums, tokenizer, step=3)["languages"]
    one = Layout(MeshConfig().build(jax.devices()[:1]))
    for name in ("el", "mt"):
        source = store.sources[name]
        expected = nats_one_by_one(params, config, source.read(0, source.tokens).astype(int), source.offsets[:-1], one)
        assert result[name]["nats"] == pytest.approx(expected, rel=1e-5)
        assert result[name]["tokens"] == source.tokens - source.documents
        assert result[name]["bytes"] == source.byte_lengths.sum()


def test_sources_of_one_language_are_measured_together(model, store, corpus_dir, tokenizer, tmp_path):
    by_origin = prepare(corpus_dir, tokenizer, tmp_path / "store", PrepareOptions(by="origin"), workers=1)
    assert len(by_origin.sources) == 2 * len(store.sources)
    config, params = model
    layout = Layout(MeshConfig().build())
    heldout = HeldOut(by_origin, LENGTH, batch_size=16)
    measure = build_measure(config, layout, tokenizer.piece_bytes, len(heldout.languages))
    result = evaluation(heldout, measure_heldout(measure, params, heldout, layout), tokenizer, step=3)
    assert list(result["languages"]) == list(store.sources)
    assert result["beats_xz"]["official_total"] == len(store.sources)
    for name, figures in result["languages"].items():
        source = store.sources[name]
        assert figures["documents"] == source.documents
        assert figures["bytes"] == source.bytes
        assert figures["tokens"] == source.tokens - source.documents


def test_first_rows_only(model, store, tokenizer):
    heldout = HeldOut(store, LENGTH, batch_size=16)
    rows = np.concatenate([batch.source[batch.mask.any(axis=1)] for batch in heldout.batches(3)])
    assert np.bincount(rows).tolist() == [3] * len(store.sources)


def test_baselines_read_the_documents_themselves(store, tokenizer):
    source = store.sources["bg"]
    texts = [tokenizer.decode(source.document_tokens(i)[1:-1]) for i in range(source.documents)]
    joined = "\n".join(texts).encode()
    result = baselines([source], tokenizer)
    packed = lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
    assert result["xz"] == pytest.approx(8 * len(packed) / source.bytes)
    assert result["order0"] < 8


def test_order0_of_known_texts():
    assert order0_bits_per_byte(bytes(range(256))) == pytest.approx(8)
    assert order0_bits_per_byte(b"aaab" * 5) == pytest.approx(0.811278, abs=1e-6)
