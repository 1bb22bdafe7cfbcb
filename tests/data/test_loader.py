import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.store_writer import write_manifest
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.batch_sizes import BatchSizes
from eurollm_jax.data.loader import Data, DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.packing import pack
from eurollm_jax.errors import UserError

LENGTH = 16
MIXTURE = Mixture.temperature(0.5).scale(mt=0.1).stage(at_row=333, mixture=Mixture.unimax(40).without("fi"))


def data_of(store, mixture=MIXTURE, length=LENGTH, seed=3, total_rows=3000):
    return Data.from_stores([store], DataConfig("unused", mixture, length, seed), total_rows)


def joined(batches):
    return Batch(*(np.concatenate(fields) for fields in zip(*batches, strict=True)))


def assert_equal(one, other):
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


@pytest.fixture(scope="module")
def data(memory_store):
    return data_of(memory_store)


def test_a_batch_is_the_packed_rows_that_the_order_names(data):
    """Row by row, through the order and each source's own packing."""
    batch = data.batch(300, 48)
    rows = data.order.batch_rows(300, 48)
    assert len(set(batch.source.tolist())) > 4
    for i, (source, _, row) in enumerate(zip(*data.order.rows(rows), strict=True)):
        packed = pack(data.packings, np.array([source]), np.array([row]))
        assert_equal(Batch(*(field[i : i + 1] for field in batch)), packed)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**12), st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24, 48]))
def test_the_hosts_batches_joined_are_the_batch_of_one_host(data, first_row, hosts):
    parts = [data.batch(first_row, 48, host, hosts) for host in range(hosts)]
    assert {len(part.tokens) for part in parts} == {48 // hosts}
    assert_equal(joined(parts), data.batch(first_row, 48))


def test_an_epoch_of_batches_holds_every_row_of_a_source_once(memory_store):
    data = data_of(memory_store, Mixture.proportional().only("el"))
    packing = data.packings[data.source_names.index("el")]
    rows = packing.rows
    epoch = joined(data.batch(first, 1) for first in range(rows))
    expected = pack([packing], np.zeros(rows, np.int64), np.arange(rows))
    assert sorted(map(bytes, epoch.tokens)) == sorted(map(bytes, expected.tokens))
    assert epoch.mask.sum() == expected.mask.sum() == packing.source.tokens - (len(packing.source.offsets) - 1)


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (1, 4), (2, 2), (7, 3)])
def test_the_loader_yields_the_batches_in_order(data, threads, ahead):
    seen = list(data.loader(32, 16, stop_row=320, threads=threads, ahead=ahead))
    assert [row for row, _ in seen] == list(range(48, 321, 16))
    for row, batch in seen:
        assert_equal(batch, data.batch(row - 16, 16))


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 30), st.integers(0, 20), st.sampled_from([1, 2, 4]))
def test_a_loader_resumes_at_any_row_on_any_number_of_hosts(data, batches_before, batch_after, hosts):
    """The rows are those of the uninterrupted run; after the stop, batch size and host count are others."""
    uninterrupted = dict(data.loader(0, 8, stop_row=8 * 40))
    state = ([0] + [row for row, _ in itertools.islice(data.loader(0, 8), batches_before)])[-1]
    assert state == 8 * batches_before
    for resumed_state, batch in itertools.islice(data.loader(state, 8), 3):
        assert_equal(batch, uninterrupted[resumed_state])
    batch_size = 4 * (batch_after + 1)
    parts = [next(data.loader(state, batch_size, host, hosts)) for host in range(hosts)]
    assert {row for row, _ in parts} == {state + batch_size}
    assert_equal(joined(batch for _, batch in parts), data.batch(state, batch_size))


def test_the_loader_stops_with_the_batch_that_reaches_the_last_row(data):
    assert [row for row, _ in data.loader(10, 16, stop_row=43)] == [26, 42, 58]
    assert list(data.loader(48, 16, stop_row=48)) == []


def test_the_mixture_goes_on_after_the_last_row(data):
    assert data.batch(10**15, 8).tokens.shape == (8, LENGTH)
    assert next(data.loader(10**15, 8))[0] == 10**15 + 8


@pytest.mark.parametrize("error", [OSError("shard 3 is gone"), UserError("the store was removed")])
def test_an_error_in_a_reading_thread_reaches_the_consumer(memory_store, error, monkeypatch):
    data = data_of(memory_store)
    threads = set()

    def failing(self, first_row, batch_size, host=0, hosts=1, whole=Data.batch):
        threads.add(threading.current_thread())
        if first_row == 32:
            raise error
        return whole(self, first_row, batch_size, host, hosts)

    monkeypatch.setattr(Data, "batch", failing)
    loader = data.loader(0, 8, threads=2)
    assert [next(loader)[0] for _ in range(4)] == [8, 16, 24, 32]
    with pytest.raises(type(error)) as caught:
        next(loader)
    assert caught.value is error
    assert threading.main_thread() not in threads


