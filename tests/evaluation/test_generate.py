import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation import generate as module
from eurollm_jax.evaluation.generate import LOOK_EVERY, Sampling, _continuation, _likeliest, generate
from eurollm_jax.hf.export import export
from eurollm_jax.hf.mapping import InMemory
from eurollm_jax.hf.tokenizer import write_hf_tokenizer
from eurollm_jax.model.config import Attention, BalanceBias, Gated, MoE, Rope, TransformerConfig
from eurollm_jax.model.param import flatten, unflatten
from eurollm_jax.model.transformer import forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

CONFIG = TransformerConfig(
    vocab_size=640,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=96,
    mlp=Gated(48),
    pattern=(Attention(rope=Rope(theta=5e3)),),
    compute="float32",
)
PROMPTS = ["Übermorgen fährt", "", "Το καράβι έφυγε από το λιμάνι", "1"]
NEW = 24


def random_params(config=CONFIG, seed=0):
    dice = np.random.default_rng(seed)
    flat = flatten(specs(config))
    return unflatten(
        {path: (2 * (spec.std or 0.5) * dice.normal(size=spec.shape)).astype("f4") for path, spec in flat.items()}
    )


@pytest.fixture(scope="module")
def layout():
    return Layout(MeshConfig().build(jax.devices()[:1]))


@partial(jax.jit, static_argnames=("layout", "config"))
def full_forward(params, tokens, layout, config=CONFIG):
    positions = jnp.arange(config.max_positions)[None]
    hidden, _ = forward(params, tokens, jnp.ones_like(positions), positions, config, layout)
    return logits(params, hidden, config)[0]


def by_full_forward(params, layout, tokenizer, config=CONFIG):
    """Greedy continuations, one prompt at a time, the whole text computed anew for each token."""
    texts = []
    for prompt in PROMPTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
        start = len(ids)
        while len(ids) < start + NEW and tokenizer.eos_id not in ids[start:]:
            padded = np.pad(ids, (0, CONFIG.max_positions - len(ids)))[None]
            ids.append(int(np.argmax(full_forward(params, padded, layout, config)[len(ids) - 1])))
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


def texts_of(continuations):
    return [continuation.text for continuation in continuations]


def said(tokenizer, ids):
    """The text of ids, without what the limit of tokens left of a character."""
    whole = tokenizer.decode_bytes(ids)
    if tokenizer.eos_id in ids:
        return whole.decode("utf-8", "replace")
    cut = max((n for n in range(1, 4) if unfinished(whole[-n:])), default=0)
    return whole[: len(whole) - cut].decode("utf-8", "replace")


def unfinished(end):
    """Whether bytes are the first of a character that misses some."""
    return any(end == chr(point).encode()[: len(end)] != chr(point).encode() for point in CHARACTERS)


CHARACTERS = [n for n in range(128, 0x11_0000) if not 0xD800 <= n < 0xE000 and (n < 0x3000 or n % 64 == 0)]


def test_greedy_is_what_the_full_forward_would_choose_at_each_token(model, layout, tokenizer):
    params, expected = model
    written = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    assert [list(continuation.tokens) for continuation in written] == expected
    assert texts_of(written) == [said(tokenizer, ids) for ids in expected]
    assert len(set(texts_of(written))) == len(PROMPTS)
    ended = ["eos" if tokenizer.eos_id in ids else "length" for ids in expected]
    assert [continuation.reason for continuation in written] == ended
    assert set(ended) == {"eos", "length"}


