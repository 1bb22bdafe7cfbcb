"""Megatron datasets are read where they lie, written byte for byte as Megatron does, and what is wrong with one is
named."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus import megatron, megatron_import
from eurollm_jax.corpus.megatron import export_megatron, read_index
from eurollm_jax.corpus.megatron_import import import_megatron, path_languages, source_names
from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.errors import UserError

TYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 7: "f", 8: "H"}  # code: letter of struct


def write_megatron(prefix, documents, code=8, wrong=None):
    """`documents` are lists of sequences of ids. `wrong` replaces parts of the .idx."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sequences = [ids for document in documents for ids in document]
    lengths, pointers, marks = [], [], [0]
    with open(f"{prefix}.bin", "wb") as file:
        for ids in sequences:
            lengths.append(len(ids))
            pointers.append(file.tell())
            file.write(struct.pack(f"<{len(ids)}{TYPES[code]}", *ids))
    for document in documents:
        marks.append(marks[-1] + len(document))
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": struct.pack("<B", code),
        "sequences": struct.pack("<Q", len(sequences)),
        "marks": struct.pack("<Q", len(marks)),
        "lengths": struct.pack(f"<{len(lengths)}i", *lengths),
        "pointers": struct.pack(f"<{len(pointers)}q", *pointers),
        "documents": struct.pack(f"<{len(marks)}q", *marks),
    }
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"".join((parts | (wrong or {})).values()))
    return prefix


