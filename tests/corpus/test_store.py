"""A store gives back what was put in, knows where everything came from, and notices damage."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.reading.sources import Document
from eurollm_jax.corpus.store import Source, TokenStore
from eurollm_jax.corpus.store_writer import StoreWriter
from eurollm_jax.errors import UserError

LANGUAGES = ["bg", "de", "el", "en", "mt"]


def records(corpus_dir, language):
    return [json.loads(line) for line in (corpus_dir / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()]


def write(folder, documents, vocab_size):
    """A store of (source, tokens) pairs whose texts are made up."""
    folder.mkdir()
    writer = StoreWriter(folder, tokenizer_sha256="f" * 64, vocab_size=vocab_size)
    for number, (source, tokens) in enumerate(documents):
        text = f"text {number}".encode()
        document = Document(text.decode(), f"№ {number}", source, f"origin {number % 3}", "CC0-1.0")
        writer.add(
            source,
            document,
            np.array(tokens),
            byte_length=len(text),
            characters=len(text.decode()),
            fallback=0,
            sha256=hashlib.sha256(text).digest(),
        )
    writer.close()
    return TokenStore.open(folder)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_source_holds_every_document_in_order(store, tokenizer, corpus_dir, language):
    source, expected = store.sources[language], records(corpus_dir, language)
    assert source.language == source.name == language
    assert source.documents == len(expected)
    rows = [[1, *tokenizer.encode(record["text"]).tolist(), 2] for record in expected]
    assert source.read(0, source.tokens).tolist() == [token for row in rows for token in row]
    assert source.offsets.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
    assert source.byte_lengths.tolist() == [len(record["text"].encode()) for record in expected]
    assert (source.tokens, source.bytes) == (int(source.offsets[-1]), sum(source.byte_lengths))
    assert source.dtype == np.uint16
    for index, record in enumerate(expected):
        document = source.document(index)
        assert document.sha256 == hashlib.sha256(record["text"].encode()).hexdigest()
        assert (document.id, document.origin) == (record["id"], record["source"])
        assert (document.licence, document.url) == (record["licence"], record.get("url", ""))
        assert source.document_tokens(index).tolist() == rows[index]


def test_the_store_knows_its_tokenizer_sources_and_licences(store, tokenizer, corpus_dir):
    assert list(store.sources) == LANGUAGES
    assert (store.tokenizer_sha256, store.vocab_size) == (tokenizer.sha256, 640)
    for language, source in store.sources.items():
        for licence, counts in source.licences.items():
            of_licence = [record for record in records(corpus_dir, language) if record["licence"] == licence]
            sizes = [len(record["text"].encode()) for record in of_licence]
            assert counts == {"documents": len(of_licence), "bytes": sum(sizes)}
        assert list(source.licences) == ["CC-BY-4.0", "CC0-1.0"]


def test_documents_are_found_by_id_and_by_hash(store, corpus_dir):
    source = store.sources["el"]
    for index, record in enumerate(records(corpus_dir, "el")):
        assert source.find(record["id"]).tolist() == [index]
        same = [i for i, other in enumerate(records(corpus_dir, "el")) if other["text"] == record["text"]]
        assert source.find_sha256(hashlib.sha256(record["text"].encode()).hexdigest()).tolist() == same
    assert source.find("el-1500").tolist() == source.find("").tolist() == []
    assert source.find_sha256("0" * 64).tolist() == []
    with pytest.raises(UserError, match="not a SHA-256"):
        source.find_sha256("abc")
    for index in (-1, source.documents):
        with pytest.raises(IndexError):
            source.document(index)


def test_one_id_on_several_documents_finds_them_all(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    writer = StoreWriter(folder, tokenizer_sha256="f" * 64, vocab_size=10)
    for name in ("same", "samf", "same", "s", "emas", "same"):
        writer.add(
            "en",
            Document("x", name, "en", "o", "l"),
            np.array([1, 2]),
            byte_length=1,
            characters=1,
            fallback=0,
            sha256=bytes(32),
        )
    writer.close()
    assert TokenStore.open(folder).sources["en"].find("same").tolist() == [0, 2, 5]


def test_stores_and_sources_survive_pickling(store):
    used = store.sources["bg"]
    assert used.read(0, 1)[0] == 1  # maps the file
    copy = pickle.loads(pickle.dumps(store))
    assert copy.fingerprint == store.fingerprint
    source = pickle.loads(pickle.dumps(used))
    assert len(pickle.dumps(used)) < 10_000
    np.testing.assert_array_equal(source.read(0, source.tokens), used.read(0, used.tokens))
    assert source.document(7) == used.document(7)


def test_many_documents_over_many_flushes_and_wide_ids(tmp_path):
    random = np.random.default_rng(0)
    names = ["aa", "bb", "cc"]
    documents = [
        (names[number % 3], [1, *random.integers(4, 70_000, size).tolist(), 2])
        for number, size in enumerate(random.integers(1, 400_000, 15))
    ]
    store = write(tmp_path / "store", documents, vocab_size=70_000)
    store.verify()
    for name, source in store.sources.items():
        assert source.dtype == np.uint32
        own = [(number, tokens) for number, (other, tokens) in enumerate(documents) if other == name]
        assert source.documents == len(own)
        for index, (number, tokens) in enumerate(own):
            np.testing.assert_array_equal(source.document_tokens(index), tokens)
            assert source.document(index).id == f"№ {number}"
            assert source.document(index).origin == f"origin {number % 3}"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_largest_id_fits(tmp_path, vocab_size, dtype):
    source = write(tmp_path / "store", [("en", [1, vocab_size - 1, 2])], vocab_size).sources["en"]
    assert source.read(0, source.tokens).tolist() == [1, vocab_size - 1, 2]
    assert source.dtype == dtype


@pytest.mark.parametrize("token", [-1, 100])
def test_ids_outside_the_vocabulary_are_never_written(tmp_path, token):
    with pytest.raises(ValueError, match="outside the vocabulary of 100"):
        write(tmp_path / "store", [("en", [1, token, 2])], vocab_size=100)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    documents = [("en", [1, 5, 2]), ("de", [1, 6, 2])]
    first = write(tmp_path / "a", documents, vocab_size=100)
    assert first.fingerprint == write(tmp_path / "b", documents, vocab_size=100).fingerprint
    assert first.fingerprint != write(tmp_path / "c", documents, vocab_size=101).fingerprint
    others = [write(tmp_path / f"d{token}", [("en", [1, token, 2]), documents[1]], 100).fingerprint for token in (5, 7)]
    assert (others[0] == first.fingerprint, others[1] == first.fingerprint) == (True, False)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def test_damage_is_named(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    read = []
    store.verify(read.append)
    assert sum(read) == store.size == sum(file.stat().st_size for name in LANGUAGES for file in (copy / name).iterdir())
    for name in ("bg/tokens-00000.bin", "mt/sha256.npy"):
        flip_a_bit(copy / name)
    wrong = r"damaged: bg/tokens-00000\.bin is not as it was written; mt/sha256\.npy is not as it was written\."
    with pytest.raises(UserError, match=wrong):
        TokenStore.open(copy).verify()
    size = store.sources["de"].tokens * 2
    tokens = copy / "de" / "tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"de/tokens-00000\.bin has {size + 1} bytes and should have {size};"):
        TokenStore.open(copy)
    (copy / "en" / "offsets.npy").unlink()
    found = rf"bg/tokens-0.* de/tokens-00000\.bin has {size + 1} bytes .*; en/offsets\.npy is missing; mt/sha256"
    with pytest.raises(UserError, match=found):
        TokenStore.open(copy, check=False).verify(threads=3)
    tokens.unlink()
    with pytest.raises(UserError, match=r"de/tokens-00000\.bin is missing"):
        TokenStore.open(copy)


@pytest.mark.parametrize("name", ["tokens", "characters", "fallback", "language", "bg", "vocab_size", "CC0-1.0"])
def test_any_change_to_the_manifest_is_noticed(store, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace(f'"{name}"', f'"{name[:-1]}x"', 1))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(its own hash does not fit\); restore it"):
        TokenStore.open(copy)


def sharded(folder, stream, cuts, dtype=np.uint16, skip=0):
    """A source whose tokens lie in files cut at `cuts`, each with `skip` bytes of something else in front."""
    folder.mkdir()
    bounds = [0, *cuts, len(stream)]
    shards = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"{number}.bin"
        path.write_bytes(b"\xff" * skip + np.array(stream[start:stop], dtype).tobytes())
        shards.append({"file": str(path), "tokens": stop - start, "offset": skip})
    np.save(folder / "offsets.npy", np.array([0, len(stream)]))
    sizes = {"documents": 1, "tokens": len(stream), "bytes": 0, "characters": 0, "fallback": 0}
    return Source(folder, "xx", {"language": "xx", "dtype": np.dtype(dtype).name, "shards": shards, **sizes})


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([np.uint16, np.int32, np.uint32, np.uint8, np.int64]))
def test_any_reads_over_any_shards_are_the_streams_slices(tmp_path_factory, data, dtype):
    size = data.draw(st.integers(1, 60))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=9)))  # with empty shards
    stream = np.random.default_rng(size).integers(0, 120, size).astype(dtype)
    source = sharded(tmp_path_factory.mktemp("s") / "xx", stream, cuts, dtype, data.draw(st.sampled_from([0, 34])))
    reads = []
    for _ in range(data.draw(st.integers(0, 6))):
        start = data.draw(st.integers(0, size - 1))
        reads.append((start, data.draw(st.integers(0, size - start - 1))))
        assert source.read(start, start + reads[-1][1] + 1).tolist() == stream[start:][: reads[-1][1] + 1].tolist()
    starts, lengths = np.array(reads, np.int64).reshape(-1, 2).T
    places = np.cumsum(lengths + 1) - lengths
    out, after = np.full(int((lengths + 1).sum()) + 1, 121, dtype), np.zeros(len(reads), dtype)
    expected = out.copy()
    for place, start, length in zip(places.tolist(), starts.tolist(), lengths.tolist(), strict=True):
        expected[place : place + length] = stream[start : start + length]
    source.read_into(out, places, starts, lengths, after)
    assert out.tolist() == expected.tolist()
    assert after.tolist() == stream[starts + lengths].tolist()


def test_reads_outside_of_the_stream_are_refused(tmp_path):
    source = sharded(tmp_path / "xx", list(range(10)), [4])
    out = np.zeros(20, np.uint16)
    for start, length, after in [(-1, 2, None), (8, 3, None), (3, -1, None), (8, 2, out[:1])]:
        with pytest.raises(IndexError, match="10 tokens of source xx"):
            source.read_into(out[1:], *np.array([[0], [start], [length]]), after)
    with pytest.raises(TypeError, match="uint16"):
        source.read_into(np.zeros(4, np.int32), *np.array([[0], [0], [4]]))


@pytest.mark.parametrize("across", [False, True])
def test_a_shard_that_is_deleted_or_cut_short_while_it_is_open_is_named(tmp_path, across):
    for change, message in [
        (lambda path: path.unlink(), r"/1\.bin of source xx was deleted while it was read; restore"),
        (lambda path: os.truncate(path, 6), r"/1\.bin of source xx was cut short: it has 6 bytes and .* least 12; "),
        (lambda path: path.write_bytes(b""), r"/1\.bin of source xx was cut short: it has 0 bytes"),
    ]:
        source = sharded(tmp_path / "xx", list(range(18)), [6, 12])
        start, stop = (4, 8) if across else (6, 8)  # the first tokens are there still
        assert source.read(start, stop).tolist() == list(range(start, stop))
        change(tmp_path / "xx" / "1.bin")
        with pytest.raises(UserError, match=message):
            source.read(start, stop)
        assert source.read(0, 6).tolist() == list(range(6))
        shutil.rmtree(tmp_path / "xx")
        with pytest.raises(UserError, match=r"/2\.bin of source xx cannot be read \(No such file"):
            source.read(12, 18)


def test_a_process_with_few_file_handles_reads_thousands_of_shards(tmp_path):
    """In a process of its own, with two threads and at most 64 open files."""
    source = sharded(tmp_path / "xx", list(range(3000)), list(range(2, 3000, 2)))
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    script = """
import pathlib, pickle, resource, sys, threading
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
source = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
wrong = []
def read():
    out, starts = np.zeros(3000, np.uint16), np.arange(0, 3000, 3)
    for _ in range(3):
        source.read_into(out, starts, starts, np.full(1000, 3))
        if out.tolist() != list(range(3000)):
            wrong.append(out)
threads = [threading.Thread(target=read) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print("wrong" if wrong else "right")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "source.pickle")], capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.returncode) == ("right\n", 0), run.stderr


def test_what_is_no_store_is_refused(store, tmp_path):
    with pytest.raises(UserError, match="no token store at"):
        TokenStore.open(tmp_path / "missing")
    with pytest.raises(UserError, match=r"not a token store: it has no manifest\.json"):
        TokenStore.open(tmp_path)
    for content, message in [
        ("{", "is damaged"),
        ("[]", "not a token store"),
        ('{"format": "x"}', "not a token store"),
        (json.dumps(store.manifest | {"version": 1}), "version 1, and this program reads version 2"),
    ]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            TokenStore.open(tmp_path)
