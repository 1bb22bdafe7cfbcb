"""results.parquet is read by others' tools: types, sums and the runs that diverged must come out as they went in."""

import math
from collections import defaultdict

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eurollm_jax.ablation.table import SCHEMA, Replica, curves, read_results, weighted, write_results
from eurollm_jax.errors import UserError
from eurollm_jax.training.ensemble_measurements import Measurement
from tests.ablation.study_folder import DIVERGED, FINGERPRINT, PART, RUNS, STEPS, WEIGHTS, write_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "families"
    return folder / "results.parquet", write_study(folder)


def code_of(source):
    return source.partition("-")[0]


def test_types_and_metadata_are_those_of_the_schema(made):
    path, _ = made
    schema = pq.read_schema(path)
    assert schema.names == SCHEMA.names
    for field in SCHEMA:
        assert schema.field(field.name).type == field.type
    assert schema.metadata[b"study"] == b"families"
    assert schema.metadata[b"fingerprint"] == FINGERPRINT.encode()


def test_pandas_reads_every_row_and_a_languages_sums_are_those_of_its_sources(made):
    path, written = made
    frame = pd.read_parquet(path)
    sources = {source for _, measured in written["runs"] for source in measured[0].bytes}
    languages = {code_of(source) for source in sources}
    assert len(frame) == RUNS * (len(STEPS) + 1) * (len(sources) + len(languages))
    assert frame.dtypes["bytes"] == "int64"
    assert frame.dtypes["bits_per_byte"] == "float64"
    assert frame.dtypes["complete"] == "bool"
    kinds = {arm["name"]: arm["kind"] for arm in written["study"]["arms"]}
    for replica, measured in written["runs"]:
        mine = frame[frame.replica == replica.name]
        assert set(mine.kind) == {kinds[replica.name]}
        assert dict(mine.shares.iloc[0]) == dict(replica.shares)
        for one in measured:
            at = mine[(mine.step == one.step) & (mine.complete == one.complete)]
            assert set(at.tokens) == {one.tokens}
            nats, size = defaultdict(list), defaultdict(int)
            for source, value in one.nats.items():
                nats[code_of(source)].append(value)
                size[code_of(source)] += one.bytes[source]
            for row in at[at.level == "language"].itertuples():
                assert row.bytes == size[row.name]
                total = math.fsum(nats[row.name])
                if math.isnan(total):
                    assert math.isnan(row.bits_per_byte)
                else:
                    assert row.nats == total
                    assert row.bits_per_byte == total / math.log(2) / size[row.name]
            assert at[at.level == "source"].set_index("name").bytes.to_dict() == one.bytes


def test_a_language_is_a_sum_over_a_sum_and_no_mean_of_ratios(tmp_path):
    measured = Measurement(
        "a", 8, 64, 4000, True, "", {"x": 1000.0, "y": 90.0, "z": 5.0}, {}, {"x": 900, "y": 10, "z": 5}
    )
    replica = Replica("proxy", "a", "prior", 0, "f", {"g": 1.0})
    write_results(tmp_path / "r.parquet", "s", "f", [(replica, [measured])], {"x": "de", "y": "de", "z": "el"})
    (curve,) = curves(read_results(tmp_path / "r.parquet"), "proxy").values()
    assert curve.final["de"] == pytest.approx(1090 / math.log(2) / 910, rel=1e-15)
    assert curve.final["de"] != pytest.approx((1000 / 900 + 90 / 10) / 2 / math.log(2), rel=0.1)


def test_what_diverged_is_null_named_and_has_no_end(made):
    path, _ = made
    table = read_results(path)
    bad = table.filter(pa.compute.not_equal(table["diverged"], ""))
    assert set(bad["replica"].to_pylist()) == {DIVERGED}
    assert bad["bits_per_byte"].null_count == bad["nats"].null_count == len(bad) > 0
    assert table["bits_per_byte"].null_count == len(bad)
    found = curves(table, "proxy")
    assert len(found) == RUNS
    assert found[DIVERGED].final == {}
    assert found[DIVERGED].diverged.startswith("the loss was not finite")
    assert curves(table, "confirmation") == {}


