"""What is written is read back; what cannot be read is refused with its file and line."""

import hashlib
import json
from itertools import islice

import pytest
import zstandard

from eurollm_jax.corpus.reading.sources import Document, read_documents, write_documents
from eurollm_jax.errors import UserError

DOCUMENTS = [
    Document("Здравей,\nсвят!  Два интервала.", "a/1", "bg", "мой source", "CC0-1.0"),
    Document("Tab\tund \u2028 Zeilentrenner", "a/2", "de", "s", "MIT", "https://example.org/2"),
    Document("🙂 Ħelu", "a/3", "mt", "s", "Apache-2.0 OR MIT", "", "2021-05-12", {"score": 0.5, "tags": ["a"]}),
]


def refusal(path, **arguments) -> str:
    with pytest.raises(UserError) as error:
        list(read_documents(path, **arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl", "new/folder/x.jsonl.zst"])
def test_round_trip(tmp_path, name):
    assert write_documents(tmp_path / name, DOCUMENTS) == 3
    assert list(read_documents(tmp_path / name)) == DOCUMENTS
    assert [entry.name for entry in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_fields_by_their_other_names_and_extra_fields(tmp_path):
    record = {"text": "Tere", "lang": "ekk_Latn", "license": "CC0-1.0", "id": 7, "url": None, "score": 0.5}
    (tmp_path / "web.jsonl").write_text("\ufeff" + json.dumps(record) + "\r\n\n")
    assert list(read_documents(tmp_path / "web.jsonl")) == [
        Document("Tere", "7", "et", "web", "CC0-1.0", metadata={"score": 0.5})
    ]


def test_arguments_fill_what_a_document_does_not_say(tmp_path):
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "Tere"}\n{"text": "Head aega", "source": "own", "licence": "MIT", "language": "est"}')
    first, second = read_documents(file, language="ekk", source="web 2026", licence="CC0-1.0")
    stable = hashlib.sha256(b"Tere").hexdigest()[:16]
    assert first == Document("Tere", f"web 2026/{stable}", "et", "web 2026", "CC0-1.0")
    assert (second.language, second.source, second.licence) == ("et", "own", "MIT")


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    (tmp_path / "book.txt").write_bytes("Первая строка\r\n\r\nвторая\n".encode())
    (document,) = read_documents(tmp_path / "book.txt", language="uk")
    assert document.text == "Первая строка\r\n\r\nвторая\n"
    assert (document.source, document.licence) == ("book", "unknown")


def test_a_folder_is_read_in_the_order_of_its_names_without_its_subfolders(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.jsonl.zst"):
        text = name if name == "b.txt" else json.dumps({"text": name})
        data = zstandard.compress(text.encode()) if name.endswith(".zst") else text.encode()
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("about")
    write_documents(tmp_path / "heldout/d.jsonl", DOCUMENTS)
    assert [document.text for document in read_documents(tmp_path, language="de")] == [
        "a.jsonl",
        "b.txt",
        "c.jsonl.zst",
    ]


def test_lines_longer_than_a_chunk_and_several_zstd_frames(tmp_path):
    texts = ["ж" * 3_000_000, "short", "é" * 900_000]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(zstandard.compress(line) for line in lines))
    (tmp_path / "y.jsonl").write_bytes(b"".join(lines).rstrip(b"\n"))
    for name in ("x.jsonl.zst", "y.jsonl"):
        assert [document.text for document in read_documents(tmp_path / name, language="de")] == texts


def test_reading_streams(tmp_path):
    """The first documents come before a later error is met, so the file is not read whole."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 500_000 + "{")
    assert len(list(islice(read_documents(tmp_path / "x.jsonl", language="en"), 1000))) == 1000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'["a"]', "not a JSON object"),
        (b'{"txt": "a"}', "no field 'text'; did you mean 'txt'?"),
        (b'{"text": null}', "no field 'text'"),
        (b'{"text": ["a"]}', "JSON array"),
        (b'{"text": 1}', "JSON number"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a\\u0000b"}', "character 2 of the text is NUL (U+0000)"),
        (b'{"text": "a\x00b"}', "not valid JSON (Invalid control character at"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"text": "a\xe9b"}', "not UTF-8 (byte 12 of the line is 0xe9)"),
        (b'{"text": "a", "language": "zz"}', "unknown language 'zz'"),
        (b'{"text": "a", "language": "fr"}', "'fr', but 'de' was asked for"),
        (b'{"text": "a", "source": {}}', "'source' is a JSON object"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, said, suffix):
    content = b'{"text": "gut"}\n\n' + line + b"\n"
    file = tmp_path / f"x{suffix}"
    file.write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
    message = refusal(file, language="de")
    assert f"{file}, line 3" in message
    assert said in message


def test_bad_files_and_folders(tmp_path):
    good = tmp_path / "good.jsonl.zst"
    write_documents(good, DOCUMENTS)
    assert "did you mean 'good.jsonl.zst'?" in refusal(tmp_path / "god.jsonl.zst")
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal(tmp_path / "nowhere/at/all.jsonl")

    (tmp_path / "cut.jsonl.zst").write_bytes(good.read_bytes()[:-9])
    assert "cut off" in refusal(tmp_path / "cut.jsonl.zst")
    (tmp_path / "not.jsonl.zst").write_bytes(b'{"text": "a"}\n')
    assert "not valid zstd" in refusal(tmp_path / "not.jsonl.zst")
    (tmp_path / "none.jsonl").write_text("\n")
    assert "no documents" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "none.txt").write_text(" \n")
    assert "empty" in refusal(tmp_path / "none.txt", language="de")
    (tmp_path / "latin.txt").write_bytes(b"gut\ngr\xfcn")
    assert "latin.txt, line 2 is not UTF-8" in refusal(tmp_path / "latin.txt", language="de")
    (tmp_path / "plain.txt").write_text("gut")
    assert "no language" in refusal(tmp_path / "plain.txt")
    assert "unknown language 'zz'" in refusal(tmp_path / "plain.txt", language="zz")
    (tmp_path / "book.pdf").write_text("%PDF")
    assert "no kind that can be read" in refusal(tmp_path / "book.pdf", language="de")

    (tmp_path / "folder/train").mkdir(parents=True)
    assert "has no .jsonl" in refusal(tmp_path / "folder")
    write_documents(tmp_path / "folder/train/de.jsonl", DOCUMENTS)
    assert f"did you mean {tmp_path / 'folder/train'}?" in refusal(tmp_path / "folder")
    (tmp_path / "folder/train/more.csv").write_text("text")
    assert "more.csv cannot be read here" in refusal(tmp_path / "folder/train")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    write_documents(path, DOCUMENTS)
    before = path.read_bytes()

    def interrupted():
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(path, interrupted())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        write_documents(tmp_path / "x.txt", DOCUMENTS)
