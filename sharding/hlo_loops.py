"""How many times each computation of a compiled program runs in one step.

A program that scans over layers holds one layer's text; what it moves is that times the trip
count. CPU and GPU compilers write ``known_trip_count`` beside a loop. The TPU compiler writes
nothing, and the constant in the loop's condition is not the answer: windowed einsums step by
two. So the loop is run: a small interpreter follows only the scalars that the condition needs,
from their first values through the body, until the condition is false. Values that depend on the
data have no answer, and then the count is None, never a guess.

Counts multiply down the call graph. Cost: some ten microseconds per trip of a loop whose count
is not written; a loop that would take seconds to follow counts as unknown.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.sharding.hlo import Computation, Instruction, Module

__all__ = [
    "Call",
    "callers_of",
    "conditional_computations",
    "executions",
    "trip_count",
    "while_depth",
]

_MAX_STEPS = 1_000_000  # scalars computed for one loop: about two seconds


class _UnknownError(Exception):
    """A value that depends on the data, or an instruction the interpreter does not know."""


@dataclass(frozen=True)
class Call:
    """One place that a computation is called from.

    Attributes:
        caller: computation that holds the instruction.
        instruction: the one that calls.
        role: ``body``, ``condition``, ``branch`` or ``call``.
    """

    caller: str
    instruction: Instruction
    role: str


def callers_of(module: Module) -> Mapping[str, tuple[Call, ...]]:
    """Who calls each computation, for all computations of the module; the entry has none."""
    found: dict[str, list[Call]] = {name: [] for name in module.computations}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            for name, role in _calls(instruction):
                if name in found:
                    found[name].append(Call(computation.name, instruction, role))
    return {name: tuple(calls) for name, calls in found.items()}


def _calls(instruction: Instruction) -> list[tuple[str, str]]:
    names = instruction.called
    if not names or instruction.opcode.endswith(("-done", "-update")):
        return []  # the -start names the same computation, and runs it
    if instruction.opcode == "while":
        condition = instruction.attributes.get("condition", "").lstrip("%")
        return [(name, "condition" if name == condition else "body") for name in names]
    role = "branch" if instruction.opcode == "conditional" else "call"
    return [(name, role) for name in names]


def executions(module: Module) -> Mapping[str, int | None]:
    """How many times a step runs each computation.

    Each branch of a conditional counts as if it were taken every time (see
    `conditional_computations`). What combines two elements of a reduction counts as once a
    reduction. A computation that nothing calls has 0.

    Returns:
        Count by computation; None where a loop around it has no known trip count.
    """
    callers = callers_of(module)
    trips: dict[str, int | None] = {}
    counts: dict[str, int | None] = {}

    def count(name: str, above: frozenset[str]) -> int | None:
        if name in counts:
            return counts[name]
        if name in above:  # recursion is not HLO; a damaged text may still hold it
            return None
        total: int | None = int(name == module.entry)
        for call in callers[name]:
            around = count(call.caller, above | {name})
            times: int | None = 1
            if call.role in ("body", "condition"):
                key = f"{call.caller} {call.instruction.name}"
                if key not in trips:
                    trips[key] = trip_count(module, call.instruction)
                times = trips[key]
                if times is not None and call.role == "condition":
                    times += 1
            if around == 0:
                continue
            total = None if None in (total, around, times) else total + around * times  # type: ignore[operator]
        counts[name] = total
        return total

    return {name: count(name, frozenset()) for name in reversed(list(module.computations))}


def while_depth(module: Module) -> Mapping[str, int]:
    """Number of loops each computation is inside of, by its deepest caller."""
    callers = callers_of(module)
    depths: dict[str, int] = {}

    def depth(name: str, above: frozenset[str]) -> int:
        if name not in depths and name not in above:
            inside = above | {name}
            depths[name] = max(
                (
                    depth(call.caller, inside) + (call.role in ("body", "condition"))
                    for call in callers[name]
                ),
                default=0,
            )
        return depths.get(name, 0)

    return {name: depth(name, frozenset()) for name in reversed(list(module.computations))}


def conditional_computations(module: Module) -> frozenset[str]:
    """Computations that run only if a branch of a conditional is taken, callees included."""
    callers = callers_of(module)
    found: dict[str, bool] = {}

    def conditional(name: str, above: frozenset[str]) -> bool:
        if name not in found and name not in above:
            calls = callers[name]
            found[name] = bool(calls) and all(
                call.role == "branch" or conditional(call.caller, above | {name}) for call in calls
            )
        return found.get(name, False)

    return frozenset(name for name in module.computations if conditional(name, frozenset()))


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How many times the body of a ``while`` runs each time it is reached; None if unknown."""
    written = re.search(
        r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes.get("backend_config", "")
    )
    if written:
        return int(written.group(1))
    condition = module.computations.get(loop.attributes.get("condition", "").lstrip("%"))
    body = module.computations.get(loop.attributes.get("body", "").lstrip("%"))
    caller = module.computations.get(loop.computation)
    if condition is None or body is None or caller is None or len(loop.operands) != 1:
        return None
    try:
        return _Loop(module, condition, body, caller, loop.operands[0]).run()
    except (_UnknownError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return None  # also of a damaged loop: unknown, so it is reported


class _Loop:
    """A loop whose scalars are followed, each element of its tuple only when asked for."""

    def __init__(
        self, module: Module, condition: Computation, body: Computation, at: Computation, init: str
    ) -> None:
        self.condition, self.body, self.init = condition, body, init
        self.outside = _Evaluator(module, at, None)
        self.module = module
        self.steps = 0

    def run(self) -> int:
        needed = self.needed()
        state = {i: self.outside.element(self.init, i) for i in needed}
        for trip in itertools.count():
            if not self.evaluate(self.condition, self.condition.root.name, state):
                return trip
            root = self.body.root.name
            body = _Evaluator(self.module, self.body, state)
            state = {i: body.element(root, i) for i in needed}
            self.steps += 10 + body.steps  # those inside fusions are not seen
            if self.steps > _MAX_STEPS:
                raise _UnknownError
        raise AssertionError("count() ends")

    def evaluate(self, computation: Computation, name: str, state: dict[int, object]) -> object:
        return _Evaluator(self.module, computation, state).value(name)

    def needed(self) -> list[int]:
        """Indices of the loop's tuple that the condition depends on, through the body."""
        probe = _Evaluator(self.module, self.condition, None)
        found = set(probe.dependencies(self.condition.root.name))
        todo = list(found)
        body = _Evaluator(self.module, self.body, None)
        while todo:
            for index in body.dependencies(self.body.root.name, todo.pop()):
                if index not in found:
                    found.add(index)
                    todo.append(index)
        return sorted(found)


_Function = Callable[..., object]
_BINARY: dict[str, _Function] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift-left": lambda a, b: a << b if 0 <= b < 64 else 0,
}
_COMPARE: dict[str, _Function] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_SAME = frozenset(
    ("copy", "bitcast", "convert", "reshape", "broadcast", "copy-start", "copy-done", "transpose")
)
_CALLS = frozenset(("fusion", "call"))


