"""Loader: batches of a token store by row number, alone or through Grain.

A batch is a pure function of the first row's number, the global batch size and the host, so all that a loader needs to
resume, on any number of hosts and with any batch size, is one integer: the next row.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.mixture import Mixture, SourcePlan, SourceSize, plan
from eurollm_jax.data.order import Order
from eurollm_jax.data.packing import ConcatPacking, Window, lay_out
from eurollm_jax.data.schedule import Schedule
from eurollm_jax.errors import UserError

ORDER_RULE = "Huffman splits, 8 Feistel rounds over splitmix64, batches sorted by splitmix64"
"""Part of `Data.describe`: change it whenever the same mixture, seed and store would give another order."""

_BLOCK = 4096  # rows that are located at once: numpy's overhead per call is then shared by many rows


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What a run reads."""

    store: str
    mixture: Mixture
    sequence_length: int
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Data:
    """A token store in the order of a run. Picklable; `source` is an index into `source_names` everywhere."""

    config: DataConfig
    store: TokenStore
    packings: tuple[ConcatPacking, ...]  # one for each source of the store
    sizes: Mapping[str, SourceSize]
    schedule: Schedule
    order: Order

    @classmethod
    def from_store(cls, store: TokenStore, config: DataConfig, total_rows: int) -> "Data":
        """The opened store, its rows and the compiled mixture for a run of `total_rows` rows."""
        if config.sequence_length < 1:
            raise UserError(f"sequence_length must be at least 1, not {config.sequence_length}")
        packings = {name: ConcatPacking(source, config.sequence_length) for name, source in store.sources.items()}
        sizes = {n: SourceSize(store.sources[n].tokens, store.sources[n].bytes, p.rows) for n, p in packings.items()}
        schedule = config.mixture.compile(sizes, total_rows)
        order = Order(schedule, {name: size.rows for name, size in sizes.items()}, config.seed)
        return cls(config, store, tuple(packings[name] for name in schedule.names), sizes, schedule, order)

    @property
    def source_names(self) -> tuple[str, ...]:
        """All sources of the store, sorted, whether the mixture reads them or not."""
        return self.schedule.names

    def plan(self, total_rows: int) -> tuple[SourcePlan, ...]:
        """What the first `total_rows` rows read of each source."""
        return plan(self.schedule, self.sizes, total_rows)

    def describe(self) -> dict[str, Any]:
        """All that decides which tokens row k holds, as JSON-able values."""
        return {
            "store": self.store.fingerprint,
            "schedule": self.schedule.describe(),
            "seed": self.config.seed,
            "sequence_length": self.config.sequence_length,
            "packing": "concat",
            "order": ORDER_RULE,
        }

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """UserError that names the differences if `saved`, a checkpoint's `describe()`, is not of the same data."""
        found = differences(saved, self.describe())
        if found:
            raise UserError(
                f"the checkpoint was trained on other data: {'; '.join(found)}; restore what differs to go on "
                "with it, or start a new run"
            )

    def batch(self, first_row: int, batch_size: int, host: int = 0, hosts: int = 1) -> Batch:
        """This host's part, `batch_size // hosts` rows, of the global batch of rows from `first_row` on.

        The parts of all hosts, put end to end, are the batch of one host. Any row has a batch: after the run's last row
        the mixture goes on.
        """
        _check_dealing(first_row, batch_size, host, hosts)
        part = batch_size // hosts
        chosen = self.order.batch_rows(first_row, batch_size)[host * part : (host + 1) * part] - first_row
        source, row = _located(self.order, first_row, first_row + batch_size)
        source, row = source[chosen], row[chosen]

        places: dict[int, list[int]] = {}
        for place, index in enumerate(source.tolist()):
            places.setdefault(index, []).append(place)
        windows: dict[int, Window] = {}
        for index, there in places.items():
            windows.update(zip(there, self.packings[index].read(row[there]), strict=True))
        packed = lay_out([windows[i] for i in range(part)], self.config.sequence_length, self.packings[0].pad_id)
        return Batch(*packed, source.astype(np.int32))

    def loader(
        self,
        first_row: int,
        batch_size: int,
        host: int = 0,
        hosts: int = 1,
        stop_row: int | None = None,
        prefetch: int = 2,
    ) -> Iterator[tuple[int, Batch]]:
        """(next row, this host's part of the batch), batch after batch, read ahead by `prefetch` threads of Grain.

        The next row is the whole state: `loader(next_row, ...)` goes on where this one stopped. The last batch is the
        first that reaches `stop_row` (it may run past it); without `stop_row` there is no last batch.
        """
        _check_dealing(first_row, batch_size, host, hosts)
        if stop_row is None:
            batches = sys.maxsize
        else:
            batches = max(-(-(stop_row - first_row) // batch_size), 0)
        return _iterate(_Batches(self, first_row, batch_size, host, hosts, batches), prefetch)


def open_data(config: DataConfig, total_rows: int) -> Data:
    """Open the store at `config.store` and arrange it for a run of `total_rows` rows.

    Raises UserError for a store that cannot be opened and a mixture that it cannot honour.
    """
    return Data.from_store(TokenStore.open(Path(config.store)), config, total_rows)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Grain's random-access source. An item is a whole batch: Grain's own batching costs several times as much."""

    data: Data
    first_row: int
    batch_size: int
    host: int
    hosts: int
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, step: int) -> tuple[int, Batch]:
        row = self.first_row + int(step) * self.batch_size
        return row + self.batch_size, self.data.batch(row, self.batch_size, self.host, self.hosts)


def _iterate(batches: _Batches, prefetch: int) -> Iterator[tuple[int, Batch]]:
    import grain  # imports jax, which workers and login nodes do without

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    yield from grain.MapDataset.source(batches).to_iter_dataset(options)


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
