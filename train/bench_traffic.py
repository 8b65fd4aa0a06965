"""The traffic benchmark: wire bytes of compiled steps over the least there could be.

``meshwright bench traffic`` compiles our own plans for hardware that is not here, one process at a
time, and prints for each mesh axis what the compiled program sends over what the plan must send at
least. A ratio of 1 is a step that moves nothing twice. Compiled programs are cached, so another run
only reads them. It takes the flags of ``train`` for what all plans share; ``--topology`` keeps the
plans of that chip alone. Topologies whose compiler is not installed are left out, and said so.

A pipeline's ticks without work send as well, so its ratio is (m + p - 1) / m at least for m
microbatches through p stages (vm for m where v groups of layers are interleaved); the plans have
enough of them that this is below 1.05. Dropless experts have a plan where tokens are gathered: how
much ragged messages move, a program's text does not tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

from meshwright.models.config import Remat, named
from meshwright.sharding.errors import MissingExtraError
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.schedule import ScheduleKind
from meshwright.sharding.token_layout import ContextKind
from meshwright.sharding.topology import Topology
from meshwright.train.config import TrainConfig, Zero
from meshwright.train.run_plan import RunPlan

__all__ = ["PLANS", "Compilable", "Planned", "compiled", "traffic", "words_of"]


class Compilable(Protocol):
    """A plan of a benchmark."""

    @property
    def topology(self) -> str:
        """Hardware to compile for."""
        ...

    def config(self, base: TrainConfig) -> TrainConfig:
        """The run, other settings as ``base`` has them."""
        ...


_Plan = TypeVar("_Plan", bound=Compilable)


@dataclass(frozen=True)
class Planned:
    """A plan of a benchmark: hardware, mesh, model and batch, and settings of `TrainConfig`.

    Attributes:
        topology, mesh: as they are written.
        model: its name.
        batch_size, seq_len: rows of a step, tokens of a row.
        remat, grad_accum, zero, sequence: as in the configuration.
        context: how attention crosses a context axis.
        schedule: of a pipeline; interleaved ones and v-shapes have two groups of layers a stage.
        capacity_factor: of experts; None drops no token.
        layers, vocab_size: other than the named model's; None as they are.
    """

    topology: str
    mesh: str
    model: str
    batch_size: int
    seq_len: int = 4096
    remat: Remat = "full"
    grad_accum: int = 1
    zero: Zero = 0
    sequence: bool = False
    context: ContextKind = "ring"
    schedule: ScheduleKind = "1f1b"
    capacity_factor: float | None = None
    layers: int | None = None
    vocab_size: int | None = None

    def config(self, base: TrainConfig) -> TrainConfig:
        """The run, other settings as ``base`` has them."""
        model = named(self.model)
        experts = replace(model.experts, capacity_factor=self.capacity_factor)
        model = replace(
            model,
            remat=self.remat,
            layers=self.layers or model.layers,
            vocab_size=self.vocab_size or model.vocab_size,
            max_length=max(model.max_length, self.seq_len),
            experts=experts if model.experts.count else model.experts,
        )
        return replace(
            base,
            model=model,
            topology=self.topology,
            mesh=self.mesh,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            grad_accum=self.grad_accum,
            zero=self.zero,
            sequence=self.sequence,
            context=replace(base.context, kind=self.context),
            pipeline=replace(base.pipeline, schedule=self.schedule),
        )

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: found[field.name]
            for field in fields(self)
            if found[field.name] != field.default
        }


def words_of(plan: Planned) -> str:
    """A plan in one line of a table."""
    known = ("topology", "mesh", "model", "batch_size", "seq_len")
    more = [
        name if value is True else f"{name} {value}"
        for name, value in plan.settings().items()
        if name not in known
    ]
    batch = f"{plan.batch_size} x {plan.seq_len}"
    return f"{plan.topology:<11}{plan.mesh:<26}{plan.model:<14}{batch:<12}{', '.join(more):<34}"


PLANS = (
    Planned("h100:1x8", "data=8", "llama-1b", 16, 2048),
    Planned("h100:1x8", "data=8", "llama-1b", 16, 2048, zero=1),
    Planned("h100:1x8", "data=8", "llama-1b", 64, 2048, grad_accum=4, zero=1),
    Planned("h100:1x8", "data=8", "llama-1b", 16, 2048, zero=2),
    Planned("h100:1x8", "data=8", "llama-1b", 64, 2048, grad_accum=4, zero=2),
    Planned("h100:1x8", "fsdp=8", "llama-1b", 16, 2048),
    Planned("h100:1x8", "tensor=8", "llama-1b", 8, 2048),
    Planned("h100:1x8", "tensor=8", "llama-1b", 8, 2048, sequence=True),
    Planned("h100:1x8", "context=8", "llama-1b", 8, 16_384),
    Planned("h100:1x8", "context=8", "llama-1b", 8, 16_384, context="gather"),
    Planned("h100:1x8", "context=8", "llama-1b", 4, 16_384, context="ulysses"),
    Planned("h100:1x4", "stage=4", "llama-1b", 64, grad_accum=64),
    Planned("h100:1x4", "stage=4", "llama-1b", 64, grad_accum=64, schedule="gpipe"),
    Planned("h100:1x4", "stage=4", "llama-1b", 32, grad_accum=32, schedule="interleaved"),
    Planned("h100:1x4", "stage=4", "llama-1b", 96, grad_accum=96, schedule="v-shape"),
    Planned("h100:2x8", "expert=8,fsdp=2", "mixtral-8x7b", 16, capacity_factor=1.25),
    Planned("h100:2x8", "stage=2,tensor=8", "llama3-8b", 32, grad_accum=32, sequence=True),
    Planned("h100:8x8", "fsdp=64", "llama3-8b", 64, 2048),
    Planned("h100:8x8", "data=8,fsdp=8", "llama3-8b", 64, 2048),
    Planned("h100:8x8", "fsdp=8,tensor=8", "llama3-8b", 64, 2048),
    Planned("h100:8x8", "data=4,fsdp=8,tensor=2", "llama3-8b", 64),
    Planned("h100:8x8", "fsdp=8,context=8", "llama3-8b", 8, 65_536),
    Planned("h100:8x8", "fsdp=8,context=8", "llama3-8b", 8, 16_384, context="ulysses"),
    Planned("h100:8x8", "fsdp=8,expert=8", "mixtral-8x7b", 64, capacity_factor=1.25),
    Planned("h100:8x8", "fsdp=8,expert=8", "qwen3-30b-a3b", 64, capacity_factor=1.25),
    Planned("h100:8x8", "fsdp=16,expert=4", "qwen3-30b-a3b", 64),
    Planned("h100:32x8", "fsdp=32,tensor=8", "llama3-70b", 256, 2048),
    Planned("h100:32x8", "stage=4,fsdp=8,tensor=8", "llama3-70b", 512, grad_accum=64,
            sequence=True),
    Planned("v5e:2x4", "data=8", "llama-1b", 16, 1024),
    Planned("v5e:2x4", "data=8", "llama-1b", 16, 1024, zero=1),
    Planned("v5e:2x4", "data=8", "llama-1b", 16, 1024, zero=2),
    Planned("v5e:2x4", "fsdp=8", "llama-1b", 32, 2048),
    Planned("v5e:2x4", "tensor=8", "llama-1b", 16, 2048),
    Planned("v5e:2x4", "tensor=8", "llama-1b", 16, 2048, sequence=True),
    Planned("v5e:2x4", "context=8", "llama-1b", 8, 16_384),
    Planned("v5e:2x4", "stage=4,data=2", "llama-1b", 64, grad_accum=32),
    Planned("v5e:16x16", "data=16,fsdp=16", "llama3-8b", 256),
    Planned("v5e:16x16", "fsdp=32,tensor=8", "llama3-8b", 256),
    Planned("v5e:16x16", "fsdp=256", "llama3-8b", 512),
    Planned("v5e:16x16", "fsdp=32,tensor=8", "llama3-70b", 128),
    Planned("v5e:4x4*2", "data=2,fsdp=16", "llama3-8b", 64),
    Planned("v5p:4x4x4", "data=16,fsdp=4", "llama-1b", 256),
    Planned("v5p:4x4x4", "data=4,fsdp=4,tensor=4", "llama3-8b", 128),
    Planned("v5p:4x4x4", "fsdp=16,tensor=4", "llama3-8b", 128),
    Planned("v5p:4x4x4", "fsdp=64", "llama3-8b", 256),
    Planned("v5p:4x4x8", "fsdp=16,tensor=8", "llama3-70b", 64),
)  # fmt: skip
"""1B to 70B, every strategy and hybrids; axes along one dimension of a torus, and across more."""


def traffic(config: TrainConfig) -> int:
    """Print wire bytes over the lower bound for every axis of every plan."""
    found = []
    for plan, _, report in compiled(PLANS, config):
        ratios = {axis: round(moved.ratio or 0.0, 3) for axis, moved in report.traffic.items()}
        found.append({**plan.settings(), "ratios": ratios, "fits": report.fits})
        words = ", ".join(f"{axis} {ratio:.3f}" for axis, ratio in ratios.items())
        print(f"{words_of(plan)}{words}", file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "traffic", "plans": found}), file=sys.stdout)
    return 0


def compiled(
    plans: Iterable[_Plan], config: TrainConfig
) -> Iterator[tuple[_Plan, RunPlan, PlanReport]]:
    """Compile plans, one at a time; those of a compiler that is not installed are left out.

    Args:
        plans: of them, those of the chip of ``config`` where it names one.
        config: what they share.
    """
    chip = None if config.topology == "auto" else Topology.parse(config.topology).chip
    missing: set[str] = set()
    for plan in plans:
        topology = Topology.parse(plan.topology)
        if topology.kind in missing or chip not in (None, topology.chip):
            continue
        run = RunPlan.of(plan.config(config))
        try:
            yield plan, run, run.compile()
        except MissingExtraError as error:
            missing.add(topology.kind)
            print(f"left out: {error}", file=sys.stderr, flush=True)
