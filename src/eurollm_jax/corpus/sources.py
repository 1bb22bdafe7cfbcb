"""Text in: files of several kinds become one stream of `Document`s, each with its language, source and licence.

Reading streams, so a file may be larger than memory, and everything that is wrong with an input is said with its file
and line before any later stage sees it.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from eurollm_jax.errors import UserError
from eurollm_jax.languages import resolve

SUFFIXES = (".jsonl", ".jsonl.zst", ".txt")

# A folder that holds one of these beside files we can read is refused, for half a corpus would go missing in silence.
_OTHER_DATA = (".gz", ".bz2", ".xz", ".zst", ".zip", ".parquet", ".arrow", ".ndjson", ".csv", ".tsv")

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from. `language` is a code of `languages.LANGUAGES`; `licence` an SPDX expression;
    `collected` the date at which it was fetched, as its corpus writes it; `metadata` whatever else its corpus says."""

    text: str
    id: str
    language: str
    source: str
    licence: str
    url: str = ""
    collected: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


def corpus_files(path: Path) -> list[Path]:
    """`path` itself, or every file with one of `SUFFIXES` that lies directly in the folder `path`, sorted by name.

    Subfolders are not entered: a corpus keeps its held-out text in one. Raises UserError when there is nothing to read,
    and for a file of data that we cannot read.
    """
    if not path.exists():
        raise UserError(_missing(path))
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is of no kind that can be read here; give {_either(SUFFIXES)}")
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    found = [entry for entry in entries if entry.is_file() and entry.name.endswith(SUFFIXES)]
    if not found:
        inside = [entry.name for entry in entries if entry.is_dir() and any(map(_is_supported, entry.iterdir()))]
        meant = f"did you mean {_either(str(path / name) for name in inside)}?" if inside else ""
        raise UserError(f"{path} has no {_either(SUFFIXES)} file; {meant or 'give a folder of such files'}")
    strays = [entry for entry in entries if entry.is_file() and entry not in found and entry.suffix in _OTHER_DATA]
    if strays:
        raise UserError(f"{strays[0]} cannot be read here; convert it to {_either(SUFFIXES)} or move it out of {path}")
    return found


