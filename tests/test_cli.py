"""The command line as a user meets it: the road from text to an exported model, and what is said when an input is bad.

Whatever is bad costs the user one sentence on standard error, an exit status that is not 0, and not a byte of a file.
"""

import contextlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from eurollm_jax import __version__
from eurollm_jax.cli import main
from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.store import TokenStore

SOURCE = '''"""Can a tiny model be trained from the command line?"""

from eurollm_jax.data.loader import DataConfig
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.experiment import Experiment
from eurollm_jax.model.transformer import TransformerConfig
from eurollm_jax.training.schedule import WSD

MIXTURE = Mixture.temperature(0.5, "bytes")
EXPERIMENT = Experiment(
    name="tiny",
    tokenizer="{folder}/tokenizer",
    data=DataConfig(store="{folder}/store", mixture=MIXTURE, sequence_length=32),
    heldout="{folder}/store",
    model=TransformerConfig(
        vocab_size=640, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=32, max_positions=160,
        compute="float32", remat="none",
    ),
    schedule=WSD(peak=1e-2, warmup=2),
    steps=4,
    batch_size=8,
    log_every=2,
    evaluate_every=4,
    evaluate_rows=2,
    checkpoint_every=4,
    runs="{folder}/runs",
)
'''
KINDS = ".jsonl, .txt (either also as .gz or .zst), .parquet or .arrow"
GOOD = '{"text": "gut", "language": "de"}\n'


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


def call(*argv) -> Said:
    """Runs one command in this process; what argparse and tyro exit with is its status too."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as stop:
            status = stop.code
    return Said(status, out.getvalue(), err.getvalue())


def contents(folder):
    """Every file's bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refusal(untouched, *argv) -> str:
    """The one sentence with which the command is refused, once `untouched` proves to be what it was."""
    before = contents(untouched)
    said = call(*argv)
    assert contents(untouched) == before
    assert (said.status, said.out) == (1, ""), said
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("eurollm: ")
    assert "Error:" not in sentence or ".py line" in sentence  # a bare Python error tells a user nothing
    return sentence.removeprefix("eurollm: ")


