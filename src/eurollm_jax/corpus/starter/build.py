"""The quick-start corpus: real text in the EU's 24 official languages and twenty more, small enough for a laptop.

The text is the translated messages of free software, written by its translators: a home-automation hub, a genealogy
program, a translation platform, a content-management system, the risk-assessment tool of the EU's agency for safety at
work, and a web framework. `PACKAGES` pins each archive and names its licence, which every document carries: Apache-2.0,
BSD-3-Clause, and the GPL in several versions. Only strings that are prose are kept (see `catalogues`), one translation
of each message a language, and no line twice, so held-out text shares no line with training text.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache as memoise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from eurollm_jax.corpus.reading.sources import Document, write_documents
from eurollm_jax.corpus.starter.catalogues import (
    CLEANING_VERSION,
    in_script,
    is_english,
    line_keys,
    prose,
    read_catalogue,
)
from eurollm_jax.corpus.starter.packages import Package, cache_folder, fetch
from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES, resolve

_GETTEXT = r"/(?P<tag>[A-Za-z_@]+)/LC_MESSAGES/[^/]+"

PACKAGES = (
    Package(
        name="homeassistant", version="2026.11.0", licence="Apache-2.0", size=67_607_712,
        file="homeassistant-2026.11.0-py3-none-any.whl",
        sha256="7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        catalogues=r"components/[^/]+/translations/(?P<tag>[^/]+)\.json$",
    ),
    Package(
        name="gramps", version="6.0.8", licence="GPL-2.0-or-later", size=17_077_316,
        file="gramps-6.0.8-py3-none-any.whl",
        sha256="56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
        catalogues=rf"share/locale{_GETTEXT}\.mo$",
    ),
    Package(
        name="Weblate", version="2026.10.1", licence="GPL-3.0-or-later", size=10_949_589,
        file="weblate-2026.10.1-py3-none-any.whl",
        sha256="27a779ceb05fec3665081df0d3f46f4b6ac0e3f499160a1c3cb145e8e35853d2",
        catalogues=rf"weblate/locale{_GETTEXT}\.mo$",
    ),
    Package(
        name="plone.app.locales", version="7.0.4", licence="GPL-2.0-only", size=12_492_437,
        file="plone_app_locales-7.0.4-py3-none-any.whl",
        sha256="de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
        catalogues=rf"locales{_GETTEXT}\.po$",
    ),
    # Says "GPL" without a version and comes with the text of version 2.
    Package(
        name="Euphorie", version="20.1.0", licence="GPL-2.0-only", size=10_649_048,
        file="euphorie-20.1.0.tar.gz",
        sha256="c9834dd4855ee7917db15874386acf1f0a037d975572a497c350f4e8b9a718d5",
        catalogues=rf"deployment/locales{_GETTEXT}\.po$",
    ),
    Package(
        name="Django", version="6.1.3", licence="BSD-3-Clause", size=8_424_610,
        file="django-6.1.3-py3-none-any.whl",
        sha256="a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
        catalogues=rf"locale{_GETTEXT}\.po$",
    ),
)  # fmt: skip

# Bytes of UTF-8. A document closes at the first string past DOCUMENT_BYTES, or where a catalogue ends past SHORT_BYTES.
DOCUMENT_BYTES = 1500
SHORT_BYTES = 500
# A language with less is left out, and the summary says so.
LANGUAGE_BYTES = 15_000
# Held out of a language: this share of its bytes, but at least and at most so many.
HELDOUT_SHARE, HELDOUT_LEAST, HELDOUT_MOST = 0.05, 4_000, 40_000

# Part of the fingerprint: raise it when anything but the cleaning, the packages or the numbers above changes the text.
_RECIPE_VERSION = 1
# One task of the process pool reads about this much of an archive.
_TASK_BYTES = 20_000_000


class Section(NamedTuple):
    """The clean strings of one catalogue, in its order."""

    language: str
    path: str
    texts: list[str]


def build_starter(
    out: Path,
    cache: Path | None = None,
    *,
    packages: Sequence[Package] = PACKAGES,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make the starter corpus in the folder `out` and return its summary, which `out/starter.json` holds too.

    Writes `train/<code>.jsonl.zst`, `heldout/<code>.jsonl.zst` and `starter.json`. A folder that is complete already is
    left as it is; otherwise the three are replaced once all is made, and what else lies there (a tokenizer, a store)
    stays. Archives are kept in `cache` (by default, in the user's cache folder).
    Raises UserError when `out` holds something else, or an archive cannot be fetched.
    """
    console = console or Console(stderr=True)
    fingerprint = recipe_fingerprint(packages)
    complete = _read_complete(out, fingerprint)
    if complete is not None:
        console.print(f"{out} is complete already; nothing to do", highlight=False)
        return complete
    archives = list(fetch(packages, cache or cache_folder(), console))
    sections = _read_all(packages, archives, console)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        summary = _write_all(temporary, packages, sections, console) | {"fingerprint": fingerprint}
        (temporary / "starter.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
        _put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"wrote {len(summary['languages'])} languages into {out}", highlight=False)
    return summary