def read_documents(
    path: Path, *, language: str | None = None, source: str | None = None, licence: str | None = None
) -> Iterator[Document]:
    """Every document of a file, or of the files of a folder in the order of `corpus_files`.

    A .jsonl line is an object with `text`, and `id`, `language` (or `lang`), `source`, `licence` (or `license`) and
    `url` where known; other fields are ignored and so are blank lines. A .txt file is one document. The arguments fill
    in what a document does not say itself; a `language` that contradicts a document's own is an error. Without any, the
    language of a .txt file is what its name or its folder's begins with (`fr.txt`, `fr-letters.txt`, `fr/letters.txt`),
    the source is the file's name, the licence "unknown", and the id is made of the source and a hash of the text.
    Raises UserError, with file and line, for anything that cannot be read whole.
    """
    defaults = _Defaults(resolve(language).code if language is not None else None, source, licence)
    files = corpus_files(path)
    return (document for file in files for document in _read_file(file, defaults))


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write `documents` to a .jsonl or .jsonl.zst file and return how many there were.

    The file appears under its name only when it is whole; until then, and after an error, what was there stays.
    """
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise UserError(f"cannot write documents to {path}; give a name that ends in .jsonl or .jsonl.zst")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("wb") as file:
            compressor = zstandard.ZstdCompressor(level=10).compressobj() if path.suffix == ".zst" else None
            for document in documents:
                line = _to_json(document)
                file.write(compressor.compress(line) if compressor else line)
                count += 1
            if compressor:
                file.write(compressor.flush())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


@dataclass(frozen=True, slots=True)
class _Defaults:
    language: str | None
    source: str | None
    licence: str | None


def _read_file(path: Path, defaults: _Defaults) -> Iterator[Document]:
    stem = next(path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix))
    source = defaults.source or stem
    if path.suffix == ".txt":
        content = path.read_bytes()
        text = "\n".join(_decode(line, path, number) for number, line in enumerate(content.split(b"\n"), 1))
        language = defaults.language or _language_by_name(path)
        yield _document({"text": text.removeprefix("\ufeff"), "language": language}, str(path), source, defaults)
        return
    empty = True
    for number, line in enumerate(_lines(path), 1):
        text = _decode(line, path, number)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            )
            raise UserError(f"{where} is not valid JSON ({reason}); mend or remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f'{where} is not a JSON object; each line must be one, such as {{"text": "..."}}')
        yield _document(record, where, source, defaults)
        empty = False
    if empty:
        raise UserError(f"{path} has no documents; remove the file or fill it")


def _document(record: dict[str, Any], where: str, source: str, defaults: _Defaults) -> Document:
    text = record.get("text")
    if text is None:
        raise UserError(f"{where} has no field 'text'{_did_you_mean('text', record)}")
    if not isinstance(text, str):
        raise UserError(f"{where}: field 'text' is a JSON {_json_kind(text)}; it must be a string")
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove it or fill it")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text holds half a surrogate pair, which no UTF-8 can store; mend it") from None
    source = _field(record, where, "source") or source
    return Document(
        text=text,
        id=_field(record, where, "id") or f"{source}/{hashlib.sha256(encoded).hexdigest()[:16]}",
        language=_language(record, where, defaults.language),
        source=source,
        licence=_field(record, where, "licence", "license") or defaults.licence or "unknown",
        url=_field(record, where, "url"),
    )


def _language(record: dict[str, Any], where: str, default: str | None) -> str:
    tag = _field(record, where, "language", "lang")
    if not tag:
        if default is None:
            raise UserError(f'{where} says no language; add a field such as "language": "fr"')
        return default
    try:
        own = resolve(tag).code
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if default is not None and own != default:
        raise UserError(f"{where} says that its language is {tag!r}, but {default!r} was asked for; mend either")
    return own


def _language_by_name(path: Path) -> str:
    """The language that the name of a .txt file, or of its folder, begins with."""
    by_file, by_folder = (_leading_language(name) for name in (path.stem, path.absolute().parent.name))
    if by_file and by_folder and by_file != by_folder:
        raise UserError(f"{path} is {by_file!r} by its name and {by_folder!r} by its folder's; rename either")
    if not (by_file or by_folder):
        raise UserError(f"{path} says no language; begin its name with a code, as in fr-{path.name}, or use .jsonl")
    return by_file or by_folder


def _leading_language(name: str) -> str:
    """The code that the longest possible start of `name`, up to a hyphen, an underscore or a dot, stands for; or ""."""
    ends = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] in "-_.")]
    for start in (name[:end] for end in ends):
        with suppress(UserError):
            return resolve(start).code
    return ""


def _field(record: dict[str, Any], where: str, *names: str) -> str:
    """The first of the fields `names` that is there, as a string; "" when none is."""
    for name in names:
        value = record.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name == "id":
            return str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} is a JSON {_json_kind(value)}; it must be a string")
        if value:
            return value
    return ""


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        if path.suffix != ".zst":
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
            return
        frame = None  # a file may be several zstd frames, one after the other
        try:
            while data := file.read(_CHUNK_BYTES):
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(data)
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is not valid zstd ({error}); make or fetch it again") from None
        if frame is not None:
            raise UserError(f"{path} is cut off in the middle of a zstd frame; make or fetch it again")


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
        raise UserError(f"{path}, line {number} is not UTF-8 ({byte}); convert the file to UTF-8") from None


def _to_json(document: Document) -> bytes:
    record = {"text": document.text, "id": document.id, "language": document.language}
    record |= {"source": document.source, "licence": document.licence} | ({"url": document.url} if document.url else {})
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _missing(path: Path) -> str:
    while not path.parent.exists():
        path = path.parent
    hint = _did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"{path} does not exist{hint or '; give a file or folder that does'}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_supported(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _either(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def _json_kind(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
