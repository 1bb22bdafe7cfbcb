"""The report of a study must be whole, harmless, and say the numbers that were found; and must not say more."""

import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.ablation.finding import Contender, Finding, HeldOutRun
from eurollm_jax.ablation.report import write_report
from eurollm_jax.ablation.report.answer import ANCHORS
from eurollm_jax.ablation.report.charts import whisker
from eurollm_jax.ablation.report.records import FILES, Findings, Interval, read_study
from eurollm_jax.ablation.report.terminal import answer_table, design_tables
from eurollm_jax.ablation.report.words import sentence
from eurollm_jax.corpus.folders import write_json
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report.records import parse
from eurollm_jax.evaluation.report.svg import Axis
from eurollm_jax.languages import LANGUAGES as TABLE
from tests.ablation.study_folder import (
    DIVERGED,
    GROUPS,
    LANGUAGES,
    PRIOR,
    PROPOSAL,
    RUNS,
    change,
    write_study,
)
from tests.evaluation.test_report import Page


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "families"


def report(folder):
    made = write_report(folder)
    assert made == folder / "report.html"
    page = Page(made.read_text(encoding="utf-8"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    return page


def signed(value, digits=4):
    return f"{value:+.{digits}f}".replace("-", "−")


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(folder):
    write_study(folder)
    page = report(folder)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert ids == set(ANCHORS)
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attrs.keys()
        assert not [name for name in attrs if name.startswith("on")]
        if "href" in attrs:
            assert attrs["href"].removeprefix("#") in ids
    source = (folder / "report.html").read_text(encoding="utf-8")
    style = source[source.index("<style>") : source.index("</style>")]
    assert ".whisker" in style
    assert not re.search(r"url\(|@import", style)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "$" not in source.replace("${", "")


def test_a_recommended_study_says_so_with_its_gain_and_its_moves(folder):
    found = write_study(folder)["findings"]
    text = report(folder).text
    assert "Recommended, and confirmed: take the proposed mixture." in text
    assert found["reasons"][0] in text
    assert "Germanic from 30.0 % to 22.0 % of the tokens" in text
    gain = found["gain"]
    assert f"Predicted gain{signed(gain['value'])} bits per byte" in text
    assert f"90 % interval {signed(gain['low'])} to {signed(gain['high'])}" in text
    assert "Which shares of families do ten languages learn best from?" in text
    assert "Asked of a <planted> law & nothing else." in text


@pytest.mark.parametrize(
    ("recommended", "held", "verdict"),
    [
        (False, "undecided", "No recommendation: keep the prior."),
        (False, "no", "No recommendation: keep the prior."),
        (False, "yes", "Not recommended by the proxies, though the proposal won when trained again."),
        (True, "no", "Not confirmed: keep the prior."),
        (True, "undecided", "Recommended, but not decided by the confirmation."),
        (True, None, "Recommended: take the proposed mixture."),
    ],
)
def test_the_verdict_follows_the_finding_and_the_confirmation(folder, recommended, held, verdict):
    written = write_study(folder, recommended=recommended, held=held or "yes")
    if held is None:
        (folder / "confirmation.json").unlink()
    page = report(folder)
    assert page.texts["strong"][0] == verdict
    further = written["findings"]["further"]
    assert (further in page.text) if further else True
    assert ("The study does not recommend these shares." in page.text) != recommended
    assert ("writes no datamix.txt" in page.text) != recommended
    assert answer_table(folder)[0].startswith(verdict)


def test_shares_stand_beside_the_priors_with_their_intervals(folder):
    found = write_study(folder)["findings"]["proposal"]
    page = report(folder)
    for group, prior, proposed in zip(GROUPS, PRIOR, PROPOSAL, strict=True):
        name, _, shown_prior, shown, interval, change, bounds = page.row("data-group", group)
        assert name[1] == group
        assert float(shown_prior[0]) == prior
        assert float(shown[0]) == proposed
        assert interval[1] == f"{100 * found[group]['low']:.1f} to {100 * found[group]['high']:.1f}\N{NO-BREAK SPACE}%"
        assert change[1] == signed(100 * (proposed - prior), 1)
        assert bounds[1].startswith("1 to 50" if group == "Slavic" else "1 to 100")


def test_the_dot_the_whisker_and_the_tick_stand_where_the_axis_says():
    axis = Axis(0.0, 0.5, [], str)
    drawn = whisker(Interval(0.2, 0.1, 0.3), axis, "x", prior=0.25, within=(0.0, 0.4))
    assert 'cx="40.00%"' in drawn
    assert 'class="arm" x1="20.00%" x2="60.00%"' in drawn
    assert 'class="prior" x1="50.00%"' in drawn
    assert 'class="band" x="0.00%" width="80.00%"' in drawn
    assert "arm" not in whisker(Interval(0.2, None, None), axis, "x")


def test_each_language_shows_prior_proposal_best_runs_and_confirmation(folder):
    written = write_study(folder)
    page, found = report(folder), written["findings"]
    best = sorted(written["final"], key=written["final"].get)[:2]
    finals = {name: curve.final for name, curve in read_study(folder).proxies.items()}
    for code in LANGUAGES:
        name, weight, _, change, prior, proposal, *rest = page.row("data-language", code)
        assert name[1] == TABLE[code].name + code
        assert float(weight[0]) == written["study"]["targets"][code]
        assert float(change[0]) == found["changes"][code]["value"]
        assert float(prior[0]) == found["predicted"]["prior"][code]["value"]
        assert float(proposal[0]) == found["predicted"]["proposal"][code]["value"]
        of_seeds = [written["confirmation"]["arms"][arm]["bits_per_byte"][code] for arm in ("prior", "proposal")]
        expected = [finals[name][code] for name in best] + [math.fsum(values) / 3 for values in of_seeds]
        assert [float(cell[0]) for cell in rest] == expected
    better = sum(one["high"] < 0 for one in found["changes"].values())
    assert f"By the law, {better} of 10 languages get better" in page.text


def test_transfer_shows_figures_only_where_the_interval_leaves_out_zero(folder):
    transfer = write_study(folder)["findings"]["transfer"]
    page = report(folder)
    cells = {attrs["title"]: attrs for tag, attrs in page.tags if tag == "td" and "heat" in attrs.get("class", "")}
    assert len(cells) == len(LANGUAGES) * len(GROUPS)
    for code in LANGUAGES:
        _, *shown = page.row("data-transfer", code)
        for group, (value, words) in zip(GROUPS, shown, strict=True):
            found = transfer[code][group]
            assert float(value) == found["value"]
            clear = found["low"] > 0 or found["high"] < 0
            assert words == (signed(1000 * found["value"], 1) if clear else "")
            (attrs,) = (a for t, a in cells.items() if t.startswith(f"{group} → {TABLE[code].name}:"))
            assert ("faint" in attrs["class"].split()) != clear
            assert ("helps" in attrs["class"].split()) == (found["value"] < 0)
            assert ("own" in attrs["class"].split()) == any(s.startswith(f"{code}-") for s in GROUPS[group])
            assert f"interval {signed(1000 * found['low'], 2)} to {signed(1000 * found['high'], 2)}" in attrs["title"]
    clear = sum(one["low"] > 0 or one["high"] < 0 for row in transfer.values() for one in row.values())
    assert f"Of 60 intervals of 90 %, {clear} leave out 0; about 6 would" in page.text


def test_the_scatter_holds_every_run_that_was_left_out_and_scores_are_said(folder):
    found = write_study(folder)["findings"]
    page = report(folder)
    hovers = [json.loads(attrs["data-hover"]) for _, attrs in page.tags if "data-hover" in attrs]
    (scatter,) = (hover for hover in hovers if "run" in hover["rows"])
    runs = sorted(found["heldout"]["log-linear"], key=lambda run: run["predicted"])
    assert scatter["rows"]["run"] == [run["name"] for run in runs]
    assert scatter["rows"]["observed"] == [f"{run['observed']:.4f}" for run in runs]
    assert scatter["x"] == sorted(scatter["x"])
    dots = [a["style"] for tag, a in page.tags if tag == "i" and a.get("class") == "dot model"]
    places = [tuple(map(float, re.findall(r"[\d.]+", style))) for style in dots]
    for get, index, sign in ((lambda r: r["predicted"], 0, 1), (lambda r: r["observed"], 1, -1)):
        values = np.array([get(run) for run in runs])
        assert np.corrcoef(values, [sign * place[index] for place in places])[0, 1] > 0.99999
    assert "log-linear: ρ 0.93, R² 0.88; power: ρ 0.71, R² 0.44; trees: ρ 0.62, R² –" in page.text
    error = math.sqrt(np.mean([(run["predicted"] - run["observed"]) ** 2 for run in runs]))
    assert f"Root of the mean squared error {error:.4f}" in page.text
    assert [cell[1] for cell in page.row("data-law", "power")] == ["power", "3", "0.710", "0.440", "–", "–"]


@pytest.mark.parametrize(("low", "high", "where"), [(-1, 1, "within"), (-1, 0, "above"), (0.5, 1, "below")])
def test_the_confirmation_is_held_against_what_was_foretold(folder, low, high, where):
    confirmation = write_study(folder)["confirmation"]
    change(folder / "confirmation.json", predicted_gain={"mean": 0.0, "low": low, "high": high})
    page = report(folder)
    said = f"The observed gain lies {where} the interval that the proxies foretold."
    assert f"{confirmation['sentence']} {said}" in page.text
    for arm, record in confirmation["arms"].items():
        _, mean, *pairs = page.row("data-arm", arm)
        assert float(mean[0]) == math.fsum(record["objective"]) / 3
        assert [float(cell[0]) for cell in pairs] == record["objective"]
        assert [cell[1] for cell in pairs] == [f"{value:.4f}" for value in record["objective"]]


def test_baselines_are_listed_by_what_they_promise(folder):
    found = write_study(folder)["findings"]["baselines"]
    page = report(folder)
    shown = [attrs["data-baseline"] for attrs, _ in page.rows if "data-baseline" in attrs]
    assert shown == sorted(found, key=lambda name: found[name]["value"])
    for name, record in found.items():
        _, _, value, gain, interval = page.row("data-baseline", name)
        assert float(value[0]) == record["value"]
        assert gain[1] == ("–" if name == "prior" else signed(record["gain"]["value"]))
        assert interval[1].startswith("–" if name == "prior" else signed(record["gain"]["low"]))


def test_runs_that_diverged_are_named_counted_and_without_a_figure(folder):
    written = write_study(folder)
    page = report(folder)
    assert f"1 of {RUNS} proxies diverged. They are in no fit and no average:" in page.text
    assert f"{DIVERGED}: the loss was not finite, from step 70" in page.text
    assert f"Proxies{RUNS - 1} of {RUNS}" in page.text
    for arm in written["study"]["arms"]:
        name, kind, seed, value, *shares = page.row("data-run", arm["name"])
        assert (name[1], kind[1], seed[1]) == (arm["name"], arm["kind"], str(arm["seed"]))
        assert [float(cell[0]) for cell in shares] == list(arm["shares"].values())
        if arm["name"] == DIVERGED:
            assert value == ["inf", "diverged"]
        else:
            assert float(value[0]) == pytest.approx(written["final"][arm["name"]], rel=1e-12)
    for group in GROUPS:
        tried = [arm["shares"][group] for arm in written["study"]["arms"]]
        _, _, least, most, without = page.row("data-tried", group)
        assert (float(least[0]), float(most[0])) == (min(tried), max(tried))
        assert without[1] == str(sum(share == 0 for share in tried))


def test_the_mixture_stands_there_to_be_copied(folder):
    write_study(folder)
    page = report(folder)
    literal, blend = (text.strip() for text in page.texts["pre"][-2:])
    assert literal == (folder / "mixture.py").read_text().strip()
    assert blend == (folder / "datamix.txt").read_text().strip()


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("results.parquet", "No proxy has been measured yet."),
        ("findings.json", "Not answered yet."),
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
    with pytest.raises(UserError, match=r"study\.json"):
        write_report(folder)
    (folder / "study.json").unlink()
    with pytest.raises(UserError, match=r"is not the folder of a study, it has no study\.json"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


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


def test_a_dry_run_prints_mixtures_parameters_and_cost(folder, capsys):
    described = write_study(folder)["study"]
    described["cost"]["proxies"] |= {"expected_seconds": 1800.0, "rate": "timed on 3 steps"}
    console = Console(width=140)
    for part in design_tables(described):
        console.print(part)
    said = capsys.readouterr().out
    for arm in described["arms"]:
        cells = next(line.split() for line in said.splitlines() if line.split()[:1] == [arm["name"]])
        assert [float(cell) for cell in cells[2:]] == [round(100 * share, 1) for share in arm["shares"].values()]
    assert "24 runs for 7 of the log-linear law, 3 of the power law" in said
    assert "5e+14 FLOP in all" in said
    proxies = next(line for line in said.splitlines() if line.split()[:1] == ["proxies"])
    assert proxies.split()[-3:] == ["30", "min", "1.00"]  # half an hour on two devices
    assert "proxies: timed on 3 steps" in said


def test_languages_outside_the_table_are_shown_by_their_code(folder):
    write_study(folder)
    text = (folder / "study.json").read_text().replace('"sv"', '"xx"')
    (folder / "study.json").write_text(text)
    (folder / "findings.json").write_text((folder / "findings.json").read_text().replace('"sv"', '"xx"'))
    page = report(folder)
    assert page.row("data-language", "xx")[0][1] == "xxxx"


def test_numbers_in_sentences_are_set_like_the_others():
    nb = "\N{NO-BREAK SPACE}"
    assert (
        sentence("-0.0037 to +0.1 (90% of draw-03), 1e-5 & -2%")
        == f"−0.0037 to +0.1 (90{nb}% of draw-03), 1e-5 &amp; −2{nb}%"
    )


def test_groups_that_were_hardly_tried_are_named(folder):
    written = write_study(folder)
    assert "less than a point apart" not in report(folder).text
    arms = written["study"]["arms"]
    for i, arm in enumerate(arms):
        arm["shares"]["Maltese"] = 0.03 + 0.009 * i / len(arms)
    change(folder / "study.json", arms=arms)
    assert "The shares of Maltese that were tried lie less than a point apart" in report(folder).text
