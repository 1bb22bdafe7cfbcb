"""Families, languages and sources: what a name stands for, and what rules over groups give each source."""

import math
from itertools import pairwise

import pytest
from scipy.optimize import brentq

from eurollm_jax.data.groups import Corpus
from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.schedule import SHARE_SUM
from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES


def size(rows, language, octets=4):
    """Rows of 512 tokens with `octets` bytes each."""
    return SourceSize(rows * 512, rows * 512 * octets, rows, language)


SIZES = {
    "bg": size(1000, "bg", 6),
    "cs/hplt": size(3000, "cs"),
    "cs/web": size(1000, "cs"),
    "et": size(400, "et"),
    "fi/hplt": size(2000, "fi"),
    "fi/web": size(6000, "fi", 5),
    "hu": size(5000, "hu"),
    "ka": size(300, "ka", 9),
}


def row_shares(mixture, sizes=SIZES, total_rows=1000):
    schedule = mixture.compile(sizes, total_rows)
    return {n: s / SHARE_SUM for n, s in zip(schedule.names, schedule.stages[0].shares, strict=True) if s}


def close(expected):
    return pytest.approx(expected, abs=1e-8)


def normalised(weights):
    return {name: weight / math.fsum(weights.values()) for name, weight in weights.items()}


def test_temperature_over_families_and_within_them_over_languages_is_the_closed_form():
    mixture = Mixture.temperature(0.5, over="family", within=Mixture.temperature(0.3, over="language"))
    tree = {
        "Slavic": {"bg": {"bg": 1000}, "cs": {"cs/hplt": 3000, "cs/web": 1000}},
        "Uralic": {"et": {"et": 400}, "fi": {"fi/hplt": 2000, "fi/web": 6000}, "hu": {"hu": 5000}},
        "Kartvelian": {"ka": {"ka": 300}},
    }
    expected = {}
    families = normalised({f: sum(sum(s.values()) for s in c.values()) ** 0.5 for f, c in tree.items()})
    for family, codes in tree.items():
        languages = normalised({code: sum(sources.values()) ** 0.3 for code, sources in codes.items()})
        for code, sources in codes.items():
            for name, rows in sources.items():
                expected[name] = families[family] * languages[code] * rows / sum(sources.values())
    assert row_shares(mixture) == close(expected)


def test_without_a_rule_inside_groups_are_divided_in_proportion():
    assert row_shares(Mixture.proportional(over="family")) == close(row_shares(Mixture.proportional()))
    shares = row_shares(Mixture.temperature(0, over="language"))
    assert shares["fi/web"] == close(3 * shares["fi/hplt"])
    assert shares["fi/web"] + shares["fi/hplt"] == close(1 / 6)
    inside = Mixture.temperature(0.5, over="language", within=Mixture.proportional())
    assert inside == Mixture.temperature(0.5, over="language")


def test_a_language_of_several_sources_counts_once():
    """Cut into two sources or in one, a language gets the same share from a rule over languages."""
    whole = {**{n: s for n, s in SIZES.items() if n[:2] != "cs"}, "cs": size(4000, "cs")}
    for rule in (Mixture.temperature(0.3, over="language"), Mixture.unimax(2, over="language")):
        cut = row_shares(rule, total_rows=20_000)
        one = row_shares(rule, whole, total_rows=20_000)
        assert cut["cs/hplt"] + cut["cs/web"] == close(one["cs"])
        assert {n: cut[n] for n in ("bg", "et", "hu", "ka")} == close({n: one[n] for n in ("bg", "et", "hu", "ka")})


def test_each_level_holds_in_its_own_unit():
    """Families half each in bytes, Finnish within Uralic in tokens: both can be read off the rows."""
    inside = Mixture.shares({"fi/web": 0.5, "fi/hplt": 0.25, "hu": 0.25})
    mixture = Mixture.shares({"Uralic": 0.5, "Slavic": 0.5}, "bytes", within=inside).only("fi", "hu", "bg")
    with pytest.raises(UserError, match=r"shares inside a group name none of bg; give one of them a share"):
        row_shares(mixture)
    inside = Mixture.shares({"fi/web": 0.4, "fi/hplt": 0.2, "hu": 0.2, "bg": 0.2})
    mixture = Mixture.shares({"Uralic": 0.5, "Slavic": 0.5}, "bytes", within=inside).only("fi", "hu", "bg")
    rows = row_shares(mixture)
    octets = {name: share * SIZES[name].bytes / SIZES[name].rows for name, share in rows.items()}
    assert octets["bg"] == pytest.approx(octets["fi/web"] + octets["fi/hplt"] + octets["hu"], rel=1e-7)
    assert rows["fi/web"] / rows["hu"] == pytest.approx(2, rel=1e-7)
    assert rows["fi/hplt"] / rows["hu"] == pytest.approx(1, rel=1e-7)