def test_a_batch_that_hosts_do_not_divide_is_refused_before_anything_is_read(data):
    for ask in (data.batch, data.loader):
        with pytest.raises(UserError, match="48 rows cannot be dealt to 5 hosts; make it a multiple of 5"):
            ask(0, 48, 0, 5)


def test_a_mismatch_is_refused_with_the_difference_named(memory_store):
    data = data_of(memory_store)
    saved = json.loads(json.dumps(data.describe()))
    assert saved == data.describe()
    data_of(memory_store, MIXTURE.cap_epochs(10**6)).require_same(saved, 0)
    with pytest.raises(UserError, match="other data: seed was 3 and is 4;"):
        data_of(memory_store, seed=4).require_same(saved, 0)
    moved = Mixture.temperature(0.5).scale(mt=0.1).stage(at_row=334, mixture=Mixture.unimax(40).without("fi"))
    with pytest.raises(UserError, match=r"schedule\.stages\[1\]\.start was 333 and is 334;"):
        data_of(memory_store, moved, total_rows=3001).require_same(saved, 334)
    others = [
        data_of(memory_store, seed=4),
        data_of(memory_store, length=17),
        data_of(memory_store, Mixture.proportional()),
    ]
    assert len({json.dumps(d.describe()) for d in [data, *others]}) == 4


