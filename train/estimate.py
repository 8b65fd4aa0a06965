"""What a plan will hold, move, compute and take, from shapes alone: the figures before a compile.

`estimate` fills the dataclasses of `meshwright.sharding.planned` for a train step by closed forms:
memory (`estimate_memory`), traffic (`estimate_traffic`), FLOPs and time (`estimate_time`). It
imports neither jax nor numpy and works a few thousand times a second on one core, so that ten
thousand candidate plans can be ranked and the best few compiled; its lower bounds are the ones
that a compiled report is measured against.

What it says of state and of FLOPs is exact. What it says of temporaries and of time is a model:
a compiler's own figures replace it where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import (
    AxisTraffic,
    Collective,
    ComputeEstimate,
    MemoryEstimate,
    StepEstimate,
)
from meshwright.sharding.rules import Rules
from meshwright.sharding.step_time import PUBLISHED, MeasuredRates
from meshwright.train.config import TrainConfig
from meshwright.train.estimate_memory import MARGIN, memory_of
from meshwright.train.estimate_placement import place
from meshwright.train.estimate_time import compute_of, time_of, work_of
from meshwright.train.estimate_traffic import by_axis, expected_collectives

if TYPE_CHECKING:
    from meshwright.sharding.chips import Chip
    from meshwright.sharding.links import AxisLink

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """Everything the closed forms say of one plan.

    Attributes:
        memory: bytes of a device; state exact, temporaries and peak modelled.
        collectives: what the step should put on the wire, alike ones together.
        traffic: by mesh axis.
        flops: compute and memory traffic.
        time: of a step.
    """

    memory: MemoryEstimate
    collectives: tuple[Collective, ...]
    traffic: Mapping[str, AxisTraffic]
    flops: ComputeEstimate
    time: StepEstimate


def estimate(
    config: TrainConfig,
    mesh: MeshSpec,
    rules: Rules,
    chip: Chip | None,
    links: Mapping[str, AxisLink] | None,
    *,
    compute_itemsize: int,
    fused_attention: bool,
    rates: MeasuredRates = PUBLISHED,
    margin: float = MARGIN,
) -> Estimate:
    """Estimate a train step without compiling or tracing it.

    Args:
        config: the run.
        mesh: filled mesh.
        rules: from `meshwright.train.parallelism.choose_rules`.
        chip: what the mesh is made of; None leaves limit and seconds unknown.
        links: by axis, from `meshwright.sharding.links.axis_links`; None likewise.
        compute_itemsize: bytes of an element of the compute dtype.
        fused_attention: whether attention is one kernel that never stores its scores; see
            `meshwright.train.attention`.
        rates: measured on such a chip; else its data sheet's.
        margin: part of the predicted peak that is added to it, so that ``memory.fits`` is a careful
            verdict; 0 for the bare prediction, to rank by or to compare with a compiler's.

    Raises:
        PlacementError: the batch or a leaf cannot be split as the mesh asks.

    >>> from meshwright.models.config import named
    >>> from meshwright.train.parallelism import choose_rules
    >>> config = TrainConfig(named("llama3-8b"), batch_size=64, seq_len=4096)
    >>> mesh = MeshSpec.parse("fsdp=64")
    >>> found = estimate(config, mesh, choose_rules(config, mesh), None, None,
    ...                  compute_itemsize=2, fused_attention=True)
    >>> found.memory.optimizer_bytes // found.memory.parameters_bytes  # two moments a parameter
    2
    """
    placement = place(config, mesh, rules)
    kind = chip.kind if chip else "tpu"
    how: dict[str, Any] = {"itemsize": compute_itemsize, "fused_attention": fused_attention}
    collectives = expected_collectives(placement, compute_itemsize, chip.kind if chip else None)
    # Everything expected is needed: the two differ once a compiler has had its say.
    traffic = {
        axis: _traffic(sent, links.get(axis) if links else None, rates)
        for axis, sent in by_axis(placement, collectives).items()
    }
    work = work_of(placement, **how, kind=kind)
    time = time_of(
        placement, work, collectives, chip, links, itemsize=compute_itemsize, rates=rates
    )
    memory = memory_of(placement, **how, chip=chip, margin=margin)
    return Estimate(memory, collectives, traffic, compute_of(placement, work), time)


def _traffic(sent: float, link: AxisLink | None, rates: MeasuredRates) -> AxisTraffic:
    if link is None:
        return AxisTraffic(round(sent), sent)
    bandwidth = link.bandwidth * rates.links
    return AxisTraffic(round(sent), sent, bandwidth, sent / bandwidth)
