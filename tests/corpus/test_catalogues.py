"""Catalogues are read as gettext reads them, and what is kept of them is prose in the right language."""

import gettext
import io
import json
import struct

import pytest

from eurollm_jax.corpus.starter.catalogues import (
    Message,
    in_script,
    is_english,
    line_keys,
    prose,
    read_catalogue,
    sameness,
)

PO = r"""
# A translator's note
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"

#: module.py:1
msgid "First \"quoted\"\n"
"second line"
msgstr "Първи \"цитат\"\n"
"втори ред"

#, fuzzy, python-format
#| msgid "Old"
msgid "Guessed"
msgstr "Позната"

msgctxt "menu"
msgid "One file"
msgid_plural "Many files"
msgstr[0] "Един файл"
msgstr[1] "Много файлове"

#. Default: "The text of a key"
#: template.pt
msgid "label_key"
msgstr "Текстът на ключа"

msgid "Untranslated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Остаряла"

msgid "Last"
msgstr "Последна"
"""


def make_mo(pairs: dict[str, str], order: str = "<") -> bytes:
    """A .mo file as the gettext manual describes it: header, two tables of (length, offset), NUL-ended strings."""
    table, strings = [], b""
    start = 28 + 16 * len(pairs)
    for texts in (sorted(pairs), [pairs[key] for key in sorted(pairs)]):
        for text in texts:
            table += [len(text.encode()), start + len(strings)]
            strings += text.encode() + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + struct.pack(f"{order}{len(table)}I", *table) + strings


def test_po_entries_in_order_with_fuzzy_ones_untranslated_and_obsolete_ones_gone():
    assert [(message.english, message.text) for message in read_catalogue("x/bg.po", PO.encode())] == [
        ('First "quoted"\nsecond line', 'Първи "цитат"\nвтори ред'),
        ("Guessed", ""),
        ("Many files", "Много файлове"),
        ("The text of a key", "Текстът на ключа"),
        ("Untranslated", ""),
        ("Last", "Последна"),
    ]


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_agrees_with_the_standard_library(order):
    pairs = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n!=1;\n"}
    pairs |= {"Save": "Запази", "menu\x04Open": "Отвори", "Empty": "", "One\0Many": "Един\0Много"}
    data = make_mo(pairs, order)
    oracle = gettext.GNUTranslations(io.BytesIO(data))
    assert sorted(read_catalogue("bg.mo", data)) == sorted(
        [
            Message("Save", "Save", oracle.gettext("Save")),
            Message("menu\x04Open", "Open", oracle.pgettext("menu", "Open")),
            Message("Empty", "Empty", ""),
            Message("One\0Many", "Many", oracle.ngettext("One", "Many", 5)),
        ]
    )


def test_json_strings_in_order_with_their_place_as_the_key():
    nested = {"config": {"step": [{"title": "Заглавие"}, 7], "error": "Грешка"}, "on": None, "name": "Име"}
    found = read_catalogue("bg.json", json.dumps(nested).encode())
    assert found == [
        Message("/config/step/0/title", "", "Заглавие"),
        Message("/config/error", "", "Грешка"),
        Message("/name", "", "Име"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a/bg.po", b'msgid "x"\nmsgstr "y', "line 2"),
        ("a/bg.po", b'msgid "\xff"', "utf-8"),
        ("a/bg.mo", b"PK\x03\x04" + bytes(40), "first four bytes"),
        ("a/bg.mo", make_mo({"a": "b"})[:30], "a/bg.mo"),
        ("a/bg.json", b"{", "a/bg.json"),
        ("a/bg.txt", b"", "neither"),
    ],
)
def test_a_file_that_is_no_catalogue_is_named(name, data, said):
    with pytest.raises(ValueError, match=name) as error:
        read_catalogue(name, data)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Много <b>важно</b><br/>съобщение  за   вас", "Много важно\nсъобщение за вас"),
        ("Lies die [Anleitung zum Start](https://example.org/a_b) vorher.", "Lies die Anleitung zum Start vorher."),
        ("Il **file** &quot;nuovo&quot; è `pronto` &amp; salvo", 'Il file "nuovo" è pronto & salvo'),
        ("_Datei im Ordner öffnen", "Datei im Ordner öffnen"),
        ("Une\u00a0phrase\u00a0: «\u202foui\u202f» et so\u00adit", "Une\u00a0phrase\u00a0: «\u202foui\u202f» et soit"),
        ("Cafe\u0301 et the\u0301 du matin", "Café et thé du matin"),
        ("Erste Zeile hier\r\n\r\n  Zweite Zeile", "Erste Zeile hier\nZweite Zeile"),
        ("Umí to na 100 % i dnes večer", "Umí to na 100 % i dnes večer"),
        ("Menu > Edit > Find the person", "Menu > Edit > Find the person"),
    ],
)
def test_prose_loses_its_markup_alone(raw, clean):
    assert prose(raw) == clean
    assert prose(clean) == clean


@pytest.mark.parametrize(
    "raw",
    [
        "Die Datei {name} wurde gelöscht", "Die Datei %s wurde gelöscht", "Die Datei %(name)s wurde gelöscht",
        "Die %1$s und %2$s sind gleich", "Die Datei ${name} wurde gelöscht", "Die $t(common.file) wurde gelöscht",
        "Noch %d Dateien sind offen", "Datei %1 von %2 wird kopiert",
        "Zwei Wörter", "Ja oder nein", "", "1 2 3 4 5 6 7 8 9 10",
        "Siehe https://example.org für mehr", "Setze use_cache auf wahr", "Bearbeite die configuration.yaml bitte",
        "Schreib an a@example.org bitte", "wenn a < b dann gilt das",
    ],
)  # fmt: skip
def test_holes_labels_and_code_are_no_prose(raw):
    assert prose(raw) is None


def test_sameness_ignores_case_spacing_punctuation_and_digits():
    assert sameness("Бутон 1: натиснат!") == sameness("бутон 27  натиснат")
    assert sameness("Бутон натиснат") != sameness("Бутон пуснат")
    assert sameness("Straße") == sameness("STRASSE")


def test_texts_overlap_when_they_share_a_line_of_prose():
    first = line_keys("Вашата парола трябва\nда е дълга поне 12 знака.\nИ още:")
    assert first & line_keys("Да е дълга поне 8 знака!")
    assert not first & line_keys("И още:\nсъвсем други две думи")
    assert line_keys("И още") == {sameness("и още")}


@pytest.mark.parametrize(
    ("text", "script", "expected"),
    [
        ("Ρυθμίσεις του API", "Grek", True), ("Settings of the API", "Grek", False),
        ("Ажурирај Home Assistant", "Cyrl", False), ("Ажурирајте податке за Home", "Cyrl", True),
        ("ქართული ენა", "Geor", True), ("Հայերեն լեզու", "Armn", True),
        ("Ħelu u għażiż", "Latn", True), ("Straße, žluťoučký, ŵyr", "Latn", True), ("Настройки", "Latn", False),
        ("123", "Latn", False),
    ],
)  # fmt: skip
def test_in_script(text, script, expected):
    assert in_script(text, script) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This file was removed from the list", True),
        ("Enter the name and the address", True),
        ("Das Team „The Cure“ spielt heute Abend in der Halle und alle singen mit", False),
        ("Han har været her og vil have kaffe", False),
        ("De naam of het adres is onjuist", False),
        ("A fájl és a mappa neve is kötelező", False),
    ],
)
def test_is_english(text, expected):
    assert is_english(text) is expected
