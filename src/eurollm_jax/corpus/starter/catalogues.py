"""Translation catalogues as running text: read gettext and JSON catalogues, and keep the strings that are prose.

Catalogues are where real, human-translated text in every European language lies under free licences. Most of what they
hold is not text, though: labels, placeholders, markup, and English that nobody has translated. `prose` decides.
"""

import html
import json
import re
import struct
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

# Part of the starter corpus's fingerprint: raise it when a change below changes any text.
CLEANING_VERSION = 1

MIN_WORDS = 3
MIN_CHARACTERS = 16
MIN_LETTERS = 0.7  # of the characters that are not spaces


class Message(NamedTuple):
    """One entry of a catalogue: its key, the English that it translates, and the text; either may be "" (not there)."""

    key: str
    english: str
    text: str


def read_catalogue(name: str, data: bytes) -> list[Message]:
    """The messages of a .po, .mo or .json catalogue, in the file's order (a .mo is sorted by its English).

    A fuzzy entry counts as untranslated, and an obsolete one as absent; of a plural only the last form is kept.
    Raises ValueError, with the line where there is one, for a file that is not such a catalogue.
    """
    try:
        match name.rpartition(".")[2]:
            case "po":
                return list(_read_po(data.decode()))
            case "mo":
                return list(_read_mo(data))
            case "json":
                return [Message(key, "", text) for key, text in _strings(json.loads(data), "")]
    except (ValueError, struct.error, IndexError) as error:
        raise ValueError(f"{name} is not a catalogue that we can read: {error}") from error
    raise ValueError(f"{name} is neither .po, .mo nor .json")


def prose(text: str) -> str | None:
    """`text` without markup, or None if it is a label, code, or has holes where a program puts values.

    The result is NFC, has at least `MIN_WORDS` words, and its line breaks are single.
    """
    if len(text) < MIN_CHARACTERS or _HOLE.search(text):
        return None
    if "<" in text:
        text = _TAG.sub("", _LINE_TAG.sub("\n", text))
    text = _MARKDOWN_LINK.sub(r"\1", _INVISIBLE.sub("", unicodedata.normalize("NFC", html.unescape(text))))
    if text.count("_") == 1:
        text = _ACCELERATOR.sub("", text)
    text = _EMPHASIS.sub("", text)
    text = "\n".join(line for line in (_SPACES.sub(" ", line).strip() for line in text.splitlines()) if line)
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS or len(text) < MIN_CHARACTERS or _CODE.search(text):
        return None
    return text if sum(map(len, words)) >= MIN_LETTERS * len("".join(text.split())) else None


def sameness(text: str) -> str:
    """A key that is equal for texts that differ in case, spacing, punctuation or digits alone."""
    return "".join(_words(text))


def line_keys(text: str) -> set[str]:
    """The `sameness` of each line that is long enough to be prose by itself; two texts that share one overlap."""
    lines = (_words(line) for line in text.split("\n"))
    return {"".join(words) for words in lines if len(words) >= MIN_WORDS} or {sameness(text)}


def in_script(text: str, script: str) -> bool:
    """Whether most letters of `text` are of `script` (an ISO 15924 code of the language table)."""
    return 2 * sum(map(len, _SCRIPT[script].findall(text))) > sum(map(str.isalpha, text))


def is_english(text: str) -> bool:
    """Whether a text in Latin script is English, by words that no other language of ours writes as often."""
    words = [word.casefold() for word in _WORD.findall(text)]
    hits = [word for word in words if word in _ENGLISH]
    return len(hits) >= 2 and len(hits) >= 0.12 * len(words)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SPACES = re.compile(r"[ \t]+")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]+")
