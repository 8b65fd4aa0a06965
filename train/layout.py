"""Where everything of a training run lives: four layouts of the parameters, one of the state.

Each parameter has a layout in four roles, all read from the Rules' tables:

=========  ==========================  ====================================================
role       table                       what it is
=========  ==========================  ====================================================
master     ``optimizer``               float32 parameters between steps, with the moments
working    ``params``                  the copy a step keeps while it runs, compute dtype
compute    working, less token axes    the copy a matmul reads, gathered for one layer
reduced    ``gradients``               the accumulator over microbatches
=========  ==========================  ====================================================

Masters live with the optimizer because that is where they are updated: under ZeRO-1 the update
touches only the shard a device owns, and what crosses the wire once a step is the new *working*
copy in the compute dtype, half the bytes of gathering float32 masters. Under FSDP master and
working layout agree and no working copy exists; each layer is cast and gathered as it runs.

A weight cannot stay split over an axis that splits the tokens, so the compute layout is the
working one without those axes. Experts are the exception: tokens go to them
(`meshwright.train.expert_parallel`), so their dim stays split over the axes they are dealt to.
Everything here is shapes: no devices, no arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import (
    Decision,
    Decisions,
    axes_of,
    check_mesh,
    entry_of,
    resolve,
)
from meshwright.sharding.dims import Leaf, describe, describe_optimizer
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules

__all__ = ["Layout", "compute_spec", "resolve_layout", "without_axes"]

_EXPERTS = "experts"


@dataclass(frozen=True)
class Layout:
    """Resolved layouts of parameters and optimizer state on one mesh.

    Attributes:
        mesh: filled mesh.
        rules: the rules that decided.
        working: decisions of the ``params`` table.
        reduced: decisions of the ``gradients`` table.
        masters: decisions of the ``optimizer`` table for the parameters themselves.
        moments: decisions of the ``optimizer`` table for the optimizer's state.
    """

    mesh: MeshSpec
    rules: Rules
    working: Decisions
    reduced: Decisions
    masters: Decisions
    moments: Decisions

    def unreduced_axes(self, gradients: Decisions) -> tuple[str, ...]:
        """Axes that split the tokens of a batch and no gradient of a layout.

        Partial gradients can be kept apart over these until a step reduces them once.
        """
        split = {
            axis for decision in gradients for entry in decision.spec for axis in axes_of(entry)
        }
        return tuple(axis for axis in self.rules.token_axes() if axis not in split)

    def compute_spec(self, decision: Decision) -> PartitionSpec:
        """The layout a matmul needs of a weight, from its layout in another role."""
        return compute_spec(decision, self.rules, self.mesh)

    def is_dealt(self, leaf: Leaf) -> bool:
        """Whether a parameter is a stack of experts that tokens go to."""
        return _is_dealt(leaf, self.rules, self.mesh)


def compute_spec(decision: Decision, rules: Rules, mesh: MeshSpec) -> PartitionSpec:
    """The layout a matmul needs of a weight: its own without the axes that split tokens.

    Of a stack of experts that tokens go to, the dim of the experts stays split.
    """
    spec, tokens = decision.spec, rules.token_axes()
    if not _is_dealt(decision.leaf, rules, mesh):
        return without_axes(spec, tokens)
    dealt, dims = rules.expert_axes(), decision.leaf.dims or ()
    entries = [
        entry_of([a for a in axes_of(e) if a not in tokens or (dim == _EXPERTS and a in dealt)])
        for dim, e in zip(dims, spec, strict=False)
    ]
    return without_axes(PartitionSpec(*entries), ())


def _is_dealt(leaf: Leaf, rules: Rules, mesh: MeshSpec) -> bool:
    parts = math.prod(mesh.sizes.get(axis, 1) for axis in rules.expert_axes())
    return parts > 1 and _EXPERTS in (leaf.dims or ())


def resolve_layout(
    shapes: Any, dims: Any, optimizer_shapes: Any, rules: Rules, mesh: MeshSpec
) -> Layout:
    """Resolve every table for a model and its optimizer.

    Args:
        shapes: the parameters as ShapeDtypeStructs, in the master dtype.
        dims: tree of the same structure with dim names.
        optimizer_shapes: the optimizer state as ShapeDtypeStructs.
        rules: folded rules.
        mesh: filled mesh.

    Raises:
        RulesError, PlacementError, DimsError: see `meshwright.sharding.decisions`.
    """
    check_mesh(rules, mesh)
    leaves = describe(shapes, dims)
    # Moments are resolved on their own: an unused rule of yours was refused for the masters.
    moments = describe_optimizer(optimizer_shapes, leaves)
    return Layout(
        mesh=mesh,
        rules=rules,
        working=resolve(leaves, rules, mesh, "params"),
        reduced=resolve(leaves, rules, mesh, "gradients"),
        masters=resolve(leaves, rules, mesh, "optimizer"),
        moments=resolve(moments, rules, mesh, "optimizer", check_used=False, beside=leaves),
    )


def without_axes(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """Remove mesh axes from a spec.

    >>> without_axes(PartitionSpec("tensor", ("fsdp", "data")), ("fsdp",)) == PartitionSpec(
    ...     "tensor", "data"
    ... )
    True
    """
    entries: list[Any] = []
    for entry in spec:
        kept = tuple(axis for axis in axes_of(entry) if axis not in axes)
        entries.append(entry_of(kept))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
