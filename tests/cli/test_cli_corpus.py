"""The commands for corpora and mixtures, from text to a store that is looked into, checked, exchanged and mixed."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.store import TokenStore
from eurollm_jax.data.datamix import read_datamix
from eurollm_jax.data.loader import open_data
from eurollm_jax.experiment import load_experiment

CHANGED = """
from dataclasses import replace
from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.data.datamix import datamix
EXPERIMENT = replace(EXPERIMENT, name="other", data=replace(EXPERIMENT.data, {changes}), parity=Parity({parity}))
"""


@dataclass(frozen=True)
class Work:
    """A folder in which a test may do what it likes, with a tokenizer, a store and the source of an experiment."""

    folder: Path
    source: str

    def experiment(self, parity: str = "", **data: str) -> Path:
        """A file of the experiment with these expressions for its parity and the fields of its data."""
        changes = ", ".join(f"{name}={value}" for name, value in data.items())
        path = self.folder / "experiments/other.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.source + CHANGED.format(changes=changes, parity=parity))
        return path


@pytest.fixture
def work(source_of, tokenizer, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "store").symlink_to(store.path)
    (tmp_path / "tokenizer").symlink_to(tokenizer.model_path.parent)
    return Work(tmp_path, source_of(tmp_path))


@pytest.fixture
def copied(work, store):
    """A copy of the store that may be damaged."""
    shutil.copytree(store.path, work.folder / "copied")
    return work.folder / "copied"


def lines_of(said, *names):
    """The cells of the line of a table that begins with each name."""
    found = {}
    for name in names:
        (found[name],) = (line.split() for line in said.out.splitlines() if line.split()[:1] == [name])
    return found


# Preparing


def test_tokenizers_and_stores_are_made_of_the_same_inputs(call, refusal, work, corpus_dir):
    """Several inputs, a pattern among them, with columns of other names and a bad document."""
    pq.write_table(pa.table({"content": ["Gut.", "Sehr gut."]}), work.folder / "de-web.parquet")
    (work.folder / "fi").mkdir()
    (work.folder / "fi/news.jsonl").write_text('{"content": "Hyvää päivää"}\n{"content": "a\\u0000b"}\n')
    inputs = ("de-web.parquet", work.folder / "f*/*.jsonl", "--field", "text=content")
    commands = (
        ("tokenizer", "train", *inputs, "--vocab-size", 300, "--out", "tok"),
        ("tokenizer", "report", "tokenizer", *inputs, "--json", "report.json"),
        ("corpus", "prepare", *inputs, "--tokenizer", "tokenizer", "--out", "made", "--by", "origin"),
    )
    for command in commands:
        assert "news.jsonl, line 2: character 2 of the text is NUL" in refusal(work.folder, *command)
        assert "--field a: write it as OURS=THEIRS" in refusal(work.folder, *command, "--field", "a")
        without = [part for part in command if part not in ("--field", "text=content")]
        assert "has no field 'text'" in refusal(work.folder, *without)
        said = call(*command, "--bad-documents", "skip")
        assert said.status == 0, said
        assert "1 documents refused" in said.err
    assert {row["language"]: row["bytes"] for row in json.loads(Path("report.json").read_text())["languages"]} == {
        "de": len("Gut.Sehr gut."),
        "fi": len("Hyvää päivää".encode()),
    }
    sources = TokenStore.open(Path("made")).sources
    assert {name: source.documents for name, source in sources.items()} == {"de/de-web": 2, "fi/news": 1}
    assert json.loads(Path("tok/training.json").read_text())["languages"].keys() == {"de", "fi"}


def test_tasks_and_finalize_give_the_store_of_one_command(call, refusal, work, corpus_dir, store):
    prepare = ("corpus", "prepare", corpus_dir, "--tokenizer", "tokenizer", "--out", "array")
    assert "--task and --of belong together" in refusal(work.folder, *prepare, "--task", 1)
    assert "there is no task 2 of 2; tasks are numbered from 0 to 1" in refusal(
        work.folder, *prepare, "--task", 2, "--of", 2
    )
    assert "there is no work at array.parts; begin it with" in refusal(work.folder, "corpus", "finalize", "array")
    assert call(*prepare, "--task", 1, "--of", 2).status == 0
    assert "lacks 1 of 1 units (0); make them with: eurollm corpus prepare" in refusal(
        work.folder, "corpus", "finalize", "array"
    )
    said = call(*prepare, "--task", 0, "--of", 2)
    assert "task 0 of 2 has done its 1 of 1 units" in said.out
    assert "array.parts holds unfinished work on other data: deduplicate differs (false then, true now)" in refusal(
        work.folder, *prepare, "--deduplicate"
    )
    tokens = sum(source.tokens for source in store.sources.values())
    for _ in range(2):
        said = call("corpus", "finalize", "array")
        assert (said.status, said.out) == (0, f"array: {tokens:,} tokens of 5 sources\n")
    assert TokenStore.open(Path("array")).fingerprint == store.fingerprint


def test_duplicates_and_blocked_documents_are_left_out(call, refusal, work, corpus_dir):
    texts = [json.loads(line) for line in (corpus_dir / "de.jsonl").read_text().splitlines()]
    Path("de.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*texts, *texts[:7]]))
    sha256 = hashlib.sha256(texts[0]["text"].encode()).hexdigest()
    Path("blocked.txt").write_text(f"{sha256}  # asked for\n{texts[1]['url']}\n")
    prepare = ("corpus", "prepare", "de.jsonl", "--tokenizer", "tokenizer", "--deduplicate", "--out")
    said = call(*prepare, "less", "--blocklist", "blocked.txt")
    assert said.status == 0
    assert "5 documents dropped as duplicates: de 5" in said.err
    assert "4 documents dropped by the block-list: de 4" in said.err
    assert TokenStore.open(Path("less")).sources["de"].documents == len(texts) - 2
    assert "nowhere.txt" in refusal(work.folder, *prepare, "s", "--blocklist", "nowhere.txt")


# Looking and checking


def test_inspect_prints_what_there_is_and_finds_documents(call, refusal, work, store):
    for columns in ("80", "100"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", columns)
            said = call("corpus", "inspect", store.path)
        for name, cells in lines_of(said, *store.sources).items():
            source = store.sources[name]
            assert cells[1] == str(source.documents)
            assert f"{source.bytes / source.tokens:.2f}" in cells
            assert f"{source.fallback / source.tokens:.2%}" in cells
    known = store.sources["mt"].document(7)
    for wanted in (known.id, known.sha256, known.url):
        said = call("corpus", "inspect", store.path, "--find", wanted, "--tokenizer", "tokenizer")
        assert said.status == 0
        assert f"sha256   {known.sha256}" in said.out
        assert "7. " in said.out
    said = call("corpus", "inspect", store.path, "--documents", 3, "--source", "el", "--tokenizer", "tokenizer")
    assert said.out.count("sha256 ") == 3
    for options, sentence in (
        (("--find", "nothing", "--tokenizer", "tokenizer"), "has no document 'nothing'"),
        (("--source", "ell"), "has no source or language 'ell'; did you mean 'el'?"),
        (("--documents", 3), "give the tokenizer that made them"),
        (("--documents", -3, "--tokenizer", "tokenizer"), "--documents is -3; give 0 or more"),
    ):
        assert sentence in refusal(work.folder, "corpus", "inspect", store.path, *options)


def test_verify_names_every_fault_of_the_store_and_of_its_plans(call, refusal, work, copied):
    assert call("corpus", "pack", copied, "--length", 32).status == 0
    said = call("corpus", "verify", copied)
    assert said.status == 0
    assert "files are as they were written" in said.out
    assert "5 best-fit plans are as they were written" in said.out

    def flip(path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)

    flip(copied / "el/tokens-00000.bin", 77)
    flip(copied / "packings/best-fit-32/mt.plan/starts.npy", -1)
    (copied / "packings/best-fit-32/de.plan/lengths.npy").unlink()
    (copied / "de/urls.bin").unlink()
    cut = copied / "bg/offsets.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    sentence = refusal(work.folder, "corpus", "verify", copied)
    for part in ("el/tokens-00000.bin is not as", "de/urls.bin is missing", "bg/offsets.npy has", "mt.plan", "de.plan"):
        assert part in sentence
    assert "en" not in sentence.replace("been", "").split()
    flip(copied / "manifest.json", -100)
    assert "manifest.json" in refusal(work.folder, "corpus", "verify", copied)


def test_pack_plans_rows_and_compares_them(call, refusal, work, copied, store):
    said = call("corpus", "pack", copied, "--length", 32)
    assert said.status == 0
    for name, source in store.sources.items():
        concat, best_fit = (line.split() for line in said.out.splitlines() if line.split()[:1] == [name])
        predictions = np.diff(source.offsets) - 1
        assert (concat[1], best_fit[1]) == ("concat", "best-fit")
        assert int(concat[2]) == -(-(source.tokens - 1) // 32)
        assert best_fit[4] == f"{(predictions > 32).mean():.2%}"
        assert best_fit[5] == "0.00%"
        assert (copied / f"packings/best-fit-32/{name}.plan/plan.json").is_file()
    assert "give a length of 1 or more" in refusal(work.folder, "corpus", "pack", copied, "--length", 0)
    assert "make one with 'eurollm corpus prepare'" in refusal(work.folder, "corpus", "pack", "no", "--length", 8)


# Mixing


MIXTURE = "Mixture.temperature(0.5, over='family').floor({'mt': 0.4})"
STAGED = MIXTURE + ".stage(at_row=16, mixture=Mixture.shares({'el': 0.5, 'bg': 0.5}), ramp_rows=8)"


def test_mix_show_prints_each_stage_and_show_its_whole_run_alike(call, work):
    experiment = work.experiment(mixture=STAGED)
    said, shown = call("mix", "show", experiment), call("show", experiment)
    assert said.status == shown.status == 0
    loaded, _ = load_experiment(experiment)
    assert repr(loaded.data.mixture) == said.out.partition("The whole run")[0].replace("\n", "").strip()
    titles = [line for line in said.out.splitlines() if line.startswith(("The whole", "Stage", "Ramp"))]
    assert [title.split(":")[0] for title in titles] == [
        "The whole run",
        "Stage from row 0 to 16",
        "Ramp from row 16 to 24",
        "Stage from row 24 to 32",
    ]
    whole = said.out[said.out.index("The whole run") : said.out.index("Stage from row 0")].strip()
    assert whole in shown.out
    assert f"Stage by stage: eurollm mix show {experiment}" in shown.out
    last = said.out[said.out.index("Stage from row 24") :]
    for code in ("el", "bg"):
        (cells,) = (line.split() for line in last.splitlines() if line.split()[:1] == [code])
        assert cells[1:4] == ["50.0", "%", "4"]
    first = said.out[said.out.index("Stage from row 0") : said.out.index("Ramp")]
    assert "floor" in next(line for line in first.splitlines() if line.split()[:1] == ["mt"])


def test_several_stores_are_mixed_unless_they_do_not_belong_together(call, refusal, work, store):
    prepare = ("corpus", "prepare", "--tokenizer", "tokenizer", "--by", "origin", "--out")
    Path("sv-web.jsonl").write_text('{"text": "Hej på dig, sa katten till hunden och gick hem."}\n')
    assert call(*prepare, "swedish", "sv-web.jsonl").status == 0
    stores = f"({str(store.path)!r}, {str(work.folder / 'swedish')!r})"
    said = call("mix", "show", work.experiment(store=stores, mixture="Mixture.shares({'sv': 0.25, 'de': 0.75})"))
    cells = lines_of(said, "sv/sv-web", "de")
    assert [cells[name][1:4] for name in ("sv/sv-web", "de")] == [["25.0", "%", "8"], ["75.0", "%", "24"]]
    twice = work.experiment(store=f"({str(store.path)!r}, 'store')")
    assert "both have a source 'bg'" in refusal(work.folder, "mix", "show", twice)


def test_a_language_that_the_tokenizer_serves_badly_is_refused_with_the_table(call, work):
    strict = "max_premium=1, allow=('bg', 'el')"
    said = call("train", work.experiment(strict, seed="0"))
    assert (said.status, said.out) == (1, "")
    sentence, *table = said.err.splitlines()
    assert sentence.startswith("eurollm: the tokenizer serves mt, de beyond the limits of parity: train")
    assert any(line.split()[:1] == ["mt"] and line.split()[-1] == "premium" for line in table)
    assert any(line.split()[:1] == ["el"] and line.rstrip().endswith("premium (allowed)") for line in table)
    assert not (work.folder / "runs").exists()
    said = call("show", work.experiment(strict, seed="0"), "--parity.allow", "mt", "de", "bg", "el")
    assert said.status == 0
    assert "premium (allowed)" in said.out


# Exchange


def test_megatron_files_and_their_blend_come_back_as_they_went(call, refusal, work, store):
    assert call("corpus", "export", store.path, "megatron").status == 0
    experiment = work.experiment(mixture="Mixture.shares({'de': 0.7, 'mt': 0.3})")
    said = call("mix", "export", experiment, "--out", "x.txt")
    assert (said.status, said.err.count("usage:")) == (2, 1)  # options come before the experiment
    said = call("mix", "export", "--out", "datamix.txt", "--prefix", work.folder / "megatron", experiment)
    assert (said.status, said.out) == (0, "datamix.txt: written\n")
    ratios = {Path(part.path).name: part.ratio for part in read_datamix("datamix.txt")}
    assert ratios == pytest.approx({"de": 0.7, "mt": 0.3}, abs=1e-3)

    said = call("corpus", "import", "datamix.txt", "--tokenizer", "tokenizer", "--out", "imported")
    assert said.status == 0
    imported = TokenStore.open(Path("imported"))
    assert {source.language for source in imported.sources.values()} == {"de", "mt"}
    for source in imported.sources.values():
        same = store.sources[source.language]
        assert np.array_equal(source.read(0, source.tokens), same.read(0, same.tokens))
        assert (source.bytes, source.fallback) == (same.bytes, same.fallback)
    assert 'The mixture of an experiment: datamix("datamix.txt"), from eurollm_jax.data.datamix' in said.out
    blended = work.experiment(store="'imported'", mixture="datamix('datamix.txt')")
    loaded, _ = load_experiment(blended)
    planned = {plan.name.split("/")[0]: plan.share for plan in open_data(loaded.data, 32).plan(32)}
    assert planned == pytest.approx({"de": 0.7, "mt": 0.3}, abs=0.04)

    assert "is there already; choose another path" in refusal(work.folder, "corpus", "export", store.path, "megatron")
    assert "stands beside other inputs; give it alone" in refusal(
        work.folder, "corpus", "import", "datamix.txt", "megatron/de", "--tokenizer", "tokenizer", "--out", "o"
    )
    both = ("megatron/de.bin", "megatron/de.idx")  # what a shell makes of megatron/*
    assert call("corpus", "import", *both, "--tokenizer", "tokenizer", "--out", "one").status == 0
    (name,) = TokenStore.open(Path("one")).sources
    assert name == f"de/{work.folder.name}"  # no hash, which tells two of the same name apart
    assert "has no dataset; export it with 'eurollm corpus export'" in refusal(
        work.folder, "mix", "export", "--out", "no.txt", work.experiment(seed="0")
    )


def test_the_text_of_a_run_trains_another_tokenizer(call, work, corpus_dir):
    experiment = work.experiment(mixture="Mixture.shares({'de': 0.5, 'mt': 0.5})")
    said = call("corpus", "text", "--rows", 24, "--out", "sample.jsonl.zst", experiment)
    assert said.status == 0
    found = list(read_documents("sample.jsonl.zst"))
    assert f"sample.jsonl.zst: {len(found)} documents, in the order of rows 0 to 24" in said.out
    texts = {document.text for document in read_documents(corpus_dir)}
    assert found
    assert {document.text for document in found} <= texts
    assert {document.language for document in found} == {"de", "mt"}
    said = call("tokenizer", "train", "sample.jsonl.zst", "--alpha", 1, "--vocab-size", 400, "--out", "other")
    assert said.status == 0, said
