from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.generate import _likeliest, generate
from eurollm_jax.hf.export import export
from eurollm_jax.model.param import flatten, unflatten
from eurollm_jax.model.transformer import TransformerConfig, forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

CONFIG = TransformerConfig(
    vocab_size=640,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp=48,
    head_dim=8,
    max_positions=96,
    rope_theta=5e3,
    compute="float32",
)
PROMPTS = ["Übermorgen fährt", "", "Το καράβι έφυγε από το λιμάνι", "1"]
NEW = 24


def random_params(seed=0):
    dice = np.random.default_rng(seed)
    flat = flatten(specs(CONFIG))
    return unflatten(
        {path: (2 * (spec.std or 0.5) * dice.normal(size=spec.shape)).astype("f4") for path, spec in flat.items()}
    )


@pytest.fixture(scope="module")
def layout():
    return Layout(MeshConfig().build(jax.devices()[:1]))


@partial(jax.jit, static_argnames="layout")
def full_forward(params, tokens, layout):
    positions = jnp.arange(CONFIG.max_positions)[None]
    hidden = forward(params, tokens, jnp.ones_like(positions), positions, CONFIG, layout)
    return logits(params, hidden, CONFIG)[0]


def by_full_forward(params, layout, tokenizer):
    """Greedy continuations, one prompt at a time, the whole text computed anew for each token."""
    texts = []
    for prompt in PROMPTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
        start = len(ids)
        while len(ids) < start + NEW and tokenizer.eos_id not in ids[start:]:
            padded = np.pad(ids, (0, CONFIG.max_positions - len(ids)))[None]
            ids.append(int(np.argmax(full_forward(params, padded, layout)[len(ids) - 1])))
        texts.append(ids[start:])
    return texts


@pytest.fixture(scope="module")
def model(layout, tokenizer):
    """A model, and the ids it writes after each prompt: eos is made likelier until it ends some, but not all."""
    params = random_params()
    direction = params["head"][:, 100:108].sum(1)
    for share in np.linspace(0, 1, 21):
        params["head"][:, tokenizer.eos_id] = share * direction
        expected = by_full_forward(params, layout, tokenizer)
        if 0 < sum(tokenizer.eos_id in ids for ids in expected) < len(PROMPTS):
            return params, expected
    raise AssertionError("no model found that ends only some texts")


@pytest.fixture
def params(model):
    return model[0]


def test_greedy_is_what_the_full_forward_would_choose_at_each_token(model, layout, tokenizer):
    params, expected = model
    texts = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    assert texts == [tokenizer.decode(ids) for ids in expected]  # decode leaves eos out
    assert len(set(texts)) == len(PROMPTS)


def test_greedy_is_what_transformers_generates_from_the_export(params, layout, tokenizer, tmp_path):
    import transformers

    export(params, CONFIG, tokenizer, tmp_path / "export", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", local_files_only=True)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    expected = []
    for prompt in PROMPTS:
        ids = reader(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(out.tolist()))
    assert generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW) == expected


def test_a_model_over_eight_devices_writes_the_same(model, tokenizer):
    params, expected = model
    spread = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]))
    placed = jax.device_put(params, spread.parameters(specs(CONFIG)))
    texts = generate(placed, CONFIG, spread, tokenizer, PROMPTS[:3], max_new_tokens=NEW)
    assert texts == [tokenizer.decode(ids) for ids in expected[:3]]


def test_draws_repeat_with_the_seed_and_do_not_depend_on_the_other_prompts(params, layout, tokenizer):
    def draw(prompts, seed=0):
        return generate(
            params, CONFIG, layout, tokenizer, prompts, max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=seed
        )

    assert draw(PROMPTS) == draw(PROMPTS)
    assert draw(PROMPTS)[1] == draw(["a", PROMPTS[1], "b", "c"])[1]
    assert draw(PROMPTS) != draw(PROMPTS, seed=1)
    assert len(set(draw(["1"] * 4))) == 4  # equal prompts do not draw alike


def test_draws_follow_the_temperature_and_top_p(params, layout, tokenizer):
    """Of 1500 draws of one token, each is as frequent as softmax(logits / temperature) within the nucleus says."""
    temperature, top_p, draws = 0.7, 0.8, 1500
    bos = np.full((1, CONFIG.max_positions), tokenizer.bos_id)
    scores = np.asarray(full_forward(params, bos, layout), np.float64)[0] / temperature
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = np.argsort(-shares)
    nucleus = order[: int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1]
    expected = {}
    for token in nucleus:
        text = tokenizer.decode([token])
        expected[text] = expected.get(text, 0.0) + shares[token] / shares[nucleus].sum()
    drawn = generate(
        params, CONFIG, layout, tokenizer, [""] * draws, max_new_tokens=1, temperature=temperature, top_p=top_p
    )
    assert set(drawn) <= set(expected)
    for text, share in expected.items():
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(drawn.count(text) / draws - share) < 5 * deviation, text


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.82, 3), (1.0, 4)])
def test_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
    shares = np.array([[0.125, 0.5, 0.0625, 0.3125]])
    left = np.isfinite(_likeliest(jnp.log(shares), top_p))[0]
    assert set(np.flatnonzero(left)) == set([1, 3, 0, 2][:kept])


def test_too_long_a_prompt_is_refused_with_the_numbers(params, layout, tokenizer):
    ids = tokenizer.encode("1" * 80)
    assert len(ids) == 80
    assert generate(params, CONFIG, layout, tokenizer, ["1" * 80], max_new_tokens=15)
    with pytest.raises(UserError, match="prompt 2 has 81 tokens, and with 16 new ones they exceed the model's 96 pos"):
        generate(params, CONFIG, layout, tokenizer, ["a", "1" * 80], max_new_tokens=16)


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(max_new_tokens=0)])
def test_options_out_of_range_are_refused(options, params, layout, tokenizer):
    with pytest.raises(UserError, match="they must be"):
        generate(params, CONFIG, layout, tokenizer, PROMPTS, **{"max_new_tokens": 1} | options)


def test_no_prompts_no_texts_and_bfloat16_runs(params, layout, tokenizer):
    assert generate(params, CONFIG, layout, tokenizer, [], max_new_tokens=1) == []
    half = replace(CONFIG, compute="bfloat16")
    assert len(generate(params, half, layout, tokenizer, PROMPTS, max_new_tokens=NEW)) == len(PROMPTS)
