"""The starter corpus, made by the real code and the real pip from small archives on disk."""

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from eurollm_jax.corpus.reading.sources import Document, read_documents
from eurollm_jax.corpus.starter.build import (
    HELDOUT_LEAST,
    HELDOUT_MOST,
    HELDOUT_SHARE,
    PACKAGES,
    build_starter,
    split_heldout,
    summary_table,
)
from eurollm_jax.corpus.starter.packages import Package
from eurollm_jax.errors import UserError
from eurollm_jax.languages import official

LETTERS = {"el": "αβγδεζηθικλμνξοπρστυφχψω", "pt": "abcdefgilmnoprstuvãçéõ", "en": "abcdefghiklmnoprstuvwy"}


def sentences(language: str, count: int, seed: int) -> list[str]:
    draw = random.Random(f"{language} {seed}")
    words = ["".join(draw.choices(LETTERS[language], k=draw.randint(3, 9))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=8)).capitalize() + "." for _ in range(count)]


def po(english: list[str], translated: list[str]) -> str:
    entries = [f'msgid "{e}"\nmsgstr "{t}"\n' for e, t in zip(english, translated, strict=True)]
    return 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8"\n\n' + "\n".join(entries)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(folder with a wheel of JSON catalogues and a source archive of .po, packages that pin both, texts, marker)."""
    folder = tmp_path_factory.mktemp("shelf")
    greek, portuguese, english = (sentences(code, 700, 1) for code in ("el", "pt", "en"))
    wheel = folder / "hub-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("hub-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hub\nVersion: 1.0\n")
        archive.writestr("hub-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("hub-1.0.dist-info/RECORD", "")
        for component in range(7):
            part = slice(100 * component, 100 * component + 100)
            catalogues = {
                "en": english[part],
                "el": [*greek[part][:-2], english[part][-2], "Το {name} διαγράφηκε από εδώ"],  # English, and a hole
                "pt": portuguese[part],
                "pt-BR": [f"Variante {text}" for text in portuguese[part]],
                "zh": ["这是一个中文句子,不属于欧洲语言。"],
                "sl": ["Premalo besedila za jezik."],
            }
            for tag, texts in catalogues.items():
                strings = json.dumps({"state": dict(enumerate(texts))}, ensure_ascii=False)
                archive.writestr(f"hub/components/c{component}/translations/{tag}.json", strings)

    # The second package repeats Greek sentences of the first in other case and spacing; its setup.py must never run.
    extra = sentences("el", 100, 2)
    repeated = [f"  {text.upper()} " for text in greek[:50]]
    paragraphs = sentences("el", 8, 4)
    # of these paragraphs the second line is known already
    repeated += ["\\n".join([text, greek[60]]) for text in sentences("el", 10, 5)]
    marker = folder / "setup-ran"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: Tool\nVersion: 2.0\n",
        "pyproject.toml": "[tool.other]\nx = 1\n",
        "setup.py": f"open({str(marker)!r}, 'w').close()\n",
        "src/locales/el/LC_MESSAGES/tool.po": po(
            sentences("en", 161, 3), [*extra, "\\n\\n".join(paragraphs), *repeated]
        ),
    }
    sdist = folder / "tool-2.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"tool-2.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))

    def package(name, version, licence, path, catalogues):
        content = path.read_bytes()
        return Package(name, version, licence, path.name, hashlib.sha256(content).hexdigest(), len(content), catalogues)

    packages = (
        package("hub", "1.0", "Apache-2.0", wheel, r"components/[^/]+/translations/(?P<tag>[^/]+)\.json$"),
        package("Tool", "2.0", "GPL-2.0-only", sdist, r"locales/(?P<tag>\w+)/LC_MESSAGES/\w+\.po$"),
    )
    return folder, packages, {"el": greek, "pt": portuguese, "en": english, "extra": extra + paragraphs}, marker


@pytest.fixture
def offline(shelf, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf[0]))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.fixture(scope="module")
def built(shelf, tmp_path_factory):
    """The corpus of the shelf: (folder, cache, summary)."""
    folder = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(shelf[0]))
        patch.setenv("PIP_CONFIG_FILE", "/dev/null")
        summary = build_starter(folder / "out", folder / "cache", packages=shelf[1], console=quiet())
    return folder / "out", folder / "cache", summary


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def read(out: Path, code: str) -> tuple[list[Document], list[Document]]:
    train, heldout = (list(read_documents(out / part / f"{code}.jsonl.zst")) for part in ("train", "heldout"))
    return train, heldout


def lines(documents: list[Document]) -> list[str]:
    return [line for document in documents for line in document.text.split("\n")]


def test_each_language_holds_exactly_its_own_clean_strings(built, shelf):
    out, _, _ = built
    texts = shelf[2]
    assert sorted(path.name for path in (out / "train").iterdir()) == ["el.jsonl.zst", "en.jsonl.zst", "pt.jsonl.zst"]
    greek = [text for index, text in enumerate(texts["el"]) if index % 100 < 98] + texts["extra"]
    assert Counter(lines([*read(out, "el")[0], *read(out, "el")[1]])) == Counter(greek)
    # one translation a message: the Brazilian variants of messages that Portuguese has are left out
    assert Counter(lines([*read(out, "pt")[0], *read(out, "pt")[1]])) == Counter(texts["pt"])
    english = [*texts["en"], *sentences("en", 161, 3)]
    assert Counter(lines([*read(out, "en")[0], *read(out, "en")[1]])) == Counter(english)


