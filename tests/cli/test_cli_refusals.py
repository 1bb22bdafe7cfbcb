"""What each command says when an input, a folder, an experiment or a run is bad."""

import json
import shutil

import pytest

KINDS = ".jsonl, .txt (either also as .gz or .zst), .parquet or .arrow"
GOOD = '{"text": "gut", "language": "de"}\n'


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
def test_bad_text_is_refused_by_each_command_that_reads_it(refusal, made, tmp_path, name, content, said):
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


def test_text_that_is_missing_is_refused(refusal, made, corpus_dir, tmp_path):
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


def test_a_tokenizer_that_is_none_is_refused(refusal, made, corpus_dir, tmp_path):
    for folder, said in (
        (tmp_path / "nowhere", "nowhere; make one with 'eurollm tokenizer train'"),
        (corpus_dir, f"there is no tokenizer at {corpus_dir / 'tokenizer.model'}; make one with"),
        (corpus_dir / "de.jsonl", "de.jsonl is not a SentencePiece model; give the tokenizer.model of a tokenizer"),
    ):
        assert said in refusal(
            tmp_path, "corpus", "prepare", corpus_dir, "--tokenizer", folder, "--out", tmp_path / "store"
        )
        assert said in refusal(made.folder, "train", made.experiment, "--name", "new", "--tokenizer", folder)


def test_a_trace_of_no_steps_of_the_run_is_refused(refusal, made):
    train = ("train", made.experiment, "--name", "new", "--trace")
    assert "--trace 2-3: name the first and the last step" in refusal(made.folder, *train, "2-3")
    before = ("train", "--trace", "4:5", made.experiment, "--name", "new")
    for argv in ((*train, "4:5"), before):
        assert "--trace 4:5: the run has 4 steps, of which 1 to 4 are left" in refusal(made.folder, *argv)


def test_what_is_there_is_never_overwritten_by_other_data(refusal, made, corpus_dir, tmp_path):
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


def test_a_store_that_is_none_or_of_another_tokenizer_is_refused(call, refusal, made, corpus_dir, tmp_path):
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
    assert "has 640 tokens and the model's vocab_size is 99" in refusal(
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
    ("kv_heads=2", "kv_heads=3", "heads=4 is not a multiple of kv_heads=3: change one"),
    ("EXPERIMENT", "EXPERIMNET", "bad.py defines no `EXPERIMENT = Experiment(...)`: add one"),
    ("data.mixture", "data.mixtur", "bad.py line 4: ModuleNotFoundError: No module named 'eurollm_jax.data.mixtur'"),
    ("MIXTURE =", "import experiments.other\nM =", "shares: the 1 shares sum to 2, not 1"),
    ("warmup=2", "warmup=9", "schedule: 9 steps of warm-up and 1 of decay exceed the run's 4"),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD_EXPERIMENTS, ids=range(len(BAD_EXPERIMENTS)))
def test_a_bad_experiment_is_refused_with_its_line(refusal, made, tmp_path, old, new, said):
    source = made.experiment.read_text()
    assert old in source
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "bad.py").write_text(source.replace(old, new, 1))
    (folder / "other.py").write_text("from eurollm_jax.data.mixture import Mixture\nX = Mixture.shares({'de': 2})\n")
    for command in ("show", "train"):
        assert said in refusal(made.folder, command, folder / "bad.py", "--name", "new")


def test_a_file_that_is_no_experiment_is_refused(refusal, made, corpus_dir):
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
def test_a_typo_in_an_option_of_an_experiment(call, contents, made, command, options, said):
    before = contents(made.folder)
    answer = call(command, made.experiment, *options)
    assert contents(made.folder) == before
    assert (answer.status, answer.out) == (2, "")
    assert "Traceback" not in answer.err
    for part in said:
        assert part in answer.err


def test_the_run_directory_of_another_experiment_is_refused(refusal, made):
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


def test_a_folder_that_is_no_run_is_refused(refusal, made, corpus_dir, tmp_path):
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
        (("export", "{}", tmp_path / "export", "--verify"), "untrained holds no checkpoint: train the run first"),
    ):
        argv = [tmp_path / "untrained" if part == "{}" else part for part in command]
        assert said in refusal(tmp_path, *argv)


@pytest.fixture
def imported(call, made, tmp_path):
    """A run made of an export of the trained one."""
    assert call("export", made.run, tmp_path / "export", "--dtype", "float32").status == 0
    assert call("import", tmp_path / "export", tmp_path / "runs/imported").status == 0
    return tmp_path / "runs/imported"


def test_a_start_that_cannot_be_one_is_refused_before_anything_is_made(refusal, made, imported):
    train = ("train", made.experiment, "--runs", imported.parent, "--start-from", imported)
    said = refusal(imported.parent, *train, "--name", "new", "--model.depth", 3)
    assert "imported has other weights than the model" in said
    said = refusal(imported.parent, *train, "--name", "imported")
    assert "'imported' would begin with its own run" in said


def test_what_an_imported_run_has_not_is_said(call, refusal, imported, tmp_path):
    said = call("report", imported)
    assert (said.status, said.err) == (0, "")
    assert "LlamaForCausalLM" in said.out
    assert "- Attention: 4 heads of 8; keys and values: 2 of them for all heads" in said.out
    assert not (imported / "report.html").exists()
    for options, why in (
        (("--ema",), "holds no moving average of the weights"),
        (("--average-last", 2), "too few for an average of the last 2"),
        (("--chat-template", tmp_path / "none.jinja"), "none.jinja does not exist"),
        (("--architecture", "Qwen3ForCausalLM"), "Qwen3ForCausalLM cannot say this model's qk_norm"),
    ):
        assert why in refusal(tmp_path, "export", imported, tmp_path / "out", *options)


def test_a_model_that_no_architecture_can_say_is_told_before_it_is_trained(call, made, caplog):
    assert "Exports as LlamaForCausalLM" in made.shown.out
    said = call("show", made.experiment, "--model.qk-norm", "full")
    assert said.status == 0
    assert "Exports as" not in said.out
    assert "WHAT IS TRAINED HERE CANNOT BE EXPORTED: no architecture of transformers" in caplog.text


def test_a_run_is_only_read_by_generate_and_export(call, contents, made, tmp_path, caplog):
    """A checkpoint that is being written meanwhile stays."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    (run / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    before = contents(run)
    for command in (("generate", run, "--prompt", "Die", "--tokens", 2), ("export", run, tmp_path / "export")):
        said = call(*command)
        assert (said.status, said.err, caplog.text) == (0, "", "")
    assert contents(run) == before


def test_generate_refuses_what_it_cannot_do(refusal, made):
    for options, said in (
        (("--prompt", "Katze " * 100), "tokens, and with 100 new ones they exceed the model's 160 positions: shorten"),
        (("--prompt", "a", "--tokens", 500), "with 500 new ones they exceed the model's 160 positions"),
        (("--prompt", "a", "--tokens", 0), "max_new_tokens is 0: it must be 1 or more"),
        (("--prompt", "a", "--top-p", 2), "top_p is 2.0: it must be above 0 and not above 1"),
        (("--prompt", "a", "--temperature", -1), "temperature is -1.0: it must be 0"),
    ):
        assert said in refusal(made.folder, "generate", made.run, *options)


def test_export_never_replaces_what_it_did_not_write(call, refusal, made, corpus_dir, tmp_path):
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