def recipe_fingerprint(packages: Sequence[Package] = PACKAGES) -> str:
    """A hash of all that decides the corpus's bytes: the archives, the cleaning and the numbers above."""
    numbers = (DOCUMENT_BYTES, SHORT_BYTES, LANGUAGE_BYTES, HELDOUT_SHARE, HELDOUT_LEAST, HELDOUT_MOST)
    recipe = [_RECIPE_VERSION, CLEANING_VERSION, numbers, [asdict(package) for package in packages]]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def split_heldout(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out), each in the order given: held out are the documents of the lowest SHA-256 of their text.

    They are taken by ascending hash until they reach the budget of bytes that `HELDOUT_SHARE` and its bounds set.
    """
    total = sum(_size(document.text) for document in documents)
    budget = min(max(HELDOUT_SHARE * total, HELDOUT_LEAST), HELDOUT_MOST)
    chosen: set[str] = set()
    for digest, size in sorted((_digest(document.text), _size(document.text)) for document in documents):
        if budget <= 0:
            break
        chosen.add(digest)
        budget -= size
    train = [document for document in documents if _digest(document.text) not in chosen]
    return train, [document for document in documents if _digest(document.text) in chosen]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary of `build_starter` for a terminal, one language a row."""
    table = Table(title="Starter corpus", caption="kB are thousands of UTF-8 bytes of text")
    table.add_column("language")
    for heading in ("train docs", "train kB", "held-out docs", "held-out kB"):
        table.add_column(heading, justify="right")
    totals = [0, 0, 0, 0]
    for code, row in summary["languages"].items():
        numbers = [row[part][unit] for part in ("train", "heldout") for unit in ("documents", "bytes")]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        table.add_row(f"{code} {row['name']}", *_cells(numbers))
    table.add_section()
    table.add_row(f"{len(summary['languages'])} languages", *_cells(totals))
    return table


def _cells(numbers: Sequence[int]) -> list[str]:
    return [f"{number / 1e3:.1f}" if index % 2 else f"{number}" for index, number in enumerate(numbers)]


def _read_complete(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The summary in `out` if everything it lists is there and of this recipe; UserError if `out` is someone else's."""
    if not (out / "starter.json").exists():
        if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= {"train", "heldout"}):
            raise UserError(f"{out} holds something other than a starter corpus; name another folder or remove it")
        return None
    try:
        summary = json.loads((out / "starter.json").read_text())
    except ValueError:
        return None
    files = summary.get("files", {})
    whole = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in files.items())
    return summary if summary.get("fingerprint") == fingerprint and whole else None


def _put_in_place(new: Path, out: Path) -> None:
    """Rename the parts of `new` into `out`, starter.json last: stopped half-way, `out` is seen to be incomplete."""
    out.mkdir(parents=True, exist_ok=True)
    (new / "replaced").mkdir()
    for name in ("train", "heldout"):
        if (out / name).exists():
            (out / name).rename(new / "replaced" / name)
        (new / name).rename(out / name)
    (new / "starter.json").replace(out / "starter.json")


