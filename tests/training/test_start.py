"""A run may begin with the weights of another: exactly those, once, and only where they fit."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
import transformers

from eurollm_jax.data.loader import open_data
from eurollm_jax.errors import UserError
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.importing import import_folder
from eurollm_jax.hf.tokenizer import write_hf_tokenizer
from eurollm_jax.model.config import Attention, Rope
from eurollm_jax.model.param import flatten
from eurollm_jax.training import loop
from eurollm_jax.training import run as run_module
from eurollm_jax.training.checkpoint import Checkpoints
from eurollm_jax.training.run import train
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.start import first_state


@pytest.fixture(scope="module")
def model():
    """A Llama of transformers, with logits far from uniform."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=640,
        max_position_embeddings=64,
        rope_theta=3e4,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def start(model, tokenizer, tmp_path):
    """The run that it is imported to."""
    model.save_pretrained(tmp_path / "model")
    write_hf_tokenizer(tokenizer, tmp_path / "model", model_max_length=64)
    import_folder(tmp_path / "model", tmp_path / "imported")
    return tmp_path / "imported"


@pytest.fixture
def going_on(experiment, start, tmp_path):
    """An experiment that begins with it."""
    config = dataclasses.replace(HubFolder(tmp_path / "model").config, compute="float32", remat="none")
    return dataclasses.replace(experiment, name="on", start_from=str(start), model=config, steps=6, log_every=1)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, step=None):
    checkpoint = Checkpoints(run / "checkpoints", read_only=True).weights(step)
    return {path: checkpoint.read(path) for path in checkpoint.paths()}


def their_nats(model, batch):
    """Of transformers, document by document: a document of a row sees nothing of the others."""
    total = 0.0
    for row in range(len(batch.tokens)):
        for segment in set(batch.segments[row].tolist()) - {0}:
            at = batch.segments[row] == segment
            with torch.no_grad():
                scores = model(torch.from_numpy(batch.tokens[row][at]).long()[None]).logits[0].double()
            logs = torch.log_softmax(scores, -1).numpy()
            targets, mask = batch.targets[row][at], batch.mask[row][at]
            total -= logs[np.arange(len(targets)), targets][mask].sum()
    return total


def test_the_first_loss_is_that_of_the_imported_model(going_on, model):
    run = train(going_on, "")
    first = next(line for line in lines(run) if line["kind"] == "train")
    assert first["step"] == 1
    batch = open_data(going_on.data, going_on.total_rows).batch(0, going_on.batch_size)
    nats = sum(source["nats"] for source in first["sources"].values())
    assert nats == pytest.approx(their_nats(model, batch), rel=1e-5)
    assert nats / batch.mask.sum() > 6.5  # and not that of an untrained model of ours, which is log(640) = 6.46
    record = json.loads((run / "experiment.json").read_text())
    assert record["experiment"]["start_from"] == going_on.start_from
    assert len(record["identity"]["inputs"]["start"]) == 64


def test_it_begins_with_exactly_those_weights_and_a_new_optimizer(going_on, start, monkeypatch):
    begun = []

    def noting(*arguments):
        begun.append(first_state(*arguments))
        return begun[-1]

    monkeypatch.setattr(run_module, "first_state", noting)
    monkeypatch.setattr(loop, "_loop", lambda run, state, *_: state)
    monkeypatch.setattr(run_module, "_conclude", lambda *_: None)
    train(dataclasses.replace(going_on, ema=0.9), "")
    (state,) = begun
    held = weights(start)
    for path, value in flatten(state.params).items():
        np.testing.assert_array_equal(value, held[path], err_msg=path)
        np.testing.assert_array_equal(flatten(state.ema)[path], held[path], err_msg=path)


def test_a_run_that_has_begun_needs_its_start_no_more(going_on, start, tmp_path):
    """As after a kill behind step 4: the checkpoint of step 6 and what came after it are gone."""
    whole = train(dataclasses.replace(going_on, runs=str(tmp_path / "whole")), "")
    shutil.copytree(whole, going_on.run)
    shutil.rmtree(going_on.run / "checkpoints" / "6")
    shutil.rmtree(start)
    train(going_on, "")
    resumed, undisturbed = weights(going_on.run), weights(whole)
    for path, value in undisturbed.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    with pytest.raises(UserError, match="imported is not a run directory"):
        train(dataclasses.replace(going_on, name="another"), "")
    assert not dataclasses.replace(going_on, name="another").run.exists()


def test_a_start_that_has_changed_before_the_first_checkpoint_is_refused(going_on, start, monkeypatch, tmp_path):
    """A run that was killed before it saved anything begins again, and with the weights that its record names."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(loop, "_loop", killed)
        with pytest.raises(KeyboardInterrupt):
            train(going_on, "")
    shutil.rmtree(start)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "model")
    import_folder(tmp_path / "model", start)
    with pytest.raises(UserError, match=r"imported holds other weights than when .* began"):
        train(going_on, "")
    assert not list((going_on.run / "checkpoints").iterdir())


def test_weights_of_other_shapes_are_refused_before_anything_is_made(going_on):
    for change in (dict(width=24), dict(depth=3), dict(tied=True), dict(qk_norm="head")):
        other = dataclasses.replace(going_on, model=dataclasses.replace(going_on.model, **change))
        with pytest.raises(UserError, match="imported has other weights than the model"):
            train(other, "")
        assert not other.run.exists()


def test_another_rotary_base_is_allowed_and_loudly_said(going_on, caplog):
    longer = dataclasses.replace(going_on.model, pattern=(Attention(rope=Rope(theta=9e5)),))
    with caplog.at_level(logging.WARNING):
        train(dataclasses.replace(going_on, model=longer), "")
    (said,) = (record.message for record in caplog.records if "THE MODEL IS NOT QUITE THE ONE OF" in record.message)
    assert "theta" in said
    assert "30000.0" in said
    assert "900000.0" in said


def test_a_trained_run_can_be_a_start(going_on, tmp_path):
    first = train(going_on, "")
    second = train(
        dataclasses.replace(going_on, name="second", start_from=str(first), steps=1, schedule=WSD(peak=1e-2, warmup=0)),
        "",
    )
    begun, ended = weights(first), weights(second)
    moved = max(np.abs(ended[path] - value).max() for path, value in begun.items())
    assert 0 < moved < 0.1  # by one step


def test_exports_carry_the_average_in_closed_form(going_on, start, tmp_path):
    """ema_n = d^n w_0 + (1 - d) sum d^(n-i) w_i, from the weights after each step."""
    from eurollm_jax.cli import main

    decay = 0.7
    run = train(dataclasses.replace(going_on, ema=decay, checkpoint_every=1, saving=Saving(last=6)), "")
    held = [weights(start), *(weights(run, step) for step in range(1, 7))]
    assert main(["export", str(run), str(tmp_path / "out"), "--ema", "--dtype", "float32"]) == 0
    for path, index, value in HubFolder(tmp_path / "out").pieces():
        terms = [(1 - decay) * decay ** (6 - i) * held[i][path].astype(np.float64) for i in range(1, 7)]
        wanted = decay**6 * held[0][path] + sum(terms)
        np.testing.assert_allclose(value, wanted[index], rtol=0, atol=2e-6, err_msg=path)
    assert "moving average" in (tmp_path / "out" / "README.md").read_text()
