"""Bounds: each closed form against a hand count, and against simulated rings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding import bounds

sizes = st.integers(1, 64)


def ring_reduce_scatter(elements: int, n: int) -> int:
    """Elements device 0 sends when every hop passes on one block of a ring reduce-scatter."""
    block = elements // n
    return sum(block for _ in range(n - 1))


@given(n=st.integers(2, 32), blocks=st.integers(1, 100))
def test_wire_bytes_are_those_of_a_ring(n: int, blocks: int) -> None:
    size = n * blocks
    once = ring_reduce_scatter(size, n)
    assert bounds.wire_bytes("reduce-scatter", size, n) == pytest.approx(once)
    assert bounds.wire_bytes("all-gather", size, n) == pytest.approx(once)
    assert bounds.wire_bytes("all-reduce", size, n) == pytest.approx(2 * once)
    # Each device keeps its own block of an all-to-all and sends the others one hop.
    assert bounds.wire_bytes("all-to-all", size, n) == pytest.approx(size - size / n)


def test_nobody_sends_to_itself() -> None:
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert bounds.wire_bytes(kind, 1e9, 1) == 0


@given(st.lists(sizes, min_size=1, max_size=4))
def test_axis_shares_make_one_whole(over: list[int]) -> None:
    shares = bounds.axis_shares(over)
    assert sum(shares) == pytest.approx(1 if math.prod(over) > 1 else 0)
    assert all(share >= 0 for share in shares)
    assert all(share == 0 for share, size in zip(shares, over, strict=True) if size == 1)


def test_axis_shares_are_a_hierarchical_gather() -> None:
    """8 blocks over 2 × 4: one from the other group, then 3 × 2 within."""
    assert bounds.axis_shares([2, 4]) == pytest.approx((1 / 7, 6 / 7))


def test_data_parallel_8b_on_64() -> None:
    """Llama-3-8B, bfloat16: 2 × 63/64 × 2 bytes × 8.03e9."""
    sent = bounds.data_bytes(8_030_261_248, 64, gradient_itemsize=2)
    assert sent == 2 * 63 / 64 * 16_060_522_496


def test_fsdp_8b_on_64() -> None:
    """Two gathers and one reduce-scatter of 16.06 GB, 63/64 of each: 47.4 GB."""
    sent = bounds.fsdp_bytes(8_030_261_248, 64, gradient_itemsize=2, parameter_itemsize=2)
    assert sent == pytest.approx(47_428_730_496)
    accumulated = bounds.fsdp_bytes(
        8_030_261_248,
        64,
        gradient_itemsize=4,
        parameter_itemsize=2,
        microbatches=4,
        whole_accumulators=True,
    )
    assert accumulated == pytest.approx(63 / 64 * (4 * 2 * 2 + 4) * 8_030_261_248)


@given(n=st.integers(2, 512), m=st.integers(1, 16))
def test_zero_stages_in_order(n: int, m: int) -> None:
    """ZeRO-1 costs what data parallelism does; 2 and 3 trade traffic for memory."""
    items: dict[str, Any] = {"gradient_itemsize": 2.0, "parameter_itemsize": 2.0}
    plain = bounds.data_bytes(1e9, n, gradient_itemsize=2)
    one = bounds.zero1_bytes(1e9, n, **items)
    two = bounds.zero2_bytes(1e9, n, **items, microbatches=m)
    three = bounds.fsdp_bytes(1e9, n, **items, microbatches=m)
    assert one == pytest.approx(plain)
    assert one <= two * (1 + 1e-12) < three


def test_hybrid_sums_to_one_reduction() -> None:
    """A reduce-scatter within and an all-reduce of the shards moves less than one over all."""
    inner, outer = bounds.hybrid_bytes(
        1e9, 8, 4, gradient_itemsize=2, parameter_itemsize=2, gathers=2
    )
    assert inner == pytest.approx(7 / 8 * 6e9)
    assert outer == pytest.approx(2 * 3 / 4 * 2e9 / 8)
    reductions = 7 / 8 * 2e9 + outer
    assert reductions < bounds.data_bytes(1e9, 32, gradient_itemsize=2)


@pytest.mark.parametrize(
    ("recompute", "sequence", "terms"),
    [(False, False, 8), (True, False, 10), (False, True, 8), (True, True, 11)],
)
def test_tensor_layer(recompute: bool, sequence: bool, terms: int) -> None:
    sent = bounds.tensor_layer_bytes(1000, 4, recompute=recompute, sequence=sequence)
    assert sent == terms * 0.75 * 1000


def test_vocabulary() -> None:
    """Two all-reduces of A and one of three scalars for each of 10 tokens, over 2 devices."""
    assert bounds.vocabulary_bytes(1000, 2, tokens=10) == 2 * 1000 + 120


def test_context() -> None:
    assert bounds.ring_context_bytes(100, 4) == (300, 600)
    assert bounds.gathered_context_bytes(100, 4) == (300, 300)
    assert bounds.gathered_context_bytes(100, 4, recompute=True) == (300, 600)
    # 2 rows × 16 tokens over 4: queries and output 8 wide, keys and values 2, two bytes each.
    sent = bounds.all_to_all_context_bytes(2, 16, 4, queries=8, keys=2, itemsize=2)
    assert sent == 0.75 * 2 * 4 * (8 + 8 + 2 + 2) * 2


@given(n=st.integers(1, 64))
def test_causal_imbalance_counts_blocks(n: int) -> None:
    """Device i of n sees i whole blocks before its own, of which a mask keeps half."""
    work = [i + 0.5 for i in range(n)]
    assert bounds.causal_imbalance(n) == pytest.approx(max(work) / (sum(work) / n))
    assert bounds.causal_imbalance(n, balanced=True) == 1


def test_experts() -> None:
    kwargs = {"experts_per_token": 2, "width": 16, "itemsize": 2.0}
    assert bounds.expert_layer_bytes(10, 4, **kwargs) == 4 * 0.75 * 10 * 2 * 16 * 2
    assert bounds.expert_layer_bytes(10, 4, **kwargs, recompute=True) == pytest.approx(1440 * 2)
    assert bounds.expert_rows_bytes(100, 4) == 1200
    assert bounds.expert_rows_bytes(100, 4, recompute=True) == 1500


@given(stages=st.integers(2, 8), m=st.integers(1, 8), chunks=st.integers(1, 4))
def test_stages_count_the_sends(stages: int, m: int, chunks: int) -> None:
    """Every boundary between consecutive chunks is crossed forward and back by each microbatch."""
    sent = dict.fromkeys(range(stages), 0)
    for place in range(stages * chunks - 1):
        sent[place % stages] += m  # an activation on to the next chunk
        sent[(place + 1) % stages] += m  # its gradient back
    assert sent[0] == bounds.stage_bytes(1, m, chunks=chunks, end=True)
    assert sent[stages - 1] == bounds.stage_bytes(1, m, chunks=chunks, end=True)
    for stage in range(1, stages - 1):
        assert sent[stage] == bounds.stage_bytes(1, m, chunks=chunks)


def test_bubbles() -> None:
    assert bounds.bubble_fraction(4, 12) == 3 / 15
    assert bounds.bubble_fraction(4, 12, chunks=2) == 3 / 27
    assert bounds.bubble_fraction(4, 12, zero_bubble=True) == pytest.approx(1 / 13)
    assert bounds.microbatches_in_flight(1, 4, 8) == 3
    assert bounds.microbatches_in_flight(1, 4, 8, gpipe=True) == 8


def test_rare_synchronisation() -> None:
    each = bounds.local_steps_bytes(1e9, 8, itemsize=4, every=1)
    assert bounds.local_steps_bytes(1e9, 8, itemsize=4, every=500) == each / 500
    assert bounds.low_rank_elements(4096, 1024, 4) == 4 * 5120
