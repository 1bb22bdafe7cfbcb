"""The report of a study must be whole, harmless, and say the numbers that were found; and must not say more."""

import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.ablation.report.answer import ANCHORS
from eurollm_jax.ablation.report.charts import whisker
from eurollm_jax.ablation.report.records import Interval, read_study
from eurollm_jax.ablation.report.terminal import answer_table, design_tables
from eurollm_jax.ablation.report.words import sentence
from eurollm_jax.ablation.table import weighted
from eurollm_jax.evaluation.report.svg import Axis
from eurollm_jax.languages import LANGUAGES as TABLE
from tests.ablation.study_folder import (
    DIVERGED,
    GROUPS,
    LANGUAGES,
    PRIOR,
    PROPOSAL,
    RUNS,
    STEPS,
    WEIGHTS,
    change,
    fix,
    report,
    signed,
    write_study,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "families"


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
    assert "Prior, observed: the mean of prior-0 and prior-1." in page.text
    titles = {attrs.get("title") for _, attrs in page.tags}
    for code in LANGUAGES:
        name, weight, _, change, prior, proposal, *rest = page.row("data-language", code)
        assert float(prior[0]) == pytest.approx((finals["prior-0"][code] + finals["prior-1"][code]) / 2, rel=1e-12)
        assert name[1] == TABLE[code].name + code
        assert float(weight[0]) == written["study"]["targets"][code]
        assert float(change[0]) == found["changes"][code]["value"]
        foretold = found["predicted"]["prior"][code]
        assert f"predicted {foretold['value']:.3f}, {foretold['low']:.3f} to {foretold['high']:.3f}" in titles
        assert float(proposal[0]) == found["predicted"]["proposal"][code]["value"]
        confirmed = written["confirmation"]["arms"]
        of_seeds = [confirmed[arm]["bits_per_byte"][code] for arm in ("prior", "proposal", "UniMax")]
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


def test_a_prior_that_no_proxy_tried_is_shown_as_predicted(folder):
    written = write_study(folder)
    for arm in written["study"]["arms"]:
        arm["kind"] = "draw"
    change(folder / "study.json", arms=written["study"]["arms"])
    page = report(folder)
    assert "prior,predicted" in page.text
    assert "prior,observed" not in page.text
    for code in LANGUAGES:
        assert float(page.row("data-language", code)[4][0]) == written["findings"]["predicted"]["prior"][code]["value"]


def test_a_group_that_does_not_move_has_empty_cells_that_nothing_counts(folder):
    transfer = write_study(folder)["findings"]["transfer"]
    fix(folder, "Uralic")
    page = report(folder)
    for code in LANGUAGES:
        _, *shown = page.row("data-transfer", code)
        assert [words for _, words in shown][list(GROUPS).index("Uralic")] == ""
    empty = [attrs for tag, attrs in page.tags if tag == "td" and attrs.get("title", "").startswith("Uralic → ")]
    assert len(empty) == len(LANGUAGES)
    assert {attrs["title"] for attrs in empty} == {f"Uralic → {TABLE[code].name}: does not move" for code in LANGUAGES}
    assert not [attrs for attrs in empty if {"faint", "helps", "harms"} & set(attrs["class"].split())]
    others = [one for row in transfer.values() for group, one in row.items() if group != "Uralic"]
    clear = sum(one["low"] > 0 or one["high"] < 0 for one in others)
    assert f"Of 50 intervals of 90 %, {clear} leave out 0; about 5 would" in page.text
    assert "Nothing is known of Uralic, whose shares do not move." in page.text
    assert "Fixed: Uralic." in page.text
    said, table = answer_table(folder)
    assert said.startswith("Recommended")
    assert table.row_count == len(GROUPS)


def test_learning_curves_are_of_one_part_of_the_text(folder):
    """The last step is measured twice, and the whole text is PART bits easier than the part."""
    write_study(folder)
    page = report(folder)
    (label,) = (attrs["aria-label"] for _, attrs in page.tags if "proxies by tokens" in attrs.get("aria-label", ""))
    along = [
        [weighted(bits, WEIGHTS) for _, bits in curve.along]
        for curve in read_study(folder).proxies.values()
        if not curve.diverged
    ]
    later = [value for values in along for value in values[len(values) // 3 :]]
    assert label.endswith(f"from {max(later):.3f} to {min(later):.3f}")
    lines = [
        attrs["d"] for tag, attrs in page.tags if tag == "path" and attrs.get("class") in {"raw", "prior-line", "model"}
    ]
    drawn = [d for d in lines if d != "M0,7H24"]
    assert len(drawn) == RUNS - 1
    assert {len(re.findall("[ML]", d)) for d in drawn} == {len(STEPS)}


def test_one_pair_has_no_interval(folder):
    gain = write_study(folder, held="undecided")["confirmation"]["gain"]
    change(folder / "confirmation.json", gain={**gain, "low": None, "high": None, "of_seeds": gain["of_seeds"][:1]})
    text = report(folder).text
    assert f"Confirmed gain{signed(gain['mean'])} bits per byteone pair has no interval" in text
    assert f"observed, confirmation{signed(gain['mean'])}one pair has no interval" in text


def test_runs_of_a_confirmation_stand_under_their_seeds_where_one_diverged(folder):
    arms = write_study(folder)["confirmation"]["arms"]
    arms["UniMax"]["seeds"].pop(1)
    arms["UniMax"]["objective"].pop(1)
    change(folder / "confirmation.json", arms=arms, diverged={"UniMax-seed-5": "the loss was not finite"})
    page = report(folder)
    assert "mixturemeanseed 4seed 5seed 6" in page.text
    _, mean, *seeds = page.row("data-arm", "UniMax")
    first, last = arms["UniMax"]["objective"]
    assert float(mean[0]) == (first + last) / 2
    assert [words for _, words in seeds] == [f"{first:.4f}", "–", f"{last:.4f}"]
    assert "Diverged, so that their pair is not in the gain: UniMax-seed-5 (the loss was not finite)." in page.text


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


def test_times_are_said_to_be_of_starts_that_ended_in_order(folder):
    write_study(folder)
    text = report(folder).text
    assert "41 min 9 s on 2 x cpu of 2 cores, of starts that ended in order" in text
    assert "Time is that of the starts that ended in order" in text


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
