"""Loader: batches of a token store by row number, alone or through Grain.

A batch is a pure function of the first row's number, the global batch size and the host, so all that a loader needs to
resume, on any number of hosts and with any batch size, is one integer: the next row.
"""

import hashlib
import signal
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int64

from eurollm_jax.corpus.store import Source, TokenStore
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.best_fit import BestFitPacking
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.jumps import NO_JUMPS, Jumps
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.order import Order
from eurollm_jax.data.packing import ConcatPacking, Packing, lay_out, reads_of
from eurollm_jax.data.plan import SourcePlan, plan
from eurollm_jax.data.removal import Removal, Removed, changed_removals, find_removed
from eurollm_jax.data.schedule import Schedule
from eurollm_jax.errors import UserError

ORDER_RULE = "Huffman splits, 8 Feistel rounds over splitmix64, batches sorted by splitmix64"
"""Part of `Data.describe`: change it whenever the same mixture, seed and store would give another order."""

_BLOCK = 4096  # rows that are located at once: numpy's overhead per call is then shared by many rows

FOR_THE_PARENT = (signal.SIGTERM, signal.SIGUSR1)  # requests to stop, which are no business of a worker's


Kind = Literal["concat", "best-fit"]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What a run reads."""

    store: str | tuple[str, ...]  # folders; the sources of all are mixed
    mixture: Mixture
    sequence_length: int
    seed: int = 0
    packing: Kind = "concat"
    removed: tuple[Removal, ...] = ()
    workers: int = 0  # processes that read ahead; 0: threads of the training process. No matter for what is read

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.store,) if isinstance(self.store, str) else self.store


@dataclass(frozen=True, eq=False)
class Data:
    """Token stores in the order of a run. Picklable; `source` is an index into `source_names` everywhere."""

    config: DataConfig
    stores: tuple[TokenStore, ...]
    sources: Mapping[str, Source]  # of all stores, sorted by name
    packings: tuple[Packing, ...]  # one for each source
    sizes: Mapping[str, SourceSize]
    schedule: Schedule
    order: Order
    removed: tuple[Removed, ...]

    @classmethod
    def from_stores(cls, stores: Sequence[TokenStore], config: DataConfig, total_rows: int) -> "Data":
        """The opened stores, their rows and the compiled mixture for a run of `total_rows` rows."""
        if config.sequence_length < 1:
            raise UserError(f"sequence_length must be at least 1, not {config.sequence_length}")
        packings: dict[str, Packing] = {}
        for store in stores:
            for name, source in store.sources.items():
                if config.packing == "concat":
                    packings[name] = ConcatPacking(source, config.sequence_length)
                else:
                    packings[name] = BestFitPacking.open(source, config.sequence_length, store.path)
        sources = {name: source for store in stores for name, source in store.sources.items()}
        sources = dict(sorted(sources.items()))
        sizes = {n: SourceSize(s.tokens, s.bytes, packings[n].rows, s.language) for n, s in sources.items()}
        schedule = config.mixture.compile(sizes, total_rows)
        order = Order(schedule, {name: size.rows for name, size in sizes.items()}, config.seed)
        ordered = tuple(packings[name] for name in schedule.names)
        read = {schedule.names[source] for source in schedule.scheduled}
        removed = tuple(find_removed(removal, sources, ordered, read) for removal in config.removed)
        return cls(config, tuple(stores), sources, ordered, sizes, schedule, order, removed)

    @property
    def source_names(self) -> tuple[str, ...]:
        """All sources of the store, sorted, whether the mixture reads them or not."""
        return self.schedule.names

    def plan(self, total_rows: int) -> tuple[SourcePlan, ...]:
        """What the first `total_rows` rows read of each source."""
        return plan(self.schedule, self.sizes, total_rows)

    @property
    def fingerprint(self) -> str:
        """The identity of the data: the store's fingerprint; of several, the SHA-256 of theirs, in hex."""
        prints = sorted(store.fingerprint for store in self.stores)
        return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """All that decides which tokens row k holds, as JSON-able values."""
        packings = {name: packing.describe() for name, packing in zip(self.source_names, self.packings, strict=True)}
        descriptions = list(packings.values())
        alike = all(description == descriptions[0] for description in descriptions)
        return {
            "store": self.fingerprint,
            "schedule": self.schedule.describe(),
            "seed": self.config.seed,
            "sequence_length": self.config.sequence_length,
            "packing": descriptions[0] if alike else packings,
            "order": ORDER_RULE,
            "removed": [removed.describe() for removed in self.removed],
        }

    def require_same(self, saved: Mapping[str, Any], row: int) -> None:
        """UserError that names the differences if `saved`, a checkpoint's `describe()`, is not of the same data.

        `row` is the next data row to be trained on. Stages of the mixture and removals that begin there or later may be
        others, new or gone.
        """
        mine = self.describe()
        same_past = _begun(saved["schedule"], row) == _begun(mine["schedule"], row)
        compared = {**mine, "schedule": saved["schedule"]} if same_past else mine
        found = differences({**saved, "removed": None}, {**compared, "removed": None})
        found += changed_removals(saved["removed"], mine["removed"], row)
        if found:
            raise UserError(
                f"the checkpoint was trained on other data: {'; '.join(found[:4])}{' ...' if len(found) > 4 else ''}; "
                "restore what differs to go on with it, or start a new run"
            )

    def batch(self, first_row: int, batch_size: int, host: int = 0, hosts: int = 1) -> Batch:
        """This host's part, `batch_size // hosts` rows, of the global batch of rows from `first_row` on.

        The parts of all hosts, put end to end, are the batch of one host. Any row has a batch: after the run's last row
        the mixture goes on.
        """
        _check_dealing(first_row, batch_size, host, hosts)
        part = batch_size // hosts
        rows = self.order.batch_rows(first_row, batch_size)[host * part : (host + 1) * part]
        source, row = _located(self.order, first_row, first_row + batch_size)
        source, row = source[rows - first_row], row[rows - first_row]
        reads = reads_of(self.packings, source, row)
        batch = lay_out(self.packings, source, reads, self.config.sequence_length)
        for removed in self.removed:
            removed.apply(batch, rows, reads)
        return batch

    def loader(
        self,
        first_row: int,
        batch_size: int | BatchSizes,
        host: int = 0,
        hosts: int = 1,
        stop_row: int | None = None,
        threads: int = 1,
        ahead: int = 2,
        jumps: Jumps = NO_JUMPS,
    ) -> Generator[tuple[int, Batch]]:
        """(next row, this host's part of the batch), batch after batch, through Grain.

        `threads` read ahead by `ahead` batches, or each of `config.workers` processes does. One thread costs the least
        processor time; more help where a file system is slow to answer. The next row is the whole state:
        `loader(next_row, ...)` goes on where this one stopped. The last batch is the first that reaches `stop_row` (it
        may run past it); without `stop_row` there is no last batch. With `jumps`, these are the rows that are consumed,
        and a jump that does not lie between two batches is a UserError. Close the iterator, or let go of it, to end its
        threads and processes.
        """
        sizes = (BatchSizes(batch_size) if isinstance(batch_size, int) else batch_size).from_row(first_row)
        for size in sizes.sizes:
            _check_dealing(first_row, size, host, hosts)
        for at, rows in jumps.taken:
            if at > first_row and sizes.row_of_step(sizes.step_of_row(at)) != at:
                raise UserError(
                    f"{rows} rows are to be left out once {at} are consumed, and no batch begins there: keep the batch "
                    "sizes of the run that has left them out"
                )
        batches = sys.maxsize if stop_row is None else sizes.steps(stop_row)
        return _iterate(_Batches(self, sizes, host, hosts, batches, jumps), self.config.workers, threads, ahead)


