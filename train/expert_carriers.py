"""How tokens travel to the devices that have their experts, and home: for local arrays.

Each carrier is a linear map `there` and its transpose `home`; `meshwright.train.expert_exchange`
says what they send and when to take which. `Buffers` are those of the capacity form, `Gather` and
`Ragged` drop nothing. All are made from the ids of tokens alone.

Shape suffixes as in `meshwright.train.expert_exchange`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from meshwright.models.experts import collect_rows, expert_slots, spread_rows
from meshwright.models.routing import hits_of
from meshwright.sharding.expert_layout import places_of_part
from meshwright.train.row_parts import RowSplit

__all__ = ["Buffers", "Carrier", "Gather", "Ragged"]


@dataclass(frozen=True)
class Buffers:
    """The transfers of the capacity form.

    Attributes:
        axis, parts: as `ExpertExchange`; one part sends nothing.
        slots: (E, C); where rows are split, with a device's places of them for C.
        take, back: of each row, as `expert_slots`: [B, E * C] and [B, T, k]; where rows are split,
            of whole rows, as `RowSplit.slots`.
        rows: how rows are split along their length, if they are. Tokens are gathered over the
            parts before they are put into places, and scattered after they are summed.
    """

    axis: str | tuple[str, ...]
    parts: int
    slots: tuple[int, int]
    take: Array
    back: Array
    rows: RowSplit | None = None

    @classmethod
    def of(
        cls,
        axis: Any,
        parts: int,
        ids: Array,
        experts: int,
        capacity: int,
        rows: RowSplit | None = None,
    ) -> Buffers:
        """From the ids of this device's tokens [B, T, k], W and C."""
        count = experts * parts
        if rows is not None:
            slots = (count, places_of_part(capacity, rows.parts))
            return cls(axis, parts, slots, *rows.slots(ids, count, capacity), rows)
        slots = jax.vmap(functools.partial(expert_slots, count=count, capacity=capacity))
        return cls(axis, parts, (count, capacity), *slots(ids))

    def there(self, x: Array) -> Array:
        """[B, T, D] → what came for this device's experts [e·B, W, C, D]."""
        spread = jax.vmap(spread_rows)
        return self._sent(spread(self._whole(x), self.take // self.back.shape[-1], self.back))

    def home(self, out: Array) -> Array:
        """[e·B, W, C, D] → sums over the choices of each token [B, T, D]."""
        collect = jax.vmap(collect_rows)
        return self._own(collect(self._returned(out), self.take // self.back.shape[-1], self.back))

    def gates_there(self, gates: Array) -> Array:
        """[B, T, k] → [e·B, W, C, 1]."""
        back, gates = self.back.reshape(len(gates), -1, 1), self._whole(gates)
        return self._sent(jax.vmap(spread_rows)(gates.reshape(*back.shape), self.take, back))

    def gates_home(self, grads: Array) -> Array:
        """[e·B, W, C, 1] → [B, T, k]."""
        back = self.back.reshape(len(self.back), -1, 1)
        found = jax.vmap(collect_rows)(self._returned(grads), self.take, back)
        return self._own(found.reshape(self.back.shape))

    def _whole(self, x: Array) -> Array:
        return x if self.rows is None else self.rows.whole(x)

    def _own(self, x: Array) -> Array:
        return x if self.rows is None else self.rows.own_sums(x)

    def _sent(self, x: Array) -> Array:
        count, capacity = self.slots
        if self.parts == 1:
            return x.reshape(len(x), count, capacity, -1)
        x = x.reshape(len(x), self.parts, count // self.parts, capacity, -1)
        return jax.lax.all_to_all(x, self.axis, 1, 0, tiled=True)[:, 0]

    def _returned(self, x: Array) -> Array:
        if self.parts > 1:
            x = jax.lax.all_to_all(x[:, None], self.axis, 0, 1, tiled=True)
        return x.reshape(len(x), -1, x.shape[-1])


class Carrier(Protocol):
    """The transfers of a dropless form. Tokens of all devices are *dealt* when in the order of
    devices, [e·N, …], and *arranged* when in that of what `there` returns."""

    def there(self, x: Array) -> Array:
        """Tokens of this device [N, D] → all that chose its experts, arranged [e·N, D]."""
        ...

    def home(self, out: Array) -> Array:
        """Transpose of `there`; rows of tokens that chose none of its experts must be 0."""
        ...

    def arranged(self, x: Array) -> Array:
        """Dealt → arranged."""
        ...

    def dealt(self, x: Array) -> Array:
        """Arranged → dealt."""
        ...


@dataclass(frozen=True)
class Gather:
    """All tokens to all devices; sums on the way home, in the dtype of what is sent."""

    axis: str | tuple[str, ...]

    def there(self, x: Array) -> Array:
        return jax.lax.all_gather(x, self.axis, tiled=True)

    def home(self, out: Array) -> Array:
        return jax.lax.psum_scatter(out, self.axis, tiled=True)

    def arranged(self, x: Array) -> Array:
        return x

    def dealt(self, x: Array) -> Array:
        return x


@dataclass(frozen=True)
class Ragged:
    """Tokens to devices that have an expert of theirs.

    What came from device i begins at row i·N, in the order of its tokens, so that where to put
    things is known without asking; what follows up to the next device's is 0. Tests run this with
    the stand-in that CPUs have; programs for TPUs and GPUs were compiled, not run.

    Attributes:
        axis: as `ExpertExchange`.
        sizes: tokens from device i to device j, int32 [e, e].
        take, back: as `expert_slots`: the token in each slot of what this device sends, device 0's
            first, [S], N in an empty one; slots of its tokens [N, k], S for nowhere.
        order, rank: arranged → dealt place within what a device may send here, and the inverse,
            [e, N, 1].
    """

    axis: str | tuple[str, ...]
    sizes: Array
    take: Array
    back: Array
    order: Array
    rank: Array

    @classmethod
    def of(cls, axis: Any, parts: int, all_ids: Array, experts: int) -> Ragged:
        """From the dealt ids [e·N, k] and the number W of experts of a device."""
        me, choices = jax.lax.axis_index(axis), all_ids.shape[-1]
        goals = (all_ids // experts).reshape(parts, -1, choices)
        sizes = jnp.sum(jnp.any(hits_of(goals, parts), axis=2), axis=1, dtype=jnp.int32)
        strangers = jnp.all(goals != me, axis=-1)
        order = jnp.argsort(strangers, axis=1, stable=True)[..., None]
        mine = goals[me]
        earlier = jnp.tril(jnp.ones((choices, choices), bool), -1)[None]
        again = jnp.any((mine[:, :, None] == mine[:, None]) & earlier, axis=-1)
        keys = jnp.where(again, parts, mine).reshape(-1)
        slots = mine.shape[0] * min(choices, parts)
        sent = jnp.argsort(keys, stable=True)
        back = jnp.argsort(sent).reshape(mine.shape)
        take = jnp.where(jnp.sort(keys) < parts, sent // choices, mine.shape[0])[:slots]
        back = jnp.where(again, slots, back)
        return cls(axis, sizes, take, back, order, jnp.argsort(order, axis=1))

    def there(self, x: Array) -> Array:
        me, tokens = jax.lax.axis_index(self.axis), x.shape[0]
        room = jnp.zeros((len(self.sizes) * tokens, x.shape[1]), x.dtype)
        goals = jnp.full((len(self.sizes),), me * tokens, jnp.int32)
        starts = _starts(self.sizes[me])
        sent = spread_rows(x, self.take, self.back)
        sizes = (self.sizes[me], self.sizes[:, me])
        return _ragged_all_to_all(sent, room, starts, goals, sizes, self.axis)

    def home(self, out: Array) -> Array:
        me, tokens = jax.lax.axis_index(self.axis), len(self.back)
        room = jnp.zeros((len(self.take), out.shape[1]), out.dtype)
        starts = jnp.arange(len(self.sizes), dtype=jnp.int32) * tokens
        goals = jax.vmap(_starts)(self.sizes)[:, me]
        sizes = (self.sizes[:, me], self.sizes[me])
        found = _ragged_all_to_all(out, room, starts, goals, sizes, self.axis)
        return collect_rows(found, self.take, self.back)

    def arranged(self, x: Array) -> Array:
        return self._permuted(x, self.order)

    def dealt(self, x: Array) -> Array:
        return self._permuted(x, self.rank)

    def _permuted(self, x: Array, order: Array) -> Array:
        blocks = x.reshape(*order.shape[:2], -1)
        return jnp.take_along_axis(blocks, order, axis=1).reshape(x.shape)


def _starts(sizes: Array) -> Array:
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def _ragged_all_to_all(
    sent: Array,
    room: Array,
    starts: Array,
    goals: Array,
    sizes: tuple[Array, Array],
    axis: str | tuple[str, ...],
) -> Array:
    """`jax.lax.ragged_all_to_all`, which XLA does not have for CPUs.

    Args:
        sent: [S, D].
        room: what is received is written into it [R, D].
        starts: row of ``sent`` where what goes to each device begins, int32 [e].
        goals: row of that device's ``room`` where it shall begin, int32 [e].
        sizes: rows sent to each device, and received from each, int32 [e].
        axis: of the devices.
    """

    def real(sent: Array, room: Array, starts: Array, goals: Array, *sizes: Array) -> Array:
        send, receive = sizes
        return jax.lax.ragged_all_to_all(sent, room, starts, send, goals, receive, axis_name=axis)

    def simulated(sent: Array, room: Array, starts: Array, goals: Array, *sizes: Array) -> Array:
        me = jax.lax.axis_index(axis)
        gather = functools.partial(jax.lax.all_gather, axis_name=axis)
        for source, start, goal, size in zip(
            *map(gather, (sent, starts, goals, sizes[0])), strict=True
        ):
            at = jnp.arange(len(room), dtype=jnp.int32) - goal[me]
            rows = jnp.take(source, at + start[me], axis=0, mode="clip")
            here = (at >= 0) & (at < size[me])
            room = jnp.where(here[:, None], rows, room)
        return room

    args = sent, room, starts, goals, *sizes
    return jax.lax.platform_dependent(*args, cpu=simulated, default=real)
