"""Text in: inputs of several kinds are cut into parts, and each part is a stream of `Document`s.

A part can be read alone, in any process and in any order, and the parts of an input hold each of its documents once.
Reading streams, so an input may be larger than memory, and everything that is wrong with one is said with its file and
position before any later stage sees it.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from eurollm_jax.corpus.reading import path_names, text_files, tfds_files
from eurollm_jax.corpus.reading.documents import Defaults, Document, Fault, Origin, stop_at
from eurollm_jax.corpus.reading.locate import SUFFIXES, find_inputs
from eurollm_jax.errors import UserError

__all__ = [
    "Defaults",
    "Document",
    "Fault",
    "Part",
    "find_parts",
    "part_files",
    "read_documents",
    "read_part",
    "stop_at",
    "write_documents",
]


# Of these pyarrow reads the files, which is imported when there are any.
_COLUMNAR = (".parquet", ".arrow")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one input: the units [first, stop) of `input`, to its end when `stop` is None.

    Units are bytes of a plain file of lines, row groups of parquet, record batches of an arrow file and examples of a
    `tfds:` input; every other file is one part. `input` is a file's path or a resolved `tfds:` address, and `bytes` the
    size on disk of the piece, for progress and balance.
    """

    input: str
    first: int = 0
    stop: int | None = None
    bytes: int = 0


def find_parts(given: Sequence[str | Path], *, part_bytes: int = 1 << 28) -> list[Part]:
    """The parts of all inputs, in the order of their documents, each of about `part_bytes` where its kind can be cut.

    An input is a file, a folder (every file that lies directly in it, sorted by name), a pattern
    (`data/**/*.jsonl.zst`), a folder saved by Hugging Face datasets, or `tfds:NAME/CONFIG:VERSION?split=train`.
    Raises UserError for an input that is not there or cannot be read, and for a file that is given twice.
    """
    return [part for name in find_inputs(given) for part in _parts(name, part_bytes)]


def part_files(part: Part) -> list[Path]:
    """The files whose content decides what `part` yields."""
    if not _is_tfds(part):
        return [Path(part.input)]
    after = [shard for shard in tfds_files.shards(part.input) if shard.stop > part.first]
    return [shard.file for shard in after if part.stop is None or shard.first < part.stop]


def read_part(part: Part, defaults: Defaults = Defaults(), fault: Fault = stop_at) -> Iterator[Document]:  # noqa: B008
    """The documents of `part`, in its order.

    `fault` is called with file and position for each document that cannot be used. Raises UserError for what cannot be
    read on from: a file that is damaged, has other columns, or has no document.
    """
    if _is_tfds(part):
        name, hints = tfds_files.names(part.input)
        language = next(filter(None, map(path_names.leading_language, hints)), "")
        origin = Origin(defaults, defaults.source or name, lambda: language)
        return tfds_files.read_examples(part.input, part.first, part.stop, origin, fault)
    path = Path(part.input)
    source = defaults.source or path_names.corpus_of(path, SUFFIXES)
    origin = Origin(defaults, source, functools.cache(lambda: path_names.language_of(path, SUFFIXES)))
    if path.name.endswith(text_files.TEXTS):
        return text_files.read_text(path, origin, fault)
    if path.suffix not in _COLUMNAR:
        return text_files.read_lines(path, part.first, part.stop, origin, fault)
    from eurollm_jax.corpus.reading import columnar

    read = columnar.read_parquet if path.suffix == ".parquet" else columnar.read_arrow
    return read(path, part.first, part.stop, origin, fault)


def read_documents(
    given: str | Path | Sequence[str | Path],
    *,
    language: str | None = None,
    source: str | None = None,
    licence: str | None = None,
) -> Iterator[Document]:
    """Every document of one input or several, in order; the first that cannot be used is a UserError.

    The arguments fill in what a document does not say itself; a `language` that contradicts a document's own is an
    error. Without any, the language is the one that the path names, the source is named after the file or, for one
    shard of many, its folder, the licence is "unknown", and the id is made of the source and a hash of the text.
    """
    defaults = Defaults(language, source, licence)
    several = [given] if isinstance(given, str | Path) else given
    parts = find_parts(several)
    return (document for part in parts for document in read_part(part, defaults))


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


def _parts(name: str, part_bytes: int) -> list[Part]:
    if name.startswith(tfds_files.SCHEME):
        shards = tfds_files.shards(name)
        return _grouped(name, [shard.bytes for shard in shards], [0, *(shard.stop for shard in shards)], part_bytes)
    path = Path(name)
    size = path.stat().st_size
    if size > part_bytes and path.suffix == ".jsonl":
        ends = [*text_files.line_starts(path, part_bytes), size]
        return _grouped(name, [end - start for start, end in itertools.pairwise(ends)], ends, 0)
    if size > part_bytes and path.suffix in _COLUMNAR:
        from eurollm_jax.corpus.reading import columnar

        sizes = columnar.row_groups(path) if path.suffix == ".parquet" else columnar.record_batches(path)
        return _grouped(name, sizes, range(len(sizes) + 1), part_bytes)
    return [Part(name, bytes=size)]


def _grouped(name: str, sizes: Sequence[int], ends: Sequence[int], part_bytes: int) -> list[Part]:
    """Parts of consecutive pieces, each at most `part_bytes` or one piece; piece i is the units [ends[i], ends[i + 1]).

    The last part goes to the end, whatever that is, and an input of no pieces is one part.
    """
    cuts = [0]
    room = part_bytes
    for piece, size in enumerate(sizes):
        if size > room and piece > cuts[-1]:
            cuts.append(piece)
            room = part_bytes
        room -= size
    stops = [*cuts[1:], len(sizes)]
    parts = [Part(name, ends[i], ends[j], sum(sizes[i:j])) for i, j in zip(cuts, stops, strict=True)]
    return [*parts[:-1], dataclasses.replace(parts[-1], stop=None)]


def _is_tfds(part: Part) -> bool:
    return part.input.startswith(tfds_files.SCHEME)


def _to_json(document: Document) -> bytes:
    record: dict[str, object] = {"text": document.text, "id": document.id, "language": document.language}
    record |= {"source": document.source, "licence": document.licence}
    record |= {"url": document.url} if document.url else {}
    record |= {"collected": document.collected} if document.collected else {}
    record |= {"metadata": dict(document.metadata)} if document.metadata else {}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
