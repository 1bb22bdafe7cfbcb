"""A study of three groups over the store of tests/conftest.py, small enough to train in seconds."""

import pytest

from eurollm_jax.ablation.space import open_space
from eurollm_jax.ablation.study import Design, Study
from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.training.inputs import open_inputs
from tests.tiny import tiny_experiment, tiny_model


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
    proxy = tiny_experiment(
        tokenizer,
        store,
        heldout,
        tmp_path,
        name="proxy",
        model=tiny_model(tokenizer, depth=1, heads=2),
        log_every=4,
        evaluate_every=6,
        checkpoint_every=6,
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