def test_a_batch_of_prompts_is_continued_as_each_alone(params, layout, tokenizer):
    together = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    alone = [generate(params, CONFIG, layout, tokenizer, [prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert together == alone


WINDOWED = replace(CONFIG, depth=5, pattern=(Attention(window=4), Attention(window=2, rope=None), Attention()))
EXPERTS = replace(CONFIG, mlp=MoE(experts=4, top_k=2, hidden=24, score="sigmoid", balance=BalanceBias()))


@pytest.mark.parametrize("config", [WINDOWED, EXPERTS], ids=["windows", "experts"])
def test_windows_and_experts_are_those_of_the_full_forward(config, layout, tokenizer):
    """Windows of 4 and 2 keys, far shorter than prompt and continuation, in a pattern that does not divide the depth;
    and tokens that are sent to experts one by one."""
    params = random_params(config)
    expected = by_full_forward(params, layout, tokenizer, config)
    assert expected != by_full_forward(params, layout, tokenizer, replace(config, pattern=(Attention(),)))
    written = generate(params, config, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    assert [list(continuation.tokens) for continuation in written] == expected


@pytest.mark.parametrize("config", [WINDOWED, EXPERTS], ids=["windows", "experts"])
def test_casting_the_weights_beforehand_changes_nothing(config, layout, tokenizer):
    config = replace(config, compute="bfloat16")
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 640, (1, config.max_positions))
    cast = module._cast(params, config)
    assert cast["embedding"].dtype == "bfloat16"
    expected = full_forward(params, tokens, layout, config)
    np.testing.assert_array_equal(full_forward(cast, tokens, layout, config), expected)


def test_greedy_is_what_transformers_generates_from_the_export(params, layout, tokenizer, tmp_path):
    import transformers

    export(InMemory(params), CONFIG, tokenizer, tmp_path / "export", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", local_files_only=True)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    expected = []
    for prompt in PROMPTS:
        ids = reader(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected.append(said(tokenizer, out.tolist()))
    assert texts_of(generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)) == expected


def test_a_model_over_eight_devices_writes_the_same(model, tokenizer):
    params, expected = model
    spread = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]))
    placed = jax.device_put(params, spread.parameters(specs(CONFIG)))
    written = generate(placed, CONFIG, spread, tokenizer, PROMPTS[:3], max_new_tokens=NEW)
    assert [list(continuation.tokens) for continuation in written] == expected[:3]
    assert generate(placed, CONFIG, spread, tokenizer, PROMPTS[:3], max_new_tokens=NEW, stop=["\0"]) == written


def test_draws_repeat_with_the_seed_and_do_not_depend_on_the_other_prompts(params, layout, tokenizer):
    def draw(prompts, seed=0):
        sampling = Sampling(1.0, top_k=200, top_p=0.9, seed=seed)
        return texts_of(generate(params, CONFIG, layout, tokenizer, prompts, max_new_tokens=NEW, sampling=sampling))

    assert draw(PROMPTS) == draw(PROMPTS)
    assert draw(PROMPTS)[1] == draw(["a", PROMPTS[1], "b", "c"])[1]
    assert draw(PROMPTS) != draw(PROMPTS, seed=1)
    assert len(set(draw(["1"] * 4))) == 4  # equal prompts do not draw alike


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (None, 0.8), (12, 1.0), (12, 0.6)])
def test_draws_follow_temperature_top_k_and_top_p(top_k, top_p, params, layout, tokenizer):
    """Of 1500 draws of one token, each is as frequent as softmax(logits / temperature), cut to the `top_k` likeliest,
    made to sum to one, and cut to the nucleus, says."""
    temperature, draws = 0.7, 1500
    bos = np.full((1, CONFIG.max_positions), tokenizer.bos_id)
    scores = np.asarray(full_forward(params, bos, layout), np.float64)[0] / temperature
    order = np.argsort(-scores)[:top_k]
    shares = np.exp(scores[order] - scores.max()) / np.exp(scores[order] - scores.max()).sum()
    size = len(order) if top_p == 1 else int(np.searchsorted(np.cumsum(shares), top_p)) + 1
    expected = dict(zip(order[:size].tolist(), shares[:size] / shares[:size].sum(), strict=True))
    sampling = Sampling(temperature, top_k, top_p)
    written = generate(params, CONFIG, layout, tokenizer, [""] * draws, max_new_tokens=1, sampling=sampling)
    drawn = [continuation.tokens[0] for continuation in written]
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(drawn.count(token) / draws - share) < 5 * deviation + 3 / draws, token


