"""How much text does one core tokenise and prepare in a second, beside the Hugging Face `tokenizers` package?

    python scripts/benchmarks/prepare.py CORPUS [--languages en,de,...] [--quick] [--json FILE]

CORPUS is a folder of files that `eurollm corpus prepare` reads, such as the starter corpus' train/. Tokenizers are
trained on every other document of all languages, once. For each language and vocabulary, these documents warm up a
fresh copy of the tokenizer, and the others, which it has not seen, are timed: CPU seconds of one thread, medians over
repetitions in turn. Both tokenizers are given the same texts and must return the same ids. "prepare" is all of it:
reading zstd and JSON, encoding, proving that nothing was lost, hashing, writing the store and its index.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before it is imported: one thread

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.corpus.reading.sources import Document, find_parts, read_part, write_documents
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer
from eurollm_jax.hf.tokenizer import write_hf_tokenizer

LANGUAGES = ("en", "de", "fr", "fi", "pl", "hu", "el", "bg", "uk", "ka", "mt", "tr")
BATCH_CHARACTERS = 4_000_000


def batches(texts: Sequence[str]) -> list[list[str]]:
    """The texts in the amounts in which `prepare` encodes them."""
    found: list[list[str]] = [[]]
    characters = 0
    for text in texts:
        if characters > BATCH_CHARACTERS:
            found.append([])
            characters = 0
        found[-1].append(text)
        characters += len(text)
    return found


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [ids for batch in batches(texts) for ids in tokenizer.encode_batch(batch)]


def encode_all_fast(fast: FastTokenizer, texts: Sequence[str]) -> list[Encoding]:
    return [one for batch in batches(texts) for one in fast.encode_batch_fast(batch, add_special_tokens=False)]


def timed[**P, T](work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> tuple[float, T]:
    """CPU seconds of all threads, and the result."""
    start = time.process_time()
    result = work(*arguments, **options)
    return time.process_time() - start, result


def one_round(warm: list[str], rest: list[str], tokenizer: Tokenizer, folder: Path) -> tuple[dict[str, float], int]:
    """CPU seconds of each way with fresh tokenizers, and the tokens of `rest`."""
    seconds: dict[str, float] = {}
    ours = Tokenizer(tokenizer.model_path, tokenizer.model)
    seconds["cold"], _ = timed(encode_all, ours, warm)
    seconds["encode"], encoded = timed(encode_all, ours, rest)

    theirs = FastTokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    theirs.encode_special_tokens = True  # text that spells one is text, as in ours
    encode_all_fast(theirs, warm)
    seconds["tokenizers"], other = timed(encode_all_fast, theirs, rest)
    for text, mine, encoding in zip(rest, encoded, other, strict=True):
        assert mine.tolist() == encoding.ids, f"other ids for {text[:80]!r}"

    ours = Tokenizer(tokenizer.model_path, tokenizer.model)
    encode_all(ours, warm)
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        seconds["prepare"], _ = timed(prepare, folder / "text.jsonl.zst", ours, folder / "store", workers=1)
    shutil.rmtree(folder / "store")
    return seconds, sum(map(len, encoded))


def one_language(halves: tuple[list[Document], list[Document]], tokenizer: Tokenizer, repeats: int) -> dict[str, Any]:
    """Megabytes per CPU second of each way, once for each repetition."""
    warm, rest = ([document.text for document in half] for half in halves)
    megabytes = {name: sum(len(text.encode()) for text in texts) / 1e6 for name, texts in (("cold", warm), ("", rest))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf_tokenizer(tokenizer, folder / "hf", model_max_length=1 << 20)
        write_documents(folder / "text.jsonl.zst", halves[1])
        rounds = [one_round(warm, rest, tokenizer, folder) for _ in range(repeats)]
    rates = {way: [megabytes.get(way, megabytes[""]) / seconds[way] for seconds, _ in rounds] for way in rounds[0][0]}
    return {"megabytes": megabytes[""], "bytes_per_token": 1e6 * megabytes[""] / rounds[0][1], "rates": rates}


def read_halves(corpus: Path, most: int) -> dict[str, tuple[list[Document], list[Document]]]:
    """Every other document of each language, and the others, of `most` bytes in all; bad documents are left out."""
    documents: dict[str, list[Document]] = {}
    sizes: dict[str, int] = {}
    for part in find_parts([corpus]):
        for document in read_part(part, fault=lambda _: None):
            size = sizes.get(document.language, 0)
            if size < most:
                documents.setdefault(document.language, []).append(document)
                sizes[document.language] = size + len(document.text.encode())
    return {language: (found[::2], found[1::2]) for language, found in documents.items()}


def table(size: int, results: dict[str, dict[str, Any]]) -> Table:
    shown = Table(
        title=f"Vocabulary of {size:,}: MB of text per CPU second (median, and the lowest and highest)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headings = ("MB", "bytes/\ntoken", "encode\nat first", "encode", "Hugging Face\ntokenizers", "ratio", "prepare")
    for heading in ("language", *headings):
        shown.add_column(heading, justify="left" if heading == "language" else "right", no_wrap=True)
    for language, result in results.items():
        median = {name: statistics.median(rates) for name, rates in result["rates"].items()}
        cells = {
            name: f"{median[name]:.1f} ({min(rates):.1f}-{max(rates):.1f})" for name, rates in result["rates"].items()
        }
        shown.add_row(
            language,
            f"{result['megabytes']:.2f}",
            f"{result['bytes_per_token']:.2f}",
            f"{median['cold']:.1f}",
            cells["encode"],
            cells["tokenizers"],
            f"{median['encode'] / median['tokenizers']:.1f}",
            cells["prepare"],
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--vocab-sizes", default="2048,32768")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three languages, four megabytes of each, 2048 tokens")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "eurollm-benchmark-tokenizers")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    languages = arguments.languages.split(",")
    sizes = [int(size) for size in arguments.vocab_sizes.split(",")]
    repeats, most = arguments.repeats, 8_000_000
    if arguments.quick:
        languages, sizes, repeats, most = languages[:3], sizes[:1], 3, 4_000_000

    console = Console(width=max(Console().width, 100))
    versions = {name: version(name) for name in ("eurollm_jax", "sentencepiece", "tokenizers", "numpy")}
    console.print(f"{', '.join(map(' '.join, versions.items()))}, Python {platform.python_version()}", highlight=False)
    halves = read_halves(arguments.corpus, most)
    texts = "\n".join(document.text for first, _ in halves.values() for document in first)
    cache = arguments.cache / hashlib.sha256(texts.encode()).hexdigest()[:12]
    for language, (first, _) in halves.items():
        write_documents(cache / "text" / f"{language}.jsonl.zst", first)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for size in sizes:
        tokenizer = train_tokenizer(cache / "text", cache / str(size), vocab_size=size)
        results[size] = {language: one_language(halves[language], tokenizer, repeats) for language in languages}
        console.print(table(size, results[size]))
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps({"versions": versions, "machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
