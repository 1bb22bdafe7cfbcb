"""The report is read by people who were not there: it must be whole, harmless, and say the numbers of the run."""

import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report import final_table, write_report
from eurollm_jax.evaluation.report.records import read_run
from eurollm_jax.evaluation.report.svg import Axis, Line, evenly, moving_mean, nice_axis, path, thin
from eurollm_jax.evaluation.report.text import count, duration, escape, share, signed_percent, size
from eurollm_jax.languages import LANGUAGES

CODES = [code for code, language in LANGUAGES.items() if language.status != "regional"][:36]
NASTY = "<script>alert('x')</script> & \"q\" \x00\x07\x1b[31m \x85 \ud83d </blockquote> $body {x} %s \u202e https://x.example"
SAMPLES = [
    ("bg", "Европейският съюз е", " обединение на държави, които имат общ пазар и се грижат за своите граждани."),
    ("el", "Η Ευρωπαϊκή Ένωση", " είναι μια ένωση κρατών που έχουν κοινή αγορά και\nκοινούς κανόνες."),
    ("mt", "Il-lingwa Maltija", " hija lingwa uffiċjali tal-pajjiż u titħaddem kuljum mill-poplu."),
    (
        "fi",
        "Asetukset",
        " tallennetaan laitteeseen, kun painat painiketta. Voit palauttaa oletusarvot milloin tahansa.",
    ),
    ("ka", "საქართველო", " არის ქვეყანა, სადაც ადამიანები საუბრობენ ქართულ ენაზე."),
    (
        "de",
        "Der Sensor",
        " meldet eine Störung.  Prüfen Sie die Verbindung.\n\n1. Gerät ausschalten\n2. Zehn Sekunden warten",
    ),
    ("en", NASTY, NASTY),
]