def test_the_likeliest_of_one_is_greedy(params, layout, tokenizer):
    greedy = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    for sampling in (Sampling(1.3, top_k=1, seed=5), Sampling(1.3, top_p=1e-9, seed=5)):
        assert generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling) == greedy


def test_more_than_there_are_tokens_is_all_of_them(params, layout, tokenizer):
    def draw(top_k):
        sampling = Sampling(1.0, top_k)
        return generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling)

    assert draw(10**6) == draw(None)


@pytest.mark.parametrize("top_k", [1, 2, 7, 40, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.75, 0.95, 1.0])
def test_what_may_be_drawn_is_what_transformers_would_draw_from(top_k, top_p):
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = 3 * np.random.default_rng(top_k).normal(size=(16, 100)).astype(np.float32)
    theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, torch.tensor(scores))).numpy()
    ours = np.asarray(_likeliest(jnp.asarray(scores), top_k, top_p))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.82, 3), (1.0, 4)])
def test_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
    shares = np.array([[0.125, 0.5, 0.0625, 0.3125]])
    left = np.isfinite(_likeliest(jnp.log(shares), 4, top_p))[0]
    assert set(np.flatnonzero(left)) == set([1, 3, 0, 2][:kept])


def test_a_stop_string_ends_the_text_before_it_wherever_it_lies_in_the_tokens(model, layout, tokenizer):
    """Every piece of a greedy text, of one to six characters, as the stop string: within a token, across several."""
    params, expected = model
    row = max(range(len(PROMPTS)), key=lambda row: len(said(tokenizer, expected[row])))
    ids = expected[row]
    whole = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    pieces = {whole[i : i + n] for n in range(1, 7) for i in range(0, len(whole) - n + 1, 3)}
    pieces = sorted(piece for piece in pieces if "\ufffd" not in piece)
    assert len(pieces) > 20
    inside = across = 0
    for stop in pieces:
        written = generate(params, CONFIG, layout, tokenizer, [PROMPTS[row]], max_new_tokens=NEW, stop=[stop])[0]
        needed = next(n for n in range(len(ids) + 1) if stop.encode() in tokenizer.decode_bytes(ids[:n]))
        assert written.reason == "stop"
        assert list(written.tokens) == ids[:needed]
        assert written.text == whole[: whole.index(stop)]
        parts = [tokenizer.decode_bytes([token]) for token in ids]
        inside += any(stop.encode() in part and not part.startswith(stop.encode()) for part in parts)
        across += not any(stop.encode() in part for part in parts)
    assert inside
    assert across


def test_of_several_stop_strings_the_first_to_be_complete_ends_each_text_on_its_own(model, layout, tokenizer):
    params, expected = model
    full = [tokenizer.decode_bytes(ids).decode("utf-8", "replace") for ids in expected]
    pieces = {text[at : at + 2] for text in full[:2] for at in (6, 12)}
    stops = [*sorted(piece for piece in pieces if "\ufffd" not in piece), "a string that no text has"]
    assert len(stops) > 2
    written = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, stop=stops)
    for text, ids, continuation in zip(full, expected, written, strict=True):
        cut = min((text.index(stop) for stop in stops if stop in text), default=None)
        assert (continuation.reason == "stop") == (cut is not None)
        assert continuation.text == (text[:cut] if cut is not None else said(tokenizer, ids))
    assert generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, stop=stops[::-1]) == written
    assert {continuation.reason for continuation in written} > {"stop"}


def test_stop_strings_do_not_change_what_is_drawn_before_them(params, layout, tokenizer):
    sampling = Sampling(1.0, top_k=50, seed=3)
    free = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling)
    bound = generate(
        params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling, stop=["e", "ο", "\n"]
    )
    assert free != bound
    for one, other in zip(free, bound, strict=True):
        assert one.tokens[: len(other.tokens)] == other.tokens
        assert one.text.startswith(other.text)


