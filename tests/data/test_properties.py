"""What holds for every mixture, store, host count and batch size, read off the batches themselves.

Each source's tokens are their own places in its stream, so a batch tells without any other code which row it shows.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from eurollm_jax.data.loader import Data, DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.order import Order
from eurollm_jax.data.schedule import DEVIATION, SHARE_SUM, Schedule, Stage
from eurollm_jax.errors import UserError

CODES = ["bg", "cs", "de", "el", "et", "fi", "mt", "pl"]
FAMILIES = ["Slavic", "Germanic", "Uralic"]

few_or_many = pytest.mark.parametrize("examples", [30, pytest.param(500, marks=pytest.mark.slow)])


def holds_for_all(examples, check, *strategies):
    """Runs the check on the same examples each time; how long they take to make says something of the machine only."""
    slow = [HealthCheck.too_slow]
    settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=slow)(
        given(*strategies)(check)
    )()


@dataclass(frozen=True)
class Run:
    lengths: dict  # source -> tokens of its documents
    mixture: Mixture
    total_rows: int
    sequence_length: int
    seed: int


@st.composite
def rules(draw, names):
    unit = draw(st.sampled_from(["tokens", "bytes", "content"]))
    over = draw(st.sampled_from(["source", "language", "family"]))
    within = None
    if over == "family" and draw(st.booleans()):
        within = Mixture.temperature(draw(st.floats(0, 1)), over="language")
    match draw(st.sampled_from(["temperature", "unimax", "shares"])):
        case "temperature":
            rule = Mixture.temperature(draw(st.floats(0, 1.5)), unit, over, within)
        case "unimax":
            rule = Mixture.unimax(draw(st.floats(1, 200)), unit, over, within)
        case _:
            weights = draw(st.lists(st.floats(0.01, 1), min_size=len(names), max_size=len(names)))
            rule = Mixture.shares({n: w / sum(weights) for n, w in zip(names, weights, strict=True)}, unit)
    if draw(st.booleans()):
        rule = rule.scale({draw(st.sampled_from(names)): draw(st.floats(0.1, 10))})
    if draw(st.booleans()):
        rule = rule.floor(draw(st.floats(0.001, 0.9 / len(names))))
    return rule


@st.composite
def runs(draw, most_rows=900):
    names = draw(st.lists(st.sampled_from(CODES), min_size=1, max_size=6, unique=True))
    lengths = {n: draw(st.lists(st.integers(2, 300), min_size=1, max_size=12)) for n in names}
    mixture, row = draw(rules(names)), 0
    for _ in range(draw(st.integers(0, 3))):
        row += draw(st.integers(1, 120))
        ramp = draw(st.sampled_from([0, 0, 7, 40, 100]))
        mixture = mixture.stage(at_row=row, mixture=draw(rules(names)), ramp_rows=ramp)
        row += ramp
    if draw(st.booleans()):
        mixture = mixture.cap_epochs(draw(st.floats(1, 300)), excess="redistribute")
    total_rows = row + draw(st.integers(1, most_rows - row))
    return Run(lengths, mixture, total_rows, draw(st.integers(2, 24)), draw(st.integers(0, 9)))


@pytest.fixture(scope="session", name="open_run")
def opener(make_source):
    """Opens a run, or discards the example where the mixture cannot be honoured."""

    def open_run(run, mixture=None):
        sources = {}
        for name, lengths in run.lengths.items():
            sources[name] = make_source(name, lengths)
            sources[name].stream = np.arange(sum(lengths), dtype=np.uint16)
        config = DataConfig("memory", mixture or run.mixture, run.sequence_length, run.seed)
        try:
            return Data.from_stores([SimpleNamespace(sources=sources, fingerprint="f00d")], config, run.total_rows)
        except UserError:
            assume(False)

    return open_run


def read(data, first_row, batch_size, hosts=1):
    """int64 [rows, 2]: (source, row of the source) by global row, of one batch dealt to the hosts."""
    parts = [data.batch(first_row, batch_size, host, hosts) for host in range(hosts)]
    shown = np.concatenate([np.stack([p.source, p.tokens[:, 0] // data.config.sequence_length], 1) for p in parts])
    rows = np.empty_like(shown)
    rows[data.order.batch_rows(first_row, batch_size) - first_row] = shown
    return rows


def read_all(data, total_rows, batch_size=64):
    return np.concatenate([read(data, row, batch_size) for row in range(0, total_rows, batch_size)])[:total_rows]


@few_or_many
def test_each_row_of_a_source_is_read_once_an_epoch_and_found_again(examples, open_run):
    def check(run):
        data = open_run(run)
        shown = read_all(data, run.total_rows)
        for source, packing in enumerate(data.packings):
            at = np.flatnonzero(shown[:, 0] == source)
            for epoch, seen in enumerate(itertools.batched(at.tolist(), packing.rows)):
                rows = shown[list(seen), 1]
                assert len(set(rows.tolist())) == len(rows)
                assert rows.max() < packing.rows
                np.testing.assert_array_equal(data.order.index_of_row(source, rows, epoch), seen)

    holds_for_all(examples, check, runs())


@few_or_many
def test_a_documents_rows_show_its_tokens(examples, open_run):
    """Document -> rows of its source -> global rows -> batches: the way an audit goes."""

    def check(run, number):
        data = open_run(run)
        source = data.schedule.scheduled[number % len(data.schedule.scheduled)]
        name = data.source_names[source]
        document = number % len(run.lengths[name])
        begin = sum(run.lengths[name][:document])
        last = sum(run.lengths[name]) - 1  # of the stream, a target only
        wanted = set(range(begin, begin + run.lengths[name][document])) - {last}
        found = set()
        for row in data.packings[source].rows_of(document):
            k = int(data.order.index_of_row(source, row, 0))
            if k < 0:  # its source's share ends before
                return
            batch = data.batch(k, 1)
            assert batch.source[0] == source
            found |= set(batch.tokens[0][batch.segments[0] > 0].tolist())
        assert wanted <= found

    holds_for_all(examples, check, runs(), st.integers(0, 10**6))


@few_or_many
def test_every_prefix_holds_the_shares_within_the_stated_bound(examples, open_run):
    def check(run):
        data = open_run(run)
        shown = read_all(data, run.total_rows)
        stages = data.schedule.stages
        ends = [stage.start for stage in stages[1:]] + [run.total_rows]
        exact, counts = [Fraction(0)] * len(data.packings), np.zeros(len(data.packings), np.int64)
        for begun, (stage, end) in enumerate(zip(stages, ends, strict=True), start=1):
            for k in range(stage.start, end):
                counts[shown[k, 0]] += 1
                exact = [e + Fraction(share, SHARE_SUM) for e, share in zip(exact, stage.shares, strict=True)]
                if k % 5 == 0 or k == end - 1:
                    assert all(abs(c - e) <= DEVIATION * begun for c, e in zip(counts.tolist(), exact, strict=True))

    holds_for_all(max(examples // 3, 10), check, runs(most_rows=700))


@few_or_many
def test_the_parts_of_all_hosts_are_the_batch_of_one(examples, open_run):
    def check(run, hosts, part, first_row):
        data = open_run(run)
        whole = data.batch(first_row, hosts * part)
        parts = [data.batch(first_row, hosts * part, host, hosts) for host in range(hosts)]
        for ours, theirs in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(ours, np.concatenate(theirs))

    strategies = (runs(), st.integers(1, 16), st.integers(1, 12), st.integers(0, 10**12))
    holds_for_all(examples, check, *strategies)


@few_or_many
def test_another_dealing_in_mid_run_shows_the_same_rows(examples, open_run):
    """Any sequence of batch sizes and host counts deals out the same global rows, each once."""

    def check(run, dealings):
        data = open_run(run)
        expected, row = read_all(data, run.total_rows), 0
        for hosts, part in itertools.cycle(dealings):
            size = hosts * part
            if row + size > run.total_rows:
                break
            np.testing.assert_array_equal(read(data, row, size, hosts), expected[row : row + size])
            row += size

    dealings = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=5)
    holds_for_all(examples, check, runs(), dealings)


@few_or_many
def test_removing_a_source_leaves_the_order_within_the_others(examples, open_run):
    def check(run):
        assume(len(run.lengths) > 1)
        gone = sorted(run.lengths)[run.seed % len(run.lengths)]
        whole, fewer = open_run(run), open_run(run, Mixture.temperature(0.5).without(gone))
        streams = []
        for data in (whole, fewer):
            batch = data.batch(0, run.total_rows)
            rows = data.order.batch_rows(0, run.total_rows)
            in_order = np.argsort(rows)
            streams.append((batch.source[in_order], batch.tokens[in_order]))
        for source, name in enumerate(whole.source_names):
            one, other = (tokens[of == source] for of, tokens in streams)
            both = min(len(one), len(other))
            assert one[:both].tobytes() == other[:both].tobytes()
            assert name != gone or not len(other)

    holds_for_all(examples, check, runs())


@few_or_many
def test_no_host_of_64_sees_a_skewed_mixture(examples, open_run):
    """Chi-square of hosts against sources. Fewer sources may be expected than by chance, since a batch's are fixed."""
    hosts, part, batches = 64, 4, 60

    def check(run):
        data = open_run(run)
        shown = [data.batch(first, hosts * part).source for first in range(0, batches * hosts * part, hosts * part)]
        table = np.zeros((hosts, len(data.packings)))
        np.add.at(table, (np.tile(np.repeat(np.arange(hosts), part), batches), np.concatenate(shown)), 1)
        table = table[:, table.sum(0) >= 5 * hosts]
        assume(table.shape[1] > 1)
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        chi_square, freedom = ((table - expected) ** 2 / expected).sum(), (hosts - 1) * (table.shape[1] - 1)
        assert abs(chi_square - freedom) < 5.5 * np.sqrt(2 * freedom)

    holds_for_all(max(examples // 3, 10), check, runs())


def dealt(size, seed, name, epochs=1):
    """The rows of a source of `size` rows in the order in which a mixture with two others deals them."""
    names = tuple(sorted(("bg", "fi", name)))
    shares = [SHARE_SUM // 4] * 3
    shares[names.index(name)] += SHARE_SUM // 4
    order = Order(Schedule(names, (Stage(0, tuple(shares)),)), dict.fromkeys(names, size), seed)
    source, epoch, row = order.rows(np.arange(2 * size * epochs + 8))
    mine = source == names.index(name)
    return row[mine][: size * epochs].reshape(epochs, size), epoch[mine][: size * epochs].reshape(epochs, size)


@pytest.mark.parametrize("size", [100_003, 262_144, 1_000_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_rows_of_a_source_come_in_random_order(size, seed):
    """Correlations at lags, and the numbers of runs above and below the median (Wald and Wolfowitz) and up and down."""
    (rows,), _ = dealt(size, seed, "et")
    for lag in (1, 2, 3, 8, 64):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 4.5 / np.sqrt(size)
    above = rows >= size // 2
    changes, n = np.count_nonzero(above[1:] != above[:-1]), above.sum()
    mean = 2 * n * (size - n) / size
    assert abs(changes - mean) < 4.5 * np.sqrt(mean * (mean - 1) / (size - 1))
    up = rows[1:] > rows[:-1]
    turns = np.count_nonzero(up[1:] != up[:-1])
    assert abs(turns - 2 * (size - 2) / 3) < 4.5 * np.sqrt((16 * size - 29) / 90)


def test_epochs_of_a_source_are_in_unrelated_orders():
    size = 100_003
    rows, epoch = dealt(size, 0, "et", epochs=3)
    assert [set(line) for line in epoch.tolist()] == [{0}, {1}, {2}]
    assert all(sorted(line) == list(range(size)) for line in rows.tolist())
    correlation = np.corrcoef(rows) - np.eye(3)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(size)
    for one, other in itertools.combinations(rows, 2):
        assert np.count_nonzero(one == other) < 10  # Poisson with mean 1
