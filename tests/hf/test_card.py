"""A model card is believed by people who have nothing else: each figure is counted anew here, from the data."""

import json
import re
import shutil
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import yaml

from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.experiment import Experiment, encode
from eurollm_jax.hf.card import model_card
from eurollm_jax.hf.card.page import front_matter, hub_language, parameters
from eurollm_jax.hf.card.words import architecture, cell, mixture, table
from eurollm_jax.languages import LANGUAGES
from eurollm_jax.model.config import (
    Attention,
    BalanceBias,
    Gated,
    MoE,
    Norm,
    Rope,
    TransformerConfig,
    Ungated,
    YarnScaling,
)
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.run import train
from eurollm_jax.training.schedule import WSD

STEPS, ROWS, LENGTH = 8, 8, 32
QUESTION = "Does a card say | what happened?"


@pytest.fixture(scope="module")
def experiment(tokenizer, store, tmp_path_factory):
    first = Mixture.temperature(0.5, "bytes").without("mt").scale(de=2.0)
    return Experiment(
        name="tiny",
        tokenizer=str(tokenizer.model_path),
        data=DataConfig(
            store=str(store.path),
            mixture=first.stage(at_row=32, mixture=Mixture.shares({"mt": 0.25, "el": 0.75}), ramp_rows=8),
            sequence_length=LENGTH,
            seed=3,
        ),
        heldout=str(store.path),
        model=TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            width=16,
            depth=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            max_positions=64,
            mlp=Gated(32),
            compute="float32",
            remat="none",
        ),
        schedule=WSD(peak=1e-2, warmup=2),
        optimizer=AdamW(b2=0.97),
        steps=STEPS,
        batch_size=ROWS,
        seed=5,
        log_every=3,
        evaluate_every=8,
        evaluate_rows=2,
        checkpoint_every=4,
        runs=str(tmp_path_factory.mktemp("card") / "runs"),
    )


@pytest.fixture(scope="module")
def run(experiment):
    return train(experiment, QUESTION)


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    return tmp_path / "run"


def card_of(run, experiment, **options):
    defaults = dict(name="My model", dtype="bfloat16", sources_of_weights="step 8", license="Apache-2.0")
    return model_card(run, experiment.model, **defaults | options)


def metadata(card):
    """The front matter as YAML reads it, and as the hub's own class does."""
    _, front, _ = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert huggingface_hub.ModelCard(card).data.to_dict() == found
    return found


def rows_of(card, title):
    """First cell -> the others, of the first table below a heading."""
    section = re.split(r"^#+ ", card.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.split("\n") if line.startswith("|")]
    cells = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells[2:]}


def counted(experiment, steps, token_bytes):
    """Source -> [tokens, bytes, rows] of the first steps, from the batches themselves."""
    data = open_data(experiment.data, experiment.total_rows)
    totals = {name: np.zeros(3, int) for name in data.source_names}
    for step in range(steps):
        batch = data.batch(step * ROWS, ROWS)
        for row, source in enumerate(batch.source):
            read = batch.targets[row][batch.mask[row]]
            totals[data.source_names[source]] += (len(read), int(token_bytes[read].sum()), 1)
    return totals, data


@pytest.mark.parametrize("step", [None, 4])
def test_tokens_bytes_shares_and_epochs_are_those_that_training_read(run, experiment, tokenizer, step):
    card = card_of(run, experiment, step=step)
    totals, data = counted(experiment, step or STEPS, tokenizer.piece_bytes)
    everything = sum(tokens for tokens, _, _ in totals.values())
    table = rows_of(card, "Training data")
    expected = {f"{LANGUAGES[code].name} ({code})": (code, *sums) for code, sums in totals.items() if sums[0]}
    assert set(table) == set(expected)
    assert list(table) == sorted(table, key=lambda name: -int(table[name][0].replace(",", "")))
    for name, (code, tokens, octets, rows) in expected.items():
        epochs = rows / data.sizes[code].rows
        assert [float(re.sub(r"[^\d.]", "", text)) for text in table[name]] == [
            tokens,
            octets,
            pytest.approx(100 * tokens / everything, rel=0.01),
            pytest.approx(epochs, rel=0.06),
        ]
    assert f"up to step {step or STEPS}: {everything:,} tokens" in card
    partial = "This is 50.0\N{NO-BREAK SPACE}% of the 64 rows that the run is planned to read"
    assert (partial in card) == (step == 4)
    assert ("Maltese" in card.split("## Training\n")[0]) == (step is None)  # it comes at row 32 only


