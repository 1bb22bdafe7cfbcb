"""The engine of the tables: which part of their tensor is which part of ours, whatever is asked for."""

import re
from itertools import product

import jax
import numpy as np
import pytest
from einops import rearrange

from eurollm_jax.errors import UserError
from eurollm_jax.hf.export import export
from eurollm_jax.hf.families import FAMILIES
from eurollm_jax.hf.families.llama import TABLE
from eurollm_jax.hf.folder import HubFolder
from eurollm_jax.hf.load import load
from eurollm_jax.hf.mapping import InMemory, Tensor, tensors
from eurollm_jax.model.config import Attention, Gated, Rope, TransformerConfig
from eurollm_jax.model.param import flatten, unflatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout, MeshConfig

SIZES = {"a": 3, "b": 4, "c": 5}
PATTERNS = [
    *("a b c -> a b c", "a b c -> c b a", "a b c -> (a b) c", "a b c -> (b a) c", "a b c -> c (a b)"),
    *("a b c -> (c a b)", "a b c -> b (c a)", "a b -> b a", "a b -> (a b)", "a -> a", "->"),
]


def tensor_of(pattern):
    axes = pattern.split("->")[0].split()
    return Tensor("name", "path", (), pattern, {axis: SIZES[axis] for axis in axes})


def ours_for(tensor, dice):
    return dice.normal(size=tuple(tensor.sizes.values())).astype(np.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_there_and_back(pattern):
    tensor = tensor_of(pattern)
    ours = ours_for(tensor, np.random.default_rng(0))
    theirs = rearrange(ours, pattern, **tensor.sizes)
    assert (theirs.shape, theirs.size) == (tensor.shape, tensor.size)
    np.testing.assert_array_equal(tensor.from_hf(theirs), ours)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_slices_of_ours_out_of_what_is_read_of_theirs(pattern):
    dice = np.random.default_rng(1)
    tensor = tensor_of(pattern)
    ours = ours_for(tensor, dice)
    theirs = rearrange(ours, pattern, **tensor.sizes)
    for _ in range(200):
        wanted = tuple(
            slice(None) if dice.random() < 0.2 else slice(*sorted(map(int, dice.integers(0, size + 1, 2))))
            for size in tensor.sizes.values()
        )
        piece = np.asarray(theirs[tensor.their_slices(wanted)])
        np.testing.assert_array_equal(tensor.from_hf(piece, wanted), ours[wanted], err_msg=str(wanted))


def test_of_an_axis_that_leads_a_dimension_of_theirs_only_the_part_asked_for_is_read():
    tensor = tensor_of("a b c -> (b a) c")
    whole = slice(None)
    assert tensor.their_slices((whole, slice(1, 3), slice(4, 5))) == (slice(3, 9), slice(4, 5))
    assert tensor.their_slices((slice(1, 2), whole, whole)) == (slice(0, 12), slice(0, 5))


# ------------------------------------------------------------------------------------------------------------- tables

CONFIG = TransformerConfig(
    vocab_size=48,
    width=16,
    depth=3,
    heads=8,
    kv_heads=4,
    mlp=Gated(24, bias=True),
    head_dim=6,
    max_positions=64,
    pattern=(Attention(rope=Rope(theta=5e5)),),
    attention_bias="all",
)


@pytest.fixture(scope="module")
def weights():
    dice = np.random.default_rng(0)
    return {path: dice.normal(size=spec.shape).astype(np.float32) for path, spec in flatten(specs(CONFIG)).items()}


@pytest.fixture(scope="module")
def hub(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "model"
    export(InMemory(unflatten(weights)), CONFIG, None, out, dtype="float32", max_shard_bytes=9_000)
    return HubFolder(out)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_no_two_lines_of_a_table_have_the_same_name(family):
    names = [name for name, _ in family.table.values()] + list(family.constants)
    assert len(set(names)) == len(names)
    for name, pattern in family.table.values():
        ours, theirs = pattern.split("->")
        assert sorted(ours.split()) == sorted(re.findall(r"\w+", theirs)), name


def test_tensors_come_layer_by_layer():
    names = [tensor.name for tensor in tensors(TABLE, CONFIG)]
    layers = [int(found.group(1)) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]
    assert layers == sorted(layers)
    assert (names[0], names[-2:]) == ("model.embed_tokens.weight", ["model.norm.weight", "lm_head.weight"])
    assert len(set(names)) == len(names)


def test_a_weight_without_a_name_is_no_silent_loss():
    table = {path: line for path, line in TABLE.items() if path != "layers/up_bias"}
    with pytest.raises(ValueError, match=r"no name for \['layers/up_bias'\]"):
        tensors(table, CONFIG)


def test_heads_are_laid_one_after_the_other_in_the_rows_of_the_projection(weights, hub):
    tensor = next(tensor for tensor in hub.tensors if tensor.name == "model.layers.2.self_attn.q_proj.weight")
    theirs = hub.files[tensor.name].read(tensor.name)
    for head in range(CONFIG.heads):
        rows = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
        np.testing.assert_array_equal(theirs[rows], weights["layers/query"][2, :, head].T)


# --------------------------------------------------------------------------------------------------------------- load

MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4), (1, 4, 2), (2, 1, 4)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_each_device_gets_its_part(shape, weights, hub):
    axes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    mesh = MeshConfig(**axes).build(jax.devices()[: int(np.prod(shape))])
    layout = Layout(mesh)
    config, params = load(hub, layout)
    assert config == HubFolder(hub.folder).config
    shardings = flatten(layout.parameters(specs(CONFIG)))
    for path, value in flatten(params).items():
        assert value.sharding == shardings[path]
        np.testing.assert_array_equal(jax.device_get(value), weights[path], err_msg=path)
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, weights[path][shard.index], err_msg=path)


def test_a_mesh_that_does_not_divide_the_model_is_refused(hub):
    with pytest.raises(UserError, match="kv_heads 8 ways, and the model's kv_heads=4 does not divide by that"):
        load(hub, Layout(MeshConfig(data=1, tensor=8).build()))


def test_any_slices_of_a_weight_are_read_from_the_files(weights, hub):
    dice = np.random.default_rng(2)
    for tensor, _ in product(hub.tensors, range(5)):
        ours = weights[tensor.path][tensor.index]
        wanted = tuple(slice(*sorted(map(int, dice.integers(0, size + 1, 2)))) for size in ours.shape)
        np.testing.assert_array_equal(hub.read(tensor, wanted), ours[wanted], err_msg=f"{tensor.name} {wanted}")


def test_loading_reads_each_row_of_a_file_once_for_each_part(hub, monkeypatch):
    """No device's part takes more bytes than its share where the axis that is split leads their tensor."""
    from eurollm_jax.hf.tensor_file import TensorFile

    read: list[int] = []
    plain = TensorFile.read

    def counted(self, name, slices=None):
        value = plain(self, name, slices)
        read.append(value.size)
        return value

    monkeypatch.setattr(TensorFile, "read", counted)
    load(hub, Layout(MeshConfig(data=1, tensor=4).build(jax.devices()[:4])))
    split = [spec for spec in flatten(specs(CONFIG)).values() if {"heads", "kv_heads", "mlp", "vocab"} & set(spec.axes)]
    whole = [spec for spec in flatten(specs(CONFIG)).values() if spec not in split]
    assert sum(read) <= sum(spec.size for spec in split) + 4 * sum(spec.size for spec in whole)
