"""How long a step takes, from its work and a chip's rates: the rule that every estimate shares.

A step does three things: it computes, moves bytes through device memory, and sends bytes over
the links of each mesh axis. What hides behind what depends on a schedule that nobody can predict
in full, so the step is bracketed. **Low**: everything that may overlap does, and the longest of
the three decides; a collective that is known to run alone is added. **High**: one thing after
another. The truth of a good schedule is near the low end.

`step_estimate` is that rule, on seconds, for closed forms and compiled programs alike.
`step_time_of` feeds it from a compiled program:

- Compute is the TPU compiler's own cycles where it gives them, plus fused attention, of which it
  says nothing; elsewhere FLOPs over the rate of the operands' type. The cycles contain the time
  to stream operands from memory, so memory is not added to them once more in the high end.
- Fused attention is slow for its FLOPs, since softmax and masks run beside the matmuls:
  `ATTENTION_FRACTION` of the peak unless it was measured.
- Communication is a collective's wire bytes over the rate of its axis and, for every execution,
  the latency of its steps. Over several axes bytes are shared out as
  `meshwright.sharding.bounds.axis_shares` says.

Rejected: a simulation of the schedule. It would need the time of every collective beside every
fusion, which no public source gives, and would look more exact than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshwright.sharding.bounds import axis_shares
from meshwright.sharding.planned import Collective, ComputeEstimate, StepEstimate

if TYPE_CHECKING:
    from meshwright.sharding.calibration import Calibration
    from meshwright.sharding.chips import Chip
    from meshwright.sharding.hlo_cost import ProgramCost
    from meshwright.sharding.hlo_cycles import CycleCount
    from meshwright.sharding.links import AxisLink

__all__ = [
    "ATTENTION_FRACTION",
    "KERNEL_BACKWARD",
    "KERNEL_BLOCK",
    "PUBLISHED",
    "MeasuredRates",
    "collective_seconds",
    "step_estimate",
    "step_time_of",
]

ATTENTION_FRACTION = 0.5
"""Part of the peak that fused attention reaches, forward and backward together.

FlashAttention-2 reports 50 to 73% on an A100 (Dao 2023, "FlashAttention-2: Faster Attention with
Better Parallelism and Work Partitioning"), FlashAttention-3 up to 75% forward on an H100 (Shah et
al. 2024). For TPU kernels nothing is published; the low figure is assumed.
"""

KERNEL_BACKWARD = {"cudnn": 2.5, "splash": 3.5}
"""Matmuls of a fused kernel's backward pass, in units of its forward pass."""

KERNEL_BLOCK = {"cudnn": 0, "splash": 512}
"""Side of the blocks a fused kernel computes whole where a causal mask cuts them; of cuDNN, whose
blocks are not published, half of the scores is counted."""


@dataclass(frozen=True)
class MeasuredRates:
    """What a device was measured to do; what was not measured keeps its published rate.

    Attributes:
        matmul_flops: FLOP/s by operand type, named as `Chip.peak_flops`.
        attention_flops: FLOP/s of fused attention, of all FLOPs its kernels run, or None.
        memory_bandwidth: bytes a second, or None.
        links: fraction of link bandwidth that is reached.
    """

    matmul_flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    attention_flops: float | None = None
    memory_bandwidth: float | None = None
    links: float = 1.0

    @classmethod
    def of(cls, calibration: Calibration, chip: Chip) -> MeasuredRates:
        """The rates of a calibration.

        Attention is measured in useful FLOPs; its kernels run more, and are counted so here.
        Links are those of one host's switch, measured on all its GPUs; of the network between
        hosts the same fraction is assumed. On TPU, where an axis' rate depends on its place on
        the torus, they stay at the data sheet's.

        Args:
            calibration: measured on a device of this chip.
            chip: see `meshwright.sharding.calibration.check_matches`.
        """
        attention = None
        found = calibration.attention
        if found is not None and found.kernel in KERNEL_BACKWARD:
            # Of one useful forward FLOP, to which two useful backward FLOPs belong.
            seconds = 1 / found.forward.value + 2 / found.backward.value
            whole = 1 + min(1.0, KERNEL_BLOCK[found.kernel] / found.length)
            attention = (1 + KERNEL_BACKWARD[found.kernel]) * whole / seconds
        links = 1.0
        if chip.kind == "gpu" and calibration.link_bandwidth:
            measured = calibration.link_bandwidth.values()
            links = sum(measured) / len(measured) / chip.link_bandwidth
        return cls(calibration.matmul_flops, attention, calibration.memory_bandwidth, links)

    def matmul(self, chip: Chip, kind: str) -> float:
        """FLOP/s of matmuls of an operand type; types without units of their own run as bf16."""
        return self.matmul_flops.get(kind, _peak(chip, kind))

    def attention(self, chip: Chip) -> float:
        """FLOP/s of fused attention, of all FLOPs its kernels run."""
        return self.attention_flops or ATTENTION_FRACTION * chip.peak_flops["bf16"]

    def memory(self, chip: Chip) -> float:
        """Bytes a second between memory and chip."""
        return self.memory_bandwidth or chip.memory_bandwidth


