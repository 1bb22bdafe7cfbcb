"""The language table: one row for each language we know, and `resolve`, which finds the row for any tag a corpus uses.

Every tool of this project names a language by its BCP-47 code from this table, so that two corpora that call Estonian
`et` and `ekk_Latn` meet in one place. The table is data: to support a language, add a row.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from eurollm_jax.errors import UserError

# official:   one of the 24 languages of the EU's institutions.
# candidate:  a state language of a candidate or potential candidate country (Moldova's is ro, an official one already).
# associated: a state language of the European Economic Area outside the Union.
# co-official: used with the institutions by agreement, official in a part of a member state.
# regional:   any other national, regional or minority language of Europe that open corpora carry.
# partner:    a state language of the Eastern Partnership, beyond the candidates.
Status = Literal["official", "candidate", "associated", "co-official", "regional", "partner"]


@dataclass(frozen=True, slots=True)
class Language:
    """One language in one script.

    `code` is BCP-47 and what every other file of ours stores; `iso639_3` and `script` (ISO 15924) give the
    `lang_Script` form of web-scale corpora. `aliases` holds further tags only: code, `lang_script`, `iso639_3` and the
    English name resolve without being listed. `byte_premium` is the UTF-8 bytes of a text over those of its English
    translation, None where it was not measured.
    """

    code: str
    iso639_3: str
    script: str
    name: str
    autonym: str
    family: str
    status: Status
    byte_premium: float | None
    aliases: tuple[str, ...] = ()

    @property
    def lang_script(self) -> str:
        """For example `bul_Cyrl`."""
        return f"{self.iso639_3}_{self.script}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that stands for this row as it is, before any region is taken off."""
        # Serbian has two rows, and the bare ISO code means the one in Cyrillic.
        iso = () if "-" in self.code else (self.iso639_3,)
        return (self.code, *iso, self.lang_script, self.name, *self.aliases)


