"""The reader of compiled programs, on small programs written by hand."""

import numpy as np
import pytest

from eurollm_jax.cluster.plan.collectives import Collective, Machine, collectives, replica_groups
from eurollm_jax.cluster.plan.hlo import parse, product_flops

EIGHT = Machine({"data": 2, "fsdp": 2, "tensor": 2}, devices_per_node=4)

LOOPS = """HloModule jit_train, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %summed = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %summed)
}

%outer_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %j = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

%outer_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %inner = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p), condition=%inner_condition, body=%inner_body
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%outer_condition, body=%outer_body, LENGTH
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_times_of_nested_loops_multiply():
    text = LOOPS.replace("LENGTH", 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}')
    (found,) = collectives(parse(text), EIGHT, for_gpu=False)
    assert found == Collective("all-reduce", ("tensor",), 2, 1, "f32", 8 * 4 * 4, times=15)
    assert found.each == 2 * 128 * 1 / 2
    assert found.sent == 15 * 128
    assert found.sent_between_nodes == 0


def test_a_loop_whose_length_depends_on_data_is_counted_once_and_said_to_be():
    (found,) = collectives(parse(LOOPS.replace(", LENGTH", "")), EIGHT, for_gpu=False)
    assert (found.times, found.certain) == (3, False)


KINDS = """HloModule kinds

%inside (q: bf16[16,8], at: s32[]) -> bf16[4,8] {
  %q = bf16[16,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %c = s32[] constant(0)
  ROOT %cut = bf16[4,8]{1,0} dynamic-slice(%q, %at, %c), dynamic_slice_sizes={4,8}
}

%sleep (s: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} parameter(0)
}

%step (s: f32[2]) -> f32[2] {
  %s = f32[2]{0} parameter(0)
  %moved = f32[2]{0} collective-permute(%s), source_target_pairs={{0,1},{1,0},{2,2},{4,0}}
  ROOT %twice = f32[2]{0} add(%moved, %moved)
}

ENTRY %main (x: bf16[4,8], y: f32[2], at: s32[], take: pred[]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %at = s32[] parameter(2)
  %take = pred[] parameter(3)
  %gather-start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), replica_groups={{0,2,4,6},{1,3,5,7}}
  %gather = bf16[16,8]{1,0} all-gather-done(%gather-start)
  %sums = (bf16[16,8]{1,0}, f32[2]{0}) all-reduce(%gather, %y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sleep
  %first = bf16[16,8]{1,0} get-tuple-element(%sums), index=0
  %second = f32[2]{0} get-tuple-element(%sums), index=1
  %own = bf16[4,8]{1,0} fusion(%first, %at), kind=kLoop, calls=%inside
  %part = f32[1]{0} reduce-scatter(%second), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, to_apply=%sleep
  %swapped = (f32[1]{0}, f32[1]{0}) all-to-all(%part, %part), replica_groups=[4,2]<=[2,4]T(1,0)
  %chosen = f32[2]{0} conditional(%take, %second, %second), true_computation=%step, false_computation=%sleep
  ROOT %result = bf16[4,8]{1,0} copy(%own)
}
"""


@pytest.fixture(scope="module")
def kinds():
    return parse(KINDS)


def test_each_kind_is_found_with_its_axes_its_type_and_its_bytes(kinds):
    found = {(one.kind, one.dtype, one.nodes): one for one in collectives(kinds, EIGHT, for_gpu=False)}
    gather = found["all-gather", "bf16", 2]
    assert (gather.axes, gather.devices, gather.operand, gather.each) == (("data", "fsdp"), 4, 64, 3 * 64)
    assert gather.sent_between_nodes == 256 / 2  # half of what is gathered lies in the other node
    assert gather.sent_within_node == 256 / 2  # and each of two devices gives the other what it has of both
    whole = found["all-reduce", "bf16", 2]
    assert (whole.axes, whole.each) == (("data", "fsdp"), 2 * 256 * 3 / 4)
    assert found["all-reduce", "f32", 2].each == 2 * 8 * 3 / 4
    scattered = found["reduce-scatter", "f32", 1]
    assert (scattered.axes, scattered.each) == (("fsdp",), 8 / 2)
    swapped = found["all-to-all", "f32", 2]
    assert (swapped.axes, swapped.times, swapped.each) == (("data",), 2, 4 / 2)


def test_of_a_conditional_the_longer_branch_is_taken_and_a_permutation_counts_what_moves(kinds):
    found = [one for one in collectives(kinds, EIGHT, for_gpu=False) if one.kind == "collective-permute"]
    assert {(one.axes, one.nodes, one.pairs) for one in found} == {(("tensor",), 1, 2 / 8), (("data",), 2, 1 / 8)}
    assert sum(one.sent for one in found) == 8 * 3 / 8


def test_an_all_reduce_of_which_a_part_is_used_is_a_reduce_scatter_on_gpus(kinds):
    found = {(one.kind, one.dtype) for one in collectives(kinds, EIGHT, for_gpu=True)}
    assert ("reduce-scatter", "bf16") in found
    assert ("all-reduce", "bf16") not in found
    assert ("all-reduce", "f32") in found


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_in_each_of_their_forms(text, groups):
    np.testing.assert_array_equal(replica_groups(text, EIGHT), groups)


def test_products_are_counted_with_their_loops():
    text = LOOPS.replace("LENGTH", 'backend_config={"known_trip_count":{"n":"5"}}').replace(
        "  ROOT %t = ",
        "  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n  ROOT %t = ",
    )
    assert product_flops(parse(text)) == 15 * 2 * 8 * 8 * 4


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")
