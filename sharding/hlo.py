"""Compiled XLA text as values: computations, instructions, shapes, and where each came from.

``compiled.as_text()`` is the one form of a compiled program that every backend gives, that holds
replica groups, backend settings and called computations, and that needs no accelerator to read.
The grammar is not published as a promise, so the reader is strict: what it does not understand
raises `HloSyntaxError` with the line, an operand nobody defines is an error, and nothing is
skipped. A line it dropped could be the one that costs the most.

The text is scanned by position, not by line: Pallas calls carry raw newlines (and unbalanced
braces, in strings) inside attributes. Each value is taken by the cheapest pattern that fits it,
with a balanced scan as the last resort, which keeps it at several MB/s. The alternative,
jaxlib's private ``_hlo`` parser, exposes neither groups nor callees and aborts the process on
text from another compiler; it serves the tests as an oracle.

This module imports no jax. `HloSyntaxError` lives here because only compiled text raises it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from meshwright.sharding.errors import MeshwrightError
from meshwright.sharding.hlo_source import SourceTable, is_users

__all__ = [
    "Computation",
    "HloSyntaxError",
    "Instruction",
    "Module",
    "Shape",
    "parse_module",
    "parse_shapes",
]


class HloSyntaxError(MeshwrightError):
    """A line of compiled text is not what this reader knows; nothing was guessed."""


_BITS = {"pred": 8, "token": 0, "opaque": 0, "tf32": 32}


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result.

    Attributes:
        dtype: element type as XLA writes it, such as ``bf16``, ``pred`` or ``f8e4m3fn``.
        dims: sizes; of a dynamic dim the bound.
        layout: the text between the braces, such as ``1,0:T(8,128)(2,1)S(1)``.

    >>> Shape("bf16", (8, 128)).bytes
    2048
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """Product of the dims; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles; types below 8 bits are counted as packed."""
        return (self.elements * self.bits + 7) // 8

    @property
    def bits(self) -> int:
        """Bits of one element; 0 for tokens and opaque values."""
        known = _BITS.get(self.dtype)
        if known is not None:
            return known
        found = re.match(r"(?:bf|[a-z])(\d+)", self.dtype)
        assert found  # parse_shapes admits no other name
        return int(found.group(1))

    @property
    def memory_space(self) -> int:
        """The n of ``S(n)`` in the layout: 0 is device memory, 1 on TPU is VMEM."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: without the percent sign, unique in its computation.
        shapes: result arrays; of a tuple all its leaves, flattened.
        opcode: such as ``all-gather-start``.
        operands: names of the operands, without percent signs.
        attributes: raw text by key, such as ``replica_groups`` or ``metadata``.
        literal: what a constant or parameter has between its parentheses.
        is_root: whether it is the computation's result.
        computation: name of the computation it is in.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    literal: str = ""
    is_root: bool = False
    computation: str = ""

    @property
    def bytes(self) -> int:
        """Sum over the result's arrays, unpadded."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The traced operation it came from, such as ``jit(step)/jvp()/while/body/dot_general``."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found.group(1) if found else ""

    @property
    def custom_call_target(self) -> str:
        """Target of a custom call, else empty."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def backend_config(self) -> Mapping[str, object]:
        """The backend's settings; empty where there are none or they are not JSON."""
        try:
            value = json.loads(self.attributes.get("backend_config", "{}"), strict=False)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it names, whatever the attribute is called, in order of appearance."""
        names: list[str] = []
        for value in self.attributes.values():
            if value.startswith(("%", "{%")):
                names += _REFERENCE.findall(value)
        return tuple(names)


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order of the schedule if there is one."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction
    is_entry: bool = False

    @property
    def parameters(self) -> tuple[Instruction, ...]:
        """Parameters by number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal) if i.literal.isdigit() else -1))


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        name: such as ``jit_train_step``.
        computations: by name, callees before callers as XLA prints them.
        entry: name of the computation that runs.
        attributes: of the header, raw text by key.
        sources: the file and stack-frame tables.
    """

    name: str
    computations: Mapping[str, Computation]
    entry: str
    attributes: Mapping[str, str]
    sources: SourceTable = field(default_factory=SourceTable)

    @property
    def partitions(self) -> int:
        """Devices the program runs on together; of a multi-slice TPU program, those of a slice."""
        text = self.attributes.get("num_partitions", "1")
        replicas = self.attributes.get("replica_count", "1")
        return int(text) * int(replicas)

    def source_of(self, instruction: Instruction, is_user: Callable[[str], bool] = is_users) -> str:
        """``file:line`` of the innermost frame in the user's code, or empty.

        Args:
            instruction: of this module.
            is_user: of a file name, whether it is the user's. Where no frame is, the innermost
                frame outside installed libraries answers, then the innermost of all.
        """
        return self.sources.lookup(instruction.attributes.get("metadata", ""), is_user)


_NAME = r"[^\s,(){}=\[\]\"%]+"
_REFERENCE = re.compile(rf"%({_NAME})")
_NAMES = re.compile(rf"%?{_NAME}(?:, *%?{_NAME})*")
_NAME_ONLY = re.compile(_NAME)
_SHAPE = re.compile(r"(pred|token|opaque|tf32|bf16|[fsuc]\d+\w*)\[([\d,<=? ]*)\](?:\{([^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_HEAD = re.compile(rf"[ \t]+(ROOT )?%?({_NAME}) = ")
_ARRAY = re.compile(r"[a-z]\w*\[[^\]\n]*\](?:\{[^{}\n]*\})?")
_OPCODE = re.compile(r" ([a-z][\w\-]*)(?=\()")
_FLAT = re.compile(r'\(([^()"{}]*)\)')
_KEY = re.compile(r", ([A-Za-z_][\w\-]*)=")
_VALUE = re.compile(
    r'(%[^\s,(){}=\[\]"]+|\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}|"(?:[^"\\]|\\.)*"|[\w.\-+]+)'
    r"(?=, [A-Za-z_][\w\-]*=|[ \t]*(?:\n|\Z))",
    re.S,
)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|[(\[{]|[)\]}]|,|\n', re.S)
_LINE = re.compile(r"[^\n]*")
_COMPUTATION = re.compile(rf"(ENTRY )?%?({_NAME}) (?:\([^\n]*\) -> [^\n]*)?\{{[ \t]*\n")
_CLOSE = re.compile(r'\}(?:, ?execution_thread="[^"\n]*")?[ \t]*(?:\n|\Z)')
_BLANK = re.compile(r"[ \t]*(?:\n|\Z)")
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_JSON = json.JSONDecoder(strict=False)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read an array or tuple shape; tuples are flattened.

    Raises:
        HloSyntaxError: an element type or form nobody defined.

    >>> parse_shapes("(f32[2,3]{1,0:T(8,128)}, /*index=1*/(u32[], token[]))")[0]
    Shape(dtype='f32', dims=(2, 3), layout='1,0:T(8,128)')
    """
    if "/*" in text:
        text = _COMMENT.sub("", text)
    shapes: list[Shape] = []
    for dtype, dims, layout in _SHAPE.findall(text):
        try:
            sizes = tuple(int(d.strip(" <=")) if d.strip() != "?" else 0 for d in dims.split(","))
        except ValueError:
            if dims.strip():
                raise HloSyntaxError(f"cannot read the shape `{_short(text)}`") from None
            sizes = ()
        shapes.append(Shape(dtype, sizes, layout))
    rest = _SHAPE.sub("", text).replace(" ", "").replace(",", "")
    # Only parentheses may be left, and they must pair up; "()" is the empty tuple.
    while "()" in rest:
        rest = rest.replace("()", "")
    if rest or not (shapes or "(" in text):
        raise HloSyntaxError(
            f"cannot read the shape `{_short(text)}`", why=f"`{_short(rest or text)}` is no array"
        )
    return tuple(shapes)