# Byte premiums: Arnett, Chang and Bergen 2024, "A Bit of a Problem: Measurement Disparities in Dataset Sizes Across
# Languages", as published for the 2,000 lines of FLORES-200 (there `lvs`, `als` and `azj` for lv, sq and az). They
# belong to a script as well: Serbian in Latin letters has none.
#
# A three-letter alias that is neither BCP-47 nor ISO 639-3 is ISO 639-2/B (`ger`), or the individual language that a
# big corpus names in place of its macrolanguage (`ekk` for `est`). `als` is Tosk Albanian, as in ISO 639-3; an
# encyclopedia that uses `als` for Alemannic is not followed. `no` stands for Bokmål, in which almost all text so
# labelled is written.
_ROWS: tuple[Language, ...] = (
    Language("bg", "bul", "Cyrl", "Bulgarian", "български", "Slavic", "official", 1.883),
    Language("cs", "ces", "Latn", "Czech", "čeština", "Slavic", "official", 1.077, ("cze",)),
    Language("da", "dan", "Latn", "Danish", "dansk", "Germanic", "official", 1.044),
    Language("de", "deu", "Latn", "German", "Deutsch", "Germanic", "official", 1.180, ("ger",)),
    Language("el", "ell", "Grek", "Greek", "ελληνικά", "Hellenic", "official", 2.163, ("gre",)),
    Language("en", "eng", "Latn", "English", "English", "Germanic", "official", 1.000),
    Language("es", "spa", "Latn", "Spanish", "español", "Romance", "official", 1.209),
    Language("et", "est", "Latn", "Estonian", "eesti", "Uralic", "official", 1.004, ("ekk", "ekk_Latn")),
    Language("fi", "fin", "Latn", "Finnish", "suomi", "Uralic", "official", 1.100),
    Language("fr", "fra", "Latn", "French", "français", "Romance", "official", 1.233, ("fre",)),
    Language("ga", "gle", "Latn", "Irish", "Gaeilge", "Celtic", "official", 1.226),
    Language("hr", "hrv", "Latn", "Croatian", "hrvatski", "Slavic", "official", 1.000, ("scr",)),
    Language("hu", "hun", "Latn", "Hungarian", "magyar", "Uralic", "official", 1.144),
    Language("it", "ita", "Latn", "Italian", "italiano", "Romance", "official", 1.182),
    Language("lt", "lit", "Latn", "Lithuanian", "lietuvių", "Baltic", "official", 1.056),
    Language("lv", "lav", "Latn", "Latvian", "latviešu", "Baltic", "official", 1.106, ("lvs", "lvs_Latn")),
    Language("mt", "mlt", "Latn", "Maltese", "Malti", "Semitic", "official", 1.156),
    Language("nl", "nld", "Latn", "Dutch", "Nederlands", "Germanic", "official", 1.109, ("dut",)),
    Language("pl", "pol", "Latn", "Polish", "polski", "Slavic", "official", 1.122),
    Language("pt", "por", "Latn", "Portuguese", "português", "Romance", "official", 1.113),
    Language("ro", "ron", "Latn", "Romanian", "română", "Romance", "official", 1.182, ("rum", "mo", "mol")),
    Language("sk", "slk", "Latn", "Slovak", "slovenčina", "Slavic", "official", 1.087, ("slo",)),
    Language("sl", "slv", "Latn", "Slovenian", "slovenščina", "Slavic", "official", 1.012, ("Slovene",)),
    Language("sv", "swe", "Latn", "Swedish", "svenska", "Germanic", "official", 1.041),
    Language("bs", "bos", "Latn", "Bosnian", "bosanski", "Slavic", "candidate", 1.028),
    Language("cnr", "cnr", "Latn", "Montenegrin", "crnogorski", "Slavic", "candidate", None, ("sr-ME", "sr-Latn-ME")),
    Language("ka", "kat", "Geor", "Georgian", "ქართული", "Kartvelian", "candidate", 2.935, ("geo",)),
    Language("mk", "mkd", "Cyrl", "Macedonian", "македонски", "Slavic", "candidate", 1.891, ("mac",)),
    Language("sq", "sqi", "Latn", "Albanian", "shqip", "Albanian", "candidate", 1.200, ("alb", "als", "als_Latn")),
    Language("sr", "srp", "Cyrl", "Serbian", "српски", "Slavic", "candidate", 1.793, ("scc", "sr-Cyrillic")),
    Language("sr-Latn", "srp", "Latn", "Serbian (Latin)", "srpski", "Slavic", "candidate", None, ("sr-Latin",)),
    Language("tr", "tur", "Latn", "Turkish", "Türkçe", "Turkic", "candidate", 1.112),
    Language("uk", "ukr", "Cyrl", "Ukrainian", "українська", "Slavic", "candidate", 1.857),
    Language("is", "isl", "Latn", "Icelandic", "íslenska", "Germanic", "associated", 1.084, ("ice",)),
    Language(
        "nb",
        "nob",
        "Latn",
        "Norwegian Bokmål",
        "bokmål",
        "Germanic",
        "associated",
        1.024,
        ("no", "nor", "nor_Latn", "Norwegian"),
    ),
    Language("nn", "nno", "Latn", "Norwegian Nynorsk", "nynorsk", "Germanic", "associated", 1.033),
    Language("ca", "cat", "Latn", "Catalan", "català", "Romance", "co-official", 1.122, ("Valencian",)),
    Language("eu", "eus", "Latn", "Basque", "euskara", "Basque", "co-official", 1.060, ("baq",)),
    Language("gl", "glg", "Latn", "Galician", "galego", "Romance", "co-official", 1.129),
    Language("an", "arg", "Latn", "Aragonese", "aragonés", "Romance", "regional", None),
    Language("ast", "ast", "Latn", "Asturian", "asturianu", "Romance", "regional", 1.060),
    Language("br", "bre", "Latn", "Breton", "brezhoneg", "Celtic", "regional", None),
    Language("co", "cos", "Latn", "Corsican", "corsu", "Romance", "regional", None),
    Language("cy", "cym", "Latn", "Welsh", "Cymraeg", "Celtic", "regional", 1.071, ("wel",)),
    Language("dsb", "dsb", "Latn", "Lower Sorbian", "dolnoserbšćina", "Slavic", "regional", None),
    Language("fo", "fao", "Latn", "Faroese", "føroyskt", "Germanic", "regional", 1.091),
    Language("fur", "fur", "Latn", "Friulian", "furlan", "Romance", "regional", 1.131),
    Language("fy", "fry", "Latn", "Western Frisian", "Frysk", "Germanic", "regional", None),
    Language("gd", "gla", "Latn", "Scottish Gaelic", "Gàidhlig", "Celtic", "regional", 1.279),
    Language("gsw", "gsw", "Latn", "Swiss German", "Schwiizerdütsch", "Germanic", "regional", None),
    Language("hsb", "hsb", "Latn", "Upper Sorbian", "hornjoserbšćina", "Slavic", "regional", None),
    Language("lb", "ltz", "Latn", "Luxembourgish", "Lëtzebuergesch", "Germanic", "regional", 1.148),
    Language("ltg", "ltg", "Latn", "Latgalian", "latgaļu", "Baltic", "regional", 1.042),
    Language("nds", "nds", "Latn", "Low German", "Plattdüütsch", "Germanic", "regional", None),
    Language("oc", "oci", "Latn", "Occitan", "occitan", "Romance", "regional", 1.171),
    Language("rm", "roh", "Latn", "Romansh", "rumantsch", "Romance", "regional", None),
    Language("sc", "srd", "Latn", "Sardinian", "sardu", "Romance", "regional", 1.192),
    Language("se", "sme", "Latn", "Northern Sámi", "davvisámegiella", "Uralic", "regional", None),
    Language("szl", "szl", "Latn", "Silesian", "ślōnski", "Slavic", "regional", 1.096),
    Language("az", "aze", "Latn", "Azerbaijani", "azərbaycanca", "Turkic", "partner", 1.253, ("azj", "azj_Latn")),
    Language("be", "bel", "Cyrl", "Belarusian", "беларуская", "Slavic", "partner", 2.052),
    Language("hy", "hye", "Armn", "Armenian", "հայերեն", "Armenian", "partner", 2.028, ("arm",)),
)

