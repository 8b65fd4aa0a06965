"""Ring attention against plain attention on one device: numbers, bytes on the wire, memory."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from meshwright.models.hooks import ATTENTION
from meshwright.sharding.bounds import ring_context_bytes
from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.token_layout import TokenLayout, token_order
from meshwright.train.context_attention import gathered_attention
from meshwright.train.ring import (
    ChunkKernel,
    KeyBlock,
    QueryBlock,
    SavedRows,
    Softmax,
    ring_attention,
)

LAYOUTS = get_args(TokenLayout)
Traffic = dict[tuple[str, str], tuple[int, float]]
"""(phase, kind) → executions and wire bytes."""
LAYERS = 3
LIMIT = 1e-5
ROWS, HEADS, WIDTH, F32 = 2, 4, 8, 4


@dataclass(frozen=True)
class Case:
    """One attention over one mesh axis, and how its inputs are made.

    Attributes:
        parts: size of the axis.
        layout, causal, chunk: as `ring_attention`.
        local: tokens a device.
        kv_heads: key heads, `HEADS` a multiple.
        documents: whether rows are packed; borders do not fall on those of devices.
    """

    parts: int
    layout: Any = "zigzag"
    causal: bool = True
    local: int = 16
    kv_heads: int = 2
    documents: bool = False
    chunk: int = 4

    def __str__(self) -> str:
        flags = [self.layout, "causal" if self.causal else "full", *["documents"] * self.documents]
        return f"{self.parts}-{'-'.join(flags)}-{self.local}-{self.kv_heads}-{self.chunk}"

    @property
    def length(self) -> int:
        return self.parts * self.local

    @property
    def static(self) -> dict[str, Any]:
        """The keyword arguments that every kind of attention takes."""
        same = {"causal": self.causal, "scale": WIDTH**-0.5}
        return {"axis": "context", "parts": self.parts, "layout": self.layout, **same}


def mesh_of(parts: int) -> Mesh:
    auto = (AxisType.Auto,)
    return jax.make_mesh((parts,), ("context",), axis_types=auto, devices=jax.devices()[:parts])


def inputs(case: Case, dtype: Any = jnp.float32) -> tuple[Array, ...]:
    """q, k, v and the output's gradient, in the order of the row, and documents or None."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, case.kv_heads, case.kv_heads, HEADS)
    shapes = [(ROWS, case.length, count, WIDTH) for count in heads]
    arrays = [jax.random.normal(*made, dtype) for made in zip(keys, shapes, strict=True)]
    segments: Any = None
    if case.documents:
        borders = np.random.default_rng(0).integers(1, case.length, (ROWS, 4))
        at = np.arange(case.length)
        segments = jnp.asarray((at[None, :, None] >= borders[:, None, :]).sum(-1), jnp.int32)
    return *arrays, segments


