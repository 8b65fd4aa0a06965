"""Which mesh axes a collective crosses, from the device groups that compiled text gives it.

XLA writes groups in four forms: lists of ids, an iota list that is reshaped and transposed, and
two forms over a mesh whose axes may carry real names or ``axis_0``, have size 1, or be split
("sub-axes"). Those names need not be the user's, as the partitioner makes a mesh for each
tensor. So every form is expanded to partition ids, and an id to its coordinates in the user's
mesh: jit's device assignment is the mesh in flat order, so partition p sits at
``unravel_index(p, sizes)``. The axes along which a group's coordinates vary are the axes the
collective crosses.

In a program for several TPU slices the ids are those of one slice, and the mesh is the part of
each axis that lies within it (`MeshSpec.split`); what crosses slices is written elsewhere.
Cost: microseconds for the meshes at hand, some milliseconds for ten thousand devices.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshwright.sharding.hlo import HloSyntaxError

__all__ = [
    "GroupAxes",
    "Groups",
    "axes_of_groups",
    "axes_of_pairs",
    "parse_groups",
    "parse_pairs",
    "parse_slices",
]

Groups = tuple[tuple[int, ...], ...]
"""Partition ids (or slice indices) of each group."""


@dataclass(frozen=True)
class GroupAxes:
    """What groups mean on a mesh.

    Attributes:
        axes: names along which members of a group differ, in mesh order.
        participants: members of one group (the largest, if they differ).
        partial: True where a group spans only a part of an axis in ``axes``.
        regular: False where groups differ in size, so that no single ρ is right.
        senders: part of the mesh's devices that send; less than 1 in a permute that is no ring.
    """

    axes: tuple[str, ...]
    participants: int
    partial: bool = False
    regular: bool = True
    senders: float = field(default=1.0, repr=False, compare=False)


_MAX_IDS = 1 << 22  # a damaged number must not fill the memory

_LIST = re.compile(r"\{[\d, {}]*\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"@?mesh(?:\[|<)(?P<axes>[^\]>]*)(?:\]|>)"
    r"(?:, ?device_ids=\((?P<ids>(?:[^()]|\([^()]*\))*)\))?"
    r" ?\{(?P<over>[^{}]*)\}"
)
_AXIS = re.compile(r"""['"]?([\w.\-]+)['"]?=(\d+)""")
_SUB = re.compile(r"""['"]?([\w.\-]+)['"]?(?::\((\d+)\)(\d+))?(?:, ?|$)""")


