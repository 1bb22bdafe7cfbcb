"""What a document is, and how the records of other people's corpora become one.

Corpora name the same thing differently: the address is `url` or `u`, the language `lang`, a list of guesses, or two
columns. `document` knows the names in use, so that no reader of a file format needs to, and says for each record that
is unusable why, in the same words whatever file it came from.
"""

import datetime
import difflib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eurollm_jax.errors import UserError
from eurollm_jax.languages import resolve

# Our field -> the names it has in corpora, first come first served. HPLT: u, ts, lang (a list, the likeliest first),
# document_lang (version 1). FineWeb-2: date, language and language_script. CulturaX and mC4: timestamp.
_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "id": ("id",),
    "language": ("language", "lang", "document_lang"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "url": ("url", "u"),
    "collected": ("collected", "date", "timestamp", "ts"),
}
_SCRIPT = "language_script"


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


@dataclass(frozen=True, slots=True)
class Defaults:
    """What fills in what a document does not say itself.

    `language` is any tag that `languages.resolve` knows and becomes its code; a document that says another is an error.
    `fields` maps a field of `Document` to the one name that a corpus has for it (`{"text": "content"}`); the empty name
    stands for none, so that a column which means something else is left alone. Raises UserError for an unknown language
    and for a field that no document has.
    """

    language: str | None = None
    source: str | None = None
    licence: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.language is not None:
            object.__setattr__(self, "language", resolve(self.language).code)
        for name, theirs in self.fields.items():
            if name == "text" and not theirs:
                raise UserError("the field 'text' needs the name of a column; a document is nothing without its text")
            if name not in _NAMES:
                hint = did_you_mean(name, _NAMES) or f"; name one of {', '.join(_NAMES)}"
                raise UserError(f"a document has no field {name!r}{hint}")

    def names(self) -> dict[str, tuple[str, ...]]:
        """Our field -> the names under which a record may hold it, in the order in which they are tried."""
        return _NAMES | {ours: (theirs,) if theirs else () for ours, theirs in self.fields.items()}


Fault = Callable[[UserError], None]
"""Called for each document that cannot be used: raises the error to stop, returns to go on with the next document."""


def stop_at(error: UserError) -> None:
    """The strictest `Fault`: the first unusable document ends the reading."""
    raise error


@dataclass(frozen=True, slots=True)
class Origin:
    """What holds for every record of one input: the caller's `defaults` and what the input's name says.

    `source` is the name of the corpus. `named_language` gives a code, or "" where the name says none; it is asked only
    when nothing else says the language, and raises UserError when the name says two.
    """

    defaults: Defaults
    source: str
    named_language: Callable[[], str] = str
    names: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.defaults.names())


def document(record: dict[str, Any], where: Callable[[], str], origin: Origin) -> Document:
    """The document that `record` (a JSON object or a row of a table) describes; `record` is used up.

    Fields that are not ours become metadata; those of an object `metadata`, in which datatrove keeps them, are taken
    as the record's own. `where` says the record's place and is only called for the UserError that is raised when there
    is no text, when the text cannot be kept exactly, or when its language is unknown, unsaid, or not the one asked for.
    """
    if type(nested := record.get("metadata")) is dict:
        del record["metadata"]
        record = nested | record
    names, defaults = origin.names, origin.defaults
    text = _text(record, where, names["text"])
    source = _take(record, where, names["source"]) or defaults.source or origin.source
    language = _language(record, where, origin)
    licence = _take(record, where, names["licence"]) or defaults.licence or "unknown"
    id = _take(record, where, names["id"], numbers=True)
    url = _take(record, where, names["url"])
    collected = _take(record, where, names["collected"], numbers=True)
    if not id:
        id = f"{source}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if None in record.values():
        record = {name: value for name, value in record.items() if value is not None}
    return Document(text, id, language, source, licence, url, collected, record)


def missing_text(present: Iterable[str], wanted: Sequence[str]) -> str:
    """Why a record or table of the fields `present` has no text, which goes by one of the names `wanted`.

    It is to be written after the place; "" when there is one.
    """
    present = list(present)
    if any(name in present for name in wanted):
        return ""
    name = wanted[0]
    has = ", ".join(map(repr, present[:12])) or "none at all"
    there = did_you_mean(name, present) or f"; it has {has}: say which to read, as in --field text=NAME"
    return f" has no field {name!r}{there}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'text'?`, or "" when nothing known is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _text(record: dict[str, Any], where: Callable[[], str], names: tuple[str, ...]) -> str:
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        present = [name for name, value in record.items() if value is not None]
        raise UserError(f"{where()}{missing_text(present, names)}")
    text = record.pop(name)
    if not isinstance(text, str):
        raise UserError(f"{where()}: field {name!r} is {_kind(text)}; it must be a string")
    if not text or text.isspace():
        raise UserError(f"{where()}: the text is empty; remove it or fill it")
    if "\0" in text:
        at = text.index("\0") + 1
        raise UserError(f"{where()}: character {at} of the text is NUL (U+0000); remove it, or skip bad documents")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            reason = "the text holds half a surrogate pair, which no UTF-8 can store"
            raise UserError(f"{where()}: {reason}; mend it") from None
    return text


def _language(record: dict[str, Any], where: Callable[[], str], origin: Origin) -> str:
    names = origin.names["language"]
    for name in names:
        if type(guesses := record.get(name)) is list and guesses:
            record[name] = guesses[0]
    tag = _take(record, where, names)
    if tag and record.get(_SCRIPT) and "_" not in tag and "-" not in tag:
        tag = f"{tag}_{record.pop(_SCRIPT)}"
    asked = origin.defaults.language
    if not tag:
        language = asked or origin.named_language()
        if not language:
            raise UserError(f'{where()} says no language; add a field such as "language": "fr"')
        return language
    try:
        own = _code(tag)
    except UserError as error:
        raise UserError(f"{where()}: {error}") from None
    if asked is not None and own != asked:
        raise UserError(f"{where()} says that its language is {tag!r}, but {asked!r} was asked for; mend either")
    return own


@functools.lru_cache(maxsize=4096)
def _code(tag: str) -> str:
    return resolve(tag).code


def _take(record: dict[str, Any], where: Callable[[], str], names: tuple[str, ...], *, numbers: bool = False) -> str:
    """Take the first non-empty of the fields `names` out of `record`, as a string; "" when there is none."""
    for name in names:
        value = record.get(name)
        if value is None or value == "":
            continue
        if type(value) is not str:
            if isinstance(value, datetime.date):
                value = value.isoformat()
            elif numbers and type(value) in (int, float):
                value = str(value)
            else:
                raise UserError(f"{where()}: field {name!r} is {_kind(value)}; it must be a string")
        del record[name]
        return value
    return ""


def _kind(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return f"a JSON {kinds[type(value)]}" if type(value) in kinds else f"of type {type(value).__name__}"
