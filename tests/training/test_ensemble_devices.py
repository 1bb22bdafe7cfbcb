"""Members on several devices learn what they learn on one, and nothing is sent between them; a kill changes nothing."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.model.config import MoE, TransformerConfig
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.ensemble import train_ensemble
from eurollm_jax.training.ensemble_step import build_ensemble, layout_of
from eurollm_jax.training.optimizer import AdamW
from eurollm_jax.training.saving import Saving
from eurollm_jax.training.schedule import WSD
from eurollm_jax.training.skipping import SkipStep
from tests.processes import flags, state_of

COLLECTIVE = re.compile(r" ((?:ragged-)?all-(?:reduce|gather|to-all)|reduce-scatter|collective-\w+)(?:-start)?\(")
TOLERANCE = 1e-6


def members_of(experiment, count):
    mixtures = [experiment.data.mixture, experiment.data.mixture.without("el"), Mixture.proportional()]
    return [
        dataclasses.replace(
            experiment,
            name=f"m{n}",
            seed=n,
            schedule=WSD(peak=2e-3, warmup=2),
            data=dataclasses.replace(experiment.data, mixture=mixtures[n % 3]),
            saving=Saving(before_decay=False, asynchronous=False),
        )
        for n in range(count)
    ]


def sent(text):
    """The collectives of a compiled program."""
    return COLLECTIVE.findall(text)


def built(model, layout):
    return build_ensemble(
        model,
        layout,
        AdamW(),
        [WSD(peak=2e-3, warmup=2)] * 3 + [WSD(peak=4e-3, warmup=2)],
        steps=12,
        token_bytes=np.ones(model.vocab_size, np.int32),
        sources=5,
        heldout_sources=3,
        z_loss=1e-4,
        skip=SkipStep(),
    )


@pytest.fixture(scope="module")
def on_two(tiny):
    return built(tiny, layout_of(4, jax.devices()[:2]))


def test_mixtures_of_experts_have_their_own_loads():
    """And lose the same, on as many devices as members as on one, though a batch in parts would add its loads up."""
    model = TransformerConfig(
        vocab_size=64,
        width=16,
        depth=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_positions=16,
        mlp=MoE(4, 2, 16),
        compute="float32",
    )
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 64, (4, 2, 16)).astype(np.int32)
    found = []
    for devices in (1, 4):
        ensemble = built(model, layout_of(4, jax.devices()[:devices]))
        state = ensemble.init(jax.random.split(jax.random.key(0), 4))
        places = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
        ones = np.ones_like(tokens)
        batch = Batch(tokens, tokens, ones, places, ones > 0, np.zeros((4, 2), np.int32))
        _, metrics = ensemble.train(state, ensemble.place(batch))
        found.append(jax.device_get((metrics.routing, metrics.grad_norm)))
    np.testing.assert_allclose(found[0][0].load.sum(-1), 1, rtol=1e-6)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), *found)


def test_nothing_is_sent_between_devices(on_two, tiny):
    """By the text of the programs for two devices with two members each."""
    assert on_two.layout.mesh.size == 2
    params = on_two.state.params
    tokens = np.zeros((8, 32), np.int32)
    batch = on_two.replicate(Batch(tokens, tokens, tokens, tokens, tokens > 0, np.zeros(8, np.int32)))
    for program in (on_two.compile_train(8, 32), on_two.measure.lower(params, batch).compile()):
        text = program.as_text()
        assert "fusion" in text
        assert "num_partitions=2" in text
        assert not sent(text)


def test_the_text_would_show_what_is_sent():
    """The same search finds what a sum over two devices needs."""
    layout = Layout(MeshConfig(data=2).build(jax.devices()[:2]))
    total = jax.jit(lambda x: x.sum(), out_shardings=layout.replicated)
    text = total.lower(jax.ShapeDtypeStruct((8,), np.float32, sharding=layout.rows)).compile().as_text()
    assert sent(text) == ["all-reduce"]


@pytest.mark.slow
def test_devices_are_used_as_far_as_members_divide(experiment, tmp_path, monkeypatch, caplog):
    """Four members on four of six devices, and then on one; beside them, the same on one all the way."""
    members, every = members_of(experiment, 4), jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *backend: every[:6])
    with caplog.at_level("WARNING", "eurollm_jax"), pytest.raises(StoppedError, match="after step 1 "):
        train_ensemble(members, tmp_path / "spread", question="", time_limit=1000, began=time.perf_counter() - 980)
    assert "4 members are dealt to 4 devices: 2 ARE IDLE" in caplog.text
    monkeypatch.setattr(jax, "devices", lambda *backend: every[:1])
    spread = train_ensemble(members, tmp_path / "spread", question="")
    one = train_ensemble(members, tmp_path / "one", question="")
    assert [dataclasses.replace(m, nats={}) for m in spread] == [dataclasses.replace(m, nats={}) for m in one]
    for ours, theirs in zip(spread, one, strict=True):
        assert ours.nats == pytest.approx(theirs.nats, rel=TOLERANCE)
    own = state_of(tmp_path / "one")
    for path, value in state_of(tmp_path / "spread").items():
        np.testing.assert_allclose(value, own[path], rtol=0, atol=TOLERANCE, err_msg=path)


def test_a_model_that_is_split_is_refused(experiment, tmp_path):
    split = dataclasses.replace(experiment, mesh=MeshConfig(data=-1, fsdp=2))
    with pytest.raises(UserError, match=r"mesh: fsdp=2: .* set fsdp=1"):
        train_ensemble([split], tmp_path / "one", question="")


SCRIPT = """
import sys
from pathlib import Path
from eurollm_jax.experiment import *
from eurollm_jax.model.config import *
from eurollm_jax.data.loader import DataConfig
from eurollm_jax.corpus.tokenizing.parity import Parity
from eurollm_jax.training.ensemble import train_ensemble

train_ensemble({members!r}, Path(sys.argv[1]), question="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [4, 8])
def test_a_killed_ensemble_goes_on_to_the_same_bits(experiment, tmp_path, after):
    """SIGKILL as soon as a checkpoint is committed, at whatever point of what follows."""
    members = [dataclasses.replace(one, saving=Saving(before_decay=False)) for one in members_of(experiment, 4)]
    script = tmp_path / "ensemble.py"
    script.write_text(SCRIPT.format(members=members))
    command = [sys.executable, str(script)]
    environment = os.environ | {"XLA_FLAGS": flags(2)}
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / str(after)).exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("killed", "undisturbed"):
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True, env=environment)
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    assert (one / "measurements.jsonl").read_text() == (other / "measurements.jsonl").read_text()
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
