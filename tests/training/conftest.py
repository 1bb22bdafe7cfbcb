"""A model and an experiment small enough to train in seconds on the store of tests/conftest.py."""

import pytest

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.transformer import TransformerConfig
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
        mlp=32,
        max_positions=32,
        tied=True,
        compute="float32",
        remat="none",
    )


@pytest.fixture
def experiment(tiny, tokenizer, store, tmp_path):
    return Experiment(
        name="tiny",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(store=str(store.path), mixture=Mixture.temperature(0.5, "bytes"), sequence_length=32),
        heldout=str(store.path),
        model=tiny,
        schedule=WSD(peak=1e-2, warmup=2),
        steps=12,
        batch_size=8,
        log_every=2,
        evaluate_every=6,
        evaluate_rows=2,
        checkpoint_every=4,
        runs=str(tmp_path / "runs"),
    )
