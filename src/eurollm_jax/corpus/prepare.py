"""Documents to a token store: encode every document of a corpus, prove that nothing was lost, and index it."""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eurollm_jax.corpus.encoding import encode_documents
from eurollm_jax.corpus.folders import differences, fingerprints, new_folder, read_json, write_json
from eurollm_jax.corpus.sources import Document, corpus_files, read_documents
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.store_writer import StoreWriter
from eurollm_jax.corpus.tokenizer import Tokenizer
from eurollm_jax.errors import UserError

RECORD_NAME = "prepare.json"

_SHOW_EVERY_BYTES = 1_000_000


def prepare(inputs: Path, tokenizer: Tokenizer, out: Path, *, threads: int | None = None) -> TokenStore:
    """Encode the corpus files of `inputs` into a store in folder `out`, one source a language, named by its code.

    Documents keep the order of the files and of the lines in them; each becomes `[bos, *ids, eos]`. `threads` is every
    core this process may use unless it is given. When `out` holds the store of the same inputs and tokenizer, that is
    returned and nothing is written.

    Raises UserError for a bad input, with file and line or document; for a document that does not decode to its own
    text; and when `out` holds something else.
    """
    threads = threads or len(os.sched_getaffinity(0))
    files = corpus_files(inputs)
    record = {"tokenizer": {"tokenizer": tokenizer.sha256}, "inputs": fingerprints(files)}
    if (out / RECORD_NAME).is_file():
        return _existing(out, record)

    console = Console(stderr=True)
    start, bytes_done, bytes_shown = time.monotonic(), 0, 0
    with new_folder(out) as folder, _progress(console) as progress:
        writer = StoreWriter(folder, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size)
        task = progress.add_task("encoding", total=sum(file.stat().st_size for file in files), rate="")
        for file in files:
            for document, ids in encode_documents(read_documents(file), tokenizer, threads=threads, where=file):
                bytes_done += _add(document, ids, file, tokenizer, writer)
                if bytes_done - bytes_shown >= _SHOW_EVERY_BYTES:
                    bytes_shown = bytes_done
                    progress.update(task, rate=_rate(bytes_done, start))
            progress.advance(task, file.stat().st_size)
        writer.close()
        write_json(folder / RECORD_NAME, record)
    store = TokenStore.open(out)
    tokens = sum(source.tokens for source in store.sources.values())
    what = f"{tokens:,} tokens in {len(store.sources)} languages from {_rate(bytes_done, start)}"
    print(f"{what}: {out}", file=sys.stderr)
    return store


def _add(
    document: Document, ids: Int32[np.ndarray, " tokens"], file: Path, tokenizer: Tokenizer, writer: StoreWriter
) -> int:
    """Add the document to its language's source, if `ids` decode to its text, and return how many bytes that has."""
    text = document.text.encode()
    if tokenizer.decode_bytes(ids) != text:
        raise UserError(
            f"{file}, document {document.id} does not decode to its own text with {tokenizer.model_path}; "
            "train another tokenizer, or remove the document"
        )
    tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
    writer.add(
        document.language,
        document,
        tokens,
        byte_length=len(text),
        characters=len(document.text),
        fallback=int(tokenizer.is_byte[ids].sum()),
        sha256=hashlib.sha256(text).digest(),
    )
    return len(text)


def _existing(out: Path, record: dict[str, Any]) -> TokenStore:
    there = read_json(out / RECORD_NAME)
    difference = [differences(there[part], record[part]) for part in ("tokenizer", "inputs")]
    if any(difference):
        raise UserError(
            f"{out} holds the store of other data: {', '.join(filter(None, difference))}; "
            "choose another folder or delete it"
        )
    print(f"{out} holds this store already", file=sys.stderr)
    return TokenStore.open(out)


def _rate(bytes_done: int, start: float) -> str:
    megabytes = bytes_done / 1e6
    return f"{megabytes:.1f} MB of text at {megabytes / (time.monotonic() - start):.1f} MB/s"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
