"""Where a candidate plan puts things, as counts: the axes of each group of weights, local sizes.

The estimates need of a layout only *how many parts* each array has and *which axes* a collective
runs over. `meshwright.train.layout` answers that with a decision and a reason for every leaf,
in jax's terms; this answers it for groups of leaves with strings and integers, a thousand times
faster, and by the same rules: the tests hold the bytes equal to those of ``explain``.

What depends on the rules' names alone is cached by (model, optimizer, rules); a mesh adds sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from meshwright.models.config import ModelConfig
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules, Table
from meshwright.sharding.schedule import Schedule, layer_slots
from meshwright.train.config import OptimizerConfig, TrainConfig
from meshwright.train.parallelism import check_batch, choose_schedule
from meshwright.train.shapes import WeightGroup, groups_of, moment_groups

__all__ = ["Axes", "PlacedGroup", "Placement", "place"]

Axes = tuple[str, ...]
"""Mesh axes, in mesh order where they come from a `Placement`."""

_ACTIVATION_DIMS = (
    "batch",
    "length",
    "sequence",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
)


class PlacedGroup(NamedTuple):
    """A group of weights and the axes that split it in each of its roles.

    Attributes:
        group: the leaves.
        masters: float32 masters, between steps.
        working: the copy a step keeps.
        compute: what a matmul reads: ``working`` less the axes that split tokens, but for the
            axes that experts are dealt to.
        reduced: gradients in accumulators; the masters' where there are none.
        partial: axes besides those of the tokens that leave its gradient a partial sum.
        copied: whether the step keeps a working copy: layouts differ, if only in an axis of 1.
        gathered: whether each use is a gather, if only over an axis of 1.
    """

    group: WeightGroup
    masters: Axes
    working: Axes
    compute: Axes
    reduced: Axes
    partial: Axes
    copied: bool
    gathered: bool


class _Names(NamedTuple):
    """What follows from a model and rules before any size is known."""

    groups: tuple[PlacedGroup, ...]
    activations: dict[str, Axes]
    token_axes: Axes
    deferred: Axes
    experts: Axes
    columns: Axes
    checks: tuple[tuple[str, int, Axes, Table], ...]


@dataclass(frozen=True)
class Placement:
    """A config on a mesh.

    Attributes:
        config: the run.
        sizes: of the mesh's axes, in mesh order.
        groups: weights with their axes; axes of size 1 left out.
        moments: the optimizer's state: (group, axes).
        activations: axes by activation dim; of ``sequence`` those besides the length's.
        token_axes: axes that split rows or their length.
        deferred: axes whose gradients stay partial sums until the end of the step.
        experts: axes that experts are dealt to.
        exchanged: axes that split the embedding's columns, where rows are looked up by exchange
            (`meshwright.train.embedding`) and the table is not gathered; else empty.
        rows: of a microbatch on a device.
        length: tokens of a row on a device.
        layers: that a device works on; places for them, where stages have not equally many.
        schedule: of the stages, where the layers are split over some.
        stage: the axes that split them.
    """

    config: TrainConfig
    sizes: Mapping[str, int]
    groups: tuple[PlacedGroup, ...]
    moments: tuple[tuple[WeightGroup, Axes], ...]
    activations: Mapping[str, Axes]
    token_axes: Axes
    deferred: Axes
    experts: Axes
    exchanged: Axes
    rows: int
    length: int
    layers: int
    schedule: Schedule | None = None
    stage: Axes = ()

    @property
    def layers_kept(self) -> float:
        """Layers whose activations a device keeps for the backward pass, of all microbatches; a
        stage has those of one unit besides its slots, as they are made or taken back."""
        if self.schedule is None:
            return self.layers
        return self.layers * (self.schedule.slots + 1) / self.schedule.chunks

    @property
    def head_tokens(self) -> float:
        """Tokens of a microbatch whose logits a device works on."""
        return self.tokens / (self.schedule.stages if self.schedule else 1)

    @property
    def ticks(self) -> float:
        """How often a device runs its layers in a step, over the microbatches; 1 but for stages."""
        return 1 / (1 - self.schedule.idle_fraction) if self.schedule else 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a device."""
        return self.rows * self.length

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.sizes.values())

    def parts(self, axes: Iterable[str]) -> int:
        """Into how many parts these axes split."""
        count = 1
        for axis in axes:
            count *= self.sizes[axis]
        return count

    def split(self, dim: str) -> int:
        """Parts of an activation dim."""
        return self.parts(self.activations[dim])


