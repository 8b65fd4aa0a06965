"""Experts dealt to the devices of a mesh axis: tokens go to them and come home, each way by hand.

For local arrays inside a fully manual `jax.shard_map`. Device i of e has its own tokens and the
experts i·E/e … (i+1)·E/e - 1. Every form is a linear map `there`, which brings tokens to the
devices that have their experts, and its transpose `home`, which sums what comes back at the
token. So the backward pass is the forward pass's traffic again: y's gradient goes there, x's
comes home; four transfers a layer. Matrices need none: what all devices sent is here, and the
gradient of a device's own experts is complete on it.

==========  ==================  ==============================  ==================================
form        drops               elements sent, a transfer       held: tokens, then rows of experts
==========  ==================  ==============================  ==================================
capacity    past C a row        ρ(e)·B·E·C·D                    B·E·C, the same
gather      none                (e-1)·B·T·D                     e·B·T, e·B·T·min(k, E/e) outputs
ragged      none                at most that; ρ(e)·v·B·T·D      as gather
==========  ==================  ==============================  ==================================

ρ(e) = (e-1)/e; with capacity factor φ, E·C is φ·k·T, which makes the first row the bound of
`meshwright.sharding.bounds.expert_layer_bytes`. v is how many devices a token visits: with an even
router e·(1 - C(E-E/e, k) / C(E, k)), at most k. See `dropless_way` for the choice.

**Capacity** (Lepikhin et al., "GShard", 2020; Fedus et al., "Switch", 2021; with other axes beside:
Rajbhandari et al., "DeepSpeed-MoE", 2022): one all-to-all of the buffers each way. The buffers are
those of `apply_experts`, by row, so the results are too.

**Dropless** (Gale et al., "MegaBlocks", 2022): programs have fixed shapes, and all tokens may want
the experts of one device. A program that is exact for all routings and knows sizes when compiled
thus has room for B·T tokens between any two devices; filled or not, that is what is sent, and an
all-gather is that. (Room for every *choice*, min(k, E/e) slots a token, would be as many times
more.) It loses to the bound by e/k, so it is for small axes and large k. *Ragged* has the same
room but sends only tokens that go somewhere, each once to a device however many of its experts it
chose: `jax.lax.ragged_all_to_all`, on TPUs and GPUs. XLA has none for CPUs, where all-gathers
stand in for it: same numbers, no saving. Either way ids and gates of all devices are gathered, 8
bytes a choice, from which each device finds, without asking, who sent what.

Rows for the experts have worst-case room as well, e·min(k, E/e)/k times what even routing fills.
Dropless experts therefore run in a loop over chunks with as many trips as there is work on the
device, and nothing of the hidden layer is kept: each chunk's is computed again in the backward
pass, one matmul (gated: two) more. Capacity's hidden layer is kept.

**Gates** go to the experts and are multiplied in before the last matmul, as in `apply_experts`,
in the compute dtype; their gradients come home in float32. That is 2 + 4 bytes a slot beside the
tokens' 8·D, for bfloat16: 1/5000 of all at D = 4096. Dropless: 12(e-1)·k bytes a token, with
ragged 1.5·e/D of the bound (0.3% for e = 8, D = 4096). Applied at home instead, their gradient
needs the outputs there: kept, k·B·T·D of memory.

**Tensor axes** split M, and results are partial sums over them. They are summed at home, after a
token's experts are: B·T·D elements, where the buffers of the experts would be φ·k times that. The
gradient of x likewise, and that of the gates as k floats a token.

Rejected: dropping the tokens' copies on tensor devices before the exchange and gathering them
after it (DeepSpeed-MoE, section 5.2): 1/t on this axis, more on that of tensor, and one more launch
each way. Chunks of one transfer overlapped with matmuls: later, if profiles ask for it.

Shape suffixes: B rows, T length, N tokens of a device = B·T, D embed, E experts, W experts of a
device = E/e, k choices of a token, C capacity, M width of an expert on this device, S slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from meshwright.models.experts import (
    activate,
    collect_rows,
    expert_slots,
    grouped_matmul,
    hits_of,
    spread_rows,
)
from meshwright.sharding.errors import PlacementError

__all__ = ["EXPERTS", "DroplessWay", "ExpertExchange", "check_experts", "dropless_way"]

EXPERTS = "experts"
"""Checkpoint name of what an exchange leaves for the backward pass."""

DroplessWay = Literal["gather", "ragged"]
"""How tokens travel where none may be dropped."""

Params = Mapping[str, Array]
Matmul = Callable[[Array, Array], Array]

_CHUNKS = 4
"""Chunks that an even load fills. The last is padded: more of them waste less, but each reads all
matrices and adds to all their gradients."""


def check_experts(count: int, parts: int) -> None:
    """Check that experts can be dealt to devices.

    Args:
        count: experts of a layer.
        parts: devices of the expert axis.

    Raises:
        PlacementError: with the sizes of the axis, and the numbers of experts, that work.

    >>> check_experts(8, 4)
    """
    if count % parts == 0:
        return
    fit = [str(size) for size in range(1, count + 1) if count % size == 0]
    near = sorted({max(count // parts, 1) * parts, (count // parts + 1) * parts})
    raise PlacementError(
        f"cannot deal {count} experts to {parts} devices",
        where=f"expert={parts}, {count} experts in a layer",
        why=f"{count} is not divisible by {parts}",
        fix=f"use expert of {', '.join(fit)}, or {' or '.join(map(str, near))} experts",
    )


def dropless_way(count: int, choices: int, parts: int) -> DroplessWay:
    """Which of the exact forms to take, by what they send when the router is even.

    Ragged never sends more tokens than an all-gather, but in as many messages as there are devices,
    with no sums on the way home. It must save a quarter.

    Args:
        count: E.
        choices: k.
        parts: e.

    >>> dropless_way(8, 2, 8), dropless_way(8, 2, 2), dropless_way(64, 8, 8)
    ('ragged', 'gather', 'ragged')
    """
    stays_away = math.comb(count - count // parts, choices) / math.comb(count, choices)
    return "ragged" if stays_away > 0.25 else "gather"


@dataclass(frozen=True)
class ExpertExchange:
    """Tokens to the experts of other devices and back: `apply_experts` over a mesh axis.

    Attributes:
        axis: the mesh axis, or axes, that the experts are dealt to.
        parts: devices along it.
        capacity: tokens that an expert takes from each row, as in `apply_experts`; None: all.
        tensor: axes that split M.
        way: without a capacity, how tokens travel.
    """

    axis: str | tuple[str, ...]
    parts: int
    capacity: int | None
    tensor: tuple[str, ...] = ()
    way: DroplessWay = "gather"

    def forward(
        self, x: Array, ids: Array, gates: Array, params: Params
    ) -> tuple[Array, tuple[Array, ...]]:
        """Send tokens through their experts and sum what comes back.

        Args:
            x: tokens of this device [B, T, D].
            ids: the experts of each token, all different, 0 … E-1, int32 [B, T, k].
            gates: weights of their outputs, float32 [B, T, k].
            params: of this device's experts, ``w_up`` [W, D, M], ``w_down`` [W, M, D] and, if
                gated, ``w_gate`` [W, D, M].

        Returns:
            [B, T, D] in the dtype of ``x``, summed over ``tensor``; and what `backward` needs, as
            `kept_like` describes, all named `EXPERTS`: with it, nothing is sent twice.
        """
        with jax.named_scope("expert_exchange"):
            run = self._forward_dropless if self.capacity is None else self._forward_capacity
            y, kept = run(x, ids, gates, params)
            return self._summed(y), tuple(checkpoint_name(leaf, EXPERTS) for leaf in kept)

    def backward(
        self, ids: Array, params: Params, kept: tuple[Array, ...], y_grad: Array
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Gradients of ``x``, ``gates`` and ``params``, of their shapes and dtypes.

        Complete on this device: those of ``x`` and ``gates`` are summed over ``tensor``, those of
        ``params`` over all tokens that the devices of ``axis`` sent.

        Args:
            ids, params: as given to `forward`.
            kept: as returned by it.
            y_grad: gradient of the output, whole on each device of ``tensor`` [B, T, D].
        """
        with jax.named_scope("expert_exchange"):
            run = self._backward_dropless if self.capacity is None else self._backward_capacity
            x_grad, gates_grad, params_grad = run(ids, params, kept, y_grad)
            return self._summed(x_grad), self._summed(gates_grad), params_grad

    def kept_like(
        self, x: Any, ids: Any, params: Mapping[str, Any]
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of what `forward` keeps on a device.

        Capacity: the tokens that came [e·B, W, C, D], their gates [e·B, W, C, 1], x @ w_up and, if
        gated, x @ w_gate [e·B, W, C, M]; M alone is split over ``tensor``. Dropless: the tokens
        that came [e·N, D], ids and gates of all devices [e·N, k].

        Args:
            x, ids, params: as `forward`, or their shapes; dims in front of those of ``x`` and
                ``ids`` are in front of the results too.
        """
        *lead, rows, length, embed = x.shape
        experts, _, width = params["w_up"].shape[-3:]

        def like(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*lead, *shape), dtype)

        if self.capacity is None:
            tokens, choices = self.parts * rows * length, ids.shape[-1]
            gathered = (like(dtype, tokens, choices) for dtype in (ids.dtype, jnp.float32))
            return like(x.dtype, tokens, embed), *gathered
        slots = (self.parts * rows, experts, self.capacity)
        hidden = [like(x.dtype, *slots, width)] * (2 if "w_gate" in params else 1)
        return like(x.dtype, *slots, embed), like(x.dtype, *slots, 1), *hidden

    def _summed(self, x: Array) -> Array:
        return jax.lax.psum(x, self.tensor) if self.tensor else x

    def _forward_capacity(self, x: Array, ids: Array, gates: Array, params: Params) -> Any:
        buffers = self._buffers(ids, params)
        received = buffers.there(x), buffers.gates_there(gates.astype(x.dtype))
        out, hidden = _mlp(_batched, *received, params)
        return buffers.home(out), (*received, *hidden)

    def _backward_capacity(self, ids: Array, params: Params, kept: Any, y_grad: Array) -> Any:
        buffers = self._buffers(ids, params)
        x, gates, *hidden = kept
        out_grad = buffers.there(y_grad)
        grads = _mlp_backward(_batched, x, gates, hidden, params, out_grad)
        return buffers.home(grads.x), buffers.gates_home(grads.gates), grads.params

    def _buffers(self, ids: Array, params: Params) -> _Buffers:
        count, capacity = params["w_up"].shape[0] * self.parts, self.capacity
        slots = jax.vmap(functools.partial(expert_slots, count=count, capacity=capacity))
        return _Buffers(self.axis, self.parts, (count, capacity or 0), *slots(ids))

    def _forward_dropless(self, x: Array, ids: Array, gates: Array, params: Params) -> Any:
        gather = functools.partial(jax.lax.all_gather, axis_name=self.axis, tiled=True)
        all_ids, all_gates = (gather(v.reshape(-1, v.shape[-1])) for v in (ids, gates))
        carrier = self._carrier(all_ids, params)
        held = carrier.there(x.reshape(-1, x.shape[-1]))
        work = self._work(carrier, all_ids, params)
        out = work.forward(held, carrier.arranged(all_gates), params)
        return carrier.home(out).reshape(x.shape), (held, all_ids, all_gates)

    def _backward_dropless(self, ids: Array, params: Params, kept: Any, y_grad: Array) -> Any:
        held, all_ids, all_gates = kept
        carrier = self._carrier(all_ids, params)
        out_grad = carrier.there(y_grad.reshape(-1, y_grad.shape[-1]))
        work = self._work(carrier, all_ids, params)
        grads = work.backward(held, carrier.arranged(all_gates), params, out_grad)
        gates_grad = jax.lax.psum_scatter(carrier.dealt(grads.gates), self.axis, tiled=True)
        x_grad = carrier.home(grads.x).reshape(y_grad.shape)
        return x_grad, gates_grad.reshape(ids.shape), grads.params

    def _carrier(self, all_ids: Array, params: Params) -> _Carrier:
        if self.way == "gather":
            return _Gather(self.axis)
        return _Ragged.of(self.axis, self.parts, all_ids, params["w_up"].shape[0])

    def _work(self, carrier: _Carrier, all_ids: Array, params: Params) -> _Work:
        first = jax.lax.axis_index(self.axis) * params["w_up"].shape[0]
        return _Work.of(carrier.arranged(all_ids) - first, params["w_up"].shape[0], self.parts)


class _Grads(NamedTuple):
    """Gradients of an MLP's input, of its gates (float32) and of its matrices."""

    x: Array
    gates: Array
    params: dict[str, Array]


def _mlp(matmul: Matmul, x: Array, gates: Array, params: Params) -> tuple[Array, list[Array]]:
    """The experts' outputs times ``gates`` [..., 1] of the dtype of ``x``, and `_hidden`."""
    hidden = _hidden(matmul, x, params)
    return matmul(_activated(hidden) * gates, params["w_down"]), hidden


def _hidden(matmul: Matmul, x: Array, params: Params) -> list[Array]:
    """x @ w_up and, if gated, x @ w_gate."""
    return [matmul(x, params[name]) for name in ("w_up", "w_gate") if name in params]


def _activated(hidden: Sequence[Array]) -> Array:
    return activate(hidden[0], hidden[1] if len(hidden) > 1 else None)


def _mlp_backward(
    matmul: Matmul,
    x: Array,
    gates: Array,
    hidden: Sequence[Array],
    params: Params,
    out_grad: Array,
) -> _Grads:
    """Of `_mlp`; nothing here crosses devices, so jax differentiates the single steps."""
    active, through = jax.vjp(_activated, list(hidden))
    scaled_grad, down_grad = _pull(matmul, active * gates, params["w_down"], out_grad)
    products = active.astype(jnp.float32) * scaled_grad.astype(jnp.float32)
    found, x_grads = {"w_down": down_grad}, []
    (hidden_grads,) = through(scaled_grad * gates)
    for name, grad in zip(("w_up", "w_gate"), hidden_grads, strict=False):
        x_grad, found[name] = _pull(matmul, x, params[name], grad)
        x_grads.append(x_grad)
    return _Grads(sum(x_grads[1:], x_grads[0]), jnp.sum(products, -1, keepdims=True), found)


def _pull(matmul: Matmul, x: Array, w: Array, grad: Array) -> tuple[Array, Array]:
    """Gradients of the operands of a matmul; its result is not computed, as nobody reads it."""
    return jax.vjp(matmul, x, w)[1](grad)


def _batched(x: Array, w: Array) -> Array:
    return jnp.einsum("becd,edm->becm", x, w)


@dataclass(frozen=True)
class _Buffers:
    """The transfers of the capacity form.

    Attributes:
        axis, parts: as `ExpertExchange`.
        slots: (E, C).
        take, back: of each row, as `expert_slots`: [B, E * C] and [B, T, k].
    """

    axis: str | tuple[str, ...]
    parts: int
    slots: tuple[int, int]
    take: Array
    back: Array

    def there(self, x: Array) -> Array:
        """[B, T, D] → what came for this device's experts [e·B, W, C, D]."""
        spread = jax.vmap(spread_rows)
        return self._sent(spread(x, self.take // self.back.shape[-1], self.back))

    def home(self, out: Array) -> Array:
        """[e·B, W, C, D] → sums over the choices of each token [B, T, D]."""
        collect = jax.vmap(collect_rows)
        return collect(self._returned(out), self.take // self.back.shape[-1], self.back)

    def gates_there(self, gates: Array) -> Array:
        """[B, T, k] → [e·B, W, C, 1]."""
        back = self.back.reshape(len(gates), -1, 1)
        return self._sent(jax.vmap(spread_rows)(gates.reshape(*back.shape), self.take, back))

    def gates_home(self, grads: Array) -> Array:
        """[e·B, W, C, 1] → [B, T, k]."""
        back = self.back.reshape(len(self.back), -1, 1)
        found = jax.vmap(collect_rows)(self._returned(grads), self.take, back)
        return found.reshape(self.back.shape)

    def _sent(self, x: Array) -> Array:
        count, capacity = self.slots
        x = x.reshape(len(x), self.parts, count // self.parts, capacity, -1)
        return jax.lax.all_to_all(x, self.axis, 1, 0, tiled=True)[:, 0]

    def _returned(self, x: Array) -> Array:
        x = jax.lax.all_to_all(x[:, None], self.axis, 0, 1, tiled=True)
        return x.reshape(len(x), -1, x.shape[-1])


class _Carrier(Protocol):
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
class _Gather:
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
class _Ragged:
    """Tokens to devices that have an expert of theirs.

    What came from device i begins at row i·N, in the order of its tokens, so that where to put
    things is known without asking; what follows up to the next device's is 0.

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
    def of(cls, axis: Any, parts: int, all_ids: Array, experts: int) -> _Ragged:
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
        return jax.lax.ragged_all_to_all(
            sent, room, starts, send, goals, receive, axis_name=axis
        )

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


@dataclass(frozen=True)
class _Work:
    """The choices that went to this device's experts, sorted by expert, in chunks.

    Attributes:
        take: place of the choice in each slot among all that were made, int32 [S], S a multiple of
            ``chunk`` that has room for any routing.
        back: slot of each choice [e·N, k], S where it is none of this device's.
        ends: slot after the last of each expert, int32 [W].
        chunk: slots that are computed at once.
    """

    take: Array
    back: Array
    ends: Array
    chunk: int

    @classmethod
    def of(cls, ids: Array, experts: int, parts: int) -> _Work:
        """From ids relative to the first of W experts, arranged [e·N, k]."""
        tokens, choices = ids.shape
        most = tokens * min(choices, experts)
        even = tokens * choices // parts
        chunk = most if parts == 1 else min(most, -(-even // _CHUNKS))
        slots = -(-most // chunk) * chunk
        mine = (ids >= 0) & (ids < experts)
        keys = jnp.where(mine, ids, experts).reshape(-1)
        take = jnp.argsort(keys, stable=True).astype(jnp.int32)
        back = jnp.where(mine, jnp.argsort(take).reshape(ids.shape), slots)
        take = jnp.pad(take, (0, max(0, slots - take.size)))[:slots]
        ends = jnp.cumsum(jnp.sum(hits_of(keys, experts), axis=0, dtype=jnp.int32))
        return cls(take, back, ends.astype(jnp.int32), chunk)

    def forward(self, held: Array, gates: Array, params: Params) -> Array:
        """[e·N, D] and gates [e·N, k] → the sum of a token's experts here [e·N, D]."""

        def step(start: Array, out: Array) -> Array:
            chunk = self._chunk(start)
            g = chunk.gates(gates).astype(held.dtype)
            found, _ = _mlp(chunk.matmul, chunk.tokens(held), g, params)
            return jax.lax.dynamic_update_slice_in_dim(out, found, start, 0)

        empty = jnp.zeros((len(self.take), held.shape[1]), held.dtype)
        return collect_rows(self._loop(step, empty), self._tokens, self.back)

    def backward(self, held: Array, gates: Array, params: Params, out_grad: Array) -> _Grads:
        """Gradients of the arguments of `forward`."""

        def step(start: Array, sums: _Grads) -> _Grads:
            chunk = self._chunk(start)
            x, g = chunk.tokens(held), chunk.gates(gates).astype(held.dtype)
            hidden = _hidden(chunk.matmul, x, params)
            grad = chunk.tokens(out_grad)
            found = _mlp_backward(chunk.matmul, x, g, hidden, params, grad)
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
            )
            added = {name: sums.params[name] + found.params[name] for name in params}
            return _Grads(write(sums.x, found.x), write(sums.gates, found.gates), added)

        zeros = jnp.zeros((len(self.take), held.shape[1]), held.dtype)
        wide = {name: jnp.zeros(w.shape, jnp.float32) for name, w in params.items()}
        start = _Grads(zeros, jnp.zeros((len(self.take), 1), jnp.float32), wide)
        sums = self._loop(step, start)
        found = {name: total.astype(params[name].dtype) for name, total in sums.params.items()}
        x = collect_rows(sums.x, self._tokens, self.back)
        gates_grad = jnp.take(sums.gates[:, 0], self.back, mode="fill", fill_value=0)
        return _Grads(x, gates_grad, found)

    @property
    def _tokens(self) -> Array:
        return self.take // self.back.shape[-1]

    def _loop(self, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """As many trips as this device has work for; nothing in them waits for another's."""
        trips = -(-self.ends[-1] // self.chunk)
        return jax.lax.fori_loop(0, trips, lambda at, x: step(at * self.chunk, x), start)

    def _chunk(self, start: Array) -> _Chunk:
        taken = jax.lax.dynamic_slice_in_dim(self.take, start, self.chunk)
        used = jnp.arange(self.chunk, dtype=jnp.int32) < self.ends[-1] - start
        # Kernels want every row in a group: those that pad are the last one's.
        ends = jnp.clip(self.ends - start, 0, self.chunk).at[-1].set(self.chunk)
        return _Chunk(taken, self.back.shape[-1], used[:, None], jnp.diff(ends, prepend=0))


class _Chunk(NamedTuple):
    """Some slots of `_Work`.

    Attributes:
        taken: place of the choice in each, among those of all tokens.
        choices: k.
        used: whether there is one, bool [chunk, 1].
        sizes: slots of each expert, int32 [W].
    """

    taken: Array
    choices: int
    used: Array
    sizes: Array

    def matmul(self, x: Array, w: Array) -> Array:
        """Each slot with its expert's matrix."""
        return grouped_matmul(x, w, self.sizes)

    def tokens(self, x: Array) -> Array:
        """The rows of [e·N, D] that are in the slots, 0 in unused ones."""
        rows = jnp.take(x, self.taken // self.choices, axis=0, mode="clip")
        return jnp.where(self.used, rows, 0)

    def gates(self, gates: Array) -> Array:
        """Those of [e·N, k] that belong to the slots [chunk, 1]."""
        return jnp.where(self.used, jnp.take(gates.reshape(-1, 1), self.taken, axis=0), 0)
