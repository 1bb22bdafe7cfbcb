"""Inputs of every kind become the same store through units, and a bad one costs nothing of what is done."""

import gzip
import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard

from eurollm_jax.corpus.preparing import work_plan
from eurollm_jax.corpus.preparing.finalize import finalize
from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare, prepare_task
from eurollm_jax.errors import UserError

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(work_plan, "UNIT_BYTES", (20_000, 20_000))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(corpus_dir, language):
    lines = (corpus_dir / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"url": None} | json.loads(line) for line in lines]


class Mixed(tfds.core.GeneratorBasedBuilder):
    """The documents of a corpus' files, in several languages."""

    code_path = None
    VERSION = tfds.core.Version("1.0.0")
    corpus_dir = None

    def _info(self):
        names = ("text", "id", "language", "source", "licence", "url")
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for language in ("bg", "mt"):
            for number, row in enumerate(rows(self.corpus_dir, language)):
                yield f"{language}{number}", row | {"url": row["url"] or ""}


def write_kind(kind, corpus_dir, folder):
    """The documents of `corpus_dir` as files of one kind; what to give to prepare."""
    folder.mkdir()
    for file in sorted(corpus_dir.iterdir()):
        content, table = file.read_bytes(), pa.Table.from_pylist(rows(corpus_dir, file.stem))
        match kind:
            case "jsonl.gz":
                (folder / f"{file.name}.gz").write_bytes(gzip.compress(content))
            case "jsonl.zst":
                (folder / f"{file.name}.zst").write_bytes(zstandard.compress(content))
            case "txt":
                (folder / f"{file.stem}.txt").write_text("\n".join(row["text"] for row in rows(corpus_dir, file.stem)))
            case "parquet":
                path = folder / f"{file.stem}.parquet"
                pq.write_table(table, path, row_group_size=20, compression="none", use_dictionary=False)
            case "arrow":
                path = folder / f"{file.stem}.arrow"
                with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=30)
            case "saved":
                datasets.Dataset.from_list(rows(corpus_dir, file.stem)).save_to_disk(folder / file.stem, num_shards=2)
    if kind == "tfds":
        Mixed.corpus_dir = corpus_dir
        config = tfds.download.DownloadConfig(num_shards=3)
        Mixed(data_dir=folder, file_format="array_record").download_and_prepare(download_config=config)
        return f"tfds:mixed?split=train&data_dir={folder}"
    return f"{folder}/*" if kind == "saved" else folder


@pytest.mark.parametrize(
    ("kind", "units"),
    [("jsonl.gz", 1), ("jsonl.zst", 1), ("txt", 5), ("parquet", 10), ("arrow", 10), ("saved", 5), ("tfds", 2)],
)
def test_any_kind_of_input_makes_the_store_of_a_plain_loop(plain_loop, corpus_dir, tokenizer, tmp_path, kind, units):
    given = write_kind(kind, corpus_dir, tmp_path / "in")
    expected = plain_loop([given], tokenizer, tmp_path / "plain")
    plan = work_plan.make_plan([given], tokenizer, tmp_path / "out", PrepareOptions())
    assert len(plan.units) >= units
    for task in (2, 0, 1):
        prepare_task(given, tokenizer, tmp_path / "out", task=task, of=3, workers=1)
    store = finalize(tmp_path / "out")
    assert {path: content for path, content in tree(store.path).items() if path.name != "prepare.json"} == expected
    assert prepare(given, tokenizer, tmp_path / "out").fingerprint == store.fingerprint


def bad_input(kind, good, path):
    """Write a bad form of the documents `good` near `path`; returns the file and what must be said of it."""
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in good]
    match kind:
        case "truncated zst":
            path = path.with_name("z.jsonl.zst")
            path.write_bytes(zstandard.compress(b"\n".join(lines))[:-40])
            return path, "is cut off in the middle of a zstd frame; make or fetch it again"
        case "truncated gz":
            path = path.with_name("z.jsonl.gz")
            path.write_bytes(gzip.compress(b"\n".join(lines))[:-40])
            return path, "is cut off in the middle of its gzip data; make or fetch it again"
        case "corrupt page":
            path = path.with_name("z.parquet")
            pq.write_table(pa.Table.from_pylist(good), path, row_group_size=50, write_page_checksum=True)
            column = pq.ParquetFile(path).metadata.row_group(1).column(1)
            content = bytearray(path.read_bytes())
            content[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
            path.write_bytes(content)
            return path, ", row group 1 is not valid parquet ("
        case "wrong column":
            path = path.with_name("z.parquet")
            pq.write_table(pa.Table.from_pylist(good).rename_columns(["url", "txt", *list(good[0])[2:]]), path)
            return path, " has no field 'text'; did you mean 'txt'?"
        case "mixed encodings":
            lines[70] = json.dumps({"text": "grün", "language": "de"}, ensure_ascii=False).encode("latin-1")
            said = ", line 71 is not UTF-8 (byte 13 of the line is 0xfc); convert the file to UTF-8"
        case "NUL":
            lines[70] = b'{"text": "a\\u0000b", "language": "de"}'
            said = ", line 71: character 2 of the text is NUL (U+0000); remove it, or skip bad documents"
        case "empty language":
            lines[70] = b'{"text": "a", "language": ""}'
            said = ', line 71 says no language; add a field such as "language": "fr"'
        case "empty file":
            lines, said = [], " has no documents; remove the file or fill it"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path, said


BAD = ("truncated zst", "truncated gz", "corrupt page", "wrong column", "mixed encodings", "NUL", "empty language")


@pytest.mark.parametrize("kind", [*BAD, "empty file"])
def test_a_bad_input_is_named_with_its_place_and_what_is_done_stays(corpus_dir, tokenizer, tmp_path, kind):
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for language in ("bg", "el"):
        shutil.copy(corpus_dir / f"{language}.jsonl", inputs)
    file, said = bad_input(kind, rows(corpus_dir, "de"), inputs / "z.jsonl")
    with pytest.raises(UserError) as error:
        prepare(inputs, tokenizer, out, workers=1)
    assert f"{file}{'' if said.startswith((',', ' ')) else ' '}{said}" in str(error.value)
    assert "\n" not in str(error.value)
    units = {unit: unit.stat().st_mtime_ns for unit in (tmp_path / "out.parts/units").iterdir()}
    assert len(units) >= 2
    assert not any(unit.name.startswith(".") for unit in units)
    assert not out.exists()
    if kind in ("mixed encodings", "NUL", "empty language"):
        skip = PrepareOptions(bad_documents="skip")
        prepare_task(inputs, tokenizer, out, skip, task=0, of=1, workers=1)
        assert {unit: unit.stat().st_mtime_ns for unit in units} == units
        store = finalize(out)
        assert store.sources["de"].documents == 149
        (refused,) = (out / "refused.jsonl").read_text(encoding="utf-8").splitlines()
        assert said in json.loads(refused)["reason"]
