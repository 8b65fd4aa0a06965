"""Device groups in every written form, against numpy, and the mesh axes they vary along."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.hlo import HloSyntaxError
from meshwright.sharding.hlo_groups import (
    GroupAxes,
    axes_of_groups,
    axes_of_pairs,
    parse_groups,
    parse_pairs,
    parse_slices,
)


@given(st.data())
def test_iota_groups_are_what_numpy_makes(data: Any) -> None:
    dims = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(dims))))
    total = math.prod(dims)
    width = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    ids = np.arange(total).reshape(dims).transpose(order).reshape(-1, width)
    text = f"[{total // width},{width}]<=[{','.join(map(str, dims))}]"
    text += f"T({','.join(map(str, order))})"
    assert parse_groups(text, total) == tuple(map(tuple, ids.tolist()))


@given(st.data())
def test_mesh_groups_are_what_numpy_makes(data: Any) -> None:
    """Any choice of axes of a mesh, in any order, as names, with or without device ids."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    chosen = data.draw(st.permutations(range(len(sizes))))
    chosen = chosen[: data.draw(st.integers(1, len(sizes)))]
    order = data.draw(st.none() | st.permutations(range(len(sizes))))
    total = math.prod(sizes)
    axes = ",".join(f"'axis_{n}'={size}" for n, size in enumerate(sizes))
    ids = np.arange(total)
    text = f"mesh[{axes}]"
    if order is not None:
        base = [sizes[axis] for axis in np.argsort(order)]
        ids = ids.reshape(base).transpose(order)
        joined = ",".join(map(str, base)), ",".join(map(str, order))
        text += f", device_ids=([{joined[0]}]T({joined[1]}))"
    text += " {" + ",".join(f"'axis_{n}'" for n in chosen) + "}"
    cube = ids.reshape(sizes)
    rest = [n for n in range(len(sizes)) if n not in chosen]
    width = math.prod(sizes[n] for n in chosen)
    expected = cube.transpose([*rest, *chosen]).reshape(-1, width)
    assert parse_groups(text, total) == tuple(map(tuple, expected.tolist()))


@given(
    pre=st.integers(1, 4), size=st.integers(1, 4), post=st.integers(1, 4), other=st.integers(1, 3)
)
def test_sub_axes_are_the_middle_of_an_axis(pre: int, size: int, post: int, other: int) -> None:
    total = pre * size * post
    text = f"mesh['a'={total},'b'={other}] {{'a':({pre}){size}}}"
    cube = np.arange(total * other).reshape(pre, size, post, other)
    expected = cube.transpose(0, 2, 3, 1).reshape(-1, size)
    assert parse_groups(text, total * other) == tuple(map(tuple, expected.tolist()))


@given(st.data())
def test_groups_over_axes_vary_along_those_axes(data: Any) -> None:
    """The round trip: groups over chosen axes of a mesh are found to be over those axes."""
    sizes = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    names = ["replica", "data", "fsdp", "tensor"][: len(sizes)]
    chosen = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))
    cube = np.arange(math.prod(sizes)).reshape(sizes)
    rest = [n for n in range(len(sizes)) if n not in chosen]
    width = math.prod(sizes[n] for n in chosen)
    groups = cube.transpose([*rest, *sorted(chosen)]).reshape(-1, width).tolist()
    text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    found = axes_of_groups(parse_groups(text, cube.size), list(zip(names, sizes, strict=True)))
    assert found == GroupAxes(tuple(names[n] for n in sorted(chosen)), width)


def test_parts_of_axes_are_partial() -> None:
    mesh = (("data", 2), ("fsdp", 4))
    assert axes_of_groups(((0, 1), (2, 3), (4, 5), (6, 7)), mesh) == GroupAxes(("fsdp",), 2, True)
    assert axes_of_groups(((0, 5), (1, 4)), mesh) == GroupAxes(("data", "fsdp"), 2, True)
    assert not axes_of_groups(((0, 1, 2), (3, 4)), mesh).regular
    within = axes_of_groups(((0, 1, 2, 3),), (("data", 1), ("fsdp", 4)), (("data", 2), ("fsdp", 8)))
    assert within == GroupAxes(("fsdp",), 4, True)


def test_pairs() -> None:
    mesh = (("stage", 4), ("data", 2))
    assert parse_pairs("{{0,2},{2,4}}") == ((0, 2), (2, 4))
    assert axes_of_pairs(((0, 2), (2, 4), (4, 6)), mesh) == GroupAxes(("stage",), 4)
    assert axes_of_pairs(((0, 1), (1, 0)), mesh) == GroupAxes(("data",), 2)
    assert axes_of_pairs(((0, 2), (2, 0), (4, 6), (6, 4)), mesh) == GroupAxes(("stage",), 2, True)
    assert axes_of_pairs(((3, 3),), mesh) == GroupAxes((), 1)
    assert axes_of_pairs((), mesh) == GroupAxes((), 1)


@pytest.mark.parametrize("text", ["", "{1,2}", "{1,2}x{0:3}", "{{100000},{900000}}", "{{0,1}}"])
def test_slices_that_are_not_understood(text: str) -> None:
    with pytest.raises(HloSyntaxError, match="cannot read the device groups"):
        parse_slices(text, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{{0,1},{1,2}}",
        "{{0,9}}",
        "{{0,1}",
        "{{0,x}}",
        "[2,2]<=[8]",
        "[2,2]<=[4]T(1,0)",
        "[1,99999999999]<=[99999999999]",
        "mesh['a'=4] {'b'}",
        "mesh['a'=4], device_ids=([2]) {'a'}",
        "mesh['a'=4], device_ids=(what) {'a'}",
        "mesh['a'=6] {'a':(4)2}",
        "mesh[nothing] {'a'}",
        "somewhere else",
    ],
)
def test_groups_that_are_not_understood(text: str) -> None:
    with pytest.raises(HloSyntaxError, match="cannot read the device groups"):
        parse_groups(text, 4)


@given(st.text("{}[],=<>T()mesh'a0123 _", max_size=40))
@settings(max_examples=300)
def test_any_text_for_groups_parses_or_is_refused(text: str) -> None:
    try:
        groups = parse_groups(text, 8)
    except HloSyntaxError:
        return
    members = [member for group in groups for member in group]
    assert members and len(set(members)) == len(members) and max(members) < 8
