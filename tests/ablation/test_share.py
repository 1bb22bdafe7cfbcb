"""Several jobs train a study's ensembles: each its own, whatever the others have done, and the answer is the same."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from eurollm_jax.ablation import trained as trained_module
from eurollm_jax.ablation.prepared import prepare
from eurollm_jax.ablation.run import ablate, train_share
from eurollm_jax.ablation.study import Analysis, Design
from eurollm_jax.ablation.trained import SECONDS, Share
from eurollm_jax.errors import UserError
from eurollm_jax.training.ensemble import train_ensemble


@pytest.fixture
def divided(study):
    """Seven proxies in ensembles of three, two and two."""
    quick = Analysis(bootstraps=20, folds=3, starts=2)
    return replace(study, design=Design(draws=5, candidates=4, prior_runs=2), analysis=quick, at_once=3)


def found_in(folder):
    table = pq.read_table(folder / "results.parquet").to_pylist()
    return [{**row, "shares": tuple(row["shares"])} for row in table], (folder / "findings.json").read_text()


def test_shares_are_parsed_and_refused():
    assert Share.parse("2/3") == Share(2, 3)
    for text in ("3/3", "1", "a/2", "-1/2", "0/0"):
        with pytest.raises(UserError, match="--ensembles"):
            Share.parse(text)


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shares_are_all_ensembles_once_whatever_is_trained_before(divided, monkeypatch, of):
    trained, finished = {}, {}

    def noting(members, folder, **named):
        trained[folder.name] = [member.name for member in members]
        finished[folder.name] = trained[folder.name]

    def listing(folder, left):
        return [(name, names) for name, names in finished.items() if all(name in left for name in names)]

    monkeypatch.setattr(trained_module, "train_ensemble", noting)
    monkeypatch.setattr(trained_module, "_finished", listing)
    counts = [train_share(divided, "Which?", Share(index, of)) for index in reversed(range(of))]
    assert sum(counts) == 3
    assert max(counts) - min(counts) <= 1
    names = [arm.name for arm in prepare(divided).arms]
    assert trained == {"01-03": names[:3], "04-05": names[3:5], "06-07": names[5:]}


@pytest.mark.slow
def test_a_study_in_shares_finds_what_it_finds_alone(divided, tmp_path, monkeypatch):
    expected = found_in(ablate(divided, "Which?"))
    shutil.move(divided.folder, tmp_path / "alone")

    trained = []

    def noting(members, folder, **named):
        trained.append(folder.name)
        return train_ensemble(members, folder, **named)

    monkeypatch.setattr(trained_module, "train_ensemble", noting)
    assert train_share(divided, "Which?", Share(1, 2)) == 1
    assert train_share(divided, "Which?", Share(0, 2)) == 2
    assert trained == ["04-05", "01-03", "06-07"]
    assert train_share(divided, "Which?", Share(0, 2)) == 2  # started again: all is there
    assert len(trained) == 3
    assert not (divided.folder / "results.parquet").exists()
    taken = sum(float(path.read_text()) for path in divided.folder.glob(f"proxies/*/{SECONDS}"))
    assert taken > 0
    assert found_in(ablate(divided, "Which?")) == expected
    cost = json.loads((divided.folder / "study.json").read_text())["cost"]["proxies"]
    assert cost["seconds"] >= taken
    assert not list(divided.folder.glob(f"proxies/*/{SECONDS}"))


def test_a_share_of_another_study_is_refused_and_what_is_there_stays(divided, monkeypatch):
    monkeypatch.setattr(trained_module, "train_ensemble", lambda *of, **named: [])
    train_share(divided, "Which?", Share(0, 3))
    before = (divided.folder / "study.json").read_bytes()
    train_share(divided, "Which?", Share(1, 3))
    assert (divided.folder / "study.json").read_bytes() == before
    other = replace(divided, proxy=replace(divided.proxy, steps=13))
    with pytest.raises(UserError, match=r"another study \(proxy.steps was 12 and is 13\)"):
        train_share(other, "Which?", Share(0, 3))


def test_several_may_begin_at_once(divided, monkeypatch):
    """One finds what another is about to write: no folder of somebody else's."""
    monkeypatch.setattr(trained_module, "train_ensemble", lambda *of, **named: [])
    divided.folder.mkdir(parents=True)
    (divided.folder / ".study.json.1f").write_text("{")
    train_share(divided, "Which?", Share(0, 3))
    assert json.loads((divided.folder / "study.json").read_text())["identity"] == json.loads(
        json.dumps(prepare(divided).identity())
    )
