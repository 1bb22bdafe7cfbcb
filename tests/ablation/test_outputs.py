"""What a study hands on must give the next run exactly the mixture that was found."""

import runpy

import numpy as np
import pytest

from eurollm_jax.ablation.outputs import mixture_literal, token_shares, write_outputs
from eurollm_jax.data.datamix import datamix, read_datamix
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from tests.ablation.study_folder import sizes

NAMES = list(sizes())


def random_mixture(seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(len(NAMES), 0.5))
    return Mixture.shares(dict(zip(NAMES, shares.tolist(), strict=True)), "tokens", over="source")


def imported(path):
    return runpy.run_path(str(path))["MIXTURE"]


@pytest.mark.parametrize("seed", range(20))
def test_the_literal_is_the_mixture_and_gives_the_same_rows(seed, tmp_path):
    mixture = random_mixture(seed)
    write_outputs(tmp_path, mixture, sizes(), 1000, study="s", fingerprint="ab" * 32)
    again = imported(tmp_path / "mixture.py")
    assert again == mixture
    assert again.compile(sizes(), 1000).describe() == mixture.compile(sizes(), 1000).describe()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["datamix.txt", "mixture.py"]


def test_datamix_holds_the_same_shares_of_tokens(tmp_path):
    mixture = random_mixture(3)
    write_outputs(tmp_path, mixture, sizes(), 1000, study="s", fingerprint="ab" * 32)
    parts = read_datamix(tmp_path / "datamix.txt")
    wanted = token_shares(mixture)
    assert {part.path for part in parts} == set(NAMES)
    for part in parts:  # as they are compiled: in parts of 2**30
        assert part.ratio == pytest.approx(wanted[part.path], abs=3e-9)
    read_again = datamix(tmp_path / "datamix.txt", names=[part.path for part in parts])
    shares, again = (m.compile(sizes(), 1000).stages[0].shares for m in (mixture, read_again))
    assert max(abs(a - b) for a, b in zip(shares, again, strict=True)) <= 1


def test_prefixes_take_the_place_of_names(tmp_path):
    prefixes = {name: f"/data/{name}_text_document" for name in NAMES}
    write_outputs(tmp_path, random_mixture(1), sizes(), 1000, study="s", fingerprint="f", prefixes=prefixes)
    assert {part.path for part in read_datamix(tmp_path / "datamix.txt")} == set(prefixes.values())


def test_a_declined_study_says_so_and_leaves_no_datamix(tmp_path):
    (tmp_path / "datamix.txt").write_text("1 old\n")
    reasons = ["The interval of the gain covers 0,\nwhich is too " + 30 * "little " + "to go on.", "Import os."]
    mixture = random_mixture(2)
    write_outputs(tmp_path, mixture, sizes(), 1000, study="s", fingerprint="f", declined=reasons)
    assert [path.name for path in tmp_path.iterdir()] == ["mixture.py"]
    lines = (tmp_path / "mixture.py").read_text().splitlines()
    head = lines[: lines.index("")]
    assert all(line.startswith("# ") and len(line) <= 120 for line in head)
    assert " ".join(line[2:] for line in head[1:]).startswith(
        "NOT RECOMMENDED: The interval of the gain covers 0, which"
    )
    assert imported(tmp_path / "mixture.py") == mixture


def test_names_of_any_kind_stay_names(tmp_path):
    shares = {'a"b': 0.25, "c'd": 0.25, "e\\f": 0.25, "ĝ\n#": 0.25}
    mixture = Mixture.shares(shares, "tokens", over="source")
    (tmp_path / "mixture.py").write_text(mixture_literal(mixture, "st'udy", "f", (), {}))
    assert imported(tmp_path / "mixture.py") == mixture


def test_the_largest_come_first_with_their_language(tmp_path):
    mixture = Mixture.shares({"mt-web": 0.2, "fi-web": 0.7, "fi-books": 0.1}, "tokens", over="source")
    text = mixture_literal(mixture, "s", "f", (), {"mt-web": "mt", "fi-web": "fi", "fi-books": "fi"})
    listed = [line.strip() for line in text.splitlines() if line.strip().startswith('"') and ":" in line]
    assert listed == [
        '"fi-web": 0.7,  # Finnish, 70 %',
        '"mt-web": 0.2,  # Maltese, 20 %',
        '"fi-books": 0.1,  # Finnish, 10 %',
    ]


def test_other_mixtures_are_refused():
    for mixture in (
        Mixture.proportional(),
        Mixture.shares({"a": 1.0}, "bytes", over="source"),
        Mixture.shares({"a": 1}),
    ):
        with pytest.raises(UserError, match="more than shares of tokens by source"):
            token_shares(mixture)
