"""What the tests of the command line share: a command is run in this process, and either answers or refuses.

Whatever is bad costs the user one sentence on standard error, an exit status that is not 0, and not a byte of a file.
"""

import contextlib
import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from eurollm_jax.cli import main

SOURCE = '''"""Can a tiny model be trained from the command line?"""

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.training.schedule import WSD

MIXTURE = Mixture.temperature(0.5, "bytes")
EXPERIMENT = Experiment(
    name="tiny",
    tokenizer="{folder}/tokenizer",
    data=DataConfig(store="{folder}/store", mixture=MIXTURE, sequence_length=32),
    heldout="{folder}/store",
    model=TransformerConfig(
        vocab_size=640, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=Gated(32), max_positions=160,
        compute="float32", remat="none",
    ),
    schedule=WSD(peak=1e-2, warmup=2),
    steps=4,
    batch_size=8,
    log_every=2,
    evaluate_every=4,
    evaluate_rows=2,
    checkpoint_every=4,
    runs="{folder}/runs",
)
'''


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


def run_command(*argv) -> Said:
    """Runs one command in this process; what argparse and tyro exit with is its status too."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as stop:
            status = stop.code
    return Said(status, out.getvalue(), err.getvalue())


def read_all(folder):
    """Every file's bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refuse(untouched, *argv) -> str:
    """The one sentence with which the command is refused, once `untouched` proves to be what it was."""
    before = read_all(untouched)
    said = run_command(*argv)
    assert read_all(untouched) == before
    assert (said.status, said.out) == (1, ""), said
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("eurollm: ")
    assert "Error:" not in sentence or ".py line" in sentence  # a bare Python error tells a user nothing
    return sentence.removeprefix("eurollm: ")


@pytest.fixture(autouse=True)
def _imports_of_experiments(monkeypatch):
    """An experiment's file puts the folder above its own on the path; no other test is to import from there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        del sys.modules[name]


@dataclass(frozen=True)
class Made:
    """A folder with tokenizer, store, experiments/tiny.py and runs/tiny, and what the commands said that made them."""

    folder: Path
    prepared: Said
    shown: Said
    trained: Said

    @property
    def experiment(self):
        return self.folder / "experiments/tiny.py"

    @property
    def run(self):
        return self.folder / "runs/tiny"


@pytest.fixture(scope="session")
def made(corpus_dir, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(tokenizer.model_path.parent, folder / "tokenizer")
    (folder / "experiments").mkdir()
    (folder / "experiments/tiny.py").write_text(SOURCE.format(folder=folder))
    prepared = run_command(
        "corpus", "prepare", corpus_dir, "--tokenizer", folder / "tokenizer", "--out", folder / "store"
    )
    shown = run_command("show", folder / "experiments/tiny.py")
    assert not (folder / "runs").exists()
    trained = run_command("train", folder / "experiments/tiny.py")
    return Made(folder, prepared, shown, trained)


@pytest.fixture(scope="session")
def call():
    return run_command


@pytest.fixture(scope="session")
def contents():
    return read_all


@pytest.fixture(scope="session")
def refusal():
    return refuse


@pytest.fixture(scope="session")
def source_of():
    """The text of an experiment whose tokenizer, store and runs lie in a folder."""
    return lambda folder: SOURCE.format(folder=folder)
