"""How long a step should take, by closed form: FLOPs, memory traffic and wire bytes over rates.

A roofline with three kinds of roof: the matrix units, device memory, and the links of each mesh
axis. What overlaps with what is not modelled, it is bracketed: with everything hidden behind the
slowest the step takes their maximum, with nothing hidden their sum. Rates are those of data
sheets, times the fractions in `Rates`, which a calibration can measure and replace; no fraction
is guessed here. Collectives pay a latency for every execution besides.

FLOPs are those of matmuls, a device's own share, recomputation included: full recomputation
repeats a layer but for its last projection, whose output nothing in the backward pass reads. A
fused attention kernel skips the blocks a causal mask hides, and computes scores again in its
backward pass; materialised scores are computed whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshwright.sharding.planned import (
    AxisTraffic,
    Collective,
    ComputeEstimate,
    StepEstimate,
)
from meshwright.train.estimate_placement import Placement
from meshwright.train.flops import flops_per_token

if TYPE_CHECKING:
    from meshwright.sharding.chips import Chip
    from meshwright.sharding.links import AxisLink

__all__ = ["DATA_SHEET", "Rates", "compute_of", "step_time"]

_BLOCK = 512  # side of the blocks a fused kernel skips or computes whole
# Matmuls of a fused kernel's backward pass, in units of the two of its forward pass: cuDNN's
# computes scores again and then dV, dP, dQ and dK; splash attention runs one kernel for dQ and
# one for dK and dV, and both compute scores and dP.
_FUSED_BACKWARD = {"gpu": 2.5, "tpu": 3.5}


@dataclass(frozen=True)
class Rates:
    """Fractions of the data sheet's rates that are reached.

    Attributes:
        matmul: of peak FLOP/s.
        memory: of memory bandwidth.
        links: of link bandwidth.
    """

    matmul: float = 1.0
    memory: float = 1.0
    links: float = 1.0


DATA_SHEET = Rates()
"""All of what the data sheet says: a lower bound of time."""


def compute_of(
    placement: Placement, *, itemsize: int, fused_attention: bool, kind: str = "tpu"
) -> ComputeEstimate:
    """Floating-point work and memory traffic of a step.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        itemsize: of the compute dtype.
        fused_attention: as `meshwright.train.estimate.estimate`.
        kind: ``tpu`` or ``gpu``, for how the fused kernel works.
    """
    config = placement.config
    model, layers = config.model, config.model.layers
    tokens = placement.tokens * config.grad_accum
    forward, attention, last, head = _token_flops(placement, fused_attention)
    backward = (2 * forward) + attention * (_FUSED_BACKWARD[kind] if fused_attention else 2)
    again = {"full": forward - last + attention, "dots": attention, "none": 0.0}[model.remat]
    layer = forward + attention + backward + again
    device = tokens * (layers * layer + 3 * head)
    everything = config.batch_size * config.seq_len
    whole = everything * flops_per_token(model, config.seq_len)
    causal = everything * flops_per_token(model, config.seq_len, causal=True)
    return ComputeEstimate(
        device_flops=float(device),
        model_flops=float(whole),
        model_flops_causal=float(causal),
        redundancy=device * placement.devices / whole,
        memory_traffic_bytes=float(_memory_traffic(placement, itemsize, fused_attention)),
    )


def _token_flops(placement: Placement, fused: bool) -> tuple[float, float, float, float]:
    """FLOPs of a token on a device: a layer's projections, its attention, its last matmul, head."""
    model, length = placement.config.model, placement.config.seq_len
    embed, gated = model.embed, model.activation == "swiglu"
    queries = model.heads * model.head_dim / placement.split("heads")
    keys = model.kv_heads * model.head_dim / placement.split("kv_heads")
    mlp = model.mlp / placement.split("mlp")
    last = 2 * embed * mlp
    projections = 4 * embed * (queries + keys) + last * (3 if gated else 2)
    seen = min(length, (length + _BLOCK) / 2) if fused else length
    head = 2 * embed * model.vocab_size / placement.split("vocab")
    return projections, 4 * queries * seen, last, head


