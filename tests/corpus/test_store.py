"""A store gives back what was put in, knows where everything came from, and notices damage."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest

from eurollm_jax.corpus.sources import Document
from eurollm_jax.corpus.store import TokenStore
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


def test_damage_is_named(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    store.verify()
    for name in ("bg/tokens-00000.bin", "mt/sha256.npy"):
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 4
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=r"damaged in bg/tokens-00000\.bin, mt/sha256\.npy;"):
        TokenStore.open(copy).verify()
    with (copy / "de" / "tokens-00000.bin").open("ab") as file:
        file.write(b"\0")
    size = store.sources["de"].tokens * 2
    with pytest.raises(UserError, match=rf"de/tokens\.bin has {size + 1} bytes and should have {size}"):
        TokenStore.open(copy)
    (copy / "de" / "tokens-00000.bin").unlink()
    with pytest.raises(UserError, match=r"de/tokens\.bin is missing"):
        TokenStore.open(copy)


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
