"""What we export is read by others: through the doors of transformers that its users take, and by MLX.

MLX (mlx-lm) has its own reader of config.json and safetensors, its own decoders and its own engine; of transformers it
takes the tokenizer alone. Without it these tests fail: `make test-all` installs it, and so does
`.venv/bin/uv pip install -c constraints.txt -e '.[readers]'`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from eurollm_jax.hf.export import export
from eurollm_jax.hf.mapping import InMemory
from eurollm_jax.model.config import Attention, Gated, Llama3Scaling, Norm, Rope, TransformerConfig
from eurollm_jax.model.param import map_with_path
from eurollm_jax.model.transformer import specs
from tests.hf.parity import one_device, our_greedy, our_logits, their_logits

# head_dim is not width / heads, and neither rotary base nor eps is a default of a reader
LLAMA = TransformerConfig(
    vocab_size=640,
    width=48,
    depth=3,
    heads=6,
    kv_heads=2,
    head_dim=12,
    mlp=Gated(80),
    max_positions=300,
    pattern=(Attention(rope=Rope(theta=7e4)),),
    norm=Norm(eps=3e-5),
    compute="float32",
    remat="none",
)
LLAMA3 = Llama3Scaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_positions=64)
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama 3": (
        "LlamaForCausalLM",
        replace(LLAMA, pattern=(Attention(rope=Rope(theta=5e5, scaling=LLAMA3)),), tied=True),
    ),
    "Qwen3": ("Qwen3ForCausalLM", replace(LLAMA, qk_norm="head", tied=True)),
}
PROMPTS = ("Übermorgen fährt keine Straßenbahn, weil die Gleise", "Ο άνεμος έσπασε ένα κλαδί", "It rained for six days")
NEW_TOKENS = 32


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """A folder of several shards in float32, and the model in it."""
    architecture, config = MODELS[request.param]
    dice = np.random.default_rng(0)

    def value(path, spec):
        noise = dice.normal(size=spec.shape).astype(np.float32)
        return 1.5 * np.float32(spec.std) * noise if spec.fan_in else 1 + 0.2 * noise

    params = map_with_path(value, specs(config))
    folder = tmp_path_factory.mktemp("export") / request.param.replace(" ", "-")
    export(InMemory(params), config, tokenizer, folder, dtype="float32", max_shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert architecture in (folder / "config.json").read_text()
    return folder, config, params


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [np.array([[tokenizer.bos_id, *tokenizer.encode(text)]]) for text in PROMPTS]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the folder did not suffice: the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_auto_model_and_tokenizer_of_transformers(exported, prompts, tokenizer, offline):
    folder, config, params = exported
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(PROMPTS, prompts, strict=True):
        assert theirs(text)["input_ids"] == ids[0].tolist()
        ours = our_logits(params, config, ids, one_device())
        assert np.abs(ours).max() > 2
        np.testing.assert_allclose(their_logits(model, ids), ours, rtol=0, atol=2e-4)


def test_text_generation_pipeline_of_transformers(exported, prompts, tokenizer, offline):
    folder, config, params = exported
    pipe = transformers.pipeline("text-generation", model=str(folder))
    for text, ids in zip(PROMPTS, prompts, strict=True):
        (said,) = pipe(text, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = our_greedy(params, config, ids, NEW_TOKENS)[0].tolist()
        if tokenizer.eos_id in new:
            new = new[: new.index(tokenizer.eos_id)]
        # by their tokenizer: what random weights write is no UTF-8, and is shown in more ways than one
        assert said["generated_text"] == text + pipe.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.slow
def test_mlx_computes_the_same_logits_and_continuations(exported, prompts, tokenizer, offline):
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load

    folder, config, params = exported
    model, theirs = load(str(folder))
    for text, ids in zip(PROMPTS, prompts, strict=True):
        assert theirs.encode(text) == ids[0].tolist()
        scores = np.array(model(mx.array(ids)))
        np.testing.assert_allclose(scores, our_logits(params, config, ids, one_device()), rtol=0, atol=2e-4)

        cache, token, found = make_prompt_cache(model), mx.array(ids), []
        for _ in range(NEW_TOKENS):
            token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            found.append(token.item())
        np.testing.assert_array_equal(found, our_greedy(params, config, ids, NEW_TOKENS)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mlx_reads_the_narrower_types(dtype, tokenizer, prompts, tmp_path, offline):
    """Each weight as it was rounded here."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model
    from safetensors.torch import load_file

    params = map_with_path(lambda path, spec: np.random.default_rng(1).normal(size=spec.shape), specs(LLAMA))
    export(InMemory(params), LLAMA, tokenizer, tmp_path / "out", dtype=dtype, max_shard_bytes=50_000)
    model, _ = load_model(tmp_path / "out")
    held = dict(tree_flatten(model.parameters()))
    files = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert held.keys() == files.keys()
    for name, value in held.items():
        assert value.dtype == getattr(mx, dtype)
        np.testing.assert_array_equal(np.array(value.astype(mx.float32)), files[name].float().numpy(), err_msg=name)
