"""However the work is divided, stopped or repeated, the store is the one that a plain loop over documents writes."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from random import Random

import pytest

from eurollm_jax.corpus.preparing import encoding, work_plan
from eurollm_jax.corpus.preparing.finalize import finalize
from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare, prepare_task
from eurollm_jax.corpus.reading.sources import Defaults, read_documents
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(work_plan, "UNIT_BYTES", (20_000, 20_000))


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_record(folder):
    return {path: content for path, content in tree(folder).items() if path.name != "prepare.json"}


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_the_store_of_a_plain_loop(plain_loop, corpus_dir, tokenizer, tmp_path, workers):
    store = prepare(corpus_dir, tokenizer, tmp_path / "out", workers=workers)
    assert without_record(store.path) == plain_loop(corpus_dir, tokenizer, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_tasks_in_any_order_write_the_store_of_one(corpus_dir, tokenizer, tmp_path):
    tasks = list(range(7))
    Random(1).shuffle(tasks)
    done = [prepare_task(corpus_dir, tokenizer, tmp_path / "out", task=task, of=7, workers=1) for task in tasks]
    assert sum(done) > 10
    assert not (tmp_path / "out").exists()
    finalize(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    one = prepare(corpus_dir, tokenizer, tmp_path / "one", workers=1)
    assert without_record(tmp_path / "out") == without_record(one.path)


@pytest.mark.parametrize("shard_tokens", [50, 1000, 30_000])
def test_shards_are_cut_as_one_writer_cuts_them(plain_loop, corpus_dir, tokenizer, tmp_path, shard_tokens):
    prepare_task(corpus_dir, tokenizer, tmp_path / "out", task=0, of=1, workers=1)
    finalize(tmp_path / "out", workers=1, shard_tokens=shard_tokens).verify()
    expected = plain_loop(corpus_dir, tokenizer, tmp_path / "plain", shard_tokens=shard_tokens)
    assert without_record(tmp_path / "out") == expected


def test_sources_by_origin_are_named_after_language_and_origin(tokenizer, tmp_path):
    origins = ["hplt", "../up", "a b/c", "..."]
    write(tmp_path / "in.jsonl", [{"text": f"text {n}", "language": "fi", "source": o} for n, o in enumerate(origins)])
    store = prepare(tmp_path / "in.jsonl", tokenizer, tmp_path / "out", PrepareOptions(by="origin"))
    assert sorted(store.sources) == ["fi/_", "fi/_up", "fi/a_b_c", "fi/hplt"]
    assert store.sources["fi/_up"].origin_table[0]["origin"] == "../up"
    store.verify()


def test_duplicates_of_all_sources_are_dropped_but_the_first(plain_loop, tokenizer, tmp_path, capsys):
    dice = Random(5)
    records = [
        {"text": f"sentence {dice.randrange(300)} of many", "language": dice.choice(["de", "en"]), "source": o, "id": i}
        for i, o in ((f"{i}", dice.choice("abc")) for i in range(1500))
    ]
    for number in range(6):
        write(tmp_path / "in" / f"{number}.jsonl", records[number * 250 : number * 250 + 250])
    options = PrepareOptions(by="origin", deduplicate=True)
    store = prepare(tmp_path / "in", tokenizer, tmp_path / "out", options, workers=1)
    seen: set[str] = set()
    expected = plain_loop(
        tmp_path / "in",
        tokenizer,
        tmp_path / "plain",
        by=lambda document: f"{document.language}/{document.source}",
        wanted=lambda document: not (document.text in seen or seen.add(document.text)),
    )
    assert len(seen) < 301
    assert without_record(store.path) == expected
    result = json.loads((store.path / "prepare.json").read_text())
    assert sum(result["duplicates"].values()) == 1500 - len(seen)
    assert f"{1500 - len(seen):,} documents dropped as duplicates" in capsys.readouterr().err


def test_blocked_documents_are_left_out_and_counted(plain_loop, corpus_dir, tokenizer, tmp_path, capsys):
    texts = [json.loads(line)["text"] for line in (corpus_dir / "mt.jsonl").read_text(encoding="utf-8").splitlines()]
    hashes = {hashlib.sha256(texts[n].encode()).hexdigest() for n in (0, 77)}
    url = "https://example.org/el/31"
    (tmp_path / "block.txt").write_text("\n".join([*hashes, url]))
    store = prepare(corpus_dir, tokenizer, tmp_path / "out", PrepareOptions(blocklist=tmp_path / "block.txt"))

    def wanted(document):
        return document.url != url and hashlib.sha256(document.text.encode()).hexdigest() not in hashes

    assert without_record(store.path) == plain_loop(corpus_dir, tokenizer, tmp_path / "plain", wanted=wanted)
    assert "3 documents dropped by the block-list: el 1, mt 2" in capsys.readouterr().err
    (tmp_path / "block.txt").write_text(url)
    with pytest.raises(UserError, match="blocklist differs"):
        prepare(corpus_dir, tokenizer, tmp_path / "out", PrepareOptions(blocklist=tmp_path / "block.txt"))


def test_bad_documents_are_skipped_on_request_and_recorded(tokenizer, tmp_path, capsys):
    good = [{"text": f"text {n}", "language": "mt", "id": str(n)} for n in range(40)]
    for number in range(4):
        write(tmp_path / "in" / f"{number}.jsonl", good[number * 10 : number * 10 + 10])
    with (tmp_path / "in" / "2.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            '{"text": 7, "language": "mt"}\n{"text": "odd \\ufdd0", "language": "mt", "id": "odd"}\n{"text": 8}\n'
        )
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"2\.jsonl, line 11: field 'text' is a JSON number"):
        prepare(tmp_path / "in", tokenizer, out)
    store = prepare(tmp_path / "in", tokenizer, out, PrepareOptions(bad_documents="skip"))
    assert [store.sources["mt"].document(n).id for n in range(40)] == [record["id"] for record in good]
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert [entry["input"].endswith("in/2.jsonl") for entry in refused] == [True] * 3
    found = [entry["reason"] for entry in refused]
    assert "line 11: field 'text'" in found[0]
    assert any("document odd: the text cannot be encoded: character 5 is U+FDD0" in reason for reason in found)
    assert "3 documents refused" in capsys.readouterr().err
    with pytest.raises(UserError, match="was made without 3 bad documents"):
        prepare(tmp_path / "in", tokenizer, out)


def begun(inputs, tokenizer, out):
    """Work of which a part is done."""
    prepare_task(inputs, tokenizer, out, task=0, of=3, workers=1)
    return out.with_name("out.parts")


def test_finished_units_are_not_done_again(corpus_dir, tokenizer, store, tmp_path):
    work = begun(corpus_dir, tokenizer, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    for task in range(3):
        prepare_task(corpus_dir, tokenizer, tmp_path / "out", task=task, of=3, workers=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert prepare(corpus_dir, tokenizer, tmp_path / "out").fingerprint == store.fingerprint


def test_a_touched_or_copied_input_is_the_same_and_a_changed_one_is_refused(corpus_dir, tokenizer, store, tmp_path):
    inputs = tmp_path / "in"
    shutil.copytree(corpus_dir, inputs)
    begun(inputs, tokenizer, tmp_path / "out")
    for file in inputs.iterdir():
        os.utime(file)
    content = (inputs / "bg.jsonl").read_bytes()
    (inputs / "bg.jsonl").write_bytes(content.replace(b"CC0-1.0", b"CC0-1.1", 1))
    for call in (
        lambda: prepare(inputs, tokenizer, tmp_path / "out"),
        lambda: prepare_task(inputs, tokenizer, tmp_path / "out", task=0, of=3),
    ):
        with pytest.raises(UserError, match=r"out\.parts was begun with other data: .*in/bg\.jsonl differs \("):
            call()
    (inputs / "bg.jsonl").write_bytes(content)
    assert prepare(inputs, tokenizer, tmp_path / "out").fingerprint == store.fingerprint

    shutil.move(inputs, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "in")
    before = tree(tmp_path / "out")
    prepare(inputs, tokenizer, tmp_path / "out")
    (inputs / "bg.jsonl").write_bytes(content.replace(b"CC0-1.0", b"CC0-1.1", 1))
    with pytest.raises(UserError, match=r"holds the store of other data: .*in/bg\.jsonl differs \("):
        prepare(inputs, tokenizer, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_an_input_that_changes_before_finalize_is_refused(corpus_dir, tokenizer, tmp_path):
    inputs = tmp_path / "in"
    shutil.copytree(corpus_dir, inputs)
    prepare_task(inputs, tokenizer, tmp_path / "out", task=0, of=1, workers=1)
    content = (inputs / "mt.jsonl").read_bytes()
    (inputs / "mt.jsonl").write_bytes(content[:-3] + b'x"}'[-3:])
    with pytest.raises(UserError, match=r"mt\.jsonl differs \(.*since unit"):
        finalize(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_work_of_other_options_or_another_tokenizer_is_refused(corpus_dir, tokenizer, tmp_path):
    begun(corpus_dir, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"out\.parts holds unfinished work on other data: by differs"):
        prepare(corpus_dir, tokenizer, tmp_path / "out", PrepareOptions(by="origin"))
    with pytest.raises(UserError, match=r"unfinished work on other data: mt\.jsonl is missing now"):
        prepare([corpus_dir / f"{name}.jsonl" for name in ("bg", "de", "el", "en")], tokenizer, tmp_path / "out")
    other = type(tokenizer)(tokenizer.model_path, tokenizer.model)
    other.sha256 = "0" * 64
    with pytest.raises(UserError, match=r"unfinished work on other data: tokenizer differs"):
        prepare(corpus_dir, other, tmp_path / "out")


def test_finalize_names_what_is_missing_and_the_command(corpus_dir, tokenizer, tmp_path):
    work = begun(corpus_dir, tokenizer, tmp_path / "out")
    done = len(list((work / "units").iterdir()))
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ units \(1, 2, 4, 5, 7 and .* more\); .*eurollm corpus prep"):
        finalize(tmp_path / "out")
    assert len(list((work / "units").iterdir())) == done


def test_a_damaged_unit_is_named(corpus_dir, tokenizer, tmp_path):
    prepare_task(corpus_dir, tokenizer, tmp_path / "out", task=0, of=1, workers=1)
    shard = next((tmp_path / "out.parts" / "units").glob("*/el/tokens-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard} is damaged; delete its unit's folder and prepare again"):
        finalize(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(shard.parents[1])
    prepare(corpus_dir, tokenizer, tmp_path / "out", workers=1).verify()


def test_a_killed_worker_is_an_error_and_what_is_done_stays(corpus_dir, tokenizer, store, tmp_path):
    out = tmp_path / "out"
    raised: list[BaseException] = []

    def run():
        try:
            prepare(corpus_dir, tokenizer, out, workers=2)
        except UserError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    units = tmp_path / "out.parts" / "units"
    while not (units.exists() and any(not unit.name.startswith(".") for unit in units.iterdir())):
        time.sleep(0.001)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    thread.join()
    assert "a worker process was killed" in str(raised[0])
    assert "what is done stays" in str(raised[0])
    assert any(not unit.name.startswith(".") for unit in units.iterdir())
    assert prepare(corpus_dir, tokenizer, out, workers=1).fingerprint == store.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named_and_what_is_done_stays(corpus_dir, tokenizer, store, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for language in ("bg", "de"):
        shutil.copy(corpus_dir / f"{language}.jsonl", inputs)
    write(inputs / "el.jsonl", [{"text": "μεγάλο κείμενο " * 20_000, "language": "el"}])
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from eurollm_jax.corpus.preparing import work_plan; work_plan.UNIT_BYTES = (20_000, 20_000)\n"
        "from eurollm_jax.corpus.preparing.prepare import prepare\n"
        "from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "prepare(Path(sys.argv[1]), Tokenizer.load(Path(sys.argv[2])), Path(sys.argv[3]), workers=1)"
    )
    command = [sys.executable, "-c", script, inputs, tokenizer.model_path, tmp_path / "out"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert "UserError: there is no room to write" in said
    assert "out.parts/units/" in said
    assert "run the same command again: what is done stays" in said
    done = [unit.name for unit in (tmp_path / "out.parts" / "units").iterdir()]
    assert len(done) >= 4
    prepare(inputs, tokenizer, tmp_path / "out", workers=1).verify()


def test_a_long_document_has_the_ids_of_one_encoded_at_once(tokenizer, tmp_path, monkeypatch, corpus_dir):
    texts = [document.text for document in read_documents(corpus_dir, language=None)]
    long = " ▁\n".join(texts)
    write(tmp_path / "in.jsonl", [{"text": text, "language": "de"} for text in (texts[0], long, texts[1])])
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    store = prepare(tmp_path / "in.jsonl", tokenizer, tmp_path / "out", workers=1)
    source = store.sources["de"]
    assert source.document_tokens(1).tolist() == [1, *tokenizer.encode(long).tolist(), 2]
    assert tokenizer.decode(source.document_tokens(1)) == long
    assert source.byte_lengths[1] == len(long.encode())
    assert source.find_sha256(hashlib.sha256(long.encode()).hexdigest()).tolist() == [1]


@pytest.mark.slow
def test_a_document_of_200_megabytes_needs_less_than_2_gigabytes(tokenizer, tmp_path):
    text = "Għada mmorru l-baħar, ħdejn il-port. 12345\n" * 4_600_000
    assert len(text.encode()) > 200e6
    write(tmp_path / "in.jsonl", [{"text": text, "language": "mt", "id": "big"}, {"text": "x", "language": "mt"}])
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from eurollm_jax.corpus.preparing.prepare import prepare\n"
        "from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer\n"
        "prepare(Path(sys.argv[1]), Tokenizer.load(Path(sys.argv[2])), Path(sys.argv[3]), workers=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, tmp_path / "in.jsonl", tokenizer.model_path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) / 1e6:.2f} GB")
    assert int(done.stdout) < 2_000_000
    source = TokenStore.open(tmp_path / "out").sources["mt"]
    assert source.byte_lengths.tolist() == [len(text.encode()), 1]
    assert hashlib.sha256(tokenizer.decode_bytes(source.document_tokens(0))).digest() == source.sha256[0].tobytes()


def test_defaults_fill_in_what_documents_do_not_say(tokenizer, tmp_path):
    write(tmp_path / "in.jsonl", [{"body": "Tere!"}])
    options = PrepareOptions(language="est", source="web", licence="CC0-1.0", fields={"text": "body"})
    store = prepare(str(tmp_path / "*.jsonl"), tokenizer, tmp_path / "out", options)
    document = store.sources["et"].document(0)
    assert (document.origin, document.licence) == ("web", "CC0-1.0")
    assert options.defaults == Defaults("et", "web", "CC0-1.0", {"text": "body"})
