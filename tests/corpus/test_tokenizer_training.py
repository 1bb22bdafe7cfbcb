"""Training is repeatable, fair to small languages, and says what is wrong with what it is given."""

import json
import re

import pytest

from eurollm_jax.corpus.reading.sources import find_parts
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.corpus.tokenizing.tokenizer_training import draw_sample, language_bytes, sample_sizes, train_tokenizer
from eurollm_jax.errors import UserError


def write(path, language, texts):
    path.parent.mkdir(exist_ok=True)
    records = [{"text": text, "language": language, "id": str(i)} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_call_gives_the_same_bytes(corpus_dir, tokenizer, tmp_path):
    again = train_tokenizer(corpus_dir, tmp_path / "again", vocab_size=640)
    assert again.model_path.read_bytes() == tokenizer.model_path.read_bytes()
    half = [train_tokenizer(corpus_dir, tmp_path / name, vocab_size=600, sample_bytes=100_000) for name in "ab"]
    assert half[0].sha256 == half[1].sha256
    other_seed = train_tokenizer(corpus_dir, tmp_path / "c", vocab_size=600, sample_bytes=100_000, seed=1)
    assert other_seed.sha256 != half[0].sha256


def test_what_is_there_is_returned_and_never_overwritten(corpus_dir, tmp_path, capsys):
    out = tmp_path / "tokenizer"
    first = train_tokenizer(corpus_dir, out, vocab_size=600)
    before = tree(out)
    assert train_tokenizer(corpus_dir, out, vocab_size=600).sha256 == first.sha256
    assert "holds this tokenizer already" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"vocab_size differs \(600 then, 620 now\).*choose another folder or delete it"
    ):
        train_tokenizer(corpus_dir, out, vocab_size=620)
    write(tmp_path / "corpus" / "en.jsonl", "en", ["something else"])
    with pytest.raises(UserError, match=r"another tokenizer: bg\.jsonl is missing now"):
        train_tokenizer(tmp_path / "corpus", out, vocab_size=600)
    assert tree(out) == before
    assert set(before) == {"tokenizer.model", "training.json"}

    (out / "tokenizer.model").write_bytes(before["tokenizer.model"] + b"\x08")
    with pytest.raises(UserError, match="is damaged"):
        train_tokenizer(corpus_dir, out, vocab_size=600)


