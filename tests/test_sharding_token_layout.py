"""Deals of tokens to devices: each a permutation, and the work that it leaves each device."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.bounds import causal_imbalance
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.token_layout import (
    TokenLayout,
    causal_pairs,
    check_length,
    chunk_length,
    executed_pairs,
    gathered_pairs,
    place_in_row,
    ring_pairs,
    token_order,
)

LAYOUTS = get_args(TokenLayout)
layouts = st.sampled_from(LAYOUTS)
sizes = st.integers(1, 8)


def row_of(layout: str, parts: int, unit: int) -> int:
    """A length that the layout can deal, in ``unit`` tokens a block."""
    return unit * parts * (2 if layout == "zigzag" else 1)


@given(layouts, sizes, st.integers(1, 20))
def test_a_deal_is_a_permutation(layout: Any, parts: int, unit: int) -> None:
    length = row_of(layout, parts, unit)
    order = token_order(layout, length, parts)
    assert order.dtype == np.int32 and sorted(order) == list(range(length))
    row = np.arange(length) * 7
    assert (row[order][order.argsort()] == row).all()


@given(layouts, sizes, st.integers(1, 20))
def test_arithmetic_places_tokens_as_the_deal_does(layout: Any, parts: int, unit: int) -> None:
    length = row_of(layout, parts, unit)
    local = length // parts
    order = token_order(layout, length, parts).reshape(parts, local)
    for device in range(parts):
        assert place_in_row(layout, length, parts, device, local - 1) == order[device, -1]
        at = np.arange(local)
        assert (place_in_row(layout, length, parts, device, at) == order[device]).all()


@given(layouts, sizes, st.integers(1, 20))
def test_needed_pairs_are_all_pairs(layout: Any, parts: int, unit: int) -> None:
    length = row_of(layout, parts, unit)
    needed = causal_pairs(layout, length, parts)
    assert len(needed) == parts and sum(needed) == length * (length + 1) // 2


@given(sizes, st.integers(1, 20))
def test_who_needs_how_much(parts: int, unit: int) -> None:
    """The module's table: zigzag is exactly even, striped all but, contiguous not at all."""
    length = 2 * unit * parts

    def busiest(layout: Any) -> float:
        needed = causal_pairs(layout, length, parts)
        return max(needed) * parts / sum(needed)

    assert len(set(causal_pairs("zigzag", length, parts))) == 1
    assert busiest("striped") == pytest.approx((length + parts) / (length + 1))
    contiguous = causal_pairs("contiguous", length, parts)
    assert contiguous == sorted(contiguous)
    local = length // parts
    exact = ((2 * parts - 1) * local + 1) / (length + 1)
    assert busiest("contiguous") == pytest.approx(exact)


def test_in_long_rows_the_imbalance_is_that_of_the_bounds() -> None:
    for layout in LAYOUTS:
        needed = causal_pairs(layout, 2**17, 8)
        found = max(needed) * 8 / sum(needed)
        assert found == pytest.approx(
            causal_imbalance(8, balanced=layout != "contiguous"), rel=1e-4
        )


@given(layouts, sizes, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_lists_hold_every_pair_that_is_needed(
    layout: Any, parts: int, chunks: int, chunk: int, causal: bool
) -> None:
    """And, causal, no chunk pair without one, but under contiguous, whose devices wait anyway."""
    length = row_of(layout, parts, chunks * chunk)
    order = token_order(layout, length, parts).reshape(parts, -1, chunk)
    pairs = ring_pairs(layout, length, parts, chunk, causal=causal)
    for mine in range(parts):
        for owner in range(parts):
            listed = pairs.own if mine == owner else pairs.earlier if owner < mine else pairs.later
            late, early = order[mine].max(axis=1), order[owner].min(axis=1)
            needed = (late[:, None] >= early[None, :]) | (not causal)
            found = np.zeros_like(needed)
            found[listed[:, 0], listed[:, 1]] = True
            assert found.sum() == len(listed), "a pair is listed twice"
            assert (found | ~needed).all(), "a pair is missing"
            if layout == "zigzag" or mine == owner:
                assert (found == needed).all(), "a pair is listed in vain"


@given(layouts, sizes, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_devices_of_a_step_work_alike(
    layout: Any, parts: int, chunks: int, chunk: int, causal: bool
) -> None:
    length = row_of(layout, parts, chunks * chunk)
    pairs = ring_pairs(layout, length, parts, chunk, causal=causal)
    assert len(pairs.earlier) == len(pairs.later)
    done = executed_pairs(layout, length, parts, chunk, causal=causal)
    assert len(done) == parts and done[0] == len(pairs.own) * chunk**2
    gathered = gathered_pairs(layout, length, parts, chunk, causal=causal)
    assert gathered.shape == (parts, sum(done) // chunk**2, 2)
    assert sum(done) * parts >= (sum(causal_pairs(layout, length, parts)) if causal else length**2)


def test_gathered_lists_are_the_rings_with_keys_where_they_lie() -> None:
    listed = gathered_pairs("striped", 12, 3, 2, causal=True)
    assert listed[0].tolist() == [[0, 0], [0, 2], [0, 4], *([1, key] for key in range(6))]
    assert (listed == listed[:1]).all()


def test_what_a_layout_saves() -> None:
    """64k tokens on 8 devices: of all pairs, the part that a device computes."""
    all_pairs = 2**16 * 2**16 / 8
    part = {layout: sum(executed_pairs(layout, 2**16, 8, 512)) / all_pairs for layout in LAYOUTS}
    assert part["zigzag"] == pytest.approx(0.5, abs=0.005)
    assert part["striped"] == pytest.approx(0.5 + 1 / 32)  # half of the diagonal chunks is masked
    assert part["contiguous"] == pytest.approx(1 - 15 / 256)  # (1 - 1/16) / 2 of the first step


@given(layouts, sizes, st.integers(1, 300), st.integers(1, 64))
def test_chunks_divide_the_block(layout: Any, parts: int, block: int, limit: int) -> None:
    chunk = chunk_length(layout, row_of(layout, parts, block), parts, limit)
    assert block % chunk == 0 and chunk <= 2 * limit
    assert chunk <= limit or all(block % size for size in range(-(-limit // 8), limit + 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_length_that_cannot_be_dealt_names_those_that_can(layout: Any) -> None:
    check_length(layout, 24, 4)
    with pytest.raises(PlacementError) as caught:
        check_length(layout, 27, 4)
    fix = "use rows of 24 or 32 tokens" if layout == "zigzag" else "use rows of 24 or 28 tokens"
    assert str(caught.value).splitlines() == [
        f"cannot deal rows of 27 tokens to 4 devices, {layout}",
        f"  where: length 27, context=4, layout {layout}",
        "  why:   27 is not divisible by "
        + ("8 (2 blocks a device)" if layout == "zigzag" else "4"),
        f"  fix:   {fix}",
    ]


def test_zigzag_points_to_striped_where_that_would_do() -> None:
    with pytest.raises(PlacementError, match="use rows of 24 or 32 tokens, or the layout striped"):
        check_length("zigzag", 28, 4)
    with pytest.raises(PlacementError, match="use rows of 8 tokens"):
        token_order("zigzag", 3, 4)
    with pytest.raises(PlacementError, match="a row has no tokens"):
        check_length("contiguous", 0, 4)
