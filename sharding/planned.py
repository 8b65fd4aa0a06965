"""What a plan says, as values: memory, collectives, traffic, compute, time, warnings.

The nouns of ``meshwright plan`` and `meshwright.analyze`. They are filled from a compiled
program, or from closed forms where no compiler is at hand, and every figure says which: that is
what `PlanReport.provenance` is for. They hold numbers and text only, so they print, compare,
pickle and turn into JSON without jax; tables and pages are made from them elsewhere.

Bytes and FLOPs are per device and per optimizer step unless a name says otherwise; seconds are
per step. ``None`` means that nobody knows: a figure that was not measured, compiled or derived is
never written as 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "SCHEMA",
    "AxisTraffic",
    "Change",
    "Collective",
    "ComputeEstimate",
    "Kind",
    "MemoryEstimate",
    "Origin",
    "Phase",
    "PlanReport",
    "PlanWarning",
    "StepEstimate",
]

SCHEMA = "meshwright.plan/1"

Kind = Literal[
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
]
Phase = Literal["forward", "backward", "update"]
Origin = Literal["compiler", "formula", "calibration", "data sheet", "unknown"]
"""Where a figure comes from."""


@dataclass(frozen=True)
class Collective:
    """One communication of the step, as the compiled program does it or a formula expects it.

    Attributes:
        kind: what it implements, whatever the compiler emitted (see ``emitted``).
        axes: mesh axes along which its participants differ, in mesh order.
        count: executions a step, loop trips multiplied.
        bytes: full buffers S of all executions: the result of an all-gather or all-reduce, the
            operand of a reduce-scatter or all-to-all, what is sent of a permute.
        wire_bytes: bytes this device sends in all executions, each over a ring: ρS for an
            all-gather, reduce-scatter and all-to-all, 2ρS for an all-reduce, S for a permute,
            with ρ = (n-1)/n over n participants.
        phase: forward, backward (recomputation included) or update.
        overlaps: whether it runs while something else computes; None where unknown.
        source: ``file:line`` of the user's code it comes from, or empty.
        leaf: the parameter path or activation dims it moves, or empty.
        participants: n of one group.
        dtype: element type on the wire, such as ``bf16``; of the largest part of a tuple.
        emitted: the compiler's instruction, such as ``all-gather-start`` or ``windowed einsum``.
        partial: True where a group spans only a part of an axis in ``axes``.
        loop_depth: number of loops it is inside of.
        operation: the compiler's op name, for reading.
    """

    kind: Kind
    axes: tuple[str, ...]
    count: int
    bytes: int
    wire_bytes: int
    phase: Phase
    overlaps: bool | None = None
    source: str = ""
    leaf: str = ""
    participants: int = 1
    dtype: str = ""
    emitted: str = ""
    partial: bool = False
    loop_depth: int = 0
    operation: str = ""


@dataclass(frozen=True)
class Change:
    """A change that would make a plan fit, and what came of trying it.

    Attributes:
        flags: what to add to the command, such as ``--model.remat full``.
        peak_bytes: its peak.
        fits: whether that is within the limit.
        origin: ``compiler`` where it was compiled, else ``formula``.
    """

    flags: str
    peak_bytes: int
    fits: bool
    origin: Origin


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one device holds.

    Attributes:
        parameters_bytes: float32 masters and, where its layout differs, the working copy.
        gradients_bytes: accumulators, or gradients as they reach the optimizer.
        optimizer_bytes: moments and counters.
        batch_bytes: the placed batch.
        activations_bytes: what the forward pass keeps for the backward pass.
        temporaries_bytes: all else the program needs at its peak.
        peak_bytes: the largest sum at any moment; None where it is not known.
        limit_bytes: what the compiler or the device allows; None without a known chip.
        contributors: (what, bytes) of the largest parts, largest first.
        changes: what was tried to make it fit.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    peak_bytes: int | None
    limit_bytes: int | None
    contributors: tuple[tuple[str, int], ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the limit; None where either is unknown."""
        if self.peak_bytes is None or self.limit_bytes is None:
            return None
        return self.peak_bytes <= self.limit_bytes


