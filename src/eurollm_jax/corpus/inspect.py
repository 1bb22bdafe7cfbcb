"""Looking into a token store: what it holds by source, language and licence, what its documents say, and whether its
files are as they were written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from eurollm_jax.corpus.blocklist import Blocklist
from eurollm_jax.corpus.reading.documents import did_you_mean
from eurollm_jax.corpus.store import Source, TokenStore
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.languages import LANGUAGES

SHOWN_CHARACTERS = 1000  # of a sample

_COLUMN = 36  # characters of a licence or an origin

# Control characters would drive the terminal: a picture of each (U+2400 and on) stands for it.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(127, 160), "�")


@dataclass(frozen=True, slots=True)
class Place:
    """A document: its number in a source."""

    source: Source
    document: int


def inspect_store(
    store: TokenStore,
    console: Console,
    *,
    source: str | None = None,
    documents: int = 0,
    find: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Print the store's tables and `documents` of its documents, or only those that `find` names.

    `source` restricts all of it to one source, or to those of one language; text is decoded with `tokenizer`. Raises
    UserError for a source or document that is not there, for a tokenizer that is not the store's, and when text is to
    be shown and there is none.
    """
    sources = chosen_sources(store, source)
    if find is None and not documents:
        _print_tables(store, sources, console)
        return
    if tokenizer is None:
        raise UserError(
            f"{store.path} holds tokens; to read their text give the tokenizer that made them (--tokenizer)"
        )
    loaded = Tokenizer.load(tokenizer)
    if loaded.sha256 != store.tokenizer_sha256:
        raise UserError(
            f"{store.path} was made with the tokenizer {store.tokenizer_sha256[:12]} and {tokenizer} is "
            f"{loaded.sha256[:12]}; give the other one"
        )
    if find is None:
        _print_tables(store, sources, console)
        places = sample_documents(sources, documents)
    else:
        places = find_documents(sources, find)
        if not places:
            where = f" in {source}" if source else ""
            without = [other.name for other in sources if not other.has_records]
            unknown = f" ({', '.join(without)} cannot be searched: Megatron datasets have no ids)" if without else ""
            raise UserError(
                f"{store.path} has no document {find!r}{where}{unknown}; give the id, SHA-256 or URL of one"
            )
    for place in places:
        console.print(document_view(place, loaded, whole=find is not None))


def _print_tables(store: TokenStore, sources: Sequence[Source], console: Console) -> None:
    console.print(Text(str(store.path)), soft_wrap=True)
    identity = f"store {store.fingerprint[:12]}, tokenizer {store.tokenizer_sha256[:12]} of {store.vocab_size:,} tokens"
    console.print(identity, highlight=False)
    for table in store_tables(store, sources):
        console.print(table)