PUBLISHED = MeasuredRates()
"""Nothing was measured: the data sheet's rates, and `ATTENTION_FRACTION` of them for attention."""


def step_time_of(
    cost: ProgramCost,
    cycles: CycleCount | None,
    collectives: Sequence[Collective],
    chip: Chip | None,
    links: Mapping[str, AxisLink],
    *,
    model_flops: float | None,
    model_flops_causal: float | None,
    tokens: int | None,
    devices: int,
    dtype: str = "bf16",
    rates: MeasuredRates = PUBLISHED,
) -> tuple[ComputeEstimate, StepEstimate]:
    """Work and seconds of a compiled step.

    Args:
        cost: from `meshwright.sharding.hlo_cost.cost_of`.
        cycles: from `meshwright.sharding.hlo_cycles.cycles_of`; None or empty where the compiler
            gives none.
        collectives: of the step.
        chip: whose rates; None leaves seconds unknown.
        links: by axis; axes without one have no seconds.
        model_flops, model_flops_causal: of the step on all devices, in the two conventions of
            `meshwright.train.flops`; None for a model that is not known.
        tokens: of the step, all devices; None where it has none.
        devices: of the mesh.
        dtype: operand type whose peak utilisation is relative to.
        rates: measured on a device of this kind.
    """
    compute = ComputeEstimate(
        device_flops=cost.device_flops,
        model_flops=model_flops,
        model_flops_causal=model_flops_causal,
        redundancy=cost.device_flops * devices / model_flops if model_flops else None,
        memory_traffic_bytes=cost.memory_traffic_bytes,
    )
    communication, exposed = collective_seconds(collectives, links, fraction=rates.links)
    if chip is None:
        return compute, StepEstimate(None, None, communication)
    working, streams = _compute_seconds(cost, cycles, chip, rates)
    roofline = cost.attention_flops / chip.peak_flops["bf16"]
    roofline += sum(n / _peak(chip, kind) for kind, n in cost.matmul_flops.items())
    moving = cost.memory_traffic_bytes / rates.memory(chip)
    return compute, step_estimate(
        working,
        moving,
        communication,
        exposed,
        streams=streams,
        model_flops=model_flops,
        tokens=tokens,
        devices=devices,
        chips=devices / chip.devices_per_chip,
        peak_flops=_peak(chip, dtype),
        roofline_seconds=roofline,
    )


def _compute_seconds(
    cost: ProgramCost, cycles: CycleCount | None, chip: Chip, rates: MeasuredRates
) -> tuple[float, bool]:
    """Seconds of compute, and whether they contain those of reading operands from memory."""
    attention = cost.attention_flops / rates.attention(chip)
    if cycles is not None and cycles.known and chip.clock_hz is not None:
        return attention + cycles.seconds(chip.clock_hz), True
    matmuls = sum(n / rates.matmul(chip, kind) for kind, n in cost.matmul_flops.items())
    return attention + matmuls, False


