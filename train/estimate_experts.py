"""What layers of experts put on the wire, by closed form.

**Tokens** cross the axes that experts are dealt to, and come home: four times
(`meshwright.sharding.bounds.expert_layer_bytes`), and once more where the layer is recomputed: what
came home is not, as nobody reads it. Dropless tokens are gathered and scattered instead, or go in
ragged messages: `meshwright.train.expert_exchange`.

**Rows** that are split along their length are summed over their parts, for losses and loads; and
with a capacity their tokens are gathered, and sums of them scattered, as each part has some of the
places: `meshwright.train.row_parts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import NamedTuple

from meshwright.sharding.expert_layout import dropless_way, places_of_part
from meshwright.sharding.planned import Kind, Phase
from meshwright.train.estimate_placement import Axes, Placement

__all__ = ["ExpertMove", "expert_moves"]

_PHASES: tuple[Phase, ...] = ("forward", "backward")
_F32 = 4


class ExpertMove(NamedTuple):
    """A collective of a layer of experts.

    Attributes:
        kind, axes, phase: what it is.
        elements: of its full buffer, a row of a device, layer and microbatch.
        leaf: what moves.
        itemsize: bytes of an element.
    """

    kind: Kind
    axes: Axes
    phase: Phase
    elements: float
    leaf: str
    itemsize: int


def expert_moves(placement: Placement, itemsize: int, hardware: str | None) -> Iterator[ExpertMove]:
    """What each layer of experts sends; nothing in a model without.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        itemsize: bytes of an element of the compute dtype.
        hardware: ``tpu`` or ``gpu``; None for CPUs, which have no ragged messages.
    """
    if not placement.config.model.experts.count:
        return
    yield from _row_parts(placement, itemsize)
    if placement.experts:
        with_capacity = placement.config.model.experts.capacity_factor is not None
        yield from (
            _buffers(placement, itemsize)
            if with_capacity
            else _dropless(placement, itemsize, hardware)
        )


def _buffers(placement: Placement, itemsize: int) -> Iterator[ExpertMove]:
    """Places of fixed number, all to all."""
    model, axes = placement.config.model, placement.experts
    slots = model.experts.count * _places(placement)

    def move(phase: Phase, elements: float, leaf: str, width: int = itemsize) -> ExpertMove:
        return ExpertMove("all-to-all", axes, phase, elements, leaf, width)

    for phase in _PHASES:
        yield move(phase, 2 * slots * model.embed, "tokens of experts")
    yield move("forward", slots, "gates")
    yield move("backward", slots, "gates", _F32)
    if model.remat != "none":
        yield move("backward", slots * (model.embed + 1), "tokens of experts again")


def _dropless(placement: Placement, itemsize: int, hardware: str | None) -> Iterator[ExpertMove]:
    """All tokens to all devices or, ragged and counted by what an even router sends, to some."""
    model, axes = placement.config.model, placement.experts
    settings, parts, again = model.experts, placement.parts(axes), model.remat != "none"
    way = dropless_way(settings.count, settings.top_k, parts) if hardware else "gather"
    gathered = float(parts * placement.length * model.embed)
    ids = parts * placement.length * settings.top_k
    there: Kind = "all-gather"
    home: Kind = "reduce-scatter"
    if way == "ragged":
        own = settings.count // parts
        there = home = "all-to-all"
        gathered *= 1 - comb(settings.count - own, settings.top_k) / comb(
            settings.count, settings.top_k
        )
    for phase in _PHASES + ("backward",) * again:
        yield ExpertMove(there, axes, phase, gathered, "tokens of experts", itemsize)
    for phase in _PHASES:
        yield ExpertMove(home, axes, phase, gathered, "sums of experts", itemsize)
    for phase in ("forward",) + ("backward",) * again:
        yield ExpertMove("all-gather", axes, phase, 2 * ids, "ids and gates", _F32)
    yield ExpertMove("reduce-scatter", axes, "backward", ids, "gates", _F32)


def _row_parts(placement: Placement, itemsize: int) -> Iterator[ExpertMove]:
    """Sums over the parts of rows and, with a capacity, whole rows for the places of a part."""
    model, axes = placement.config.model, placement.activations["length"]
    if placement.parts(axes) == 1:
        return
    settings, again = model.experts, model.remat != "none"
    length, drops = placement.config.seq_len, settings.capacity_factor is not None
    twice: tuple[Phase, ...] = ("backward",) * again
    # Where nothing is dropped, nobody reads the forward pass's that the backward pass makes again.
    for phase in (*_PHASES[1 if again and not drops else 0 :], *twice):
        sums = 2 * settings.count + 1
        yield ExpertMove("all-reduce", axes, phase, sums, "sums over rows", _F32)
    if not drops:
        return
    whole, choices = length * model.embed, length * settings.top_k
    for phase in (*_PHASES, *twice):
        yield ExpertMove("all-gather", axes, phase, whole, "rows for experts", itemsize)
    for phase in _PHASES:
        yield ExpertMove("reduce-scatter", axes, phase, whole, "sums of experts", itemsize)
    # Dealt experts find their places again in the backward pass, others keep them.
    found: tuple[Phase, ...] = ("backward",) * bool(again or placement.experts)
    for phase in (*_PHASES[:1], *found):
        yield ExpertMove("all-gather", axes, phase, choices, "choices", _F32)
    for phase in (*_PHASES[:1], *twice):
        yield ExpertMove("all-gather", axes, phase, choices, "gates", itemsize)
    width = _F32 if placement.experts else itemsize
    yield ExpertMove("reduce-scatter", axes, "backward", choices, "gates", width)


def _places(placement: Placement) -> int:
    """Places that an expert's buffer has for a row, on the device of a part of it."""
    capacity = placement.config.model.experts.capacity(placement.config.seq_len)
    assert capacity is not None
    return places_of_part(capacity, placement.parts(placement.activations["length"]))