def test_the_loop_ends_soon_after_every_row_has(model, layout, tokenizer, monkeypatch):
    params, expected = model
    steps = []
    write = module._write

    def counted(*arguments):
        state = write(*arguments)
        steps.append(int(state.filled))
        return state

    monkeypatch.setattr(module, "_write", counted)
    text = tokenizer.decode_bytes(expected[1]).decode("utf-8", "replace")
    generate(params, CONFIG, layout, tokenizer, [PROMPTS[1]], max_new_tokens=64, stop=[text.strip("\ufffd")[0]])
    assert steps == [LOOK_EVERY]
    steps.clear()
    ended = next(row for row, ids in enumerate(expected) if tokenizer.eos_id in ids)
    generate(params, CONFIG, layout, tokenizer, [PROMPTS[ended]], max_new_tokens=64)
    assert steps == [len(expected[ended])]
    steps.clear()
    generate(params, CONFIG, layout, tokenizer, [""], max_new_tokens=2 * LOOK_EVERY + 3, stop=["no such text"])
    assert steps[-1] <= 2 * LOOK_EVERY + 3


class Spelling:
    """A tokenizer of which each token is some bytes; `eos` is the first."""

    def __init__(self, *pieces, eos_ids=(0,)):
        self.pieces, self.eos_ids = pieces, eos_ids

    def decode_bytes(self, ids, *, continues):
        assert continues  # a prompt's tokens stand before
        return b"".join(b"" if token in self.eos_ids else self.pieces[token] for token in ids)


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "count", "reason"),
    [
        ("ab cd ef", (), "abcdef", 3, "length"),
        ("ab cd ef", ("bc",), "a", 2, "stop"),
        ("ab cd ef", ("d",), "abc", 2, "stop"),
        ("ab cd ef", ("f", "bcde"), "a", 3, "stop"),  # both complete with the same token: the earlier
        ("ab cd ef", ("ef", "d"), "abc", 2, "stop"),
        ("ab EOS bc", ("bc",), "ab", 2, "eos"),  # what comes after the end is not there
        ("ab c EOS", ("bc",), "a", 2, "stop"),
        ("EOS", (), "", 1, "eos"),
        ("x ab", ("x",), "", 1, "stop"),
    ],
)
def test_where_a_text_ends(pieces, stops, text, count, reason):
    pieces = pieces.split()
    tokenizer = Spelling(b"", *(piece.encode() for piece in pieces))
    ids = [0 if piece == "EOS" else place for place, piece in enumerate(pieces, 1)]
    found = _continuation(ids, tokenizer, [stop.encode() for stop in stops])
    assert (found.text, found.tokens, found.reason) == (text, tuple(ids[:count]), reason)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"a\xce", b"\xb1b"], "aαb"),  # a character over two tokens
        ([b"a", b"\xf0\x9f", b"\x87", b"\xaa\xf0"], "a\U0001f1ea"),  # the limit cuts the next one off
        ([b"a\xb1", b"b"], "a\ufffdb"),  # no UTF-8
        ([b"\xce", b"a"], "\ufffda"),
    ],
)
def test_text_of_tokens_that_are_parts_of_characters(pieces, text):
    tokenizer = Spelling(b"", *pieces)
    ids = list(range(1, len(pieces) + 1))
    assert _continuation(ids, tokenizer, []).text == text
    assert _continuation(ids, tokenizer, [b"\xce\xb1"]).text == text.partition("α")[0]


def test_each_of_several_end_marks_ends_a_text(model, layout, tokenizer, monkeypatch):
    params, expected = model
    other = expected[1][5]
    monkeypatch.setattr(type(tokenizer), "eos_ids", (tokenizer.eos_id, other))
    written = generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW)
    for ids, continuation in zip(expected, written, strict=True):
        cut = next((n for n, token in enumerate(ids, 1) if token in (tokenizer.eos_id, other)), None)
        assert list(continuation.tokens) == ids[:cut]
        assert continuation.reason == ("length" if cut is None else "eos")
        assert continuation.text == said(tokenizer, ids[: None if cut is None else cut - 1] + [2] * (cut is not None))
    assert {other, tokenizer.eos_id} <= {continuation.tokens[-1] for continuation in written}


