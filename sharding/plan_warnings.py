"""What in a plan costs and need not: warnings, each with its source, leaf, cost and remedy.

Each warning is one small function from what is known to the warnings it finds, so that a report of
a stranger's step, of which only the compiled text is known, and one of our own, whose leaves and
expected collectives are known too, go through the same list. What is not known silences the
warnings that need it; it never makes one up. Costs under `SMALL` of a step's traffic or of a
device's memory are left out: a list that cries about kilobytes is not read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshwright.sharding.chips import Chip, chip_of
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective, PlanWarning
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes

if TYPE_CHECKING:
    from meshwright.sharding.links import AxisLink

__all__ = ["SMALL", "WARNING_CODES", "PlacedLeaf", "PlanFacts", "warnings_of"]

SMALL = 0.01
"""Costs below this share of all wire bytes, or of a device's memory, are not worth a warning."""

WARNING_CODES = (
    "involuntary-rematerialization",
    "replicated-leaf",
    "float32-on-the-wire",
    "undeclared-collective",
    "emulated-collective",
    "gathered-again",
    "reduced-every-microbatch",
    "slow-axis",
    "tile-padding",
    "recompilation",
)
"""Every code a warning can have."""

_REMATERIALIZED = re.compile(
    r"[Ii]nvoluntary full rematerialization\. The compiler (?:was not able to|cannot) go from "
    r"sharding (?P<old>.+?) to (?P<new>.+?) (?:without|for HLO operation:|efficiently)"
)
_OPERATION = re.compile(r'op_name="([^"]*)"')
_FILE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')


@dataclass(frozen=True)
class PlacedLeaf:
    """One parameter as a device holds it while it is used.

    Attributes:
        path: of the leaf.
        shape: on one device, as stored.
        itemsize: of the stored element.
        size_bytes: of the whole leaf.
        parts: devices it is split over.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    size_bytes: int
    parts: int


@dataclass(frozen=True)
class PlanFacts:
    """What is known of a plan; all but the first three optional.

    Attributes:
        collectives: of the compiled program.
        mesh, topology: it was compiled for.
        chatter: what the compiler wrote.
        links: by axis.
        compute_seconds: of a step.
        compute_itemsize: of the dtype that should cross the wire; 4 silences float32 warnings.
        leaves: parameters.
        gathers: by leaf, how often a step has to gather it, each layer counted.
        scattered: axes over which parameters are split, so gradients reduce-scattered.
        exchanged: leaves whose rows are meant to travel by all-to-all.
        activations: (kind of collective, axis) that strategies move activations by.
        accumulates: the step has several microbatches.
        changing: paths of arguments whose type changes with their value.
        deferrable: see `StepFacts`.
    """

    collectives: Sequence[Collective]
    mesh: MeshSpec
    topology: Topology
    chatter: str = ""
    links: Mapping[str, AxisLink] | None = None
    compute_seconds: float | None = None
    compute_itemsize: int = 2
    leaves: Sequence[PlacedLeaf] = ()
    gathers: Mapping[str, int] = field(default_factory=dict)
    scattered: frozenset[str] = frozenset()
    exchanged: frozenset[str] = frozenset()
    activations: frozenset[tuple[str, str]] = frozenset()
    accumulates: bool = False
    changing: Sequence[str] = ()
    deferrable: frozenset[str] = frozenset()

    @property
    def chip(self) -> Chip | None:
        """What it was compiled for."""
        return chip_of(self.topology)

    @property
    def small_wire_bytes(self) -> float:
        """Traffic not worth a warning."""
        return SMALL * sum(found.wire_bytes for found in self.collectives)

    @property
    def small_bytes(self) -> float:
        """Memory not worth a warning."""
        return SMALL * self.chip.limit_bytes if self.chip else math.inf


def warnings_of(facts: PlanFacts) -> tuple[PlanWarning, ...]:
    """Every warning of a plan, the costliest first."""
    found = [warning for check in _CHECKS for warning in check(facts)]
    return tuple(sorted(found, key=lambda warning: -(warning.cost_bytes or 0)))


def _involuntary(facts: PlanFacts) -> Iterator[PlanWarning]:
    """The partitioner gave up and made an array whole on every device."""
    lines = [line for line in facts.chatter.splitlines() if "nvoluntary full remat" in line]
    seen = set()
    for line in lines:
        operation = _OPERATION.search(line)
        file = _FILE.search(line)
        change = _REMATERIALIZED.search(line)
        key = (operation[1] if operation else "", file[0] if file else "")
        if key in seen:
            continue
        seen.add(key)
        went = f" from {change['old']} to {change['new']}" if change else ""
        yield PlanWarning(
            "involuntary-rematerialization",
            f"the partitioner could not reshard an array{went} and makes it whole on each device",
            source=f"{file[1]}:{file[2]}" if file else "",
            leaf=operation[1] if operation else "",
            fix="constrain the array on both sides of this operation to layouts one collective "
            "apart",
        )


def _replicated(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Leaves every device holds whole although there is a mesh to split them over."""
    for leaf in facts.leaves:
        if leaf.parts == 1 and leaf.size_bytes > facts.small_bytes and facts.mesh.device_count > 1:
            yield PlanWarning(
                "replicated-leaf",
                f"every device holds all of `{leaf.path}`",
                leaf=leaf.path,
                cost_bytes=leaf.size_bytes - leaf.size_bytes // facts.mesh.device_count,
                fix="split one of its dims: fsdp or tensor in the mesh, or --zero 1 on a data axis",
            )


