"""Every way to combine parallelisms, as cases to compare with one device.

A mesh axis is used in one of a few *ways*: the data axis for plain data parallelism or a ZeRO
stage, the tensor axis with or without sequence parallelism, the context axis with one of three
kinds of attention, the stage axis with one of four schedules. A composition is a choice of axes
and a way for each, so *all* of them can be listed, and a new way is in every list as soon as it is
in `WAYS`. What a composition leaves open (microbatches, how they are summed, the order of tokens,
what is recomputed; the schedule where there are three axes; every way where there are four) is
dealt round over the list, so that neighbours differ; each setting meets each way many times over.

The tests hold single axes and pairs in the default run, with one schedule for each pair, and the
rest on request. Up to three axes take eight devices, four take sixteen, so that none has size one.
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
_ROWS_OVER_EIGHT = {"data", "fsdp", "expert"}
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
    """All compositions of so many axes, on 8 devices; of four, on 16.

    Args:
        count: of axes, at most 4.
        among: `WAYS` or `EXPERT_WAYS`.

    >>> [str(found) for found in compositions(4)][:2]
    ['1f1b zero1 fsdp context-ring', 'gpipe zero2 fsdp context-gather']
    >>> [len(list(compositions(count))) for count in (1, 2, 3, 4)]
    [13, 65, 68, 19]
    >>> [str(found) for found in compositions(2, EXPERT_WAYS)][-2:]
    ['tensor expert', 'sequence expert']
    """
    number = 0
    for axes in itertools.combinations(among, count):
        for ways in _ways(axes, number, among):
            fields: dict[str, Any] = {}
            for axis, way in zip(axes, ways, strict=True):
                fields |= among[axis][way]
            fields |= _SUMS[number % len(_SUMS)]
            # Schedules are dealt round by fours too: without the shift each would have one policy.
            fields["remat"] = _REMAT[(number + number // 4) % len(_REMAT)]
            if "context" in axes:
                fields["order"] = _ORDERS[number // 2 % len(_ORDERS)]
            if "stage" in axes:
                fields["grad_accum"] = 2 if set(axes) >= _ROWS_OVER_EIGHT else 4  # of 16 rows
            sizes = _sizes(count, number, axes)
            mesh = ",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
            yield Composition(ways, Case(mesh, **fields))
            number += 1


def _ways(axes: Sequence[str], number: int, among: Ways) -> list[tuple[str, ...]]:
    """The ways to use these axes that are listed: all of them for one and two axes; the schedule
    dealt round for three; for four, as many as the axis with the most has, so that each is there.

    Args:
        number: of the first of them.
    """
    options = [list(among[axis]) for axis in axes]
    first, *rest = options
    if len(axes) > 3:
        most = max(map(len, options))
        return [
            tuple(names[(number + row + at) % len(names)] for at, names in enumerate(options))
            for row in range(most)
        ]
    if len(axes) < 3 or axes[0] != "stage":
        return list(itertools.product(*options))
    others = enumerate(itertools.product(*rest), number)
    return [(first[at % len(first)], *other) for at, other in others]


def _sizes(count: int, number: int, axes: Sequence[str]) -> list[int]:
    """Axis sizes that multiply to the devices, none of them one where that is possible; two stages,
    as more would ask for deep models."""
    sizes = [2] * count
    if axes == ("stage",) or count > 3:
        return sizes
    first = int("stage" in axes)
    sizes[first + number % (count - first)] *= _DEVICES // 2**count
    return sizes
