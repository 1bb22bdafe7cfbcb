"""The road from text to an exported model, as a user types it, and what is said of a bad command."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from eurollm_jax import __version__
from eurollm_jax.corpus.reading.sources import read_documents
from eurollm_jax.corpus.store import TokenStore

# The road


def test_prepare_says_what_the_store_holds(made, store):
    assert made.prepared.status == 0
    assert TokenStore.open(made.folder / "store").fingerprint == store.fingerprint
    tokens = sum(source.tokens for source in store.sources.values())
    assert f"{made.folder / 'store'}: {tokens:,} tokens of 5 sources" in made.prepared.out


def test_tokenizer_train_and_report(call, made, corpus_dir, tokenizer, store, tmp_path):
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


def test_show_prints_the_question_the_plan_the_parity_and_the_cost(made, store):
    assert made.shown.status == 0
    assert made.shown.out.startswith("Can a tiny model be trained from the command line?\n")
    assert '"sequence_length": 32' in made.shown.out
    plan, _, parity = made.shown.out.partition("The whole run: 32 rows")[2].partition("How the tokenizer serves")
    # Shares of the bytes go with sqrt(bytes); a row of a language holds bytes / tokens of it.
    weights = {name: source.bytes**0.5 * source.tokens / source.bytes for name, source in store.sources.items()}
    for name, source in store.sources.items():
        (cells,) = (line.split() for line in plan.splitlines() if line.startswith(f" {name} "))
        share, rows, tokens, octets = float(cells[1]), *map(int, cells[3:5]), float(cells[5])
        assert rows == pytest.approx(32 * weights[name] / sum(weights.values()), abs=1.68)
        assert share == pytest.approx(100 * rows / 32, abs=0.1)
        assert tokens == pytest.approx(32 * rows, abs=rows)
        unit = {"B": 1, "kB": 1000}[cells[6]]
        assert octets * unit == pytest.approx(tokens * source.bytes / source.tokens, rel=0.01)
        (served,) = (line.split() for line in parity.splitlines() if line.startswith(f" {name} "))
        assert served[3] == f"{source.fallback / source.tokens:.2%}"
    layer = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16 + 3 * 16 * 32 + 2 * 16
    assert f"{2 * 640 * 16 + 2 * layer + 16:,} parameters; 32 rows of 32 tokens" in made.shown.out


def test_train_leaves_a_run_and_is_complete_the_next_time(call, contents, made, caplog):
    assert made.trained.status == 0, made.trained.err
    assert "step 4/4" in made.trained.err
    assert {"experiment.json", "plan.json", "metrics.jsonl", "evaluation.json", "samples.json"} <= {
        path.name for path in made.run.iterdir()
    }
    before = contents(made.run)
    with caplog.at_level("INFO", "eurollm_jax"):
        assert call("train", made.experiment).status == 0
    assert f"{made.run} is complete: all 4 steps are trained" in caplog.text
    logs = {path for path in contents(made.run) if path.parent.name == "logs"}
    assert {path: content for path, content in contents(made.run).items() if path not in logs} == {
        path: content for path, content in before.items() if path not in logs
    }


def test_steps_of_a_run_are_profiled(call, made, tmp_path):
    fields = ("--name", "traced", "--steps", 2, "--schedule.warmup", 1, "--runs", tmp_path)
    said = call("train", made.experiment, *fields, "--trace", "2:2")
    assert said.status == 0, said.err
    assert len(list((tmp_path / "traced" / "trace").rglob("*.xplane.pb"))) == 1


def test_fields_of_an_experiment_are_options(call, made):
    said = call("show", made.experiment, "--steps", 6, "--model.depth", 3)
    assert said.status == 0
    assert "48 rows of 32 tokens" in said.out
    assert '"depth": 3' in said.out
    listed = call("train", made.experiment, "--help")
    assert listed.status == 0
    assert "--model.depth INT" in listed.out
    assert "--data.store" in listed.out
    assert "--data.mixture" not in listed.out  # a mixture is written in Python


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_its_proof(call, made, tmp_path, dtype):
    said = call("export", made.run, tmp_path / "export", "--dtype", dtype, "--verify")
    assert said.status == 0, said
    assert said.out.startswith(f"{tmp_path / 'export'}: written (step 4, {dtype})\n")
    assert "FAILED" not in said.out
    assert said.out.count("│ ok │") == 9
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == dtype


def test_generate_writes_what_transformers_writes(call, made, tokenizer, tmp_path):
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


def test_report_prints_every_language_and_says_what_to_open(call, made, store):
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


def test_report_of_a_run_that_is_not_finished(call, made, tmp_path):
    for name in ("experiment.json", "plan.json"):
        shutil.copy(made.run / name, tmp_path)
    said = call("report", tmp_path)
    assert (said.status, said.err) == (0, "")
    assert f"Open {tmp_path / 'report.html'}" in said.out


def test_a_text_file_says_its_language_by_its_name_or_folder(call, made, tmp_path):
    texts = {"fr.txt": "fr", "de-letters.txt": "de", "sr_Latn.2.txt": "sr-Latn", "pt_BR-news.txt": "pt"}
    for name in texts:
        (tmp_path / name).write_text(name)
    assert {document.text: document.language for document in read_documents(tmp_path)} == texts
    (tmp_path / "mt").mkdir()
    (tmp_path / "mt/book.txt").write_text("Il-qattus")
    said = call("corpus", "prepare", tmp_path / "mt", "--tokenizer", made.folder / "tokenizer", "--out", tmp_path / "s")
    assert said.status == 0
    assert TokenStore.open(tmp_path / "s").sources["mt"].bytes == len("Il-qattus")


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
def test_an_unknown_command_or_option(call, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = call(*argv)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("usage: eurollm")
    assert said in answer.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_version(call):
    said = call("--version")
    assert (said.status, said.out, said.err) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_nothing_is_trained_ends_with_the_status_of_a_run_that_is_to_go_on(number):
    waiting = (
        "import time\n"
        "from eurollm_jax.cli.starting import signals_end_at_once\n"
        "with signals_end_at_once():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    expected = f"eurollm: stopped by {number.name} while nothing was being trained; the same command goes on\n"
    assert said.decode() == expected
