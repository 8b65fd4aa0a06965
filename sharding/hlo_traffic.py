"""Bytes a compiled program reads and writes in device memory, from what its schedule touches.

An instruction that is scheduled by itself reads its operands from memory and writes its results
there; a fusion does so once for all that is inside it. Three things make the plain sum of shapes
wrong, by an order of magnitude in a scan over layers:

- A layer's slice of a stack. A fusion is given the whole stack and reads one layer of it. So
  demand is followed backwards through a fusion, from its results to its parameters: a slice asks
  for its own size only, an elementwise operation for as much as was asked of it.
- Updates in place. ``dynamic-update-slice`` and ``scatter`` write the update, not the buffer.
- On-chip memory. The TPU compiler keeps buffers in VMEM, marked ``S(1)`` in their layouts: those
  are not device memory. On GPU the same mark is memory for collectives, which is.

A buffer counts once for every instruction that reads it, however often its tiles pass inside a
matmul or an attention kernel, and without tile padding: less than what moves, never more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshwright.sharding.hlo import Computation, Instruction, Module, Shape
from meshwright.sharding.hlo_opcodes import COLLECTIVES, base_and_form
from meshwright.sharding.hlo_program import Program

__all__ = ["FREE_OPCODES", "FREE_TARGETS", "scheduled_computations", "traffic_bytes"]

_FREE = """
parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id while
conditional call add-dependency opt-barrier optimization-barrier domain async-start async-update
async-done call-start call-update call-done send-done recv
"""
FREE_OPCODES = frozenset(_FREE.split())
"""Opcodes that read and write nothing themselves, though what they call may."""

FREE_TARGETS = frozenset(
    ("AllocateBuffer", "ConcatBitcast", "SliceId", "Sharding", "AssumeGatherIndicesInBound")
    + ("PrepareAsyncCallStart", "PrepareAsyncCallDone")
)
"""Custom calls that do no work: the compiler's notes to itself."""

