"""Preparing a corpus: repeatable, lossless or refused, and never half done."""

import json
import pickle
import threading

import pytest

from eurollm_jax.corpus.folders import new_folder
from eurollm_jax.corpus.preparing.prepare import prepare
from eurollm_jax.errors import UserError


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_inputs_give_the_same_store_with_any_number_of_threads(corpus_dir, tokenizer, tmp_path):
    one, two = (prepare(corpus_dir, tokenizer, tmp_path / f"by-{workers}", workers=workers) for workers in (1, 2))
    assert tree(two.path) == tree(one.path)
    assert two.fingerprint == one.fingerprint


def test_documents_of_one_language_from_several_files_share_a_source(tokenizer, tmp_path):
    write(tmp_path / "in" / "b.jsonl", [{"text": "x", "language": "ekk"}, {"text": "y", "language": "mt"}])
    write(tmp_path / "in" / "a.jsonl", [{"text": "z", "lang": "est_Latn"}])
    store = prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    texts = {
        name: [tokenizer.decode(source.document_tokens(index)) for index in range(source.documents)]
        for name, source in store.sources.items()
    }
    assert texts == {"et": ["z", "x"], "mt": ["y"]}


def test_what_is_there_is_returned_and_never_overwritten(corpus_dir, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    write(tmp_path / "in" / "en.jsonl", [{"text": "one", "language": "en"}])
    first = prepare(tmp_path / "in", tokenizer, out)
    before = tree(out)
    assert prepare(tmp_path / "in", tokenizer, out).fingerprint == first.fingerprint
    assert "holds this store already" in capsys.readouterr().err

    write(tmp_path / "in" / "en.jsonl", [{"text": "two", "language": "en"}])
    with pytest.raises(UserError, match=r"en\.jsonl differs .*; choose another folder or delete it"):
        prepare(tmp_path / "in", tokenizer, out)
    with pytest.raises(UserError, match=r"bg\.jsonl is new"):
        prepare(corpus_dir, tokenizer, out)
    assert tree(out) == before


def test_a_store_of_another_tokenizer_is_not_returned(corpus_dir, tokenizer, store):
    other = pickle.loads(pickle.dumps(tokenizer))
    other.sha256 = "0" * 64
    with pytest.raises(UserError, match=rf"tokenizer differs \({tokenizer.sha256[:12]} then, 000000000000 now\)"):
        prepare(corpus_dir, other, store.path)


def test_a_tokenizer_that_loses_text_is_found_out(tokenizer, tmp_path):
    write(tmp_path / "in" / "en.jsonl", [{"text": text, "language": "en", "id": text} for text in ("good", "x¤")])
    lossy = pickle.loads(pickle.dumps(tokenizer))
    content, starts = lossy._content
    lossy._content = (content.copy(), starts)
    lossy._content[0][starts[lossy.encode("¤")[0]]] = ord("?")
    with pytest.raises(UserError, match=r"en\.jsonl, document x¤ does not decode to its own text"):
        prepare(tmp_path / "in", lossy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x", "language": "en"\n', r"en\.jsonl, line 2 is not valid JSON"),
        (b'{"text": "\xff", "language": "en"}\n', r"en\.jsonl, line 2 is not UTF-8"),
        (b'{"text": "x", "language": "klingon"}\n', r"en\.jsonl, line 2.*klingon"),
        (
            b'{"text": "a\\ufdd0", "language": "en", "id": "odd"}\n',
            r"en\.jsonl, document odd: the text cannot be encoded: character 2 is U\+FDD0",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tokenizer, tmp_path, line, message):
    write(tmp_path / "in" / "en.jsonl", [{"text": "fine", "language": "en"}])
    with (tmp_path / "in" / "en.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_or_empty_corpus_is_an_error(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(UserError, match=name):
            prepare(tmp_path / name, tokenizer, tmp_path / "out")


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def first():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("first")
            entered.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    try:
        with (
            pytest.raises(UserError, match=r"another process is writing .*out"),
            new_folder(tmp_path / "out") as folder,
        ):
            (folder / "b").write_text("second")
    finally:
        leave.set()
        thread.join()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