def dense(
    q: Array, k: Array, v: Array, segments: Array | None, *, causal: bool, scale: float, **_: Any
) -> Array:
    """Attention as the textbook has it, in float32: [B, T, N, H]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    at = jnp.arange(q.shape[1])
    mask = (at[:, None] >= at[None, :])[None, None] if causal else jnp.ones((1, 1, 1, 1), bool)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def mapped(attention: Callable[..., Array], case: Case, mesh: Mesh | None = None) -> Any:
    """(q, k, v, segments) → output, all dealt and whole outside of the `shard_map`."""
    split = P(None, "context")
    return jax.shard_map(
        functools.partial(attention, **case.static),
        mesh=mesh or mesh_of(case.parts),
        in_specs=(split, split, split, split if case.documents else None),
        out_specs=split,
        check_vma=False,
    )


def graded(attend: Callable[..., Array]) -> Any:
    """(q, k, v, output's gradient, segments) → output, dq, dk, dv."""

    def run(q: Array, k: Array, v: Array, grad: Array, segments: Array | None) -> Any:
        out, back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, *back(grad)

    return jax.jit(run)


def difference(attend: Any, case: Case, dtype: Any = jnp.float32) -> float:
    """The largest error of output and gradients, each relative to its largest entry."""
    order = token_order(case.layout, case.length, case.parts)
    row = inputs(case, dtype)
    wide = [None if x is None else x.astype(jnp.promote_types(x.dtype, "int32")) for x in row]
    dealt = [None if x is None else x[:, order] for x in row]
    expected = graded(functools.partial(dense, **case.static))(*wide)
    found = graded(attend)(*dealt)
    errors = []
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        other = np.asarray(other, np.float32)[:, order]
        errors.append(np.abs(np.asarray(one, np.float32) - other).max() / np.abs(other).max())
    return float(max(errors))


def text_of(lowered: Any) -> str:
    """The compiled program."""
    return lowered.compile().as_text()


def ring_of(case: Case) -> Callable[..., Array]:
    return functools.partial(ring_attention, chunk=case.chunk)


def moves(attention: Callable[..., Array], case: Case, **checkpoint: Any) -> Traffic:
    """What `LAYERS` layers of attention send, forward and backward, in a loop as models have them.

    Args:
        attention: the kind.
        case: its sizes.
        checkpoint: arguments of `jax.checkpoint` around a layer; none for no checkpoint.
    """
    attend = mapped(attention, case)
    q, k, v, _, segments = inputs(case)

    def layer(x: Array, keys: tuple[Array, Array]) -> tuple[Array, None]:
        return attend(x, *keys, segments), None

    body = jax.checkpoint(layer, **checkpoint) if checkpoint else layer

    def loss(q: Array, k: Array, v: Array) -> Array:
        return jax.lax.scan(body, q, (k, v))[0].sum()

    k, v = (jnp.stack([x] * LAYERS) for x in (k, v))
    text = text_of(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v))
    found = collectives_of(parse_module(text), MeshSpec.of(mesh_of(case.parts)))
    assert not found.unread
    total: Traffic = {}
    for one in found.collectives:
        count, sent = total.get((one.phase, one.kind), (0, 0))
        total[one.phase, one.kind] = count + one.count, sent + one.wire_bytes
    return total


