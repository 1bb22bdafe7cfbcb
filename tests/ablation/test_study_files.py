"""A report of a study that is not whole: what is not known, not there yet, damaged or foreign is said in a sentence."""

import json
import re

import pytest

from eurollm_jax.ablation.compare import compare
from eurollm_jax.ablation.finding import Contender, Finding, HeldOutRun
from eurollm_jax.ablation.report import write_report
from eurollm_jax.ablation.report.answer import ANCHORS
from eurollm_jax.ablation.report.records import FILES, Findings, Interval
from eurollm_jax.ablation.report.terminal import answer_table
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report.records import parse
from tests.ablation.study_folder import DIVERGED, RUNS, change, report, write_study, write_table


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "families"


def test_figures_that_are_not_known_are_dashes_wherever_they_stand(folder):
    """The analysis writes null for whatever it cannot tell."""
    findings = write_study(folder)["findings"]
    unknown = {"value": None, "low": None, "high": None}
    for part in ("proposal", "changes"):
        first = next(iter(findings[part]))
        findings[part][first] = unknown
    findings["predicted"]["prior"]["bg"] = unknown
    findings["baselines"]["UniMax"] |= {**unknown, "gain": unknown}
    findings["heldout"]["log-linear"][0] |= {"predicted": None}
    change(folder / "findings.json", **{**findings, "gain": unknown})
    page = report(folder)
    assert "Predicted gain– bits per byte90 % interval not known" in page.text
    assert page.row("data-group", "Slavic")[3][1] == "–"
    assert page.row("data-language", "bg")[3][1] == "–"
    assert [attrs["data-baseline"] for attrs, _ in page.rows if "data-baseline" in attrs][-1] == "UniMax"
    assert f"Observed against predicted of {RUNS - 2} runs" in (folder / "report.html").read_text()
    assert "nan" not in page.text.lower()
    assert "Slavic" not in answer_table(folder)[0]


def test_a_study_that_declined_says_why_nothing_was_trained_again(folder):
    written = write_study(folder, recommended=False)
    (folder / "confirmation.json").unlink()
    declared = {**written["study"]["study"], "confirmation": {"when_declined": False}}
    change(folder / "study.json", study=declared)
    assert "does not recommend its proposal, so nothing was trained again" in report(folder).text
    declared["confirmation"]["when_declined"] = True
    change(folder / "study.json", study=declared)
    assert "Prior and proposal have not been trained again yet." in report(folder).text


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("results.parquet", "No proxy has been measured yet."),
        (
            "findings.json",
            f"Not answered yet. All {RUNS} proxies have ended; `eurollm ablate` goes on and fits the law.",
        ),
        ("confirmation.json", "Prior and proposal have not been trained again yet."),
        ("mixture.py", "There is no mixture to copy yet."),
    ],
)
def test_a_missing_file_leaves_a_section_that_says_what_makes_it(folder, removed, said):
    write_study(folder)
    (folder / removed).unlink()
    page = report(folder)
    assert said in page.text
    assert f"{removed} is made by eurollm ablate" in page.text
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == list(ANCHORS)


def test_a_study_that_has_just_begun_has_a_report(folder):
    write_study(folder)
    for name in FILES[1:]:
        (folder / name).unlink()
    text = report(folder).text
    assert "Not answered yet. 0 of 24 proxies have ended; the law is fitted when all have." in text
    change(
        folder / "study.json", cost={**json.loads((folder / "study.json").read_text())["cost"], "confirmation": None}
    )
    assert "The study declares no confirmation" in report(folder).text


@pytest.mark.parametrize("ended", [1, 5, 8])
def test_a_study_under_way_counts_the_proxies_that_have_ended(folder, ended):
    """The table is written after each ensemble; the fifth of the draws diverged."""
    written = write_study(folder)
    for name in FILES[2:]:
        (folder / name).unlink()
    sound = {replica.name for replica, _ in written["runs"][:ended]} - {DIVERGED}
    write_table(folder, "families", written["runs"][:ended])
    page = report(folder)
    said = f"Not answered yet. {ended} of {RUNS} proxies have ended; the law is fitted when all have."
    assert said in page.text
    assert answer_table(folder) == (said, None)
    assert f"Proxies{len(sound)} of {RUNS}" in page.text
    diverged = "1 of 24 proxies diverged." if ended == 8 else "No proxy diverged so far."
    assert diverged in page.text
    assert "fewest bits at the end: " in page.text
    for arm in written["study"]["arms"]:
        shown = page.row("data-run", arm["name"])[3][1]
        assert (shown not in ("–", "diverged")) == (arm["name"] in sound)


def test_an_answer_from_fewer_proxies_than_were_asked_for_says_so(folder):
    written = write_study(folder)
    change(folder / "study.json", arms=[*written["study"]["arms"], {**written["study"]["arms"][-1], "name": "draw-99"}])
    said = f"{RUNS} of {RUNS + 1} proxies have ended; what follows is of {RUNS - 1} of them."
    assert said in report(folder).text
    assert said in answer_table(folder)[0]


