"""How fast each mesh axis can talk: from axes to torus dimensions, switches and networks.

A collective's seconds are its wire bytes over the bandwidth of its axis, and that bandwidth is
a matter of where the mesh was laid. The model:

**TPU.** Axes are laid on the torus as `jax.make_mesh` and `mesh_utils.create_device_mesh` do
with split dimensions allowed: from the last axis, which talks most, to the first, each takes
whole dimensions where their product is its size (more dimensions before fewer), and if some
axis cannot, every axis takes the best part: most whole dimensions first. Over a dimension a
ring sends both ways if it closes, one way's worth if not, since then the far ends receive
everything over one link. A part of a dimension never closes; parts that are not neighbours are
rings that interleave on the same links and share them. An axis over several dimensions of one
rate uses them at once, so the rates add ("How to Scale Your Model", Austin et al., 2025, part 3).
Dimensions of different rates are gathered in turn, in the best order, slow ones while the buffer
is small: adding those too would need a buffer cut in proportion, which XLA does not do.
The two devices of a tpu7x chip have one set of links: an axis that joins them uses all of it,
another half. Scatters go over those dimensions one after another, and gathers over more than two
of them in two steps, as `meshwright.train.torus` writes them; see `AxisLink.rate`.

**GPU.** Within a host, the switch takes what a GPU can send. Across hosts, a ring enters and
leaves a host once for every network card it can use, one a GPU of the group: NCCL builds as
many rings as cards. So a group with w GPUs a host sends w × card a device, at most NVLink.
This is the bound of the slow hop and on the safe side: the hops inside cost less.

**Across slices** the network and the torus take turns: XLA reduces within the slice first, so
over the network each device of a group sends only its share of the buffer.

All-to-alls and permutes cannot be made of rings that way and have rates of their own. Nothing
here is measured; a calibration replaces it. Costs about a millisecond for a new mesh, nothing
for one asked before, and needs no jax, so that a search can ask for every candidate.

Rejected: one rate per network, whatever the axis. It is wrong by the number of dimensions times
two on a torus, and by the number of GPUs a host across hosts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.sharding.chips import Chip, chip_of
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Kind
from meshwright.sharding.slices import check_layout
from meshwright.sharding.topology import Topology

__all__ = [
    "MOST_DRAWN",
    "AxisLink",
    "axis_links",
    "lay_on_torus",
    "physical_layout",
    "torus_coordinates",
]

MOST_DRAWN = 4096
"""Devices that `physical_layout` lists; a drawing of more shows nothing."""

_Network = Literal["ici", "dcn", "nvlink", "nic", "none"]


@dataclass(frozen=True)
class AxisLink:
    """What one mesh axis can send over.

    Attributes:
        bandwidth: bytes a second a device sends in a ring over the axis, as all-gather,
            reduce-scatter and all-reduce do; infinite for an axis of one.
        network: the slowest network the axis crosses.
        latency_seconds: of the dependent steps of one all-gather or reduce-scatter; an
            all-reduce has twice that.
        hops: those steps.
        participants: devices along the axis.
        across: parts across slices or hosts.
        closed: whether every dimension it spans closes to a ring.
        all_to_all_bandwidth: bytes a second a device sends when each sends to each.
        permute_bandwidth: bytes a second a device sends to the next one on the ring.
        source: where the rate is from, and how it was put together.
        rings: (devices, bytes a second around them) of each torus dimension, the outermost first;
            empty where the axis is one ring.
    """

    bandwidth: float
    network: _Network
    latency_seconds: float = 0.0
    hops: int = 0
    participants: int = 1
    across: int = 1
    closed: bool = True
    all_to_all_bandwidth: float = math.inf
    permute_bandwidth: float = math.inf
    source: str = ""
    rings: tuple[tuple[int, float], ...] = ()

    def rate(self, kind: Kind, participants: int) -> float:
        """Bytes a second a device sends for one kind of collective.

        Args:
            kind: of the collective.
            participants: fewer than the axis has for one over some of its torus dimensions.

        >>> link = axis_links(Topology.parse("v5p:4x4x4"), MeshSpec.parse("fsdp=64"))["fsdp"]
        >>> [round(link.rate(kind, 64) / 1e9) for kind in ("all-reduce", "all-gather")]
        [600, 382]
        >>> [round(link.rate("reduce-scatter", n) / 1e9) for n in (64, 4)]
        [200, 200]
        """
        if kind == "all-to-all":
            return self.all_to_all_bandwidth
        if kind == "collective-permute":
            return self.permute_bandwidth
        if participants < self.participants:
            ways = [
                rings
                for count in range(1, len(self.rings))
                for rings in itertools.combinations(self.rings, count)
                if math.prod(size for size, _ in rings) == participants
            ]
            return min(map(_at_once, ways), default=self.bandwidth)
        if kind == "reduce-scatter" and len(self.rings) > 1:
            return _one_by_one([(size, rate) for size, rate in self.rings[::-1]])
        if kind == "all-gather" and sum(size > 2 for size, _ in self.rings) > 2:
            outer, inner = self.rings[:2], self.rings[2:]
            sizes = [math.prod(size for size, _ in rings) for rings in (inner, outer)]
            return _one_by_one([(sizes[0], _at_once(inner)), (sizes[1], _at_once(outer))])
        return self.bandwidth


_ALONE = AxisLink(math.inf, "none", source="nothing is sent over an axis of one")


def axis_links(topology: Topology, mesh: MeshSpec) -> dict[str, AxisLink]:
    """The link of every axis of a mesh on a topology.

    Args:
        topology: of a TPU or GPU; for any other the answer is empty, since nothing is known.
        mesh: axes in mesh order, the last talking most; at most one size -1.

    Raises:
        MeshError: the mesh cannot be laid on the topology.

    >>> links = axis_links(Topology.parse("v5p:4x4x4"), MeshSpec.parse("fsdp=16,tensor=4"))
    >>> {name: link.bandwidth / 1e9 for name, link in links.items()}
    {'fsdp': 400.0, 'tensor': 200.0}
    >>> links = axis_links(Topology.parse("h100:2x8"), MeshSpec.parse("fsdp=16"))
    >>> links["fsdp"].network, links["fsdp"].bandwidth / 1e9
    ('nic', 400.0)
    """
    return dict(_links(topology, mesh))  # a copy, so that nobody writes into the cache


@functools.lru_cache(maxsize=4096)  # a search asks for one mesh with many settings
def _links(topology: Topology, mesh: MeshSpec) -> Mapping[str, AxisLink]:
    chip = chip_of(topology)
    if chip is None:
        return {}
    rows = check_layout(topology, mesh).split(topology.groups)
    if chip.kind == "gpu":
        inner = [_over_switch(chip, within) for _, _, within in rows]
    else:
        dims = _torus(topology, chip)
        parts = lay_on_torus(dims, [within for _, _, within in rows])
        inner = [_over_torus(chip, topology.shape, parts, axis) for axis in range(len(rows))]
    return {
        name: _over_network(chip, across, within, link)
        for (name, across, within), link in zip(rows, inner, strict=True)
    }


def _torus(topology: Topology, chip: Chip) -> tuple[int, ...]:
    """Dimensions devices are laid on: those of the slice, then the devices of a chip."""
    own = (chip.devices_per_chip,) if chip.devices_per_chip > 1 else ()
    return (*topology.shape, *own)


def _over_switch(chip: Chip, within: int) -> AxisLink:
    if within == 1:
        return _ALONE
    rate = chip.link_bandwidth
    return AxisLink(
        bandwidth=rate,
        network="nvlink",
        latency_seconds=(within - 1) * chip.hop_seconds,
        hops=within - 1,
        participants=within,
        all_to_all_bandwidth=rate,
        permute_bandwidth=rate,
        source=f"{chip.sources['link_bandwidth']}: one way, a GPU into the switch",
    )


def _over_torus(
    chip: Chip, shape: tuple[int, ...], parts: Sequence[Sequence[int]], axis: int
) -> AxisLink:
    """The link of one axis within a slice, from the parts of the dimensions it has."""
    row = [dimension[axis] for dimension in parts]
    size = math.prod(row)
    if size == 1:
        return _ALONE
    if math.prod(row[: len(shape)]) == 1:  # only the devices of one chip
        return _between_dies(chip, size)
    own = row[len(shape)] if len(row) > len(shape) else 1
    sharing = chip.devices_per_chip // own  # groups that use the same links of a chip
    exchange = pass_on = math.inf
    hops = own - 1
    closed = True
    rings: list[tuple[int, float]] = []
    for dimension, (size_here, wraps) in enumerate(zip(row, chip.closed_dims(shape), strict=False)):
        if size_here == 1:
            continue
        stride = math.prod(parts[dimension][axis + 1 :])
        # The outer part of a closed dimension goes all the way round it, in steps of `stride`.
        ring = wraps and size_here * stride == shape[dimension]
        one_way = chip.link_bandwidth / stride / sharing
        rate = one_way * (2 if ring else 1)
        rings.append((size_here, rate))
        exchange = min(exchange, 4 * rate / size_here)  # by what crosses the middle
        pass_on = min(pass_on, one_way)
        hops += (size_here // 2 if ring else size_here - 1) * stride
        closed = closed and ring
    total = _at_once(rings)
    return AxisLink(
        bandwidth=total,
        network="ici",
        latency_seconds=hops * chip.hop_seconds,
        hops=hops,
        participants=size,
        closed=closed,
        all_to_all_bandwidth=min(total, exchange),
        permute_bandwidth=pass_on,
        source=f"{chip.sources['link_bandwidth']}; "
        f"{len(rings)} dimension(s), {'closed' if closed else 'open'}",
        rings=tuple(rings) if len(rings) > 1 else (),
    )


def _at_once(rings: Sequence[tuple[int, float]]) -> float:
    """Bytes a second over several rings: those of one rate together, the others in turn."""
    alike: dict[float, list[int]] = {}
    for size, rate in rings:
        alike.setdefault(rate, []).append(size)
    return _in_turn([(math.prod(sizes), rate * len(sizes)) for rate, sizes in alike.items()])


def _one_by_one(phases: Sequence[tuple[int, float]]) -> float:
    """As `_in_turn`, in the order given: the first has the smallest buffer."""
    seconds, held = 0.0, 1
    for size, rate in phases:
        seconds += held * (size - 1) / rate
        held *= size
    return (held - 1) / seconds


def _in_turn(phases: Sequence[tuple[int, float]]) -> float:
    """Bytes a second of a gather that grows its buffer phase by phase, in the best order.

    Args:
        phases: (participants, bytes a second) of each.

    >>> _in_turn([(4, 100.0)]), round(_in_turn([(8, 50.0), (16, 100.0)]), 1)
    (100.0, 94.8)
    """
    return max((_one_by_one(order) for order in itertools.permutations(phases)), default=math.inf)


def _between_dies(chip: Chip, size: int) -> AxisLink:
    rate = chip.die_bandwidth or chip.link_bandwidth
    return AxisLink(
        bandwidth=rate,
        network="ici",
        latency_seconds=chip.hop_seconds,
        hops=1,
        participants=size,
        closed=False,
        all_to_all_bandwidth=rate,
        permute_bandwidth=rate,
        source=f"{chip.sources['die_bandwidth']}: between the devices of one chip",
    )


def _over_network(chip: Chip, across: int, within: int, inner: AxisLink) -> AxisLink:
    """The link of an axis with ``across`` parts in other slices or hosts."""
    if across == 1:
        return inner
    if chip.kind == "gpu":
        rate = min(chip.network_bandwidth * within, inner.bandwidth)
    else:
        rate = _in_turn([(across, chip.network_bandwidth), (within, inner.bandwidth)])
    return AxisLink(
        bandwidth=rate,
        network="nic" if chip.kind == "gpu" else "dcn",
        latency_seconds=inner.latency_seconds + (across - 1) * chip.network_hop_seconds,
        hops=inner.hops + across - 1,
        participants=across * within,
        across=across,
        closed=inner.closed,
        # Of what a device sends in an exchange nearly all leaves its host or slice.
        all_to_all_bandwidth=min(chip.network_bandwidth, inner.all_to_all_bandwidth),
        permute_bandwidth=min(chip.network_bandwidth, inner.permute_bandwidth),
        source=f"{chip.sources['network_bandwidth']}; {within} device(s) a group share the way out",
    )


def lay_on_torus(dims: Sequence[int], axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """How many parts of each torus dimension each mesh axis gets, as jax lays a mesh.

    Within a dimension the later axis has the inner part, so that its devices are neighbours.

    Args:
        dims: sizes of the torus dimensions.
        axes: sizes of the mesh axes, the last talking most; the same product as ``dims``.

    Returns:
        One row a dimension, one number an axis; rows multiply to ``dims``, columns to ``axes``.

    >>> lay_on_torus((4, 4, 4), (16, 4))
    ((1, 4), (4, 1), (4, 1))
    >>> lay_on_torus((16, 16), (32, 8))
    ((2, 8), (16, 1))
    """
    whole = _whole_dims(dims, axes)
    if whole is not None:
        return whole
    free = list(dims)
    columns: list[tuple[int, ...]] = [()] * len(axes)
    for axis in reversed(range(len(axes))):
        columns[axis] = max(
            _ways(free, axes[axis]), key=lambda parts: _preference(parts, dims, free)
        )
        free = [left // part for left, part in zip(free, columns[axis], strict=True)]
    return tuple(zip(*columns, strict=True))


def _whole_dims(dims: Sequence[int], axes: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """The layout that splits no dimension, or None if some axis needs a part of one."""
    parts = [[1] * len(axes) for _ in dims]
    free = {index for index, size in enumerate(dims) if size > 1}
    for axis in reversed(range(len(axes))):
        if axes[axis] == 1:
            continue
        chosen = next(
            (
                group
                for count in range(len(free), 0, -1)
                for group in itertools.combinations(sorted(free), count)
                if math.prod(dims[index] for index in group) == axes[axis]
            ),
            None,
        )
        if chosen is None:
            return None
        for index in chosen:
            parts[index][axis] = dims[index]
        free -= set(chosen)
    return tuple(map(tuple, parts))


def _ways(free: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Parts, one a dimension, that divide what is free and multiply to ``size``."""
    if not free:
        if size == 1:
            yield ()
        return
    for part in range(1, math.gcd(free[0], size) + 1):
        if free[0] % part == 0 and size % part == 0:
            yield from ((part, *rest) for rest in _ways(free[1:], size // part))


def _preference(
    parts: tuple[int, ...], dims: Sequence[int], free: Sequence[int]
) -> tuple[int, int, int, tuple[int, ...]]:
    """What jax prefers of two ways, greatest first: it is matched here, not judged.

    Chips in whole dimensions; their number; chips in dimensions that later axes have begun
    (jax's comment says the opposite of its code); then the first dimensions.
    """
    whole = [part for part, size in zip(parts, dims, strict=True) if part == size]
    begun = [part for part, size, left in zip(parts, dims, free, strict=True) if left < size]
    return math.prod(whole), sum(part > 1 for part in whole), math.prod(begun), parts


def physical_layout(topology: Topology, mesh: MeshSpec) -> list[dict[str, Any]] | None:
    """Where every device of a mesh is, for drawing; JSON values only.

    On slices of up to 16 chips jax orders some meshes along a hand-made ring instead; the
    drawing then shows the same devices in another order.

    Args:
        topology: with a known number of devices.
        mesh: as for `axis_links`.

    Returns:
        One entry a device in mesh order: ``index`` (position on each mesh axis), ``slice``, and
        ``coordinates`` on the torus (on tpu7x the last is the device of the chip), or (host, GPU)
        within the slice, or (device,) of ``cpu:N``. None for more than `MOST_DRAWN` devices and
        where the machine decides (``auto``, ``local``).

    Raises:
        MeshError: the mesh cannot be laid on the topology.

    >>> physical_layout(Topology.parse("v5e:2x2"), MeshSpec.parse("data=2,tensor=2"))[1]
    {'index': [0, 1], 'slice': 0, 'coordinates': [1, 0]}
    """
    count = topology.device_count
    if count is None or count > MOST_DRAWN:
        return None
    rows = check_layout(topology, mesh).split(topology.groups)
    chip = chip_of(topology)
    if chip is not None and chip.kind == "tpu":
        dims = _torus(topology, chip)
    else:
        dims = (topology.shape[-1],)
    parts = lay_on_torus(dims, [within for _, _, within in rows])
    found = []
    for index in itertools.product(*(range(across * within) for _, across, within in rows)):
        group = 0
        inner = []
        for place, (_, across, within) in zip(index, rows, strict=True):
            group = group * across + place // within
            inner.append(place % within)
        coordinates = torus_coordinates(parts, inner)
        if topology.kind == "gpu":
            coordinates = [group % topology.shape[0], *coordinates]
            group //= topology.shape[0]
        found.append({"index": list(index), "slice": group, "coordinates": coordinates})
    return found


def torus_coordinates(parts: Sequence[Sequence[int]], inner: Sequence[int]) -> list[int]:
    """Position on each torus dimension of the device at a place of the mesh within its slice.

    Args:
        parts: from `lay_on_torus`.
        inner: position on each mesh axis.

    >>> torus_coordinates(lay_on_torus((4, 4), (2, 8)), (1, 5))
    [2, 3]
    """
    coordinates = [0] * len(parts)
    for axis, place in enumerate(inner):
        for dimension in reversed(range(len(parts))):  # the last dimension varies fastest
            part = parts[dimension][axis]
            coordinates[dimension] += place % part * math.prod(parts[dimension][axis + 1 :])
            place //= part
    return coordinates
