"""What a plan says of itself: its decisions as text and as a page, its compiled step as a report.

The report is `meshwright.analyze` of the plan's own step, told what only the plan knows: which
leaf an array of a collective is. A weight's gather and gradient carry its name as a scope; where a
compiler has dropped it, leaves are known by their shape on a device. A shape that several leaves
share names them as `meshwright.sharding.leaf_names` does.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import PartitionSpec

from meshwright.sharding.analysis import StepFacts, analyze
from meshwright.sharding.collectives import LeafOf
from meshwright.sharding.decisions import Decisions
from meshwright.sharding.hlo import Instruction, Shape
from meshwright.sharding.leaf_names import either, sizes_of
from meshwright.sharding.planned import MemoryEstimate, PlanReport
from meshwright.sharding.report import decision_json, decisions_table
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes
from meshwright.train.outfiles import write_text
from meshwright.train.plan_leaves import local_shape
from meshwright.train.weights import scope_of

if TYPE_CHECKING:
    from meshwright.train.model_plan import Plan

__all__ = ["explained", "report_of"]

_SCOPE = re.compile(r"weight:[^/\s()]+")


def report_of(plan: Plan, topology: str | Topology | None, *, quick: bool = False) -> PlanReport:
    """Compile a plan's step for hardware and read it; see `Plan.report`."""
    several = plan.parts.how.microbatches > 1
    facts = StepFacts(
        {"name": f"a plan of a {plan.parts.dialect.name} model"},
        leaf_of=_namer(plan),
        deferrable=frozenset(plan.parts.replica_axes(plan.held["gradients"]) if several else ()),
    )
    report = analyze(
        plan.jitted,
        plan.shapes,
        plan.batch_shapes,
        mesh=plan.spec,
        topology=topology or plan.placer.described,
        facts=facts,
        quick=quick,
    )
    found = [decision_json(decision) for decision in plan.decisions]
    memory = _told_apart(plan, report.memory)
    return replace(report, decisions=tuple(found), memory=memory)


def _told_apart(plan: Plan, memory: MemoryEstimate) -> MemoryEstimate:
    """The arguments of the step as what they are: the model, the optimizer's state, the batch."""
    model, moments = plan.decisions.bytes_per_device, plan.moments.bytes_per_device
    batch = max(memory.parameters_bytes - model - moments, 0)
    contributors = (
        ("model", model),
        ("optimizer", moments),
        ("batch and counters", batch),
        *(pair for pair in memory.contributors if pair[0] != "arguments"),
    )
    return replace(
        memory,
        parameters_bytes=model,
        optimizer_bytes=moments,
        batch_bytes=batch,
        contributors=contributors,
    )


def _namer(plan: Plan) -> LeafOf:
    """Names arrays by the scope that a weight's gather and gradient carry, else by their shape."""
    by_scope: dict[str, str] = {}
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for decision in plan.decisions:
        path, shape = decision.leaf.path, decision.leaf.shape
        by_scope |= {scope_of(path): path, scope_of(f"{path}/value"): path}
        held = (decision.spec, plan.used_spec(decision), PartitionSpec())
        for local in {sizes_of(local_shape(shape, spec, plan.spec)) for spec in held}:
            by_shape[local].append(path)

    def name(instruction: Instruction, shape: Shape) -> str:
        sizes = sizes_of(shape.dims)
        scopes = dict.fromkeys(by_scope.get(one) for one in _SCOPE.findall(instruction.op_name))
        found = [path for path in scopes if path] or by_shape.get(sizes, [])
        return either(found) if sizes else ""

    return name


def explained(plan: Plan, html: str | Path | None) -> str:
    """The table of a plan's decisions; see `meshwright.train.model_plan.Plan.explain`."""
    from rich.console import Console

    if html is not None:
        _write_page(plan, Path(html))
    written = io.StringIO()
    console = Console(file=written, width=120)
    title = f"a {plan.parts.dialect.name} model on {plan.spec}"
    console.print(decisions_table(title, [("params", plan.decisions)]))
    console.print(_totals(plan), highlight=False, style="dim")
    for note in plan.rules.notes:
        console.print(f"note: {note}", highlight=False)
    return written.getvalue()


def _totals(plan: Plan) -> str:
    parts = (("model", plan.decisions), ("optimizer", plan.moments))
    told = [
        f"{name} {format_bytes(found.bytes_per_device)} of {format_bytes(found.size_bytes)}"
        for name, found in parts
    ]
    return f"a device holds {', '.join(told)}"


def _tables(plan: Plan) -> list[tuple[str, Decisions]]:
    return [
        ("params", plan.decisions),
        ("gradients", plan.gradients_at),
        ("updated as", plan.updated_at),
        ("moments", plan.moments),
    ]


def _write_page(plan: Plan, path: Path) -> None:
    from meshwright.sharding.decisions_page import decisions_html

    title = f"A {plan.parts.dialect.name} model on {plan.spec}"
    page = decisions_html(_tables(plan), title=title, mesh=plan.spec)
    write_text(path, page)
