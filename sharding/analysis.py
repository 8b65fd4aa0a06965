"""Analyze any jitted step, or read any compiled program: what it holds, moves, computes, takes.

`read_program` turns a `CompiledProgram` into the parts of a `PlanReport` that its text and its
compiler can answer for. `analyze` does so for a user's own step, of whatever library::

    report = meshwright.analyze(jax.jit(step), state, batch, mesh=mesh, topology="v5p:4x4x4")

Both fill the same dataclasses as ``meshwright plan``. What only the model's own code knows (its
FLOPs, the least bytes it must move, what its parameters are called) is None here unless the caller
hands it in; a figure is never guessed.

A program compiled for CPU devices proves shardings and which collectives there are. What they
move in all and its memory are another machine's (CPU compilers widen bfloat16 and know no
reduce-scatter), so traffic and peak are left out and a provenance line says so; another says
whether the program has anything to widen.

What is kept of a compile is the compiled program and not the report, so that other rates or
another name for a leaf do not compile again (`compile_once`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from meshwright.sharding.aot_program import CompiledProgram, OutOfMemory
from meshwright.sharding.aot_wheels import require_wheels
from meshwright.sharding.bounds import wire_by_axis
from meshwright.sharding.chips import Chip, chip_of
from meshwright.sharding.collectives import LeafOf, collectives_of
from meshwright.sharding.errors import MeshError
from meshwright.sharding.hlo import HloSyntaxError, parse_module
from meshwright.sharding.hlo_cost import ProgramCost, cost_of
from meshwright.sharding.hlo_cycles import CycleCount, cycles_of
from meshwright.sharding.links import AxisLink, axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.plan_cache import cache_key, compiler_facts, lookup, store
from meshwright.sharding.plan_warnings import PlanFacts, warnings_of
from meshwright.sharding.planned import (
    AxisTraffic,
    Collective,
    ComputeEstimate,
    MemoryEstimate,
    Origin,
    PlanReport,
    StepEstimate,
)
from meshwright.sharding.slices import check_layout, check_topology
from meshwright.sharding.step_time import PUBLISHED, MeasuredRates, step_time_of
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

__all__ = [
    "ProgramReading",
    "StepFacts",
    "analyze",
    "compile_once",
    "compiled_memory",
    "compute_and_time",
    "has_narrow_floats",
    "judged",
    "provenance_of",
    "read_program",
    "traffic_of",
]

_NARROW = re.compile(r"\b(?:bf16|f16|f8\w*)\[")


@dataclass(frozen=True)
class ProgramReading:
    """What the text of a compiled program says.

    Attributes:
        collectives: all of them.
        cost: work; None where the text could not be read.
        cycles: the TPU compiler's own estimates; None elsewhere.
        unread: what could not be read, in sentences.
        narrow: whether any array of it has elements of floating point under 32 bits.
    """

    collectives: tuple[Collective, ...] = ()
    cost: ProgramCost | None = None
    cycles: CycleCount | None = None
    unread: tuple[str, ...] = ()
    narrow: bool = False


@dataclass(frozen=True)
class StepFacts:
    """What only the owner of a step knows about it; all of it optional.

    Attributes:
        model: name and settings, for the report.
        tokens: a step's tokens, over all devices.
        model_flops, model_flops_causal: of a step, over all devices; see `ComputeEstimate`.
        lower_bounds: bytes by axis; see `AxisTraffic`.
        leaf_of: names what a collective moves; see `collectives_of`.
        rates: fractions of the data sheet's rates.
        dtype: of the matmuls, for utilisation; as `Chip.peak_flops` names it.
        deferrable: of a step with several microbatches, the axes over which its gradients could
            wait to be reduced until all are summed.
    """

    model: Mapping[str, Any]
    tokens: int | None = None
    model_flops: float | None = None
    model_flops_causal: float | None = None
    lower_bounds: Mapping[str, float] | None = None
    leaf_of: LeafOf | None = None
    rates: MeasuredRates = PUBLISHED
    dtype: str = "bf16"
    deferrable: frozenset[str] = frozenset()


def compile_once(
    topology: Topology, question: Mapping[str, Any], compile_it: Callable[[], CompiledProgram]
) -> CompiledProgram:
    """A compiled program from the plan cache, or compiled now and kept there.

    Args:
        topology: it is compiled for.
        question: all else the program depends on, as JSON values; versions, flags and our own
            sources are added.
        compile_it: called where the cache does not know it.
    """
    key = cache_key({**compiler_facts(topology), **question})
    known = lookup(key)
    if known is not None:
        refused = known["out_of_memory"]
        known["out_of_memory"] = OutOfMemory(**refused) if refused else None
        return CompiledProgram(**known)
    program = compile_it()
    store(key, dataclasses.asdict(program))
    return program


def judged(
    memory: MemoryEstimate, compiled: CompiledProgram
) -> tuple[MemoryEstimate, tuple[str, ...]]:
    """Memory that a verdict may be read from, and what to say where it may not.

    A program compiled at low effort has a peak up to a tenth off, and compilers accept some at
    low effort that they refuse in full; so it goes without the limit to be judged by.
    """
    if not compiled.quick:
        return memory, ()
    limit = f"; the limit is {format_bytes(memory.limit_bytes)}" if memory.limit_bytes else ""
    said = f"fits: compiled at low effort, which gives no verdict{limit}"
    return replace(memory, limit_bytes=None), (said,)


def read_program(
    compiled: CompiledProgram, mesh: MeshSpec, topology: Topology, leaf_of: LeafOf | None = None
) -> ProgramReading:
    """Read the text of a compiled program; what cannot be read is said in ``unread``.

    Args:
        compiled: with its text or without.
        mesh: it was compiled for.
        topology: it was compiled for.
        leaf_of: see `collectives_of`.
    """
    if compiled.text is None:
        why = compiled.text_error or "the compiler gave no program"
        return ProgramReading(unread=(f"collectives, traffic, flops and time: {why}",))
    try:
        module = parse_module(compiled.text)
        slices = topology.slices if topology.kind == "tpu" else 1
        simulated = topology.kind == "cpu"
        found = collectives_of(module, mesh, slices=slices, leaf_of=leaf_of, simulated=simulated)
    except HloSyntaxError as error:
        return ProgramReading(unread=(f"collectives, traffic, flops and time: {error}",))
    cost = cost_of(module)
    cycles = cycles_of(module) if topology.kind == "tpu" else None
    return ProgramReading(
        found.collectives,
        cost,
        cycles,
        (*found.unread, *cost.unread, *(cycles.unread if cycles else ())),
        has_narrow_floats(compiled.text),
    )


def has_narrow_floats(text: str) -> bool:
    """Whether a compiled program has floating point under 32 bits, which CPU compilers widen."""
    return _NARROW.search(text) is not None


def traffic_of(
    collectives: Sequence[Collective],
    mesh: MeshSpec,
    bounds: Mapping[str, float] | None = None,
    links: Mapping[str, AxisLink] | None = None,
    fraction: float = 1.0,
) -> dict[str, AxisTraffic]:
    """Wire bytes by mesh axis beside the least there could be.

    Bytes of a collective over several axes are shared out as `wire_by_axis` says.

    Args:
        collectives: of the step.
        mesh: filled mesh.
        bounds: bytes by axis; None where nobody knows.
        links: by axis; None without hardware.
        fraction: of the links' bandwidth that is reached.
    """
    traffic = {}
    for axis, wire in wire_by_axis(collectives, mesh.sizes).items():
        link = links.get(axis) if links else None
        rate = link.bandwidth * fraction if link and mesh.sizes[axis] > 1 else None
        traffic[axis] = AxisTraffic(
            wire_bytes=round(wire),
            lower_bound_bytes=bounds.get(axis) if bounds is not None else None,
            bandwidth=rate,
            seconds=wire / rate if rate else None,
        )
    return traffic


def compute_and_time(
    reading: ProgramReading,
    facts: StepFacts,
    mesh: MeshSpec,
    topology: Topology,
    links: Mapping[str, AxisLink] | None,
) -> tuple[ComputeEstimate, StepEstimate]:
    """Work and seconds of a program that was read; unknown without its text or a known chip."""
    if reading.cost is None:
        unknown = ComputeEstimate(None, facts.model_flops, facts.model_flops_causal, None, None)
        return unknown, StepEstimate(None, None)
    return step_time_of(
        reading.cost,
        reading.cycles,
        reading.collectives,
        chip_of(topology),
        links or {},
        model_flops=facts.model_flops,
        model_flops_causal=facts.model_flops_causal,
        tokens=facts.tokens,
        devices=mesh.device_count,
        dtype=facts.dtype,
        rates=facts.rates,
    )


def analyze(
    jitted: Any,
    *abstract_args: Any,
    mesh: Mesh | AbstractMesh | MeshSpec,
    topology: Topology | str | None = None,
    facts: StepFacts | None = None,
    quick: bool = False,
) -> PlanReport:
    """Compile a step for hardware that is not here and report what it will hold, move and take.

    Args:
        jitted: what ``jax.jit`` returned; its shardings on any mesh of the right axes, of
            simulated devices or abstract.
        abstract_args: arrays or ``jax.ShapeDtypeStruct``, with shardings or without.
        mesh: axes and sizes, as the step names them.
        topology: hardware, such as ``v5p:4x4x4`` or ``h100:8x8``; None for as many simulated CPU
            devices as the mesh has, for a look at the collectives alone.
        facts: what the program's text cannot say, such as its model FLOPs.
        quick: compile at low effort (TPU): no verdict.

    Raises:
        TopologyError, MeshError: hardware that does not exist, a mesh it cannot hold.
        MissingExtraError: no compiler for it is installed.
        ConfigError: ``jitted`` is not what ``jax.jit`` returns, or calls back into Python.
        CompileError: the compiler gave no program.
    """
    from meshwright.sharding.aot_step import compile_lowered_step, lower_step

    spec = mesh if isinstance(mesh, MeshSpec) else MeshSpec.of(mesh)
    chosen = f"cpu:{spec.device_count}" if topology is None else topology
    target = Topology.parse(chosen) if isinstance(chosen, str) else chosen
    check_topology(target)
    _check_devices(spec, target)
    note = require_wheels(target)
    step = lower_step(jitted, *abstract_args, topology=target)
    compiled = compile_once(
        target,
        {"step": step.fingerprint, "mesh": str(spec), "quick": quick},
        lambda: compile_lowered_step(step, mesh=spec, topology=target, quick=quick),
    )
    known = facts or StepFacts({"name": getattr(jitted, "__name__", "step")})
    return _report(compiled, spec, target, known, note, _changing(abstract_args))


def _check_devices(spec: MeshSpec, target: Topology) -> None:
    if target.device_count is None:
        raise MeshError(
            f"cannot analyze for `{target}`",
            why="it stands for whatever devices are found, and none are looked for",
            fix="name the hardware, such as v5p:4x4x4, h100:2x8 or cpu:8",
        )
    check_layout(target, spec)


def _changing(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """Paths of arguments that are Python numbers, or weakly typed like one."""
    import jax

    return tuple(
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        if isinstance(leaf, bool | int | float) or getattr(leaf, "weak_type", False)
    )


def _report(
    compiled: CompiledProgram,
    mesh: MeshSpec,
    topology: Topology,
    facts: StepFacts,
    note: str | None,
    changing: tuple[str, ...],
) -> PlanReport:
    """The report of a step of which only the program is known."""
    reading = read_program(compiled, mesh, topology, facts.leaf_of)
    simulated = topology.kind == "cpu"
    links = None if simulated else axis_links(topology, mesh)
    traffic = {}
    if not simulated:
        traffic = traffic_of(
            reading.collectives, mesh, facts.lower_bounds, links, facts.rates.links
        )
    flops, time = compute_and_time(reading, facts, mesh, topology, links)
    memory = compiled_memory(compiled, chip_of(topology), simulated=simulated)
    memory, verdict = judged(memory, compiled)
    # Wheels that do not pair are worth a word where they cost figures.
    notes = (*((note,) if note and reading.cost is None else ()), *verdict)
    return PlanReport(
        topology=str(topology),
        mesh=mesh.sizes,
        model=facts.model,
        memory=memory,
        collectives=reading.collectives,
        traffic=traffic,
        flops=flops,
        time=time,
        warnings=warnings_of(
            PlanFacts(
                reading.collectives,
                mesh,
                topology,
                chatter=compiled.chatter,
                links=links,
                compute_seconds=time.compute_seconds,
                # Whoever computes in float32 means to send it.
                compute_itemsize=2 if reading.cost and "bf16" in reading.cost.matmul_flops else 4,
                changing=changing,
                deferrable=facts.deferrable,
            )
        ),
        decisions=(),
        provenance=provenance_of(compiled, topology, reading, facts.rates),
        unread=(*notes, *reading.unread),
    )


def compiled_memory(
    compiled: CompiledProgram, chip: Chip | None, *, simulated: bool
) -> MemoryEstimate:
    """Memory as the compiler lays it out; arguments cannot be told apart without their owner."""
    limit = chip.limit_bytes if chip else None
    refused = compiled.out_of_memory
    if refused:
        return MemoryEstimate(0, 0, 0, 0, 0, 0, refused.needed_bytes, refused.limit_bytes)
    arguments = compiled.argument_bytes or 0
    peak = None if simulated else compiled.peak_bytes
    rest = max((peak or 0) - arguments, 0)
    return MemoryEstimate(
        parameters_bytes=arguments,
        gradients_bytes=0,
        optimizer_bytes=0,
        batch_bytes=0,
        activations_bytes=0,
        temporaries_bytes=rest,
        peak_bytes=peak,
        limit_bytes=limit,
        contributors=(("arguments", arguments), ("all else at the peak", rest)),
    )


def provenance_of(
    compiled: CompiledProgram,
    topology: Topology,
    reading: ProgramReading,
    rates: MeasuredRates = PUBLISHED,
) -> dict[str, tuple[Origin, str]]:
    """Where each figure of a compiled report comes from."""
    by = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    effort = " at low effort: no verdict" if compiled.quick else ""
    how = f"{by}{effort}"
    if topology.kind == "cpu":
        cannot = "a CPU program: proves which collectives there are, not their bytes or memory"
        return {
            "memory.peak_bytes": ("unknown", cannot),
            "collectives": ("compiler", cannot),
            "collectives.bytes": (
                ("unknown", "CPU compilers widen floating point under 32 bits before they send it")
                if reading.narrow
                else ("compiler", f"{how}; nothing in the program is under 32 bits wide")
            ),
            "traffic": ("unknown", cannot),
            "flops.device_flops": ("compiler", how),
            "time": ("unknown", "no rates for simulated devices"),
        }
    cycles = reading.cycles is not None and reading.cycles.known
    measured = rates != PUBLISHED
    whose = "measured rates" if measured else "the data sheet's rates"
    text: Origin = "unknown" if reading.cost is None else "compiler"
    return {
        "memory.peak_bytes": ("compiler", how),
        "collectives": (text, how),
        "traffic": (text, how),
        "traffic.lower_bound_bytes": ("formula", "meshwright.sharding.bounds"),
        "flops": (text, how),
        "flops.model_flops": ("formula", "6Ψ + 12LNHs a token"),
        "time.compute_seconds": (
            (text, "the compiler's cycles, attention kernels by formula")
            if cycles
            else ("calibration" if measured else "formula", f"compiled FLOPs at {whose}")
        ),
        "time": (
            "calibration" if measured else "data sheet",
            f"compiled bytes at {whose}; unvalidated",
        ),
    }
