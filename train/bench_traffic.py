"""The traffic benchmark: wire bytes of compiled steps over the least there could be.

``meshwright bench traffic`` compiles our own plans for hardware that is not here, one process at a
time, and prints for each mesh axis what the compiled program sends over what the plan must send at
least. A ratio of 1 is a step that moves nothing twice. Compiled programs are cached, so another run
only reads them. It takes the flags of ``train`` for what all plans share; ``--topology`` keeps the
plans of that chip alone. Topologies whose compiler is not installed are left out, and said so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.models.config import named
from meshwright.sharding.errors import MissingExtraError
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.topology import Topology
from meshwright.train.config import TrainConfig
from meshwright.train.run_plan import RunPlan

__all__ = ["PLANS", "Planned", "traffic"]


@dataclass(frozen=True)
class Planned:
    """One plan of the benchmark."""

    topology: str
    mesh: str
    model: str
    batch_size: int
    seq_len: int = 4096


PLANS = (
    Planned("h100:1x8", "data=8", "llama-1b", 16, 2048),
    Planned("h100:1x8", "fsdp=8", "llama-1b", 16, 2048),
    Planned("h100:1x8", "tensor=8", "llama-1b", 8, 2048),
    Planned("h100:8x8", "fsdp=64", "llama3-8b", 64, 2048),
    Planned("h100:8x8", "data=8,fsdp=8", "llama3-8b", 64, 2048),
    Planned("h100:8x8", "fsdp=8,tensor=8", "llama3-8b", 64, 2048),
    Planned("h100:32x8", "fsdp=32,tensor=8", "llama3-70b", 256, 2048),
    Planned("v5e:2x4", "data=8", "llama-1b", 16, 1024),
    Planned("v5e:2x4", "fsdp=8", "llama-1b", 32, 2048),
    Planned("v5e:2x4", "tensor=8", "llama-1b", 16, 2048),
    Planned("v5e:16x16", "data=16,fsdp=16", "llama3-8b", 256),
    Planned("v5e:16x16", "fsdp=32,tensor=8", "llama3-8b", 256),
    Planned("v5e:16x16", "fsdp=256", "llama3-8b", 512),
    Planned("v5e:16x16", "fsdp=32,tensor=8", "llama3-70b", 128),
    Planned("v5p:4x4x4", "data=16,fsdp=4", "llama-1b", 256),
    Planned("v5p:4x4x4", "data=4,fsdp=4,tensor=4", "llama3-8b", 128),
    Planned("v5p:4x4x4", "fsdp=16,tensor=4", "llama3-8b", 128),
    Planned("v5p:4x4x4", "fsdp=64", "llama3-8b", 256),
    Planned("v5p:4x4x8", "fsdp=16,tensor=8", "llama3-70b", 64),
)
"""1B to 70B; an axis along one dimension of a torus, and axes across several."""


def traffic(config: TrainConfig) -> int:
    """Print wire bytes over the lower bound for every axis of every plan."""
    asked = None if config.topology == "auto" else Topology.parse(config.topology).chip
    found = []
    for plan, report in _reports(config, asked):
        ratios = {axis: round(moved.ratio or 0.0, 3) for axis, moved in report.traffic.items()}
        found.append({**plan.__dict__, "ratios": ratios, "fits": report.fits})
        words = ", ".join(f"{axis} {ratio:.3f}" for axis, ratio in ratios.items())
        print(f"{plan.topology:<11}{plan.mesh:<24}{plan.model:<12}{words}", file=sys.stderr)
    print(json.dumps({"benchmark": "traffic", "plans": found}), file=sys.stdout)
    return 0


def _reports(config: TrainConfig, chip: str | None) -> Iterator[tuple[Planned, PlanReport]]:
    missing: set[str] = set()
    for plan in PLANS:
        topology = Topology.parse(plan.topology)
        if topology.kind in missing or chip not in (None, topology.chip):
            continue
        run = replace(
            config,
            model=replace(named(plan.model), remat="full"),
            topology=plan.topology,
            mesh=plan.mesh,
            batch_size=plan.batch_size,
            seq_len=plan.seq_len,
            grad_accum=1,
        )
        try:
            yield plan, RunPlan.of(run).compile()
        except MissingExtraError as error:
            missing.add(topology.kind)
            print(f"left out: {error}", file=sys.stderr)