def test_front_matter_is_what_the_hub_reads(run, experiment):
    found = metadata(card_of(run, experiment))
    assert found == {
        "language": ["bg", "de", "el", "en", "mt"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["eurollm_jax", "pretrained"],
    }
    assert metadata(card_of(run, experiment, step=4))["language"] == ["bg", "de", "el", "en"]
    unlicensed = card_of(run, experiment, license=None)
    assert "license" not in metadata(unlicensed)
    assert "No licence is stated" in unlicensed
    other = metadata(card_of(run, experiment, license='My: "own" #1', base_model="no/model"))
    assert (other["license"], other["license_name"], other["base_model"]) == ("other", 'My: "own" #1', "no/model")


@pytest.mark.parametrize(("code", "expected"), [("nb", "nb"), ("sr-Latn", "sr"), ("cnr", "cnr"), ("hsb", "hsb")])
def test_languages_have_the_codes_of_the_hub(code, expected):
    assert hub_language(code) == expected


def test_every_language_of_ours_has_a_code_that_yaml_and_the_hub_take():
    found = metadata(front_matter(None, list(LANGUAGES), None, []) + "\n# x\n")["language"]
    assert len(found) == len({LANGUAGES[code].iso639_3 for code in LANGUAGES})  # the two scripts of Serbian are one
    assert all(re.fullmatch("[a-z]{2,3}", code) for code in found)


def test_evaluation_is_that_of_the_run(run, experiment):
    card = card_of(run, experiment, sources_of_weights="mean of the last 3 checkpoints")
    evaluation = json.loads((run / "evaluation.json").read_text())
    table = rows_of(card, "Evaluation")
    assert len(table) == len(evaluation["languages"]) == 5
    for code, result in evaluation["languages"].items():
        octets, model, xz, order0, _ = table[f"{result['name']} ({code})"]
        assert octets == f"{result['bytes']:,}"
        assert model == f"**{result['bits_per_byte']:.3f}**"
        assert (xz, order0) == tuple(f"{result['baselines'][name]:.3f}" for name in ("xz", "order0"))
    assert evaluation["definition"] in card
    assert (
        "after step 8 in the precision of training, and not with these, which are: mean of the last 3 checkpoints"
        in card
    )
    assert "after step 8 in the precision of training, which are these" in card_of(run, experiment)
    assert "no better than `xz` compresses it in: Bulgarian, English, German, Greek, Maltese" in card


def test_recipe_compute_and_provenance(run, experiment):
    card = card_of(run, experiment)
    recipe, compute, origin = (rows_of(card, title) for title in ("Training", "Compute", "Provenance"))
    assert recipe["Optimizer"] == [
        "`AdamW(b1=0.9, b2=0.97, eps=1e-08, weight_decay=0.1, clip_norm=1.0, base_width=None, state_dtype='float32')`"
    ]
    assert recipe["Learning rate"] == ["`WSD(peak=0.01, warmup=2, decay=0.2, final=0.0, shape='linear')`"]
    assert recipe["Batch"] == ["8 rows (256 tokens)"]
    assert recipe["Steps"] == ["8 of 8 planned"]
    assert recipe["Seeds"] == ["5 (weights), 3 (order of the data)"]
    # 6 for each weight of: two layers of 4 attention and 3 MLP products, and the head; 12 for heads, dimensions, keys.
    width, heads, mlp = 16, 4 * 8, 32
    weights = 2 * (2 * width * heads + 2 * width * heads // 2 + 3 * width * mlp) + width * 640
    each = 6 * weights + 12 * 2 * heads * LENGTH / 2
    tokens = int(re.search(r"up to step 8: ([\d,]+) tokens", card)[1].replace(",", ""))
    assert compute["Training FLOPs"] == [f"{each * tokens:.3g} ({each:.4g} for each token)"]
    assert compute["Energy and emissions"] == ["not measured"]
    assert compute["Restarts"] == ["0"]
    record = json.loads((run / "experiment.json").read_text())
    assert compute["Devices"] == [record["devices"]]
    assert origin["Fingerprint of the experiment"] == [f"`{record['fingerprint']}`"]
    assert origin["Fingerprint of the training data"] == [f"`{record['identity']['inputs']['store']}`"]
    assert "> Does a card say \\| what happened?" in card
    assert "`tiny`" in card
    assert "- From row 0 on: each source in proportion to its bytes ** 0.5; without mt; de times 2\n" in card
    assert "- From row 32 on, gradually over 8 rows: shares of the tokens: el 75.0\N{NO-BREAK SPACE}%, mt 25" in card


def test_licences_are_those_of_the_store(run, experiment, store):
    card = card_of(run, experiment)
    totals = {}
    for source in store.sources.values():
        for licence, held in source.licences.items():
            totals[licence] = totals.get(licence, 0) + held["bytes"]
    section = card.split("## Licences of the training data\n")[1].split("<details>")[0]
    for licence, octets in totals.items():
        assert f"| {licence} | {octets:,} | " in section
    assert section.count("\n| ") == len(totals) + 1


def test_limitations_are_drawn_from_the_figures(run, experiment):
    card = card_of(run, experiment).split("## Limitations\n")[1].split("##")[0]
    assert "A base model: it continues text." in card
    assert "Small: with" in card
    assert "tokens for each parameter, where about 20" in card
    assert "Not examined: bias" in card


def test_what_is_not_recorded_is_said_to_be_so(copy, experiment):
    for name in ("plan.json", "evaluation.json", "metrics.jsonl"):
        (copy / name).unlink()
    record = json.loads((copy / "experiment.json").read_text())
    record |= {"experiment": {"model": record["experiment"]["model"]}, "code": None}
    record["identity"] = {}
    (copy / "experiment.json").write_text(json.dumps(record))
    card = card_of(copy, experiment, license=None)
    for said in (
        "how much text it has read is not recorded",
        "What the model has read is not recorded.",
        "The mixture as it was declared is not recorded.",
        "FLOPs, time and energy are not recorded.",
        "The model was not evaluated on held-out text.",
        "The licences of the training text are not recorded.",
        "| Optimizer | not recorded |",
        "| Commit of the code | not recorded |",
    ):
        assert said in card
    assert metadata(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["eurollm_jax", "pretrained"],
    }
    assert "has read 0" not in card
    assert not re.search(r"\bnan\b", card)


def test_sources_of_one_language_are_summed_and_listed(copy, run, experiment):
    plan = json.loads((copy / "plan.json").read_text())
    plan["sources"]["el"]["language"] = "de"
    (copy / "plan.json").write_text(json.dumps(plan))
    apart, together = (rows_of(card_of(folder, experiment), "Training data") for folder in (run, copy))
    assert "### By source" not in card_of(run, experiment)
    both = [[int(apart[name][i].replace(",", "")) for name in ("German (de)", "Greek (el)")] for i in (0, 1)]
    assert together["German (de)"][:2] == [f"{sum(both[0]):,}", f"{sum(both[1]):,}"]
    assert " to " in together["German (de)"][3]
    listed = rows_of(card_of(copy, experiment), "By source")
    assert set(listed) == set(plan["sources"])
    assert listed["el"][0] == "German (de)"
    assert listed["el"][1] == apart["Greek (el)"][0]


def test_restarts_on_other_devices_with_other_code_are_told(copy, experiment):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    restart = {"kind": "restart", "step": 4, "time": "2026-11-20T09:58:12Z", "devices": "8 x H|100", "code": "feed"}
    restart["versions"] = {"jax": "9.9"}
    (copy / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(restart)]) + '\n{"kind": "restart", "st')
    card = card_of(copy, experiment)
    assert rows_of(card, "Compute")["Restarts"] == ["1"]
    assert rows_of(card, "Compute")["Devices"][0].endswith("; then 8 x H\\|100")
    assert rows_of(card, "Provenance")["Versions"][0].endswith("; then jax 9.9")
    assert rows_of(card, "Provenance")["Commit of the code"][0].endswith("feed")