def test_a_run_that_diverged_with_finite_figures_has_no_end_either(tmp_path):
    spiked = Measurement("a", 8, 64, 4000, True, "the loss rose to 3e4, from step 5", {"x": 1000.0}, {}, {"x": 900})
    replica = Replica("proxy", "a", "draw", 0, "f", {"g": 1.0})
    write_results(tmp_path / "r.parquet", "s", "f", [(replica, [spiked])], {"x": "de"})
    (curve,) = curves(read_results(tmp_path / "r.parquet"), "proxy").values()
    assert curve.bits_per_byte[0]["de"] > 0
    assert curve.final == {}


def test_final_figures_are_those_of_the_last_and_complete_measurement(made):
    path, written = made
    found = curves(read_results(path), "proxy")
    sound = {name: weighted(curve.final, WEIGHTS) for name, curve in found.items() if curve.final}
    assert sound.keys() == written["final"].keys()
    for name, value in sound.items():
        assert value == pytest.approx(written["final"][name], rel=1e-12)
    assert all(curve.complete == (False, False, False, False, True) for curve in found.values())
    assert all([tokens for tokens, _ in curve.along] == [4000 * step for step in STEPS] for curve in found.values())
    for name in written["final"]:
        assert found[name].along[-1][1]["mt"] == pytest.approx(found[name].final["mt"] + PART)


def test_a_run_that_has_not_ended_has_no_final_figures(tmp_path):
    part = Measurement("a", 8, 64, 4000, False, "", {"x": 1000.0}, {}, {"x": 900})
    replica = Replica("proxy", "a", "draw", 0, "f", {"g": 1.0})
    write_results(tmp_path / "r.parquet", "s", "f", [(replica, [part])], {"x": "de"})
    (curve,) = curves(read_results(tmp_path / "r.parquet"), "proxy").values()
    assert (curve.ended, curve.final, len(curve.along)) == (False, {}, 1)


def test_the_objective_needs_every_language_that_counts():
    assert weighted({"de": 2.0, "el": 1.0}, {"de": 0.25, "el": 0.75, "mt": 0.0}) == 1.25
    assert math.isnan(weighted({"de": 2.0}, {"de": 0.25, "el": 0.75}))


def test_duckdb_reads_it_too(made):
    path, written = made
    query = (
        "select replica, count(bits_per_byte), sum(bytes), any_value(shares['Uralic']) "
        f"from '{path}' where level = 'language' group by replica"
    )
    rows = {name: (count, size, share) for name, count, size, share in duckdb.sql(query).fetchall()}
    for replica, measured in written["runs"]:
        count = 10 * sum(not one.diverged for one in measured)
        size = sum(sum(one.bytes.values()) for one in measured)
        assert rows[replica.name] == (count, size, replica.shares["Uralic"])


def test_a_write_that_fails_leaves_the_old_table_and_nothing_beside_it(made, tmp_path):
    path = tmp_path / "results.parquet"
    replica = Replica("proxy", "a", "prior", 0, "f", {"g": 1.0})
    good = Measurement("a", 8, 64, 4000, True, "", {"x": 1.0}, {}, {"x": 9})
    write_results(path, "s", "f", [(replica, [good])], {"x": "de"})
    before = path.read_bytes()
    with pytest.raises(KeyError):
        write_results(path, "s", "f", [(replica, [good])], {})
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        write_results(path, "s", "f", [(Replica("proxy", "a", "prior", "no seed", "f", {}), [good])], {"x": "de"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "results.parquet"
    with pytest.raises(UserError, match=r"there is no .*results\.parquet: `eurollm ablate` writes it"):
        read_results(path)
    again = r"remove results\.parquet; `eurollm ablate` makes it again"
    path.write_text("not parquet")
    with pytest.raises(UserError, match=rf"results\.parquet is damaged or not Parquet \(.*\): {again}"):
        read_results(path)
    pq.write_table(pa.table({"study": ["a"]}), path)
    with pytest.raises(UserError, match=f"lacks the columns phase, replica.*: {again}"):
        read_results(path)
    pq.write_table(pa.table({name: ["a"] for name in SCHEMA.names}), path)
    with pytest.raises(UserError, match=f"has columns of other types, study, phase.*, step.*: {again}"):
        read_results(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_table_that_was_cut_or_overwritten_is_refused_in_a_sentence(made, tmp_path, part):
    path, _ = made
    whole, damaged = path.read_bytes(), tmp_path / "results.parquet"
    at = int(part * len(whole))
    for content in (whole[:at], whole[:at] + bytes(len(whole) - at - 8) + whole[-8:]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or not Parquet .*: remove results\.parquet"):
            read_results(damaged)