def place(config: TrainConfig, mesh: MeshSpec, rules: Rules) -> Placement:
    """Work out a config's layout on a filled mesh.

    Raises:
        PlacementError: a size that its axes do not divide, or an axis on two dims of a leaf;
            `meshwright.train.layout.resolve_layout` says more about the same.
    """
    check_batch(config, rules, mesh)
    many, model = config.grad_accum > 1, config.model
    names = _names(model, rules, many)
    sizes = mesh.sizes
    for dim, size, axes, table in names.checks:
        parts = 1
        for axis in axes:
            parts *= sizes.get(axis, 1)
        if size % parts and dim != "layers":  # which have places for more
            _refuse_size(dim, size, axes, table, parts, mesh)
    real = {axis for axis, size in sizes.items() if size > 1}
    order = tuple(axis for axis in sizes if axis in real)

    def kept(axes: Axes) -> Axes:
        return tuple([axis for axis in order if axis in axes])

    groups = tuple(
        [
            named._replace(
                masters=kept(named.masters),
                working=kept(named.working),
                compute=kept(named.compute),
                reduced=kept(named.reduced),
                partial=kept(named.partial),
            )
            for named in names.groups
        ]
    )
    activations = {dim: kept(axes) for dim, axes in names.activations.items()}
    state = _moment_axes(config.optimizer, model, rules)
    rows = config.batch_size // config.grad_accum
    parts = [math.prod([sizes[axis] for axis in activations[dim]]) for dim in ("batch", "length")]
    deferred = kept(names.deferred) if many else ()
    exchanged = names.columns if names.columns == kept(names.columns) else ()
    local = rows // parts[0] * (config.seq_len // parts[1])
    if set(exchanged) & set(deferred) or local >= model.vocab_size:
        exchanged = ()  # `Weights.exchange_for`: a table of fewer rows than tokens is gathered
    placement = Placement(
        config=config,
        sizes=sizes,
        groups=groups,
        moments=tuple([(group, kept(axes)) for group, axes in state]),
        activations=activations,
        token_axes=kept(names.token_axes),
        deferred=deferred,
        experts=kept(names.experts),
        exchanged=exchanged,
        rows=rows // parts[0],
        length=config.seq_len // parts[1],
        layers=model.layers,
        stage=kept(rules.stage_axes()),
    )
    return _staged(placement) if placement.stage else placement


def _staged(placement: Placement) -> Placement:
    """With a schedule, and layers as stages store them; no rows of the embedding are exchanged."""
    config, first = placement.config, placement.config.model.experts.first_dense
    schedule = choose_schedule(config.pipeline, placement.parts(placement.stage), config.grad_accum)
    places = len(layer_slots(config.model.layers - first, schedule.stages, schedule.chunks))
    groups = [p._replace(group=_with_empty(p.group, places)) for p in placement.groups]
    moments = [(_with_empty(group, places), axes) for group, axes in placement.moments]
    return replace(
        placement,
        groups=tuple(groups),
        moments=tuple(moments),
        exchanged=(),
        layers=places // schedule.stages + first,
        schedule=schedule,
    )