def test_unimax_over_languages_never_exceeds_its_cap_in_any_source():
    mixture = Mixture.unimax(2, over="language", within=Mixture.temperature(0))
    shares = row_shares(mixture, total_rows=9000)
    assert shares["cs/hplt"] == close(shares["cs/web"])
    for name, share in shares.items():
        assert share * 9000 / SIZES[name].rows <= 2 + 1e-6
    capped = {n for n in shares if share_epochs(shares, n, 9000) == pytest.approx(2, rel=1e-6)}
    assert capped == {"et", "ka"}
    free = [shares["bg"], shares["cs/hplt"] * 2, shares["fi/web"] * 2, shares["hu"]]
    assert all(a == close(b) for a, b in pairwise(free))


def share_epochs(shares, name, total_rows):
    return shares[name] * total_rows / SIZES[name].rows


@pytest.mark.parametrize("unit", ["tokens", "bytes", "content"])
def test_unimax_within_families_agrees_with_the_rows_of_each_family(unit):
    mixture = Mixture.temperature(0.5, unit, over="family", within=Mixture.unimax(1, over="language"))
    total = 3000
    shares = row_shares(mixture, total_rows=total)
    families = {}
    for name, source in SIZES.items():
        families.setdefault(LANGUAGES[source.language].family, []).append(name)
    corpus = Corpus(SIZES)
    amounts = {f: sum(corpus.amount(n, unit) for n in names) for f, names in families.items()}
    read = {f: sum(shares[n] * corpus.per_row(n, unit) for n in names) for f, names in families.items()}
    ratio = {f: read[f] / amounts[f] ** 0.5 for f in families}
    assert max(ratio.values()) == pytest.approx(min(ratio.values()), rel=1e-6)
    # Inside a family a language is at the cap or at the common level in tokens.
    assert share_epochs(shares, "et", total) == pytest.approx(1, rel=1e-5)
    assert shares["fi/hplt"] + shares["fi/web"] == pytest.approx(shares["hu"], rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "epochs", "rows"),
    [
        (0.5, 2, {"bg": (100, 4), "cs": (10, 1), "fi": (1000, 1)}),
        (0.5, 2, {"bg": (1000, 8), "cs": (10, 2), "et": (10_000, 2)}),
        (0.5, 2, {"bg": (1, 2), "cs": (10, 8), "fi": (10_000, 8)}),
        (1, 2, {"bg": (1, 1), "cs": (100, 8), "et": (10_500, 8)}),
    ],
)
def test_unimax_within_a_family_of_unlike_texts_is_what_a_root_finder_says(alpha, epochs, rows):
    """The family's rows decide who is held back in it, and that what its rows are worth: taken in turns alone, these
    go to and fro for ever."""
    sizes, total = {name: size(n, name, octets) for name, (n, octets) in rows.items()}, 100
    mixture = Mixture.temperature(alpha, "bytes", over="family", within=Mixture.unimax(epochs, "bytes"))
    shares = row_shares(mixture, sizes, total)
    families = Corpus(sizes).grouped(sizes, "family").values()
    pair, (single,) = sorted(families, key=len, reverse=True)

    def inside(budget):
        """Rows of the family's two languages: as many bytes each as the cap lets them have."""
        most = [epochs * sizes[name].rows for name in pair]
        octets = [sizes[name].bytes / sizes[name].rows for name in pair]

        def excess(level):
            return sum(min(m, level / b) for m, b in zip(most, octets, strict=True)) - budget

        level = brentq(excess, 0, budget * max(octets) * 2, xtol=1e-9, rtol=1e-14)
        return [min(m, level / b) for m, b in zip(most, octets, strict=True)]

    wanted = (sum(sizes[name].bytes for name in pair) / sizes[single].bytes) ** alpha

    def surplus(budget):
        octets = sum(n * sizes[name].bytes / sizes[name].rows for n, name in zip(inside(budget), pair, strict=True))
        return octets - wanted * (total - budget) * sizes[single].bytes / sizes[single].rows

    most = min(total, epochs * sum(sizes[name].rows for name in pair))
    budget = brentq(surplus, 1e-3, most - 1e-3, xtol=1e-12)
    expected = {**dict(zip(pair, inside(budget), strict=True)), single: total - budget}
    assert shares == pytest.approx({name: n / total for name, n in expected.items()}, rel=1e-5)


def test_unimax_within_a_family_that_lacks_text_is_refused_by_name():
    mixture = Mixture.shares({"ka": 0.5, "Uralic": 0.5}, within=Mixture.unimax(2))
    with pytest.raises(UserError, match=r"in ka, unimax\(2\) can fill 600 rows .* is asked for 5,000"):
        mixture.compile(SIZES, 10_000)


def test_content_is_bytes_over_the_byte_premium():
    weights = {n: s.bytes / LANGUAGES[s.language].byte_premium for n, s in SIZES.items()}
    per_row = {n: w / SIZES[n].rows for n, w in weights.items()}
    half = {n: weights[n] ** 0.5 / per_row[n] for n in SIZES}
    assert row_shares(Mixture.temperature(0.5, "content")) == close(normalised(half))
    assert row_shares(Mixture.proportional("content")) == close(row_shares(Mixture.proportional()))
    equal = row_shares(Mixture.shares({"bg": 0.5, "cs/web": 0.5}, "content"))
    given = row_shares(Mixture.shares({"bg": 0.5, "cs/web": 0.5}, "content").content_premiums({"bg": 2 * 1.883}))
    assert given["bg"] / given["cs/web"] == pytest.approx(2 * equal["bg"] / equal["cs/web"], rel=1e-6)


