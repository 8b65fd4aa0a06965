"""Every way to combine parallelisms, as cases to compare with one device.

A mesh axis is used in one of a few *ways*: the data axis for plain data parallelism or a ZeRO
stage, the tensor axis with or without sequence parallelism, the context axis with one of three
kinds of attention, the stage axis with one of four schedules. A composition is a choice of axes
and a way for each, so *all* of them can be listed, and a new way is in every list as soon as it is
in `WAYS`. What a composition leaves open (microbatches, how they are summed, the order of tokens,
what is recomputed; the schedule where there are three axes) is dealt round over the list, so that
neighbours differ; each setting meets each way many times over.

The tests hold single axes and pairs in the default run, with one schedule for each pair, and the
rest on request.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.train.parity import Case

__all__ = ["EXPERT_WAYS", "WAYS", "Composition", "Ways", "compositions"]

Ways = dict[str, dict[str, dict[str, Any]]]

WAYS: Ways = {
    "stage": {
        "1f1b": {"schedule": "1f1b"},
        "gpipe": {"schedule": "gpipe"},
        "interleaved": {"schedule": "interleaved"},
        "v-shape": {"schedule": "v-shape"},
    },
    "data": {"data": {}, "zero1": {"zero": 1}, "zero2": {"zero": 2}},
    "fsdp": {"fsdp": {}},
    "context": {
        "context-ring": {"context": "ring"},
        "context-gather": {"context": "gather"},
        "context-ulysses": {"context": "ulysses"},
    },
    "tensor": {"tensor": {}, "sequence": {"sequence": True}},
}
"""Axis → name of a way to use it → the fields of a `Case` that say so."""

EXPERT_WAYS: Ways = {**WAYS, "expert": {"expert": {}}}
"""The same for models with experts."""

_DEVICES = 8
_ORDERS = ("zigzag", "striped", "contiguous")
_REMAT = ("none", "full", "dots", "save-attention")
_SUMS = (
    {"grad_accum": 1},
    {"grad_accum": 2},
    {"grad_accum": 2, "accumulate": "sharded"},
)


@dataclass(frozen=True)
class Composition:
    """Parallelisms together.

    Attributes:
        ways: their names, in the order of the mesh's axes.
        case: a run of them on eight devices.
    """

    ways: tuple[str, ...]
    case: Case

    def __str__(self) -> str:
        return " ".join(self.ways)


def compositions(count: int, among: Ways = WAYS) -> Iterator[Composition]:
    """All compositions of so many axes, on 8 devices.

    Stages are one of at most three axes: there are eight devices.

    Args:
        count: of axes.
        among: `WAYS` or `EXPERT_WAYS`.

    >>> [str(found) for found in compositions(4)][:2]
    ['data fsdp context-ring tensor', 'data fsdp context-ring sequence']
    >>> [len(list(compositions(count))) for count in (1, 2, 3, 4)]
    [13, 65, 68, 18]
    >>> [str(found) for found in compositions(2, EXPERT_WAYS)][-2:]
    ['tensor expert', 'sequence expert']
    """
    number = 0
    for axes in itertools.combinations(among, count):
        if "stage" in axes and count > 3:
            continue
        dealt = count > 2 and "stage" in axes
        options = [list(among[axis])[: 1 if dealt and axis == "stage" else None] for axis in axes]
        for chosen in itertools.product(*options):
            ways = chosen
            if dealt:
                ways = (list(among["stage"])[number % len(among["stage"])], *chosen[1:])
            fields: dict[str, Any] = {}
            for axis, way in zip(axes, ways, strict=True):
                fields |= among[axis][way]
            fields |= _SUMS[number % len(_SUMS)]
            fields["remat"] = _REMAT[number % len(_REMAT)]
            if "context" in axes:
                fields["order"] = _ORDERS[number // 2 % len(_ORDERS)]
            if "stage" in axes:
                fields["grad_accum"] = 4
            sizes = _sizes(count, number, axes)
            mesh = ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
            yield Composition(ways, Case(mesh, **fields))
            number += 1


def _sizes(count: int, number: int, axes: Sequence[str]) -> list[int]:
    """Axis sizes that multiply to the devices, none of them one where that is possible; two stages,
    as more would ask for deep models."""
    if axes == ("stage",):
        return [2]
    if count > 3:
        return [2, 2, 2, *[1] * (count - 3)]
    sizes = [2] * count
    first = int("stage" in axes)
    sizes[first + number % (count - first)] *= _DEVICES // 2**count
    return sizes
