"""Slices that exist, the nearest to those that do not, and meshes that can be laid."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import MeshError, TopologyError
from meshwright.sharding.mesh import AXES, MeshSpec
from meshwright.sharding.slices import (
    check_layout,
    check_topology,
    nearest_topologies,
    slices_of,
)
from meshwright.sharding.topology import GPU_CHIPS, TPU_CHIPS, Topology


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any of a TPU or GPU, most of them imaginary."""
    chip = draw(st.sampled_from([*TPU_CHIPS, *GPU_CHIPS]))
    size = st.one_of(st.sampled_from([1, 2, 4, 8, 12, 16]), st.integers(1, 300))
    rank = TPU_CHIPS.get(chip, 2)
    shape = tuple(draw(st.lists(size, min_size=rank, max_size=rank)))
    return Topology(chip, shape, draw(st.integers(1, 5)))


@given(topologies())
@example(Topology("h100", (100_000, 9), 7))
@example(Topology("v4", (10**6, 10**6, 10**6), 3))
def test_what_does_not_exist_is_answered_with_what_does(topology: Topology) -> None:
    near = nearest_topologies(topology)
    assert 1 <= len(near) <= 3 and len(set(near)) == len(near)
    for one in near:
        check_topology(one)
        assert one.chip == topology.chip
        assert Topology.parse(str(one)) == one
    try:
        check_topology(topology)
    except TopologyError as error:
        assert topology not in near
        assert all(str(one) in error.fix for one in near)
        assert error.what and error.why
    else:
        assert topology.kind == "gpu" or near[0] == topology


@pytest.mark.parametrize(
    "text",
    [
        "v4:4x4x8", "v4:16x16x16", "v5e:1x1", "v5e:16x16*4", "v5p:2x2x1", "v5p:16x16x24",
        "v5p:8x8x16*3", "v6e:8x16", "tpu7x:1x1x1", "tpu7x:16x24x24", "a100:1x1", "h100:1x2",
        "h100:128x8", "h100:2x4", "b200:16x8", "h100:1x8*2", "cpu:7", "local", "auto",
    ],
)  # fmt: skip
def test_real_topologies_pass(text: str) -> None:
    check_topology(Topology.parse(text))


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v5p:4x4x7", "v5p:4x4x8"),
        ("v5p:16x20x28", None),
        ("v5p:16x24x24", "v5p:12x16x24*2"),
        ("v5e:16x32", "v5e:16x16*2"),
        ("v5e:4x2", "v5e:2x4"),
        ("v5e:3x5", "v5e:4x4"),
        ("v4:1x1x1", "v4:2x2x1"),
        ("tpu7x:1x1x2", "tpu7x:1x1x1"),
        ("h100:1x16", "h100:2x8"),
        ("h100:8x1", "h100:1x8"),
        ("h100:1x6", "h100:1x8"),
        ("b200:4x4", "b200:2x8"),
        ("h100:1x1*2", "h100:1x2"),
        ("h100:20000x8", "h100:8192x8"),
    ],
)
def test_nearest(text: str, nearest: str | None) -> None:
    topology = Topology.parse(text)
    with pytest.raises(TopologyError, match="there is no such") as caught:
        check_topology(topology)
    if nearest:
        assert str(nearest_topologies(topology)[0]) == nearest
        assert caught.value.fix.startswith(f"use {nearest}")


@pytest.mark.parametrize("chip", TPU_CHIPS)
def test_tables_of_slices(chip: str) -> None:
    shapes = slices_of(chip)
    counts = [math.prod(shape) for shape in shapes]
    most = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216}
    assert counts == sorted(counts) and counts[-1] == most[chip]
    assert len(set(shapes)) == len(shapes)
    assert all(len(shape) == CHIPS[chip].torus_dims for shape in shapes)
    cubes = [shape for shape in shapes if math.prod(shape) >= 64]
    if CHIPS[chip].wraps == "cubes":
        assert all(CHIPS[chip].closed_dims(shape)[0] and list(shape) == sorted(shape)
                   for shape in cubes)  # fmt: skip


def test_other_chips_have_no_slices() -> None:
    assert slices_of("cpu") == () == slices_of("no such chip")
    assert slices_of("h100")[:5] == ((1, 1), (1, 2), (1, 4), (2, 4), (1, 8))


@given(topologies(), st.data())
def test_layouts_are_whole_or_refused_with_ones_that_are(topology: Topology, data) -> None:
    names = data.draw(st.lists(st.sampled_from(AXES), min_size=1, max_size=4, unique=True))
    left, axes = topology.device_count or 1, []
    for name in names[1:]:
        size = data.draw(st.sampled_from([n for n in range(1, 17) if left % n == 0]))
        axes.append((name, size))
        left //= size
    axes.append((names[0], left))
    stated = []
    for name, size in axes:
        if data.draw(st.booleans()):
            part = data.draw(
                st.sampled_from([n for n in range(1, min(size, 16) + 1) if not size % n])
            )
            stated.append((name, part))
    mesh = MeshSpec(tuple(axes), tuple(stated))
    try:
        filled = check_layout(topology, mesh)
    except MeshError as error:
        assert stated and error.fix.startswith("use ")
        for text in error.fix.removeprefix("use ").split(" or "):
            check_layout(topology, MeshSpec.parse(text))
    else:
        rows = filled.split(topology.groups)
        assert math.prod(across for _, across, _ in rows) == topology.groups


def test_a_wrong_cut_is_refused_with_the_right_ones() -> None:
    with pytest.raises(MeshError) as caught:
        check_layout(Topology.parse("v5e:4x4*6"), MeshSpec.parse("fsdp=4*12,tensor=2"))
    assert "6 slices of 16 devices" in caught.value.where
    assert caught.value.fix == "use fsdp=3*16,tensor=2*1 or fsdp=6*8,tensor=2"


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(MeshError, match="tpu7x:4x4x4 has 128 devices"):
        check_layout(Topology.parse("tpu7x:4x4x4"), MeshSpec.parse("fsdp=64"))
    mesh = MeshSpec.parse("data=-1")
    assert check_layout(Topology("local"), mesh) is mesh
    assert str(check_layout(Topology.parse("h100:2x8"), mesh)) == "data=16"
