"""The parity gate: figures counted from the texts, and languages beyond the limits refused by name."""

import json
from dataclasses import dataclass, replace

import pytest

from eurollm_jax.corpus.tokenizing.parity import Parity, parity_report
from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES


@dataclass(frozen=True)
class Counts:
    language: str
    tokens: int
    bytes: int
    fallback: int = 0


STORE = {
    "en": Counts("en", 1000, 4000),
    "fi": Counts("fi", 1500, 4400, 3),
    "ka": Counts("ka", 9000, 11000, 7000),
    "br": Counts("br", 900, 2000, 900),  # no byte premium
}
SHARES = {"en": 0.5, "fi": 0.3, "ka": 0.1, "br": 0.1}


def by_name(report):
    return {source.source: source for source in report.sources}


def test_a_premium_is_tokens_for_as_much_content_as_english():
    rows = by_name(parity_report(Parity(), STORE, SHARES))
    for name in ("en", "fi", "ka"):
        content = STORE[name].bytes / LANGUAGES[name].byte_premium
        assert rows[name].premium == pytest.approx(STORE[name].tokens / content / (1000 / 4000))
        assert rows[name].fallback == pytest.approx(STORE[name].fallback / STORE[name].tokens)
    assert rows["en"].premium == 1
    assert rows["br"].premium is None


def test_languages_beyond_the_limits_are_refused_with_the_table():
    report = parity_report(Parity(max_premium=2.5, max_fallback=0.02), STORE, SHARES)
    assert {source.source: source.beyond for source in report.refused} == {
        "ka": ("premium", "fallback"),
        "br": ("fallback",),
    }
    with pytest.raises(UserError, match="serves ka, br beyond") as caught:
        report.require()
    lines = str(caught.value).splitlines()
    assert "Parity(allow=" in lines[0]
    (georgian,) = [line for line in lines[1:] if line.strip().startswith("ka")]
    assert f"{9000 / 11000 * LANGUAGES['ka'].byte_premium / 0.25:.2f}" in georgian
    assert "77.78%" in georgian
    assert "premium, fallback" in georgian
    assert any("English" in line for line in lines)


def test_allowed_languages_pass_and_are_recorded():
    report = parity_report(Parity(allow=("kat", "Breton")), STORE, SHARES)
    report.require()
    assert [source.source for source in report.allowed] == ["ka", "br"]
    described = json.loads(json.dumps(report.describe()))
    assert described["allowed_beyond"] == ["ka", "br"]
    assert described["sources"]["ka"]["beyond"] == ["premium", "fallback"]


def test_sources_without_a_share_are_not_judged():
    report = parity_report(Parity(), STORE, SHARES | {"ka": 0.0, "br": 0.0})
    report.require()
    assert [source.source for source in report.sources] == ["fi", "en"]


def test_a_store_without_english_is_measured_by_the_best_served_language():
    sources = {name: STORE[name] for name in ("fi", "ka")} | {"de": Counts("de", 1000, 5000)}
    report = parity_report(Parity(max_premium=100, max_fallback=1), sources, dict.fromkeys(sources, 1 / 3))
    assert report.reference == "de"
    assert by_name(report)["de"].premium == 1
    assert report.table().caption.count("German") == 1


def test_all_english_sources_together_are_the_reference():
    sources = {"en/web": Counts("en", 1000, 4000), "en/code": Counts("en", 3000, 4000)}
    report = parity_report(Parity(), sources, {"en/web": 1.0, "en/code": 0.0})
    assert by_name(report)["en/web"].premium == pytest.approx((1000 / 4000) / (4000 / 8000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_premium=0.5), "max_premium=0.5 must be 1 or more"),
        (dict(max_fallback=2.0), "max_fallback=2.0 a share"),
        (dict(allow=("klingon",)), "unknown language 'klingon'"),
    ],
)
def test_impossible_limits_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(Parity(), **change)
