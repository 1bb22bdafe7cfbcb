"""What a compiled step sends, against closed forms, and the model of a search against what is compiled."""

import dataclasses

import pytest

from eurollm_jax.cluster.plan.child import SOURCES, Request, compile_elsewhere
from eurollm_jax.cluster.plan.collectives import total
from eurollm_jax.cluster.plan.sending import modelled_collectives
from eurollm_jax.cluster.site import Site
from eurollm_jax.model.param import count, flatten
from eurollm_jax.model.transformer import specs
from eurollm_jax.parallel.hardware import Chip
from eurollm_jax.parallel.mesh import MESH_AXES, MeshConfig
from tests.cluster.plans import experiment, with_model

BASE = with_model(experiment(), compute="float32", remat="none")
CASES = {
    "data": dataclasses.replace(BASE, mesh=MeshConfig(data=8)),
    "fsdp": with_model(
        dataclasses.replace(BASE, mesh=MeshConfig(data=1, fsdp=8)),
        compute="bfloat16",
        remat="full",
        attention_kernel="auto",
    ),
    "fsdp in two": with_model(
        dataclasses.replace(BASE, mesh=MeshConfig(data=1, fsdp=8), accumulate=2),
        compute="bfloat16",
        remat="full",
        attention_kernel="auto",
    ),
    "tensor": dataclasses.replace(BASE, mesh=MeshConfig(data=1, tensor=4)),
    "all": with_model(
        dataclasses.replace(BASE, mesh=MeshConfig(data=1, fsdp=2, context=2, tensor=2)),
        compute="bfloat16",
        remat="full",
    ),
}
SITE = Site("eight", "Eight", Chip("E", (), "cuda", 1e12, 1 << 30, 1e12, 100.0, ""), 8, 8, None, "none")
SUMS = 3 * SOURCES * 4 + 64  # bytes of the sums by source, and of scalars
ONE = dict.fromkeys(MESH_AXES, 1)
C, L, T, ROWS = BASE.model, BASE.model.depth, 64, 16


@pytest.fixture(scope="module")
def sent():
    asked = [Request(((one, one.batch_size),), "cuda", 4 if name == "tensor" else 8, 8) for name, one in CASES.items()]
    return {name: compile_elsewhere(request)[0].collectives for name, request in zip(CASES, asked, strict=True)}


def of(found, kind, dtype=None):
    return total([one for one in found if one.kind == kind and dtype in (None, one.dtype)])


def test_copies_of_the_model_add_their_gradients_up_once(sent):
    """2 P (n-1)/n; what remains are the sums by source, the count of targets and the loss."""
    found = sent["data"]
    assert {one.axes for one in found} == {("data",)}
    gradients = 2 * 4 * count(specs(C)) * 7 / 8
    assert {one.kind for one in found} == {"all-reduce"}
    rest = total(found) - gradients
    assert 0 < rest <= 2 * SUMS * 7 / 8
    scalars = [one for one in found if one.operand <= 4 * SOURCES]
    assert total(scalars) == pytest.approx(rest, abs=1e-6)


def test_fsdp_gathers_weights_twice_and_adds_gradients_up_in_parts(sent):
    """Each layer's weights (n-1)/n P, forward and backward, in the type of the products; the head once; gradients
    (n-1)/n P. What remains are the tokens, gathered to be looked up, and metrics."""
    found, share = sent["fsdp"], 7 / 8
    weights = flatten(specs(C))
    layers = sum(spec.size for path, spec in weights.items() if path.startswith("layers/"))
    head = weights["head"].size
    norm = C.width
    gains = 2 * L * C.width + 2 * norm  # which are gathered a third time, for their own gradients
    assert of(found, "all-gather", "bf16") == share * 2 * (2 * layers + head + gains)
    assert of(found, "all-gather", "s32") == share * 4 * ROWS * T
    assert of(found, "reduce-scatter", "bf16") == share * 2 * (layers + norm)
    assert of(found, "reduce-scatter", "f32") == share * 4 * head
    assert of(found, "all-to-all") == 2 * share * 2 * ROWS // 8 * T * C.width
    assert of(found, "all-reduce") < 2 * SUMS


def test_the_head_is_gathered_once_for_all_micro_batches(sent):
    """And the layers' weights and gains for each of them; each by itself, so that rounding hides none."""
    share = 7 / 8
    once, twice = (of(sent[name], "all-gather", "bf16") for name in ("fsdp", "fsdp in two"))
    head, norm = flatten(specs(C))["head"].size, C.width
    assert twice - share * 2 * head == pytest.approx(2 * (once - share * 2 * head), abs=share * 2 * 4 * norm)
    modelled = modelled_collectives(CASES["fsdp in two"], {**ONE, "fsdp": 8}, ROWS, SITE)
    assert of(modelled, "all-gather") == pytest.approx(twice, rel=0.05)


def test_tensor_gathers_and_deals_out_the_residual_stream(sent):
    """Forward and backward, each half of a layer gathers the stream, (n-1)/n of it, and deals a sum out again, as
    embedding and loss do once. What remains are gradients of gains, and a token's maximum and sums in the loss."""
    found, share = sent["tensor"], 3 / 4
    stream = 4 * ROWS * T * C.width
    assert {one.axes for one in found} == {("tensor",)}
    assert of(found, "all-gather") == share * stream * (4 * L + 2)
    assert of(found, "reduce-scatter") == share * stream * (4 * L + 2)
    rest = 2 * share * 4 * (3 * ROWS * T + (2 * L + 1) * C.width)
    assert of(found, "all-reduce") == pytest.approx(rest, abs=200)


def test_what_tensor_adds_leaves_the_other_axes_what_they_send(sent):
    """Weights are gathered over `fsdp` twice in the type of the products, though the gradient of the stream reads them
    apart from the products; and over `context` there are keys, values and gradients, and no part of the stream."""
    found, share = sent["all"], 1 / 2
    weights = flatten(specs(C))
    layers = sum(spec.size for path, spec in weights.items() if path.startswith("layers/") and spec.fan_in) / 2
    head, gains = weights["head"].size / 2, 3 * (2 * L + 1) * C.width
    over_fsdp = [one for one in found if one.axes == ("fsdp",)]
    assert of(over_fsdp, "all-gather", "bf16") == pytest.approx(share * 2 * (2 * layers + head), abs=share * 2 * gains)
    keys = 2 * (ROWS // 2) * (T // 2) * (C.kv_heads // 2) * C.head_dim
    over_context = [one for one in found if one.axes == ("context",)]
    assert of(over_context, "all-gather", "bf16") == share * 2 * 2 * keys * 2 * L
    assert {one.kind for one in found if len(one.axes) > 1} <= {"all-reduce"}


@pytest.mark.parametrize("name", CASES)
def test_the_model_of_a_search_is_near(name, sent):
    one = CASES[name]
    mesh = {axis: max(size, 1) for axis, size in dataclasses.asdict(one.mesh).items()}
    assert total(modelled_collectives(one, mesh, ROWS, SITE)) == pytest.approx(total(sent[name]), rel=0.15)
