"""A policy's name says what the compiled program keeps, and where; test_transformer.py that it changes no gradient."""

import dataclasses

import jax
import numpy as np
import pytest

from eurollm_jax.data.batch import Batch
from eurollm_jax.errors import UserError
from eurollm_jax.model.config import Gated, TransformerConfig
from eurollm_jax.model.loss import batch_loss
from eurollm_jax.model.param import Params, flatten
from eurollm_jax.model.remat import require_memory
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.mesh import Layout

ROWS, LENGTH = 2, 128
MODEL = TransformerConfig(
    vocab_size=64, width=64, depth=6, heads=4, kv_heads=2, head_dim=16, max_positions=LENGTH, mlp=Gated(176)
)


def gradient(remat, layout, model=MODEL):
    """The traced gradient of the loss under a policy."""
    config = dataclasses.replace(model, remat=remat)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.float32), specs(config))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32)
    mask, source = jax.ShapeDtypeStruct((ROWS, LENGTH), bool), jax.ShapeDtypeStruct((ROWS,), np.int32)

    def loss(params: Params, batch: Batch) -> jax.Array:
        return batch_loss(params, batch, config, layout)[0]

    return jax.jit(jax.grad(loss)).trace(params, Batch(tokens, tokens, tokens, tokens, mask, source))


@pytest.fixture(scope="module")
def scratch(one_device):
    """Bytes of scratch memory that the compiled gradient takes."""

    def measured(remat):
        return gradient(remat, one_device).lower().compile().memory_analysis().temp_size_in_bytes

    return {remat: measured(remat) for remat in ("none", "dots", "attention", "full")}


def test_each_policy_takes_less_memory_than_the_one_before(scratch):
    assert scratch["none"] > scratch["dots"] > scratch["attention"] > scratch["full"]


def test_what_is_computed_again_keeps_no_copy_of_the_weights(scratch, one_device):
    """Six more layers take more memory for their inputs, in bfloat16, and not for their weights."""
    deeper = dataclasses.replace(MODEL, depth=2 * MODEL.depth)
    twice = gradient("full", one_device, deeper).lower().compile().memory_analysis().temp_size_in_bytes
    inputs = MODEL.depth * ROWS * LENGTH * 2 * MODEL.width
    weights = sum(4 * spec.size for path, spec in flatten(specs(MODEL)).items() if path.startswith("layers/"))
    assert twice - scratch["full"] == pytest.approx(inputs, abs=weights / 4)


def test_attention_keeps_exactly_its_values_beside_the_input_of_a_layer(scratch):
    """Query, what was attended, key and value in bfloat16, and the sums of the scores in float32."""
    heads = 2 * MODEL.heads * MODEL.head_dim + 2 * MODEL.kv_heads * MODEL.head_dim
    kept = MODEL.depth * ROWS * LENGTH * (2 * heads + 4 * MODEL.heads)
    assert scratch["attention"] - scratch["full"] == pytest.approx(kept, rel=0.35)


def test_offloaded_values_go_to_the_host_and_come_back(one_device):
    """As it is lowered for an NVIDIA GPU; under any other policy nothing moves."""
    reference = dataclasses.replace(MODEL, attention_kernel="reference")
    cuda = Layout(one_device.mesh, lowered_for="cuda")
    texts = {
        remat: gradient(remat, cuda, reference).lower(lowering_platforms=("cuda",)).as_text()
        for remat in ("attention", "offload")
    }
    assert texts["offload"].count('"pinned_host"') >= 4  # the layer's input, query, key and value
    assert texts["offload"].count("annotate_device_placement") >= 2 * 4  # each there and back
    assert "annotate_device_placement" not in texts["attention"]


def test_a_cpu_has_nowhere_to_offload_to(one_device):
    with pytest.raises(UserError, match="choose remat='attention', which keeps as much, or 'full'"):
        require_memory("offload", one_device)
    require_memory("attention", one_device)
    require_memory("offload", Layout(one_device.mesh, lowered_for="rocm"))
