"""Whose bytes a collective of a compiled train step moves: parameters and activations by name.

A parameter's cast, gather and reduction carry its name as a scope (`meshwright.train.weights`), so
most collectives say themselves what they move. Compilers drop names when they combine or rewrite;
then the array's shape decides: every parameter's shape on a device is known, in each of its
layouts, and so are the batch and length of an activation. A shape that several parameters share
names them all, which is true and short; guessing one would be neither.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import axes_of
from meshwright.sharding.hlo import Instruction, Shape
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.config import TrainConfig
from meshwright.train.layout import Layout

__all__ = ["ACTIVATIONS", "leaf_namer", "local_shape"]

ACTIVATIONS = "activations"
_SCOPE = re.compile(r"weight:([\w.]+)")
_NAMED = 2


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


def leaf_namer(config: TrainConfig, layout: Layout) -> Callable[[Instruction, Shape], str]:
    """A function that names what an array of a collective is, for `collectives_of`.

    Args:
        config: the run; batch and length tell activations from parameters.
        layout: its resolved layouts.
    """
    by_shape = _parameters_by_shape(layout)
    tokens = {config.seq_len}

    def name(instruction: Instruction, shape: Shape) -> str:
        dims = tuple(sorted(size for size in shape.dims if size != 1))
        candidates = by_shape.get(dims, ())
        scoped = [found.replace(".", "/") for found in _SCOPE.findall(instruction.op_name)]
        scoped = list(dict.fromkeys(scoped))
        if len(scoped) == 1:
            return scoped[0]
        both = [path for path in scoped if path in candidates] or list(candidates or scoped)
        if both:
            more = f" and {len(both) - _NAMED} more" if len(both) > _NAMED else ""
            return " or ".join(both[:_NAMED]) + more
        if len(shape.dims) > 1 and tokens & set(shape.dims):
            return f"{ACTIVATIONS} {'×'.join(map(str, shape.dims))}"
        return ""

    return name


def _parameters_by_shape(layout: Layout) -> Mapping[tuple[int, ...], tuple[str, ...]]:
    """Parameters by their sizes on a device, in any order of dims, one layer or all."""
    found: dict[tuple[int, ...], list[str]] = defaultdict(list)
    roles = zip(layout.masters, layout.working, layout.reduced, strict=True)
    for decisions in roles:
        leaf = decisions[0].leaf
        specs = {decision.spec for decision in decisions}
        specs |= {layout.compute_spec(decision.spec) for decision in decisions}
        for spec in specs:
            shape = local_shape(leaf.shape, spec, layout.mesh)
            stacked = leaf.dims is not None and leaf.dims[:1] == ("layers",)
            for one in (shape, shape[1:]) if stacked else (shape,):
                key = tuple(sorted(size for size in one if size != 1))
                if key and leaf.path not in found[key]:
                    found[key].append(leaf.path)
    return {key: tuple(paths) for key, paths in found.items()}
