"""A module with what several questions about it need: who calls, who reads, how often, when.

Each is computed once and kept, because every collective asks for most of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshwright.sharding.hlo import Instruction, Module
from meshwright.sharding.hlo_loops import (
    Call,
    callers_of,
    conditional_computations,
    executions,
    while_depth,
)
from meshwright.sharding.hlo_opcodes import COLLECTIVES, is_asynchronous

__all__ = ["Program"]

# What costs no time worth hiding a transfer behind.
_IDLE_OPCODES = """
parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id
add-dependency reshape opt-barrier optimization-barrier domain send recv
"""
_IDLE = frozenset(_IDLE_OPCODES.split())
_IDLE_TARGETS = frozenset(
    ("AllocateBuffer", "ConcatBitcast", "SliceId", "Sharding", "AsyncCollectiveStart")
)


@dataclass
class Program:
    """A module with what several questions about it need: callers, users, counts."""

    module: Module
    counts: Mapping[str, int | None] = field(init=False)
    depths: Mapping[str, int] = field(init=False)
    callers: Mapping[str, tuple[Call, ...]] = field(init=False)
    conditional: frozenset[str] = field(init=False)
    _users: dict[str, dict[str, list[Instruction]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = executions(self.module)
        self.depths = while_depth(self.module)
        self.callers = callers_of(self.module)
        self.conditional = conditional_computations(self.module)

    def operand(self, instruction: Instruction, name: str) -> Instruction:
        """An operand of an instruction, by name."""
        return self.module.computations[instruction.computation].instructions[name]

    def users(self, instruction: Instruction) -> list[Instruction]:
        """Who reads an instruction's result, in the same computation, in order."""
        computation = instruction.computation
        if computation not in self._users:
            found: dict[str, list[Instruction]] = {}
            for user in self.module.computations[computation].instructions.values():
                for name in dict.fromkeys(user.operands):
                    found.setdefault(name, []).append(user)
            self._users[computation] = found
        return self._users[computation].get(instruction.name, [])

    def done(self, start: Instruction) -> Instruction | None:
        """The ``-done`` of a ``-start`` (or of a send or recv), through any updates."""
        base = start.opcode.removesuffix("-start")
        for user in self.users(start):
            if user.opcode == f"{base}-done":
                return user
            if user.opcode == f"{base}-update":
                later = self.done(replace(user, opcode=f"{base}-start"))
                if later:
                    return later
        return None

    def launch(self, start: Instruction) -> Instruction:
        """What hands an asynchronous call its data: its start, or a later update of one without.

        jax 0.12's TPU compiler starts a sparse-core call early, empty, and gives it its operands
        in a ``call-update``.
        """
        base = start.opcode.removesuffix("-start")
        for user in () if start.operands else self.users(start):
            if user.opcode == f"{base}-update" and len(user.operands) > 1:
                return user
        return start

    def arguments(self, call: Instruction) -> tuple[str, ...]:
        """Names of the operands that a call's parameters stand for."""
        launch = self.launch(call)
        return launch.operands if launch is call else launch.operands[1:]

    def computes_between(self, start: Instruction, done: Instruction) -> bool | None:
        """Whether anything computes while an asynchronous pair runs; None without a schedule."""
        launch = self.launch(start)
        if self.module.attributes.get("is_scheduled") != "true":
            return None
        seen = False
        for i in self.module.computations[start.computation].instructions.values():
            if i.name == launch.name:
                seen = True
            elif i.name == done.name:
                return False
            elif seen and _computes(i):
                return True
        return None


def _computes(i: Instruction) -> bool:
    if i.opcode in _IDLE or is_asynchronous(i.opcode) or i.opcode in COLLECTIVES:
        return False
    if i.custom_call_target in _IDLE_TARGETS or i.name.startswith("async-collective-"):
        return False
    return i.opcode in ("while", "call", "conditional") or any(s.elements > 1 for s in i.shapes)
