"""Attention over rows split along a mesh axis, with keys gathered or heads exchanged.

Two alternatives to `meshwright.train.ring`, for local arrays inside a `jax.shard_map`:

=========  =================================  ===========================  ====================
kind       sent, forward and backward         held at once                 heads
=========  =================================  ===========================  ====================
ring       (c-1)K, (c-1)(K + K_g) in hops     three blocks of keys         any number
gathered   (c-1)K, (c-1)(K + K_g) at once     all keys of a row            any number
exchanged  ρ(c)(Q + K), and again             whole rows of 1/c of heads   multiples of c
=========  =================================  ===========================  ====================

K bytes of keys and values a device, K_g of their gradients (float32 in the ring, which adds to
them at every hop; the keys' dtype in the reduce-scatter), Q of queries and output; closed forms in
`meshwright.sharding.bounds`. *Gathered* moves the ring's bytes in one collective each way: few
launches, and nothing to fall behind where links are fast and rows not extremely long (Llama Team,
"The Llama 3 herd of models", 2024, section 3.3.2); with few key heads the gathered keys are small
beside the queries. *Exchanged* (Jacobs et al., "DeepSpeed Ulysses", 2023) sends less the more
devices there are, 1/c of what the others do, and leaves a whole row to any kernel of one device,
but splits heads, which tensor parallelism splits too.

The backward pass of *gathered* is written out (`jax.custom_vjp`) and gathers the keys again:
`jax.checkpoint` would do that too, and differentiate the loop over chunks, keeping the scores of
every one. *Exchanged* needs nothing of the kind: transposed, an all-to-all is an all-to-all.

Rejected: gathered keys put in the order of the row. It copies all of them; chunks are found where
they lie instead. Exchanged rows are put in order, as kernels ask for it, by reshaping: a gather by
index is slow on TPUs and its transpose is a scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from meshwright.models.hooks import ATTENTION
from meshwright.sharding.token_layout import (
    TokenLayout,
    check_heads,
    check_length,
    chunk_length,
    gathered_pairs,
    place_in_row,
)
from meshwright.train.ring import (
    CHUNK,
    ChunkKernel,
    KeyBlock,
    Places,
    QueryBlock,
    SavedRows,
    Softmax,
    after,
    attend,
    heads_last,
)

__all__ = ["Exchanged", "Gathered", "exchanged_attention", "gathered_attention"]


def gathered_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    *,
    axis: str,
    parts: int,
    layout: TokenLayout,
    causal: bool,
    scale: float,
    chunk: int = CHUNK,
) -> Array:
    """Attend from the tokens of this device to the gathered keys of all.

    Scores exist for one pair of chunks at a time, and pairs that causality empties are left out:
    under zigzag and striped as many on each device, under contiguous those of all other devices
    are computed, as a loop must be as long on all. The backward pass gathers again and
    reduce-scatters the gradients of keys: summed in float32 over a device's queries, and over
    devices in their own dtype, as gradients of weights are. (Compilers for TPUs would narrow a
    float32 sum that is rounded afterwards; so it is the same everywhere.)

    Args:
        q, k, v, segments, axis, parts, layout, causal, scale, chunk: as
            `meshwright.train.ring.ring_attention`.

    Returns:
        [B, T / parts, N, H] in the dtype of ``q``.

    Raises:
        PlacementError: a length the layout cannot deal, or heads that do not group.
    """
    length = q.shape[1] * parts
    check_length(layout, length, parts)
    check_heads("gather", q.shape[2], k.shape[2], parts)
    tokens = chunk_length(layout, length, parts, chunk)
    gathered = Gathered(axis, parts, layout, length, ChunkKernel(tokens, causal, scale))
    return attend(gathered, q, k, v, segments)


@dataclass(frozen=True)
class Gathered:
    """The static half of a call, as `meshwright.train.ring.Ring`."""

    axis: str
    parts: int
    layout: TokenLayout
    length: int
    kernel: ChunkKernel

    @jax.named_scope("gathered_attention")
    def forward(self, q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Array]:
        """Output and log-sum-exp: as `meshwright.train.ring.Ring.forward`."""
        queries = QueryBlock.of(q, segments, k.shape[2])
        keys = self.keys(k, v, segments)
        seen = self.kernel.forward(Softmax.of(queries.q), queries, keys, *self.work())
        out, log_total = seen.result()
        return checkpoint_name((heads_last(out).astype(q.dtype), log_total), ATTENTION)

    @jax.named_scope("gathered_attention")
    def backward(self, saved: Any, out_grad: Array) -> tuple[Array, Array, Array]:
        """Gradients: as `meshwright.train.ring.Ring.backward`."""
        q, k, v, segments, out, log_total = saved
        # Otherwise a compiler may merge this gather with the forward pass's and keep the keys of
        # all devices in between.
        k, v, segments = after(out_grad, (k, v, segments))
        queries = QueryBlock.of(q, segments, k.shape[2])
        rows = SavedRows.of(out, out_grad, log_total)
        zeros = jnp.zeros(queries.q.shape, jnp.float32)
        keys = self.keys(k, v, segments)
        q_grad, sums = self.kernel.backward(zeros, queries, keys, rows, *self.work())
        whole = (jnp.swapaxes(x, 1, 2).astype(k.dtype) for x in sums)
        k_grad, v_grad = (
            jax.lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True) for x in whole
        )
        return heads_last(q_grad).astype(q.dtype), k_grad, v_grad

    def keys(self, k: Array, v: Array, segments: Array | None) -> KeyBlock:
        """The keys of all devices, in the order of devices."""

        gather = functools.partial(jax.lax.all_gather, axis_name=self.axis, axis=1, tiled=True)
        return KeyBlock.of(*jax.tree.map(gather, (k, v, segments)))

    def work(self) -> tuple[Any, tuple[Places, Places]]:
        """This device's chunk pairs, and the places of its queries and of the gathered keys."""
        mine = jax.lax.axis_index(self.axis)
        kernel, local = self.kernel, self.length // self.parts
        pairs = gathered_pairs(
            self.layout, self.length, self.parts, kernel.chunk, causal=kernel.causal
        )
        alike = bool((pairs == pairs[:1]).all())
        place = functools.partial(place_in_row, self.layout, self.length, self.parts)
        return pairs[0] if alike else jnp.asarray(pairs)[mine], (
            lambda at: place(mine, at),
            lambda at: place(at // local, at % local),
        )


def exchanged_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    *,
    axis: str,
    parts: int,
    layout: TokenLayout,
    causal: bool,
    scale: float,
    attend: Callable[..., Array],
) -> Array:
    """Attend on whole rows and a part of the heads, after an all-to-all; a second one goes back.

    Work is balanced under every layout. With fewer key heads than devices a key head is sent to
    each device whose query heads use it.

    Args:
        q, k, v, segments, axis, parts, layout, causal, scale: as
            `meshwright.train.ring.ring_attention`.
        attend: (q [B, T, N / parts, H], k, v [B, T, K', H], *, segments int32 [B, T] or None,
            causal, scale) → [B, T, N / parts, H]: attention of one device, tokens in the order
            of the row, query head n using key head n // (N / parts / K').

    Returns:
        [B, T / parts, N, H] in the dtype of ``attend``'s result.

    Raises:
        PlacementError: a length the layout cannot deal, or heads the devices cannot share.
    """
    check_length(layout, q.shape[1] * parts, parts)
    check_heads("ulysses", q.shape[2], k.shape[2], parts)
    exchanged = Exchanged(axis, parts, layout)
    with jax.named_scope("exchanged_attention"):
        k, v = (exchanged.repeated(x, x.shape[2]) for x in (k, v))
        if segments is not None:
            segments = exchanged.all_segments(segments)
        q, k, v = (exchanged.whole_rows(x) for x in (q, k, v))
        out = attend(q, k, v, segments=segments, causal=causal, scale=scale)
        return exchanged.own_tokens(out)