@pytest.fixture(autouse=True)
def _imports_of_experiments(monkeypatch):
    """An experiment's file puts the folder above its own on the path; no other test is to import from there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        del sys.modules[name]


@dataclass(frozen=True)
class Made:
    """A folder with tokenizer, store, experiments/tiny.py and runs/tiny, and what the commands said that made them."""

    folder: Path
    prepared: Said
    shown: Said
    trained: Said

    @property
    def experiment(self):
        return self.folder / "experiments/tiny.py"

    @property
    def run(self):
        return self.folder / "runs/tiny"


@pytest.fixture(scope="module")
def made(corpus_dir, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(tokenizer.model_path.parent, folder / "tokenizer")
    (folder / "experiments").mkdir()
    (folder / "experiments/tiny.py").write_text(SOURCE.format(folder=folder))
    prepared = call("corpus", "prepare", corpus_dir, "--tokenizer", folder / "tokenizer", "--out", folder / "store")
    shown = call("show", folder / "experiments/tiny.py")
    assert not (folder / "runs").exists()
    trained = call("train", folder / "experiments/tiny.py")
    return Made(folder, prepared, shown, trained)


# The road


def test_prepare_says_what_the_store_holds(made, store):
    assert made.prepared.status == 0
    assert TokenStore.open(made.folder / "store").fingerprint == store.fingerprint
    tokens = sum(source.tokens for source in store.sources.values())
    assert f"{made.folder / 'store'}: {tokens:,} tokens of 5 sources" in made.prepared.out


def test_tokenizer_train_and_report(made, corpus_dir, tokenizer, store, tmp_path):
    said = call("tokenizer", "train", corpus_dir, "--vocab-size", 640, "--out", tmp_path / "tokenizer")
    assert said.status == 0
    assert f"640 tokens, sha256 {tokenizer.sha256[:12]}" in said.out

    said = call("tokenizer", "report", tmp_path / "tokenizer", corpus_dir, "--json", tmp_path / "report.json")
    assert said.status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokenizer"]["sha256"] == tokenizer.sha256
    assert {row["language"] for row in report["languages"]} == set(store.sources)
    for row in report["languages"]:
        source = store.sources[row["language"]]
        assert (row["bytes"], row["tokens"]) == (source.bytes, source.tokens - 2 * source.documents)  # bos, eos
        (line,) = (line for line in said.out.splitlines() if line.strip().startswith(row["language"] + " "))
        assert f"{source.bytes / row['tokens']:.2f}" in line


def test_show_prints_the_question_the_plan_and_the_cost(made, store):
    assert made.shown.status == 0
    assert made.shown.out.startswith("Can a tiny model be trained from the command line?\n")
    assert '"sequence_length": 32' in made.shown.out
    # Shares of the bytes go with sqrt(bytes); a row of a language holds bytes / tokens of it.
    weights = {name: source.bytes**0.5 * source.tokens / source.bytes for name, source in store.sources.items()}
    for name, source in store.sources.items():
        cells = next(line for line in made.shown.out.splitlines() if line.startswith(f"│ {name} ")).split("│")
        rows, tokens, octets = (int(cell.replace(",", "")) for cell in cells[3:6])
        assert rows == pytest.approx(32 * weights[name] / sum(weights.values()), abs=1.68)
        assert tokens == pytest.approx(32 * rows, abs=rows)
        assert octets == pytest.approx(tokens * source.bytes / source.tokens, rel=0.01)
    layer = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16 + 3 * 16 * 32 + 2 * 16
    assert f"{2 * 640 * 16 + 2 * layer + 16:,} parameters; 32 rows of 32 tokens" in made.shown.out


def test_train_leaves_a_run_and_is_complete_the_next_time(made, caplog):
    assert made.trained.status == 0, made.trained.err
    assert "step 4/4" in made.trained.err
    assert {"experiment.json", "plan.json", "metrics.jsonl", "evaluation.json", "samples.json"} <= {
        path.name for path in made.run.iterdir()
    }
    before = contents(made.run)
    with caplog.at_level("INFO", "eurollm_jax"):
        assert call("train", made.experiment).status == 0
    assert f"{made.run} is complete: all 4 steps are trained" in caplog.text
    assert contents(made.run) == before


def test_fields_of_an_experiment_are_options(made):
    said = call("show", made.experiment, "--steps", 6, "--model.depth", 3)
    assert said.status == 0
    assert "48 rows of 32 tokens" in said.out
    assert '"depth": 3' in said.out
    listed = call("train", made.experiment, "--help")
    assert listed.status == 0
    assert "--model.depth INT" in listed.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_its_proof(made, tmp_path, dtype):
    said = call("export", made.run, tmp_path / "export", "--dtype", dtype, "--verify")
    assert said.status == 0, said
    assert said.out.startswith(f"{tmp_path / 'export'}: written\n")
    assert "FAILED" not in said.out
    assert said.out.count("│ ok │") == 8
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == dtype


def test_generate_writes_what_transformers_writes(made, tokenizer, tmp_path):
    import torch
    import transformers

    assert call("export", made.run, tmp_path / "export", "--dtype", "float32").status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", local_files_only=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    prompts = ["Die Katze [b]", "Il-qattus"]
    expected = []
    for prompt in prompts:
        ids = theirs(prompt)["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == theirs.eos_token_id:
                break
        expected.append(tokenizer.decode(ids))

    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    said = call("generate", made.run, *options, "--tokens", 12, "--temperature", 0)
    assert said.status == 0
    assert said.out == "".join(f"{text}\n" for text in expected)
    drawn = [call("generate", made.run, *options, "--tokens", 12, "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_report_prints_every_language_and_says_what_to_open(made, store):
    said = call("report", made.run)
    assert said.status == 0
    assert f"Open {made.run / 'report.html'} in a browser." in said.out
    page = (made.run / "report.html").read_text()
    evaluation = json.loads((made.run / "evaluation.json").read_text())["languages"]
    for name, source in store.sources.items():
        (line,) = (line for line in said.out.splitlines() if line.strip().startswith(evaluation[name]["name"]))
        assert f"{source.bytes:,}" in line
        assert f"{evaluation[name]['bits_per_byte']:.3f}" in line
        assert evaluation[name]["name"] in page


def test_report_of_a_run_that_is_not_finished(made, tmp_path):
    for name in ("experiment.json", "plan.json"):
        shutil.copy(made.run / name, tmp_path)
    said = call("report", tmp_path)
    assert (said.status, said.err) == (0, "")
    assert f"Open {tmp_path / 'report.html'}" in said.out


def test_a_text_file_says_its_language_by_its_name_or_folder(made, tmp_path):
    texts = {"fr.txt": "fr", "de-letters.txt": "de", "sr_Latn.2.txt": "sr-Latn", "pt_BR-news.txt": "pt"}
    for name in texts:
        (tmp_path / name).write_text(name)
    assert {document.text: document.language for document in read_documents(tmp_path)} == texts
    (tmp_path / "mt").mkdir()
    (tmp_path / "mt/book.txt").write_text("Il-qattus")
    said = call("corpus", "prepare", tmp_path / "mt", "--tokenizer", made.folder / "tokenizer", "--out", tmp_path / "s")
    assert said.status == 0
    assert TokenStore.open(tmp_path / "s").sources["mt"].bytes == len("Il-qattus")


# Bad text

BAD_TEXT = [
    ("x.jsonl", GOOD + '{"text": "a", "language": "xx"}', "x.jsonl, line 2: unknown language 'xx'; give a BCP-47 or"),
    ("x.jsonl", GOOD + '{"text": "a", "language": "gr"}', "did you mean 'el', Greek?"),
    ("x.jsonl", GOOD + '{"text": "a"}', 'x.jsonl, line 2 says no language; add a field such as "language": "fr"'),
    ("x.jsonl", GOOD + "\n" + '{"text": "a"\n', "x.jsonl, line 3 is not valid JSON ("),
    ("x.jsonl", GOOD.encode() + b'{"text": "gr\xfcn"}', "x.jsonl, line 2 is not UTF-8 (byte 13 of the line is 0xfc)"),
    ("x.jsonl", "", "x.jsonl has no documents; remove the file or fill it"),
    ("x.jsonl.zst", GOOD, "x.jsonl.zst is not valid zstd"),
    ("de.txt", "", "de.txt: the text is empty; remove it or fill it"),
    ("de.txt", b"gut\ngr\xfcn", "de.txt, line 2 is not UTF-8 (byte 3 of the line is 0xfc); convert the file to UTF-8"),
    ("letters.txt", "gut", "letters.txt says no language; begin its name with a code, as in fr-letters.txt"),
    ("fr/it-works.txt", "gut", "it-works.txt is 'it' by its name and 'fr' by its folder's; rename either"),
    ("x.csv", "gut", "x.csv is of no kind that can be read here; give .jsonl, .txt (either also as .gz or .zst),"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_TEXT, ids=range(len(BAD_TEXT)))
def test_bad_text_is_refused_by_each_command_that_reads_it(made, tmp_path, name, content, said):
    file = tmp_path / "text" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tokenizer = made.folder / "tokenizer"
    for command in (
        ("corpus", "prepare", file, "--tokenizer", tokenizer, "--out", tmp_path / "store"),
        ("tokenizer", "train", file, "--vocab-size", 640, "--out", tmp_path / "tokenizer"),
        ("tokenizer", "report", tokenizer, file, "--json", tmp_path / "report.json"),
    ):
        assert said in refusal(tmp_path, *command)


def test_text_that_is_missing_is_refused(made, corpus_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(corpus_dir, tmp_path / "data/train")
    for inputs, said in (
        (corpus_dir / "dee.jsonl", "dee.jsonl does not exist; did you mean 'de.jsonl'?"),
        (tmp_path / "nowhere/at/all", f"{tmp_path / 'nowhere'} does not exist; give a file or folder that does"),
        (tmp_path / "empty", f"empty has no {KINDS} file; give a folder of such files"),
        (tmp_path / "data", f"data has no {KINDS} file; did you mean {tmp_path / 'data/train'}?"),
    ):
        argv = ("corpus", "prepare", inputs, "--tokenizer", made.folder / "tokenizer", "--out", tmp_path / "store")
        assert said in refusal(tmp_path, *argv)


# Bad folders


def test_a_tokenizer_that_is_none_is_refused(made, corpus_dir, tmp_path):
    for folder, said in (
        (tmp_path / "nowhere", "nowhere; make one with 'eurollm tokenizer train'"),
        (corpus_dir, f"there is no tokenizer at {corpus_dir / 'tokenizer.model'}; make one with"),
        (corpus_dir / "de.jsonl", "de.jsonl is not a SentencePiece model; give the tokenizer.model of a tokenizer"),
    ):
        assert said in refusal(
            tmp_path, "corpus", "prepare", corpus_dir, "--tokenizer", folder, "--out", tmp_path / "store"
        )
        assert said in refusal(made.folder, "train", made.experiment, "--name", "new", "--tokenizer", folder)


def test_what_is_there_is_never_overwritten_by_other_data(made, corpus_dir, tmp_path):
    tokenizer = made.folder / "tokenizer"
    prepare = ("corpus", "prepare", corpus_dir / "de.jsonl", "--tokenizer", tokenizer, "--out")
    assert "store holds the store of other data: bg.jsonl is missing now" in refusal(
        made.folder, *prepare, made.folder / "store"
    )
    assert "is there already; choose another folder" in refusal(corpus_dir, *prepare, corpus_dir)
    assert "de.jsonl is there already" in refusal(corpus_dir, *prepare, corpus_dir / "de.jsonl")
    assert "tiny.py cannot be used (File exists): give another path" in refusal(
        made.folder, *prepare, made.experiment / "store"
    )
    train = ("tokenizer", "train", corpus_dir, "--vocab-size", 640, "--out")
    assert "is there already; choose another folder" in refusal(corpus_dir, *train, corpus_dir)
    assert "nowhere is not a folder: make it" in refusal(
        tmp_path, "tokenizer", "report", tokenizer, corpus_dir, "--json", tmp_path / "nowhere/report.json"
    )


def test_a_store_that_is_none_or_of_another_tokenizer_is_refused(made, corpus_dir, tmp_path):
    train = ("train", made.experiment, "--name", "new", "--data.store")
    assert "nowhere; make one with 'eurollm corpus prepare'" in refusal(made.folder, *train, made.folder / "nowhere")
    assert f"{corpus_dir} is not a token store" in refusal(made.folder, *train, corpus_dir)

    assert call("tokenizer", "train", corpus_dir, "--vocab-size", 600, "--out", tmp_path / "tokenizer").status == 0
    assert (
        call("corpus", "prepare", corpus_dir, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "store").status
        == 0
    )
    said = refusal(made.folder, *train, tmp_path / "store")
    assert f"{tmp_path / 'store'} was prepared with another tokenizer than {made.folder / 'tokenizer'}" in said
    said = refusal(made.folder, "train", made.experiment, "--name", "new", "--heldout", tmp_path / "store")
    assert f"{tmp_path / 'store'} was prepared with another tokenizer" in said
    assert "vocab_size=99 is not the tokenizer's 640" in refusal(
        made.folder, "train", made.experiment, "--name", "new", "--model.vocab-size", 99
    )


# Bad experiments

BAD_EXPERIMENTS = [
    ('temperature(0.5, "bytes")', 'shares({"de": 0.5, "en": 0.4})', "shares: the 2 shares sum to 0.9, not 1; correct"),
    ('temperature(0.5, "bytes")', 'shares({"de": 0.5, "fr": 0.5})', "the source 'fr', which the store lacks; it has"),
    ('"bytes")', '"bytes").scale(eng=2)', "the source 'eng', which the store lacks; did you mean 'en'?"),
    ('"bytes")', '"bytse")', "a mixture's unit is 'tokens', 'bytes' or 'content', not 'bytse'"),
    ("Mixture.t", "Mixtur.t", "bad.py line 9: NameError: name 'Mixtur' is not defined"),
    ("    steps=4", "    stesp=4", "bad.py line 10: TypeError: Experiment.__init__() got an unexpected keyword"),
    ("    steps=4", "    steps=4 4", "bad.py line 20: "),
    ("    steps=4", "    steps=0", "experiment 'tiny': steps=0 must be 1 or more"),
    ("kv_heads=2", "kv_heads=3", "heads=4 is not a multiple of kv_heads=3: change one of them"),
    ("EXPERIMENT", "EXPERIMNET", "bad.py defines no `EXPERIMENT = Experiment(...)`: add one"),
    ("data.mixture", "data.mixtur", "bad.py line 4: ModuleNotFoundError: No module named 'eurollm_jax.data.mixtur'"),
    ("MIXTURE =", "import experiments.other\nM =", "shares: the 1 shares sum to 2, not 1"),
    ("warmup=2", "warmup=9", "schedule: 9 steps of warm-up and 1 of decay exceed the run's 4"),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD_EXPERIMENTS, ids=range(len(BAD_EXPERIMENTS)))
def test_a_bad_experiment_is_refused_with_its_line(made, tmp_path, old, new, said):
    source = made.experiment.read_text()
    assert old in source
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "bad.py").write_text(source.replace(old, new, 1))
    (folder / "other.py").write_text("from eurollm_jax.data.mixture import Mixture\nX = Mixture.shares({'de': 2})\n")
    for command in ("show", "train"):
        assert said in refusal(made.folder, command, folder / "bad.py", "--name", "new")


def test_a_file_that_is_no_experiment_is_refused(made, corpus_dir):
    for path, said in (
        (made.folder / "experiments/tini.py", "tini.py does not exist: give the path of an experiment"),
        (corpus_dir / "de.jsonl", "de.jsonl is not a Python file: give the path of an experiment"),
    ):
        assert said in refusal(made.folder, "train", path)


@pytest.mark.parametrize("command", ["show", "train"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model.dpeth", 3), ("Unrecognized options: --model.dpeth", "Perhaps you meant:", "--model.depth INT")),
        (("--stesp", 3), ("Unrecognized options: --stesp", "--steps INT")),
        (("--model.depth", "three"), ("Error parsing --model.depth", "'three'")),
        (("--name",), ("Missing value for argument '--name'",)),
        (("more.py",), ("Unrecognized options: more.py",)),
    ],
)
def test_a_typo_in_an_option_of_an_experiment(made, command, options, said):
    before = contents(made.folder)
    answer = call(command, made.experiment, *options)
    assert contents(made.folder) == before
    assert (answer.status, answer.out) == (2, "")
    assert "Traceback" not in answer.err
    for part in said:
        assert part in answer.err


def test_the_run_directory_of_another_experiment_is_refused(made):
    for options, said in (
        (("--steps", 8), "(steps was 4 and is 8)"),
        (("--model.depth", 3, "--data.seed", 1), "(data.seed was 0 and is 1; model.depth was 2 and is 3)"),
    ):
        sentence = refusal(made.folder, "train", made.experiment, *options)
        assert sentence.startswith(f"{made.run} holds another experiment {said}: give this one another name, or move")
    (made.folder / "runs/notes").mkdir()
    (made.folder / "runs/notes/mine.txt").write_text("mine")
    said = refusal(made.folder, "train", made.experiment, "--name", "notes")
    assert "notes is not empty and holds no experiment.json: choose another name" in said


# Bad runs


def test_a_folder_that_is_no_run_is_refused(made, corpus_dir, tmp_path):
    (tmp_path / "untrained").mkdir()
    shutil.copy(made.run / "experiment.json", tmp_path / "untrained")
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    for command in (
        ("generate", "{}", "--prompt", "a"),
        ("export", "{}", tmp_path / "export"),
        ("export", "{}", tmp_path / "export", "--verify"),
        ("report", "{}"),
    ):
        for folder, said in (("nowhere", "is not a run directory"), ("corpus", "is not a run directory")):
            argv = [tmp_path / folder if part == "{}" else part for part in command]
            assert f"{tmp_path / folder} {said}" in refusal(tmp_path, *argv)
    for command, said in (
        (("generate", "{}", "--prompt", "a"), "untrained holds no checkpoint: train the run first"),
        (("export", "{}", tmp_path / "export"), "untrained holds no checkpoint: train the run first"),
        (("export", "{}", tmp_path / "export", "--verify"), "untrained has no samples.json to verify an export with"),
    ):
        argv = [tmp_path / "untrained" if part == "{}" else part for part in command]
        assert said in refusal(tmp_path, *argv)


def test_a_run_is_only_read_by_generate_and_export(made, tmp_path, caplog):
    """A checkpoint that is being written meanwhile stays."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    (run / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    before = contents(run)
    for command in (("generate", run, "--prompt", "Die", "--tokens", 2), ("export", run, tmp_path / "export")):
        said = call(*command)
        assert (said.status, said.err, caplog.text) == (0, "", "")
    assert contents(run) == before


