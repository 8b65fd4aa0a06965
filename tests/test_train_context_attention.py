"""Gathered keys and exchanged heads against plain attention on one device; bytes on the wire."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_train_ring import (
    HEADS,
    LAYERS,
    LAYOUTS,
    LIMIT,
    ROWS,
    WIDTH,
    Case,
    dense,
    difference,
    keys_bytes,
    mapped,
    moves,
)

from meshwright.sharding.bounds import all_to_all_context_bytes, gathered_context_bytes
from meshwright.sharding.errors import PlacementError
from meshwright.train.context_attention import (
    check_heads,
    exchanged_attention,
    gathered_attention,
)
from meshwright.train.ring import ring_attention

F32 = 4
exchanged = functools.partial(exchanged_attention, attend=dense)


def gathered_of(case: Case) -> Callable[..., Array]:
    return functools.partial(gathered_attention, chunk=case.chunk)


GATHERED = [
    *[Case(4, layout, causal, documents=True) for layout in LAYOUTS for causal in (True, False)],
    *[Case(8, layout) for layout in LAYOUTS],
    Case(1),
    Case(2, local=26, chunk=512),
    Case(3, "striped", local=15, chunk=4, kv_heads=1),
]
EXCHANGED = [
    *[Case(4, layout, causal, documents=True) for layout in LAYOUTS for causal in (True, False)],
    *[Case(2, layout, kv_heads=4) for layout in LAYOUTS],
    Case(1),
    Case(4, local=6, kv_heads=1),
]


@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_gathered_equals_attention_on_one_device(case: Case) -> None:
    assert difference(mapped(gathered_of(case), case), case) < LIMIT


@pytest.mark.parametrize("case", EXCHANGED, ids=str)
def test_exchanged_equals_attention_on_one_device(case: Case) -> None:
    assert difference(mapped(exchanged, case), case) < LIMIT


@pytest.mark.parametrize("kind", ["gathered", "exchanged"])
def test_bfloat16_is_as_good_as_its_inputs(kind: str) -> None:
    case = Case(2, documents=True)
    attention = gathered_of(case) if kind == "gathered" else exchanged
    assert difference(mapped(attention, case), case, jnp.bfloat16) < 3e-2


@pytest.mark.parametrize("kind", ["gathered", "exchanged"])
def test_two_axes_are_manual_and_layers_are_recomputed(kind: str) -> None:
    case = Case(2, documents=True)
    mesh = jax.make_mesh((2, 2), ("tensor", "context"), axis_types=(AxisType.Auto,) * 2)
    split = P(None, "context", "tensor")
    attention = gathered_of(case) if kind == "gathered" else exchanged
    attend = jax.shard_map(
        functools.partial(attention, **case.static),
        mesh=mesh,
        in_specs=(split, split, split, P(None, "context")),
        out_specs=split,
        check_vma=False,
    )
    assert difference(jax.checkpoint(attend), case) < LIMIT


def test_exchanged_hands_on_whole_rows_in_order() -> None:
    case = Case(4, "striped", documents=True)
    seen: list[Any] = []

    def attend(q: Array, k: Array, v: Array, **how: Any) -> Array:
        seen.append((q.shape, k.shape, v.shape, how["segments"].shape, how["causal"]))
        return q

    row = jnp.arange(case.length, dtype=jnp.float32)
    x = jnp.broadcast_to(row[None, :, None, None], (ROWS, case.length, HEADS, WIDTH))
    kernel = functools.partial(exchanged_attention, attend=attend)
    out = mapped(kernel, case)(x, x, x, jnp.zeros((ROWS, case.length), jnp.int32))
    np.testing.assert_array_equal(out, x)
    one_head = (ROWS, case.length, 1, WIDTH)
    assert seen == [(one_head, one_head, one_head, (ROWS, case.length), True)]


@pytest.mark.parametrize("parts", [2, 8])
def test_gathered_sends_what_the_bound_allows(parts: int) -> None:
    case = Case(parts)
    forward, backward = gathered_context_bytes(keys_bytes(case), parts, recompute=True)
    scattered = backward - forward
    assert moves(gathered_of(case), case) == {
        ("forward", "all-gather"): (2 * LAYERS, LAYERS * forward),
        ("backward", "all-gather"): (2 * LAYERS, LAYERS * forward),
        ("backward", "reduce-scatter"): (2 * LAYERS, LAYERS * scattered),
    }


@pytest.mark.parametrize(("parts", "kv_heads"), [(2, 2), (4, 4), (4, 2)])
def test_exchanged_sends_what_the_bound_allows(parts: int, kv_heads: int) -> None:
    """With fewer key heads than devices, a head for each."""
    case = Case(parts, kv_heads=kv_heads)
    one_way = all_to_all_context_bytes(
        ROWS,
        case.length,
        parts,
        queries=HEADS * WIDTH,
        keys=max(kv_heads, parts) * WIDTH,
        itemsize=F32,
    )
    assert moves(exchanged, case) == {
        ("forward", "all-to-all"): (4 * LAYERS, LAYERS * one_way),
        ("backward", "all-to-all"): (4 * LAYERS, LAYERS * one_way),
    }


def test_heads_that_devices_cannot_share_name_the_sizes_that_work() -> None:
    check_heads("ring", 6, 3, 4)
    check_heads("gather", 6, 3, 4)
    check_heads("ulysses", 32, 8, 16)
    with pytest.raises(PlacementError) as caught:
        check_heads("ulysses", 12, 6, 4)
    assert str(caught.value).splitlines() == [
        "cannot exchange 12 query heads and 6 key heads over 4 devices",
        "  where: context=4, 12 query heads and 6 key heads on a device",
        "  why:   neither of 6 key heads and 4 devices divides the other",
        "  fix:   use context of 1, 2, 3, 6, 12, or --context.kind ring or gather",
    ]
    with pytest.raises(PlacementError, match="12 query heads are not divisible by 8"):
        check_heads("ulysses", 12, 4, 8)
    with pytest.raises(PlacementError, match="cannot share 4 key heads among 6 query heads"):
        check_heads("ring", 6, 4, 2)


def test_functions_refuse_what_the_checks_refuse() -> None:
    def called(attention: Any, case: Case) -> Any:
        shapes = [(ROWS, case.length, heads, WIDTH) for heads in (HEADS, *[case.kv_heads] * 2)]
        return jax.eval_shape(mapped(attention, case), *map(jnp.zeros, shapes), None)

    with pytest.raises(PlacementError, match="4 query heads are not divisible by 8"):
        called(exchanged, Case(8))
    with pytest.raises(PlacementError, match="cannot share 3 key heads among 4 query heads"):
        called(gathered_attention, Case(2, kv_heads=3))
    for attention in (exchanged, gathered_attention):
        with pytest.raises(PlacementError, match="cannot deal rows of 30 tokens to 2 devices"):
            called(attention, Case(2, local=15))


def test_a_ring_holds_an_eighth_of_the_keys_that_gather_holds() -> None:
    """Rows of 131,072 tokens on 8 devices: what a compiled forward pass needs besides its operands.

    Both hold what a device computes with; gather besides the keys of seven others.
    """
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    tokens, heads, width = 131_072, 2, 8
    split = NamedSharding(mesh, P(None, "context"))
    shape = jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.float32, sharding=split)
    how = {"axis": "context", "parts": 8, "layout": "zigzag", "causal": True, "scale": 1.0}

    def needed(attention: Callable[..., Array]) -> int:
        attend = jax.shard_map(
            lambda q, k, v: attention(q, k, v, None, chunk=128, **how),
            mesh=mesh,
            in_specs=split.spec,
            out_specs=split.spec,
            check_vma=False,
        )
        program = jax.jit(attend).lower(shape, shape, shape).compile()
        found: Any = program.memory_analysis()
        return found.temp_size_in_bytes

    whole = 2 * tokens * heads * width * F32
    assert needed(gathered_attention) - needed(ring_attention) > whole * 7 / 8
    assert needed(ring_attention) < whole