def encoded(corpus_dir, tokenizer, language):
    """(text, ids with an end mark) of each document of one language of the small corpus."""
    texts = [document.text for document in read_documents(corpus_dir / f"{language}.jsonl")]
    return texts, [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_dataset_becomes_a_source_where_it_lies(corpus_dir, tokenizer, tmp_path, code):
    texts, documents = encoded(corpus_dir, tokenizer, "el")
    prefix = write_megatron(tmp_path / "hplt" / "ell_Grek_text_document", [[ids] for ids in documents], code)
    store = import_megatron([prefix], tokenizer, tmp_path / "store")

    (source,) = pickle.loads(pickle.dumps(store)).sources.values()
    assert (source.name, source.language) == ("el/hplt", "el")
    assert source.read(0, source.tokens).tolist() == [i for ids in documents for i in ids]
    assert [source.document_tokens(i).tolist() for i in range(source.documents)] == documents
    assert source.byte_lengths.tolist() == [len(text.encode()) for text in texts]
    assert source.bytes == sum(len(text.encode()) for text in texts)
    assert source.characters == sum(map(len, texts))
    assert source.fallback == sum(tokenizer.pieces[i].kind == "byte" for ids in documents for i in ids)
    assert store.tokenizer_sha256 == tokenizer.sha256
    assert not list((tmp_path / "store").rglob("*.bin"))
    sha256 = hashlib.sha256(prefix.with_name("ell_Grek_text_document.bin").read_bytes()).hexdigest()
    assert source._entry["files"][f"{prefix}.bin"]["sha256"] == sha256


def test_several_sequences_are_one_document_and_empty_documents_are_left_out(tokenizer, tmp_path):
    documents = [[[5, 6], [7]], [], [[]], [[8], [], [9, 2]], [[2]]]
    store = import_megatron([write_megatron(tmp_path / "fi", documents)], tokenizer, tmp_path / "store")
    source = store.sources["fi/" + tmp_path.name]
    assert source.offsets.tolist() == [0, 3, 6, 7]
    assert source.byte_lengths.tolist() == [
        sum(len(tokenizer.pieces[i].content) for i in ids) for ids in ([5, 6, 7], [8, 9, 2], [2])
    ]


ID = st.integers(0, 639)


@given(
    documents=st.lists(st.lists(st.lists(ID, max_size=9), max_size=4), min_size=1, max_size=12),
    at_once=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_wherever_the_file_is_cut_for_reading(tokenizer, tmp_path_factory, documents, at_once):
    folder = tmp_path_factory.mktemp("megatron")
    prefix = write_megatron(folder / "fi", documents, 4)
    flat = [[i for ids in document for i in ids] for document in documents]
    flat = [ids for ids in flat if ids]
    if not flat:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_import, "_AT_ONCE", at_once)
        patch.setattr(megatron, "_AT_ONCE", at_once)
        source = import_megatron([prefix], tokenizer, folder / "store", names=["x"]).sources["x"]
    texts = [tokenizer.decode_bytes(ids) for ids in flat]
    assert source.byte_lengths.tolist() == list(map(len, texts))
    assert source.characters == sum(byte & 0xC0 != 0x80 for byte in b"".join(texts))
    assert source.fallback == sum(tokenizer.pieces[i].kind == "byte" for ids in flat for i in ids)
    assert [source.document_tokens(i).tolist() for i in range(source.documents)] == flat


@pytest.mark.parametrize("processes", [1, 3])
def test_many_datasets_are_read_in_processes(corpus_dir, tokenizer, tmp_path, processes):
    languages = ["bg", "de", "mt"]
    prefixes = [
        write_megatron(tmp_path / "hplt" / code, [[ids] for ids in encoded(corpus_dir, tokenizer, code)[1]])
        for code in languages
    ]
    store = import_megatron(prefixes, tokenizer, tmp_path / "store", processes=processes)
    assert sorted(store.sources) == ["bg/hplt", "de/hplt", "mt/hplt"]
    for code in languages:
        expected = [i for ids in encoded(corpus_dir, tokenizer, code)[1] for i in ids]
        assert store.sources[f"{code}/hplt"].read(0, len(expected)).tolist() == expected
    store.verify()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place_and_leaves_nothing(tokenizer, tmp_path, processes):
    good = write_megatron(tmp_path / "de", [[[5, 6, 2]]])
    bad = write_megatron(tmp_path / "fi", [[[5, 6, 2]], [[7, 640, 9, 2]]])
    with pytest.raises(UserError, match=r"fi\.bin: token 4 is 640, and the tokenizer has ids from 0 to 639"):
        import_megatron([good, bad], tokenizer, tmp_path / "store", processes=processes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de.bin", "de.idx", "fi.bin", "fi.idx"]
    negative = write_megatron(tmp_path / "mt", [[[5, -1]]], code=4)
    with pytest.raises(UserError, match=r"mt\.bin: token 1 is -1"):
        import_megatron([negative], tokenizer, tmp_path / "store")


DOCUMENTS = [[[5, 6, 2]], [[7, 2], [8, 2]]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"magic": b"MMIDIDX\x00\x01"}, r"fi\.idx is not the index of a Megatron dataset"),
        ({"version": struct.pack("<Q", 2)}, r"fi\.idx is of version 2, and this program reads version 1"),
        ({"code": b"\x07"}, r"fi\.idx is of float32 numbers, which are no token ids"),
        ({"code": b"\x09"}, r"fi\.idx is of a type of code 9, which are no token ids"),
        ({"code": b"\x04"}, r"fi\.idx: sequence 1 of 2 tokens begins at byte 6 and should at 12"),
        ({"sequences": struct.pack("<Q", 4)}, r"fi\.idx is cut off: it has 94 bytes and its header speaks of 106"),
        ({"documents": b""}, r"fi\.idx is cut off: it has 70 bytes"),
        ({"documents": struct.pack("<3q", 0, 1, 3) + b"\0"}, r"fi\.idx is too long: it has 95 bytes"),
        ({"documents": struct.pack("<3q", 0, 1, 3) + b"\0\0\0"}, r"fi\.idx is of a multimodal dataset"),
        ({"documents": struct.pack("<3q", 0, 2, 1)}, r"fi\.idx: its documents do not run from sequence 0 to 3"),
        ({"documents": struct.pack("<3q", 1, 2, 3)}, r"fi\.idx: its documents do not run from sequence 0 to 3"),
        ({"documents": struct.pack("<3q", 0, 4, 3)}, r"fi\.idx: its documents do not run from sequence 0 to 3"),
        ({"marks": struct.pack("<Q", 0), "documents": b""}, r"fi\.idx: its documents do not run"),
        ({"pointers": struct.pack("<3q", 0, 8, 12)}, r"sequence 1 of 2 tokens begins at byte 8 and should at 6"),
        ({"pointers": struct.pack("<3q", 2, 8, 12)}, r"sequence 0 of 3 tokens begins at byte 2 and should at 0"),
        ({"lengths": struct.pack("<3i", 3, 2, -2)}, r"sequence 2 of -2 tokens"),
        ({"lengths": struct.pack("<3i", 3, 2, 3)}, r"fi\.bin has 14 bytes and fi\.idx speaks of 16"),
        ({"lengths": struct.pack("<3i", 3, 2, 1)}, r"fi\.bin has 14 bytes and fi\.idx speaks of 12"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, wrong, message):
    assert read_index(write_megatron(tmp_path / "right", DOCUMENTS)).offsets.tolist() == [0, 3, 7]
    with pytest.raises(UserError, match=message):
        read_index(write_megatron(tmp_path / "fi", DOCUMENTS, wrong=wrong))


def test_truncated_and_missing_files_are_named(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "fi", DOCUMENTS)
    whole = (tmp_path / "fi.idx").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "fi.idx").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"fi\.idx is (cut off|not the index)"):
            read_index(prefix)
    (tmp_path / "fi.idx").unlink()
    with pytest.raises(UserError, match=r"there is no .*fi\.idx"):
        read_index(prefix)
    with pytest.raises(UserError, match=r"there is no .*fi\.bin\.idx; give the path .* without that ending"):
        read_index(tmp_path / "fi.bin")
    with pytest.raises(UserError, match=r"fi\.bin has no tokens"):
        import_megatron([write_megatron(tmp_path / "fi", [])], tokenizer, tmp_path / "store")