@dataclass(frozen=True)
class AxisTraffic:
    """Bytes a device sends over one mesh axis in a step, and the least it could.

    Attributes:
        wire_bytes: as `Collective.wire_bytes`, summed.
        lower_bound_bytes: the closed form; None where there is none for this step.
        bandwidth: bytes a second a device sends over the axis; None without a known chip.
        seconds: wire bytes over bandwidth.
    """

    wire_bytes: int
    lower_bound_bytes: float | None = None
    bandwidth: float | None = None
    seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """Wire bytes over the lower bound; None without a bound or with one of 0."""
        return self.wire_bytes / self.lower_bound_bytes if self.lower_bound_bytes else None


@dataclass(frozen=True)
class ComputeEstimate:
    """Floating-point work.

    Attributes:
        device_flops: what the program computes on one device, recomputation included.
        model_flops: of the model, all devices, each query with every key (PaLM's convention).
        model_flops_causal: the same with the half of attention a causal mask keeps.
        redundancy: device_flops × devices over model_flops.
        memory_traffic_bytes: read and written in device memory; None where unknown.
    """

    device_flops: float | None
    model_flops: float | None
    model_flops_causal: float | None
    redundancy: float | None
    memory_traffic_bytes: float | None


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one step.

    Attributes:
        compute_seconds: matmul FLOPs at the chip's rate; or the compiler's own cycle
            estimates where it gives them.
        memory_seconds: memory traffic over memory bandwidth.
        communication_seconds: by mesh axis.
        step_seconds_low: everything that can overlap does.
        step_seconds_high: nothing overlaps.
        tokens_per_second_per_chip: at (low, high) step time, fastest first.
        mfu: model FLOP utilisation at (low, high) step time, highest first.
        peak_flops: the chip's rate that utilisation is relative to.
        bound_by: ``compute``, ``memory`` or the mesh axis that takes longest.
        roofline_seconds: compute by FLOPs over peak, beside the compiler's cycles.
        validated: False until measured on the hardware.
    """

    compute_seconds: float | None
    memory_seconds: float | None
    communication_seconds: Mapping[str, float] = field(default_factory=dict)
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    tokens_per_second_per_chip: tuple[float, float] | None = None
    mfu: tuple[float, float] | None = None
    peak_flops: float | None = None
    bound_by: str = ""
    roofline_seconds: float | None = None
    validated: bool = False


@dataclass(frozen=True)
class PlanWarning:
    """Something in the plan that costs, and what mends it.

    Attributes:
        code: a short name, such as ``undeclared-collective``.
        what: one sentence.
        source: ``file:line`` of the user's code, or empty.
        leaf: the leaf or dims concerned, or empty.
        cost_bytes: what it costs a device, or None.
        cost_seconds: what it costs a step, or None.
        fix: the change that mends it.
    """

    code: str
    what: str
    source: str = ""
    leaf: str = ""
    cost_bytes: int | None = None
    cost_seconds: float | None = None
    fix: str = ""


@dataclass(frozen=True)
class PlanReport:
    """Everything a plan says.

    Attributes:
        topology: written form.
        mesh: axis sizes in mesh order.
        model: name, parameters and the settings that matter, as JSON values.
        memory, collectives, traffic, flops, time, warnings: see their classes; ``traffic`` by
            axis.
        decisions: as ``meshwright explain`` writes them to JSON.
        provenance: figure → (origin, in words how), figures named as in the JSON document.
        unread: what the parser of compiled text could not read, with the figures it touches.
        notes: what a reader should know and no figure is in doubt for.
    """

    topology: str
    mesh: Mapping[str, int]
    model: Mapping[str, Any]
    memory: MemoryEstimate
    collectives: tuple[Collective, ...]
    traffic: Mapping[str, AxisTraffic]
    flops: ComputeEstimate
    time: StepEstimate
    warnings: tuple[PlanWarning, ...]
    decisions: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, tuple[Origin, str]]
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """The verdict; None where there is none."""
        return self.memory.fits
