"""Which topologies can be had, and which meshes can be laid on them.

Compilers do not ask whether hardware exists: they take a slice of 3×5 chips, and a plan for it
would be worth nothing. So the shapes that makers and clouds document are a table here, and a
shape outside it is refused with the nearest ones in it.

- v5e, v6e: the eight 2-D shapes of Google Cloud's pages for them, 1×1 to 16×16.
- v4, v5p, tpu7x: A×B×C with A ≤ B ≤ C. Below one cube 2×2×1, 2×2×2, 2×2×4 and 2×4×4 (and on
  tpu7x 1×1×1); from one cube of 4×4×4 on every multiple of 4, up to 4096 chips (v4), 6144 (v5p,
  the largest job; its pod of 8960 is larger) and 9216 (tpu7x). Source: Google Cloud TPU
  documentation, pages "TPU v4", "TPU v5p", "TPU7x" and "TPU types and topologies".
- GPUs: hosts of 1, 2, 4 or 8. Several hosts are joined with 8 GPUs each, or 4 (the four-GPU HGX
  boards of A100, H100 and H200), one network card a GPU; NVIDIA sells no B200 board of 4. At
  most 65,536 GPUs, which is what three levels of 64-port switches join at full bisection
  (64³/4; NVIDIA DGX SuperPOD reference architectures, network fabrics): beyond, the network
  figures of `meshwright.sharding.chips` no longer hold.

A table of every shape with its price or availability was rejected: it would be out of date in
a week. The rules cover a few hundred shapes of a chip and cost nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from meshwright.sharding.errors import MeshError, TopologyError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.topology import Topology

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh

__all__ = ["check_layout", "check_topology", "described_mesh", "nearest_topologies", "slices_of"]

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_ONE_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
_HOSTS_OF = {"a100": (4, 8), "h100": (4, 8), "h200": (4, 8), "b200": (8,)}
_ALONE = (1, 2, 4, 8)
_MOST_GPUS = 64**3 // 4
_MOST_SUGGESTED_SLICES = 64


@functools.cache
def slices_of(chip: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of one slice that exist, fewest chips first; empty for a chip without slices.

    Args:
        chip: a name of `meshwright.sharding.chips.CHIPS`; for GPUs a shape is hosts × GPUs.

    >>> slices_of("v5e")[:4]
    ((1, 1), (2, 2), (2, 4), (4, 4))
    >>> len(slices_of("v5p")), [shape for shape in slices_of("v5p") if math.prod(shape) == 256]
    (310, [(4, 8, 8), (4, 4, 16)])
    """
    if chip in ("v5e", "v6e"):
        return _FLAT
    if chip in _MOST_CHIPS:
        single = ((1, 1, 1),) if chip == "tpu7x" else ()
        found = (*single, *_BELOW_ONE_CUBE, *_cubes(_MOST_CHIPS[chip]))
    elif chip in _HOSTS_OF:
        joined = ((n, g) for g in _HOSTS_OF[chip] for n in range(2, _MOST_GPUS // g + 1))
        found = (*((1, gpus) for gpus in _ALONE), *joined)
    else:
        return ()
    # Of equal counts the most compact first: it is what clouds hand out by default.
    return tuple(sorted(found, key=lambda shape: (math.prod(shape), max(shape), shape)))


def _cubes(most: int) -> Iterator[tuple[int, int, int]]:
    """A ≤ B ≤ C, multiples of 4, of at most ``most`` chips."""
    for a in range(4, most + 1, 4):
        if a**3 > most:
            return
        for b in range(a, most // a + 1, 4):
            yield from ((a, b, c) for c in range(b, most // (a * b) + 1, 4))


def check_topology(topology: Topology) -> None:
    """Refuse a topology that nobody can have.

    ``auto``, ``local`` and ``cpu:N`` pass: what they are is known when devices are asked for.

    Raises:
        TopologyError: no such slice or host; names the nearest that exist.
    """
    if topology.kind not in ("tpu", "gpu") or _exists(topology):
        return
    near = nearest_topologies(topology)
    raise TopologyError(
        f"cannot plan for `{topology}`: there is no such {_noun(topology)}",
        where=f"{topology.chip}, {topology.chip_count} chip(s)",
        why=_rule_of(topology.chip),
        fix=f"use {' or '.join(str(one) for one in near)}",
    )


def _exists(topology: Topology) -> bool:
    """Whether the shape is one of `slices_of`, and slices of GPU hosts can be joined."""
    shape = topology.shape
    if topology.kind == "gpu" and topology.slices > 1:
        shape = (shape[0] * topology.slices, shape[1])  # its hosts sit in one network
    return shape in _shapes(topology.chip)


@functools.cache
def _shapes(chip: str) -> frozenset[tuple[int, ...]]:
    return frozenset(slices_of(chip))


def _noun(topology: Topology) -> str:
    return "slice" if topology.kind == "tpu" else "set of hosts"


def _rule_of(chip: str) -> str:
    if chip in ("v5e", "v6e"):
        return f"its slices are {', '.join('x'.join(map(str, shape)) for shape in _FLAT)}"
    if chip in _MOST_CHIPS:
        least = "1x1x1, 2x2x1" if chip == "tpu7x" else "2x2x1"
        return (
            f"its slices are {least}, 2x2x2, 2x2x4 and 2x4x4, or AxBxC with A <= B <= C, "
            f"multiples of 4, of at most {_MOST_CHIPS[chip]} chips"
        )
    joined = " or ".join(str(gpus) for gpus in _HOSTS_OF[chip])
    return (
        f"a host alone has 1, 2, 4 or 8 GPUs, several hosts have {joined} each, "
        f"and a network joins at most {_MOST_GPUS} GPUs"
    )


def nearest_topologies(topology: Topology, count: int = 3) -> tuple[Topology, ...]:
    """Topologies of the same chip that exist, nearest first: by number of chips, then by shape.

    What is larger than any slice is answered with several slices of it as well.

    Args:
        topology: of a TPU or GPU; any other has no neighbours and gives an empty tuple.
        count: how many at most.

    >>> [str(near) for near in nearest_topologies(Topology.parse("v5p:8x4x4"))]
    ['v5p:4x4x8', 'v5p:4x4x12', 'v5p:4x4x4']
    >>> [str(near) for near in nearest_topologies(Topology.parse("v5e:16x32"), 2)]
    ['v5e:16x16*2', 'v5e:16x16']
    """
    candidates = set(_candidates(topology))
    wanted = sorted(topology.shape)
    chips = topology.chip_count or 1

    def distance(one: Topology) -> tuple[float, float, float]:
        shape = sorted(one.shape)
        apart = sum(abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True))
        # Rounded, so that equally distant counts tie and the shape decides.
        off = round(abs(math.log((one.chip_count or 1) / chips)), 9)
        apart = round(apart + abs(math.log(one.slices / topology.slices)), 9)
        return off, apart, max(shape) / min(shape)

    return tuple(sorted(candidates, key=lambda one: (distance(one), str(one)))[:count])


def _candidates(topology: Topology) -> Iterator[Topology]:
    """Topologies to choose the nearest from: the same number of slices, one, or just enough."""
    if topology.kind == "gpu":
        yield from (Topology(topology.chip, shape) for shape in _hosts_near(topology))
        return
    shapes = slices_of(topology.chip)
    enough = math.ceil((topology.chip_count or 1) / math.prod(shapes[-1])) if shapes else 1
    for slices in {1, topology.slices, min(enough, _MOST_SUGGESTED_SLICES)}:
        yield from (Topology(topology.chip, shape, slices) for shape in shapes)


def _hosts_near(topology: Topology) -> Iterator[tuple[int, int]]:
    """Of every number of GPUs a host, the hosts around the wanted count: not all 16,384 of them."""
    gpus = topology.chip_count or 1
    for each in _ALONE:
        yield 1, each
    for each in _HOSTS_OF[topology.chip]:
        most = _MOST_GPUS // each
        for around in (gpus // each, topology.shape[0] * topology.slices):
            yield from ((min(max(around + step, 2), most), each) for step in (-1, 0, 1, 2))


def described_mesh(mesh: MeshSpec, topology: Topology) -> AbstractMesh:
    """The abstract mesh of hardware that is not here, checked as `check_topology` and
    `check_layout` do."""
    check_topology(topology)
    return check_layout(topology, mesh).abstract()


def check_layout(topology: Topology, mesh: MeshSpec) -> MeshSpec:
    """Refuse a mesh that cannot be laid on the physical links; return it filled.

    Along slices and hosts, axes are cut (`MeshSpec.split`): without parts stated by the mesh
    that is always possible, since every prime factor of the groups is in some axis. On a torus
    each axis takes whole dimensions or even parts of them; that too is always possible once the
    product matches, because dimensions and axes then have the same prime factors and any way of
    dealing them out is a layout. So what can fail is the product, and parts stated wrongly.

    Args:
        topology: one with a known number of devices; for ``auto`` and ``local`` the mesh is
            returned as it is.
        mesh: at most one size -1.

    Raises:
        MeshError: names the meshes that can be laid.
    """
    if topology.device_count is None:
        return mesh
    filled = mesh.fill(topology.device_count, str(topology))
    groups = topology.groups
    try:
        filled.split(groups)
    except MeshError as error:
        near = _nearest_splits(filled, groups)
        raise MeshError(
            f"cannot lay the mesh `{filled}` on `{topology}`",
            where=f"{groups} {'hosts' if topology.kind == 'gpu' else 'slices'} of "
            f"{topology.device_count // groups} devices",
            why=error.why,
            fix=f"use {' or '.join(str(one) for one in near)}",
        ) from None
    return filled


def _nearest_splits(mesh: MeshSpec, groups: int, count: int = 3) -> tuple[MeshSpec, ...]:
    """The same axes with parts across that multiply to ``groups``, nearest the stated first."""
    stated = dict(mesh.across)

    def distance(parts: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        off = sum(
            abs(math.log(part / stated.get(name, part)))
            for (name, _), part in zip(mesh.axes, parts, strict=True)
        )
        return off, tuple(-part for part in parts)  # of equals, the outermost axis is cut

    ways = sorted(_ways(tuple(size for _, size in mesh.axes), groups), key=distance)
    return tuple(
        MeshSpec(
            mesh.axes,
            tuple((name, part) for name, part in zip(mesh.names, parts, strict=True) if part > 1),
        )
        for parts in ways[:count]
    )


def _ways(sizes: tuple[int, ...], groups: int) -> Iterator[tuple[int, ...]]:
    """Parts, one an axis, that divide the sizes and multiply to ``groups``."""
    if not sizes:
        if groups == 1:
            yield ()
        return
    for part in range(1, math.gcd(sizes[0], groups) + 1):
        if sizes[0] % part == 0 and groups % part == 0:
            yield from ((part, *rest) for rest in _ways(sizes[1:], groups // part))