def test_a_run_that_began_with_other_weights_says_so_without_their_path(copy, experiment):
    record = json.loads((copy / "experiment.json").read_text())
    record["experiment"]["start_from"] = "/secret/home/runs/imported-9B"
    (copy / "experiment.json").write_text(json.dumps(record))
    card = card_of(copy, experiment)
    assert "Training began with the parameters of imported-9B; what these had seen is not counted." in card
    assert "secret" not in card
    assert "Trained briefly" not in card
    assert "Trained here to continue text" in card
    assert "It was not trained to follow instructions" not in card
    assert rows_of(card, "Training")["Seeds"] == ["3 (order of the data)"]


def imported_record(model):
    return {
        "name": "imported",
        "docstring": "Imported from SomeModel-9B.",
        "fingerprint": "9f2c" * 16,
        "created": "2026-11-22T08:20:11+0000",
        "experiment": {"name": "imported", "model": encode(model)},
        "identity": {"imported": {}, "model": encode(model)},
        "parameters": 1,
        "imported": {
            "folder": "/secret/home/SomeModel-9B",
            "architecture": "LlamaForCausalLM",
            "exported_as": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "sha256": {"model.safetensors": "ab" * 32, "config.json": "cd" * 32},
            "tokenizer": True,
            "config": {"transformers_version": "4.51.0", "hidden_size": 16},
            "generation_config": None,
        },
    }


