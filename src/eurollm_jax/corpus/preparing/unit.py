"""One unit of the work: its documents, however they are read, become a small store with a record of how it was made."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from eurollm_jax.corpus.blocklist import Blocklist
from eurollm_jax.corpus.folders import full_disk_is_named, raced_folder, write_json
from eurollm_jax.corpus.preparing.encoding import Incoming, encode_for_store, text_digest
from eurollm_jax.corpus.preparing.input_files import Record, check_still, read_records
from eurollm_jax.corpus.preparing.work_plan import RECORD_NAME, PrepareOptions, WorkPlan
from eurollm_jax.corpus.reading.documents import Document
from eurollm_jax.corpus.reading.sources import read_part
from eurollm_jax.corpus.store_writer import StoreWriter
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

STAYS = "then run the same command again: what is done stays"

_TICK_BYTES = 1_000_000
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]")

Tick = Callable[[int], None]
"""Called now and then with the bytes of text that were encoded since; may raise to end the work."""

Reading = Iterable[tuple[Document, str]]
"""Documents, each with the name of its input."""


class Refusals:
    """Documents that cannot be used: `add` raises, or keeps what is wrong with them in `found`."""

    def __init__(self, options: PrepareOptions) -> None:
        self._stop = options.bad_documents == "stop"
        self.found: list[dict[str, str]] = []

    def add(self, name: str, error: UserError) -> None:
        if self._stop:
            raise error
        self.found.append({"input": name, "kind": _kind(name, str(error)), "reason": str(error)})


def prepare_unit(
    plan: WorkPlan, number: int, tokenizer: Tokenizer, options: PrepareOptions, *, threads: int, tick: Tick
) -> dict[str, Any]:
    """Do unit `number` of `plan` and return its record. Raises UserError for inputs that change meanwhile."""
    parts = plan.units[number]
    files = read_records(parts, plan.names)

    def reading(refusals: Refusals) -> Iterator[tuple[Document, str]]:
        for part in parts:
            for document in read_part(part, options.defaults, functools.partial(refusals.add, part.input)):
                yield document, part.input
        check_still(parts, plan.names, files)

    return write_unit(plan, number, reading, tokenizer, options, files=files, threads=threads, tick=tick)


def write_unit(
    plan: WorkPlan,
    number: int,
    reading: Callable[[Refusals], Reading],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    *,
    files: dict[str, Record],
    threads: int,
    tick: Tick,
) -> dict[str, Any]:
    """Write the documents of `reading` as unit `number` and return its record.

    `files` are the records of the inputs' files. Raises UserError for a document that cannot be used, unless `options`
    say to skip it, and for a full disk.
    """
    refusals, blocked, ticked, total = Refusals(options), Counter[str](), 0, 0
    blocklist = Blocklist.load(options.blocklist) if options.blocklist else None
    folder = plan.unit_folder(number)
    with full_disk_is_named(folder, STAYS), raced_folder(folder) as partial:
        writer = StoreWriter(partial, **_described(tokenizer), for_merging=True)
        incoming = _not_blocked(reading(refusals), tokenizer, blocklist, blocked, options.by)
        for encoded in encode_for_store(incoming, tokenizer, threads=threads, fault=refusals.add):
            writer.add(
                source_name(encoded.document, options.by),
                encoded.document,
                encoded.tokens,
                byte_length=encoded.byte_length,
                characters=encoded.characters,
                fallback=encoded.fallback,
                sha256=encoded.sha256,
            )
            total += encoded.byte_length
            if total - ticked >= _TICK_BYTES:
                tick(total - ticked)
                ticked = total
        writer.close()
        record = {"plan": plan.sha256, "files": files, "bytes": total, "blocked": blocked, "refused": refusals.found}
        write_json(partial / RECORD_NAME, record)
    tick(total - ticked)
    return record


def source_name(document: Document, by: str) -> str:
    """The source of the store that the document goes to: "fi", or by origin "fi/hplt"."""
    if by == "language":
        return document.language
    return f"{document.language}/{_NOT_IN_NAMES.sub('_', document.source).lstrip('.')[:100] or '_'}"


def _not_blocked(
    reading: Reading, tokenizer: Tokenizer, blocklist: Blocklist | None, blocked: Counter[str], by: str
) -> Iterator[Incoming]:
    """The documents as the tokenizer writes them. A blocklist may name a text as it was or as it is written."""
    for document, name in reading:
        sha256, byte_length = text_digest(document.text)
        hashes = [sha256]
        if (text := tokenizer.normalised(document.text)) != document.text:
            document = replace(document, text=text)
            sha256, byte_length = text_digest(text)
            hashes.append(sha256)
        if blocklist and any(blocklist.blocks(one, document.url) for one in hashes):
            blocked[source_name(document, by)] += 1
        else:
            yield Incoming(document, sha256, byte_length, name)


def _kind(name: str, reason: str) -> str:
    """What is wrong, without place, values and advice, so that documents with the same fault can be counted."""
    fault = re.sub(
        r"^(, (line|row|example|document) .*?(?=:| (is|has|says|holds|does|cannot)\b))?:? *",
        "",
        reason.removeprefix(name),
    )
    fault = re.sub(r"\(.*?\)", "", fault.partition(";")[0])
    fault = re.sub(r"'[^']*'|\"[^\"]*\"", "...", fault)
    return re.sub(r"\b\d[\d,]*\b", "N", re.sub(r"  +", " ", fault)).strip()


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
