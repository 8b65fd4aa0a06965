"""Every instruction of a compiled program that moves data between devices, as it was emitted.

What a compiler emits for one communication takes many forms, and each has its trap:

- an asynchronous pair is one communication, and the shapes of ``-start`` differ by version, so
  the result is read from its ``-done``;
- a TPU asynchronous-collective fusion repeats the instruction in the fusion that starts it, in
  those that run while it is in flight and in the one that ends it; what starts it counts;
- a TPU reduce-scatter is an all-reduce in a computation named ``all-reduce-scatter``;
- a tpu7x collective stands in a computation that ``call-start`` runs on the sparse core;
- between TPU slices data goes by ``send`` and ``recv`` to the host with megascale attributes.

Nothing is left out in silence: opcodes nobody knows, collectives whose groups or bytes cannot be
read, and those nothing calls become sentences in `Scan.unread`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from meshwright.sharding.hlo import HloSyntaxError, Instruction, Shape
from meshwright.sharding.hlo_groups import (
    GroupAxes,
    axes_of_groups,
    axes_of_pairs,
    parse_groups,
    parse_pairs,
    parse_slices,
)
from meshwright.sharding.hlo_opcodes import COLLECTIVES, LOCAL, base_and_form
from meshwright.sharding.hlo_program import Program
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Kind

__all__ = ["Move", "Part", "Scan", "scan_moves"]

_MEGASCALE: dict[str, Kind] = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_COLLECTIVE = re.compile(
    r"all[-_]?(gather|reduce|to[-_]?all)|reduce[-_]?scatter|collective|permute"
    r"|nccl|nvshmem|mosaic_gpu.*remote",
    re.I,
)
_IN_FLIGHT = "async_collective_fusion_config"
_STARTS, _ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclass(frozen=True)
class Part:
    """One array of a communication.

    Attributes:
        operand: what a device puts in.
        result: what it gets.
        name: the operand's instruction.
        full: the one of them that a collective's bytes S are counted by.
    """

    operand: Shape
    result: Shape
    name: str
    full: Shape


@dataclass(frozen=True)
class Move:
    """One communication as emitted, counted over a step.

    Attributes:
        instruction: the one that starts it.
        kind: by its opcode, or reduce-scatter for TPU's all-reduce-scatter.
        groups: mesh axes and participants.
        parts: arrays it moves, more than one where several were combined.
        count: executions a step.
        emitted: the form it was found in.
        overlaps: whether something computes meanwhile; None where the schedule is unknown.
        depth: loops around it.
    """

    instruction: Instruction
    kind: Kind
    groups: GroupAxes
    parts: tuple[Part, ...]
    count: int
    emitted: str
    overlaps: bool | None
    depth: int


@dataclass(frozen=True)
class Scan:
    """All moves of a program, in text order, and what could not be read."""

    moves: tuple[Move, ...]
    unread: tuple[str, ...]


def scan_moves(program: Program, mesh: MeshSpec, *, slices: int = 1) -> Scan:
    """Find every communication of a program.

    Args:
        program: of the compiled module.
        mesh: the mesh it was compiled for, filled.
        slices: TPU slices the mesh lies over; the axes are split as `MeshSpec.split` says.

    Raises:
        MeshError: the mesh cannot be cut along the slices.
    """
    return _Scanner(program, mesh, slices).scan()


class _Scanner:
    def __init__(self, program: Program, mesh: MeshSpec, slices: int) -> None:
        self.program, self.module = program, program.module
        self.unread: list[str] = []
        self.whole = mesh.axes
        rows = mesh.split(slices)
        partitions = self.module.partitions
        inside = tuple((name, within) for name, _, within in rows)
        self.sizes = self.whole
        if partitions != mesh.device_count:
            self.sizes = inside
            if partitions * slices != mesh.device_count:
                self.unread.append(
                    f"the program is for {partitions} partitions and the mesh `{mesh}` has "
                    f"{mesh.device_count} devices; the axes of its collectives are not known"
                )
                self.sizes = ()
        self.slices = slices
        self.across = tuple((name, parts) for name, parts, _ in rows)
        self.chains: dict[tuple[str, ...], list[Instruction]] = {}

    def scan(self) -> Scan:
        found: list[Move] = []
        for computation in self.module.computations.values():
            if self.program.counts[computation.name] == 0:
                self.uncalled(computation.instructions.values())
                continue
            for instruction in computation.instructions.values():
                move = self.look(instruction)
                if move is not None:
                    found.append(move)
        for instructions in self.chains.values():
            found += self.chain(instructions)
        order = {name: n for n, name in enumerate(self.module.computations)}
        found.sort(key=lambda move: order[move.instruction.computation])
        return Scan(tuple(found), tuple(dict.fromkeys(self.unread)))

    def uncalled(self, instructions: Iterable[Instruction]) -> None:
        for i in instructions:
            if base_and_form(i.opcode)[0] not in LOCAL or i.opcode == "send":
                self.say(i, "stands in a computation that nothing calls; it is not counted")

    def say(self, i: Instruction, why: str) -> None:
        self.unread.append(f"{i.opcode} `{i.name}` of `{i.computation}` {why}")

    def look(self, i: Instruction) -> Move | None:
        """The communication an instruction starts, if it starts one."""
        base, form = base_and_form(i.opcode)
        if base in COLLECTIVES:
            if form in ("-done", "-update"):
                if not any(self.program.operand(i, o).opcode.startswith(base) for o in i.operands):
                    self.say(i, "ends what nothing starts")
                return None
            if form == "" and _IN_FLIGHT in i.attributes.get("backend_config", ""):
                key = (i.attributes.get("channel_id", ""), _chain_id(i), i.opcode)
                self.chains.setdefault(key, []).append(i)
                return None
            return self.collective(i, COLLECTIVES[base])
        if i.opcode in ("send", "recv"):
            return self.transfer(i)
        if i.opcode == "custom-call":
            self.look_at_custom_call(i)
        elif base not in LOCAL and form in ("", "-start"):
            known = _COLLECTIVE.search(base)
            self.say(
                i,
                f"({i.bytes} bytes) moves an amount that the text does not tell; not counted"
                if known
                else "is an unknown instruction",
            )
        elif i.attributes.keys() & {"replica_groups", "source_target_pairs"}:
            self.say(i, "names groups of devices, and is no collective that is known")
        return None

    def look_at_custom_call(self, i: Instruction) -> None:
        target = i.custom_call_target
        config = i.attributes.get("backend_config", "")
        if target in (_STARTS, _ENDS):
            return
        if _COLLECTIVE.search(target) or re.search(
            r'"has_communication":\s*true|"collective_id":', config
        ):
            self.say(i, f"to `{target}` may communicate; what it moves is not counted")

    def collective(self, i: Instruction, kind: Kind, in_flight: bool | None = None) -> Move:
        """The move an instruction is; ``in_flight`` is known for one of a chain of fusions."""
        parts, groups = self.parts(i, kind), self.groups(i)
        emitted = i.opcode
        if kind == "all-reduce" and self.scatters(i):
            kind, emitted = "reduce-scatter", "all-reduce-scatter"
            parts = tuple(replace(part, full=part.operand) for part in parts)
            result = sum(s.elements for s in self.module.computations[i.computation].root.shapes)
            if result * groups.participants != sum(part.full.elements for part in parts):
                self.say(i, f"does not scatter over its {groups.participants} devices evenly")
        else:
            self.check(i, kind, parts, groups.participants)
        if in_flight is not None:
            return self.move(
                i, kind, groups, parts, f"{emitted} in async collective fusion", in_flight
            )
        if not i.opcode.endswith("-start"):
            overlaps, emitted = self.around(i, emitted)
            return self.move(i, kind, groups, parts, emitted, overlaps)
        done = self.program.done(i)
        overlaps = False
        if done is None:
            self.say(i, "is never waited for; its result is taken from its start")
        elif '"is_sync":true' not in i.attributes.get("backend_config", ""):
            overlaps = self.program.computes_between(i, done)
        return self.move(i, kind, groups, parts, emitted, overlaps)

    def around(self, i: Instruction, emitted: str) -> tuple[bool | None, str]:
        """Overlap of a collective in a computation that an asynchronous call runs."""
        for call in self.program.callers[i.computation]:
            if call.instruction.opcode.endswith("-start"):
                done = self.program.done(call.instruction)
                thread = call.instruction.attributes.get("async_execution_thread", "").strip('"')
                emitted = f"{emitted} in {call.instruction.opcode}"
                emitted += f" ({thread})" if thread else ""
                return (
                    self.program.computes_between(call.instruction, done) if done else None
                ), emitted
        return False, emitted

    def move(
        self,
        i: Instruction,
        kind: Kind,
        groups: GroupAxes,
        parts: tuple[Part, ...],
        emitted: str,
        overlaps: bool | None,
    ) -> Move:
        count = self.program.counts[i.computation]
        if count is None:
            self.say(i, "is in a loop whose trip count is unknown; it is counted once")
            count = 1
        if i.computation in self.program.conditional:
            self.say(i, "is in a branch of a conditional; it is counted as if always taken")
        depth = self.program.depths[i.computation]
        return Move(i, kind, groups, parts, count, emitted, overlaps, depth)

    def parts(self, i: Instruction, kind: Kind) -> tuple[Part, ...]:
        """Operands beside results; of an asynchronous pair the results are those of its end."""
        done = self.program.done(i) if i.opcode.endswith("-start") else None
        results = list(done.shapes if done else i.shapes)
        operands = [
            (name, shape) for name in i.operands for shape in self.program.operand(i, name).shapes
        ]
        if kind == "collective-permute" and "slice_sizes" in i.attributes:
            self.say(i, "sends slices of its operands; the whole of its result is counted")
            operands = operands[: len(results)]
        if done is None and len(results) > len(operands):
            results = results[: len(operands)]  # a start nobody waits for: ((operands), results)
        if len(results) != len(operands) or not operands:
            self.say(i, f"has {len(operands)} operands and {len(results)} results")
            results = (results + [shape for _, shape in operands])[: len(operands)]
        pairs = zip(operands, results, strict=True)
        return tuple(
            Part(operand, result, name, _full(kind, operand, result))
            for (name, operand), result in pairs
        )

    def check(self, i: Instruction, kind: Kind, parts: tuple[Part, ...], n: int) -> None:
        """Say so where operand, result and group size do not fit together."""
        for part in parts:
            small, large = part.operand, part.result
            if kind == "reduce-scatter":
                small, large = large, small
            times = n if kind in ("all-gather", "reduce-scatter") else 1
            if small.elements * times != large.elements or (
                small.dtype != large.dtype and kind != "all-reduce"
            ):
                self.say(
                    i,
                    f"turns {_written(part.operand)} into {_written(part.result)} over {n} "
                    "devices, which does not fit; it is counted as written",
                )
                return

    def groups(self, i: Instruction) -> GroupAxes:
        """Mesh axes of an instruction's groups or pairs; a sentence where they cannot be read."""
        n = self.module.partitions
        try:
            if "source_target_pairs" in i.attributes:
                pairs = parse_pairs(i.attributes["source_target_pairs"])
                if any(member >= n for pair in pairs for member in pair):
                    raise HloSyntaxError("", why=f"the pairs are not of {n} partitions")
                found = axes_of_pairs(pairs, self.sizes, self.whole)
            else:
                text = i.attributes.get("replica_groups")
                if text is None:
                    raise HloSyntaxError("", why="it has no replica groups")
                groups = parse_groups(text, n)
                if len(groups) == 1 and len(groups[0]) == 1 and n > 1 and _of_replicas(i):
                    groups = (tuple(range(n)),)  # one replica, each of its partitions
                if sum(map(len, groups)) != n:
                    self.say(i, f"has groups that leave out some of {n} partitions")
                found = axes_of_groups(groups, self.sizes, self.whole)
        except HloSyntaxError as error:
            self.say(i, f"is counted over all devices: {error.why or error.what}")
            axes = tuple(name for name, size in self.sizes if size > 1)
            return GroupAxes(axes, n)
        if found.participants == 1 and n > 1:
            self.say(i, "has groups of one device each, which moves nothing")
        if not found.regular:
            self.say(i, "has groups of different sizes; the largest is counted")
        return found

    def scatters(self, i: Instruction) -> bool:
        """Whether an all-reduce is TPU's reduce-scatter, by the name of what it stands in."""
        return i.computation.startswith("all-reduce-scatter") or any(
            call.instruction.name.startswith("all-reduce-scatter")
            for call in self.program.callers[i.computation]
        )

    def chain(self, instructions: list[Instruction]) -> list[Move]:
        """An asynchronous-collective fusion: one move for each instruction that starts it."""
        starts = [i for i in instructions if self.feeds(i, _STARTS)]
        ends = [i for i in instructions if self.feeds(i, _ENDS)]
        if not starts:
            self.say(instructions[0], "is in flight but starts nowhere; it is counted once")
            starts = instructions[:1]
        totals = [
            sum(self.program.counts[i.computation] or 0 for i in group) for group in (starts, ends)
        ]
        if totals[0] != totals[1]:
            self.say(starts[0], f"starts {totals[0]} and ends {totals[1]} times a step")
        kind = COLLECTIVES[instructions[0].opcode]
        return [self.collective(i, kind, len(instructions) > 2 * len(starts)) for i in starts]

    def feeds(self, i: Instruction, target: str) -> bool:
        return any(user.custom_call_target == target for user in self.program.users(i))

    def transfer(self, i: Instruction) -> Move | None:
        """A send between slices; or between devices, which a permute's start may become."""
        attributes = i.attributes.get("frontend_attributes", "")
        kind_text = re.search(r'_xla_megascale_transfer_type="([^"]*)"', attributes)
        if not kind_text:
            if "is_host_transfer" in i.attributes or i.opcode == "recv":
                if "megascale" in attributes:
                    self.say(i, "crosses slices in a way that is not known; it is not counted")
                return None  # to the host alone; or counted at the sending end
            pairs = re.search(r'_xla_send_recv_source_target_pairs="([^"]*)"', attributes)
            if not pairs:
                self.say(i, "has no source and target pairs; it is not counted")
                return None
            as_permute = {**i.attributes, "source_target_pairs": pairs.group(1)}
            groups = self.groups(replace(i, attributes=as_permute))
            shape = self.program.operand(i, i.operands[0]).shapes[0]
            part = Part(shape, shape, i.operands[0], shape)
            return self.move(i, "collective-permute", groups, (part,), "send", self.hidden(i))
        return self.between_slices(i, kind_text.group(1), attributes)

    def between_slices(self, i: Instruction, text: str, attributes: str) -> Move | None:
        kind = _MEGASCALE.get(text)
        if kind is None:
            if i.opcode == "send":
                self.say(i, f"crosses slices as {text}, which is not known; it is not counted")
            return None
        # A pair shares its rendezvous; the end whose buffer is S is the one that counts.
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', attributes)
        name = match.group(1) if match else ""
        others = [
            other
            for other in self.module.computations[i.computation].instructions.values()
            if other.opcode == ("recv" if i.opcode == "send" else "send")
            and f'_xla_host_transfer_rendezvous="{name}"'
            in other.attributes.get("frontend_attributes", "")
        ]
        counted = "recv" if kind == "all-gather" else "send"
        if i.opcode != counted and others:
            return None
        shape = i.shapes[0]
        part = Part(shape, shape, i.operands[0], shape)
        if not name or len(others) != 1:
            self.say(i, f"crosses slices and has {len(others)} counterparts instead of one")
        emitted = f"{i.opcode} (megascale {text})"
        groups = self.slice_groups(i, attributes)
        return self.move(i, kind, groups, (part,), emitted, self.hidden(i))

    def slice_groups(self, i: Instruction, attributes: str) -> GroupAxes:
        """Mesh axes along which the slices of a transfer differ."""
        target = re.search(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})', attributes)
        try:
            if target is None:
                raise HloSyntaxError("", why="it has no target")
            groups = parse_slices(target.group(1), self.slices)
        except HloSyntaxError as error:
            self.say(i, f"is counted over all slices: {error.why}")
            groups = (tuple(range(self.slices)),)
        return axes_of_groups(groups, self.across, self.whole)

    def hidden(self, i: Instruction) -> bool | None:
        done = self.program.done(i)
        return self.program.computes_between(i, done) if done else None


def _chain_id(i: Instruction) -> str:
    found = re.search(r'chain_id="([^"]*)"', i.attributes.get("frontend_attributes", ""))
    return found.group(1) if found else ""


def _of_replicas(i: Instruction) -> bool:
    """Whether its groups are of replicas: a channel without global ids joins all partitions."""
    return "channel_id" in i.attributes and (
        i.attributes.get("use_global_device_ids", "false") != "true"
    )


def _full(kind: Kind, operand: Shape, result: Shape) -> Shape:
    """The buffer that S counts.

    An all-reduce may take float32 and give bfloat16: XLA folds the conversion after it into it,
    and what is summed, and sent, is the wider type.
    """
    if kind == "all-reduce" and operand.elements == result.elements:
        return max(operand, result, key=lambda shape: shape.bits)
    return result if kind in ("all-gather", "all-reduce") else operand


def _written(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
