"""How many packed tokens a second does one core read, and does that need memory or time to start?

    python scripts/benchmarks/loader.py [--quick] [--json FILE] [--keep FOLDER]

A made-up store of 32 languages with shares from 30 % to 1e-5 is read by three loaders: ours, through Grain; Grain's own
`MapDataset.mix` over the same files, written as its users write it; and an index in the manner of Megatron (each
source's documents shuffled, a table of where each row begins, a table that blends the sources). All give batches of
int32 tokens, targets and positions and a mask; ours and Grain's also segments and sources. Figures are medians over
repeated runs in turn; the files are in the page cache. Then, in fresh processes: time to the first batch at row 10**10,
and resident memory over many rows.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LANGUAGES = 32
LENGTHS = (512, 2048, 4096)
BATCH_TOKENS = 1 << 18
VOCABULARY = 60_000
FAR_ROW = 10**10
BOS, EOS = 1, 2

OURS, GRAIN, MEGATRON = "eurollm_jax", "grain mix", "megatron-style"


def shares() -> dict[str, float]:
    """Shares that fall from 0.3 to 1e-5 and sum to 1: 0.3 * (1e-5 / 0.3) ** ((i / 31) ** p), with p by bisection."""
    steps = np.arange(LANGUAGES) / (LANGUAGES - 1)
    low, high = 0.1, 10.0
    for _ in range(100):
        p = (low + high) / 2
        values = 0.3 * (1e-5 / 0.3) ** (steps**p)
        low, high = (p, high) if values.sum() < 1 else (low, p)
    return {f"l{i:02}": float(value) for i, value in enumerate(values / values.sum())}


def write_store(folder: Path, tokens: int) -> None:
    """About `tokens` random tokens; a source's size goes with the square root of its share."""
    from eurollm_jax.corpus.reading.sources import Document
    from eurollm_jax.corpus.store_writer import StoreWriter

    dice = np.random.default_rng(0)
    roots = {name: share**0.5 for name, share in shares().items()}
    noise = dice.integers(4, VOCABULARY, 1 << 22).astype(np.uint16)
    writer = StoreWriter(folder, tokenizer_sha256="0" * 64, vocab_size=VOCABULARY)
    for name, root in roots.items():
        left = int(tokens * root / sum(roots.values()))
        while left > 0:
            size = int(np.clip(dice.lognormal(5.9, 1.1), 4, 100_000))  # median 365 tokens, mean 670
            start = int(dice.integers(0, len(noise) - size))
            text = noise[start : start + size].copy()
            text[0], text[-1] = BOS, EOS
            document = Document("", f"{name}-{left}", "en", "made up", "CC0-1.0")
            digest = hashlib.sha256(document.id.encode()).digest()
            writer.add(name, document, text, byte_length=4 * size, characters=4 * size, fallback=0, sha256=digest)
            left -= size
    writer.close()


def ours(store: Path, length: int, rows: int) -> Iterator[np.ndarray]:
    from eurollm_jax.data.loader import DataConfig, open_data
    from eurollm_jax.data.mixture import Mixture

    data = open_data(DataConfig(str(store), Mixture.shares(shares()), length), 10**6)
    for _, batch in data.loader(0, rows):
        yield batch.tokens


class GrainRows:
    """A source of Grain: one packed row at a time out of a memory map, all in numpy."""

    def __init__(self, folder: Path, index: int, length: int) -> None:
        self.stream = np.memmap(folder / "tokens-00000.bin", np.uint16, mode="r")
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r").view(np.ndarray)
        self.index, self.length = index, length
        self.places = np.arange(length, dtype=np.int32)

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        start, length = row * self.length, self.length
        tokens = self.stream[start : start + length + 1].astype(np.int32)
        first, last = np.searchsorted(self.offsets, [start, start + length], side="right")
        begins = self.offsets[first:last] - start
        mask = np.ones(length, np.bool_)
        mask[begins - 1] = False
        begins = np.concatenate([[0], begins[begins < length]])
        sizes = np.diff(begins, append=length)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": np.repeat(np.arange(1, len(begins) + 1, dtype=np.int32), sizes),
            "positions": self.places - np.repeat(begins.astype(np.int32), sizes),
            "mask": mask,
            "source": np.int32(self.index),
        }