def test_a_folder_of_something_else_is_left_alone(corpus_dir, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is there already"):
        train_tokenizer(corpus_dir, tmp_path / "thesis", vocab_size=600)
    assert tree(tmp_path / "thesis") == {"chapter.txt": b"years of work"}


def test_the_size_named_for_a_vocabulary_too_small_is_enough_and_no_more(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="vocab_size 300 is too small") as caught:
        train_tokenizer(corpus_dir, tmp_path / "a", vocab_size=300)
    least = int(re.search(r"ask for (\d+)", str(caught.value))[1])
    assert train_tokenizer(corpus_dir, tmp_path / "b", vocab_size=least).vocab_size == least
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(corpus_dir, tmp_path / "c", vocab_size=least - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_size_named_for_a_vocabulary_too_large_works(corpus_dir, tmp_path):
    with pytest.raises(UserError, match="vocab_size 50000 is too large") as caught:
        train_tokenizer(corpus_dir, tmp_path / "a", vocab_size=50_000)
    most = int(re.search(r"ask for (\d+)", str(caught.value))[1])
    assert train_tokenizer(corpus_dir, tmp_path / "b", vocab_size=most).vocab_size == most
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"sample_bytes": 0}, "sample_bytes is 0"),
        ({"coverage": 0.0}, "coverage is 0.0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"special_tokens": ("<s>",)}, "'<s>' is there twice"),
        ({"special_tokens": ("a b",)}, "'a b' is empty or holds a space"),
    ],
)
def test_options_out_of_range_are_refused(corpus_dir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(corpus_dir, tmp_path / "out", **{"vocab_size": 600} | options)


def test_special_tokens_have_ids_and_no_text(corpus_dir, tmp_path):
    tokenizer = train_tokenizer(corpus_dir, tmp_path / "out", vocab_size=600, special_tokens=("<|user|>", "<|a,b|>"))
    assert [(piece.name, piece.kind) for piece in tokenizer.pieces[4:6]] == [
        ("<|user|>", "control"),
        ("<|a,b|>", "control"),
    ]
    assert not {4, 5} & set(tokenizer.encode("<|user|> and <|a,b|>").tolist())
    assert tokenizer.piece_bytes[4:6].tolist() == [0, 0]


def test_a_small_language_has_its_whole_alphabet(tmp_path):
    # Georgian is a thousandth of this corpus, less than the rarest Latin letters.
    write(tmp_path / "corpus" / "en.jsonl", "en", ["the quick brown fox jumps over the lazy dog " * 30] * 100)
    write(tmp_path / "corpus" / "ka.jsonl", "ka", ["გამარჯობა მსოფლიო"])
    tokenizer = train_tokenizer(tmp_path / "corpus", tmp_path / "out", vocab_size=360)
    kinds = {tokenizer.pieces[index].kind for index in tokenizer.encode("გამარჯობა მსოფლიო")}
    assert kinds == {"text"}


def test_text_the_trainer_would_skip_or_choke_on_is_trained_on_all_the_same(tmp_path):
    # A stretch of 100,000 letters without a space, the trainer's own mark U+2585, and U+2581. NUL no corpus may hold.
    odd = ["ab" * 50_000, "nul\0here", "▅ bar", "▁▁ mark", "\n\n", "Straßenbahn Haltestelle Rathaus " * 50]
    write(tmp_path / "corpus" / "de.jsonl", "de", [text for text in odd if text.strip() and "\0" not in text])
    tokenizer = train_tokenizer(tmp_path / "corpus", tmp_path / "out", vocab_size=310)
    for text in odd:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Straßenbahn Straßenbahn")) < 12


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("total", [1, 50, 1000, 7000, 20_000])
def test_sample_sizes_are_the_capped_power_law(alpha, total):
    sizes = {"en": 10_000, "de": 3000, "mt": 40, "ga": 7}
    taken = sample_sizes(sizes, alpha, total)
    low, high = 0.0, 1e9  # the constant by bisection
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(size, middle * size**alpha) for size in sizes.values()) < total:
            low = middle
        else:
            high = middle
    assert taken == pytest.approx({name: min(size, low * size**alpha) for name, size in sizes.items()}, rel=1e-6)
    assert list(taken) == list(sizes)


def test_the_sample_has_about_the_bytes_asked_for(corpus_dir):
    parts = find_parts([corpus_dir])
    sizes = language_bytes(parts)
    wanted = {language: size / 4 if language != "mt" else float(size) for language, size in sizes.items()}
    sample = draw_sample(parts, wanted, sizes, seed=0)
    for language, lines in sample.items():
        got = sum(len(line.encode()) + 1 for line in lines)
        assert got == pytest.approx(wanted[language], rel=0.25 if language != "mt" else 0.01)


def test_without_a_size_the_sample_leaves_room_to_balance(tmp_path):
    for language, repeats in (("en", 120_000), ("mt", 2000)):
        texts = [f"{language} {number % 977} sentences " * 25 for number in range(repeats // 25)]
        write(tmp_path / "corpus" / f"{language}.jsonl", language, texts)
    train_tokenizer(tmp_path / "corpus", tmp_path / "out", vocab_size=300, alpha=0.0)
    record = json.loads((tmp_path / "out" / "training.json").read_text())["languages"]
    assert record["mt"]["sample_bytes"] >= record["mt"]["bytes"]
    assert record["en"]["sample_bytes"] == pytest.approx(1_000_000 - record["mt"]["bytes"], rel=0.1)


def test_a_bad_line_is_named(corpus_dir, tmp_path):
    write(tmp_path / "corpus" / "en.jsonl", "en", ["fine"])
    with (tmp_path / "corpus" / "en.jsonl").open("a") as file:
        file.write("{not json\n")
    with pytest.raises(UserError, match=r"en\.jsonl, line 2"):
        train_tokenizer(tmp_path / "corpus", tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "out")
