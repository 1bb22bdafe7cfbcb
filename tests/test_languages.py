"""Every tag that a corpus may use leads to one row of the table, and a wrong one to a useful sentence."""

import re
from collections import Counter

import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES, official, resolve

OFFICIAL = re.findall(r"\w+", "bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv")


def test_the_24_official_languages_come_first_in_order():
    assert [language.code for language in official()] == OFFICIAL
    assert list(LANGUAGES)[:24] == OFFICIAL


def test_candidate_and_associated_languages_are_there():
    assert {
        "bs",
        "cnr",
        "ka",
        "mk",
        "sq",
        "sr",
        "sr-Latn",
        "tr",
        "uk",
        "is",
        "nb",
        "nn",
        "ca",
        "eu",
        "gl",
        "ltg",
    } <= set(LANGUAGES)


def test_no_tag_stands_for_two_languages():
    tags = Counter(
        tag.casefold().replace("_", "-")
        for language in LANGUAGES.values()
        for tag in {t.casefold() for t in language.tags}
    )
    assert [tag for tag, count in tags.items() if count > 1] == []


def test_every_tag_of_a_row_resolves_to_it_in_any_case_and_with_either_separator():
    for language in LANGUAGES.values():
        assert language.lang_script == f"{language.iso639_3}_{language.script}"
        for tag in language.tags:
            for spelling in (tag, tag.upper(), tag.lower(), tag.replace("_", "-"), tag.replace("-", "_")):
                assert resolve(spelling) is language


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("ekk_Latn", "et"), ("est", "et"), ("lvs", "lv"), ("lav_Latn", "lv"), ("als", "sq"), ("sqi", "sq"),
        ("nob", "nb"), ("no", "nb"), ("no_NO", "nb"), ("nno_Latn", "nn"), ("ger", "de"), ("mol", "ro"),
        ("pt_BR", "pt"), ("pt-PT", "pt"), ("de_AT", "de"), ("es-419", "es"), ("en_GB.UTF-8", "en"),
        ("ca@valencia", "ca"), ("de-1996", "de"), ("ro_MD", "ro"),
        ("sr", "sr"), ("srp", "sr"), ("sr_RS", "sr"), ("srp_Cyrl", "sr"), ("sr-Cyrl-RS", "sr"),
        ("sr_Latn", "sr-Latn"), ("srp_Latn", "sr-Latn"), ("sr@latin", "sr-Latn"), ("sr_Latn_RS", "sr-Latn"),
        ("sr_ME", "cnr"), ("Bulgarian", "bg"), ("norwegian bokmål", "nb"),
    ],
)  # fmt: skip
def test_aliases_regions_and_locales(tag, code):
    assert resolve(tag).code == code


@pytest.mark.parametrize(
    ("tag", "hint"),
    [
        ("cz", "'cs'"),  # a country's code
        ("germn", "'de'"),
        ("swedsh", "'sv'"),
        ("ell_Latn", "'ell_Grek'"),  # a language in a script that is not its own
        ("qqq", "'bul'"),
        ("", "'bul'"),
    ],
)
def test_an_unknown_tag_is_refused_with_a_way_on(tag, hint):
    with pytest.raises(UserError) as error:
        resolve(tag)
    assert repr(tag) in str(error.value)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_byte_premiums_are_relative_to_english_and_follow_the_script():
    premiums = {code: language.byte_premium for code, language in LANGUAGES.items() if language.byte_premium}
    assert premiums["en"] == 1
    assert all(1.7 < premiums[code] < 2.3 for code in ("bg", "mk", "sr", "uk", "be", "el", "hy"))  # two bytes a letter
    assert all(0.95 < premiums[code] < 1.3 for code in premiums if LANGUAGES[code].script == "Latn")
    assert premiums["ka"] == max(premiums.values())  # three bytes a letter
    assert all(language.byte_premium for language in official())
    assert LANGUAGES["cnr"].byte_premium is None
    assert LANGUAGES["sr-Latn"].byte_premium is None