def open_data(config: DataConfig, total_rows: int) -> Data:
    """Open the stores of `config` and arrange them for a run of `total_rows` rows.

    Raises UserError for a store that cannot be opened, stores that do not belong together, and a mixture that they
    cannot honour.
    """
    if not config.stores:
        raise UserError("the data have no store; name at least one")
    if config.packing not in get_args(Kind):
        raise UserError(f"packing is 'concat' or 'best-fit', not {config.packing!r}")
    if config.workers < 0:
        raise UserError(f"workers must be 0 or more, not {config.workers}")
    stores = [TokenStore.open(Path(path)) for path in config.stores]
    holder: dict[str, TokenStore] = {}
    for store in stores:
        if store.tokenizer_sha256 != stores[0].tokenizer_sha256:
            raise UserError(
                f"{store.path} and {stores[0].path} were prepared with different tokenizers; prepare one of them again"
            )
        for name in store.sources:
            if name in holder:
                raise UserError(
                    f"{holder[name].path} and {store.path} both have a source {name!r}; prepare one of them under "
                    "another name"
                )
            holder[name] = store
    return Data.from_stores(stores, config, total_rows)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Grain's random-access source. An item is a whole batch: Grain's own batching costs several times as much."""

    data: Data
    sizes: BatchSizes
    host: int
    hosts: int
    batches: int
    jumps: Jumps

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, step: int) -> tuple[int, Batch]:
        row = self.sizes.row_of_step(int(step))
        size = self.sizes.size_at(row)
        return row + size, self.data.batch(self.jumps.data_row(row), size, self.host, self.hosts)


def _iterate(batches: _Batches, workers: int, threads: int, ahead: int) -> Generator[tuple[int, Batch]]:
    import grain  # imports jax, which login nodes do without

    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain asks for one of its flags before it starts processes
            flags.FLAGS.mark_as_parsed()
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(alone).mp_prefetch(options, _start_worker))
        starting: AbstractContextManager[None] = _deaf_children()
    else:
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
        iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(reading))
        starting = nullcontext()
    try:
        with starting:
            first = next(iterator, None)
        if first is not None:
            yield first
            yield from iterator
    finally:
        iterator.close()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started here are not ended by a request to stop, which schedulers send to all that they find:
    the batches that they read are needed until the training process has stopped."""
    resource_tracker.ensure_running()  # its start would undo this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    from eurollm_jax.corpus.preparing.processes import follow_parent

    for number in FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    follow_parent()  # Grain's workers wait for a killed parent for ever, with their batches in shared memory


