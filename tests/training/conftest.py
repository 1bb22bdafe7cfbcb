"""A model and an experiment small enough to train in seconds on the store of tests/conftest.py."""

import pytest

from eurollm_jax.corpus.preparing.prepare import prepare
from tests.tiny import tiny_experiment, tiny_model


@pytest.fixture(scope="session")
def tiny(tokenizer):
    return tiny_model(tokenizer)


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
    return tiny_experiment(tokenizer, store, heldout, tmp_path, model=tiny)