def test_documents_keep_the_catalogues_order_and_say_where_they_come_from(built, shelf):
    train, heldout = read(built[0], "pt")
    documents = sorted(
        train + heldout, key=lambda document: (document.id.split("#")[0], int(document.id.split("#")[1]))
    )
    assert lines(documents) == shelf[2]["pt"]
    assert all(500 <= len(document.text.encode()) < 3000 for document in documents)
    assert {(d.language, d.source, d.licence) for d in documents} == {("pt", "hub 1.0", "Apache-2.0")}
    assert documents[0].id == "hub/1.0/hub/components/c0/translations/pt.json#1"
    everything = [document.id for code in ("el", "en", "pt") for part in read(built[0], code) for document in part]
    assert len(set(everything)) == len(everything)
    assert {d.licence for d in read(built[0], "el")[0]} == {"Apache-2.0", "GPL-2.0-only"}


def test_no_heldout_string_is_in_training_text(built):
    for code in ("el", "en", "pt"):
        train, heldout = read(built[0], code)
        assert heldout
        assert not set(map(str.casefold, lines(train))) & set(map(str.casefold, lines(heldout)))


def test_the_summary_counts_what_is_on_disk(built, shelf):
    out, _, summary = built
    assert json.loads((out / "starter.json").read_text()) == summary
    for code, row in summary["languages"].items():
        for part, documents in zip(("train", "heldout"), read(out, code), strict=True):
            size = sum(len(document.text.encode()) for document in documents)
            assert row[part] == {"documents": len(documents), "bytes": size}
        assert (
            sum(row["sources"].values())
            == sum(row["licences"].values())
            == row["train"]["bytes"] + row["heldout"]["bytes"]
        )
    assert list(summary["left_out"]) == ["sl"]
    assert [package["sha256"] for package in summary["packages"]] == [package.sha256 for package in shelf[1]]
    console = quiet()
    console.print(summary_table(summary))
    assert "el Greek" in said(console)
    assert "3 languages" in said(console)


def test_nothing_of_a_source_archive_runs(built, shelf, tmp_path):
    folder, packages, _, marker = shelf
    assert (built[1] / "tool-2.0.tar.gz").exists()
    assert not marker.exists()
    # the control: its setup.py does leave the mark when somebody runs it
    with tarfile.open(folder / packages[1].file) as archive:
        archive.extractall(tmp_path, filter="data")
    subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path / "tool-2.0", capture_output=True, check=False
    )
    assert marker.exists()
    marker.unlink()


def test_a_complete_folder_is_left_alone_and_a_damaged_one_is_made_again(built, shelf, monkeypatch):
    out, cache, summary = built
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # and no find-links: the cache must do
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    console = quiet()
    assert build_starter(out, cache, packages=shelf[1], console=console) == summary
    assert "complete already" in said(console)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before

    (out / "train" / "el.jsonl.zst").unlink()
    before[out / "store"] = (0, b"made from it")  # what others put beside it stays
    (out / "store").write_bytes(b"made from it")
    assert build_starter(out, cache, packages=shelf[1], console=quiet()) == summary
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        p: c for p, (_, c) in before.items()
    }
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("offline")
def test_a_damaged_cached_archive_is_fetched_again_and_said(built, shelf, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel, sdist = (package.file for package in shelf[1])
    (cache / wheel).write_bytes((built[1] / wheel).read_bytes()[:-5])
    (cache / sdist).write_bytes((built[1] / sdist).read_bytes())
    console = quiet()
    assert build_starter(tmp_path / "out", cache, packages=shelf[1], console=console) == built[2]
    assert f"{cache / wheel} is damaged" in said(console).replace("\n", "")
    assert sdist not in said(console)


@pytest.mark.usefixtures("offline")
def test_what_cannot_be_fetched_or_written_is_one_sentence_and_leaves_all_as_it_was(shelf, tmp_path):
    wheel = shelf[1][0]
    wrong = Package(wheel.name, wheel.version, wheel.licence, wheel.file, "0" * 64, wheel.size, wheel.catalogues)
    absent = Package("hub", "9.9", wheel.licence, "hub-9.9-py3-none-any.whl", "0" * 64, 1, wheel.catalogues)
    for package in (wrong, absent):
        with pytest.raises(UserError, match=rf"pip could not fetch {package.source} ") as error:
            build_starter(tmp_path / "out", tmp_path / "cache", packages=[package], console=quiet())
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "cache").iterdir()) == []

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than a starter corpus"):
        build_starter(tmp_path / "thesis", tmp_path / "cache", packages=shelf[1], console=quiet())
    assert (tmp_path / "thesis/chapter.txt").read_text() == "mine"


@pytest.mark.parametrize(("count", "size"), [(30, 700), (400, 900), (1500, 1100)])
def test_heldout_is_the_lowest_hashes_within_its_bounds(count, size):
    documents = [Document(f"{index} ".ljust(size, "x"), str(index), "de", "s", "MIT") for index in range(count)]
    train, heldout = split_heldout(documents)
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest())
    assert set(heldout) == set(ranked[: len(heldout)])
    assert [*sorted([*train, *heldout], key=lambda document: int(document.id))] == documents
    assert train == [document for document in documents if document in train]
    budget = min(max(HELDOUT_SHARE * count * size, HELDOUT_LEAST), HELDOUT_MOST)
    assert budget <= size * len(heldout) < budget + size
    # the choice of a document hangs on its text alone: in any order, the same ones are held out
    assert set(split_heldout(documents[::-1])[1]) == set(heldout)


def test_the_pinned_packages_are_wholly_described():
    assert sum(package.size for package in PACKAGES) <= 200e6
    for package in PACKAGES:
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version in package.file
    assert len(official()) == 24