def _located(order: Order, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Source and row in the source of global rows start..stop."""
    blocks = [_located_block(order, block) for block in range(start // _BLOCK, (stop - 1) // _BLOCK + 1)]
    skip = start % _BLOCK
    source, row = (np.concatenate(parts)[skip : skip + stop - start] for parts in zip(*blocks, strict=True))
    return source, row


@lru_cache(maxsize=16)
def _located_block(order: Order, block: int) -> tuple[np.ndarray, np.ndarray]:
    source, _, row = order.rows(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
    return source, row


def _begun(schedule: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What of a schedule's `describe()` decides the rows before `row`."""
    return {**schedule, "stages": [stage for stage in schedule["stages"] if stage["start"] < row]}


def _check_dealing(first_row: int, batch_size: int, host: int, hosts: int) -> None:
    if first_row < 0 or batch_size < 1 or not 0 <= host < hosts:
        raise ValueError(f"no batch of {batch_size} rows from row {first_row} for host {host} of {hosts}")
    if batch_size % hosts:
        raise UserError(
            f"a global batch of {batch_size} rows cannot be dealt to {hosts} hosts; make it a multiple of {hosts}"
        )


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """One phrase for each leaf that differs between two trees of JSON-able values."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = sorted(saved.keys() | now.keys())
        return [d for key in keys for d in differences(saved.get(key), now.get(key), f"{path}.{key}" if path else key)]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [d for i, pair in enumerate(zip(saved, now, strict=True)) for d in differences(*pair, f"{path}[{i}]")]
    return [] if saved == now else [f"{path} was {saved} and is {now}"]