def test_a_tokenizer_without_a_beginning_mark(params, layout, tokenizer, monkeypatch):
    prompt, ids = "Η δασκάλα", tokenizer.encode("Η δασκάλα").tolist()
    start = len(ids)
    while len(ids) < start + 6 and tokenizer.eos_id not in ids[start:]:
        padded = np.pad(ids, (0, CONFIG.max_positions - len(ids)))[None]
        ids.append(int(np.argmax(full_forward(params, padded, layout)[len(ids) - 1])))
    monkeypatch.setattr(type(tokenizer), "bos_id", None)
    (written,) = generate(params, CONFIG, layout, tokenizer, [prompt], max_new_tokens=6)
    assert list(written.tokens) == ids[start:]
    with pytest.raises(UserError, match="prompt 2 is empty, and the tokenizer has no beginning mark"):
        generate(params, CONFIG, layout, tokenizer, ["a", ""], max_new_tokens=6)


def test_places_of_the_vocabulary_that_the_tokenizer_does_not_know_are_never_drawn(params, layout, tokenizer):
    wide = replace(CONFIG, vocab_size=704)
    padded = params | {
        "embedding": np.pad(params["embedding"], [(0, 64), (0, 0)]),
        "head": np.pad(params["head"], [(0, 0), (0, 64)], constant_values=5.0),
    }
    for sampling in (Sampling(), Sampling(1.0, seed=2)):
        written = generate(padded, wide, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling)
        assert written == generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling)


def test_a_control_token_that_the_model_has_no_row_for_changes_nothing(params, layout, tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, tmp_path, model_max_length=64)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    more = {"id": 640, "content": "<image_soft_token>", "special": True, "normalized": False}
    described["added_tokens"].append(more | {"single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    wider = Tokenizer.load(tmp_path)
    assert wider.vocab_size == 641
    for sampling in (Sampling(), Sampling(1.0, top_p=0.9, seed=2)):
        written = generate(params, CONFIG, layout, wider, PROMPTS, max_new_tokens=NEW, sampling=sampling)
        assert written == generate(params, CONFIG, layout, tokenizer, PROMPTS, max_new_tokens=NEW, sampling=sampling)


def test_too_long_a_prompt_is_refused_with_the_numbers(params, layout, tokenizer):
    ids = tokenizer.encode("1" * 80)
    assert len(ids) == 80
    assert generate(params, CONFIG, layout, tokenizer, ["1" * 80], max_new_tokens=15)
    with pytest.raises(UserError, match="prompt 2 has 81 tokens, and with 16 new ones they exceed the model's 96 pos"):
        generate(params, CONFIG, layout, tokenizer, ["a", "1" * 80], max_new_tokens=16)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=math.nan),
        dict(top_k=0),
        dict(seed=-1),
        dict(seed=2**32),
    ],
)
def test_sampling_out_of_range_is_refused(options):
    (value,) = options.values()
    with pytest.raises(UserError, match=f"is {value}: it must be"):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0: it must be 1 or more"),
        (dict(stop=["a", ""]), "a stop string is empty"),
        (dict(stop=["\ud800"]), "cannot occur in any text: character 1 is half a surrogate pair"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, message, params, layout, tokenizer):
    with pytest.raises(UserError, match=message):
        generate(params, CONFIG, layout, tokenizer, PROMPTS, **{"max_new_tokens": 1} | options)


def test_no_prompts_no_texts_and_bfloat16_runs(params, layout, tokenizer):
    assert generate(params, CONFIG, layout, tokenizer, [], max_new_tokens=1) == []
    half = replace(CONFIG, compute="bfloat16")
    assert len(generate(params, half, layout, tokenizer, PROMPTS, max_new_tokens=NEW)) == len(PROMPTS)
