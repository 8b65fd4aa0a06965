"""Whole rows where their length is split: sums over the parts, and buffers with places for all.

Almost everything treats a token alone, or (attention) has its own way across the axis. A layer of
experts asks two things of whole rows (`meshwright.models.routing`): the loads and means that its
losses are made of, and, with a capacity, which of a row's tokens an expert takes, and where in its
buffer each lies.

**Sums** (`parts_of`) are one all-reduce of 2E + 1 floats a row, and its transpose, another, back.

**Buffers** (`RowSplit`). An expert takes the first C tokens of the *row* that chose it, and those
may all be on one device of c, or dealt evenly. Programs have fixed shapes, so a device that kept
its own tokens would need room for min(C, T/c) of them for each expert: up to c times what it will
use, in memory and in matmuls, where c devices should do 1/c of the work each. So the places are
dealt and not the tokens: device i has places i·C/c … (i+1)·C/c - 1 of every expert, C rounded up
to a multiple of c, and the tokens come to it. Which token a place holds is found as on one device,
from the choices of the whole row in its order, whatever the order its tokens are stored in. With A
bytes of activations on a device and an element of β bytes, a layer and microbatch:

=========================  ==================================  ==============================
what                       bytes sent, there and back          bytes held
=========================  ==================================  ==============================
choices, gathered          (c-1)·4·k a token; dealt: twice     8·k a token of the whole rows
tokens, gathered           (c-1)·A forward, again backward     c·A, while the places are filled
sums of tokens, scattered  (c-1)·A forward, again backward     c·A, likewise
gates, gathered            (c-1)·β·k a token                   1 in each place
their gradients            (c-1)·4·k a token (undealt: β)      1 in each place
places                     none here                           φ·k·A, 1/c of whole rows'
=========================  ==================================  ==============================

Where the layer is recomputed, choices, tokens and gates are gathered once more. Matmuls are 1/c of
those of whole rows, and so is what goes on to experts on other devices from there.

Rejected: buffers summed into place by a reduce-scatter, which sends φ·k times as much; and an
all-to-all from tokens to places, where any device may fill any place, so that there must be room
for c times what arrives. Tokens that stay, with their choices alone gathered and grouped matmuls of
any length, would send least, but there are kernels for those on few backends. Without a capacity
nothing is asked but the sums.

Shape suffixes: B rows, T length of a row, c parts of it, t = T/c, D embed, E experts, k choices of
a token, C capacity.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from meshwright.models.experts import expert_slots
from meshwright.models.hooks import RowParts
from meshwright.sharding.expert_layout import places_of_part
from meshwright.sharding.token_layout import TokenLayout, token_order
from meshwright.train.replicas import Replicas

__all__ = ["RowSplit", "parts_of"]

_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class RowSplit:
    """Local arrays of rows whose length is split, inside a fully manual `jax.shard_map`.

    Attributes:
        axis: the mesh axis, or axes, that split the length.
        parts: devices along it.
        order: which tokens of a row each has.
    """

    axis: str | tuple[str, ...]
    parts: int
    order: TokenLayout

    @classmethod
    def of(cls, replicas: Replicas) -> RowSplit:
        """How the rows of a step are split."""
        axes = replicas.length
        return cls(axes[0] if len(axes) == 1 else axes, replicas.size(axes), replicas.order)

    def whole(self, x: Array) -> Array:
        """[B, t, …] → [B, T, …], in the order in which tokens are stored, part after part."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)

    def own_sums(self, x: Array) -> Array:
        """Transpose of `whole`: [B, T, …] summed over the devices, this one's part [B, t, …]."""
        return jax.lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True)

    def slots(self, ids: Array, count: int, capacity: int) -> tuple[Array, Array]:
        """This device's places in the buffers of whole rows.

        Args:
            ids: the experts of each token of this device, int32 [B, t, k].
            count: E.
            capacity: C.

        Returns:
            With P places of an expert on a device, as `expert_slots` but of tokens as `whole` has
            them: (choice in each place [B, E * P], T * k in an empty one; place of each choice
            [B, T, k], E * P where it found no room, or has it on another device).
        """
        ids = self.whole(ids)
        rows, length, choices = ids.shape
        order = token_order(self.order, length, self.parts)
        stored = jnp.asarray(order.argsort(), jnp.int32)
        slots = functools.partial(expert_slots, count=count, capacity=capacity)
        take, back = jax.vmap(slots)(ids[:, stored])
        empty, each = length * choices, places_of_part(capacity, self.parts)
        at = stored[jnp.minimum(take // choices, length - 1)]
        take = jnp.where(take < empty, at * choices + take % choices, empty)
        first = jax.lax.axis_index(self.axis) * each
        room = [(0, 0), (0, 0), (0, each * self.parts - capacity)]
        take = jnp.pad(take.reshape(rows, count, capacity), room, constant_values=empty)
        take = jax.lax.dynamic_slice_in_dim(take, first, each, axis=2)
        expert, place = back // capacity, back % capacity - first
        here = (back < count * capacity) & (place >= 0) & (place < each)
        back = jnp.where(here, expert * each + place, count * each)
        return take.reshape(rows, -1), back[:, order]


def parts_of(replicas: Replicas) -> RowParts:
    """What the model may ask of the other parts of its rows, under the maps of a step."""
    if not replicas.length:
        return RowParts()
    split = RowSplit.of(replicas)

    def summed(x: Array) -> Array:
        return jax.lax.psum(x, split.axis)

    def first(x: Array) -> Array:
        return jnp.where(jax.lax.axis_index(split.axis) == 0, x, jnp.zeros_like(x))

    def same(x: Array) -> Any:
        return x

    over = replicas.on_devices(summed, [_WHOLE], _WHOLE, same)
    once = replicas.on_devices(first, [_WHOLE], _WHOLE, same)

    @jax.custom_vjp
    def total(x: Array) -> Array:
        return over(x)

    # What every part has of the sum comes from all parts: the transpose of a sum is one.
    total.defvjp(lambda x: (total(x), None), lambda _, grad: (over(grad),))

    def totals(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        flat = [x.astype(jnp.float32).reshape(len(x), -1) for x in leaves]
        widths = [x.shape[1] for x in flat]
        found = jnp.split(total(jnp.concatenate(flat, axis=1)), list(_ends(widths)), axis=1)
        like = zip(found, leaves, strict=True)
        return structure.unflatten([x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in like])

    return RowParts(split.parts, totals, once)


def _ends(widths: list[int]) -> list[int]:
    """Where each but the last ends."""
    return [sum(widths[: at + 1]) for at in range(len(widths) - 1)]
