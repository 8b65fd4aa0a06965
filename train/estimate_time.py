"""How long a step should take, by closed form: FLOPs, memory traffic and wire bytes over rates.

What a device computes and moves is counted here; how seconds are made of it, and a step's range of
them, is `meshwright.sharding.step_time`'s, which does the same for compiled programs. So the two
differ in what they count, never in how they weigh it.

FLOPs are those of matmuls, a device's own share, recomputation included: full recomputation
repeats a layer but for its last projection, whose output nothing in the backward pass reads. A
fused attention kernel skips the blocks a causal mask hides, and computes scores again in its
backward pass; materialised scores are computed whole.

Memory traffic is counted in passes over what a step reads and writes: so many over a layer's
weights, so many over an activation. The passes were counted in compiled programs (`_Passes`), whose
fusions decide them; a step without a fused kernel is dominated by those over its scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from meshwright.sharding.planned import Collective, ComputeEstimate, StepEstimate
from meshwright.sharding.step_time import (
    KERNEL_BACKWARD,
    KERNEL_BLOCK,
    PUBLISHED,
    MeasuredRates,
    collective_seconds,
    step_estimate,
)
from meshwright.train.estimate_placement import Placement
from meshwright.train.flops import flops_per_token
from meshwright.train.shapes import LANES, kept_activations

if TYPE_CHECKING:
    from meshwright.sharding.chips import Chip
    from meshwright.sharding.links import AxisLink

__all__ = ["StepWork", "compute_of", "time_of", "work_of"]

_KERNEL = {"gpu": "cudnn", "tpu": "splash"}
_BLOCK = {kind: KERNEL_BLOCK[kernel] for kind, kernel in _KERNEL.items()}
_FUSED_BACKWARD = {kind: KERNEL_BACKWARD[kernel] for kind, kernel in _KERNEL.items()}


class StepWork(NamedTuple):
    """What one device does in a step.

    Attributes:
        matmul_flops: of matmuls, materialised scores included.
        attention_flops: of a fused attention kernel.
        traffic_bytes: read and written in device memory.
    """

    matmul_flops: float
    attention_flops: float
    traffic_bytes: float


class _Passes(NamedTuple):
    """How often a step reads or writes something, in compiled programs of `train_step`.

    Attributes:
        weights: a layer's weights as matmuls read them, its gathers and whole gradients included.
        table: embedding and head likewise.
        stream: an activation of the residual stream, in a layer, without recomputation.
        inner: queries, keys, values and the MLP's width, likewise.
        logits: the float32 logits.
        kept: what layers keep for the backward pass: zeros, written, read.
        accumulated: float32 gradients of a microbatch, collected and then added to the sums.
    """

    weights: float
    table: float
    stream: float
    inner: float
    logits: float
    kept: float
    accumulated: float


# GPUs: norms are kernels of their own, in float32. TPUs: they are part of the matmuls' fusions, and
# much stays in on-chip memory.
_PASSES = {"gpu": _Passes(10, 20, 50, 5, 8, 3, 9), "tpu": _Passes(3, 3, 20, 18, 3, 3, 6)}
# A TPU runs one fusion after the other, and what its compiler's cycles say beyond matmuls at their
# peak is this many times what the same bytes take at the memory's full rate (1.5 to 2.6).
_STREAMED = 2.0
_UPDATE = 7  # float32 master: read and written; its gradient: written, and read for norm and update
# Bytes a score is moved over in a layer: float32 passes, those in the compute dtype, masks.
_SCORES_AGAIN = (10, 13, 1)
_SCORES_KEPT = (26, 7, 2)  # zeros to keep them in, copies into and out of the stack, a new layout


def work_of(placement: Placement, *, itemsize: int, fused_attention: bool, kind: str) -> StepWork:
    """Count a step's work on one device.

    Args:
        placement: from `meshwright.train.estimate_placement.place`.
        itemsize: of the compute dtype.
        fused_attention: as `meshwright.train.estimate.estimate`.
        kind: ``tpu`` or ``gpu``, for how the fused kernel and fusions work.
    """
    config = placement.config
    model, layers = config.model, placement.layers * placement.ticks
    tokens = placement.tokens * config.grad_accum
    scored = placement.head_tokens * config.grad_accum
    forward, attention, last, head = _token_flops(placement, fused_attention, kind)
    again = forward - last if model.remat in ("full", "save-attention", "offload") else 0.0
    matmuls = tokens * layers * (3 * forward + again) + scored * 3 * head
    # Forward, backward, and the forward pass once more where it is not kept.
    kept = model.remat == "none" or (model.remat == "save-attention" and fused_attention)
    times = 1 + (_FUSED_BACKWARD[kind] if fused_attention else 2) + (not kept)
    kernel = tokens * layers * attention * times
    traffic = _memory_traffic(placement, itemsize, fused_attention, kind)
    if fused_attention:
        return StepWork(matmuls, kernel, traffic)
    return StepWork(matmuls + kernel, 0.0, traffic)


def compute_of(placement: Placement, work: StepWork) -> ComputeEstimate:
    """A step's work beside the model's FLOPs in both conventions."""
    config = placement.config
    device = work.matmul_flops + work.attention_flops
    everything = config.batch_size * config.seq_len
    whole = everything * flops_per_token(config.model, config.seq_len)
    causal = everything * flops_per_token(config.model, config.seq_len, causal=True)
    return ComputeEstimate(
        device_flops=float(device),
        model_flops=float(whole),
        model_flops_causal=float(causal),
        redundancy=device * placement.devices / whole,
        memory_traffic_bytes=float(work.traffic_bytes),
    )


def _token_flops(placement: Placement, fused: bool, kind: str) -> tuple[float, float, float, float]:
    """FLOPs of a token on a device: a layer's projections, its attention, its last matmul, head."""
    model, length = placement.config.model, placement.config.seq_len
    embed, gated = model.embed, model.activation == "swiglu"
    queries = model.heads * model.head_dim / placement.split("heads")
    keys = model.kv_heads * model.head_dim / placement.split("kv_heads")
    mlp = model.active_mlp / placement.split("mlp")
    last = 2 * embed * mlp
    projections = 4 * embed * (queries + keys) + last * (3 if gated else 2)
    seen = min(length, (length + _BLOCK[kind]) / 2) if fused else length
    head = 2 * embed * model.vocab_size / placement.split("vocab")
    return projections, 4 * queries * seen, last, head