class _Evaluator:
    """Scalars of one computation, given the elements of its (tuple) parameter or its arguments."""

    def __init__(
        self,
        module: Module,
        computation: Computation,
        state: Mapping[int, object] | None,
        arguments: Callable[[int], object] | None = None,
    ) -> None:
        self.module, self.computation = module, computation
        self.state, self.arguments = state, arguments
        self.known: dict[str, object] = {}
        self.steps = 0

    def instruction(self, name: str) -> Instruction:
        return self.computation.instructions[name]

    def value(self, name: str) -> object:
        """A scalar: int, bool or float.

        Raises:
            _UnknownError: it depends on data.
        """
        if name not in self.known:
            self.steps += 1
            self.known[name] = self.compute(self.instruction(name))
        return self.known[name]

    def compute(self, i: Instruction) -> object:
        opcode = i.opcode
        if opcode == "constant":
            return _literal(i)
        if opcode == "parameter":
            if self.arguments is not None:
                return self.arguments(int(i.literal))
            if self.state is not None and -1 in self.state:
                return self.state[-1]
            raise _UnknownError
        if opcode == "get-tuple-element":
            return self.element(i.operands[0], int(i.attributes["index"]))
        if opcode in _SAME:
            if i.shapes[0].elements != 1:
                raise _UnknownError
            return _fit(self.value(i.operands[0]), i)
        if opcode in _CALLS:
            return self.inner(i).value(self.callee(i).root.name)
        if opcode == "compare":
            a, b = (self.value(o) for o in i.operands)
            return _COMPARE[i.attributes["direction"]](a, b)
        if opcode == "select":
            return self.value(i.operands[1 if self.value(i.operands[0]) else 2])
        if opcode == "clamp":
            low, x, high = (self.value(o) for o in i.operands)
            return min(max(x, low), high)  # type: ignore[type-var]
        if opcode in _BINARY and i.shapes[0].elements == 1:
            a, b = (self.value(o) for o in i.operands)
            return _fit(_BINARY[opcode](a, b), i)
        return _fit(_arithmetic(opcode, [self.value(o) for o in i.operands]), i)

    def element(self, name: str, index: int) -> object:
        """Element ``index`` of a tuple, without looking at the others; -1 is the value itself."""
        if index == -1:
            return self.value(name)
        i = self.instruction(name)
        if i.opcode == "tuple":
            return self.value(i.operands[index])
        if i.opcode == "parameter" and self.state is not None and index in self.state:
            return self.state[index]
        if i.opcode in ("optimization-barrier", "opt-barrier", "copy") and len(i.operands) == 1:
            return self.element(i.operands[0], index)
        if i.opcode in _CALLS:
            return self.inner(i).element(self.callee(i).root.name, index)
        if i.opcode == "while":
            # An element that a loop hands through unchanged.
            body = self.module.computations[i.attributes["body"].lstrip("%")]
            kept = _Evaluator(self.module, body, None).dependencies(body.root.name, index)
            if kept == {index} and _hands_through(body, index):
                return self.element(i.operands[0], index)
        raise _UnknownError

    def callee(self, i: Instruction) -> Computation:
        names = i.called
        if len(names) != 1 or names[0] not in self.module.computations:
            raise _UnknownError
        return self.module.computations[names[0]]

    def inner(self, i: Instruction) -> _Evaluator:
        return _Evaluator(
            self.module, self.callee(i), None, lambda number: self.value(i.operands[number])
        )

    def dependencies(self, name: str, index: int = -1) -> set[int]:
        """Which elements of the parameter a value is made of; -1 for a parameter not a tuple.

        Raises:
            _UnknownError: it is made of something that is not scalar arithmetic.
        """
        found: set[int] = set()
        todo, seen = [(name, index)], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            i = self.instruction(at[0])
            if i.opcode == "parameter":
                found.add(at[1])
            elif i.opcode == "get-tuple-element":
                todo.append((i.operands[0], int(i.attributes["index"])))
            elif i.opcode == "tuple" and at[1] >= 0:
                todo.append((i.operands[at[1]], -1))
            elif at[1] >= 0 and i.opcode in ("optimization-barrier", "opt-barrier", "copy"):
                todo.append((i.operands[0], at[1]))
            else:
                todo += [(operand, -1) for operand in i.operands]
        return found