def grain_mix(store: Path, length: int, rows: int) -> Iterator[np.ndarray]:
    import grain

    weights = shares()
    parts = [
        grain.MapDataset.source(GrainRows(store / name, index, length)).shuffle(seed=index).repeat()
        for index, name in enumerate(weights)
    ]
    mixed = grain.MapDataset.mix(parts, list(weights.values())).batch(rows)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    for batch in mixed.to_iter_dataset(options):
        yield batch["tokens"]


class MegatronSource:
    """One source with its documents shuffled, epoch after epoch, and rows that run through them; rows are shuffled
    too."""

    def __init__(self, folder: Path, length: int, rows: int, dice: np.random.Generator) -> None:
        self.stream = np.memmap(folder / "tokens-00000.bin", np.uint16, mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        sizes = np.diff(self.offsets)
        epochs = rows * length // int(sizes.sum()) + 1
        self.documents = np.concatenate([dice.permutation(len(sizes)) for _ in range(epochs)])
        self.ends = np.cumsum(sizes[self.documents])
        row_starts = np.arange(min(rows + 1, (int(self.ends[-1]) - 1) // length)) * length
        self.first = np.searchsorted(self.ends, row_starts, side="right")  # the document in which a row begins,
        self.skip = row_starts - (self.ends[self.first] - sizes[self.documents[self.first]])  # and how far into it
        self.shuffle = dice.permutation(len(row_starts))
        self.length = length

    def __getitem__(self, number: int) -> np.ndarray:
        row = self.shuffle[number % len(self.shuffle)]
        document, skip, needed, parts = int(self.first[row]), int(self.skip[row]), self.length + 1, []
        while needed:
            which = self.documents[document]
            begin, end = int(self.offsets[which]) + skip, int(self.offsets[which + 1])
            parts.append(self.stream[begin : min(end, begin + needed)])
            needed -= len(parts[-1])
            document, skip = document + 1, 0
        return np.concatenate(parts)


def megatron(store: Path, length: int, rows: int, batches: int) -> Iterator[np.ndarray]:
    """Rows gathered one by one and stacked, without a pipeline's overhead. Positions restart and the loss is masked at
    the ends of documents; a batch has no segments (their use would be a mask of length x length for each row)."""
    weights = shares()
    total = rows * batches
    names, wanted = list(weights), np.array(list(weights.values()))
    dataset, number = np.empty(total, np.int16), np.empty(total, np.int64)
    counts = np.zeros(len(names), np.int64)
    for i in range(total):  # each row to the source that is furthest behind its share
        source = int(np.argmax(wanted * (i + 1) - counts))
        dataset[i], number[i] = source, counts[source]
        counts[source] += 1
    dice = np.random.default_rng(0)
    sources = [
        MegatronSource(store / name, length, int(count), dice) for name, count in zip(names, counts, strict=True)
    ]
    for first in range(0, total, rows):
        tokens, targets = np.empty((rows, length), np.int32), np.empty((rows, length), np.int32)
        positions, mask = np.empty((rows, length), np.int32), np.ones((rows, length), np.float32)
        for line in range(rows):
            text = sources[dataset[first + line]][number[first + line]]
            tokens[line], targets[line] = text[:-1], text[1:]
            positions[line] = np.arange(length)
            ends = np.flatnonzero(tokens[line] == EOS)
            mask[line, ends] = 0.0
            before = 0
            for end in ends.tolist():
                positions[line, end + 1 :] -= end + 1 - before
                before = end + 1
        yield tokens


@dataclass
class Speed:
    per_core: float  # tokens a second of processor time
    wall: float  # tokens a second


def speed(batches: Iterator[np.ndarray], count: int) -> Speed:
    """Of `count` batches after the first few, for which caches fill and tables are built."""
    for _ in range(4):
        next(batches)
    cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
    for _ in range(count):
        tokens += next(batches).size
    result = Speed(tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - wall))
    batches.close()  # type: ignore[attr-defined]
    return result


def compare(store: Path, count: int, repeats: int) -> list[dict]:
    """Median speeds of the three at each length, run in turn."""
    results = []
    for length in LENGTHS:
        rows = BATCH_TOKENS // length
        readers: dict[str, Callable[[], Iterator[np.ndarray]]] = {
            OURS: lambda length=length, rows=rows: ours(store, length, rows),
            GRAIN: lambda length=length, rows=rows: grain_mix(store, length, rows),
            MEGATRON: lambda length=length, rows=rows: megatron(store, length, rows, count + 4),
        }
        runs: dict[str, list[Speed]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, reader in readers.items():
                runs[name].append(speed(reader(), count))
        medians = {
            name: {
                "tokens_per_core_second": statistics.median(run.per_core for run in some),
                "tokens_per_second": statistics.median(run.wall for run in some),
            }
            for name, some in runs.items()
        }
        results.append({"length": length, "rows_in_batch": rows, **medians})
    return results


def first_batch(store: Path, length: int) -> dict[str, float]:
    """Seconds to the first batch at a far row, in this fresh process; the imports are not counted."""
    import grain  # noqa: F401

    from eurollm_jax.data.loader import DataConfig, open_data
    from eurollm_jax.data.mixture import Mixture

    start = time.perf_counter()
    data = open_data(DataConfig(str(store), Mixture.shares(shares()), length), 10**6)
    opened = time.perf_counter()
    loader = data.loader(FAR_ROW, BATCH_TOKENS // length)
    next(loader)
    end = time.perf_counter()
    loader.close()  # type: ignore[attr-defined]
    return {"open": opened - start, "first_batch": end - opened}


def memory(store: Path, length: int, rows: int) -> dict[str, float]:
    """Resident MB of this fresh process after 1 % of the rows, and after all of them, and the peak."""
    batch = BATCH_TOKENS // length
    before = {}
    for number, _ in enumerate(ours(store, length, batch)):
        if number == rows // batch // 100:
            before = resident()
        if number * batch >= rows:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    after = {f"{name}_after": value for name, value in resident().items()}
    return {**{f"{name}_before": value for name, value in before.items()}, **after, "peak": peak}


def resident() -> dict[str, float]:
    """MB resident: all, and the part that is of mapped files (the documents' index)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[key].split()[0]) / 1024 for name, key in {"resident": "VmRSS", "of_files": "RssFile"}.items()
    }


def fresh(store: Path, *arguments: str) -> dict[str, float]:
    """What another process of this script measures."""
    command = [sys.executable, __file__, "--keep", str(store), "--process", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(results: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    print(f"{versions}; {os.cpu_count()} cores of {results['processor']}")
    print(f"{LANGUAGES} languages, {results['store_tokens']:,} tokens, batches of {BATCH_TOKENS:,} tokens")
    print(f"\n{'':24s}{'million tokens/s per core':>32s}{'million tokens/s':>22s}{'ours / it':>12s}")
    for row in results["speed"]:
        for name in (OURS, GRAIN, MEGATRON):
            per_core, wall = row[name]["tokens_per_core_second"], row[name]["tokens_per_second"]
            ratio = row[OURS]["tokens_per_core_second"] / per_core
            print(f"{row['length']:6d}  {name:16s}{per_core / 1e6:32.1f}{wall / 1e6:22.1f}{ratio:12.2f}")
    start, used = results["first_batch"], results["memory"]
    print(
        f"\nfirst batch at row 10**10, {start['length']} tokens a row: {1e3 * start['first_batch']:.0f} ms after "
        f"opening, {1e3 * (start['first_batch'] + start['open']):.0f} ms with opening the store"
    )
    print(
        f"resident memory over {used['rows']:,} rows of {used['length']} tokens: {used['resident_before']:.0f} MB "
        f"after 1 %, {used['resident_after']:.0f} MB at the end, peak {used['peak']:.0f} MB; of these, mapped files "
        f"{used['of_files_before']:.0f} and {used['of_files_after']:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller store, fewer batches and rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="where the store is, or is made and kept")
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        kind, *numbers = arguments.process
        measure = {"first": first_batch, "memory": memory}[kind]
        print(json.dumps(measure(arguments.keep, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        store = arguments.keep or Path(temporary) / "store"
        if not store.exists():
            store.mkdir(parents=True)
            write_store(store, 1 << 26 if arguments.quick else 1 << 29)
        manifest = json.loads((store / "manifest.json").read_text())
        starts = [fresh(store, "first", "2048") for _ in range(3 if arguments.quick else 7)]
        rows = 10**5 if arguments.quick else 10**6
        results = {
            "versions": _versions(),
            "processor": platform.processor() or platform.machine(),
            "store_tokens": sum(source["tokens"] for source in manifest["sources"].values()),
            "batch_tokens": BATCH_TOKENS,
            "first_batch": {
                "length": 2048,
                **{key: statistics.median(run[key] for run in starts) for key in starts[0]},
                "runs": starts,
            },
            "memory": {"length": 2048, "rows": rows, **fresh(store, "memory", "2048", str(rows))},
            "speed": compare(store, 40 if arguments.quick else 120, 3 if arguments.quick else 5),
        }
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "grain")}}


if __name__ == "__main__":
    main()
