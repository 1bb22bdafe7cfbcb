"""What every family must show: a small random model of transformers, read by us, computes the same, and comes back."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.load import load
from eurollm_jax.model.config import TransformerConfig
from eurollm_jax.model.param import Params, flatten
from eurollm_jax.model.transformer import empty_cache, extend, forward, logits, specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

LOGITS_TOLERANCE = 2e-4
NEW_TOKENS = 32


def variants(cases: Iterable[str], *, fast: tuple[str, ...]) -> list[Any]:
    """The names of all cases as parameters; those that are not `fast` run in the slow set."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in cases]


def random_model(model_class: Any, config: Any, *, seed: int = 0, std: float = 0.15) -> Any:
    """A model of transformers with every weight random: gains around their start, biases apart from zero."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=std)
            else:
                weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.1))
    return model


def saved(model: Any, folder: Path, *, max_shard_size: str = "50KB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def random_folder(name: str, fields: dict[str, Any], folder: Path) -> tuple[Any, Path]:
    """A random model of the class `name`ForCausalLM, and the folder of several shards that transformers writes."""
    config = getattr(transformers, f"{name}Config")(**fields)
    model = random_model(getattr(transformers, f"{name}ForCausalLM"), config)
    saved(model, folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder


def one_device() -> Layout:
    return Layout(MeshConfig().build(jax.devices()[:1]))


def tokens_for(config: TransformerConfig, *, rows: int = 2, length: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))


def our_logits(params: Params, config: TransformerConfig, tokens: np.ndarray, layout: Layout) -> np.ndarray:
    config = replace(config, compute="float32", remat="none")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def compute(params: Params) -> jax.Array:
        hidden, _ = forward(params, jnp.asarray(tokens), jnp.ones_like(positions), positions, config, layout)
        return logits(params, hidden, config)

    return np.asarray(compute(params))


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def our_greedy(params: Params, config: TransformerConfig, prompt: np.ndarray, new: int) -> np.ndarray:
    """`new` likeliest tokens after each row, by the cache."""
    config, layout = replace(config, compute="float32", remat="none"), one_device()
    rows, length = prompt.shape

    @jax.jit
    def step(params: Params, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        hidden, cache = extend(params, tokens, jnp.full(rows, tokens.shape[1]), cache, config, layout)
        return jnp.argmax(logits(params, hidden[:, -1:], config)[:, -1], axis=-1), cache

    token, cache = step(params, jnp.asarray(prompt), empty_cache(rows, length + new, config))
    found = [token]
    while len(found) < new:
        token, cache = step(params, found[-1][:, None], cache)
        found.append(token)
    return np.stack(found, axis=1)


def their_greedy(model: Any, prompt: np.ndarray, new: int) -> np.ndarray:
    model.generation_config.eos_token_id = None  # it would be kept from coming up before the last token
    with torch.no_grad():
        ids = torch.from_numpy(prompt)
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    return whole[:, prompt.shape[1] :].numpy()


def assert_same_function(model: Any, folder: Path) -> HubFolder:
    """Logits and greedy continuations of the model, and of what we read from its folder."""
    hub = HubFolder(folder)
    config, params = load(hub, one_device())
    tokens = tokens_for(config)
    theirs = their_logits(model, tokens)
    assert np.abs(theirs).max() > 0.5, "logits this small would hide a difference"
    np.testing.assert_allclose(our_logits(params, config, tokens, one_device()), theirs, rtol=0, atol=LOGITS_TOLERANCE)
    prompt = tokens[:, :9]
    np.testing.assert_array_equal(
        our_greedy(params, config, prompt, NEW_TOKENS), their_greedy(model, prompt, NEW_TOKENS)
    )
    return hub


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_bijection(hub: HubFolder) -> None:
    """Each tensor of the files is one part of one of our weights, and each part of ours is one tensor of theirs."""
    assert {tensor.name for tensor in hub.tensors} | hub._constants.keys() == tensors_of(hub.folder).keys()
    parts: dict[str, list[tuple[int, ...]]] = {}
    for tensor in hub.tensors:
        parts.setdefault(tensor.path, []).append(tensor.index)
    weights = flatten(specs(hub.config))
    assert parts.keys() == weights.keys()
    for path, indices in parts.items():
        assert sorted(indices) == sorted(np.ndindex(weights[path].shape[: len(indices[0])])), path


def exported_again(hub: HubFolder, out: Path, params: Params | None = None) -> Path:
    """What we write of an imported model, in the type and the architecture that it came in."""
    from eurollm_jax.hf.export import Imported, export
    from eurollm_jax.hf.mapping import InMemory

    weights = InMemory(load(hub, one_device())[1] if params is None else params)
    imported = Imported(hub.family.exported_as or hub.family.architecture, hub.dtype, hub.raw, None)
    export(weights, hub.config, None, out, dtype=hub.dtype, max_shard_bytes=50_000, imported=imported)
    return out


def assert_comes_back(hub: HubFolder, out: Path) -> None:
    """Import and export give each tensor back, byte for byte, under its name."""
    before, after = tensors_of(hub.folder), tensors_of(exported_again(hub, out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert value.tobytes() == after[name].tobytes(), name


def assert_trains(hub: HubFolder, out: Path) -> None:
    """One step on eight devices changes the weights, and transformers loads what is exported and computes it."""
    from eurollm_jax.data.batch import Batch
    from eurollm_jax.training.optimizer import AdamW
    from eurollm_jax.training.step import build_program

    layout = Layout(MeshConfig(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]))
    config = replace(hub.config, compute="float32")
    _, params = load(hub, layout)
    before = jax.device_get(params)
    program = build_program(
        config,
        layout,
        AdamW().build(lambda _: 1e-3, specs(config)),
        batch_sizes=[8],
        token_bytes=np.ones(config.vocab_size, np.int32),
        sources=1,
        z_loss=1e-4,
    )
    tokens = tokens_for(config, rows=8, length=17).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(bool), np.zeros(8, np.int32))
    state, metrics = program.train(program.start(params), layout.place_rows(batch))
    assert np.isfinite(metrics.loss)
    after = jax.device_get(state.params)
    changed = {path: np.abs(value - flatten(before)[path]).max() > 0 for path, value in flatten(after).items()}
    assert all(changed.values()), [path for path, moved in changed.items() if not moved]

    folder = exported_again(hub, out, state.params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = tokens_for(config)
    theirs = their_logits(model.eval(), tokens)
    np.testing.assert_allclose(our_logits(after, config, tokens, one_device()), theirs, rtol=0, atol=LOGITS_TOLERANCE)


NEWER_ONLY = ("rope_parameters",)
OLDER_ONLY = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor")


def assert_config_comes_back(hub: HubFolder, *, without_effect: tuple[str, ...] = (), older_alone: bool = True) -> None:
    """What we write of the configuration is the same to transformers and to us: all of it, and either schema alone.

    `without_effect` names fields that say nothing where another is given; without `older_alone` the older schema is one
    that versions of transformers read differently.
    """
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from eurollm_jax.hf.families.family import canonical
    from eurollm_jax.hf.fields import NEUTRAL

    config_class = getattr(transformers, hub.family.architecture).config_class

    def frequencies(raw: dict[str, Any]) -> list[float]:
        """What the fields come to, of which the same can be said in several ways."""
        config = config_class.from_dict(copy.deepcopy(raw))
        said, found = config.rope_parameters, []
        kinds = sorted(kind for kind, value in said.items() if isinstance(value, dict))
        for kind, one in [(kind, said[kind]) for kind in kinds] or [(None, said)]:
            compute = ROPE_INIT_FUNCTIONS.get(one["rope_type"])
            turns, factor = compute(config, layer_type=kind) if compute else (torch.tensor(one["rope_theta"]), 1.0)
            found += [*(round(value, 7) for value in turns.reshape(-1).tolist()), round(factor, 7)]
        return found

    def understood(raw: dict[str, Any]) -> dict[str, Any]:
        theirs = config_class.from_dict(copy.deepcopy(raw)).to_dict()
        theirs["head_dim"] = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
        theirs["rope_parameters"] = frequencies(raw)
        theirs.pop("original_max_position_embeddings", None)  # what it comes to is in the frequencies
        return {name: value for name, value in theirs.items() if name not in NEUTRAL | set(without_effect)}

    wanted = understood(dict(hub.raw))
    written = hub.family.write(hub.config)
    for left_out in ((), OLDER_ONLY, *([NEWER_ONLY] if older_alone else [])):
        raw = {name: value for name, value in written.items() if name not in left_out}
        assert canonical(hub.family.config(raw)) == canonical(hub.config), f"without {left_out}"
        assert understood(raw) == wanted, f"without {left_out}"


def assert_in_and_out(model: Any, folder: Path, out: Path, **config_options: Any) -> None:
    """The whole way there and back: the same function, each tensor once and unchanged, the same configuration."""
    hub = assert_same_function(model, folder)
    assert_bijection(hub)
    assert_comes_back(hub, out)
    assert_config_comes_back(hub, **config_options)