def _memory_traffic(placement: Placement, itemsize: int, fused: bool, kind: str) -> float:
    """Bytes read and written in device memory in a step."""
    config, passes = placement.config, _PASSES[kind]
    model, micro = config.model, config.grad_accum
    weights = 0.0
    for group, masters, _, compute, reduced, *_ in placement.groups:
        count = group.elements
        used = count / placement.parts(compute) * itemsize
        weights += micro * used * (passes.weights if group.layered else passes.table)
        weights += _UPDATE * 4 * count / placement.parts(masters)
        if micro > 1:
            weights += micro * passes.accumulated * 4 * count / placement.parts(reduced)
    for group, axes in placement.moments:
        weights += 2 * 4 * group.elements / placement.parts(axes)
    queries = model.heads * model.head_dim / placement.split("heads")
    keys = 2 * model.kv_heads * model.head_dim / placement.split("kv_heads")
    inner = queries + keys + model.active_mlp / placement.split("mlp")
    again = (
        4 / 3 if model.remat in ("full", "save-attention", "offload") else 1.0
    )  # one forward pass more than three passes
    token = again * (passes.stream * model.embed + passes.inner * inner) * itemsize
    token += passes.kept * _kept_bytes(placement, itemsize, fused, kind)
    if not fused:
        wide, narrow, masks = _SCORES_KEPT if model.remat == "none" else _SCORES_AGAIN
        heads = model.heads / placement.split("heads")
        token += (4 * wide + itemsize * narrow + masks) * heads * config.seq_len
    logits = passes.logits * 4 * model.vocab_size / placement.split("vocab")
    layers = placement.layers * placement.ticks
    return weights + micro * (placement.tokens * layers * token + placement.head_tokens * logits)


def _kept_bytes(placement: Placement, itemsize: int, fused: bool, kind: str) -> float:
    """Bytes of a token that a layer keeps on a device, scores apart."""
    config, total = placement.config, 0.0
    lanes = LANES[kind]
    for found in kept_activations(
        config.model,
        itemsize=itemsize,
        fused_attention=fused,
        length=config.seq_len,
        lanes=lanes,
    ):
        if found.name != "scores":
            share = placement.parts(
                [axis for dim in found.dims for axis in placement.activations[dim]]
            )
            total += found.elements * found.itemsize / share
    return total


def time_of(
    placement: Placement,
    work: StepWork,
    collectives: Sequence[Collective],
    chip: Chip | None,
    links: Mapping[str, AxisLink] | None,
    *,
    itemsize: int,
    rates: MeasuredRates = PUBLISHED,
) -> StepEstimate:
    """Seconds of a step from its work and a chip's rates; what is not known stays None.

    Args:
        placement, work, collectives: of the plan.
        chip: rates of compute and memory.
        links: by axis.
        itemsize: of the compute dtype, which decides the peak.
        rates: measured ones replace the data sheet's.
    """
    real = {axis: link for axis, link in (links or {}).items() if placement.sizes[axis] > 1}
    communication, exposed = collective_seconds(collectives, real, fraction=rates.links)
    if chip is None:
        return StepEstimate(None, None, communication)
    dtype = "bf16" if itemsize == 2 else "f32"
    peak = chip.peak_flops[dtype]
    working = work.matmul_flops / rates.matmul(chip, dtype)
    working += work.attention_flops / rates.attention(chip)
    moving = work.traffic_bytes / rates.memory(chip)
    streams = chip.kind == "tpu"
    if streams:
        working += _STREAMED * moving
    config = placement.config
    return step_estimate(
        working,
        moving,
        communication,
        exposed,
        streams=streams,
        model_flops=config.batch_size
        * config.seq_len
        * flops_per_token(config.model, config.seq_len),
        tokens=config.batch_size * config.seq_len,
        devices=placement.devices,
        chips=placement.devices / chip.devices_per_chip,
        peak_flops=peak,
        roofline_seconds=work.matmul_flops / peak + work.attention_flops / chip.peak_flops["bf16"],
    )