def test_generate_refuses_what_it_cannot_do(made):
    for options, said in (
        (("--prompt", "Katze " * 100), "tokens, and with 100 new ones they exceed the model's 160 positions: shorten"),
        (("--prompt", "a", "--tokens", 500), "with 500 new ones they exceed the model's 160 positions"),
        (("--prompt", "a", "--tokens", 0), "must be at least 1"),
        (("--prompt", "a", "--top-p", 2), "above 0 but not above 1"),
        (("--prompt", "a", "--temperature", -1), "at least 0"),
    ):
        assert said in refusal(made.folder, "generate", made.run, *options)


def test_export_never_replaces_what_it_did_not_write(made, corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    for options in ((), ("--overwrite",)):
        said = refusal(tmp_path, "export", made.run, tmp_path / "corpus", *options)
        assert "corpus holds files that no export of ours wrote, and stays as it is: choose another folder" in said
        said = refusal(tmp_path, "export", made.run, tmp_path / "corpus/de.jsonl", *options)
        assert "de.jsonl is there already; choose another folder" in said
    assert call("export", made.run, tmp_path / "export").status == 0
    said = refusal(tmp_path, "export", made.run, tmp_path / "export", "--dtype", "float32")
    assert "export holds an export already: choose another folder, or overwrite it (--overwrite)" in said
    assert call("export", made.run, tmp_path / "export", "--dtype", "float32", "--overwrite").status == 0
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "float32"


# Bad commands


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("trian", "x.py"), "invalid choice: 'trian' (choose from 'corpus', 'tokenizer', 'mix', 'train',"),
        (("corpus", "prepar"), "invalid choice: 'prepar' (choose from 'starter', 'prepare', 'finalize',"),
        (("corpus", "prepare", "text"), "the following arguments are required: --tokenizer, --out"),
        (("generate", "run"), "the following arguments are required: --prompt"),
        (("generate", "run", "--prompt", "a", "--temprature", "1"), "--temprature; did you mean --temperature?"),
        (("generate", "run", "--prompt", "a", "--tokens", "many"), "argument --tokens: invalid int value: 'many'"),
        (("export", "run", "out", "--dtype", "int8"), "invalid choice: 'int8' (choose from 'bfloat16', 'float16',"),
        (("report", "run", "--zzz"), "unknown: --zzz"),
        (("train", "--steps", "3", "x.py"), "unknown: --steps (fields of the experiment come after its file)"),
    ],
)
def test_an_unknown_command_or_option(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = call(*argv)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("usage: eurollm")
    assert said in answer.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_version():
    assert call("--version") == Said(0, f"{__version__}\n", "")
