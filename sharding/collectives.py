"""The collectives of a compiled step: what each implements, how often, how many bytes, and whose.

`collectives_of` turns the moves found in compiled text (`hlo_moves`) into
`meshwright.sharding.planned.Collective`: counted over the step, mapped to mesh axes, phases, source
lines and leaves. Bytes are those of the shapes in the text, without tile padding: S and the
bytes a device sends over a ring, ρS for an all-gather, reduce-scatter or all-to-all, 2ρS for an
all-reduce and S for a permute, ρ = (n-1)/n (Thakur, Rabenseifner, Gropp 2005, "Optimization of
Collective Communication Operations in MPICH").

The permutes of a windowed einsum are reported as the all-gather or reduce-scatter that they
implement, with the bytes that the permutes really send: the two differ, because the compiler
rotates the last shard on although nobody needs it. What the compiler turned into something
dearer, such as a reduce-scatter into an all-reduce, is reported as what moves; but of a program
for simulated devices, which stands for one of hardware whose compilers have the pass that XLA for
CPUs lacks, a sum that is kept in slices alone is the reduce-scatter it becomes (`hlo_scattered`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.sharding.hlo import Instruction, Module, Shape
from meshwright.sharding.hlo_moves import Move, Part, scan_moves
from meshwright.sharding.hlo_program import Program
from meshwright.sharding.hlo_scattered import scattered_parts
from meshwright.sharding.hlo_windowed import Windowed, find_windowed
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective, Kind, Phase

__all__ = ["CollectiveList", "LeafOf", "collectives_of", "phase_of", "ring_bytes"]

LeafOf = Callable[[Instruction, Shape], str]
_NEARBY = 400  # instructions looked through for the origin of one that has no name


@dataclass(frozen=True)
class CollectiveList:
    """All collectives of a program and, in sentences, what could not be read or is an estimate."""

    collectives: tuple[Collective, ...]
    unread: tuple[str, ...] = ()


def ring_bytes(kind: Kind, full_bytes: int, participants: int) -> int:
    """Bytes one device sends for a collective on a full buffer of S bytes.

    >>> ring_bytes("all-reduce", 1024, 4), ring_bytes("all-gather", 1024, 4)
    (1536, 768)
    """
    if participants < 2:
        return 0
    if kind in ("collective-permute", "collective-broadcast"):
        return full_bytes
    times = 2 if kind == "all-reduce" else 1
    return times * full_bytes * (participants - 1) // participants


def phase_of(op_name: str) -> Phase:
    """Forward, backward (recomputation included) or update, from a traced operation's name.

    >>> phase_of("jit(f)/transpose(jvp())/dot_general"), phase_of("jit(f)/jvp()/dot_general")
    ('backward', 'forward')
    """
    if "transpose(" in op_name or "rematted_computation" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def collectives_of(
    module: Module,
    mesh: MeshSpec,
    *,
    slices: int = 1,
    leaf_of: LeafOf | None = None,
    simulated: bool = False,
) -> CollectiveList:
    """List every collective of a compiled program.

    Args:
        module: from `parse_module`.
        mesh: the mesh it was compiled for, filled; its flat order is jit's device assignment.
        slices: TPU slices the mesh lies over.
        leaf_of: names the parameter or activation that one array of a collective is, given the
            instruction and the array's full shape; combined collectives are split by it.
        simulated: the program is for CPU devices that stand for hardware: all-reduces kept in
            slices alone are reduce-scatters, with their wire bytes.

    Raises:
        MeshError: the mesh cannot be cut along the slices.
    """
    program = Program(module)
    scan = scan_moves(program, mesh, slices=slices)
    windowed, rest = find_windowed(program, scan.moves)
    found: list[tuple[Instruction, Collective]] = []
    for move in rest:
        scattered = scattered_parts(program, move) if simulated else frozenset()
        found += _of_move(program, move, leaf_of, scattered)
    for einsum in windowed:
        found.append(_of_windowed(program, einsum, leaf_of))
    order = {name: n for n, name in enumerate(module.computations)}
    found.sort(key=lambda pair: order[pair[0].computation])
    return CollectiveList(tuple(collective for _, collective in found), scan.unread)


def _of_move(
    program: Program, move: Move, leaf_of: LeafOf | None, scattered: frozenset[int]
) -> list[tuple[Instruction, Collective]]:
    """One collective, or one for each leaf, phase and kind among the arrays that were combined."""
    by_owner: dict[tuple[str, Phase, Kind], list[tuple[Part, Instruction]]] = {}
    for number, part in _pieces(program, move):
        origin = _origin(program, move, part)
        leaf = leaf_of(move.instruction, part.full) if leaf_of else ""
        phase = _phase(program, move.instruction, origin)
        kind = "reduce-scatter" if number in scattered else move.kind
        by_owner.setdefault((leaf, phase, kind), []).append((part, origin))
    found = []
    for (leaf, phase, kind), members in by_owner.items():
        largest, origin = max(members, key=lambda member: member[0].full.bytes)
        full = sum(part.full.bytes for part, _ in members)
        n = move.groups.participants
        collective = Collective(
            kind=kind,
            axes=move.groups.axes,
            count=move.count,
            bytes=full * move.count,
            wire_bytes=_sent(move, kind, full * move.count),
            phase=phase,
            overlaps=move.overlaps,
            source=program.module.source_of(origin),
            leaf=leaf,
            participants=n,
            dtype=largest.full.dtype,
            emitted=move.emitted,
            partial=move.groups.partial,
            loop_depth=move.depth,
            operation=origin.op_name,
        )
        found.append((move.instruction, collective))
    return found


def _sent(move: Move, kind: Kind, size_bytes: int) -> int:
    """Bytes that a device sends; the mean over devices of a permute in which some do not."""
    sent = ring_bytes(kind, size_bytes, move.groups.participants)
    return round(sent * move.groups.senders)


def _pieces(program: Program, move: Move) -> list[tuple[int, Part]]:
    """The arrays of a move, each with the number of its part.

    Those that were flattened and concatenated first are taken apart.
    """
    found = []
    for number, part in enumerate(move.parts):
        joined = _concatenated(program, program.operand(move.instruction, part.name))
        if part.operand != part.result or sum(i.bytes for i in joined) != part.operand.bytes:
            found.append((number, part))
            continue
        found += [(number, Part(i.shapes[0], i.shapes[0], i.name, i.shapes[0])) for i in joined]
    return found


def _concatenated(program: Program, i: Instruction) -> list[Instruction]:
    """What an instruction concatenates, itself or in its fusion; empty if it does not."""
    if i.opcode == "fusion" and len(i.called) == 1:
        inner = program.module.computations.get(i.called[0])
        root = inner.root if inner else None
        if inner is None or root is None or root.opcode != "concatenate":
            return []
        parameters = [inner.instructions[name] for name in root.operands]
        if any(p.opcode != "parameter" or not p.literal.isdigit() for p in parameters):
            return []
        numbers = [int(p.literal) for p in parameters]
        if max(numbers) >= len(i.operands):
            return []
        return [_unwrapped(program, program.operand(i, i.operands[n])) for n in numbers]
    if i.opcode == "concatenate":
        return [_unwrapped(program, program.operand(i, name)) for name in i.operands]
    return []


def _unwrapped(program: Program, i: Instruction) -> Instruction:
    """An array before it was flattened, if only its shape changed."""
    while i.opcode in ("bitcast", "reshape") and len(i.operands) == 1:
        before = program.operand(i, i.operands[0])
        if len(before.shapes) != 1 or before.bytes != i.bytes:
            break
        i = before
    return i


def _of_windowed(
    program: Program, einsum: Windowed, leaf_of: LeafOf | None
) -> tuple[Instruction, Collective]:
    move = einsum.first
    n = move.groups.participants
    shard = move.parts[0].operand
    full = replace(shard, dims=(n, *shard.dims))
    origin = _origin(program, move, move.parts[0])
    return einsum.at, Collective(
        kind=einsum.kind,
        axes=move.groups.axes,
        count=einsum.count,
        bytes=full.bytes * einsum.count,
        wire_bytes=sum(m.count * sum(p.operand.bytes for p in m.parts) for m in einsum.moves),
        phase=_phase(program, einsum.at, origin),
        overlaps=True,
        source=program.module.source_of(origin),
        leaf=leaf_of(move.instruction, full) if leaf_of else "",
        participants=n,
        dtype=shard.dtype,
        emitted="windowed einsum",
        partial=move.groups.partial,
        loop_depth=program.depths[einsum.at.computation],
        operation=origin.op_name,
    )


def _origin(program: Program, move: Move, part: Part) -> Instruction:
    """The instruction whose metadata tells where a part comes from.

    A combined reduction carries the name of one of its parts, if any; each part's own producer
    is the better witness. Other instructions are their own, or a fusion around them. Those that
    are named after no operation (jax 0.12 names the gather of an argument after the argument)
    borrow the name of what made their operand, then of what reads their result.
    """
    own = move.instruction
    if not (move.kind in ("all-reduce", "reduce-scatter") and len(move.parts) > 1):
        around = [c.instruction for c in program.callers[own.computation] if c.role == "call"]
        for candidate in (own, *around):
            if _is_traced(candidate):
                return candidate
    instructions = program.module.computations[own.computation].instructions
    # The pieces of a concatenation stand in the computation of the move, or in no other.
    start = instructions.get(part.name) or program.operand(own, own.operands[0])
    if found := _nearest(program, start, _producers):
        return found
    return own if _is_traced(own) else _nearest(program, own, _readers) or own


def _is_traced(i: Instruction) -> bool:
    """Whether it is named after an operation, not after an argument or not at all."""
    return "jit(" in i.op_name and i.opcode != "parameter"


def _phase(program: Program, at: Instruction, origin: Instruction) -> Phase:
    """Of the origin's name; of the loops around it where that name does not tell."""
    phase = phase_of(origin.op_name)
    seen = set()
    while phase == "update" and at.computation not in seen:
        seen.add(at.computation)
        calls = program.callers[at.computation]
        if not calls:
            break
        at = calls[0].instruction
        phase = phase_of(at.op_name) if calls[0].role == "body" else phase
    return phase


