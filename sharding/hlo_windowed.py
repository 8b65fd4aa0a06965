"""Windowed einsums: chains of permutes that implement an all-gather or a reduce-scatter.

For a matmul whose operand must be gathered, or whose result must be scattered, the partitioner
may emit a ring instead: multiply the shard at hand while the next one arrives (Wang et al. 2023,
"Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models"). On text it is a ``while`` whose body holds the permutes (``windowed_dot_general_body_ag``
or ``_rs``) with a permute before or after it, or, over few devices, the same unrolled.

A permute belongs to one if the traced operation it is named after is a contraction, which a
user's own permute never is. Those of one loop are one einsum, with the permutes that hand it its
first shard or take its last sum. Unrolled, those that pass on the same first shard are one
gather, and those that pass on sums of one contraction are one scatter. What fits none of this
stays a permute: the bytes it sends are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.sharding.hlo import Instruction
from meshwright.sharding.hlo_moves import Move
from meshwright.sharding.hlo_program import Program
from meshwright.sharding.planned import Kind

__all__ = ["Windowed", "find_windowed"]

_CONTRACTION = re.compile(r"(?:dot_general|ragged_dot_general|conv_general_dilated)$")
_BODY = re.compile(r"windowed_dot_general_body_(ag|rs)")
_HANDS_ON = frozenset(
    ("get-tuple-element", "bitcast", "copy", "reshape", "transpose", "copy-start", "copy-done")
    + ("collective-permute", "collective-permute-start", "collective-permute-done")
    + ("opt-barrier", "optimization-barrier")
)
_Place = tuple[str, str]  # computation and instruction


@dataclass(frozen=True)
class Windowed:
    """One windowed einsum.

    Attributes:
        kind: all-gather or reduce-scatter.
        moves: its permutes, those in its loop and those beside it.
        count: times a step that it runs as a whole.
        at: its loop, or its first permute where it is unrolled.
    """

    kind: Kind
    moves: tuple[Move, ...]
    count: int
    at: Instruction

    @property
    def first(self) -> Move:
        """A permute in the loop if there is one."""
        return max(self.moves, key=lambda move: (move.depth, move.count))


def find_windowed(
    program: Program, moves: Sequence[Move]
) -> tuple[tuple[Windowed, ...], tuple[Move, ...]]:
    """Separate the windowed einsums from all other moves.

    Returns:
        The einsums, and the moves that belong to none, in order.
    """
    permutes = [
        move
        for move in moves
        if move.kind == "collective-permute" and _CONTRACTION.search(move.instruction.op_name)
    ]
    found = [*_looped(program, permutes)]
    taken = {id(move) for einsum in found for move in einsum.moves}
    found += _unrolled(program, [move for move in permutes if id(move) not in taken])
    taken = {id(move) for einsum in found for move in einsum.moves}
    return tuple(found), tuple(move for move in moves if id(move) not in taken)


def _looped(program: Program, permutes: list[Move]) -> Iterator[Windowed]:
    loops: dict[_Place, tuple[Instruction, list[Move]]] = {}
    for move in permutes:
        loop = _loop_around(program, move.instruction)
        if loop is not None:
            loops.setdefault((loop.computation, loop.name), (loop, []))[1].append(move)
    kinds: dict[_Place, Kind] = {p: _kind(program, inside) for p, (_, inside) in loops.items()}
    for move in permutes:
        if _loop_around(program, move.instruction) is None:
            for place in _beside(program, move.instruction):
                if place in loops:
                    loops[place][1].append(move)
                    break
    for place, (loop, members) in loops.items():
        count = program.counts[loop.computation] or 1
        yield Windowed(kinds[place], tuple(members), count, loop)


def _loop_around(program: Program, i: Instruction) -> Instruction | None:
    for call in program.callers[i.computation]:
        if call.role == "body" and (
            _BODY.search(i.computation) or _CONTRACTION.search(call.instruction.op_name)
        ):
            return call.instruction
    return None


def _beside(program: Program, i: Instruction) -> Iterator[_Place]:
    """Loops that a permute hands its data to, then those whose result it passes on."""
    todo, seen = [i], set()
    while todo:
        at = todo.pop(0)
        for user in program.users(at):
            if user.name in seen:
                continue
            seen.add(user.name)
            if user.opcode == "while":
                yield user.computation, user.name
            elif user.opcode in _HANDS_ON or user.opcode == "tuple":
                todo.append(user)
    for source in _sources(program, i):
        if source.opcode == "while":
            yield source.computation, source.name


def _unrolled(program: Program, permutes: list[Move]) -> Iterator[Windowed]:
    gathers: dict[tuple[str, str, str], list[Move]] = {}
    sums: list[Move] = []
    for move in permutes:
        if _kind(program, [move]) == "reduce-scatter":
            sums.append(move)
            continue
        head = "+".join(sorted(s.name for s in _sources(program, move.instruction)))
        place = (move.instruction.computation, move.instruction.op_name, head)
        gathers.setdefault(place, []).append(move)
    rings: list[tuple[Kind, list[list[Move]]]] = [
        ("all-gather", list(gathers.values())),
        ("reduce-scatter", _joined(program, sums)),
    ]
    for kind, sets in rings:
        for members in sets:
            # Fewer than go round the ring: a reshard of something that a contraction made.
            if len(members) >= members[0].groups.participants - 1:
                at = members[0].instruction
                count = program.counts[at.computation] or 1
                yield Windowed(kind, tuple(members), count, at)


def _kind(program: Program, moves: list[Move]) -> Kind:
    """What permutes implement: sums go round in a reduce-scatter, data in an all-gather."""
    for move in moves:
        named = _BODY.search(move.instruction.computation)
        if named:
            return "all-gather" if named.group(1) == "ag" else "reduce-scatter"
    for move in moves:
        for source in _sources(program, move.instruction):
            same = source.op_name == move.instruction.op_name
            # The first round of an unrolled scatter sends the zeros that sums begin with.
            if same and (source.opcode == "broadcast" or _contracts(program, source)):
                return "reduce-scatter"
    return "all-gather"


def _contracts(program: Program, i: Instruction) -> bool:
    if i.opcode in ("add", "dot", "convolution"):
        return True
    return i.opcode == "fusion" and any(
        _contracts(program, inner)
        for name in i.called
        if name in program.module.computations and name != i.computation
        for inner in program.module.computations[name].instructions.values()
    )


def _sources(program: Program, i: Instruction) -> list[Instruction]:
    """What a permute sends, behind earlier permutes and what only hands data on."""
    todo, found, seen = [program.operand(i, name) for name in i.operands[:1]], [], set()
    while todo:
        at = todo.pop()
        if at.name in seen:
            continue
        seen.add(at.name)
        if at.opcode in _HANDS_ON and at.operands:
            todo.append(program.operand(at, at.operands[0]))
        else:
            found.append(at)
    return found


def _joined(program: Program, moves: list[Move]) -> list[list[Move]]:
    """Permutes of one size that data flows between through instructions of one contraction."""
    groups: list[list[Move]] = []
    places: list[set[_Place]] = []
    for move in moves:
        reach = _reach(program, move)
        members = [move]
        for n in reversed([n for n, place in enumerate(places) if place & reach]):
            members = groups.pop(n) + members
            reach |= places.pop(n)
        groups.append(members)
        places.append(reach)
    return groups


def _reach(program: Program, move: Move) -> set[_Place]:
    """Instructions as large as the permute around it, of its contraction or handing data on."""
    start, bytes_ = move.instruction, move.parts[0].operand.bytes
    todo, found = [start], set[_Place]()
    while todo:
        at = todo.pop()
        key = (at.computation, at.name)
        if key in found:
            continue
        found.add(key)
        for other in [*(program.operand(at, o) for o in at.operands), *program.users(at)]:
            if other.opcode in ("parameter", "constant", "while") or other.bytes < bytes_:
                continue
            unnamed = not other.op_name and other.opcode in _HANDS_ON
            if other.op_name == start.op_name or unnamed:
                todo.append(other)
    return found