_SLICES = frozenset(("slice", "dynamic-slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # → operand that is written into the first
_RENAMES = frozenset(("bitcast", "reshape"))
# Each element of the result is made of every element of some operand, or of many.
_MIXING = frozenset(
    ("dot", "convolution", "custom-call", "reduce-window", "sort", "scatter", "fft", "cholesky")
    + ("triangular-solve", "topk", "select-and-scatter", "while", "call", "conditional")
)


def scheduled_computations(module: Module) -> frozenset[str]:
    """Computations whose instructions run one by one: not those inside fusions or reductions."""
    found: set[str] = set()
    todo = [module.entry]
    while todo:
        name = todo.pop()
        if name in found or name not in module.computations:
            continue
        found.add(name)
        for i in module.computations[name].instructions.values():
            base, form = base_and_form(i.opcode)
            if i.opcode in ("while", "conditional", "call", "async-start") or (
                base == "call" and form == "-start"
            ):
                todo += i.called
    return frozenset(found)


def traffic_bytes(program: Program, instruction: Instruction) -> int:
    """Bytes that one execution of a scheduled instruction reads and writes in device memory.

    Asynchronous pairs count at their ``-done``.

    Args:
        program: the module, with its callers and users.
        instruction: of one of its `scheduled_computations`.
    """
    opcode = instruction.opcode
    if opcode in FREE_OPCODES or instruction.custom_call_target in FREE_TARGETS:
        return 0
    here = _Memory(program.module)
    computation = program.module.computations[instruction.computation]
    base, form = base_and_form(opcode)
    if opcode in ("copy-start", "copy-done"):
        base, form = "copy", opcode.removeprefix("copy")
    if form in ("-start", "-update"):
        return 0
    if form == "-done":
        start = _start(computation, instruction)
        return _whole(here, computation, start, instruction.shapes, sliced=base in _SLICES)
    if opcode == "fusion":
        return _fusion(program.module, here, computation, instruction)
    if opcode in _UPDATES:
        return _update(here, computation, instruction)
    return _whole(here, computation, instruction, instruction.shapes, sliced=opcode in _SLICES)


class _Memory:
    """Which memory spaces are device memory."""

    def __init__(self, module: Module) -> None:
        # Only the TPU's layouts have tiles.
        tpu = "T(" in module.attributes.get("entry_computation_layout", "")
        self.spaces = (0,) if tpu else (0, 1)

    def bytes(self, shapes: Iterable[Shape]) -> int:
        return sum(shape.bytes for shape in shapes if shape.memory_space in self.spaces)


def _start(computation: Computation, done: Instruction) -> Instruction:
    """The ``-start`` behind a ``-done``, through any updates."""
    at = done
    while at.operands and not at.opcode.endswith("-start"):
        behind = computation.instructions[at.operands[0]]
        if base_and_form(behind.opcode)[1] == "" and not behind.opcode.startswith("copy-"):
            break
        at = behind
    return at


def _whole(
    here: _Memory,
    computation: Computation,
    reader: Instruction,
    results: Iterable[Shape],
    *,
    sliced: bool,
) -> int:
    """Operands and results; of a slice as much is read as it gives."""
    results = tuple(results)
    written = here.bytes(results)
    operands = [computation.instructions[name] for name in reader.operands]
    if reader.opcode in ("send", "recv-done"):
        operands = operands[:1] if reader.opcode == "send" else []
        written = 0 if reader.opcode == "send" else written
    if not sliced:
        return written + sum(here.bytes(operand.shapes) for operand in operands)
    size = sum(shape.bytes for shape in results)
    read = size if here.bytes(operands[0].shapes) else 0
    return written + read + sum(here.bytes(operand.shapes) for operand in operands[1:])


def _update(here: _Memory, computation: Computation, instruction: Instruction) -> int:
    """The update and indices are read; as much as the update is written (scatter: read first)."""
    operands = [computation.instructions[name] for name in instruction.operands]
    update = operands[_UPDATES[instruction.opcode]]
    times = 2 if instruction.opcode == "scatter" else 1
    touched = update.bytes if here.bytes(instruction.shapes) else 0
    return times * touched + sum(here.bytes(operand.shapes) for operand in operands[1:])


def _fusion(
    module: Module, here: _Memory, computation: Computation, instruction: Instruction
) -> int:
    inside = module.computations[instruction.called[0]]
    results = _results(inside)
    total = 0
    shapes = instruction.shapes
    for n, result in enumerate(results):
        # A result that is itself a tuple has no shape of its own to go by: take the fusion's.
        shape = shapes[n : n + 1] if len(results) == len(shapes) else result.shapes
        if here.bytes(shape):
            total += _written(inside, result, sum(s.bytes for s in shape))
    asked = _demand(module, inside, None)
    for parameter in inside.parameters:
        operand = computation.instructions[instruction.operands[int(parameter.literal)]]
        if here.bytes(operand.shapes):
            part = asked.get(parameter.name, 0) / max(1, _elements(parameter))
            total += round(part * here.bytes(operand.shapes))
    return total


def _results(inside: Computation) -> list[Instruction]:
    if inside.root.opcode == "tuple":
        return [inside.instructions[name] for name in inside.root.operands]
    return [inside.root]


def _written(inside: Computation, result: Instruction, size: int) -> int:
    """Bytes of a fusion's result that it writes: none that it passes on, of an update its part."""
    source = _renamed(inside, result)
    if source.opcode == "parameter":
        return 0
    if source.custom_call_target.startswith("AsyncCollective"):
        return size if source.custom_call_target.endswith("Start") else 0
    if _in_place(inside, source):
        return inside.instructions[source.operands[_UPDATES[source.opcode]]].bytes
    return size


def _renamed(inside: Computation, i: Instruction) -> Instruction:
    while i.opcode in _RENAMES:
        i = inside.instructions[i.operands[0]]
    return i


def _in_place(inside: Computation, i: Instruction) -> bool:
    """Whether an update is of a buffer that the fusion was given."""
    if i.opcode not in _UPDATES:
        return False
    buffer = _renamed(inside, inside.instructions[i.operands[0]])
    return buffer.opcode == "parameter" or _in_place(inside, buffer)


def _elements(i: Instruction) -> int:
    return sum(shape.elements for shape in i.shapes)


def _demand(
    module: Module, inside: Computation, root_elements: float | None
) -> Mapping[str, float]:
    """Elements of each instruction of a fusion that its results are made of.

    Args:
        module: for fusions inside of it.
        inside: the fusion's computation.
        root_elements: how much of its only result is asked for; None for all of everything.
    """
    asked: dict[str, float] = {}
    for result in _results(inside):
        # What is passed on, or updated in place, is not read.
        source = _renamed(inside, result)
        if source.opcode == "parameter" and inside.root.opcode == "tuple":
            continue
        whole = float(_elements(result))
        asked[result.name] = whole if root_elements is None else min(whole, root_elements)
    for i in reversed(list(inside.instructions.values())):
        wanted = asked.get(i.name, 0.0)
        if not wanted or i.opcode in ("parameter", "constant", "iota", "tuple"):
            continue
        asks: dict[str, float] = {}
        for name, elements in _asks(module, inside, i, wanted):
            asks[name] = max(asks.get(name, 0.0), elements)  # x * x reads x once
        for name, elements in asks.items():
            limit = _elements(inside.instructions[name])
            asked[name] = min(float(limit), asked.get(name, 0.0) + elements)
    return asked


def _asks(
    module: Module, inside: Computation, i: Instruction, wanted: float
) -> list[tuple[str, float]]:
    """(operand, elements of it) that an instruction reads to give ``wanted`` of its own."""
    operands = i.operands
    sizes = [float(_elements(inside.instructions[name])) for name in operands]
    if i.opcode in COLLECTIVES:
        # The compiler repeats an asynchronous collective in the fusions that it runs beside.
        starts = inside.root.custom_call_target == "AsyncCollectiveStart"
        return list(zip(operands, sizes, strict=True)) if starts else []
    if i.custom_call_target == "AsyncCollectiveDone":
        return []
    if i.opcode == "fusion" and i.called and i.called[0] in module.computations:
        nested = module.computations[i.called[0]]
        deeper = _demand(module, nested, None if nested.root.opcode == "tuple" else wanted)
        return [
            (operands[int(p.literal)], deeper.get(p.name, 0.0))
            for p in nested.parameters
            if p.literal.isdigit()
        ]
    if i.opcode in _UPDATES:
        at = _UPDATES[i.opcode]
        buffer = 0.0 if _in_place(inside, i) else max(0.0, wanted - sizes[at])
        if i.opcode == "scatter":  # adds to what is there
            buffer = min(sizes[0], sizes[at]) if _in_place(inside, i) else wanted
        return [(operands[0], buffer), *zip(operands[1:], sizes[1:], strict=True)]
    if i.opcode in _SLICES:
        return [(operands[0], wanted), *zip(operands[1:], sizes[1:], strict=True)]
    if i.opcode in _MIXING:
        return list(zip(operands, sizes, strict=True))
    if i.opcode == "reduce":
        part = min(1.0, wanted / max(1, i.shapes[0].elements))
        return [(name, size * part) for name, size in zip(operands, sizes, strict=True)]
    return [(name, min(size, wanted)) for name, size in zip(operands, sizes, strict=True)]