CASES = [
    *[Case(4, layout, causal, documents=True) for layout in LAYOUTS for causal in (True, False)],
    *[Case(parts, layout) for parts in (2, 8) for layout in LAYOUTS],
    Case(1),
    Case(3, local=18, chunk=5),
    Case(2, "striped", local=15, chunk=4, documents=True),
    Case(2, local=26, chunk=512),
    Case(8, "contiguous", kv_heads=1, documents=True),
    Case(4, kv_heads=4, causal=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_attention_on_one_device(case: Case) -> None:
    assert difference(mapped(ring_of(case), case), case) < LIMIT


def test_bfloat16_is_as_good_as_its_inputs() -> None:
    case = Case(4, documents=True)
    assert difference(mapped(ring_of(case), case), case, jnp.bfloat16) < 2e-2


def test_two_axes_are_manual_and_layers_are_recomputed() -> None:
    """Heads over `tensor`, and what a policy that names the residuals keeps."""
    case = Case(4, documents=True)
    mesh = jax.make_mesh((2, 4), ("tensor", "context"), axis_types=(AxisType.Auto,) * 2)
    split = P(None, "context", "tensor")
    attend = jax.shard_map(
        functools.partial(ring_of(case), **case.static),
        mesh=mesh,
        in_specs=(split, split, split, P(None, "context")),
        out_specs=split,
        check_vma=False,
    )
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    assert difference(jax.checkpoint(attend, policy=policy), case) < LIMIT


def test_batches_may_be_mapped_over() -> None:
    case = Case(2, documents=True)
    attend = mapped(ring_of(case), case)

    def one_row_each(*arrays: Array) -> Array:
        return jax.vmap(lambda *row: attend(*(x[None] for x in row))[0])(*arrays)

    assert difference(one_row_each, case) < LIMIT


def test_a_query_that_sees_nothing_has_no_output_and_no_gradient() -> None:
    kernel = ChunkKernel(4, causal=False, scale=1.0)
    q = jnp.ones((1, 1, 1, 4, WIDTH))
    keys = KeyBlock(q[0] * 1e4, q[0], jnp.full((1, 4), 1))
    queries = QueryBlock(q, jnp.zeros((1, 4), int))
    places = (lambda at: at, lambda at: at)
    pairs = np.zeros((1, 2), np.int32)
    out, log_total = kernel.forward(Softmax.of(q), queries, keys, pairs, places).result()
    assert not out.any() and not log_total.any()
    rows = SavedRows(q, log_total, log_total)
    q_grad, sums = kernel.backward(jnp.zeros(q.shape), queries, keys, rows, pairs, places)
    assert not q_grad.any() and not sums.k.any() and not sums.v.any()


def keys_bytes(case: Case) -> int:
    """K: keys and values of one device."""
    return 2 * ROWS * case.local * case.kv_heads * WIDTH * F32


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_sends_what_the_bound_allows(parts: int) -> None:
    """In a loop of layers: every hop a permute of keys and one of values, none wasted."""
    case = Case(parts)
    forward, backward = ring_context_bytes(keys_bytes(case), parts)
    hops = 2 * (parts - 1) * LAYERS
    assert moves(ring_of(case), case) == {
        ("forward", "collective-permute"): (hops, LAYERS * forward),
        ("backward", "collective-permute"): (2 * hops, LAYERS * backward),
    }


def test_a_checkpoint_that_keeps_the_residuals_sends_no_more() -> None:
    case = Case(4)
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    plain = moves(ring_of(case), case)
    assert moves(ring_of(case), case, policy=policy, prevent_cse=False) == plain


def test_documents_travel_too_and_weigh_little() -> None:
    case = Case(4, documents=True)
    found, bare = (
        sum(sent for _, sent in moves(ring_of(one), one).values())
        for one in (case, replace(case, documents=False))
    )
    assert bare < found <= bare + 2 * LAYERS * 3 * ROWS * case.local * 4


def temporaries(attention: Callable[..., Array], case: Case, *, backward: bool) -> int:
    """Temporary bytes of the program for one layer, nothing run."""
    attend = mapped(attention, case)
    q, k, v, grad, _ = jax.eval_shape(lambda: inputs(case))
    lowered: Any = (
        graded(attend).lower(q, k, v, grad, None)
        if backward
        else jax.jit(attend).lower(q, k, v, None)
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_holds_less_than_gathered_keys(backward: bool) -> None:
    case = Case(8, local=2048, kv_heads=4, chunk=128)
    ring = temporaries(ring_of(case), case, backward=backward)
    gathered = functools.partial(gathered_attention, chunk=case.chunk)
    assert 1.5 * ring < temporaries(gathered, case, backward=backward)


@pytest.mark.parametrize("attention", [ring_attention, gathered_attention])
def test_masks_are_made_where_they_are_used(attention: Callable[..., Array]) -> None:
    """Not for all chunks before the loop of layers, where jax would take what it can."""
    case = Case(4, documents=True)
    attend = mapped(functools.partial(attention, chunk=case.chunk), case)
    q, k, v, _, segments = inputs(case)

    def loss(k: Array, v: Array) -> Array:
        return jax.lax.scan(lambda x, kv: (attend(x, *kv, segments), None), q, (k, v))[0].sum()

    stacked = (jnp.stack([x] * LAYERS) for x in (k, v))
    text = text_of(jax.jit(jax.grad(loss, (0, 1))).lower(*stacked))
    masks = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"pred\[([\d,]+)\]", text)]
    assert 0 < max(masks) <= ROWS * HEADS * case.chunk**2


def test_a_length_that_cannot_be_dealt_is_refused() -> None:
    case = Case(2, local=15)
    with pytest.raises(PlacementError, match="cannot deal rows of 30 tokens to 2 devices, zigzag"):
        mapped(ring_of(case), case)(*inputs(case)[:3], None)