@functools.lru_cache(maxsize=4096)
def parse_groups(text: str, partitions: int) -> Groups:
    """Expand written groups to partition ids.

    Args:
        text: the value of ``replica_groups``; ``{}`` is all partitions in one group.
        partitions: how many there are.

    Raises:
        HloSyntaxError: an unknown form, or ids that do not exist or repeat.

    >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> parse_groups("mesh['a'=2,'b'=2] {'b'}", 4)
    ((0, 1), (2, 3))
    """
    text = text.strip()
    if re.fullmatch(r"\{\s*(\{\s*\})?\s*\}", text):
        groups: Groups = (tuple(range(partitions)),)
    elif _LIST.fullmatch(text):
        groups = _listed(text)
    elif found := _IOTA.fullmatch(text):
        groups = _iota(*found.groups())
    elif found := _MESH.fullmatch(text):
        groups = _over_mesh(found["axes"], found["ids"], found["over"], text)
    else:
        raise _unknown(text, "this way to write groups is not known")
    members = [member for group in groups for member in group]
    if not members or len(set(members)) != len(members) or max(members) >= partitions:
        raise _unknown(text, f"the ids repeat, or are not of {partitions} partitions")
    return groups


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``source_target_pairs``.

    Raises:
        HloSyntaxError: it is not a list of pairs.

    >>> parse_pairs("{{0,1},{1,0}}")
    ((0, 1), (1, 0))
    """
    text = text.strip().strip('"')
    if not re.fullmatch(r"\{(\s*\{\s*\d+\s*,\s*\d+\s*\},?)*\s*\}", text):
        raise _unknown(text, "it is not a list of pairs such as {{0,1},{1,0}}")
    return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+)\s*,\s*(\d+)", text))


def parse_slices(text: str, slices: int) -> Groups:
    """Read the megascale target of a transfer between slices, as groups of slice indices.

    Args:
        text: ``{1,2}x{0:7}``, slice numbers from 1 and the devices of each; or, where not all
            slices take part in one group, device ids, which are 100,000 times the slice number
            and more.
        slices: how many there are.

    Raises:
        HloSyntaxError: an unknown form, or slices that do not exist.

    >>> parse_slices("{1,2}x{0:7}", 2)
    ((0, 1),)
    >>> parse_slices("{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}", 4)
    ((0, 2), (1, 3))
    """
    text = text.strip().strip('"')
    if re.fullmatch(r"(\{[\d,]+\}x\{[\d,:]+\},?)+", text):
        found = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}x", text)]
    else:
        found = [[member // 100_000 for member in group] for group in _listed(text)]
    groups = tuple(dict.fromkeys(tuple(number - 1 for number in group) for group in found))
    members = [member for group in groups for member in group]
    if sorted(members) != list(range(slices)):
        raise _unknown(text, f"its groups are not of {slices} slices")
    return groups


def axes_of_groups(
    groups: Groups, sizes: Sequence[tuple[str, int]], whole: Sequence[tuple[str, int]] = ()
) -> GroupAxes:
    """The mesh axes that groups of partitions vary along.

    Args:
        groups: from `parse_groups`.
        sizes: (axis, size) in mesh order of the mesh that the ids are flat positions in.
        whole: (axis, size) of the whole mesh, where ``sizes`` is the part within a slice.

    >>> axes_of_groups(((0, 1), (2, 3)), (("data", 2), ("fsdp", 2)))
    GroupAxes(axes=('fsdp',), participants=2, partial=False, regular=True)
    """
    varying: set[int] = set()
    for group in groups:
        seen = [_coordinates(member, sizes) for member in group]
        varying |= {axis for axis in range(len(sizes)) if len({place[axis] for place in seen}) > 1}
    full = dict(whole or sizes)
    axes = tuple(name for axis, (name, _) in enumerate(sizes) if axis in varying)
    lengths = {len(group) for group in groups}
    participants = max(lengths)
    return GroupAxes(
        axes, participants, participants != math.prod(full[a] for a in axes), len(lengths) == 1
    )


def axes_of_pairs(
    pairs: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[str, int]],
    whole: Sequence[tuple[str, int]] = (),
) -> GroupAxes:
    """The mesh axes a permute crosses; its participants are those that pairs connect.

    >>> axes_of_pairs(((0, 1), (1, 2), (2, 3), (3, 0)), (("fsdp", 4), ("tensor", 1)))
    GroupAxes(axes=('fsdp',), participants=4, partial=False, regular=True)
    """
    parent: dict[int, int] = {}

    def top(member: int) -> int:
        while parent.setdefault(member, member) != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for source, target in pairs:
        parent[top(source)] = top(target)
    connected: dict[int, list[int]] = {}
    for member in list(parent):
        connected.setdefault(top(member), []).append(member)
    if not connected:
        return GroupAxes((), 1)
    found = axes_of_groups(tuple(tuple(group) for group in connected.values()), sizes, whole)
    devices = math.prod(size for _, size in whole or sizes)
    senders = sum(source != target for source, target in pairs) / devices
    return GroupAxes(found.axes, found.participants, found.partial, senders=senders)


def _coordinates(position: int, sizes: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    place = []
    for _, size in reversed(sizes):
        place.append(position % size)
        position //= size
    return tuple(reversed(place))


def _listed(text: str) -> Groups:
    if not re.fullmatch(r"\{(\s*\{\s*\d+(\s*,\s*\d+)*\s*\},?)+\s*\}", text):
        raise _unknown(text, "it is not a list of lists such as {{0,1},{2,3}}")
    return tuple(
        tuple(int(number) for number in re.findall(r"\d+", group))
        for group in re.findall(r"\{([\d, ]+)\}", text)
    )


def _iota(shape: str, dims: str, order: str | None) -> Groups:
    rows = _numbers(shape)
    ids = _transposed(_numbers(dims), _numbers(order) if order else None)
    if len(rows) != 2 or math.prod(rows) != len(ids):
        raise _unknown(f"[{shape}]<=[{dims}]", "the shapes do not hold the same number of ids")
    return tuple(tuple(ids[at : at + rows[1]]) for at in range(0, len(ids), rows[1]))


def _over_mesh(axes: str, ids: str | None, over: str, text: str) -> Groups:
    """Groups over some axes of a mesh: all ids that differ in those axes alone."""
    sizes = [(name, int(size)) for name, size in _AXIS.findall(axes)]
    if not sizes or _AXIS.sub("", axes).strip(" ,"):
        raise _unknown(text, "its mesh is not understood")
    order = _device_ids(ids, math.prod(size for _, size in sizes), text)
    wanted = [(name, int(pre or 1), int(n or 0)) for name, pre, n in _SUB.findall(over) if name]
    known = dict(sizes)
    if _SUB.sub("", over).strip(" ,") or any(name not in known for name, _, _ in wanted):
        raise _unknown(text, "its axes are not understood")
    # Cut every axis at the borders of its sub-axes, then vary the wanted pieces.
    pieces: list[tuple[str, int, int]] = []  # name, product of the pieces before it, size
    for name, size in sizes:
        borders = {1, size}
        for _, pre, n in (w for w in wanted if w[0] == name):
            borders |= {pre, pre * n if n else size}
        cuts = sorted(borders)
        if any(b % a for a, b in zip(cuts, cuts[1:], strict=False)):
            raise _unknown(text, f"axis {name} of {size} cannot be cut so")
        pieces += [(name, a, b // a) for a, b in zip(cuts, cuts[1:], strict=False)]
    inner: list[int] = []
    for name, pre, n in wanted:
        last = pre * n if n else known[name]
        inner += [i for i, p in enumerate(pieces) if p[0] == name and pre <= p[1] < last]
    outer = [i for i in range(len(pieces)) if i not in inner]
    shape = [piece[2] for piece in pieces]
    places = _transposed(shape, outer + inner)
    width = math.prod(shape[i] for i in inner)
    return tuple(
        tuple(order[place] for place in places[at : at + width])
        for at in range(0, len(places), width)
    )


def _device_ids(text: str | None, count: int, whole: str) -> list[int]:
    if text is None:
        return list(range(count))
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if iota:
        order = _numbers(iota.group(2)) if iota.group(2) else None
        ids = _transposed(_numbers(iota.group(1)), order)
    elif re.fullmatch(r"[\d, ]+", text):
        ids = _numbers(text)
    else:
        raise _unknown(whole, "its device ids are not understood")
    if len(ids) != count:
        raise _unknown(whole, f"it gives {len(ids)} device ids for a mesh of {count}")
    return ids


def _transposed(dims: list[int], order: list[int] | None) -> list[int]:
    """``arange(prod(dims)).reshape(dims).transpose(order).flatten()``."""
    if math.prod(dims) > _MAX_IDS:
        raise _unknown(f"[{','.join(map(str, dims))}]", "there are no machines of that size")
    order = list(range(len(dims))) if order is None else order
    if sorted(order) != list(range(len(dims))):
        raise _unknown(f"T({','.join(map(str, order))})", "it is no order of the dims")
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [base + strides[axis] * step for base in ids for step in range(dims[axis])]
    return ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _unknown(text: str, why: str) -> HloSyntaxError:
    shown = text if len(text) <= 120 else text[:119] + "…"
    return HloSyntaxError(f"cannot read the device groups `{shown}`", why=why)