def test_foreign_words_cannot_break_the_page(folder):
    nasty = "<script>alert(1)</script> & \"q\" 'x' \x00 $body"
    written = write_study(folder, name="families")
    change(folder / "study.json", question=nasty, code=nasty)
    findings = written["findings"]
    change(folder / "findings.json", reasons=[nasty], caveats=[nasty], further=nasty, recommended=False)
    change(folder / "confirmation.json", sentence=nasty, diverged={nasty: nasty})
    change(folder / "findings.json", law=nasty, scores={nasty: findings["scores"]["power"]})
    (folder / "mixture.py").write_text(nasty)
    page = report(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "".join(page.words).count(nasty.replace("\x00", "␀")) >= 8


def test_broken_files_are_named_and_the_old_report_stays(folder):
    write_study(folder)
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    change(folder / "findings.json", recommended="yes")
    with pytest.raises(UserError, match=r"findings\.json: `recommended` is \"yes\" but should be true or false"):
        write_report(folder)
    change(folder / "findings.json", recommended=True, proposal={"Slavic": {"value": 1.0, "low": 1.0, "high": 1.0}})
    with pytest.raises(UserError, match="proposes shares of Slavic, and the groups"):
        write_report(folder)
    change(folder / "study.json", fingerprint="00" * 32)
    with pytest.raises(UserError, match=r"results\.parquet is of the study 5f0a5f0a5f0a, study\.json of 000000000000"):
        write_report(folder)
    (folder / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json is damaged \(.*\): restore it from a backup"):
        write_report(folder)
    (folder / "study.json").unlink()
    with pytest.raises(UserError, match=r"is not the folder of a study, it has no study\.json"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("findings.json", b"[1,", "is damaged (Expecting value: line 1 column 4 (char 3))"),
        ("findings.json", b"\xff", "is damaged ('utf-8' codec"),
        ("findings.json", b"{}", "lacks the field `law`"),
        ("findings.json", b"[]", "the content is [] but should be an object"),
        ("confirmation.json", b'{"held": 1}', "`held` is 1 but should be a string"),
        ("results.parquet", b"PAR1", "is damaged or not Parquet"),
        ("mixture.py", b"# \xff\xfe", "is not UTF-8 at byte 2"),
        ("datamix.txt", b"\xff", "is not UTF-8 at byte 0"),
        ("study.json", b"[]", "the content is [] but should be an object"),
        ("study.json", b"\xff", "is damaged"),
        ("study.json", b'{"name": "x"}', "lacks the field `question`"),
    ],
)
def test_no_message_asks_to_destroy_what_was_trained(folder, file, content, said):
    write_study(folder)
    (folder / file).write_bytes(content)
    for call in (write_report, answer_table, lambda folder: compare([folder])):
        with pytest.raises(UserError) as refused:
            call(folder)
        words = str(refused.value)
        assert words.startswith(str(folder / file))
        assert said in words
        mend = (
            f"remove {file}; `eurollm ablate` makes it again." if file != "study.json" else "restore it from a backup"
        )
        assert mend in words
        assert not re.search("folder and|its folder|make the file again", words)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"identity": [1]}, "`identity` is [1] but should be an object: restore it"),
        ({"groups": {"Slavic": []}}, "`groups.Slavic` is [] but should be an object: restore it"),
    ],
)
def test_fields_of_another_type_are_named(folder, fields, said):
    write_study(folder)
    change(folder / "study.json", **fields)
    with pytest.raises(UserError, match=re.escape(said)):
        write_report(folder)


def test_a_study_of_no_runs_and_an_analysis_of_another_type_have_a_report(folder):
    study = write_study(folder)["study"]
    study["cost"]["proxies"]["runs"] = 0
    for analysis in ([1], {"min_rho": "much"}):
        change(folder / "study.json", cost=study["cost"], study={"analysis": analysis})
        assert "a recommendation needs" not in report(folder).text


def test_the_analysis_writes_what_the_report_reads(folder, tmp_path):
    """`Finding.to_json` and the schema here are written down apart."""
    written = write_study(folder)["findings"]
    finding = Finding.from_json(json.loads(json.dumps(written)))
    write_json(tmp_path / "findings.json", finding.to_json())
    again = parse(json.loads((tmp_path / "findings.json").read_text()), Findings, "findings.json")
    assert again.gain == Interval(**written["gain"])
    assert again.baselines["UniMax"].gain == Interval(**written["baselines"]["UniMax"]["gain"])
    assert isinstance(finding.baselines["prior"], Contender)
    assert isinstance(finding.heldout["power"][0], HeldOutRun)


def test_languages_outside_the_table_are_shown_by_their_code(folder):
    write_study(folder)
    text = (folder / "study.json").read_text().replace('"sv"', '"xx"')
    (folder / "study.json").write_text(text)
    (folder / "findings.json").write_text((folder / "findings.json").read_text().replace('"sv"', '"xx"'))
    page = report(folder)
    assert page.row("data-language", "xx")[0][1] == "xxxx"
