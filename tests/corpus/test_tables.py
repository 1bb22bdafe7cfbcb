"""Parquet and saved Hugging Face datasets: rows come back whole and in order, and damage is named with its place."""

import json
import subprocess
import sys
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.reading.sources import Defaults, find_parts, read_documents, read_part
from eurollm_jax.errors import UserError

datasets.disable_progress_bars()

FINNISH = Defaults(language="fi")


def texts(parts, defaults=FINNISH, **arguments):
    return [document.text for part in parts for document in read_part(part, defaults, **arguments)]


def refusal(given, defaults=FINNISH, **arguments) -> str:
    with pytest.raises(UserError) as error:
        texts(find_parts([given], **arguments), defaults)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30).map(lambda text: f"x{text}")),
    group=st.integers(1, 40),
    part_bytes=st.integers(1, 600),
)
def test_the_parts_of_a_parquet_file_are_its_rows_in_order(tmp_path, rows, group, part_bytes):
    rows = [*rows, "last"]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=group)
    parts = find_parts([path], part_bytes=part_bytes)
    assert texts(parts) == rows
    assert texts(reversed(parts)) == [text for part in reversed(parts) for text in texts([part])]


def test_a_large_parquet_file_is_cut_by_row_groups_and_read_flat(tmp_path):
    path = tmp_path / "x.parquet"
    row = "".join(f"{n:07d} " for n in range(1000))
    rows = [f"{n} {row}" for n in range(4000)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=2000, compression="none", use_dictionary=False)
    assert len(find_parts([path], part_bytes=20_000_000)) == 2
    del rows
    before = pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    try:
        for n, document in enumerate(read_documents(path, language="fi")):
            assert document.text.startswith(f"{n} ")
            most = max(most, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A row group is 16 MB; neither arrow's memory nor Python's holds the file of 32.
    assert most < 30_000_000
    assert peak < 20_000_000


def test_wrong_columns_are_named_before_any_row_is_read(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"txt": ["a"], "url": ["b"]}), path)
    assert refusal(path) == f"{path} has no field 'text'; did you mean 'txt'?"
    assert texts(find_parts([path]), Defaults("fi", fields={"text": "txt"})) == ["a"]
    assert "no field 'adress' for 'url'" in refusal(path, Defaults("fi", fields={"text": "txt", "url": "adress"}))
    assert "it has 'txt', 'url'" in refusal(path, Defaults("fi", fields={"text": "content"}))
    pq.write_table(pa.table({"text": [["a", "b"]]}), path)
    assert "column 'text' is of type list<" in refusal(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "has no documents" in refusal(path)


def test_a_row_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    strings = pa.array([b"a", b"b\xe9", b"c", None, b"d\0", b" ", b"e"], pa.binary())
    text = pa.StringArray.from_buffers(7, *strings.buffers()[1:], strings.buffers()[0])
    pq.write_table(pa.table({"text": text}), path, row_group_size=5)
    faults: list[str] = []
    assert texts(find_parts([path]), fault=lambda error: faults.append(str(error))) == ["a", "c", "e"]
    reasons = ["not UTF-8", "has no field 'text'", "NUL", "the text is empty"]
    places = ["row group 0, row 1", "row group 0, row 3", "row group 0, row 4", "row group 1, row 0"]
    assert len(faults) == 4
    for fault, place, reason in zip(faults, places, reasons, strict=True):
        assert fault.startswith(f"{path}, {place}")
        assert reason in fault


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_a_corrupt_page_is_named_with_its_row_group_after_the_good_rows(tmp_path, compression):
    path = tmp_path / "x.parquet"
    rows = [f"{n} " + "kissa " * 50 for n in range(300)]
    pq.write_table(
        pa.table({"text": rows}),
        path,
        row_group_size=100,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(content)
    found: list[str] = []
    with pytest.raises(UserError) as error:
        found.extend(document.text for document in read_documents(path, language="fi"))
    assert f"{path}, row group 1 is not valid parquet (" in str(error.value)
    assert found == rows[:100]
    (first, *_, third) = find_parts([path], part_bytes=1)
    assert texts([first]) == rows[:100]
    assert texts([third]) == rows[200:]


@pytest.mark.parametrize("keep", [0, 3, 50, -1, -5])
def test_a_truncated_table_is_refused(tmp_path, keep):
    table = pa.table({"text": ["a"] * 100})
    pq.write_table(table, tmp_path / "whole.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:keep])
    assert "x.parquet is not valid parquet (" in refusal(tmp_path / "x.parquet")
    assert "x.parquet is not valid parquet (" in refusal(tmp_path / "x.parquet", part_bytes=0)
    with pa.OSFile(str(tmp_path / "whole.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    (tmp_path / "x.arrow").write_bytes((tmp_path / "whole.arrow").read_bytes()[:keep])
    assert "x.arrow is not valid arrow (" in refusal(tmp_path / "x.arrow")
    assert "x.arrow is not valid arrow (" in refusal(tmp_path / "x.arrow", part_bytes=0)


def test_an_arrow_stream_that_ends_between_two_batches_is_refused_and_so_are_wild_offsets(tmp_path):
    path = tmp_path / "x.arrow"
    batch = pa.record_batch({"text": ["kissa"] * 100})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        whole = sink.tell()
        writer.write_batch(batch)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:whole])
    assert "its end is missing" in refusal(path)
    offset = content.index((5).to_bytes(4, "little") + (10).to_bytes(4, "little"))
    content[offset : offset + 4] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    assert "x.arrow, record batch 0 is not valid arrow" in refusal(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert "arrow's file format" in refusal(path)


@pytest.fixture
def saved(tmp_path):
    rows = [
        {"text": f"rivi {n}", "url": f"https://e.org/{n}", "score": n / 2, "tags": ["a", str(n)]} for n in range(2500)
    ]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "hplt/fi", num_shards=3)
    datasets.DatasetDict({"train": dataset, "dev": dataset.select([7, 5])}).save_to_disk(tmp_path / "culture/fi")
    return tmp_path


@pytest.mark.parametrize("part_bytes", [1, 1 << 28])
def test_a_saved_dataset_is_what_the_library_reads_from_it(saved, part_bytes):
    theirs = list(datasets.load_from_disk(str(saved / "hplt/fi")))
    parts = find_parts([saved / "hplt/fi"], part_bytes=part_bytes)
    found = [document for part in parts for document in read_part(part)]
    assert [{"text": d.text, "url": d.url} | dict(d.metadata) for d in found] == theirs
    assert {(d.language, d.source) for d in found} == {("fi", "hplt")}
    assert len(parts) == 3


@pytest.mark.parametrize("part_bytes", [1, 1000, 3000])
def test_the_parts_of_an_arrow_file_are_its_rows_in_order(tmp_path, part_bytes):
    path = tmp_path / "x.arrow"
    rows = [f"rivi {n} " + "a" * (n % 50) for n in range(300)]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": rows}), max_chunksize=10)
    parts = find_parts([path], part_bytes=part_bytes)
    assert texts(parts) == rows
    assert len(parts) == 30 if part_bytes == 1 else 3 < len(parts) < 30


def test_splits_of_a_saved_dictionary_are_chosen_by_name(saved):
    folder = saved / "culture/fi"
    assert [d.text for d in read_documents(f"{folder}?split=dev")] == ["rivi 7", "rivi 5"]
    assert [d.text for d in read_documents(f"{saved}/cult*/f?" + "?split=dev")] == ["rivi 7", "rivi 5"]
    assert len(list(read_documents(f"{folder}?split=train"))) == 2500
    assert "has several splits; end it with ?split=train or ?split=dev" in refusal(folder)
    assert "has no split 'test'; end it with ?split=train or ?split=dev" in refusal(f"{folder}?split=test")
    assert "without splits; leave ?split=train off" in refusal(f"{saved / 'hplt/fi'}?split=train")


def test_a_saved_dataset_without_one_of_its_files_is_refused_and_cached_files_are_not_read(saved):
    folder = saved / "hplt/fi"
    datasets.load_from_disk(str(folder)).map(lambda row: {"text": row["text"] + "!"})
    assert any(entry.name.startswith("cache-") for entry in folder.iterdir())
    assert len(list(read_documents(folder))) == 2500
    assert len(list(read_documents(f"{saved}/hplt/**/*.arrow"))) == 2500
    (folder / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow is missing, though" in refusal(folder)


def test_saved_datasets_are_read_without_the_library(saved):
    code = (
        "import sys; from eurollm_jax.corpus.reading.sources import read_documents; "
        f"print(len(list(read_documents({str(saved / 'hplt/fi')!r}))), 'datasets' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "2500 False\n"


def test_a_table_of_datatrove_keeps_its_fields_in_a_struct(tmp_path):
    rows = [{"text": "a", "id": "1", "metadata": {"url": "https://e.org", "language": "sv", "score": 0.5}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "y.jsonl").write_text(json.dumps(rows[0]))
    for name in ("x.parquet", "y.jsonl"):
        (found,) = read_documents(tmp_path / name)
        assert (found.url, found.language, found.metadata) == ("https://e.org", "sv", {"score": 0.5})
