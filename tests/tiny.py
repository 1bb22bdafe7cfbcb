"""A model and an experiment small enough to train in seconds on the store of tests/conftest.py, for several folders."""

import dataclasses
from pathlib import Path
from typing import Any

from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD


def tiny_model(tokenizer: Tokenizer, **changed: Any) -> TransformerConfig:
    model = TransformerConfig(
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
    return dataclasses.replace(model, **changed)


def tiny_experiment(
    tokenizer: Tokenizer, store: TokenStore, heldout: TokenStore, folder: Path, **changed: Any
) -> Experiment:
    """12 steps, whose run is below `folder`."""
    experiment = Experiment(
        name="tiny",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(store=str(store.path), mixture=Mixture.temperature(0.5, "bytes"), sequence_length=32),
        heldout=str(heldout.path),
        model=tiny_model(tokenizer),
        schedule=WSD(peak=1e-2, warmup=2),
        steps=12,
        batch_size=8,
        log_every=3,
        evaluate_every=5,
        evaluate_rows=2,
        checkpoint_every=4,
        saving=Saving(before_decay=False),
        runs=str(folder / "runs"),
    )
    return dataclasses.replace(experiment, **changed)