def test_a_source_is_written_as_another_writer_would(store, tmp_path):
    source = store.sources["mt"]
    documents = [[source.document_tokens(i).tolist()] for i in range(source.documents)]
    expected = write_megatron(tmp_path / "expected", documents)
    export_megatron(source, tmp_path / "new" / "mt")
    for ending in (".bin", ".idx"):
        assert (tmp_path / "new" / f"mt{ending}").read_bytes() == (tmp_path / f"expected{ending}").read_bytes()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["mt.bin", "mt.idx"]
    for name in ("mt.bin", "mt.idx"):
        left = tmp_path / "left" / name
        left.parent.mkdir(exist_ok=True)
        left.touch()
        with pytest.raises(UserError, match=rf"{name} is there already"):
            export_megatron(source, tmp_path / "left" / "mt")
        left.unlink()
    assert read_index(expected).dtype == np.uint16


def test_wide_ids_are_written_as_int32_and_come_back(tokenizer, tmp_path):
    wide = import_megatron([write_megatron(tmp_path / "fi", DOCUMENTS, 4)], tokenizer, tmp_path / "a", names=["fi"])
    export_megatron(wide.sources["fi"], tmp_path / "again")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "fi.bin").read_bytes()
    assert read_index(tmp_path / "again").dtype == np.int32
    again = import_megatron([tmp_path / "again"], tokenizer, tmp_path / "b", names=["fi"], languages=["fi"])
    assert again.sources["fi"].offsets.tolist() == wide.sources["fi"].offsets.tolist()


def test_a_prepared_store_comes_back_through_megatron(store, tokenizer, tmp_path):
    for name, source in store.sources.items():
        export_megatron(source, tmp_path / "all" / name)
    prefixes = [tmp_path / "all" / name for name in store.sources]
    again = import_megatron(prefixes, tokenizer, tmp_path / "store", names=list(store.sources), processes=1)
    for name, source in store.sources.items():
        other = again.sources[name]
        for figure in ("language", "documents", "tokens", "bytes", "characters", "fallback", "dtype"):
            assert getattr(other, figure) == getattr(source, figure), figure
        np.testing.assert_array_equal(other.read(0, other.tokens), source.read(0, source.tokens))
        np.testing.assert_array_equal(other.byte_lengths, source.byte_lengths)


def test_damage_to_a_file_that_lies_elsewhere_is_found(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "fi", DOCUMENTS)
    path = import_megatron([prefix], tokenizer, tmp_path / "store").path
    content = bytearray((tmp_path / "fi.bin").read_bytes())
    content[3] ^= 1
    (tmp_path / "fi.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"fi\.bin"):
        TokenStore.open(path).verify()
    (tmp_path / "fi.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"fi\.bin has 13 bytes and should have 14"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/hplt-v3/megatron-lm/fin_Latn", "fi/hplt-v3"),
        ("/x/hplt/fin_Latn_text_document", "fi/hplt"),
        ("/x/hplt/fin_Latn_part1_text_document", "fi/hplt-part1"),
        ("/x/culturax/data/pt-BR/text_document", "pt/culturax"),
        ("/x/fineweb 2/sr_Latn/train/00001", "sr-Latn/fineweb-2-00001"),
        ("/fi", "fi"),
    ],
)
def test_names_and_languages_follow_from_paths(path, name):
    (language,) = path_languages([path])
    assert source_names([path], [language]) == [name]
    assert name.split("/")[0] == language


def test_names_are_unique_and_stay_when_the_list_changes():
    paths = ["/a/x/tokens/fi", "/b/x/tokens/fi", "/b/y/tokens/fi"]
    names = source_names(paths, ["fi"] * 3)
    assert len(set(names)) == 3
    assert all(name.startswith("fi/x-") for name in names[:2])
    assert names[2] == "fi/y"
    assert source_names(paths[::-1], ["fi"] * 3) == names[::-1]
    assert source_names([*paths, "/c/z/fi"], ["fi"] * 4)[:3] == names


def test_what_names_no_source_or_language_is_refused(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "x1", DOCUMENTS)
    with pytest.raises(UserError, match="x1 says no language"):
        path_languages(["/q/r/s/x1"])
    for name in ("", "../x", "/x", "a//b", "a/.b"):
        with pytest.raises(UserError, match="cannot be the name of a source"):
            import_megatron([prefix], tokenizer, tmp_path / "store", names=[name], languages=["fi"])
    with pytest.raises(UserError, match="two datasets are named 'a'"):
        import_megatron([prefix, prefix], tokenizer, tmp_path / "store", names=["a", "a"], languages=["fi", "fi"])
    with pytest.raises(UserError, match="1 languages are given for 2 datasets"):
        import_megatron([prefix, prefix], tokenizer, tmp_path / "store", languages=["fi"])
