"""Whose bytes a collective of a compiled train step moves: parameters and activations by name.

A parameter's cast, gather and reduction carry its name as a scope (`meshwright.train.weights`), so
most collectives say themselves what they move. Compilers drop names when they combine or rewrite;
then the array's shape decides: every parameter's shape on a device is known, in each of its
layouts and as the tiles in which gradients are scattered, and so are the batch and length of an
activation. A shape that several parameters share names them as `meshwright.sharding.leaf_names`
does; guessing one would not be true.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from meshwright.sharding.chips import chip_of
from meshwright.sharding.collectives import LeafOf
from meshwright.sharding.decisions import axes_of
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.hlo import Instruction, Shape
from meshwright.sharding.leaf_names import either, sizes_of
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.slices import slices_of
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes
from meshwright.train.config import TrainConfig
from meshwright.train.layout import Layout
from meshwright.train.torus import TILE

__all__ = ["ACTIVATIONS", "check_leaves", "leaf_namer", "local_shape"]

ACTIVATIONS = "activations"
_SCOPE = re.compile(r"weight:([\w.]+)")


def check_leaves(layout: Layout, topology: Topology) -> None:
    """Refuse a plan in which one parameter is larger than a device: no answer to it is of use.

    Args:
        layout: resolved layouts; the masters count.
        topology: the hardware; of simulated devices any size is taken.

    Raises:
        PlacementError: names the largest such parameter and hardware that holds the state.
    """
    chip = chip_of(topology)
    if chip is None or not layout.masters:
        return
    largest = max(layout.masters, key=lambda decision: decision.bytes_per_device)
    if largest.bytes_per_device <= chip.limit_bytes:
        return
    everything = [*layout.masters, *layout.moments]
    state = sum(decision.leaf.size_bytes for decision in everything)
    needed = -(-state // chip.limit_bytes)
    per_chip = chip.devices_per_chip
    shapes = slices_of(chip.name)
    most = math.prod(shapes[-1]) * per_chip
    such = next(
        (Topology(chip.name, shape) for shape in shapes if math.prod(shape) * per_chip >= needed),
        Topology(chip.name, shapes[-1], -(-needed // most)),
    )
    raise PlacementError(
        f"cannot plan for `{topology}`: one parameter is larger than a device",
        where=f"{largest.leaf.path} {'×'.join(map(str, largest.leaf.shape))} float32, "
        f"mesh {layout.mesh}",
        why=f"it takes {format_bytes(largest.bytes_per_device)} on each device, "
        f"which has {format_bytes(chip.limit_bytes)}",
        fix=f"parameters and optimizer state take {format_bytes(state)}: split them over at least "
        f"{needed} devices, such as {such}, by fsdp or tensor in the mesh",
    )


def local_shape(shape: Sequence[int], spec: PartitionSpec, mesh: MeshSpec) -> tuple[int, ...]:
    """The shape one device holds of an array.

    >>> local_shape((8, 6), PartitionSpec("fsdp"), MeshSpec.parse("fsdp=4"))
    (2, 6)
    """
    sizes = mesh.sizes
    parts = []
    for entry in (*spec, *[None] * (len(shape) - len(spec))):
        parts.append(math.prod(sizes[axis] for axis in axes_of(entry)))
    return tuple(size // part for size, part in zip(shape, parts, strict=True))


def leaf_namer(config: TrainConfig, layout: Layout) -> LeafOf:
    """A function that names what an array of a collective is, for `collectives_of`.

    Args:
        config: the run; batch and length tell activations from parameters.
        layout: its resolved layouts.
    """
    by_shape = _parameters_by_shape(layout)
    by_elements: dict[int, list[str]] = defaultdict(list)
    for sizes, paths in _parameters_by_shape(layout, stacks=False).items():
        by_elements[math.prod(sizes)] += paths
    tokens = {config.seq_len}

    def name(instruction: Instruction, shape: Shape) -> str:
        candidates = by_shape.get(sizes_of(shape.dims), ())
        if not candidates and shape.dims[1:] == TILE and "gather" not in instruction.opcode:
            candidates = by_elements.get(shape.elements, ())
        scoped = [found.replace(".", "/") for found in _SCOPE.findall(instruction.op_name)]
        scoped = list(dict.fromkeys(scoped))
        if len(scoped) == 1:
            return scoped[0]
        both = [path for path in scoped if path in candidates] or list(candidates or scoped)
        if both:
            return either(both)
        if len(shape.dims) > 1 and tokens & set(shape.dims):
            return f"{ACTIVATIONS} {'×'.join(map(str, shape.dims))}"
        return ""

    return name


def _parameters_by_shape(
    layout: Layout, *, stacks: bool = True
) -> Mapping[tuple[int, ...], tuple[str, ...]]:
    """Parameters by their sizes on a device, in any order of dims: of one layer, and with
    ``stacks`` of all layers too."""
    found: dict[tuple[int, ...], list[str]] = defaultdict(list)
    roles = zip(layout.masters, layout.working, layout.reduced, strict=True)
    for decisions in roles:
        leaf = decisions[0].leaf
        specs = {decision.spec for decision in decisions}
        specs |= {layout.compute_spec(decision) for decision in decisions}
        for spec in specs:
            shape = local_shape(leaf.shape, spec, layout.mesh)
            stacked = leaf.dims is not None and leaf.dims[:1] in (("layers",), ("dense_layers",))
            whole = (shape,) if stacks or not stacked else ()
            for one in (*whole, shape[1:]) if stacked else whole:
                key = sizes_of(one)
                if key and leaf.path not in found[key]:
                    found[key].append(leaf.path)
    return {key: tuple(paths) for key, paths in found.items()}