def _float32(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Forward and backward traffic at twice the bytes of the compute dtype."""
    if facts.compute_itemsize >= 4:
        return
    wide = [
        c
        for c in facts.collectives
        # Gradients of keys that collect round a ring are rounded once, at home.
        if c.dtype == "f32" and c.phase != "update" and not _asked_for(facts, c)
    ]
    for group in _grouped(wide):
        wire = sum(c.wire_bytes for c in group)
        if wire > facts.small_wire_bytes:
            first = group[0]
            yield PlanWarning(
                "float32-on-the-wire",
                f"{first.kind} of float32 over {_over(first)} in the {first.phase} pass",
                source=first.source,
                leaf=first.leaf,
                cost_bytes=wire // 2,
                cost_seconds=_seconds(facts, first, wire // 2),
                fix="cast to the compute dtype before the collective",
            )


def _undeclared(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Gathers and all-to-alls of activations that no strategy asks for, less those of an
    embedding's rows."""

    def declared(found: Collective) -> bool:
        if _asked_for(facts, found):
            return True
        if found.kind == "all-to-all":
            return found.leaf in facts.exchanged
        return not (found.kind == "all-gather" and found.leaf.startswith("activations"))

    for group in _grouped(c for c in facts.collectives if not declared(c)):
        wire, first = sum(c.wire_bytes for c in group), group[0]
        if wire > facts.small_wire_bytes:
            yield PlanWarning(
                "undeclared-collective",
                f"{first.kind} over {_over(first)} that no strategy asks for"
                f" ({sum(c.count for c in group)} a step)",
                source=first.source,
                leaf=first.leaf,
                cost_bytes=wire,
                cost_seconds=_seconds(facts, first, wire),
                fix="constrain the array there, so that its layout does not change",
            )


def _asked_for(facts: PlanFacts, found: Collective) -> bool:
    return all((found.kind, axis) in facts.activations for axis in found.axes) and bool(found.axes)


def _emulated(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Weights gathered or gradients scattered by an all-reduce, at twice the bytes."""
    meant = [
        c
        for c in facts.collectives
        if c.kind == "all-reduce"
        and (c.phase != "update" or c.leaf)  # norms and losses have no leaf
        and set(c.axes) & facts.scattered
        and not c.leaf.startswith("activations")
    ]
    for group in _grouped(meant, by_leaf=False):
        wire, first = sum(c.wire_bytes for c in group), group[0]
        if wire > facts.small_wire_bytes:
            yield PlanWarning(
                "emulated-collective",
                f"the compiler moves weights or gradients over {_over(first)} by all-reduce where "
                f"an all-gather or reduce-scatter would do",
                source=first.source,
                leaf=_leaves_of(group),
                cost_bytes=wire // 2,
                cost_seconds=_seconds(facts, first, wire // 2),
                fix="--accumulate sharded scatters gradients as they appear"
                if first.phase == "update"
                else f"lay {_over(first)} along fewer dimensions of the torus, such as one whole "
                f"dimension, and give the rest of the devices another axis",
            )


def _gathered_again(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Weights gathered more often than the remat policy needs."""
    counted: dict[str, list[Collective]] = defaultdict(list)
    for found in facts.collectives:
        if found.kind == "all-gather" and found.leaf in facts.gathers:
            counted[found.leaf].append(found)
    for leaf, found in counted.items():
        # One over a part of its axes is a part of a gather that is made of several.
        times = round(sum(c.count * _part_of_axes(facts, c) for c in found))
        needed = facts.gathers[leaf]
        wire = sum(c.wire_bytes for c in found)
        extra = round(wire * (1 - needed / times)) if times > needed else 0
        if extra > facts.small_wire_bytes:
            yield PlanWarning(
                "gathered-again",
                f"`{leaf}` is gathered {times} times a step; {needed} would do",
                source=found[0].source,
                leaf=leaf,
                cost_bytes=extra,
                cost_seconds=_seconds(facts, found[0], extra),
                fix="read the weight once a layer; a copy kept by the caller is gathered again",
            )


def _part_of_axes(facts: PlanFacts, found: Collective) -> float:
    """Of a gather over whole axes, by the factor its buffer grows; 1 where it is all of it."""
    whole = math.prod(facts.mesh.sizes.get(axis, 1) for axis in found.axes)
    if not 1 < found.participants < whole:
        return 1.0
    return math.log(found.participants) / math.log(whole)


def _every_microbatch(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Gradients reduced inside the microbatch loop although sums could wait."""

    def is_gradient(found: Collective) -> bool:
        # Of our own trainer's steps leaves are known, and are used in the layers of a microbatch.
        ours = facts.accumulates and found.loop_depth > 1 and found.leaf in facts.gathers
        anyones = bool(facts.deferrable & set(found.axes) and found.loop_depth and found.leaf)
        return ours or anyones

    inside = [c for c in facts.collectives if _reduces_backward(c) and is_gradient(c)]
    for group in _grouped(inside, by_leaf=False):
        wire, first = sum(c.wire_bytes for c in group), group[0]
        if wire > facts.small_wire_bytes:
            yield PlanWarning(
                "reduced-every-microbatch",
                f"gradients cross {_over(first)} in every microbatch",
                source=first.source,
                leaf=_leaves_of(group),
                cost_bytes=wire,
                cost_seconds=_seconds(facts, first, wire),
                fix="independent_rows=True keeps each device's sums and reduces once a step, where "
                "the loss is a mean over rows that do not see one another"
                if facts.deferrable
                else "--accumulate whole (with --zero 1 or 0) keeps each device's sums and reduces "
                "once a step",
            )


def _reduces_backward(found: Collective) -> bool:
    return found.kind in ("all-reduce", "reduce-scatter") and found.phase == "backward"


def _slow_axis(facts: PlanFacts) -> Iterator[PlanWarning]:
    """An axis over the slow network that every layer waits for: nothing waits for gradients."""

    def is_gradient(found: Collective) -> bool:
        named = found.leaf and not found.leaf.startswith("activations")
        return bool(named) and _reduces_backward(found)

    for axis, link in (facts.links or {}).items():
        if link.network not in ("dcn", "nic") or facts.mesh.sizes.get(axis, 1) == 1:
            continue
        crossing = [c for c in facts.collectives if axis in c.axes and not is_gradient(c)]
        inside = [c for c in crossing if c.loop_depth > 0]
        wire = sum(c.wire_bytes for c in inside)
        seconds = wire / link.bandwidth
        if inside and seconds > 0.1 * (facts.compute_seconds or math.inf):
            yield PlanWarning(
                "slow-axis",
                f"`{axis}` crosses {'slices' if link.network == 'dcn' else 'hosts'} and carries "
                f"{format_bytes(wire)} a device inside the layer loop",
                source=inside[0].source,
                leaf=_leaves_of(inside),
                cost_bytes=wire,
                cost_seconds=seconds,
                fix=f"make `{axis}` fit within a host or slice and let data cross instead",
            )


def _padding(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Bytes that hold nothing because a dim is no multiple of the chip's tile."""
    chip = facts.chip
    if chip is None or chip.kind != "tpu":
        return
    for leaf in facts.leaves:
        if len(leaf.shape) < 2 or not math.prod(leaf.shape):
            continue
        rows, lanes = chip.tile(leaf.itemsize)
        *outer, second, last = leaf.shape
        padded = math.prod(outer) * -(-second // rows) * rows * -(-last // lanes) * lanes
        # A compiler may store a leaf with its dims exchanged, so the better order counts.
        other = math.prod(outer) * -(-last // rows) * rows * -(-second // lanes) * lanes
        waste = (min(padded, other) - math.prod(leaf.shape)) * leaf.itemsize
        if waste > facts.small_bytes:
            yield PlanWarning(
                "tile-padding",
                f"`{leaf.path}` is {second}×{last} on a device, in tiles of {rows}×{lanes}",
                leaf=leaf.path,
                cost_bytes=waste,
                fix=f"make its split dims multiples of {lanes}, or split it over fewer devices",
            )


def _recompilation(facts: PlanFacts) -> Iterator[PlanWarning]:
    """Arguments that are Python numbers, or typed like one."""
    for path in facts.changing:
        yield PlanWarning(
            "recompilation",
            f"the argument `{path}` is a Python number: its type follows its value, and a new "
            f"type compiles the step again",
            leaf=path,
            fix="pass jnp.asarray(value, dtype), or make it static",
        )


_CHECKS: tuple[Callable[[PlanFacts], Iterator[PlanWarning]], ...] = (
    _involuntary,
    _replicated,
    _float32,
    _undeclared,
    _emulated,
    _gathered_again,
    _every_microbatch,
    _slow_axis,
    _padding,
    _recompilation,
)


def _grouped(
    collectives: Iterable[Collective], *, by_leaf: bool = True
) -> Iterator[list[Collective]]:
    groups: dict[tuple[object, ...], list[Collective]] = defaultdict(list)
    for found in collectives:
        key = (found.kind, found.axes, found.phase, found.leaf if by_leaf else "")
        groups[key].append(found)
    yield from groups.values()


def _over(found: Collective) -> str:
    return "+".join(f"`{axis}`" for axis in found.axes) or "unknown axes"


def _leaves_of(group: Sequence[Collective]) -> str:
    names = list(dict.fromkeys(c.leaf for c in group if c.leaf))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _seconds(facts: PlanFacts, found: Collective, wire_bytes: float) -> float | None:
    links = facts.links or {}
    rates = [links[axis].bandwidth for axis in found.axes if axis in links]
    return wire_bytes / min(rates) if rates and min(rates) else None
