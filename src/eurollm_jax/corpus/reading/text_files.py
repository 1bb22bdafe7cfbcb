"""JSON lines and plain text, as they are or compressed: bytes of a file, cut into lines, become documents.

Files stream through a buffer of a megabyte. A line may be as long as memory allows: its pieces are joined once.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from eurollm_jax.corpus.reading.documents import Document, Fault, Origin, document
from eurollm_jax.errors import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TEXTS = (".txt", ".txt.gz", ".txt.zst")

_CHUNK_BYTES = 1 << 20
# Compressed text is fed in small pieces, for one piece may expand a thousandfold.
_PACKED_BYTES = 1 << 14


def line_starts(path: Path, every: int) -> list[int]:
    """Where to cut a plain file of lines into pieces of `every` bytes or little more: first bytes of lines, 0 first."""
    size = path.stat().st_size
    starts = [0]
    with path.open("rb") as file:
        while starts[-1] + every < size:
            file.seek(starts[-1] + every - 1)
            while (chunk := file.read(_CHUNK_BYTES)) and b"\n" not in chunk:
                pass
            start = file.tell() - len(chunk) + chunk.index(b"\n") + 1 if chunk else size
            if start >= size:
                break
            starts.append(start)
    return starts


def read_lines(path: Path, first: int, stop: int | None, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The documents of the lines of JSON in the bytes [first, stop) of a file, which begin and end with whole lines.

    A compressed file is read whole. Raises UserError when it is damaged, and when the file has no document at all.
    """
    before = functools.cache(lambda: sum(chunk.count(b"\n") for chunk in _chunks(path, 0, first)) if first else 0)
    empty = True
    for number, line in enumerate(_lines(_chunks(path, first, stop)), 1):
        if line.isspace() or not line:
            continue
        where = functools.partial(_place, path, number, before)
        try:
            found = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 and not first else line, where, origin)
        except UserError as error:
            fault(error)
        else:
            yield found
        empty = False
    if empty and not any(chunk.strip() for chunk in _chunks(path, 0, None)):
        raise UserError(f"{path} has no documents; remove the file or fill it")


def read_text(path: Path, origin: Origin, fault: Fault) -> Iterator[Document]:
    """The one document that a text file is. Raises UserError when the file is damaged."""
    content = b"".join(_chunks(path, 0, None))
    try:
        if not (origin.defaults.language or origin.named_language()):
            how = f"begin its name with a code, as in fr-{path.name}, or use .jsonl"
            raise UserError(f"{path} says no language; {how}")
        text = _decode(content, lambda at: f"{path}, line {content.count(b'\n', 0, at) + 1}")
        found = document({"text": text.removeprefix("\ufeff")}, lambda: str(path), origin)
    except UserError as error:
        fault(error)
    else:
        yield found


def _parse(line: bytes, where: Callable[[], str], origin: Origin) -> Document:
    text = _decode(line, lambda _: where())
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise UserError(f"{where()} is not valid JSON ({reason}); mend or remove the line") from None
    except RecursionError:
        raise UserError(f"{where()} is not valid JSON (nested too deep); mend or remove the line") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{where()} cannot be read ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f'{where()} is not a JSON object; each line must be one, such as {{"text": "..."}}')
    return document(record, where, origin)


def _place(path: Path, number: int, before: Callable[[], int]) -> str:
    # Lines before a part are only counted when something has to be said about one of its own.
    return f"{path}, line {before() + number}"


def _chunks(path: Path, first: int, stop: int | None) -> Iterator[bytes]:
    """The content of a file, decompressed; of a plain file the bytes [first, stop)."""
    if path.suffix == ".zst":
        yield from _zstd_chunks(path)
    elif path.suffix == ".gz":
        yield from _gzip_chunks(path)
    else:
        with path.open("rb") as file:
            file.seek(first)
            left = (path.stat().st_size if stop is None else stop) - first
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    frame = None  # a file may be several zstd frames, one after the other
    with path.open("rb") as file:
        try:
            while data := file.read(_PACKED_BYTES):
                while data:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                    yield frame.decompress(data)
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is not valid zstd ({error}); make or fetch it again") from None
    if frame is not None:
        raise UserError(f"{path} is cut off in the middle of a zstd frame; make or fetch it again")


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        try:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        except EOFError:
            raise UserError(f"{path} is cut off in the middle of its gzip data; make or fetch it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is not valid gzip ({error}); make or fetch it again") from None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for chunk in chunks:
        start, *lines = chunk.split(b"\n")
        pieces.append(start)
        if lines:
            yield b"".join(pieces)
            pieces = [lines.pop()]
            yield from lines
    if any(pieces):
        yield b"".join(pieces)


def _decode(content: bytes, where: Callable[[int], str]) -> str:
    """`content` as text; `where` says the place of its byte, counted from 0."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        at = error.start
        line_start = content.rfind(b"\n", 0, at) + 1
        byte = f"byte {at - line_start + 1} of the line is 0x{content[at]:02x}"
        raise UserError(f"{where(at)} is not UTF-8 ({byte}); convert the file to UTF-8") from None