def _hands_through(body: Computation, index: int) -> bool:
    i = body.instructions[body.root.name]
    if i.opcode != "tuple":
        return False
    i = body.instructions[i.operands[index]]
    return i.opcode == "get-tuple-element" and i.attributes.get("index") == str(index)


def _literal(i: Instruction) -> object:
    if not i.shapes or i.shapes[0].elements != 1:
        raise _UnknownError
    text = i.literal.strip(" {}")
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        raise _UnknownError from None


def _arithmetic(opcode: str, values: list[object]) -> object:
    match opcode, values:
        case "negate", [int() | float() as a]:
            return -a
        case "not", [bool(a)]:
            return not a
        case "not", [int(a)]:
            return ~a
        case "abs", [int() | float() as a]:
            return abs(a)
        case "sign", [int() | float() as a]:
            return (a > 0) - (a < 0)
        case "divide", [int(a), int(b)] if b:
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        case "divide", [float(a), float(b)] if b:
            return a / b
        case "remainder", [int(a), int(b)] if b:
            return abs(a) % abs(b) * (1 if a >= 0 else -1)
        case (("shift-right-logical" | "shift-right-arithmetic"), [int(a), int(b)]) if 0 <= b < 64:
            if a >= 0:
                return a >> b
    raise _UnknownError


def _fit(value: object, i: Instruction) -> object:
    """The value as the instruction's type holds it: integers wrap around."""
    shape = i.shapes[0]
    kind, bits = shape.dtype[0], shape.bits
    if shape.dtype == "pred":
        return bool(value)
    if kind in "su" and isinstance(value, int | float):
        whole = int(value) & ((1 << bits) - 1)
        return whole - (1 << bits) if kind == "s" and whole >> (bits - 1) else whole
    if isinstance(value, int | float):
        return float(value)
    raise _UnknownError