def _peak(chip: Chip, kind: str) -> float:
    """Peak of an operand type; narrow types that a chip has no units for run as bfloat16."""
    return chip.peak_flops.get(kind, chip.peak_flops["bf16"])


def step_estimate(
    compute_seconds: float,
    memory_seconds: float,
    communication: Mapping[str, float],
    exposed: Mapping[str, float] | None = None,
    *,
    streams: bool = False,
    model_flops: float | None,
    tokens: float | None,
    devices: int,
    chips: float,
    peak_flops: float,
    roofline_seconds: float | None,
) -> StepEstimate:
    """Combine the parts of a step into a range.

    Args:
        compute_seconds, memory_seconds: of one device.
        communication: seconds by mesh axis.
        exposed: of these, what is known not to overlap with anything.
        streams: whether the compute seconds contain those of memory.
        model_flops: of the step on all devices; None leaves utilisation unknown.
        tokens: of the step, all devices; None leaves their rate unknown.
        devices, chips: of the mesh.
        peak_flops: of a device.
        roofline_seconds: compute by FLOPs over peak.

    >>> found = step_estimate(3.0, 1.0, {"fsdp": 2.0}, {"fsdp": 0.5}, model_flops=7e12,
    ...     tokens=700, devices=2, chips=2, peak_flops=2e12, roofline_seconds=3.0)
    >>> found.step_seconds_low, found.step_seconds_high, found.bound_by
    (3.5, 6.0, 'compute')
    >>> found.mfu[0], found.tokens_per_second_per_chip[0]
    (0.5, 100.0)
    """
    alone = exposed or {}
    named = {"compute": compute_seconds, "memory": memory_seconds, **communication}
    hidden = {name: seconds - alone.get(name, 0.0) for name, seconds in named.items()}
    low = max(hidden.values()) + sum(alone.values())
    high = sum(named.values()) - (min(memory_seconds, compute_seconds) if streams else 0.0)
    high = max(low, high)  # equal but for rounding where nothing can overlap
    mfu = rate = None
    if low > 0 and tokens:
        rate = (tokens / chips / low, tokens / chips / high)
    if low > 0 and model_flops is not None:
        useful = model_flops / (devices * peak_flops)
        mfu = (useful / low, useful / high)
    return StepEstimate(
        compute_seconds=compute_seconds,
        memory_seconds=memory_seconds,
        communication_seconds=dict(communication),
        step_seconds_low=low,
        step_seconds_high=high,
        tokens_per_second_per_chip=rate,
        mfu=mfu,
        peak_flops=peak_flops,
        bound_by=max(named, key=lambda name: named[name]),
        roofline_seconds=roofline_seconds,
    )


def collective_seconds(
    collectives: Sequence[Collective], links: Mapping[str, AxisLink], *, fraction: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of communication by mesh axis: of all collectives, and of those that run alone.

    An all-to-all takes what crosses the middle of the torus, a permute one hop; all others a
    ring. Latency counts once an execution, twice for an all-reduce.

    Args:
        collectives: of a step.
        links: by axis; axes without one are left out.
        fraction: of their bandwidths that is reached.
    """
    total: dict[str, float] = {}
    exposed: dict[str, float] = {}
    for collective in collectives:
        axes = [axis for axis in collective.axes if axis in links]
        shares = axis_shares([links[axis].participants for axis in axes])
        for axis, share in zip(axes, shares, strict=True):
            link = links[axis]
            if link.participants < 2:
                continue
            part = collective.wire_bytes * (share if len(axes) > 1 else 1.0)
            members = collective.participants if len(axes) == 1 else link.participants
            seconds = part / (fraction * link.rate(collective.kind, members)) + _latency(
                collective, link
            )
            total[axis] = total.get(axis, 0.0) + seconds
            if collective.overlaps is False:
                exposed[axis] = exposed.get(axis, 0.0) + seconds
    return total, exposed


def _latency(collective: Collective, link: AxisLink) -> float:
    """Seconds of latency of all executions."""
    if collective.kind == "collective-permute":
        return collective.count * link.latency_seconds / max(1, link.hops)
    return collective.count * link.latency_seconds * (2 if collective.kind == "all-reduce" else 1)