def _memory_traffic(placement: Placement, itemsize: int, fused: bool) -> float:
    """Bytes read and written in device memory in a step.

    Every matmul reads its operands and writes its result once; chains of elementwise operations
    are one fusion that reads and writes once; scores and logits pass as often as their softmax
    and its derivative need.
    """
    config = placement.config
    model, micro = config.model, config.grad_accum
    passes = 4 if model.remat == "full" else 3  # of a layer: forward, backward twice, again
    weights = 0.0
    for group, masters, working, compute, reduced, *_ in placement.groups:
        count = group.elements
        used = count / placement.parts(compute) * itemsize
        gathered = 2 if working != compute else 0  # written by the gather, forward and backward
        weights += micro * used * (passes + gathered + 2)  # and the gradient, written and read
        weights += micro * 2 * 4 * count / placement.parts(working)  # cast from float32
        weights += 4 * count / placement.parts(masters) * 4  # master and gradient, update
        if micro > 1:
            weights += micro * 3 * 4 * count / placement.parts(reduced)
    for group, axes in placement.moments:
        weights += 2 * 4 * group.elements / placement.parts(axes)
    queries = model.heads * model.head_dim / placement.split("heads")
    keys = model.kv_heads * model.head_dim / placement.split("kv_heads")
    mlp = model.mlp / placement.split("mlp")
    hidden = 7 if model.activation == "swiglu" else 4  # reads and writes between the matmuls
    token = (10 * model.embed + 6 * queries + 6 * keys + hidden * mlp) * itemsize
    if not fused:
        token += 4 * 4 * model.heads / placement.split("heads") * config.seq_len
    vocab = model.vocab_size / placement.split("vocab")
    logits = vocab * (4 * 4 + 3 * itemsize)  # float32: written, read for maximum, sum, gradient
    tokens = placement.tokens * micro
    return weights + tokens * (model.layers * passes * token + logits)


def step_time(
    placement: Placement,
    compute: ComputeEstimate,
    traffic: Mapping[str, AxisTraffic],
    collectives: Sequence[Collective],
    chip: Chip | None,
    links: Mapping[str, AxisLink] | None,
    *,
    itemsize: int,
    rates: Rates = DATA_SHEET,
) -> StepEstimate:
    """Seconds of a step from its work and a chip's rates; what is not known stays None.

    Args:
        placement, compute, traffic, collectives: of the plan; traffic's seconds are used.
        chip: rates of compute and memory.
        links: by axis; for latencies.
        itemsize: of the compute dtype, which decides the peak.
        rates: fractions of the data sheet.
    """
    waits = _latencies(collectives, links)
    seconds = {
        axis: found.seconds + waits.get(axis, 0.0)
        for axis, found in traffic.items()
        if found.seconds is not None and placement.sizes[axis] > 1
    }
    if chip is None or compute.device_flops is None or compute.memory_traffic_bytes is None:
        return StepEstimate(None, None, seconds)
    peak = chip.peak_flops["bf16" if itemsize == 2 else "f32"]
    working = compute.device_flops / (peak * rates.matmul)
    moving = compute.memory_traffic_bytes / (chip.memory_bandwidth * rates.memory)
    named = {"compute": working, "memory": moving, **seconds}
    low, high = max(named.values()), sum(named.values())
    chips = placement.devices / chip.devices_per_chip
    tokens = placement.config.batch_size * placement.config.seq_len / chips
    useful = (compute.model_flops or 0.0) / (placement.devices * peak)
    return StepEstimate(
        compute_seconds=working,
        memory_seconds=moving,
        communication_seconds=seconds,
        step_seconds_low=low,
        step_seconds_high=high,
        tokens_per_second_per_chip=(tokens / low, tokens / high),
        mfu=(useful / low, useful / high),
        peak_flops=peak,
        bound_by=max(named, key=lambda name: named[name]),
        roofline_seconds=compute.device_flops / peak,
    )


def _latencies(
    collectives: Sequence[Collective], links: Mapping[str, AxisLink] | None
) -> dict[str, float]:
    """Seconds of latency by axis; an all-reduce is two collectives in a row."""
    found: dict[str, float] = {}
    for collective in collectives if links else ():
        times = collective.count * (2 if collective.kind == "all-reduce" else 1)
        for axis in collective.axes:
            link = links.get(axis) if links else None
            if link is not None:
                found[axis] = found.get(axis, 0.0) + times * link.latency_seconds
    return found