def parse_module(text: str) -> Module:
    """Read the text of a compiled program.

    Args:
        text: what ``compiled.as_text()`` returned.

    Raises:
        HloSyntaxError: the text is cut off, or a line is not understood; the message has it.
    """
    return _Reader(text).module()


class _Reader:
    """A position in a text, and what was read up to it."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.shapes: dict[str, tuple[Shape, ...]] = {}

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        start = self.text.rfind("\n", 0, at) + 1
        found = _LINE.match(self.text, start)
        line = found.group().strip() if found else ""
        raise HloSyntaxError(
            "cannot read the compiled program",
            where=f"line {self.text.count(chr(10), 0, at) + 1}: {_short(line, 160)}",
            why=why,
        )

    def module(self) -> Module:
        found = re.compile(rf"\s*HloModule ({_NAME})").match(self.text)
        if not found:
            self.fail("it does not begin with `HloModule` and a name")
        self.at = found.end()
        attributes = self.attributes()
        computations: dict[str, Computation] = {}
        sources = SourceTable()
        while self.at < len(self.text):
            if blank := _BLANK.match(self.text, self.at):
                self.at = max(blank.end(), self.at + 1)
                continue
            if table := sources.read(self.text, self.at):
                self.at = table
                continue
            computation = self.computation()
            if computation.name in computations:
                self.fail(f"computation `{computation.name}` is defined twice")
            computations[computation.name] = computation
        entries = [c.name for c in computations.values() if c.is_entry]
        if len(entries) != 1:
            self.fail(f"it has {len(entries)} ENTRY computations; one is the program")
        for key in ("num_partitions", "replica_count"):
            if not attributes.get(key, "1").isdigit():
                self.fail(f"the header's {key} is not a number", 0)
        return Module(found.group(1), computations, entries[0], attributes, sources)

    def computation(self) -> Computation:
        head = _COMPUTATION.match(self.text, self.at)
        if not head:
            self.fail("this is neither a computation's first line nor a table")
        start, name = self.at, head.group(2)
        self.at = head.end()
        found: dict[str, Instruction] = {}
        root = None
        while not (close := _CLOSE.match(self.text, self.at)):
            if blank := _BLANK.match(self.text, self.at):
                if self.at >= len(self.text):
                    self.fail(f"the text ends inside computation `{name}`", start)
                self.at = blank.end()
                continue
            line = self.at
            instruction = self.instruction(name)
            if instruction.name in found:
                self.fail(f"`{instruction.name}` is defined twice", line)
            found[instruction.name] = instruction
            if instruction.is_root:
                if root is not None:
                    self.fail(f"computation `{name}` has two roots", line)
                root = instruction
        if root is None:
            self.fail(f"computation `{name}` has no ROOT instruction", start)
        for instruction in found.values():
            for operand in instruction.operands:
                if operand not in found:
                    self.fail(f"`{instruction.name}` uses `{operand}`, which is not defined", start)
        self.at = close.end()
        return Computation(name, MappingProxyType(found), root, bool(head.group(1)))

    def instruction(self, computation: str) -> Instruction:
        text, line = self.text, self.at
        head = _HEAD.match(text, line)
        if not head:
            self.fail("this is not an instruction: `%name = shape opcode(operands)`")
        at = head.end()
        if text.startswith("(", at):
            end = self.balanced(at)
        else:
            array = _ARRAY.match(text, at)
            if not array:
                self.fail("its shape is not understood")
            end = array.end()
        shape = text[at:end]
        shapes = self.shapes.get(shape)
        if shapes is None:
            try:
                shapes = self.shapes[shape] = parse_shapes(shape)
            except HloSyntaxError as error:
                self.fail(error.why or error.what)
        opcode = _OPCODE.match(text, end)
        if not opcode:
            self.fail("no opcode and operands follow its shape")
        at = opcode.end()
        flat = _FLAT.match(text, at)
        end = flat.end() if flat else self.balanced(at)
        inside = text[at + 1 : end - 1]
        self.at = end
        attributes = self.attributes()
        name, kind = head.group(2), opcode.group(1)
        operands: tuple[str, ...] = ()
        literal = ""
        if kind in ("constant", "parameter"):
            literal = inside
        else:
            self.at, after = line, self.at
            operands = self.operands(inside)
            self.at = after
        return Instruction(
            name, shapes, kind, operands, attributes, literal, bool(head.group(1)), computation
        )

    def operands(self, inside: str) -> tuple[str, ...]:
        """Names between an instruction's parentheses; some printers put each one's shape first."""
        if "/*" in inside:
            inside = _COMMENT.sub("", inside)
        if not inside.strip():
            return ()
        if not _NAMES.fullmatch(inside):
            # Without the shapes before names: arrays first, then the tuples they leave.
            bare = _SHAPE.sub("", inside)
            bare = re.sub(r"\([(), ]*\)", "", bare)
            if not _NAMES.fullmatch(re.sub(r"(^|,) +", r"\1 ", bare).strip()):
                self.fail(f"`{_short(inside)}` is not a list of operands")
            inside = bare
        return tuple(_NAME_ONLY.findall(inside))

    def attributes(self) -> dict[str, str]:
        """Everything of the form ``, key=value`` up to the end of the (logical) line."""
        text, found = self.text, {}
        previous = last = ""
        while key := _KEY.match(text, self.at):
            name, at = key.group(1), key.end()
            value = _VALUE.match(text, at)
            if value:
                end = value.end()
            elif text.startswith('{"', at):
                try:
                    end = _JSON.raw_decode(text, at)[1]
                except (ValueError, RecursionError):
                    end = self.value_end(at)
            else:
                end = self.value_end(at)
            if end == at:
                self.fail(f"attribute {name} has no value")
            if name in found:
                self.fail(f"attribute {name} is given twice")
            if name == "device_ids" and last.startswith(("mesh", "@mesh")):
                # `replica_groups=mesh[..], device_ids=(..) {..}` is one value.
                found[previous] = last = f"{last}, device_ids={text[at:end]}"
            else:
                found[name] = last = text[at:end]
                previous = name
            self.at = end
        end = _BLANK.match(text, self.at)
        if not end:
            rest = _LINE.match(text, self.at)
            self.fail(f"`{_short(rest.group() if rest else '')}` is not an attribute")
        self.at = end.end()
        return found

    def value_end(self, at: int) -> int:
        """End of a value: its closing brace, or a comma or newline outside all brackets."""
        if self.text.startswith("{", at):
            return self.balanced(at)
        open_, text = [], self.text
        for token in _TOKEN.finditer(text, at):
            char = token.group()[0]
            if char in "([{":
                open_.append(_CLOSER[char])
            elif char in ")]}":
                if not open_ or open_.pop() != char:
                    self.fail(f"a `{char}` closes nothing")
            elif char in ",\n" and not open_:
                return token.start()
        if open_:
            self.fail(f"a `{open_[-1]}` is missing")
        return len(text)

    def balanced(self, at: int) -> int:
        """The position after the bracket that closes the one at ``at``."""
        open_: list[str] = []
        for token in _TOKEN.finditer(self.text, at):
            char = token.group()[0]
            if char in "([{":
                open_.append(_CLOSER[char])
            elif char in ")]}":
                if not open_ or open_.pop() != char:
                    self.fail(f"a `{char}` closes nothing")
                if not open_:
                    return token.end()
        self.fail("a bracket is never closed")


def _short(text: str, width: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
