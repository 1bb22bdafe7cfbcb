"""Parts hold every document of an input once and in order, wherever it is cut; inputs are found by path and pattern."""

import dataclasses
import gc
import gzip
import json
import pickle
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.reading.sources import (
    Defaults,
    Part,
    find_parts,
    part_files,
    read_documents,
    read_part,
)
from eurollm_jax.errors import UserError

FINNISH = Defaults(language="fi")
LINES = st.lists(st.sampled_from(["", "  ", "\t"]) | st.text(min_size=1, max_size=40).map(lambda text: f"x{text}"))


def texts(parts, defaults=FINNISH, fault=None):
    arguments = (defaults,) if fault is None else (defaults, fault)
    return [document.text for part in parts for document in read_part(part, *arguments)]


def expected_texts(content: bytes) -> list[str]:
    """By the definition of JSON lines, with none of our code: every line between newlines that is not blank."""
    return [json.loads(line)["text"] for line in content.split(b"\n") if line.strip()]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=LINES,
    ending=st.sampled_from([b"\n", b"\r\n"]),
    final=st.booleans(),
    escaped=st.booleans(),
    part_bytes=st.integers(1, 300),
)
def test_the_parts_of_a_file_are_its_documents_in_order(tmp_path, lines, ending, final, escaped, part_bytes):
    lines = [text if not text.strip() else json.dumps({"text": text}, ensure_ascii=escaped) for text in lines]
    lines = [line.encode("utf-8", "surrogatepass") for line in [*lines, '{"text": "one"}']]
    try:
        b"".join(lines).decode()
    except UnicodeDecodeError:
        return
    content = ending.join(lines) + (ending if final else b"")
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    faults: list[str] = []
    parts = find_parts([file], part_bytes=part_bytes)
    found = texts(parts, fault=lambda error: faults.append(str(error)))
    whole = expected_texts(content)
    usable = [text for text in whole if "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)]
    assert (found, len(faults)) == (usable, len(whole) - len(usable))
    assert sum(part.bytes for part in parts) == len(content)
    assert all(before.stop == after.first for before, after in pairwise(parts))
    assert all(content[part.first - 1 : part.first] in (b"", b"\n") for part in parts)
    for name, packed in (("y.jsonl.zst", zstandard.compress(content)), ("y.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed)
        (part,) = find_parts([tmp_path / name], part_bytes=part_bytes)
        assert texts([part], fault=lambda error: None) == found


def test_parts_survive_json_and_pickle_and_read_alone(tmp_path):
    file = tmp_path / "fi.jsonl"
    file.write_text("".join(f'{{"text": "rivi {n}"}}\n' for n in range(1000)))
    parts = find_parts([file], part_bytes=1000)
    assert len(parts) > 10
    again = [Part(**json.loads(json.dumps(dataclasses.asdict(part)))) for part in parts]
    assert again == parts == pickle.loads(pickle.dumps(parts))
    backwards = [texts([part]) for part in reversed(again)]
    assert [text for found in reversed(backwards) for text in found] == [f"rivi {n}" for n in range(1000)]
    assert part_files(parts[3]) == [file]


def test_the_line_of_an_error_is_counted_in_the_whole_file(tmp_path):
    lines = [f'{{"text": "rivi {n}"}}' for n in range(500)]
    lines[7] = lines[123] = ""
    lines[456] = '{"txt": "a"}'
    lines[457] = "{"
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines))
    faults: list[str] = []
    parts = find_parts([file], part_bytes=700)
    assert len(texts(parts, fault=lambda error: faults.append(str(error)))) == 496
    assert [fault.partition(" ")[0] for fault in faults] == [f"{file},"] * 2
    assert "line 457 has no field 'text'; did you mean 'txt'?" in faults[0]
    assert "line 458 is not valid JSON" in faults[1]


def test_a_fault_that_returns_goes_on_with_the_next_document_and_damage_still_ends_it(tmp_path):
    content = b'{"text": "a"}\n{"text": "\xe9"}\n{"text": ""}\n{"text": "b", "lang": "xx"}\n{"text": "c"}\n'
    faults: list[str] = []
    (tmp_path / "x.jsonl").write_bytes(content)
    assert texts(find_parts([tmp_path / "x.jsonl"]), fault=lambda e: faults.append(str(e))) == ["a", "c"]
    assert [fault.split(", line ")[1][0] for fault in faults] == ["2", "3", "4"]
    for name, packed in (("y.jsonl.gz", gzip.compress(content)), ("y.jsonl.zst", zstandard.compress(content))):
        (tmp_path / name).write_bytes(packed[:-3])
        with pytest.raises(UserError, match=r"y\.jsonl\.\w+ is cut off"):
            texts(find_parts([tmp_path / name]), fault=lambda error: None)
    damaged = bytearray(gzip.compress(b'{"text": "a"}\n' * 1000))
    damaged[30] ^= 0xFF
    (tmp_path / "z.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"z\.jsonl\.gz is not valid gzip"):
        texts(find_parts([tmp_path / "z.jsonl.gz"]), fault=lambda error: None)


def test_a_long_line_takes_time_and_memory_in_proportion_to_its_length(tmp_path):
    """Joining the pieces of a 64 MB line again for each chunk would copy 2 GB; here memory is a few times the line."""
    file = tmp_path / "x.jsonl"
    size = 64_000_000
    file.write_bytes(b'{"text": "' + b"a" * size + b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    try:
        lengths = [len(text) for text in texts(find_parts([file], part_bytes=1000))]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lengths == [size, 1]
    assert peak < 6 * size


@pytest.mark.parametrize("name", ["fi.jsonl", "fi.jsonl.zst", "fi.jsonl.gz"])
def test_memory_stays_flat_however_long_a_file_is(tmp_path, name):
    words = Random(0).choices([f"sana{n}" for n in range(5000)], k=8000 * 400)
    lines = (json.dumps({"text": " ".join(words[start : start + 400])}) for start in range(0, len(words), 400))
    content = "\n".join(lines).encode()
    del words
    pack = {".zst": zstandard.compress, ".gz": lambda data: gzip.compress(data, 1)}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    size = len(content)
    del content
    gc.collect()
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(tmp_path / name)) == 8000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 3


def test_a_file_of_blank_lines_has_no_documents_in_whichever_part_it_is_noticed(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(" \n\r\n" * 500)
    with pytest.raises(UserError, match=r"x\.jsonl has no documents"):
        texts(find_parts([file], part_bytes=100))
    file.write_text('{"text": "a"}\n' + "\n" * 500)
    assert texts(find_parts([file], part_bytes=100)) == ["a"]


def test_patterns_folders_and_files_together(tmp_path, monkeypatch):
    for name in ("fi/a.jsonl", "fi/train/b.jsonl", "sv/c.json.gz", "sv/d.txt.zst", "sv/e.txt.gz", "sv/README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (name if ".txt" in name else json.dumps({"text": name})).encode()
        pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content))
    monkeypatch.chdir(tmp_path)
    assert [part.input for part in find_parts(["**/*.jsonl"])] == ["fi/a.jsonl", "fi/train/b.jsonl"]
    several = ["sv", "fi/train/b.jsonl", f"{tmp_path}/fi/?.jsonl"]
    found = [(document.text, document.language) for document in read_documents(several, language=None)]
    assert found == [
        ("sv/c.json.gz", "sv"),
        ("sv/d.txt.zst", "sv"),
        ("sv/e.txt.gz", "sv"),
        ("fi/train/b.jsonl", "fi"),
        ("fi/a.jsonl", "fi"),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.jsonl", "*.jsonl"], "a.jsonl is given twice, by 'a.jsonl' and '*.jsonl'; name it once"),
        (["*.parquet"], "'*.parquet' matches nothing"),
        (["*.md"], "'*.md' matches no .jsonl"),
        (["*"], "b.csv cannot be read here"),
        (["a.jsonl?split=train"], "a.jsonl is no folder saved by Hugging Face datasets"),
        (["A.jsonl"], "did you mean 'a.jsonl'?"),
    ],
)
def test_inputs_that_cannot_be_meant(tmp_path, monkeypatch, given, said):
    for name in ("a.jsonl", "b.csv", "c.md"):
        (tmp_path / name).write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_parts(given)
    assert said in str(error.value)


def test_tables_and_tfds_are_only_imported_for_such_inputs(tmp_path):
    (tmp_path / "fi.jsonl").write_text('{"text": "a"}')
    code = (
        "import sys; from eurollm_jax.corpus.reading.sources import read_documents; "
        f"print(len(list(read_documents({str(tmp_path)!r}))), "
        "[name for name in ('pyarrow', 'tensorflow_datasets', 'datasets', 'jax') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "1 []\n"
