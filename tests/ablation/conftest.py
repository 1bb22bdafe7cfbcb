"""A study of three groups over the store of tests/conftest.py, small enough to train in seconds."""

import pytest

from eurollm_jax.ablation.space import open_space
from eurollm_jax.ablation.study import Design, Study
from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.training.inputs import open_inputs
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD


@pytest.fixture(scope="session")
def heldout(corpus_dir, tokenizer, tmp_path_factory):
    """Twenty documents of each of four languages: none of Bulgarian, which is trained on all the same."""
    folder = tmp_path_factory.mktemp("heldout")
    for code in ("de", "el", "en", "mt"):
        lines = (corpus_dir / f"{code}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{code}.jsonl").write_bytes(b"".join(lines[:20]))
    return prepare(folder, tokenizer, folder / "store", workers=1)


@pytest.fixture
def study(tokenizer, store, heldout, tmp_path):
    model = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        depth=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        mlp=Gated(32),
        max_positions=32,
        tied=True,
        compute="float32",
        remat="none",
    )
    proxy = Experiment(
        name="proxy",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(store=str(store.path), mixture=Mixture.temperature(0.5, "bytes"), sequence_length=32),
        heldout=str(heldout.path),
        model=model,
        schedule=WSD(peak=1e-2, warmup=2),
        steps=12,
        batch_size=8,
        log_every=4,
        evaluate_every=6,
        evaluate_rows=2,
        checkpoint_every=6,
        saving=Saving(before_decay=False),
        runs=str(tmp_path / "runs"),
    )
    return Study(
        name="tiny",
        proxy=proxy,
        groups={"Germanic": ("Germanic",), "Slavic": ("bg",), "South": ("el", "language:mt")},
        design=Design(draws=4, candidates=4, prior_runs=2),
        studies=str(tmp_path / "studies"),
    )


@pytest.fixture
def space(study):
    inputs = open_inputs(study.proxy)
    return open_space(study, inputs.data, inputs.heldout)