# Country codes that people type in place of a language. They are only suggested: some are other languages' codes.
_COUNTRY_SLIPS = {"al": "sq", "at": "de", "cz": "cs", "dk": "da", "ee": "et", "gb": "en", "ge": "ka", "gr": "el"} | {
    "ie": "ga", "me": "cnr", "rs": "sr", "si": "sl", "ua": "uk", "us": "en"
}  # fmt: skip


def _table(rows: Iterable[Language]) -> Mapping[str, Language]:
    order = {status: rank for rank, status in enumerate(get_args(Status))}
    ordered = sorted(rows, key=lambda language: (order[language.status], language.code))
    return MappingProxyType({language.code: language for language in ordered})


def _normalise(tag: str) -> str:
    """Lower case with hyphens; a POSIX locale's encoding goes and its `@modifier` becomes a subtag."""
    locale = tag.strip().casefold().replace("_", "-").replace("@", "-").replace(" ", "-")
    return locale.removesuffix(".utf-8").removesuffix(".utf8")


def _index(languages: Iterable[Language]) -> Mapping[str, Language]:
    index: dict[str, Language] = {}
    for language in languages:
        for tag in {_normalise(tag) for tag in language.tags}:
            if tag in index:
                raise ValueError(f"language tag {tag!r} stands for both {index[tag].code} and {language.code}")
            index[tag] = language
    return MappingProxyType(index)


LANGUAGES: Mapping[str, Language] = _table(_ROWS)
"""Code -> language: the official ones first, then by status in the order of `Status`; by code within each."""

_BY_TAG = _index(LANGUAGES.values())


def official() -> tuple[Language, ...]:
    """The 24 official languages of the European Union, alphabetical by code."""
    return tuple(language for language in LANGUAGES.values() if language.status == "official")


def resolve(tag: str) -> Language:
    """The language that `tag` names: a code, an alias, an English name, `lang_Script`, or any of these with a region.

    Case does not matter and `-` and `_` are alike. Regions and variants name the same language (`pt_BR` is Portuguese,
    `ca@valencia` Catalan), except where the table has a row for them. A script must be the language's own.
    Raises UserError for anything else, with the closest codes.
    """
    subtags = _normalise(tag).split("-")
    for length in range(len(subtags), 0, -1):
        language = _BY_TAG.get("-".join(subtags[:length]))
        if language is not None and all(_names_no_language(subtag, language) for subtag in subtags[length:]):
            return language
    raise UserError(f"unknown language {tag!r}{_hint(_normalise(tag))}")


def _names_no_language(subtag: str, language: Language) -> bool:
    """Whether `subtag` may follow a code without changing the row: a region, a variant, or the row's own script."""
    if len(subtag) == 4 and subtag.isalpha():
        return subtag == language.script.casefold()
    region = (len(subtag) == 2 and subtag.isalpha()) or (len(subtag) == 3 and subtag.isdigit())
    variant = (5 <= len(subtag) <= 8 and subtag.isalnum()) or (len(subtag) == 4 and subtag[0].isdigit())
    return region or variant


def _hint(tag: str) -> str:
    if tag in _COUNTRY_SLIPS:
        slip = LANGUAGES[_COUNTRY_SLIPS[tag]]
        return f" ({tag!r} is a country); did you mean {slip.code!r}, {slip.name}?"
    own_script = _BY_TAG.get(tag.split("-")[0])
    if own_script is not None:
        return f"; {own_script.name} is {own_script.code!r} or {own_script.lang_script!r}"
    close = difflib.get_close_matches(tag, _BY_TAG, n=3, cutoff=0.6)
    found = list(dict.fromkeys(f"{_BY_TAG[match].code!r} ({_BY_TAG[match].name})" for match in close))
    return (
        f"; did you mean {' or '.join(found)}?" if found else "; give a BCP-47 or ISO 639-3 code such as 'bg' or 'bul'"
    )
