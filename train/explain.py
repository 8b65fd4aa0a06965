"""``meshwright explain``: where everything would live, for any size of model, without devices.

Shapes come from `jax.eval_shape`, specs from the rules; nothing is allocated and no backend is
started unless the topology is ``local``, so a 405B model on thousands of devices takes as long as
a small one: the time is jax's import.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from meshwright.models.config import count_parameters
from meshwright.models.pure import Functional, functional
from meshwright.sharding.decisions import Decisions
from meshwright.sharding.decisions_page import decisions_html
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.report import decision_json, decisions_table, spec_json
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes
from meshwright.train.config import TrainConfig
from meshwright.train.layout import Layout, resolve_layout
from meshwright.train.optimizer import make_optimizer
from meshwright.train.outfiles import check_writable, write_text
from meshwright.train.parallelism import check_batch, choose_mesh, choose_places, choose_rules
from meshwright.train.state import abstract_state

__all__ = [
    "Totals",
    "decisions_json",
    "explain",
    "explain_html",
    "explain_json",
    "gradients_of",
    "layout_of",
    "totals_of",
]

_SCHEMA = "meshwright.explain/1"


@dataclass(frozen=True)
class Totals:
    """Bytes on each device.

    Attributes:
        parameters_bytes: float32 masters.
        working_bytes: the compute-dtype copy of those whose working layout differs.
        gradients_bytes: float32 accumulators; without accumulation, gradients as they reach
            the optimizer.
        optimizer_bytes: moments and counters.
    """

    parameters_bytes: int
    working_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def state_bytes(self) -> int:
        """Sum of all four."""
        return (
            self.parameters_bytes + self.working_bytes + self.gradients_bytes + self.optimizer_bytes
        )


def layout_of(config: TrainConfig, model: Functional, mesh: MeshSpec) -> Layout:
    """Resolve a config on a filled mesh; shapes only.

    Raises:
        RulesError, PlacementError: what cannot be placed.
    """
    rules = choose_rules(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps, model.dims)
    shapes = abstract_state(model.init, optimizer)
    return resolve_layout(model.shapes, model.dims, shapes.opt_state, rules, mesh)


def gradients_of(layout: Layout, grad_accum: int) -> Decisions:
    """Where gradients are held: the accumulator's layout, or the masters' where there is none."""
    return layout.reduced if grad_accum > 1 else layout.masters


def totals_of(layout: Layout, *, grad_accum: int, compute_itemsize: int) -> Totals:
    """Sum the decisions per device.

    Args:
        layout: resolved.
        grad_accum: microbatches a step; with one there is no accumulator.
        compute_itemsize: bytes of an element of the working copy.
    """
    working = sum(
        work.bytes_per_device * compute_itemsize // work.leaf.dtype.itemsize
        for work, master in zip(layout.working, layout.masters, strict=True)
        if work.spec != master.spec
    )
    gradients = gradients_of(layout, grad_accum)
    return Totals(
        parameters_bytes=layout.masters.bytes_per_device,
        working_bytes=working,
        gradients_bytes=gradients.bytes_per_device,
        optimizer_bytes=layout.moments.bytes_per_device,
    )


def explain(config: TrainConfig, json_path: str | None = None, html_path: str | None = None) -> int:
    """Print the decisions and totals of a config to stdout.

    Args:
        config: of the run asked about.
        json_path: a file to write them to as JSON.
        html_path: a file to write them to as a page.

    Returns:
        The exit code, 0.

    Raises:
        MeshwrightError: bad input, or a file that cannot be written.
    """
    from rich.console import Console

    files = check_writable({"json": json_path, "html": html_path})
    topology, mesh = _mesh_without_devices(config)
    model = functional(config.model, choose_places(config, mesh))
    layout = layout_of(config, model, mesh)
    itemsize = 4 if config.dtype == "float32" else 2
    totals = totals_of(layout, grad_accum=config.grad_accum, compute_itemsize=itemsize)
    if "json" in files:
        document = explain_json(config, str(topology), layout, totals)
        write_text(files["json"], json.dumps(document, indent=2) + "\n")
    if "html" in files:
        write_text(files["html"], explain_html(config, str(topology), layout, totals))
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 160)
    console.print(
        f"{config.model.name}: {count_parameters(config.model):,} parameters on {topology}, "
        f"mesh {mesh}",
        highlight=False,
    )
    console.print(decisions_table("", _tables(layout, config.grad_accum)))
    console.print(_totals_text(totals, config), highlight=False)
    try:
        check_batch(config, layout.rules, mesh)
    except PlacementError as error:
        print(f"note: training with these flags would be refused:\n{error}", file=sys.stderr)
    return 0


def explain_json(
    config: TrainConfig, topology: str, layout: Layout, totals: Totals
) -> dict[str, Any]:
    """The same as a JSON document, ``schema`` first; specs list each dim's axes."""
    return {
        "schema": _SCHEMA,
        "model": config.model.name,
        "parameters": count_parameters(config.model),
        "topology": topology,
        "mesh": layout.mesh.sizes,
        "strategies": [f"{name}({axis})" for name, axis in layout.rules.strategies],
        "per_device": {
            "parameters_bytes": totals.parameters_bytes,
            "working_bytes": totals.working_bytes,
            "gradients_bytes": totals.gradients_bytes,
            "optimizer_bytes": totals.optimizer_bytes,
            "state_bytes": totals.state_bytes,
        },
        "decisions": decisions_json(layout, config.grad_accum),
        "optimizer_state": [decision_json(decision) for decision in layout.moments],
    }


