"""Collectives as the compilers write them, from literal text."""

import pytest

from launch.collectives import axes_of, device_groups, find_collectives, wire_bytes
from launch.hlo import parse

# As compiled for v5e: a loop of three turns over layers, each of which gathers its weights.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %piece = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={16,128}
}

%body (carry: (s32[], bf16[64,128], bf16[8,128])) -> (s32[], bf16[64,128], bf16[8,128]) {
  %carry = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %w = bf16[8,128]{1,0} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %all-gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/layers/kernel"}
  ROOT %out = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}) tuple(%next, %x, %w)
}

%condition (carry.1: (s32[], bf16[64,128], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %carry.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (x.1: bf16[64,128], w.1: bf16[8,128], g: f32[64,128]) -> f32[16,128] {
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[8,128]{1,0} parameter(1)
  %g = f32[64,128]{1,0:T(8,128)} parameter(2)
  %start = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}) tuple(%start, %x.1, %w.1)
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}) while(%first), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %all-reduce.2 = (f32[64,128]{1,0:T(8,128)}, f32[]{:T(128)}) all-reduce(%g, %start), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %fusion.1 = f32[16,128]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501
MESH = {"data": 2, "fsdp": 4}


def _by_kind(**options):
    return {c.kind: c for c in find_collectives(parse(PROGRAM), MESH, **options)}


def test_a_gather_in_a_loop_counts_as_often_as_the_loop_turns():
    found = _by_kind()["all-gather"]
    assert (found.axes, found.group_size, found.count) == (("fsdp",), 4, 3)
    assert found.bytes == 3 * 32 * 128 * 2
    assert found.wire_bytes == found.bytes * 3 / 4
    assert (found.largest, found.largest_name) == (32 * 128 * 2, "jit(step)/layers/kernel")


def test_an_all_reduce_of_several_arrays_and_the_fused_reduce_scatter():
    found = _by_kind()
    assert found.keys() == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-reduce"].axes == ("data",)
    assert found["all-reduce"].bytes == 64 * 128 * 4 + 4
    assert found["reduce-scatter"].axes == ("fsdp",)
    assert found["reduce-scatter"].bytes == 64 * 128 * 4


def test_slices_are_crossed_by_the_axis_that_spans_them():
    found = _by_kind(slices=[0, 0, 0, 0, 1, 1, 1, 1])
    assert {k: c.crosses_slices for k, c in found.items()} == {
        "all-gather": False, "all-reduce": True, "reduce-scatter": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'a'}",
         [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [(0, 3), (1, 2)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_groups_in_every_notation(text, groups):
    line = f"  %c = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, to_apply=%add"
    program = parse(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4] parameter(0)\n{line}\n}}")
    assert device_groups(program.by_name["c"], 4) == groups


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("replica_groups=who_knows", "replica_groups of c"),
        ("replica_groups=mesh['a'=4], device_ids=(x) {'a'}", "device_ids x"),
    ],
)
def test_an_unknown_notation_is_an_error(text, match):
    line = f"  %c = f32[4]{{0}} all-reduce(%x), {text}, to_apply=%add"
    program = parse(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4] parameter(0)\n{line}\n}}")
    with pytest.raises(ValueError, match=match):
        device_groups(program.by_name["c"], 4)


def test_axes_are_those_along_which_a_group_differs():
    assert axes_of([(0, 1), (2, 3)], {"data": 2, "fsdp": 2}) == ("fsdp",)
    assert axes_of([(0, 3)], {"data": 2, "fsdp": 2}) == ("data", "fsdp")
    assert axes_of([(0,)], {"data": 2, "fsdp": 2}) == ()


def test_bytes_on_the_wire_are_those_of_a_ring():
    assert wire_bytes("all-reduce", 100.0, 4) == 150.0
    assert wire_bytes("all-gather", 100.0, 4) == 75.0
    assert wire_bytes("collective-permute", 100.0, 4) == 100.0
