"""Studies set side by side: each keeps its own figures, and what makes them incomparable is named."""

import json

import pytest
from rich.console import Console

from eurollm_jax.ablation.compare import compare
from eurollm_jax.errors import UserError
from tests.ablation.study_folder import GROUPS, LANGUAGES, PRIOR, PROPOSAL, change, fix, write_study


@pytest.fixture
def pair(tmp_path):
    write_study(tmp_path / "a", name="first")
    write_study(tmp_path / "b", name="second", recommended=False, held="undecided", seed=5)
    return [tmp_path / "a", tmp_path / "b"]


def cells(table):
    """The rows of a table of two studies, by their first cell."""
    return {row[0]: row[1:] for row in zip(*([str(c) for c in column.cells] for column in table.columns), strict=True)}


def signed(value):
    return f"{value:+.4f}".replace("-", "−")


def test_each_study_keeps_its_own_figures(pair):
    (verdicts, shares, languages), differences = compare(pair)
    assert differences == []
    assert [str(column.header) for column in verdicts.columns] == ["", "first", "second"]
    found = [json.loads((folder / "findings.json").read_text()) for folder in pair]
    rows = cells(verdicts)
    assert rows["verdict"] == (
        "Recommended, and confirmed: take the proposed mixture.",
        "No recommendation: keep the prior.",
    )
    for cell, one in zip(rows["predicted gain"], found, strict=True):
        gain = one["gain"]
        assert cell == f"{signed(gain['value'])} ({signed(gain['low'])} to {signed(gain['high'])})"
    assert rows["rho, runs left out"] == ("0.93", "0.93")
    assert rows["proxies (diverged)"] == ("23 of 24 (1)",) * 2
    assert rows["FLOP"] == ("5e+14", "5e+14")
    for group, prior, proposal in zip(GROUPS, PRIOR, PROPOSAL, strict=True):
        assert cells(shares)[group] == (f"{100 * prior:.1f} → {100 * proposal:.1f} %",) * 2
    assert len(cells(languages)) == len(LANGUAGES)
    for cell, one in zip(cells(languages)["Maltese"], found, strict=True):
        before, after = (one["predicted"][at]["mt"]["value"] for at in ("prior", "proposal"))
        assert cell == f"{before:.3f} → {after:.3f}"
    assert cells(languages)["Maltese"][0] != cells(languages)["Maltese"][1]


def test_what_cannot_be_compared_is_named(pair):
    study = json.loads((pair[1] / "study.json").read_text())
    study["groups"]["Baltic"] = study["groups"].pop("Maltese")
    study["targets"] = dict.fromkeys(LANGUAGES, 0.1)
    study["target"] = "uniform"
    study["identity"]["proxy"]["inputs"]["heldout"] = "bb"
    study["cost"]["proxies"]["parameters"] *= 2
    (pair[1] / "study.json").write_text(json.dumps(study))
    findings = json.loads((pair[1] / "findings.json").read_text())
    findings["proposal"]["Baltic"] = findings["proposal"].pop("Maltese")
    (pair[1] / "findings.json").write_text(json.dumps(findings))
    (_, shares, _), differences = compare(pair)
    assert differences == [
        "first and second have other groups (only the first has Maltese; only the second has Baltic): shares are not "
        "comparable one by one.",
        "first and second have other targets (given, uniform): their gains are of other things.",
        "first and second have other held-out text: bits per byte are not comparable.",
        "first and second have proxies of another size or length: compare changes, not bits per byte.",
    ]
    assert cells(shares)["Maltese"][1] == cells(shares)["Baltic"][0] == ""
    assert cells(shares)["Slavic"][0] == cells(shares)["Slavic"][1]


def test_groups_of_one_name_with_other_sources_are_noticed(pair):
    study = json.loads((pair[1] / "study.json").read_text())
    study["groups"]["Uralic"]["sources"] = {"fi-web": 0.5, "hu-web": 0.5}
    (pair[1] / "study.json").write_text(json.dumps(study))
    (sentence,) = compare(pair)[1]
    assert sentence.startswith("first and second have other groups of the same names:")


def test_a_study_that_is_not_answered_has_dashes(pair):
    for name in ("findings.json", "confirmation.json", "results.parquet"):
        (pair[1] / name).unlink()
    (verdicts, shares, languages), _ = compare(pair)
    assert cells(verdicts)["verdict"][1] == "Not answered yet."
    assert cells(verdicts)["predicted gain"][1] == "–"
    assert cells(shares)["Slavic"][1] == "35.0 → –"
    assert cells(languages)["Maltese"][1] == "–"


def test_a_study_of_no_runs_or_of_another_identity_is_compared_all_the_same(pair):
    study = json.loads((pair[1] / "study.json").read_text())
    study["cost"]["proxies"]["runs"] = 0
    study["identity"] = {"proxy": [1]}
    (pair[1] / "study.json").write_text(json.dumps(study))
    (verdicts, *_), differences = compare(pair)
    assert cells(verdicts)["tokens each"] == ("512,000", "12.3 M".replace(" ", "\N{NO-BREAK SPACE}"))
    assert differences == [
        "first and second have proxies of another size or length: compare changes, not bits per byte."
    ]


def test_one_pair_has_no_interval_and_groups_that_do_not_move_are_compared(pair):
    confirmation = json.loads((pair[1] / "confirmation.json").read_text())
    change(pair[1] / "confirmation.json", gain={**confirmation["gain"], "low": None, "high": None, "of_seeds": [0.01]})
    fix(pair[0], "Maltese")
    (verdicts, shares, _), _ = compare(pair)
    assert cells(verdicts)["confirmed gain"][1].endswith(" (one pair has no interval)")
    assert cells(shares)["Maltese"][0] == "3.0 → 3.0 %"


def test_equal_names_are_numbered_and_markup_is_text(pair):
    for folder in pair:
        change(folder / "study.json", name="[red]same")
    tables, _ = compare(pair)
    assert [str(column.header) for column in tables[0].columns][1:] == [r"\[red]same #1", r"\[red]same #2"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(tables[0])
    assert "[red]same #1" in captured.get()


def test_a_folder_that_is_none_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a study"):
        compare([*pair, tmp_path])