@dataclass(frozen=True)
class Exchanged:
    """Heads for tokens, and back.

    Attributes:
        axis: mesh axis that splits the rows.
        parts: its size.
        layout: which tokens of a row each device has.
    """

    axis: str
    parts: int
    layout: TokenLayout

    def repeated(self, x: Array, heads: int) -> Array:
        """Keys repeated so that every device gets the heads its queries use.

        Args:
            x: keys or values [B, T, K, H].
            heads: of one device; K where no other axis splits them.
        """
        return jnp.repeat(x, self.parts // heads, axis=2) if heads < self.parts else x

    def whole_rows(self, x: Array) -> Array:
        """[B, T / parts, N, H] → [B, T, N / parts, H], tokens in the order of the row."""
        x = jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)
        return _in_row_order(x, self.layout, self.parts)

    def own_tokens(self, x: Array) -> Array:
        """Undoes `whole_rows`, and is its transpose."""
        x = _in_dealt_order(x, self.layout, self.parts)
        return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)

    def all_segments(self, x: Array) -> Array:
        """[B, T / parts] → [B, T], tokens in the order of the row."""
        dealt = jax.lax.all_gather(x, self.axis, axis=1, tiled=True)
        return _in_row_order(dealt, self.layout, self.parts)


def _in_row_order(x: Array, layout: TokenLayout, parts: int) -> Array:
    """Tokens [B, T, …] from the order of devices into that of the row."""
    rows, length, *rest = x.shape
    if layout == "striped":
        return jnp.swapaxes(x.reshape(rows, parts, -1, *rest), 1, 2).reshape(x.shape)
    if layout == "zigzag":
        halves = x.reshape(rows, parts, 2, length // parts // 2, *rest)
        row = jnp.concatenate([halves[:, :, 0], jnp.flip(halves[:, :, 1], axis=1)], axis=1)
        return row.reshape(x.shape)
    return x


def _in_dealt_order(x: Array, layout: TokenLayout, parts: int) -> Array:
    """Undoes `_in_row_order`."""
    rows, length, *rest = x.shape
    if layout == "striped":
        return jnp.swapaxes(x.reshape(rows, -1, parts, *rest), 1, 2).reshape(x.shape)
    if layout == "zigzag":
        blocks = x.reshape(rows, 2 * parts, length // parts // 2, *rest)
        low, high = blocks[:, :parts], jnp.flip(blocks[:, parts:], axis=1)
        return jnp.stack([low, high], axis=2).reshape(x.shape)
    return x