def write_run(run, codes=CODES, steps=600):
    """Write a whole, plausible run and return what went into each file."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True, exist_ok=True)
    batch, length = 32, 256
    text = {code: int(10 ** rng.uniform(4.7, 6.5)) for code in codes}
    shares = {code: text[code] ** 0.5 / sum(n**0.5 for n in text.values()) for code in codes}
    final, languages = {}, {}
    for code in codes:
        wide = LANGUAGES[code].script in {"Cyrl", "Grek"}
        xz = rng.uniform(1.3, 1.7) if wide else rng.uniform(2.1, 2.7)
        final[code] = xz * rng.uniform(0.72, 1.03)
        languages[code] = {
            "name": LANGUAGES[code].name,
            "status": LANGUAGES[code].status,
            "documents": text[code] // 14000 + 1,
            "bytes": text[code] // 20,
            "tokens": text[code] // 80,
            "nats": final[code] * (text[code] // 20) * math.log(2),
            "bits_per_byte": final[code],
            "baselines": {"xz": xz, "order0": rng.uniform(3.3, 3.7) if wide else rng.uniform(4.4, 4.9)},
        }
    won = {code for code in codes if final[code] < languages[code]["baselines"]["xz"]}
    official = {code for code in codes if LANGUAGES[code].status == "official"}
    files = {
        "experiment.json": {
            "name": "quickstart",
            "docstring": "Does a small model learn many languages in a few minutes on a laptop?\n\n"
            "It reads translated interface texts and is measured against\nthe xz compressor on text that it has not"
            " seen.\n\n    eurollm train experiments/quickstart.py\n",
            "fingerprint": "9f2c" * 16,
            "created": "2026-11-20T09:58:12Z",
            "experiment": {"seed": 0, "model": {"width": 256, "tied": True}, "data": {"path": "data/<starter>"}},
            "parameters": 7_654_321,
            "parameters_non_embedding": 4_567_890,
            "versions": {"eurollm_jax": "0.1.0", "jax": "0.12.0"},
            "devices": "2 CPU cores, AMX",
            "code": None,
        },
        "plan.json": {
            "total_rows": steps * batch,
            "sequence_length": length,
            "stages": [{"start": 0, "shares": shares}],
            "sources": {code: _plan(text[code], shares[code], steps * batch, length, code) for code in codes},
        },
        "evaluation.json": {
            "step": steps,
            "definition": "Sum of nats / ln 2 / sum of raw UTF-8 bytes.",
            "languages": languages,
            "beats_xz": {
                "official": len(won & official),
                "official_total": len(official),
                "all": len(won),
                "all_total": len(codes),
            },
        },
        "samples.json": [
            {"language": code, "prompt": prompt, "continuation": text, "temperature": 0.0 if code == "de" else 0.8}
            for code, prompt, text in SAMPLES
        ],
    }
    for name, value in files.items():
        (run / name).write_text(json.dumps(value), encoding="utf-8")
    lines = list(_metrics(rng, steps, batch, length, shares, final))
    write_lines(run, lines)
    return {**files, "metrics.jsonl": lines}


def _plan(text, share, total_rows, length, code):
    rows, tokens = round(share * total_rows), text // 4
    epochs = rows * length / tokens
    return {
        "language": code,
        "share": share,
        "rows": rows,
        "tokens": rows * length,
        "bytes": rows * length * 4,
        "epochs": epochs,
        "first_repeat": int(total_rows / epochs) if epochs > 1 else None,
        "store_tokens": tokens,
        "store_bytes": text,
        "store_documents": text // 700,
        "licences": {"Apache-2.0": text * 2 // 3, "GPL-2.0-or-later": text - text * 2 // 3},
    }


def _metrics(rng, steps, batch, length, shares, final):
    for step in range(1, steps + 1):
        t, row = step / steps, step * batch
        loss = 3.1 + 6.2 * math.exp(-step / 22) + 1.4 * (1 - t) ** 2 + rng.normal(0, 0.08)
        yield {
            "kind": "train",
            "step": step,
            "row": row,
            "tokens": row * length,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / 3.9,
            "learning_rate": 3e-3 * min(1.0, step / 40) * (1 if t < 0.8 else (1 - t) / 0.2),
            "grad_norm": rng.lognormal(-0.5, 0.3),
            "tokens_per_second": rng.normal(24000, 700) * (0.5 if step % 97 == 0 else 1),
            "mfu": 0.31,
            "data_wait": rng.uniform(0.001, 0.02),
            "seconds": step * 0.55,
            "sources": {
                code: {"rows": round(share * row), "tokens": round(share * row) * length, "nats": 200.0, "bytes": 800}
                for code, share in shares.items()
            },
        }
        if step == steps // 2:
            yield {"kind": "restart", "step": step, "time": "2026-11-20T10:04:00Z"}
            yield {"kind": "skipped", "step": step, "loss": None, "grad_norm": 3e4}
        if step % max(1, steps // 15) == 0:
            scores = {c: value + 5.5 * math.exp(-step / 45) + 1.1 * (1 - t) ** 2 for c, value in final.items()}
            macro = sum(scores.values()) / len(scores)
            record = {"kind": "evaluation", "step": step, "row": row, "seconds": step * 0.55}
            yield {**record, "bits_per_byte": scores, "macro_bits_per_byte": macro}


def write_lines(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects tags, words and table rows."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.rows, self.texts = [], [], [], [], {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        if tag in ("td", "th") and self.rows:
            self.rows[-1][1].append([dict(attrs).get("data-value"), ""])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            return
        self.words.append(data)
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "td" in self.open or ("th" in self.open and "tr" in self.open):
            self.rows[-1][1][-1][1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def row(self, key, value):
        return next(cells for attrs, cells in self.rows if attrs.get(key) == value)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "quickstart"


def report(run):
    made = write_report(run)
    assert made == run / "report.html"
    return Page(made.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(run):
    write_run(run)
    page = report(run)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attrs.keys()
        assert not [name for name in attrs if name.startswith("on")]
        if "href" in attrs:
            assert attrs["href"].removeprefix("#") in ids
    source = (run / "report.html").read_text(encoding="utf-8")
    style = source[source.index("<style>") : source.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';")


def test_each_language_shows_the_numbers_of_the_evaluation(run):
    files = write_run(run)
    page = report(run)
    for code, result in files["evaluation.json"]["languages"].items():
        name, held_out, _, model, xz, order0, gain = page.row("data-language", code)
        assert name[1] == result["name"] + code
        assert int(held_out[0]) == result["bytes"]
        exact = [result["bits_per_byte"], result["baselines"]["xz"], result["baselines"]["order0"]]
        assert [float(cell[0]) for cell in (model, xz, order0)] == exact
        assert [cell[1] for cell in (model, xz, order0)] == [f"{value:.3f}" for value in exact]
        assert gain[1].startswith("+" if exact[0] < exact[1] else "−")
        assert float(gain[1][1:-2]) == pytest.approx(100 * abs(exact[1] - exact[0]) / exact[1], abs=0.0501)
    won = files["evaluation.json"]["beats_xz"]
    assert f"{won['official']} of 24 official languages" in page.text
    assert f"{won['all']} of 36 in all" in page.text
    mean = np.mean([result["bits_per_byte"] for result in files["evaluation.json"]["languages"].values()])
    assert f"Held-out bits per byte{mean:.3f}" in page.text


def test_official_languages_come_first_each_group_by_name(run):
    files = write_run(run)
    shown = [attrs["data-language"] for attrs, _ in report(run).rows if "data-language" in attrs]
    assert sorted(shown) == sorted(CODES)
    assert {LANGUAGES[code].status for code in shown[:24]} == {"official"}
    names = [files["evaluation.json"]["languages"][code]["name"] for code in shown[:24]]
    assert names == sorted(names)


def test_languages_that_fall_short_are_named_with_the_distance(run):
    files = write_run(run)
    lost = [
        (result["name"], result["bits_per_byte"] - result["baselines"]["xz"])
        for result in files["evaluation.json"]["languages"].values()
        if result["status"] == "official" and result["bits_per_byte"] >= result["baselines"]["xz"]
    ]
    text = report(run).text
    assert lost
    for name, by in lost:
        assert f"{name} by {by:.3f}" in text


def test_the_mixture_shows_planned_and_consumed_shares(run):
    files = write_run(run)
    page = report(run)
    consumed = [line for line in files["metrics.jsonl"] if line["kind"] == "train"][-1]["sources"]
    total = sum(progress["rows"] for progress in consumed.values())
    for name, source in files["plan.json"]["sources"].items():
        _, _, planned, got, epochs, stored, repeat, licence = page.row("data-source", name)
        assert float(planned[0]) == source["share"]
        assert float(got[0]) == consumed[name]["rows"] / total
        assert epochs[1] == f"{source['epochs']:.2f}"
        assert int(stored[0]) == source["store_bytes"]
        assert (repeat[1] == "never") == (source["first_repeat"] is None)
        assert "Apache-2.0 + 1 more" in licence[1]
    for licence in ("Apache-2.0", "GPL-2.0-or-later"):
        expected = sum(source["licences"][licence] for source in files["plan.json"]["sources"].values())
        assert int(page.row("data-licence", licence)[1][0]) == expected


def test_the_headline_says_what_was_asked_and_how_far_the_run_came(run):
    files = write_run(run)
    text = report(run).text
    assert "Does a small model learn many languages in a few minutes on a laptop?" in text
    assert "measured against the xz compressor on text that it has not seen." in text
    assert "Parameters7.65 M" in text
    assert "4.57 M without embeddings" in text
    assert "Tokens seen4.92 M600 steps, the whole plan" in text
    assert "Training time5 min 30 s2 CPU cores, AMX" in text
    assert "Resumedat step 300, 2026-11-20T10:04:00Z" in text
    write_lines(run, [line for line in files["metrics.jsonl"] if line["step"] <= 150])
    assert "150 steps, 25.0 % of the plan" in report(run).text


def test_samples_keep_their_text_and_cannot_break_the_page(run):
    write_run(run)
    page = report(run)
    quotes = [attrs["lang"] for tag, attrs in page.tags if tag == "blockquote"]
    assert quotes == [code for code, _, _ in SAMPLES]
    assert page.texts["mark"][:-1] == [prompt for _, prompt, _ in SAMPLES[:-1]]
    visible = (
        NASTY.replace("\x00", "␀").replace("\x07", "␇").replace("\x1b", "␛").replace("\x85", "�").replace("\ud83d", "�")
    )
    assert "".join(page.words).count(visible) == 2
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "data/<starter>" in page.text


@pytest.mark.parametrize("removed", ["plan.json", "metrics.jsonl", "evaluation.json", "samples.json"])
def test_a_missing_file_leaves_a_section_that_says_how_to_make_it(run, removed):
    write_run(run)
    (run / removed).unlink()
    page = report(run)
    assert f"{removed} is made by eurollm train experiments/quickstart.py." in page.text
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == [
        "learning", "languages", "progress", "mixture", "throughput", "samples", "provenance",
    ]  # fmt: skip


def test_a_run_that_has_only_begun_has_a_report(run):
    files = write_run(run)
    for name in ("plan.json", "evaluation.json", "samples.json"):
        (run / name).unlink()
    write_lines(run, files["metrics.jsonl"][:1])
    assert "not evaluated yet" in report(run).text
    (run / "metrics.jsonl").write_text("")
    assert "not trained yet" in report(run).text


def test_a_run_that_diverged_says_so(run):
    files = write_run(run)
    lines = [
        line | {"loss": math.nan, "grad_norm": math.inf} if line["kind"] == "train" and line["step"] > 400 else line
        for line in files["metrics.jsonl"]
    ]
    write_lines(run, lines)
    evaluation = files["evaluation.json"]
    evaluation["languages"]["bg"]["bits_per_byte"] = math.nan
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = report(run)
    assert "The loss was not finite in 200 of 600 intervals, first at step 401." in page.text
    assert page.row("data-language", "bg")[3][1] == "not finite"
    drawn = " ".join(attrs["d"] for tag, attrs in page.tags if tag == "path")
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_repeated_steps_count_once_and_an_unfinished_last_line_is_mentioned(run):
    files = write_run(run)
    lines = files["metrics.jsonl"]
    again = [line for line in lines if line["kind"] == "train"][-3:]
    write_lines(run, [*lines, *(line | {"loss": 9.5} for line in again)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    metrics = read_run(run).metrics
    assert [record.step for record in metrics.train] == list(range(1, 601))
    assert [record.loss for record in metrics.train[-3:]] == [9.5] * 3
    assert f"line {len(lines) + 4} of metrics.jsonl, which a stopped run left unfinished" in report(run).text


MALFORMED = [
    ("plan.json", '{"total_rows": 3,\n "sequence_length" 4}', ["plan.json", "line 2"]),
    ("evaluation.json", '{"step": 1, "definition": "d", "languages": {}}', ["evaluation.json", "`beats_xz`"]),
    ("experiment.json", "[]", ["experiment.json", "an object"]),
    ("samples.json", '[{"language": 3, "prompt": "", "continuation": "", "temperature": 1}]', ["`[0].language`", "3"]),
    ("metrics.jsonl", '{"kind": "restart", "step": 1, "time": "t"}\nnonsense\n', ["metrics.jsonl line 2"]),
    ("metrics.jsonl", '{"kind": "restart", "step": true, "time": "t"}\n', ["line 1", "`step`", "whole number"]),
    ("metrics.jsonl", '{"kind": "begin"}\n', ["line 1", "'begin'", "train, evaluation, restart"]),
]


@pytest.mark.parametrize(("name", "content", "said"), MALFORMED)
def test_a_malformed_file_is_named_and_the_old_report_stays(run, name, content, said):
    write_run(run)
    (run / "report.html").write_text("old")
    (run / name).write_text(content)
    with pytest.raises(UserError) as error:
        write_report(run)
    for words in said:
        assert words in str(error.value)
    assert (run / "report.html").read_text() == "old"
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_bytes_that_are_not_utf8_and_folders_that_are_no_run_are_refused(run):
    with pytest.raises(UserError, match=r"not a run directory.*experiment\.json"):
        write_report(run)
    write_run(run)
    (run / "samples.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"samples\.json is not UTF-8 at byte 2"):
        write_report(run)


def test_the_final_table_has_a_line_per_language_that_fits_80_columns(run):
    files = write_run(run)
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(final_table(run))
    lines = [line.split("  ") for line in capture.get().splitlines()]
    cells = {parts[0].strip(): [part.strip() for part in parts[1:] if part.strip()] for parts in lines}
    for result in files["evaluation.json"]["languages"].values():
        status, held_out, model, xz, order0, gain = cells[result["name"]]
        assert (status, held_out) == (result["status"], f"{result['bytes']:,}")
        expected = (result["bits_per_byte"], result["baselines"]["xz"], result["baselines"]["order0"])
        assert (model, xz, order0) == tuple(f"{value:.3f}" for value in expected)
        assert gain[0] == ("+" if expected[0] < expected[1] else "−")
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"eurollm train experiments/quickstart\.py"):
        final_table(run)


def test_smoothing_is_the_mean_of_a_window_that_is_cut_at_the_ends():
    y = np.array([4.0, 1.0, math.nan, 7.0, 2.0, 9.0, 3.0])
    expected = [np.nanmean(y[max(0, i - 2) : i + 3]) for i in range(7)]
    np.testing.assert_allclose(moving_mean(y, 5), expected)


def test_a_thinned_curve_keeps_its_extremes_its_ends_and_its_gaps():
    y = np.random.default_rng(1).normal(size=20_000)
    y[[777, 13_001]] = 50, -50
    y[9_000] = math.nan
    kept = thin(y, 200)
    assert len(kept) <= 2 * 200
    assert {0, 777, 9_000, 13_001, 19_999} <= set(kept)
    x = np.arange(5.0)
    broken = Line(x, np.array([1.0, 2.0, math.nan, 4.0, 5.0]), "model")
    assert path(broken, Axis(0, 4, [], str), Axis(0, 5, [], str)).count("M") == 2
    assert evenly(1_000_000, 5) == [0, 250_000, 500_000, 749_999, 999_999]


@pytest.mark.parametrize(("low", "high"), [(0, 600), (2.9, 3.4), (0, 1e-5), (7, 7), (0, 0), (-3, 12_345_678)])
def test_axis_ticks_are_round_evenly_spaced_and_inside(low, high):
    axis = nice_axis(low, high, str)
    steps = {round(b - a, 12) for a, b in itertools.pairwise(axis.ticks)}
    assert 2 <= len(axis.ticks) <= 8
    assert len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125"
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in axis.ticks)


def test_numbers_are_written_as_a_reader_expects():
    plain = {
        count: {0: "0", 950_000: "950,000", 7_654_321: "7.65 M", 1_657_000_000: "1.66 B", 9.996e12: "10.0 T"},
        size: {17: "17 B", 47_123: "47.1 kB", 999_600: "1000 kB", 31_600_000: "31.6 MB"},
        duration: {0: "0 s", 59.6: "1 min", 365: "6 min 5 s", 12_000: "3 h 20 min", 180_000: "2 d 2 h"},
        share: {0: "0.0 %", 1: "100.0 %", 0.123: "12.3 %", 0.0041: "0.41 %", 1.2e-6: "0.00012 %"},
        signed_percent: {0.2142: "+21.4 %", -0.03: "−3.0 %"},
    }
    for write, cases in plain.items():
        for value, words in cases.items():
            assert write(value).replace("\N{NO-BREAK SPACE}", " ") == words
    assert escape("a<b>\t\n\x7f\x9b") == "a&lt;b&gt;\t\n␡�"


def test_a_mixture_that_changes_is_drawn_over_the_rows_and_a_static_one_is_not(run):
    files = write_run(run)
    assert "How the mixture changes" not in report(run).text
    plan = files["plan.json"]
    before, total = plan["stages"][0]["shares"], plan["total_rows"]
    after = {code: share * (4 if code == "mt" else 1) for code, share in before.items() if code != "bg"}
    after = {code: share / sum(after.values()) for code, share in after.items()}
    plan["stages"].append({"start": total // 4, "shares": after})
    plan["stages"].append({"start": total, "shares": before})  # where the run has ended nothing is drawn
    (run / "plan.json").write_text(json.dumps(plan))
    page = report(run)
    assert {"Bulgarian", "Maltese"} <= set(page.texts["span"])
    assert f"Bulgarian{share(before['bg'])} → 0.0 %".replace("\N{NO-BREAK SPACE}", " ") in page.text
    expected = f"Maltese{share(before['mt'])} → {share(after['mt'])}".replace("\N{NO-BREAK SPACE}", " ")
    assert expected in page.text
    panels = [attrs["data-share"] for tag, attrs in page.tags if "data-share" in attrs]
    assert sorted(panels) == sorted(CODES)

    readings = next(
        json.loads(a["data-hover"])
        for tag, a in page.tags
        if "data-hover" in a and "Slavic" in json.loads(a["data-hover"])["rows"]
    )
    slavic = [code for code in CODES if LANGUAGES[code].family == "Slavic"]
    shares = [sum(stage.get(code, 0) for code in slavic) for stage in (before, after)]
    assert readings["rows"]["Slavic"] == [share(shares[0])] * 2 + [share(shares[1])] * 2
    assert readings["x"] == [0, 0.25, 0.25, 1]
    bands = [attrs["d"] for tag, attrs in page.tags if tag == "path" and attrs["class"].startswith("band")]
    assert len(bands) == len({LANGUAGES[code].family for code in CODES})
    top = re.match(r"M0\.0,([\d.]+)L", bands[0])
    assert float(top[1]) == pytest.approx(0, abs=0.1)  # the bands fill the chart: the uppermost edge is 100 %
    largest = max(
        {LANGUAGES[c].family for c in CODES}, key=lambda f: sum(before[c] for c in CODES if LANGUAGES[c].family == f)
    )
    assert f"{largest} " in " ".join(page.texts["b"])
