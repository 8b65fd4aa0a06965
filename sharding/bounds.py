"""Lower bounds of communication: the least bytes a device must send for a step, by strategy.

The yardstick of a plan. What a compiled program puts on the wire, over the closed form here, is
the ratio that `meshwright plan` prints for each mesh axis.

All bytes are *sent by one device* (as many are received), in one optimizer step unless a name
says otherwise, over a ring, where ρ(n) = (n-1)/n:

==============  ============================  ======
collective      full buffer S                 sent
==============  ============================  ======
all-gather      the result                    ρS
reduce-scatter  the operand                   ρS
all-reduce      either                        2ρS
all-to-all      the operand                   ρS
permute         the operand                   S
==============  ============================  ======

Rings are optimal in bandwidth (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009), so no other algorithm sends less; trees and switches that add
on the way (NVLink SHARP) change latency or what is sent into the switch, and are not modelled.

These are functions of sizes alone: floats in, floats out, no shapes, no mesh, no jax. Composing
them for a real model, leaf by leaf, is done where the model is known; a form for each strategy in
Ψ and A is here because that is how papers state it, and because tests compare the two.

Symbols: Ψ parameters held by a model-parallel shard; A bytes of one microbatch's activations on a
device, rows × tokens × width × itemsize; m microbatches; L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from meshwright.sharding.planned import Collective, Kind

__all__ = [
    "all_to_all_context_bytes",
    "axis_shares",
    "bubble_fraction",
    "causal_imbalance",
    "data_bytes",
    "expert_layer_bytes",
    "expert_rows_bytes",
    "fsdp_bytes",
    "gathered_context_bytes",
    "hybrid_bytes",
    "local_steps_bytes",
    "low_rank_elements",
    "microbatches_in_flight",
    "ring_context_bytes",
    "ring_fraction",
    "stage_bytes",
    "tensor_layer_bytes",
    "vocabulary_bytes",
    "wire_by_axis",
    "wire_bytes",
    "zero1_bytes",
    "zero2_bytes",
]

_PASSES = {
    "all-gather": 1,
    "all-reduce": 2,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-broadcast": 1,
}


def ring_fraction(n: int) -> float:
    """ρ(n) = (n-1)/n: the part of a buffer that a device of n does not have.

    >>> ring_fraction(4), ring_fraction(1)
    (0.75, 0.0)
    """
    return (n - 1) / n


def wire_bytes(kind: Kind, size_bytes: float, n: int) -> float:
    """Bytes a device sends in one collective of ``n`` over a full buffer of ``size_bytes``.

    >>> wire_bytes("all-reduce", 800, 4), wire_bytes("collective-permute", 800, 4)
    (1200.0, 800.0)
    """
    if n == 1:
        return 0.0
    if kind == "collective-permute":
        return float(size_bytes)
    return _PASSES[kind] * ring_fraction(n) * size_bytes


def axis_shares(sizes: Sequence[int]) -> tuple[float, ...]:
    """How a collective over several mesh axes spreads its wire bytes over them.

    The last axis has the fastest links, so a good schedule gathers over the outer axes first
    while the pieces are small (and reduces over them last): over axes of n₁ … n_k, axis i
    sends ρ(nᵢ) / (nᵢ₊₁ ⋯ n_k) of a buffer, and those sum to ρ(n₁ ⋯ n_k), the same bytes as one
    ring over all. Hierarchical all-reduce: Jia et al., "Highly scalable deep learning training
    system", 2018, section 3.3.

    Args:
        sizes: of the axes, in mesh order, slowest link first.

    Returns:
        Fractions that sum to 1; zeros where all sizes are 1.

    >>> axis_shares([2, 4])
    (0.14285714285714285, 0.8571428571428571)
    """
    whole = ring_fraction(math.prod(sizes))
    shares, inner = [], 1
    for size in reversed(sizes):
        shares.append(ring_fraction(size) / inner / whole if whole else 0.0)
        inner *= size
    return tuple(reversed(shares))


def wire_by_axis(collectives: Iterable[Collective], sizes: Mapping[str, int]) -> dict[str, float]:
    """Wire bytes of collectives by mesh axis, those over several axes shared out.

    Args:
        collectives: compiled or expected; axes that are not in ``sizes`` are left out.
        sizes: of every mesh axis; the order of a collective's axes is the mesh's.
    """
    total = dict.fromkeys(sizes, 0.0)
    for found in collectives:
        axes = [axis for axis in found.axes if axis in total]
        if len(axes) == 1:
            total[axes[0]] += found.wire_bytes
            continue
        shares = axis_shares([sizes[axis] for axis in axes])
        for axis, share in zip(axes, shares, strict=True):
            total[axis] += share * found.wire_bytes
    return total


def data_bytes(parameters: float, n: int, *, gradient_itemsize: float) -> float:
    """Data parallelism: 2ρβ_gΨ, once a step whatever the microbatches.

    Compressed gradients are a smaller ``gradient_itemsize``: 1 for int8, plus its scales.

    >>> data_bytes(1e9, 8, gradient_itemsize=2) / 1e9
    3.5
    """
    return wire_bytes("all-reduce", gradient_itemsize * parameters, n)


def zero1_bytes(
    parameters: float, n: int, *, gradient_itemsize: float, parameter_itemsize: float
) -> float:
    """Optimizer state sharded: gradients reduce-scattered, new weights gathered, ρ(β_g + β_p)Ψ.

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", 2020, section 7. Weights cross in the compute dtype.
    """
    return ring_fraction(n) * (gradient_itemsize + parameter_itemsize) * parameters


def zero2_bytes(
    parameters: float,
    n: int,
    *,
    gradient_itemsize: float,
    parameter_itemsize: float,
    microbatches: int = 1,
) -> float:
    """Gradients sharded too, so reduced once a microbatch: ρ(mβ_g + β_p)Ψ (as `zero1_bytes`)."""
    moved = microbatches * gradient_itemsize + parameter_itemsize
    return ring_fraction(n) * moved * parameters


def fsdp_bytes(
    parameters: float,
    n: int,
    *,
    gradient_itemsize: float,
    parameter_itemsize: float,
    microbatches: int = 1,
    gathers: int = 2,
    whole_accumulators: bool = False,
) -> float:
    """Parameters sharded (ZeRO-3): ρΨ(m·a·β_p + m·β_g).

    Args:
        parameters: Ψ.
        n: parts.
        gradient_itemsize: β_g, on the wire.
        parameter_itemsize: β_p, of the compute dtype; gathering float32 masters doubles it.
        microbatches: m.
        gathers: a, 2 where weights are gathered again for the backward pass, 1 where they are
            held. Only layers are gathered again: an embedding table is read in the forward
            pass alone, and an output head is used backward right after forward.
        whole_accumulators: gradients kept unreduced until the end of the step, m off β_g.

    >>> round(fsdp_bytes(8.03e9, 64, gradient_itemsize=2, parameter_itemsize=2) / 1e9, 1)
    47.4
    """
    reductions = 1 if whole_accumulators else microbatches
    moved = microbatches * gathers * parameter_itemsize + reductions * gradient_itemsize
    return ring_fraction(n) * moved * parameters


def hybrid_bytes(
    parameters: float, shards: int, replicas: int, *, gradient_itemsize: float, **fsdp: float
) -> tuple[float, float]:
    """FSDP over ``shards``, gradients all-reduced over ``replicas`` of them.

    Returns:
        Bytes over the shards' axis, as `fsdp_bytes`, and over the replicas', 2ρ(r)β_gΨ/s: each
        device reduces its own shard only.
    """
    inner = fsdp_bytes(parameters, shards, gradient_itemsize=gradient_itemsize, **fsdp)  # type: ignore[arg-type]
    outer = data_bytes(parameters / shards, replicas, gradient_itemsize=gradient_itemsize)
    return inner, outer


def local_steps_bytes(parameters: float, n: int, *, itemsize: float, every: int) -> float:
    """Local SGD and DiLoCo, mean a step: 2ρβΨ every H steps and nothing in between.

    Source: Douillard et al., "DiLoCo", 2023, algorithm 1.
    """
    return wire_bytes("all-reduce", itemsize * parameters, n) / every


def low_rank_elements(rows: int, columns: int, rank: int) -> int:
    """Elements a rank-r PowerSGD sends in place of rows × columns: r (rows + columns).

    Source: Vogels et al., "PowerSGD", 2019, algorithm 1.
    """
    return rank * (rows + columns)


def tensor_layer_bytes(
    activation_bytes: float, n: int, *, recompute: bool = False, sequence: bool = False
) -> float:
    """One layer and microbatch of tensor parallelism.

    Four all-reduces, 8ρA: after attention and after the MLP, forward and backward (Shoeybi et
    al., "Megatron-LM", 2019, section 3). Recomputing the whole layer repeats the one after
    attention, 10ρA: what the MLP adds is the next layer's input, which was kept. With the
    sequence sharded between (Korthikanti et al., 2022, section 4.2) 4 all-gathers and 4
    reduce-scatters move the same 8ρA; recomputing repeats two gathers and one reduce-scatter,
    11ρA.

    Args:
        activation_bytes: A, with all of the sequence.
        n: tensor parallel parts.
        recompute: whether the backward pass recomputes all of the layer.
        sequence: whether activations between the layers are split along the sequence.

    >>> tensor_layer_bytes(100, 2), tensor_layer_bytes(100, 2, recompute=True)
    (400.0, 500.0)
    """
    extra = (3 if sequence else 2) if recompute else 0
    return (8 + extra) * ring_fraction(n) * activation_bytes


def vocabulary_bytes(activation_bytes: float, n: int, *, tokens: float, scalars: int = 3) -> float:
    """Vocabulary-parallel embedding, head and cross-entropy, a microbatch.

    The embedding's forward and the head's backward pass each all-reduce A: 4ρA. The
    cross-entropy all-reduces float32 scalars a token: the maximum, the sum of exponentials
    and the target's logit (Megatron-LM, section 3); its backward pass needs none.

    Args:
        activation_bytes: A.
        n: parts of the vocabulary.
        tokens: of the microbatch on a device.
        scalars: 2 where the maximum is not taken.
    """
    return 2 * ring_fraction(n) * (2 * activation_bytes + 4 * scalars * tokens)


def ring_context_bytes(
    keys_bytes: float, n: int, *, gradient_bytes: float | None = None
) -> tuple[float, float]:
    """Ring attention over ``n`` parts of the sequence: (forward, backward), a layer.

    Keys and values K go round forward, (n-1)K, and again backward, with their gradients K_g:
    (n-1)(K + K_g). Liu et al., "Ring attention with blockwise transformers", 2023, section 3.
    A ring whose accumulators start at their owners needs n hops, nK_g, to bring them home;
    starting them one device ahead saves the hop, as in a reduce-scatter.

    Args:
        keys_bytes: K, keys and values of one device: 2 × rows × tokens / n × kv width × β.
        n: context-parallel parts.
        gradient_bytes: K_g; K if None.
    """
    moved = keys_bytes + (keys_bytes if gradient_bytes is None else gradient_bytes)
    return (n - 1) * keys_bytes, (n - 1) * moved


def gathered_context_bytes(
    keys_bytes: float, n: int, *, gradient_bytes: float | None = None, recompute: bool = False
) -> tuple[float, float]:
    """Keys and values gathered whole: (forward, backward), a layer.

    All-gather (n-1)K, its transpose a reduce-scatter (n-1)K_g, and the gather again where the
    layer is recomputed. Llama Team, "The Llama 3 herd of models", 2024, section 3.3.2.
    """
    gradient = keys_bytes if gradient_bytes is None else gradient_bytes
    return (n - 1) * keys_bytes, (n - 1) * (gradient + keys_bytes * recompute)


def all_to_all_context_bytes(
    rows: float, tokens: float, n: int, *, queries: int, keys: int, itemsize: float
) -> float:
    """Ulysses, one layer one way: heads for tokens and back, ρ·b(s/n)(2h + 2h_kv)β.

    Queries and the output have the width h, keys and values h_kv; the backward pass moves as
    much again. Jacobs et al., "DeepSpeed Ulysses", 2023, section 3.2.

    Args:
        rows: of the microbatch on a device.
        tokens: a row, whole.
        n: parts.
        queries, keys: widths h and h_kv, heads × head_dim.
        itemsize: β.
    """
    return ring_fraction(n) * rows * (tokens / n) * 2 * (queries + keys) * itemsize


def causal_imbalance(n: int, *, balanced: bool = False) -> float:
    """Work of the busiest of n context-parallel devices over the mean, under a causal mask.

    With contiguous blocks the last device's queries see i - ½ blocks of keys, i up to n, against
    a mean of n/2: (2n-1)/n. Zigzag or striped blocks bring it to 1 (Brandon et al., "Striped
    attention", 2023).

    >>> causal_imbalance(4), causal_imbalance(4, balanced=True)
    (1.75, 1.0)
    """
    return 1.0 if balanced else (2 * n - 1) / n


def expert_layer_bytes(
    tokens: float,
    n: int,
    *,
    experts_per_token: int,
    width: int,
    itemsize: float,
    capacity_factor: float = 1.0,
    recompute: bool = False,
) -> float:
    """One mixture-of-experts layer: dispatch and combine, forward and backward, 4ρ·T·k·φ·h·β.

    Recomputing the layer dispatches and combines once more. Lepikhin et al., "GShard", 2020,
    section 3.2. Experts' gradients are reduced over their own replicas, see `data_bytes`.

    Args:
        tokens: T on a device.
        n: expert-parallel parts.
        experts_per_token: k.
        width: h.
        itemsize: β.
        capacity_factor: φ.
        recompute: whether the backward pass runs the layer again.
    """
    sent = tokens * experts_per_token * capacity_factor * width * itemsize
    return (6 if recompute else 4) * ring_fraction(n) * sent


def expert_rows_bytes(activation_bytes: float, n: int, *, recompute: bool = False) -> float:
    """One layer of experts that take whole rows, of which n devices have parts: 4(n-1)A.

    Tokens are gathered to the devices whose places in the experts' buffers they fill, and sums of
    them scattered, forward and backward; recomputing the layer gathers once more.

    Args:
        activation_bytes: A of a device.
        n: context-parallel parts.
        recompute: whether the backward pass runs the layer again.
    """
    return (5 if recompute else 4) * (n - 1) * activation_bytes


def stage_bytes(
    activation_bytes: float, microbatches: int, *, chunks: int = 1, end: bool = False
) -> float:
    """Activations and their gradients that one pipeline stage sends on.

    An interior stage sends every microbatch forward and its gradient backward, once a chunk:
    2vmA. The first stage has no one to send the first chunk's gradients to and the last none
    to send the last chunk's activations to: (2v-1)mA, a half without interleaving. Narayanan
    et al., "Efficient large-scale language model training on GPU clusters", 2021, section 2.2.

    Args:
        activation_bytes: A, as split over the context and tensor axes.
        microbatches: m.
        chunks: v, groups of layers a stage holds.
        end: the first or the last stage.
    """
    return (2 * chunks - end) * microbatches * activation_bytes


def bubble_fraction(
    stages: int, microbatches: int, *, chunks: int = 1, zero_bubble: bool = False
) -> float:
    """Idle part of a pipeline's step: (p-1)/(vm + p - 1) for GPipe, 1F1B and interleaved 1F1B.

    Zero-bubble schedules (Qi et al., 2023, table 1, ZB-H1) fill two thirds of it with weight
    gradients, where forward, input gradient and weight gradient take equally long.

    >>> bubble_fraction(4, 12)
    0.2
    """
    idle = (stages - 1) / (3 if zero_bubble else 1)
    return idle / (chunks * microbatches + idle)


def microbatches_in_flight(
    stage: int, stages: int, microbatches: int, *, gpipe: bool = False
) -> int:
    """Microbatches whose activations a stage holds: all under GPipe, min(p - i, m) under 1F1B."""
    return microbatches if gpipe else min(stages - stage, microbatches)