_LINE_TAG = re.compile(r"<\s*/?\s*(?:br|p|li|ul|ol|div|h[1-6]|tr|table)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"<\s*/?\s*[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)
_MARKDOWN_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")
_EMPHASIS = re.compile(r"\*\*|``?")
_ACCELERATOR = re.compile(r"(?<!\w)_(?=\w)")

# Where a program inserts a value: {name}, {{ name }}, ${name}, $name, $t(key), %s, %(name)s, %1$s, %1, %name%.
_HOLE = re.compile(
    r"[{}]|\$\w|\$\(|%\([^)]*\)|%[-#0+]*\d*(?:\.\d+)?(?:l{0,2}[diufFeEgGxXocrs]|@)(?!\w)|%\d|%\w+%|\[%|%%|\[\["
)
# What is left of code, paths, addresses and tables once the markup is gone.
_CODE = re.compile(
    r"<|(?<! )>|>(?! )|[|\\^~=@#]|\w_|_\w|://|www\.|\w/\w+/|::|--\w|&\w+;|\(\)|\.(?:py|html?|ya?ml|json|xml|php)\b",
    re.IGNORECASE,
)

_SCRIPT = {
    "Latn": re.compile(r"[A-Za-zªº\u00c0-\u024f\u1e00-\u1eff]+"),
    "Cyrl": re.compile(r"[\u0400-\u052f]+"),
    "Grek": re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]+"),
    "Geor": re.compile(r"[\u10a0-\u10ff\u1c90-\u1cbf]+"),
    "Armn": re.compile(r"[\u0530-\u058f]+"),
}

_ENGLISH = frozenset(("the", "and", "this", "that", "with", "your", "you", "from", "which", "are", "been")) | frozenset(
    ("should", "cannot", "when", "has", "was", "were", "does", "would", "could")
)

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_PO_LINE = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr(?:\[\d+\])?)?\s*"((?:[^"\\]|\\.)*)"$')
_PO_DEFAULT = re.compile(r'^\s*Default:\s*"(.*)"\s*$', re.DOTALL)


def _read_po(content: str) -> Iterator[Message]:
    fields: dict[str, str] = {}
    comments: list[str] = []
    flags = keyword = ""
    for number, raw in enumerate([*content.removeprefix("\ufeff").splitlines(), ""], 1):
        line = raw.strip()
        starts_entry = not line or line.startswith(("#", "msgctxt", "msgid "))
        if starts_entry and any(key.startswith("msgstr") for key in fields):
            yield from _message(fields, "\n".join(comments), flags)
            fields, comments, flags = {}, [], ""
        if line.startswith("#"):
            comments += [line[2:]] if line.startswith("#.") else []
            flags += line if line.startswith("#,") else ""
        elif line:
            parts = _PO_LINE.match(line)
            if parts is None:
                raise ValueError(f"line {number} is neither a keyword nor a string")
            keyword = parts[1] or keyword
            unescaped = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), parts[2])
            fields[keyword] = ("" if parts[1] else fields[keyword]) + unescaped


def _message(fields: dict[str, str], comment: str, flags: str) -> Iterator[Message]:
    forms = [fields[key] for key in sorted(fields) if key.startswith("msgstr")]
    default = _PO_DEFAULT.match(comment)
    english = default[1] if default else fields.get("msgid_plural") or fields.get("msgid", "")
    if fields.get("msgid"):
        text = "" if "fuzzy" in flags else forms[-1]
        yield Message(f"{fields.get('msgctxt', '')}\x04{fields['msgid']}", english, text)


def _read_mo(data: bytes) -> Iterator[Message]:
    # GNU gettext manual, "The Format of GNU MO Files": magic, revision, count, offsets of the two string tables.
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    magic, _, count, ids, texts = struct.unpack(f"{order}5I", data[:20])
    if magic != 0x950412DE:
        raise ValueError("its first four bytes are not those of a .mo file")
    for index in range(count):
        id_length, id_start = struct.unpack_from(f"{order}2I", data, ids + 8 * index)
        length, start = struct.unpack_from(f"{order}2I", data, texts + 8 * index)
        key = data[id_start : id_start + id_length].decode()
        text = data[start : start + length].decode().rpartition("\0")[2]
        if key:
            yield Message(key, key.rpartition("\x04")[2].rpartition("\0")[2], text)


def _strings(node: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _strings(child, f"{key}/{name}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _strings(child, f"{key}/{index}")
