"""A model and an experiment small enough to train in seconds on the store of tests/conftest.py."""

import pytest

from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD


@pytest.fixture(scope="session")
def tiny(tokenizer):
    return TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=Gated(32),
        max_positions=32,
        tied=True,
        compute="float32",
        remat="none",
    )


@pytest.fixture(scope="session")
def heldout(corpus_dir, tokenizer, tmp_path_factory):
    """Three of the five languages, so that its sources have other numbers than those of the training data."""
    folder = tmp_path_factory.mktemp("heldout")
    for code in ("de", "el", "mt"):
        (file,) = corpus_dir.glob(f"{code}.*")
        lines = file.read_bytes().splitlines(keepends=True)
        (folder / file.name).write_bytes(b"".join(lines[:20]))
    return prepare(folder, tokenizer, folder / "store")


@pytest.fixture
def experiment(tiny, tokenizer, store, heldout, tmp_path):
    return Experiment(
        name="tiny",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(store=str(store.path), mixture=Mixture.temperature(0.5, "bytes"), sequence_length=32),
        heldout=str(heldout.path),
        model=tiny,
        schedule=WSD(peak=1e-2, warmup=2),
        steps=12,
        batch_size=8,
        log_every=3,
        evaluate_every=5,
        evaluate_rows=2,
        checkpoint_every=4,
        saving=Saving(before_decay=False),
        runs=str(tmp_path / "runs"),
    )