def _with_empty(group: WeightGroup, places: int) -> WeightGroup:
    """The group as it is stored, with empty places among its layers."""
    layers = dict(group.dims).get("layers")
    if layers in (None, places):
        return group
    dims = tuple([(dim, places if dim == "layers" else size) for dim, size in group.dims])
    return replace(group, dims=dims, elements=group.elements // layers * places)


@lru_cache(maxsize=4096)
def _names(model: ModelConfig, rules: Rules, many: bool) -> _Names:
    activations = {dim: rules.axes_for("activations", dim) for dim in _ACTIVATION_DIMS}
    activations["sequence"] = rules.stream_axes()
    tokens, experts = rules.token_axes(), rules.expert_axes()
    groups, checks = [], {}
    for group in groups_of(model):
        masters, working, reduced = (
            _group_axes(group, rules, table) for table in ("optimizer", "params", "gradients")
        )
        for table in ("optimizer", "params", "gradients"):
            for dim, size in group.dims:
                if axes := rules.axes_for(table, dim):
                    checks[dim, size, axes, table] = None
        stays = rules.axes_for("params", "experts") if "experts" in dict(group.dims) else ()
        stays = tuple(axis for axis in stays if axis in experts)
        compute = tuple(axis for axis in working if axis in stays or axis not in tokens)
        # A norm of the heads sees the heads of its own device only.
        of_heads = model.qk_norm and ("norm", model.head_dim) in group.dims and group.layered
        partial = activations["heads"] if of_heads else ()
        copied, gathered = set(working) != set(masters), compute != working
        roles = (masters, working, compute, reduced if many else masters, partial)
        groups.append(PlacedGroup(group, *roles, copied, gathered))
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "mlp": model.expert_mlp}
    sizes |= {"embed": model.embed, "vocab": model.vocab_size, "head_dim": model.head_dim}
    for dim, size in sizes.items():
        if activations[dim]:
            checks[dim, size, activations[dim], "activations"] = None
    accumulated = {
        axis for group in groups_of(model) for axis in _group_axes(group, rules, "gradients")
    }
    deferred = tuple(axis for axis in tokens if axis not in accumulated and axis not in experts)
    columns = () if model.tied else _columns(groups, rules)
    axes = tokens, deferred, experts, columns
    return _Names(tuple(groups), activations, *axes, tuple(checks))


def _columns(groups: list[PlacedGroup], rules: Rules) -> Axes:
    """Axes over which the embedding's rows may be exchanged: they split its columns and rows of
    the batch, and its layout is one throughout the step."""
    columns, ids = (rules.axes_for("params", dim) for dim in ("embed", "vocab"))
    batch = rules.axes_for("activations", "batch")
    for group, masters, _, _, reduced, _, copied, _ in groups:
        if group.layered or "vocab" not in dict(group.dims):
            continue
        if copied or reduced != masters or not set(columns) <= set(batch) or set(ids) & set(batch):
            return ()
    return columns


@lru_cache(maxsize=4096)
def _moment_axes(
    optimizer: OptimizerConfig, model: ModelConfig, rules: Rules
) -> tuple[tuple[WeightGroup, Axes], ...]:
    return tuple(
        (group, _group_axes(group, rules, "optimizer")) for group in moment_groups(optimizer, model)
    )


def _group_axes(group: WeightGroup, rules: Rules, table: Table) -> Axes:
    found: list[str] = []
    for dim, _ in group.dims:
        for axis in rules.axes_for(table, dim):
            if axis in found:
                raise PlacementError(
                    f"cannot split two dims of `{group.name}` over the same axis `{axis}`",
                    where=f"dims {', '.join(name for name, _ in group.dims)}, table {table}",
                    why="each device along an axis holds one part, so an axis splits one dim",
                    fix=f"keep one of them whole: `{dim}=none`",
                )
            found.append(axis)
    return tuple(found)


def _refuse_size(dim: str, size: int, axes: Axes, table: Table, parts: int, mesh: MeshSpec) -> None:
    named = "+".join(axes)
    fitting = [str(n) for n in range(1, min(size, 4096) + 1) if size % n == 0]
    raise PlacementError(
        f"cannot split the dim `{dim}` over axis `{named}`",
        where=f"table {table}, mesh {mesh}",
        why=f"{dim} is {size} and the mesh asks for {parts} parts: "
        f"{size} is not divisible by {parts}",
        fix=f"make `{named}` one of {', '.join(fitting[:8])}, or keep it whole: `{dim}=none`",
    )