def explain_html(config: TrainConfig, topology: str, layout: Layout, totals: Totals) -> str:
    """The same as a page, with where the optimizer's state lives."""
    held = [(name, size, what) for name, size, what in _held(totals, config) if size]
    return decisions_html(
        [*_tables(layout, config.grad_accum), ("optimizer state", layout.moments)],
        title=config.model.name,
        mesh=layout.mesh,
        topology=topology,
        holds=held,
    )


def decisions_json(layout: Layout, grad_accum: int) -> list[dict[str, Any]]:
    """The decision on each parameter as JSON, with its spec in each role."""
    rows = []
    gradients = gradients_of(layout, grad_accum)
    for index, decision in enumerate(layout.masters):
        working, reduced = layout.working.decisions[index], gradients.decisions[index]
        row = decision_json(decision)
        row["rule"] = working.rule if working.spec else decision.rule
        row["reason"] = working.reason if working.spec else decision.reason
        row["specs"] = {
            "params": spec_json(working.spec),
            "gradients": spec_json(reduced.spec),
            "optimizer": spec_json(decision.spec),
        }
        del row["spec"]
        rows.append(row)
    return rows


def _mesh_without_devices(config: TrainConfig) -> tuple[Topology, MeshSpec]:
    """Topology and filled mesh without starting a backend, but for ``local``.

    ``auto`` counts as eight simulated devices, or as many as a fully sized mesh asks for.
    """
    topology = Topology.parse(config.topology)
    if topology.kind == "local":
        devices = topology.devices()
        simulated = devices[0].platform == "cpu"
        return topology, choose_mesh(config, len(devices), simulated=simulated)
    if topology.kind == "auto":
        spec = None if config.mesh == "auto" else MeshSpec.parse(config.mesh)
        sized = spec.device_count if spec and -1 not in spec.sizes.values() else 8
        topology = Topology("cpu", (sized,))
    count = topology.device_count or 1
    return topology, choose_mesh(config, count, simulated=topology.kind == "cpu")


def _tables(layout: Layout, grad_accum: int) -> list[tuple[str, Decisions]]:
    """The layouts of the parameters that people are shown."""
    return [
        ("params", layout.working),
        ("gradients", gradients_of(layout, grad_accum)),
        ("optimizer", layout.masters),
    ]


def _held(totals: Totals, config: TrainConfig) -> list[tuple[str, int, str]]:
    """(name, bytes, what it is) of what a device holds."""
    return [
        ("parameters", totals.parameters_bytes, "float32 masters"),
        ("working copy", totals.working_bytes, "compute dtype, where its layout differs"),
        (
            "gradients",
            totals.gradients_bytes,
            "float32 accumulators" if config.grad_accum > 1 else "float32, as updated",
        ),
        ("optimizer", totals.optimizer_bytes, f"{config.optimizer.name} state"),
        ("together", totals.state_bytes, "without activations"),
    ]


def _totals_text(totals: Totals, config: TrainConfig) -> str:
    held = _held(totals, config)
    rows = [f"  {name:<13}{format_bytes(size):>11}  {what}" for name, size, what in held]
    return "\n".join(["a device holds:", *rows])