def test_a_real_store_is_read_as_its_documents_were_written(store):
    """Every document of every language, put together again from batches by the inverse of order and packing."""
    config = DataConfig(str(store.path), Mixture.temperature(0.3), sequence_length=32, seed=1)
    data = open_data(config, total_rows=1000)
    again = pickle.loads(pickle.dumps(data))
    assert data.source_names == tuple(store.sources)
    assert again.describe() == data.describe()
    for s, (name, source) in enumerate(store.sources.items()):
        packing = data.packings[s]
        for document in (0, source.documents // 2, source.documents - 1):
            text = []
            for row in packing.rows_of(document):
                k = int(data.order.index_of_row(np.array(s), np.array(row), np.array(2)))  # in its third epoch
                batch = again.batch(k, 1)
                assert data.source_names[batch.source[0]] == name
                (span,) = (span for span in packing.documents(row) if span.document == document)
                text += batch.tokens[0, span.place : span.place + span.tokens].tolist()
            start, end = source.offsets[document : document + 2].tolist()
            end = min(end, source.tokens - 1)  # the stream's last token is a target only
            assert text == source.read(start, end).tolist()
    planned = {p.name: p.rows for p in data.plan(1000)}
    read = np.bincount(joined(data.batch(first, 50) for first in range(0, 1000, 50)).source)
    assert planned == dict(zip(data.source_names, read.tolist(), strict=True))


def test_bad_settings_for_a_real_store_are_refused(store, tmp_path):
    with pytest.raises(UserError, match="sequence_length must be at least 1, not 0"):
        open_data(DataConfig(str(store.path), Mixture.proportional(), sequence_length=0), 10)
    with pytest.raises(UserError, match="'fr', which the store lacks"):
        open_data(DataConfig(str(store.path), Mixture.shares({"fr": 1.0}), sequence_length=32), 10)
    with pytest.raises(UserError, match="nowhere"):
        open_data(DataConfig(str(tmp_path / "nowhere"), Mixture.proportional(), sequence_length=32), 10)


def config_of(store, **changes):
    return DataConfig(str(store.path), Mixture.temperature(0.3), sequence_length=32, seed=1, **changes)


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_worker_processes_give_the_same_batches_and_end_with_the_loader(store, workers):
    """Some batches through worker processes, the rest by threads: what a run sees that changes its workers."""
    expected = list(open_data(config_of(store), 1000).loader(0, 64, stop_row=64 * 9))
    others = set(multiprocessing.active_children())
    loader = open_data(config_of(store, workers=workers), 1000).loader(0, 64)
    got = list(itertools.islice(loader, 7))
    processes = set(multiprocessing.active_children()) - others
    assert len(processes) == workers
    loader.close()
    for process in processes:  # one that does not end in time is killed, and that takes a moment
        process.join(60)
        assert not process.is_alive()
    got += open_data(config_of(store), 1000).loader(got[-1][0], 64, stop_row=64 * 9)
    assert [row for row, _ in got] == [row for row, _ in expected]
    for (_, batch), (_, other) in zip(got, expected, strict=True):
        assert_equal(batch, other)


KILLED = """
import multiprocessing, sys, time
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
if __name__ == "__main__":
    loader = open_data(DataConfig(sys.argv[1], Mixture.proportional(), 32, workers=1), 1000).loader(0, 16)
    next(loader)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_worker_processes_end_with_a_process_that_is_killed(tmp_path, store):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, str(script), str(store.path)], stdout=subprocess.PIPE, text=True) as process:
        (worker,) = (Path("/proc", number) for number in process.stdout.readline().split())
        assert lives(worker)
        process.kill()
    deadline = time.monotonic() + 60
    while lives(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(process):
    """Whether the process of a /proc folder runs still; one that nobody waited for has a folder and does not."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SIZES = BatchSizes(8, ((20, 16), (70, 4)))  # batches begin at 0, 8, 16, 24, 40, 56, 72, 76, ...


def test_a_ramp_of_batch_sizes_reads_each_row_once_and_resumes_anywhere(data):
    seen = list(data.loader(0, SIZES, stop_row=90))
    assert [row for row, _ in seen] == [8, 16, 24, 40, 56, 72, 76, 80, 84, 88, 92]
    for (row, batch), size in zip(seen, [8, 8, 8, 16, 16, 16, 4, 4, 4, 4, 4], strict=True):
        assert_equal(batch, data.batch(row - size, size))
    for done in range(len(seen)):
        row = seen[done - 1][0] if done else 0
        rest = list(data.loader(row, SIZES, stop_row=90))
        assert [row for row, _ in rest] == [row for row, _ in seen[done:]]
        assert_equal(rest[0][1], seen[done][1])
    with pytest.raises(UserError, match="4 rows cannot be dealt to 8 hosts"):
        data.loader(0, SIZES, 0, 8)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_several_stores_are_one_mixture(tmp_path, store, packing):
    """Each of two stores has some of a store's sources: together they give the store's batches."""
    halves = []
    for number, names in enumerate((["de", "mt"], ["bg", "el", "en"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            shutil.copytree(store.path / name, folder / name)
        sources = {name: store.manifest["sources"][name] for name in names}
        write_manifest(folder, store.manifest["tokenizer"], sources)
        halves.append(str(folder))
    whole = open_data(config_of(store, packing=packing), 1000)
    both = open_data(dataclasses.replace(whole.config, store=tuple(halves)), 1000)
    assert both.source_names == whole.source_names
    assert_equal(both.batch(300, 48), whole.batch(300, 48))
    other = open_data(dataclasses.replace(both.config, store=tuple(halves[::-1])), 1000)
    assert other.describe() == both.describe() != whole.describe()
    with pytest.raises(UserError, match=r"both have a source 'de'; prepare one"):
        open_data(dataclasses.replace(whole.config, store=(str(store.path), halves[0])), 1000)
    write_manifest(tmp_path / "1", {"sha256": "0" * 64, "vocab_size": 640}, sources)
    with pytest.raises(UserError, match=r"/1 and .*/0 were prepared with different tokenizers"):
        open_data(both.config, 1000)


READER = """
import os, sys
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
if __name__ == "__main__":
    data = open_data(DataConfig(sys.argv[1], Mixture.proportional(), 32, workers=1), 1000)
    try:
        for row, batch in data.loader(0, 16):
            if row == 64:
                os.unlink(sys.argv[2])
            if row > 6400:
                sys.exit("read on")
    except UserError as error:
        sys.exit(str(error))
"""


def test_a_worker_process_whose_shard_goes_tells_its_parent(tmp_path, store):
    """A run without workers is in tests/training/test_loop.py."""
    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / "el" / "tokens-00000.bin"
    script = tmp_path / "reader.py"
    script.write_text(READER)
    command = [sys.executable, str(script), str(tmp_path / "store"), str(shard)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert f"{shard} of source el was deleted while it was read" in run.stderr


def test_a_shard_that_is_cut_short_stops_the_loader_with_its_name(tmp_path, store):
    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / "el" / "tokens-00000.bin"
    loader = open_data(DataConfig(str(tmp_path / "store"), Mixture.proportional(), 32), 1000).loader(
        0, 16, stop_row=6400
    )
    next(loader)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=r"store/el/tokens-00000\.bin of source el was cut short: it has 100 bytes"):
        list(loader)


def test_bad_readers_are_refused(store):
    with pytest.raises(UserError, match="workers must be 0 or more, not -1"):
        open_data(config_of(store, workers=-1), 10)
    with pytest.raises(UserError, match="packing is 'concat' or 'best-fit', not 'first-fit'"):
        open_data(config_of(store, packing="first-fit"), 10)
    with pytest.raises(UserError, match="the data have no store"):
        open_data(dataclasses.replace(config_of(store), store=()), 10)
