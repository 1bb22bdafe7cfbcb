"""What the tables say is what the corpus holds, samples are the documents' own text, and damage is named."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.corpus.inspect import (
    chosen_sources,
    find_documents,
    inspect_store,
    sample_documents,
    store_tables,
    verify_store,
)
from eurollm_jax.corpus.megatron import export_megatron
from eurollm_jax.corpus.megatron_import import import_megatron
from eurollm_jax.corpus.reading.sources import Document
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.corpus.store_writer import StoreWriter
from eurollm_jax.corpus.tokenizing.tokenizer_training import train_tokenizer
from eurollm_jax.errors import UserError


def shown(function, *arguments, width=100, **options):
    console = Console(file=io.StringIO(), width=width)
    function(*arguments, console, **options)
    return console.file.getvalue()


def cells(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


@pytest.fixture(scope="module")
def records(corpus_dir):
    return [json.loads(line) for file in sorted(corpus_dir.iterdir()) for line in file.read_text().splitlines()]


def test_the_tables_say_what_the_corpus_holds(store, records, tokenizer):
    sources, origins = store_tables(store, list(store.sources.values()))
    for row, name in zip(cells(sources), ["bg", "de", "el", "en", "mt"], strict=False):
        texts = [record["text"] for record in records if record["language"] == name]
        ids = [i for text in tokenizer.encode_batch(texts) for i in text.tolist()]
        octets, tokens = sum(len(text.encode()) for text in texts), len(ids) + 2 * len(texts)
        fallback = sum(tokenizer.pieces[i].kind == "byte" for i in ids)
        assert row[:2] == (name, "150")
        assert float(row[2].removesuffix(" k")) == pytest.approx(tokens / 1e3, rel=0.006)
        assert float(row[3].removesuffix(" kB")) == pytest.approx(octets / 1e3, rel=0.006)
        assert row[4:] == (f"{octets / tokens:.2f}", f"{fallback / tokens:.2%}", "1")
    assert cells(sources)[-1][:2] == ("5 sources", "750")
    octets = dict.fromkeys(("CC-BY-4.0", "CC0-1.0"), 0)
    for record in records:
        octets[record["licence"]] += len(record["text"].encode())
    assert [row[:3] for row in cells(origins)] == [("CC-BY-4.0", "diary", "250"), ("CC0-1.0", "letters", "500")]
    assert [row[4] for row in cells(origins)] == [f"{part / sum(octets.values()):.2%}" for part in octets.values()]


def test_sources_of_one_language_are_summed(store, tokenizer, tmp_path):
    for name in ("de", "mt"):
        export_megatron(store.sources[name], tmp_path / name)
    several = import_megatron(
        [tmp_path / "de", tmp_path / "mt"],
        tokenizer,
        tmp_path / "store",
        names=["de/a", "de/b"],
        languages=["de", "de"],
    )
    _, languages, origins = store_tables(several, chosen_sources(several))
    assert cells(languages)[0][:2] == ("de German", "300")
    assert {row[0] for row in cells(origins)} == {"unknown"}
    assert [source.name for source in chosen_sources(several, "de")] == ["de/a", "de/b"]
    assert [source.name for source in chosen_sources(several, "de/b")] == ["de/b"]
    with pytest.raises(UserError, match="has no source or language 'de/c'; did you mean 'de/"):
        chosen_sources(several, "de/c")
    assert "document 75 of 150" in " ".join(
        shown(inspect_store, several, source="de/b", documents=1, tokenizer=tokenizer.model_path).split()
    )
    with pytest.raises(UserError, match=r"\(de/a, de/b cannot be searched: Megatron datasets have no ids\)"):
        inspect_store(several, Console(file=io.StringIO()), find="de-1", tokenizer=tokenizer.model_path)


@pytest.mark.parametrize("count", [1, 2, 7, 749, 750, 10_000])
def test_samples_are_different_documents_and_always_the_same(store, count):
    sources = chosen_sources(store)
    places = sample_documents(sources, count)
    assert len({(place.source.name, place.document) for place in places}) == min(count, 750)
    assert all(0 <= place.document < place.source.documents for place in places)
    assert places == sample_documents(sources, count)
    if count >= 7:
        assert {place.source.name for place in places} == set(store.sources)


def test_a_document_is_found_by_id_hash_and_url_and_shown_whole(store, records, tokenizer):
    record = next(record for record in records if record["id"] == "el-77")
    for wanted in ("el-77", hashlib.sha256(record["text"].encode()).hexdigest(), record["url"]):
        (place,) = find_documents(chosen_sources(store), wanted)
        assert (place.source.name, place.source.document(place.document).id) == ("el", "el-77")
        text = shown(inspect_store, store, find=wanted, tokenizer=tokenizer.model_path, width=500)
        assert record["text"] in text.replace(" \n", "\n") or record["text"].split("\n")[0] in text
        assert all(part in text for part in (record["url"], record["licence"], record["source"], "el-77"))
    for wanted in ("el-777", "0" * 64, "https://example.org/el/78"):
        with pytest.raises(UserError, match=f"has no document '{wanted}'; give the id, SHA-256 or URL"):
            inspect_store(store, Console(file=io.StringIO()), find=wanted, tokenizer=tokenizer.model_path)
    with pytest.raises(UserError, match="has no document 'el-77' in mt;"):
        inspect_store(store, Console(file=io.StringIO()), source="mt", find="el-77", tokenizer=tokenizer.model_path)


def test_a_long_document_is_cut_and_what_drives_terminals_is_not_printed(tokenizer, tmp_path):
    text = "[bold]\x1b[31mred\x07 " + "Ω" * 5000
    ids = tokenizer.encode(text)
    writer = StoreWriter(tmp_path, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size)
    document = Document(text, "\x1b]0;x", "el", "letters", "CC0-1.0", collected="2024-02-03")
    counts = {"byte_length": len(text.encode()), "characters": len(text), "fallback": 0}
    writer.add("el", document, np.array([1, *ids, 2]), sha256=hashlib.sha256(text.encode()).digest(), **counts)
    writer.close()
    store = TokenStore.open(tmp_path)
    sample = shown(inspect_store, store, documents=3, tokenizer=tokenizer.model_path)
    whole = shown(inspect_store, store, find="\x1b]0;x", tokenizer=tokenizer.model_path)
    for output in (sample, whole):
        assert "[bold]␛[31mred␇" in output
        assert "2024-02-03" in output
        assert not set(output) & {"\x1b", "\x07", "\ufffd"}
    assert "..." in sample
    assert 100 < sample.count("Ω") <= 1000
    assert whole.count("Ω") == 5000


def test_text_is_never_decoded_with_another_tokenizer(store, tokenizer, corpus_dir, tmp_path):
    other = train_tokenizer(corpus_dir, tmp_path / "other", vocab_size=600)
    with pytest.raises(
        UserError, match=f"was made with the tokenizer {tokenizer.sha256[:12]} and .* is {other.sha256[:12]}"
    ):
        inspect_store(store, Console(file=io.StringIO()), documents=1, tokenizer=other.model_path)
    with pytest.raises(
        UserError, match=r"holds tokens; to read their text give the tokenizer that made them \(--tokenizer\)"
    ):
        inspect_store(store, Console(file=io.StringIO()), documents=1)


def test_a_sound_store_is_said_to_be_sound_and_damage_is_named(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    assert "files are as they were written" in shown(verify_store, TokenStore.open(copy), width=500)
    damaged = next((copy / "el").glob("tokens*.bin"))
    content = bytearray(damaged.read_bytes())
    content[7] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"el/{damaged.name}"):
        verify_store(TokenStore.open(copy), Console(file=io.StringIO()))


def test_everything_fits_a_terminal(store, tokenizer):
    text = shown(inspect_store, store, documents=4, tokenizer=tokenizer.model_path, width=80)
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "sources" in text