def test_an_imported_model_tells_where_it_came_from_and_claims_no_training(experiment, tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps(imported_record(experiment.model)))
    card = card_of(tmp_path, experiment, license=None, sources_of_weights="as imported")
    assert metadata(card)["tags"] == ["eurollm_jax"]
    assert "base_model" not in metadata(card)
    assert "language" not in metadata(card)
    assert "No training happened here." in card
    for absent in ("## Training", "secret", "Base model", "tokens of text"):
        assert absent not in card
    origin = rows_of(card, "Origin")
    assert origin["Model"] == ["not recorded"]
    assert origin["Folder"] == ["SomeModel-9B"]
    assert origin["Written by transformers"] == ["4.51.0"]
    assert f"| model.safetensors | `{'ab' * 32}` |" in card
    named = card_of(tmp_path, experiment, base_model="lab/SomeModel-9B")
    assert metadata(named)["base_model"] == "lab/SomeModel-9B"


def test_a_folder_that_is_no_run_is_refused(experiment, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        card_of(tmp_path, experiment)


def test_parameters_by_hand(experiment):
    moe = replace(experiment.model, mlp=MoE(experts=8, top_k=2, hidden=24, shared=40, balance=BalanceBias()), tied=True)
    attention = 2 * 16 * 32 + 2 * 16 * 16
    rest = 2 * (attention + 2 * 16 + 16 * 8 + 8 + 3 * 16 * 40) + 16
    expert = 2 * 3 * 16 * 24
    found = parameters(moe)
    assert (found.total, found.active) == (640 * 16 + rest + 8 * expert, 640 * 16 + rest + 2 * expert)
    assert found.non_embedding == rest + 8 * expert
    dense = parameters(experiment.model)
    assert dense.total == dense.active == dense.non_embedding + 2 * 640 * 16


def test_architecture_says_what_is_not_usual(experiment):
    config = replace(
        experiment.model,
        mlp=Ungated(48),
        pattern=(Attention(window=128), Attention(rope=Rope(1e6, YarnScaling(4.0, 4096), fraction=0.5))),
        norm=Norm("both", 1e-6, "one_plus_weight"),
        qk_norm="head",
        attention_bias="qkv",
        attention_cap=50.0,
        logit_cap=30.0,
        embedding_scale=4.0,
        tied=True,
    )
    said = " ".join(architecture(config))
    for words in (
        "2 layers, 16 wide",
        "4 heads of 8; keys and values: 2 of them for all heads; biases on queries, keys and values",
        "RMSNorm of queries and keys over each head, products capped by 50 tanh",
        "in a pattern that repeats every 2: attends to a window of 128 tokens, rotary positions (theta 10,000)",
        "rotary positions (theta 1,000,000, scaled by YaRN by 4 from 4,096 positions) on 50.0",
        "ungated with xIELU, 48 hidden",
        "(epsilon 1e-06) before and after each half of a layer; its gain is 1 + weight",
        "(tied), logits capped by 30 tanh; embeddings are multiplied by 4",
        "up to 64 tokens",
    ):
        assert words in said.replace("\N{NO-BREAK SPACE}", " "), words


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Mixture.proportional(), "each source in proportion to its tokens"),
        (Mixture.temperature(0.0, "content", over="language"), "each language alike"),
        (Mixture.unimax(4, "bytes"), "each source as alike as 4 epochs allow (UniMax), in bytes"),
        (
            Mixture.temperature(0.3, over="family", within=Mixture.unimax(2)).only("fi", "et").floor(0.01),
            "each family in proportion to its tokens ** 0.3; within it, each source as alike as 2 epochs allow "
            "(UniMax), in tokens; only et, fi; every source at least 1.00 %",
        ),
        (
            Mixture.proportional().scale(fi=2, et=2, sv=0.5).floor({"mt": 0.02}),
            "each source in proportion to its tokens; et, fi times 2; sv times 0.5; mt at least 2.00 %",
        ),
    ],
)
def test_mixtures_in_words(declared, said):
    (stage,) = declared.describe()["stages"]
    assert mixture(stage).replace("\N{NO-BREAK SPACE}", " ") == said


def test_nothing_breaks_out_of_a_cell():
    assert cell("a | b\n<script> *x* `y` [z](w)") == "a \\| b \\<script> \\*x\\* \\`y\\` \\[z](w)"
    assert table({"a": "left", "b": "right"}, [("1", 2)]) == "| a | b |\n|---|---:|\n| 1 | 2 |"