def _read_all(packages: Sequence[Package], archives: Sequence[Path], console: Console) -> dict[str, list[Section]]:
    """Package name -> its sections, ordered by language tag and path, so that `pt` comes before `pt_BR`."""
    tasks = [
        (package, path, part, parts)
        for package, path in zip(packages, archives, strict=True)
        for parts in [1 + package.size // _TASK_BYTES]
        for part in range(parts)
    ]
    found: dict[str, list[Section]] = {package.name: [] for package in packages}
    # spawn: forking while the progress bar's thread runs may deadlock
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        results = zip(tasks, pool.map(_read_part, *zip(*tasks, strict=True)), strict=True)
        for task, sections in _track(results, len(tasks), "reading catalogues", console):
            found[task[0].name] += sections
    return found


def _track[T](items: Iterable[T], total: int, description: str, console: Console) -> Iterable[T]:
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


def _read_part(package: Package, archive: Path, part: int, parts: int) -> list[Section]:
    """Every `parts`-th group of catalogues in an archive; the languages of one catalogue are always read together."""
    pattern = re.compile(package.catalogues)

    def locate(name: str) -> tuple[str, str] | None:
        """The language tag of a catalogue and its path with `*` for that tag, if this task is to read it."""
        match = pattern.search(name)
        if match is None or _language_code(match["tag"]) is None:
            return None
        path = f"{name[: match.start('tag')]}*{name[match.end('tag') :]}"
        return (match["tag"], path) if zlib.crc32(path.encode()) % parts == part else None

    members = _members(archive, lambda name: locate(name) is not None)
    located = sorted((*place, name) for name in members if (place := locate(name)) is not None)
    # The variants of a language share one translation of a message, the first; all languages share its English.
    seen: set[tuple[str, str, str]] = set()
    sections = []
    for tag, path, name in located:
        code = resolve(tag).code
        texts: dict[str, list[str]] = {language: [] for language in (code, "en")}
        for message in read_catalogue(name, members[name]):
            for language, text in ((code, message.text), ("en", message.english)):
                if not text or (language, path, message.key) in seen:
                    continue
                seen.add((language, path, message.key))
                clean = prose(text)
                if clean is not None and _is_in(clean, language):
                    texts[language].append(clean)
        names = {"en": path.replace("*", "en"), code: name}
        sections += [Section(language, names[language], kept) for language, kept in texts.items() if kept]
    return sections


def _is_in(text: str, language: str) -> bool:
    script = LANGUAGES[language].script
    return in_script(text, script) and (language == "en" or script != "Latn" or not is_english(text))


@memoise
def _language_code(tag: str) -> str | None:
    try:
        return resolve(tag).code
    except UserError:  # a language of another continent
        return None


def _members(archive: Path, is_wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Name -> content of the files that are wanted, of a wheel or a .tar.gz; nothing is written to disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if is_wanted(name)}
    with tarfile.open(archive) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if is_wanted(member.name))
        return {name: file.read() for name, file in files if file is not None}


def _write_all(
    out: Path, packages: Sequence[Package], sections: Mapping[str, Sequence[Section]], console: Console
) -> dict[str, Any]:
    english = {
        key
        for found in sections.values()
        for section in found
        if section.language == "en"
        for text in section.texts
        for key in line_keys(text)
    }
    languages: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    files: dict[str, int] = {}
    for code, language in _track(LANGUAGES.items(), len(LANGUAGES), "writing documents", console):
        seen: set[str] = set() if code == "en" else set(english)
        documents = [
            document
            for package in packages
            for document in _documents(package, code, [s for s in sections[package.name] if s.language == code], seen)
        ]
        total = sum(_size(document.text) for document in documents)
        if total < LANGUAGE_BYTES:
            left_out |= {code: total} if total else {}
            continue
        parts = dict(zip(("train", "heldout"), split_heldout(documents), strict=True))
        for part, chosen in parts.items():
            path = out / part / f"{code}.jsonl.zst"
            write_documents(path, chosen)
            files[f"{part}/{path.name}"] = path.stat().st_size
        languages[code] = {"name": language.name} | {part: _count(chosen) for part, chosen in parts.items()}
        languages[code]["sources"] = _bytes_by(documents, "source")
        languages[code]["licences"] = _bytes_by(documents, "licence")
    pinned = [{key: value for key, value in asdict(package).items() if key != "catalogues"} for package in packages]
    return {"languages": languages, "left_out": left_out, "packages": pinned, "files": files}


def _documents(package: Package, code: str, sections: Sequence[Section], seen: set[str]) -> list[Document]:
    """The sections' strings that share no line with `seen` yet, in order, as documents; their keys join `seen`."""
    drafts: list[tuple[str, list[str]]] = []
    starts: dict[str, int] = {}
    open_bytes = 0
    for section in sections:
        for text in section.texts:
            keys = line_keys(text)
            if not seen.isdisjoint(keys):
                continue
            seen |= keys
            if not open_bytes:
                drafts.append((section.path, []))
            drafts[-1][1].append(text)
            open_bytes += _size(text) + 1
            open_bytes *= open_bytes < DOCUMENT_BYTES
        open_bytes *= open_bytes < SHORT_BYTES
    if len(drafts) > 1 and open_bytes:  # the last one is short: it joins the one before
        drafts[-2][1].extend(drafts.pop()[1])
    documents = []
    for path, texts in drafts:
        starts[path] = starts.get(path, 0) + 1
        name = f"{package.name}/{package.version}/{path}#{starts[path]}"
        documents.append(Document("\n".join(texts), name, code, package.source, package.licence))
    return documents


def _bytes_by(documents: Iterable[Document], field: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for document in documents:
        key = getattr(document, field)
        sizes[key] = sizes.get(key, 0) + _size(document.text)
    return sizes


def _count(documents: Sequence[Document]) -> dict[str, int]:
    return {"documents": len(documents), "bytes": sum(_size(document.text) for document in documents)}


def _size(text: str) -> int:
    return len(text.encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