def _nearest(
    program: Program,
    start: Instruction,
    step: Callable[[Program, Instruction], list[Instruction]],
) -> Instruction | None:
    todo, seen = [start], {(start.computation, start.name)}
    for at in todo:
        if _is_traced(at):
            return at
        others = step(program, at) if len(todo) < _NEARBY else []
        for other in sorted(others, key=lambda i: -i.bytes):
            key = (other.computation, other.name)
            if key not in seen:
                seen.add(key)
                todo.append(other)
    return None


def _producers(program: Program, i: Instruction) -> list[Instruction]:
    """What an instruction's value was made by, also in the caller or the round of a loop before."""
    if i.opcode == "parameter":
        number = int(i.literal) if i.literal.isdigit() else 0
        calls = [c.instruction for c in program.callers[i.computation] if c.role == "call"]
        given = [(call, program.arguments(call)) for call in calls]
        return [
            program.operand(call, names[number]) for call, names in given if number < len(names)
        ]
    operands = [program.operand(i, name) for name in i.operands]
    if i.opcode != "get-tuple-element" or not i.attributes.get("index", "").isdigit():
        return operands
    index, whole = int(i.attributes["index"]), operands[0]
    tuples = [whole]
    if whole.opcode == "parameter":
        calls = [c for c in program.callers[i.computation] if c.role == "body"]
        if calls:
            tuples = [program.module.computations[i.computation].root]
            tuples += [program.operand(c.instruction, c.instruction.operands[0]) for c in calls]
    elif whole.opcode == "while":
        body = program.module.computations.get(whole.attributes.get("body", "").lstrip("%"))
        tuples = [body.root] if body else []
    return [
        program.operand(t, t.operands[index]) if index < len(t.operands) else t
        for t in tuples
        if t.opcode == "tuple"
    ] or operands


def _readers(program: Program, i: Instruction) -> list[Instruction]:
    if i.is_root:
        return [call.instruction for call in program.callers[i.computation] if call.role == "call"]
    return program.users(i)
