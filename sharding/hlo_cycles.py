"""Cycles the TPU compiler expects a program to take, summed over what a step really runs.

The TPU compiler chooses tiles by an estimate of cycles, and leaves it beside each fusion and
many plain instructions as ``estimated_cycles``. Summed by text it is ten times too low for a
scan over layers, so each is taken as often as its computation runs. What it says nothing of
(custom calls such as fused attention, collectives, copies between memories) is listed, for
other models to fill in; sentinels, the largest 64-bit integer, mean that it gave up.

An estimate is that of a whole device: on chips with two cores that act as one (v4, v5p), of both.
Estimates include the time to stream operands from device memory, so they are compute and memory
together. The compiler's other figure, ``optimal_seconds``, comes out negative for whole steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.sharding.hlo import Instruction, Module
from meshwright.sharding.hlo_loops import executions
from meshwright.sharding.hlo_traffic import FREE_OPCODES, FREE_TARGETS, scheduled_computations

__all__ = ["CycleCount", "cycles_of"]

_ESTIMATE = re.compile(r'"estimated_cycles":"?(\d+)')
_SENTINEL = 2**62  # no estimate is in earnest a hundred years


@dataclass(frozen=True)
class CycleCount:
    """What a program is estimated to take.

    Attributes:
        cycles: sum over everything a step executes that has an estimate.
        estimated: executions with an estimate.
        sentinels: executions whose estimate means none.
        without: executions without an estimate by opcode, or by name for custom calls; scalars
            and what does no work are left out.
        unread: computations in loops with no known trip count, counted once.
    """

    cycles: int
    estimated: int
    sentinels: int
    without: Mapping[str, int]
    unread: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the compiler gave estimates at all; it does on TPU."""
        return self.estimated > 0

    def seconds(self, clock_hz: float) -> float:
        """Seconds at a clock, `meshwright.sharding.chips.Chip.clock_hz`."""
        return self.cycles / clock_hz


def cycles_of(module: Module) -> CycleCount:
    """Sum the compiler's estimates over a step; see the module for what they hold.

    Args:
        module: from `meshwright.sharding.hlo.parse_module`.
    """
    counts = executions(module)
    cycles = estimated = sentinels = 0
    without: dict[str, int] = {}
    unread = []
    for name in sorted(scheduled_computations(module)):
        times = counts[name]
        if times is None:
            unread.append(f"{name}: in a loop without a known trip count, counted once")
            times = 1
        for i in module.computations[name].instructions.values():
            found = _ESTIMATE.search(i.attributes.get("backend_config", ""))
            if found is None:
                if _works(i):
                    key = _kind(module, i)
                    without[key] = without.get(key, 0) + times
            elif int(found.group(1)) >= _SENTINEL:
                sentinels += times
            else:
                cycles += times * int(found.group(1))
                estimated += times
    return CycleCount(cycles, estimated, sentinels, dict(sorted(without.items())), tuple(unread))


def _works(i: Instruction) -> bool:
    if i.opcode in FREE_OPCODES or i.opcode.endswith(("-done", "-update")):
        return False
    if i.custom_call_target in FREE_TARGETS:
        return False
    return any(shape.elements > 1 for shape in i.shapes)


def _kind(module: Module, i: Instruction) -> str:
    """An opcode, a custom call's kernel (by the instruction's name) or its target."""
    if i.opcode == "fusion" and i.called and i.called[0] in module.computations:
        root = module.computations[i.called[0]].root  # what begins or ends a collective
        return root.custom_call_target or i.opcode
    if i.opcode != "custom-call":
        return i.opcode
    name = re.sub(r"[.\d]+$", "", i.name)
    return i.custom_call_target if name in ("custom-call", "") else name
