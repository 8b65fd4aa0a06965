"""All-reduces of which each device keeps its own slice alone: reduce-scatters not yet made.

The partitioner writes a sum that is then split as an all-reduce and a slice by partition. TPU and
GPU compilers have a pass that turns the two into a reduce-scatter; XLA for CPUs has none, so a
program for simulated devices says all-reduce where the hardware it stands for would scatter.
`scattered_parts` finds these, by proof and not by the look of it: every path from the sum must
end in a ``dynamic-slice`` whose offset, worked out for each partition, gives the members of a
group different slices that together cover the array.

What is followed on the way are operations that move values and change none of them (copies,
conversions, transposes, and into fusions and calls). The offset may be computed where the slice
is, or before a loop that carries it unchanged. Anything else answers no, which reports what was
emitted. Recognising ``dynamic-slice`` beside ``partition-id`` by name was rejected: a step that
slices a sum by a loop counter would have passed as well.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence

from meshwright.sharding.hlo import HloSyntaxError, Instruction
from meshwright.sharding.hlo_groups import Groups, parse_groups
from meshwright.sharding.hlo_moves import Move
from meshwright.sharding.hlo_program import Program

__all__ = ["scattered_parts"]

_VALUE_KEPT = frozenset(["bitcast", "bitcast-convert", "convert", "copy", "reshape", "transpose"])
_SAME_INTEGER = frozenset(["bitcast", "convert", "copy", "reshape"])
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "and": operator.and_,
    "divide": operator.floordiv,
    "maximum": max,
    "minimum": min,
    "multiply": operator.mul,
    "remainder": operator.mod,
    "subtract": operator.sub,
}
_Row = tuple[int, ...]  # a number, or the rows of a table


def scattered_parts(program: Program, move: Move) -> frozenset[int]:
    """Which arrays of an all-reduce are kept in slices alone, one for each member of a group.

    Args:
        program: compiled for simulated devices.
        move: one of its all-reduces; anything else has none.

    Returns:
        Positions in ``move.parts``.
    """
    if move.kind != "all-reduce":
        return frozenset()
    reader = _Reader(program, move)
    if not reader.groups:
        return frozenset()
    alone = len(move.instruction.shapes) == 1
    if alone:
        return frozenset((0,)) if reader.only_sliced(move.instruction) else frozenset()
    return frozenset(
        index for index in range(len(move.parts)) if reader.only_sliced(move.instruction, index)
    )


class _Reader:
    """Follows one sum forwards to its uses, and their offsets backwards to the partition."""

    def __init__(self, program: Program, move: Move) -> None:
        self.program = program
        self.partitions = program.module.partitions
        self.groups: Groups = ()
        try:
            text = move.instruction.attributes.get("replica_groups", "")
            found = parse_groups(text, self.partitions)
        except HloSyntaxError:
            found = ()
        sizes = {len(group) for group in found}
        self.members = max(sizes, default=0)
        if len(sizes) == 1 and self.members > 1:
            self.groups = found
        # By name: an instruction's attributes make it unhashable.
        self.offset = functools.lru_cache(maxsize=None)(self._offset)

    def only_sliced(self, i: Instruction, index: int | None = None) -> bool:
        """Whether a value, or an element of a tuple, is read by slices of it alone."""
        users = self.program.users(i)
        if index is not None:
            users = [u for u in users if u.opcode != "get-tuple-element" or _index(u) == index]
            return bool(users) and all(
                u.opcode == "get-tuple-element" and self.only_sliced(u) for u in users
            )
        if i.is_root:
            calls = [c for c in self.program.callers[i.computation] if c.role == "call"]
            return bool(calls) and all(self.only_sliced(call.instruction) for call in calls)
        return bool(users) and all(self.slices(user, i) for user in users)

    def slices(self, user: Instruction, value: Instruction) -> bool:
        """Whether a reader of a value takes a slice by partition, itself or further on."""
        if user.opcode in _VALUE_KEPT:
            return self.only_sliced(user)
        if user.opcode in ("fusion", "call") and len(user.called) == 1:
            inner = self.program.module.computations[user.called[0]]
            given = [n for n, name in enumerate(user.operands) if name == value.name]
            return all(self.only_sliced(inner.parameters[number]) for number in given)
        if user.opcode != "dynamic-slice" or value.name in user.operands[1:]:
            return False
        small, large = user.shapes[0], value.shapes[0]
        cut = [n for n, (a, b) in enumerate(zip(small.dims, large.dims, strict=True)) if a != b]
        if len(cut) != 1 or small.dims[cut[0]] * self.members != large.dims[cut[0]]:
            return False
        starts = self.offset(user.computation, user.operands[1 + cut[0]])
        wanted = list(range(0, large.dims[cut[0]], small.dims[cut[0]]))
        return starts is not None and all(
            sorted(starts[member][0] for member in group) == wanted for group in self.groups
        )

    def _offset(self, computation: str, name: str) -> Sequence[_Row] | None:
        """What an integer is on each partition; None where the text does not tell."""
        i = self.program.module.computations[computation].instructions[name]
        if not i.shapes or i.shapes[0].dtype[0] not in "su":
            return None

        def of(operand: str) -> Sequence[_Row] | None:
            return self.offset(computation, operand)

        match i.opcode:
            case "partition-id":
                return [(number,) for number in range(self.partitions)]
            case "constant":
                numbers = tuple(int(number) for number in re.findall(r"-?\d+", i.literal))
                full = len(numbers) == i.shapes[0].elements  # long tables are printed as {...}
                return [numbers] * self.partitions if full else None
            case "parameter":
                return self._given(i)
            case "get-tuple-element":
                return self._carried(i)
            case "fusion" | "call" if len(i.called) == 1:
                root = self.program.module.computations[i.called[0]].root
                return self.offset(root.computation, root.name)
            case "dynamic-slice" if len(i.operands) == 2 and i.shapes[0].elements == 1:
                table, at = of(i.operands[0]), of(i.operands[1])
                if table is None or at is None:
                    return None
                last = len(table[0]) - 1
                return [(row[min(max(n[0], 0), last)],) for row, n in zip(table, at, strict=True)]
            case "clamp":
                low, value, high = (of(operand) for operand in i.operands)
                if low is None or value is None or high is None:
                    return None
                rows = zip(low, value, high, strict=True)
                return [(min(max(v[0], a[0]), b[0]),) for a, v, b in rows]
            case opcode if opcode in _SAME_INTEGER:
                return of(i.operands[0])
            case opcode if opcode in _ARITHMETIC and i.shapes[0].elements == 1:
                left, right = of(i.operands[0]), of(i.operands[1])
                if left is None or right is None:
                    return None
                if opcode in ("divide", "remainder") and any(not b[0] for b in right):
                    return None
                compute = _ARITHMETIC[opcode]
                return [(compute(a[0], b[0]),) for a, b in zip(left, right, strict=True)]
            case _:
                return None

    def _given(self, parameter: Instruction) -> Sequence[_Row] | None:
        """The argument that a parameter of a fusion or call stands for, if all callers agree."""
        calls = self.program.callers[parameter.computation]
        found = []
        for call in calls:
            arguments = self.program.arguments(call.instruction)
            number = int(parameter.literal) if parameter.literal.isdigit() else len(arguments)
            if call.role != "call" or number >= len(arguments):
                return None
            at = call.instruction.computation
            found.append(self.offset(at, arguments[number]))
        return found[0] if found and all(one == found[0] for one in found) else None

    def _carried(self, element: Instruction) -> Sequence[_Row] | None:
        """An element of what a loop carries, where each round hands it on as it came."""
        whole = self.program.operand(element, element.operands[0])
        loops = [c for c in self.program.callers[element.computation] if c.role == "body"]
        if whole.opcode != "parameter" or len(loops) != 1:
            return None
        index, body = _index(element), self.program.module.computations[element.computation]
        start = self.program.operand(loops[0].instruction, loops[0].instruction.operands[0])
        if body.root.opcode != "tuple" or start.opcode != "tuple":
            return None
        after = body.instructions[body.root.operands[index]]
        same = after.opcode == "get-tuple-element" and after.operands == (whole.name,)
        if not same or _index(after) != index:
            return None
        return self.offset(start.computation, start.operands[index])


def _index(element: Instruction) -> int:
    return int(element.attributes.get("index", "0"))
