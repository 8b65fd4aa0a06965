"""A plan: a training run on hardware that is not here, estimated or compiled, never run.

`RunPlan.of` resolves a configuration as training would: mesh, rules, layouts. Then

- `estimate` answers from shapes in milliseconds, by closed forms;
- `compile` builds the very program that training would run, in a child process with the real
  compiler for the real hardware, and reads memory, collectives and work from it.

Both return a `PlanReport`. The compiled program is cached by everything it depends on, so the same
question is answered at once the second time; where the state alone is over the limit there is
nothing to ask a compiler, and the closed forms answer. What the program should move at least, what
its leaves are called and how many FLOPs its model has come from the closed forms, so the two
reports speak of the same figures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from meshwright.models.config import count_parameters
from meshwright.models.pure import Functional, functional
from meshwright.sharding.analysis import (
    StepFacts,
    compile_once,
    compute_and_time,
    judged,
    provenance_of,
    read_program,
    traffic_of,
)
from meshwright.sharding.aot import run_child
from meshwright.sharding.aot_program import CompiledProgram, compile_lowered
from meshwright.sharding.aot_wheels import require_wheels, wheels
from meshwright.sharding.chips import chip_of
from meshwright.sharding.decisions import axes_of
from meshwright.sharding.links import AxisLink, axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.plan_warnings import PlacedLeaf, PlanFacts, warnings_of
from meshwright.sharding.planned import Collective, MemoryEstimate, Origin, PlanReport
from meshwright.sharding.rules import Rules
from meshwright.sharding.slices import check_layout, check_topology
from meshwright.sharding.step_time import PUBLISHED, MeasuredRates
from meshwright.sharding.topology import Topology
from meshwright.train.attention import kernel_of
from meshwright.train.config import TrainConfig
from meshwright.train.estimate import Estimate, estimate
from meshwright.train.estimate_memory import MARGIN
from meshwright.train.estimate_traffic import lower_bounds
from meshwright.train.explain import decisions_json, layout_of
from meshwright.train.layout import Layout
from meshwright.train.parallelism import (
    check_batch,
    choose_mesh,
    choose_places,
    choose_rules,
    choose_schedule,
)
from meshwright.train.plan_leaves import check_leaves, leaf_namer, local_shape
from meshwright.train.program import Program, step_spec

__all__ = ["RunPlan", "compile_in_child"]

_TIMEOUT_SECONDS = 1800.0
_WITHOUT_CUDNN = (
    "cuDNN is not installed here, so attention was compiled as matmuls: memory and time are more "
    "than on the GPU, where it is one kernel that keeps no scores "
    "(pip install 'meshwright[cuda]' to plan with it)"
)
_EMBEDDING = "embedding"  # whose rows travel to the tokens where that is less
# Settings that no program depends on: two runs that differ in these alone share a plan. Of the
# data one counts, and it goes back in: masked documents are two more arrays of a batch.
_NOT_COMPILED = (
    "topology", "mesh", "out", "resume", "seed", "data", "log_every", "eval_every",
    "eval_batches", "checkpoint_every", "keep_last", "keep_best", "profile_steps", "tensorboard",
    "sample_tokens", "sample_prompt", "compilation_cache",
)  # fmt: skip


@dataclass(frozen=True)
class RunPlan:
    """A resolved run on described hardware.

    Attributes:
        config: the run.
        topology: the hardware.
        mesh: filled mesh.
        rules: folded rules.
        layout: where every leaf lives.
        model: as functions.
        itemsize: bytes of an element of the compute dtype.
    """

    config: TrainConfig
    topology: Topology
    mesh: MeshSpec
    rules: Rules
    layout: Layout
    model: Functional
    itemsize: int

    @classmethod
    def of(cls, config: TrainConfig, topology: Topology | None = None) -> RunPlan:
        """Resolve a configuration on its topology, or on another one.

        Raises:
            TopologyError, MeshError: hardware that does not exist, a mesh it cannot hold.
            RulesError, PlacementError: what cannot be placed, or a batch that cannot be dealt.
        """
        target = topology or Topology.parse(config.topology)
        config = replace(config, topology=str(target))
        check_topology(target)
        simulated = target.kind == "cpu"
        mesh = choose_mesh(config, target.device_count or 1, simulated=simulated)
        check_layout(target, mesh)
        rules = choose_rules(config, mesh)
        check_batch(config, rules, mesh)
        model = functional(config.model, choose_places(config, mesh))
        layout = layout_of(config, model, mesh)
        wide = config.dtype == "float32" or (config.dtype is None and simulated)
        return cls(config, target, mesh, rules, layout, model, 4 if wide else 2)

    @property
    def links(self) -> Mapping[str, AxisLink] | None:
        """Bandwidth of each mesh axis; None for simulated devices."""
        return axis_links(self.topology, self.mesh) if chip_of(self.topology) else None

    def kernel(self, *, compiled: bool) -> str:
        """The attention kernel: of the real run, or of what can be compiled here.

        They differ where cuDNN is not installed: a GPU run would use it, a plan cannot.
        """
        kind = self.topology.kind
        here = kind != "gpu" or not compiled or _has_cudnn_wheel()
        length = self.rules.axes_for("activations", "length")
        parts = math.prod(self.mesh.sizes[axis] for axis in length)
        return kernel_of(self.config, self.rules, kind if here else "cpu", parts)

    @property
    def state_bytes(self) -> int:
        """What each device holds between steps: float32 parameters and optimizer state, exact."""
        return sum(
            decision.bytes_per_device
            for decisions in (self.layout.masters, self.layout.moments)
            for decision in decisions
        )

    @property
    def outgrows(self) -> bool:
        """Whether the state alone is over the limit, so that no compiler need be asked."""
        chip = chip_of(self.topology)
        return chip is not None and self.state_bytes > chip.limit_bytes

    def estimate(self, rates: MeasuredRates = PUBLISHED) -> PlanReport:
        """The report from shapes alone."""
        kernel = self.kernel(compiled=False)
        found = self._estimate(kernel, rates)
        known = self._facts(found.collectives, "", found.time.compute_seconds)
        return PlanReport(
            topology=str(self.topology),
            mesh=self.mesh.sizes,
            model=self._model(kernel),
            memory=found.memory,
            collectives=found.collectives,
            traffic=found.traffic,
            flops=found.flops,
            time=found.time,
            warnings=warnings_of(known),
            decisions=self._decisions(),
            provenance=_from_shapes(rates),
        )

    def compile(
        self, topology: Topology | str | None = None, *, quick: bool = False,
        rates: MeasuredRates = PUBLISHED,
    ) -> PlanReport:  # fmt: skip
        """The report of the compiled program; see `compiled`, which this costs.

        Simulated devices, whose programs say nothing of bytes, and a plan that `outgrows` its
        devices are answered from shapes.

        Args:
            topology: other hardware than the plan's, for the same run.
            quick: low effort, no verdict.
            rates: measured on such a device.
        """
        if topology is not None and str(topology) != str(self.topology):
            target = Topology.parse(topology) if isinstance(topology, str) else topology
            return RunPlan.of(self.config, target).compile(quick=quick, rates=rates)
        if self.topology.kind == "cpu" or self.outgrows:
            check_leaves(self.layout, self.topology)
            return self.estimate(rates)
        return self.report(self.compiled(quick=quick), rates)

    def compiled(self, *, quick: bool = False) -> CompiledProgram:
        """The program training would run, compiled in a child process, or from the cache.

        Raises:
            MissingExtraError: no compiler for the topology is installed.
            PlacementError: a parameter is larger than a device.
            CompileError: the compiler gave no program, for another reason than its size.
        """
        require_wheels(self.topology)
        check_leaves(self.layout, self.topology)

        def compile_it() -> CompiledProgram:
            done = run_child(
                f"{__name__}:compile_in_child",
                (self.config, self.topology, quick),
                topology=self.topology,
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            return done.value.saying(done.chatter)

        return compile_once(self.topology, {"quick": quick, "run": self._key()}, compile_it)

    def report(self, compiled: CompiledProgram, rates: MeasuredRates = PUBLISHED) -> PlanReport:
        """Read a compiled program into a report."""
        note = require_wheels(self.topology)
        namer = leaf_namer(self.config, self.layout)
        reading = read_program(compiled, self.mesh, self.topology, namer)
        kernel = self.kernel(compiled=True)
        # The margin is for verdicts, and here the compiler gives it.
        shapes = self._estimate(kernel, rates, margin=0.0)
        # At jax's default precision a TPU reads float32 matmul operands as bfloat16, and its
        # compiler may narrow before it gathers.
        least = 2 if self.topology.kind == "tpu" else self.itemsize
        bounds = lower_bounds(self.config, self.mesh, self.rules, least)
        facts = StepFacts(
            self._model(kernel),
            tokens=self.config.batch_size * self.config.seq_len,
            model_flops=shapes.flops.model_flops,
            model_flops_causal=shapes.flops.model_flops_causal,
            lower_bounds=bounds,
            rates=rates,
            dtype={2: "bf16", 4: "f32"}[self.itemsize],
        )
        read = reading.cost is not None
        flops, time = compute_and_time(reading, facts, self.mesh, self.topology, self.links)
        collectives = reading.collectives if read else shapes.collectives
        known = self._facts(collectives, compiled.chatter, time.compute_seconds)
        memory, verdict = judged(_memory(shapes.memory, compiled), compiled)
        provenance = provenance_of(compiled, self.topology, reading, rates) | _STATE
        if not read:
            peak = provenance["memory.peak_bytes"]
            provenance = {**_from_shapes(rates), "memory.peak_bytes": peak}
        return PlanReport(
            topology=str(self.topology),
            mesh=self.mesh.sizes,
            model=facts.model,
            memory=memory,
            collectives=collectives,
            traffic=traffic_of(collectives, self.mesh, bounds, self.links, rates.links)
            if read
            else shapes.traffic,
            flops=flops if read else shapes.flops,
            time=time if read else shapes.time,
            warnings=warnings_of(known),
            decisions=self._decisions(),
            provenance=provenance,
            # Wheels that do not pair are worth a word where they cost figures.
            unread=(
                *((note,) if note and not read else ()),
                *verdict,
                *reading.unread,
            ),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self.config.model.remat == "offload":
            found.append("transfers to the host's memory and back are not in the step's time")
        if self.kernel(compiled=True) != self.kernel(compiled=False):
            found.append(_WITHOUT_CUDNN)
        return tuple(found)

    def _estimate(self, kernel: str, rates: MeasuredRates, *, margin: float = MARGIN) -> Estimate:
        return estimate(
            self.config,
            self.mesh,
            self.rules,
            chip_of(self.topology),
            self.links,
            compute_itemsize=self.itemsize,
            fused_attention=kernel != "matmuls",
            rates=rates,
            margin=margin,
        )

    def _facts(
        self, collectives: Sequence[Collective], chatter: str, compute_seconds: float | None
    ) -> PlanFacts:
        """What the warnings are found in."""
        layout, config = self.layout, self.config
        # Gradients are scattered over the axes of tokens, and experts' over none they are dealt to.
        tokens = set(self.rules.token_axes()) - set(self.rules.expert_axes())
        leaves, gathers, scattered = [], {}, set[str]()
        for decision in layout.masters:
            leaf, spec = decision.leaf, decision.spec
            parts = leaf.size_bytes // max(decision.bytes_per_device, 1)
            shape = local_shape(leaf.shape, spec, self.mesh)
            leaves.append(PlacedLeaf(leaf.path, shape, leaf.dtype.itemsize, leaf.size_bytes, parts))
            scattered |= {axis for entry in spec for axis in axes_of(entry) if axis in tokens}
            stacked = bool(leaf.dims) and leaf.dims[0] == "layers"
            gathers[leaf.path] = self._uses(stacked=stacked)
        return PlanFacts(
            collectives,
            self.mesh,
            self.topology,
            chatter=chatter,
            links=self.links,
            compute_seconds=compute_seconds,
            compute_itemsize=self.itemsize,
            leaves=leaves,
            gathers=gathers,
            scattered=frozenset(scattered),
            activations=self._activations(),
            exchanged=frozenset() if config.model.tied else frozenset({_EMBEDDING}),
            accumulates=config.grad_accum > 1,
        )

    def _uses(self, *, stacked: bool) -> int:
        """How often a step needs a weight: layers forwards and backwards."""
        config, stages = self.config, self.mesh.sizes.get("stage", 1)
        if stages == 1:
            return config.grad_accum * (2 * config.model.layers if stacked else 1)
        schedule = choose_schedule(config.pipeline, stages, config.grad_accum)
        places = len(self.model.live) // stages // schedule.chunks
        # Body in both directions, and head, at every tick.
        return schedule.forward_ticks * (2 * places if stacked else 3)

    def _activations(self) -> frozenset[tuple[str, str]]:
        """How strategies move activations: see `PlanFacts.activations`."""
        kinds = {
            "ring": ("collective-permute",),
            "gather": ("all-gather", "reduce-scatter"),
            "ulysses": ("all-to-all", "all-gather"),
        }[self.config.context.kind]
        length, stream = self.rules.axes_for("activations", "length"), self.rules.stream_axes()
        found = {(kind, axis) for kind in kinds for axis in length}
        found |= {(kind, axis) for kind in ("all-gather", "reduce-scatter") for axis in stream}
        found |= {("collective-permute", "stage")} if "stage" in self.mesh.names else set()
        dropless = self.config.model.experts.capacity_factor is None
        if not dropless:  # experts take whole rows
            found |= {(kind, axis) for kind in ("all-gather", "reduce-scatter") for axis in length}
        kinds = ("all-to-all", *("all-gather", "reduce-scatter") * dropless)
        found |= {(kind, axis) for kind in kinds for axis in self.rules.expert_axes()}
        return frozenset(found)

    def _model(self, kernel: str) -> dict[str, Any]:
        config = self.config
        return {
            "name": config.model.name,
            "parameters": count_parameters(config.model),
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "grad_accum": config.grad_accum,
            "remat": config.model.remat,
            "dtype": {2: "bfloat16", 4: "float32"}[self.itemsize],
            "zero": config.zero,
            "accumulate": config.accumulate,
            "optimizer": config.optimizer.name,
            "attention": kernel,
            "strategies": [f"{name}({axis})" for name, axis in self.rules.strategies],
        }

    def _decisions(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(decisions_json(self.layout, self.config.grad_accum))

    def _key(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.config)
        kept = {name: value for name, value in fields.items() if name not in _NOT_COMPILED}
        masked = self.config.data.mask_documents
        return kept | {"mesh": str(self.mesh), "masked": masked, "cudnn": _has_cudnn_wheel()}


def compile_in_child(
    payload: tuple[TrainConfig, Topology, bool], devices: list[Any]
) -> CompiledProgram:
    """The child's half of `RunPlan.compiled`: build the step for the topology's devices.

    Args:
        payload: run, topology, whether at low effort.
        devices: of the topology.
    """
    import time

    config, topology, quick = payload
    plan = RunPlan.of(config, topology)
    dtype = jnp.float32 if plan.itemsize == 4 else jnp.bfloat16
    mesh = plan.mesh.build(devices)
    started = time.monotonic()
    spec = step_spec(config, plan.model, plan.layout, mesh, dtype)
    lowered = Program.prepare(config, spec).lower_step()
    return compile_lowered(lowered, quick=quick, lower_seconds=time.monotonic() - started)


def _memory(shapes: MemoryEstimate, compiled: CompiledProgram) -> MemoryEstimate:
    """State as the shapes say, the peak as the compiler does, and the rest between them."""
    refused = compiled.out_of_memory
    peak = refused.needed_bytes if refused else compiled.peak_bytes
    limit = refused.limit_bytes if refused else shapes.limit_bytes
    if peak is None:
        return replace(shapes, peak_bytes=None)
    state = (
        shapes.parameters_bytes
        + shapes.gradients_bytes
        + shapes.optimizer_bytes
        + shapes.batch_bytes
    )
    activations = min(shapes.activations_bytes, max(peak - state, 0))
    return replace(
        shapes,
        activations_bytes=activations,
        temporaries_bytes=max(peak - state - activations, 0),
        peak_bytes=peak,
        limit_bytes=limit,
    )


@functools.cache
def _has_cudnn_wheel() -> bool:
    from meshwright.train.attention import has_cudnn_wheel

    return has_cudnn_wheel() and wheels("gpu").installed is not None


_SHAPES: tuple[Origin, str] = ("formula", "closed forms of shapes, mesh and rules")
_STATE: dict[str, tuple[Origin, str]] = {
    f"memory.{name}_bytes": _SHAPES
    for name in ("parameters", "gradients", "optimizer", "batch", "activations")
}


def _from_shapes(rates: MeasuredRates) -> dict[str, tuple[Origin, str]]:
    time: tuple[Origin, str] = (
        ("data sheet", "closed forms at the data sheet's rates; unvalidated")
        if rates == PUBLISHED
        else ("calibration", "closed forms at measured rates; unvalidated")
    )
    return {
        **_STATE,
        "memory": _SHAPES,
        "collectives": ("formula", "what the strategies must move, not what a compiler emits"),
        "traffic": _SHAPES,
        "flops": _SHAPES,
        "time": time,
    }
