"""Records with the columns of HPLT, FineWeb-2, CulturaX and mC4 become documents, and paths fill the gaps."""

import datetime
import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eurollm_jax.corpus.reading.sources import Defaults, Document, find_parts, read_documents, read_part
from eurollm_jax.errors import UserError

HPLT_2 = {
    "f": "./CC-MAIN-20210512.warc.gz",
    "o": 578687,
    "s": 8078,
    "rs": 32421,
    "u": "https://example.org/a",
    "c": "text/html",
    "ts": "2021-05-12T01:02:03Z",
    "collection": "cc40",
    "lang": ["fin_Latn", "ekk_Latn"],
    "prob": [0.93, 0.01],
    "text": "Hyvää päivää",
    "seg_langs": ["fin_Latn"],
    "robotstxt": "allowed",
    "id": "40dbe3ae7b1eb3a1ea6a4dc5a5f4d8a1",
    "filter": "keep",
    "pii": [[3, 9]],
    "doc_scores": [8.1, 10.0],
}
HPLT_3 = {name: value for name, value in HPLT_2.items() if name not in ("collection", "robotstxt")} | {
    "crawl_id": "CC-MAIN-2021-21",
    "xml": "<doc><p>Hyvää päivää</p></doc>",
    "html_lang": ["fi"],
    "cluster_size": 3,
    "web-register": {"MT": 0.01, "NA": 0.8},
}
HPLT_1 = {"id": 17, "document_lang": "fi", "langs": ["fi"], "scores": [0.7], "text": "Hyvää päivää"} | {
    "url": "https://example.org/a",
    "collection": "wide17",
}
FINEWEB_2 = {
    "text": "Dobar dan",
    "id": "<urn:uuid:7f3c>",
    "dump": "CC-MAIN-2020-05",
    "url": "https://example.org/b",
    "date": "2020-01-23T04:05:06Z",
    "file_path": "s3://commoncrawl/x.warc.gz",
    "language": "srp",
    "language_score": 0.99,
    "language_script": "Latn",
    "minhash_cluster_size": 4,
    "top_langs": '{"srp_Latn_score": 0.99}',
}
CULTURAX = {"text": "Tere", "timestamp": "2019/03/24 12:13:14", "url": "https://example.org/c", "source": "OSCAR-2301"}
MC4 = {"text": "Labas", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/d"}


def document(record: dict, used: str, **fields) -> Document:
    """What `record` should become: the columns `used` are ours, all others metadata."""
    metadata = {name: value for name, value in record.items() if name not in used.split()}
    return Document(record["text"], licence="unknown", metadata=metadata, **fields)


HPLT_DOCUMENT = dict(language="fi", source="hplt", url=HPLT_2["u"], id=HPLT_2["id"], collected=HPLT_2["ts"])
CASES = [
    ("hplt/fin_Latn/10_1.jsonl.zst", HPLT_2, document(HPLT_2, "text id u ts lang", **HPLT_DOCUMENT)),
    ("hplt/fin_Latn/1.jsonl.zst", HPLT_3, document(HPLT_3, "text id u ts lang", **HPLT_DOCUMENT)),
    (
        "hplt/fi_1.jsonl.zst",
        HPLT_1,
        document(HPLT_1, "text id url document_lang", language="fi", source="hplt", url=HPLT_1["url"], id="17"),
    ),
    (
        "fineweb-2/data/srp_Latn/train/000_00012.parquet",
        FINEWEB_2,
        document(
            FINEWEB_2,
            "text id url date language language_script",
            language="sr-Latn",
            source="fineweb-2",
            url=FINEWEB_2["url"],
            id=FINEWEB_2["id"],
            collected=FINEWEB_2["date"],
        ),
    ),
    (
        "CulturaX/et/et_part_00003.parquet",
        CULTURAX,
        document(
            CULTURAX,
            "text url timestamp source",
            language="et",
            source="OSCAR-2301",
            url=CULTURAX["url"],
            id="OSCAR-2301/7cb8ff7c5ad1c2cd",
            collected=CULTURAX["timestamp"],
        ),
    ),
    (
        "multilingual/c4-lt.tfrecord-00000-of-00512.json.gz",
        MC4,
        document(
            MC4,
            "text url timestamp",
            language="lt",
            source="c4",
            url=MC4["url"],
            id="c4/bf7fdee1cb2b7a8f",
            collected=MC4["timestamp"],
        ),
    ),
]


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        line = json.dumps(record, ensure_ascii=False).encode()
        path.write_bytes({".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(line))
    return path


@pytest.mark.parametrize(("name", "record", "expected"), CASES, ids=[case[0] for case in CASES])
def test_a_record_of_a_published_corpus(tmp_path, name, record, expected):
    (found,) = read_documents(write(tmp_path / name, record))
    if "id" not in record:  # made of the source and the text's hash, which another test holds to hashlib
        assert found.id.startswith(f"{expected.source}/")
        expected = replace(expected, id=found.id)
    assert found == expected


def test_hplt_as_parquet_has_lists_and_a_timestamp(tmp_path):
    record = HPLT_2 | {"ts": datetime.datetime(2021, 5, 12, 1, 2, 3)}
    (found,) = read_documents(write(tmp_path / "hplt/fin_Latn/train-00000-of-00003.parquet", record))
    assert (found.language, found.collected, found.source) == ("fi", "2021-05-12T01:02:03", "hplt")
    assert found.metadata["doc_scores"] == [8.1, 10.0]


@pytest.mark.parametrize(
    ("name", "language", "source"),
    [
        ("fi.jsonl", "fi", "corpus"),
        ("news-fi.jsonl", "", "news-fi"),
        ("fi-news.jsonl", "fi", "fi-news"),
        ("pt_BR-news-00001.jsonl", "pt", "pt_BR-news"),
        ("fi_part_00001.jsonl", "fi", "corpus"),
        ("fin_Latn.00017-of-00032.jsonl", "fi", "corpus"),
        ("oscar-2301.jsonl", "", "oscar-2301"),
        ("fi/train-00000-of-00003.jsonl", "fi", "corpus"),
        ("fin_Latn/train/000_00012.jsonl", "fi", "corpus"),
        ("Finnish/books.jsonl", "fi", "books"),
        ("no_filter/x.jsonl", "", "x"),
        ("data/train/000.jsonl", "", "corpus"),
        ("sr_Latn/c4-sr.tfrecord-00000-of-00512.jsonl", None, "c4"),
        ("hplt-2/nob_Latn/12.jsonl", "nb", "hplt-2"),
        ("part.jsonl", "", "corpus"),
    ],
)
def test_what_a_path_says(tmp_path, name, language, source):
    path = write(tmp_path / "corpus" / name, {"text": "a"})
    faults: list[str] = []
    (part,) = find_parts([path])
    found = list(read_part(part, fault=lambda error: faults.append(str(error))))
    assert [document.language for document in found] == ([language] if language else [])
    if not language:
        said = "says no language" if language == "" else "is 'sr' by its name and 'sr-Latn' by its folder's"
        assert said in faults[0]
    (found,) = read_part(part, Defaults(language="mt"))
    assert (found.language, found.source) == ("mt", source)


def test_a_path_that_says_two_languages_matters_only_where_nothing_else_says_one(tmp_path):
    path = write(tmp_path / "sv/fi-news.jsonl", {"text": "a", "language": "de"})
    assert [document.language for document in read_documents(path)] == ["de"]


def test_fields_are_mapped_by_name_and_an_empty_name_leaves_one_alone(tmp_path):
    record = {"text": "a title", "content": "b", "lang": "fi", "source": {"name": "x"}, "when": "2020"}
    path = write(tmp_path / "web.jsonl", record)
    fields = {"text": "content", "source": "", "collected": "when"}
    (found,) = read_part(find_parts([path])[0], Defaults(fields=fields))
    assert (found.text, found.language, found.source, found.collected) == ("b", "fi", "web", "2020")
    assert found.metadata == {"text": "a title", "source": {"name": "x"}}


def test_defaults_are_checked_where_they_are_made():
    assert Defaults(language="ekk_Latn").language == "et"
    with pytest.raises(UserError, match="unknown language 'xx'"):
        Defaults(language="xx")
    with pytest.raises(UserError, match="no field 'txt'; did you mean 'text'"):
        Defaults(fields={"txt": "content"})
    with pytest.raises(UserError, match="'text' needs the name"):
        Defaults(fields={"text": ""})