def verify_store(store: TokenStore, console: Console) -> None:
    """Read and hash every file of the store under a bar, and say how much was right.

    Raises UserError that names each damaged file.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=store.size)
        store.verify(lambda octets: progress.advance(bar, octets))
    said = f"{store.path}: all {_si(store.size)}B of its files are as they were written"
    console.print(said, highlight=False, soft_wrap=True)


def chosen_sources(store: TokenStore, name: str | None = None) -> list[Source]:
    """The source `name`, or the sources of the language `name`, or all. Raises UserError when there is none."""
    sources = list(store.sources.values())
    if name is None:
        return sources
    found = [source for source in sources if source.name == name] or [s for s in sources if s.language == name]
    if not found:
        known = did_you_mean(name, list(store.sources)) or f"; it has {', '.join(sorted(store.sources))}"
        raise UserError(f"{store.path} has no source or language {name!r}{known}")
    return found


def store_tables(store: TokenStore, sources: Sequence[Source]) -> list[Table]:
    """Sources with their sums; languages, where one has several; and origins by licence. Each fits 100 columns."""
    shards = {name: len(entry["shards"]) for name, entry in store.manifest["sources"].items()}
    by_language: dict[str, list[Source]] = {}
    for source in sources:
        by_language.setdefault(source.language, []).append(source)
    tables = [_sources_table("By source", "source", {s.name: [s] for s in sources}, shards)]
    if any(len(group) > 1 for group in by_language.values()):
        groups = {f"{code} {LANGUAGES[code].name}": group for code, group in sorted(by_language.items())}
        tables.append(_sources_table("By language", "language", groups, shards))
    return [*tables, _origins_table(sources)]


def sample_documents(sources: Sequence[Source], count: int) -> list[Place]:
    """`count` documents, always the same: the middle ones of as many equal parts of all documents of the sources."""
    ends = np.cumsum([source.documents for source in sources])
    total = int(ends[-1])
    numbers = sorted({(2 * part + 1) * total // (2 * count) for part in range(min(count, total))})
    if count > total:
        numbers = list(range(total))
    at = np.searchsorted(ends, numbers, side="right")
    return [
        Place(sources[i], number - int(ends[i]) + sources[i].documents)
        for i, number in zip(at.tolist(), numbers, strict=True)
    ]


def find_documents(sources: Iterable[Source], wanted: str) -> list[Place]:
    """The documents with the id, the SHA-256 of the text (64 hexadecimal digits) or the URL `wanted`, in the sources
    that keep these: Megatron datasets do not."""
    places = []
    for source in filter(lambda source: source.has_records, sources):
        found = set(source.find(wanted).tolist())
        if len(wanted) == 64 and not set(wanted.lower()) - set("0123456789abcdef"):
            found |= set(source.find_sha256(wanted).tolist())
        if "://" in wanted:
            found |= set(Blocklist(frozenset(), frozenset([wanted]), "").find(source).tolist())
        places += [Place(source, document) for document in sorted(found)]
    return places


def document_view(place: Place, tokenizer: Tokenizer, *, whole: bool) -> RenderableType:
    """What is known of a document, and its text, or the first `SHOWN_CHARACTERS` of it."""
    source, number = place.source, place.document
    first, stop = (int(offset) for offset in source.offsets[number : number + 2])
    shown = stop if whole else min(stop, first + SHOWN_CHARACTERS)  # a token is a character or more, but for bytes
    text = tokenizer.decode_bytes(source.read(first, shown)).decode("utf-8", errors="replace" if whole else "ignore")
    cut = shown < stop or (not whole and len(text) > SHOWN_CHARACTERS)
    facts = {"document": f"{number:,} of {source.documents:,}", "tokens": f"{stop - first:,}"}
    facts["bytes"] = f"{source.byte_lengths[number]:,}"
    if source.has_records:
        known = source.document(number)
        facts |= {"id": known.id, "url": known.url, "origin": known.origin, "licence": known.licence}
        facts |= {"date": known.collected, "sha256": known.sha256}
    lines = [Text.assemble((f"{name:9}", "dim"), _visible(value)) for name, value in facts.items() if value]
    body = Text(_visible(text[:SHOWN_CHARACTERS] if not whole else text))
    if cut:
        body.append(" ...", style="dim")
    return Group(Rule(source.name), *lines, Text(), body, Text())


def _sources_table(title: str, what: str, groups: Mapping[str, Sequence[Source]], shards: Mapping[str, int]) -> Table:
    table = _table(title)
    table.add_column(
        what, min_width=12, max_width=28, overflow="ellipsis"
    )  # gives way in a narrow terminal; figures must not
    for heading in ("documents", "tokens", "text", "bytes/token", "fallback", "shards"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, sources in groups.items():
        table.add_row(_visible(name), *_figures(sources, shards))
    if len(groups) > 1:
        table.add_section()
        everything = [source for group in groups.values() for source in group]
        table.add_row(f"{len(groups)} {what}s", *_figures(everything, shards))
    return table


def _figures(sources: Sequence[Source], shards: Mapping[str, int]) -> list[str]:
    documents, tokens, octets, fallback = (
        sum(getattr(source, name) for source in sources) for name in ("documents", "tokens", "bytes", "fallback")
    )
    files = sum(shards[source.name] for source in sources)
    per_token = f"{octets / tokens:.2f}" if tokens else "-"
    share = f"{fallback / tokens:.2%}" if tokens else "-"
    return [f"{documents:,}", _si(tokens), f"{_si(octets)}B", per_token, share, f"{files:,}"]


def _origins_table(sources: Sequence[Source]) -> Table:
    sums: dict[tuple[str, str], list[int]] = {}
    for source in sources:
        for origin in source.origin_table:
            entry = sums.setdefault((origin["licence"], origin["origin"]), [0, 0])
            entry[0] += origin["documents"]
            entry[1] += origin["bytes"]
    total = sum(octets for _, octets in sums.values())
    table = _table("By licence and origin")
    for heading in ("licence", "origin"):
        table.add_column(heading, max_width=_COLUMN, overflow="ellipsis")
    for heading in ("documents", "text", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (licence, name), (documents, octets) in sorted(sums.items(), key=lambda item: (item[0][0], -item[1][1])):
        share = f"{octets / total:.2%}" if total else "-"
        table.add_row(_visible(licence), _visible(_end(name)), f"{documents:,}", f"{_si(octets)}B", share)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _si(number: float) -> str:
    """Three digits and a power of a thousand, with a space: `1.23 G`."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:#.3g}".rstrip(".") + f" {unit}" if unit else f"{number:.0f} "


def _end(name: str) -> str:
    """The end of a long name, which is what tells one path from the next."""
    return name if len(name) <= _COLUMN else f"…{name[1 - _COLUMN :]}"


def _visible(text: str) -> str:
    return text.translate(_PICTURES)