def test_a_language_without_a_byte_premium_is_refused_by_name_unless_one_is_given():
    sizes = {**SIZES, "cnr": size(100, "cnr")}
    with pytest.raises(UserError, match=r"byte premium of 'cnr' \(cnr\).*content_premiums\(\{'cnr': 1.0\}\)"):
        Mixture.proportional("content").compile(sizes, 100)
    Mixture.proportional("content").content_premiums({"cnr": 1.0}).compile(sizes, 100)
    Mixture.proportional("content").without("cnr").compile(sizes, 100)


def test_scaling_a_language_or_a_family_scales_its_sources_together():
    base = row_shares(Mixture.proportional())
    for name, members in {
        "fi": {"fi/hplt", "fi/web"},
        "Uralic": {"et", "fi/hplt", "fi/web", "hu"},
        "cs/web": {"cs/web"},
        "language:cs": {"cs/hplt", "cs/web"},
        "family:Slavic": {"bg", "cs/hplt", "cs/web"},
        "source:hu": {"hu"},
    }.items():
        scaled = row_shares(Mixture.proportional().scale({name: 3}))
        assert scaled == close(normalised({n: s * (3 if n in members else 1) for n, s in base.items()}))


def test_names_of_groups_choose_sources():
    assert set(row_shares(Mixture.proportional().without("Uralic"))) == {"bg", "cs/hplt", "cs/web", "ka"}
    assert set(row_shares(Mixture.proportional().only("Slavic", "ka").without("cs/web"))) == {"bg", "cs/hplt", "ka"}
    assert set(row_shares(Mixture.proportional().only("Slavic").only("bg", "hu"))) == {"bg"}
    shares = row_shares(Mixture.shares({"fi": 0.6, "cs/web": 0.4}))
    assert shares == close({"fi/hplt": 0.15, "fi/web": 0.45, "cs/web": 0.4})
    assert row_shares(Mixture.shares({"fi": 0.6, "cs/web": 0.4}).without("fi/hplt")) == close(
        {"fi/web": 0.6, "cs/web": 0.4}
    )


BOTH = {"fi": size(10, "fi"), "fi/web": size(30, "fi"), "xx": size(5, ""), "yy": size(5, "tlh")}


@pytest.mark.parametrize(
    ("mixture", "sizes", "message"),
    [
        (
            Mixture.proportional().scale(fi=2),
            BOTH,
            "'fi', which is a source and also the language of fi, fi/web; write 'source:fi' or 'language:fi'",
        ),
        (Mixture.proportional().scale({"fin": 2}), SIZES, "'fin', which the store lacks; did you mean 'fi'"),
        (Mixture.proportional().without("Uralik"), SIZES, "'Uralik', which the store lacks; did you mean 'Uralic'"),
        (Mixture.proportional().without("language:fj"), SIZES, "'fj', which the store lacks; did you mean 'fi'"),
        (Mixture.shares({"fi/web": 1}, over="language"), SIZES, "'fi/web', which the store lacks; did you mean"),
        (Mixture.shares({"fi": 0.5, "Uralic": 0.5}), SIZES, "gives the source 'fi/hplt' to both 'Uralic' and 'fi'"),
        (Mixture.proportional(over="language"), BOTH, "source 'xx' has the language '', .* add .without\\('xx'\\)"),
        (Mixture.proportional(over="family").without("xx"), BOTH, "source 'yy' has the language 'tlh'"),
        (Mixture.proportional("content"), BOTH, "source 'xx' has the language ''"),
        (Mixture.proportional().floor({"fi": 0.2, "Uralic": 0.3}), SIZES, "floors of 'Uralic' and 'fi' overlap in fi/"),
        (Mixture.proportional().floor({"fi": 0.6, "Slavic": 0.5}), SIZES, "the 2 floors sum to 1.1, more than 1"),
        (Mixture.proportional().floor({"fi": 0.6, "Slavic": 0.4}), SIZES, "floors leave nothing for et, hu, ka"),
        (Mixture.shares({"bg": 1}).floor({"fi": 0.1}), SIZES, "floor names 'fi', which has no share to raise"),
    ],
)
def test_names_and_groups_that_cannot_be_honoured_are_refused_by_name(mixture, sizes, message):
    with pytest.raises(UserError, match=message) as error:
        mixture.compile(sizes, 100)
    assert "\n" not in str(error.value)


def test_a_name_of_two_things_may_be_said_in_full():
    for name, members in {"source:fi": {"fi"}, "language:fi": {"fi", "fi/web"}}.items():
        assert Corpus(BOTH).members(name) == members
    assert Corpus({"fi": size(1, "fi")}).members("fi") == {"fi"}
