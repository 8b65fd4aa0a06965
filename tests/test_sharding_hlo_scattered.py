"""Sums that are kept in slices: recognised by the offsets of the slices, and by nothing less."""

from __future__ import annotations

import pytest
from compiled_texts import golden, mesh_of, row

from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec

CPU = ("cpu-jax0.10", "cpu-jax0.12")
MIB = 2**20
HEADER = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""
SUM = """ENTRY %main (x: f32[8,6], n: s32[]) -> f32[2,6] {
  %x = f32[8,6]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %id = u32[] partition-id()
  %place = s32[] convert(%id)
  %two = s32[] constant(2)
  %zero = s32[] constant(0)
  %start = s32[] multiply(%place, %two)
  %r = f32[8,6]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, channel_id=1, \
use_global_device_ids=true, to_apply=%add
"""
SLICED = "dynamic-slice(%r, %start, %zero), dynamic_slice_sizes={2,6}"


def found(text: str, mesh: MeshSpec, simulated: bool = True) -> list[tuple[object, ...]]:
    listed = collectives_of(parse_module(text), mesh, simulated=simulated)
    assert not listed.unread
    return sorted(
        (c.kind, c.axes, c.partial, c.count, c.bytes // c.count, c.wire_bytes)
        for c in listed.collectives
    )


@pytest.mark.parametrize("target", CPU)
@pytest.mark.parametrize("split", ["m", "n"])
def test_partial_sums_that_are_split_are_scattered(target: str, split: str) -> None:
    text = golden(target)[f"matmul x=k w=k y={split}"]
    size = 1024 * 256 * 4
    assert found(text, mesh_of(fsdp=8)) == [row("reduce-scatter", ("fsdp",), 8, size)]
    # Of a program that is not said to stand for another, what was emitted.
    assert found(text, mesh_of(fsdp=8), simulated=False) == [row("all-reduce", ("fsdp",), 8, size)]


@pytest.mark.parametrize("target", CPU)
def test_gradients_in_a_loop_are_scattered(target: str) -> None:
    """Four layers, the offset worked out before the loop: two weights of 512×2048, summed."""
    kinds = [one for one in found(golden(target)["step, fsdp"], mesh_of(fsdp=8))]
    gathers = [row("all-gather", ("fsdp",), 8, 4 * MIB, 4)] * 4
    # Both gradients are summed by one instruction, and both are kept in slices.
    assert kinds == [*gathers, row("reduce-scatter", ("fsdp",), 8, 8 * MIB, 4)]


@pytest.mark.parametrize("target", CPU)
def test_activations_that_are_used_whole_are_not(target: str) -> None:
    text = golden(target)["step, fsdp and tensor"]
    by_axis = [(one[0], one[1]) for one in found(text, mesh_of(fsdp=2, tensor=4))]
    assert by_axis.count(("all-reduce", ("tensor",))) == 2
    assert by_axis.count(("reduce-scatter", ("fsdp",))) == 1


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (f"  ROOT %s = f32[2,6]{{1,0}} {SLICED}", "reduce-scatter"),
        # Read whole as well.
        (
            f"  %s = f32[2,6]{{1,0}} {SLICED}\n"
            "  ROOT %t = (f32[2,6]{1,0}, f32[8,6]{1,0}) tuple(%s, %r)",
            "all-reduce",
        ),
        # By a number that the caller gives, or the same slice for everybody.
        (f"  ROOT %s = f32[2,6]{{1,0}} {SLICED.replace('%start', '%n')}", "all-reduce"),
        (f"  ROOT %s = f32[2,6]{{1,0}} {SLICED.replace('%start', '%two')}", "all-reduce"),
        # Overlapping slices, and slices that leave a part out.
        (f"  ROOT %s = f32[2,6]{{1,0}} {SLICED.replace('%start', '%place')}", "all-reduce"),
        (
            "  ROOT %s = f32[1,6]{1,0} dynamic-slice(%r, %start, %zero), dynamic_slice_sizes={1,6}",
            "all-reduce",
        ),
        # After arithmetic on the sum: no compiler makes a reduce-scatter of that.
        (
            "  %d = f32[8,6]{1,0} add(%r, %r)\n"
            "  ROOT %s = f32[2,6]{1,0} "
            "dynamic-slice(%d, %start, %zero), dynamic_slice_sizes={2,6}",
            "all-reduce",
        ),
        # After a conversion, which one does.
        (
            "  %d = f16[8,6]{1,0} convert(%r)\n"
            "  ROOT %s = f16[2,6]{1,0} "
            "dynamic-slice(%d, %start, %zero), dynamic_slice_sizes={2,6}",
            "reduce-scatter",
        ),
    ],
)
def test_what_counts_as_a_slice_by_partition(end: str, kind: str) -> None:
    assert found(HEADER + SUM + end + "\n}\n", mesh_of(fsdp=4)) == [row(kind, ("fsdp",), 4, 192)]
