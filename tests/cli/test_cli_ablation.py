"""`eurollm ablate` and `eurollm study` on the command line: what they print, and what they refuse."""

import pytest

from tests.ablation.study_folder import write_study
from tests.cli.conftest import SOURCE

STUDY = (
    SOURCE
    + """
from eurollm_jax.ablation.study import Design, Study

STUDY = Study(
    name="tiny",
    proxy=EXPERIMENT,
    groups={{"Slavic": ("bg",), "other": ("de", "el", "en", "mt")}},
    design=Design(draws=6, prior_runs=2),
    studies="{folder}/studies",
)
"""
)


@pytest.fixture
def folder(tmp_path):
    write_study(tmp_path / "studies/families")
    return tmp_path / "studies/families"


@pytest.fixture
def study_file(tmp_path, tokenizer, store):
    (tmp_path / "tokenizer").symlink_to(tokenizer.model_path.parent)
    (tmp_path / "store").symlink_to(store.path)
    (tmp_path / "experiments").mkdir()
    path = tmp_path / "experiments/mixture_study.py"
    path.write_text(STUDY.format(folder=tmp_path))
    return path


def test_report_writes_the_page_and_prints_the_answer(call, folder):
    said = call("study", "report", folder)
    assert (said.status, said.err) == (0, "")
    words = " ".join(said.out.split())
    assert "Recommended, and confirmed: take the proposed mixture." in words
    assert "Uralic 7.0 % 14.0 % 12.0 to 16.0" in words
    assert f"Open {folder / 'report.html'} in a browser." in words
    first = (folder / "report.html").read_bytes()
    assert call("study", "report", folder).status == 0
    assert (folder / "report.html").read_bytes() == first


def test_compare_prints_studies_and_their_differences(call, folder, contents):
    write_study(folder.parent / "other", name="other", recommended=False)
    before = contents(folder.parent)
    said = call("study", "compare", folder, folder.parent / "other")
    assert said.status == 0
    assert {"families", "other"} <= set(said.out.split())
    assert "Maltese" in said.out
    assert contents(folder.parent) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("study", "report", "{tmp}"), "is not the folder of a study, it has no study.json: name one that"),
        (("study", "compare", "{tmp}"), "is not the folder of a study"),
        (("ablate", "{tmp}"), "is a folder: give the file of a study, such as experiments/mixture_study.py"),
        (("ablate", "{tmp}/none.py"), "none.py does not exist: give the path of a study"),
        (("ablate", "{tmp}/experiments/plain.py"), "plain.py defines no `STUDY = Study(...)`: add one"),
        (("ablate", "{tmp}/experiments/bad.py"), "bad.py line 3: study 'a/b': the name becomes a folder"),
    ],
)
def test_what_is_no_study_is_refused_in_a_sentence(refusal, tmp_path, argv, said):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/plain.py").write_text('"""Nothing."""\n')
    lines = ["from eurollm_jax.ablation.study import Study", "", "STUDY = Study(name='a/b', proxy=None, groups={})"]
    (tmp_path / "experiments/bad.py").write_text("\n".join(lines) + "\n")
    assert said in refusal(tmp_path, *(word.format(tmp=tmp_path) for word in argv))


def test_a_bad_time_limit_is_refused(call, study_file):
    said = call("ablate", study_file, "--time-limit", "soon")
    assert said.status == 2
    assert "'soon' is no time: write it as 23:50:00" in said.err


def test_ablate_passes_on_the_study_its_question_and_the_time_limit(call, study_file, folder, monkeypatch):
    from eurollm_jax.ablation import run

    passed = {}

    def ablate(study, question, *, time_limit, began):
        passed.update(name=study.name, question=question, time_limit=time_limit, began=began)
        return folder

    monkeypatch.setattr(run, "ablate", ablate)
    monkeypatch.setattr("eurollm_jax.parallel.programs.keep_programs", lambda: None)
    said = call("ablate", study_file, "--name", "again", "--time-limit", "01:00:30")
    assert said.status == 0
    assert passed["began"] > 0
    assert {**passed, "began": 0} == {
        "name": "again",
        "question": "Can a tiny model be trained from the command line?",
        "time_limit": 3630.0,
        "began": 0,
    }
    assert "Recommended" in said.out


def test_a_dry_run_prints_design_and_cost_and_writes_nothing(call, study_file, tmp_path, contents, monkeypatch):
    monkeypatch.setattr("eurollm_jax.parallel.programs.keep_programs", lambda: None)
    before = contents(tmp_path)
    said = call("ablate", study_file, "--dry-run", "--untimed")
    assert said.status == 0, said
    assert "Can a tiny model be trained from the command line?" in said.out
    names = {line.split()[0] for line in said.out.splitlines() if line.split()}
    assert {"prior-0", "prior-1", "Slavic", "other", "proxies"} <= names
    assert "FLOP in all" in said.out
    assert "8 runs for" in said.out
    assert contents(tmp_path) == before
