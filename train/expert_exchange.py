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
router e·(1 - C(E-E/e, k) / C(E, k)), at most k. See
`meshwright.sharding.expert_layout.dropless_way` for the choice.

**Capacity** (Lepikhin et al., "GShard", 2021; Fedus et al., "Switch transformers", 2022; beside
other axes: Rajbhandari et al., "DeepSpeed-MoE", 2022): one all-to-all of the buffers each way. The
buffers are those of `meshwright.models.experts.apply_experts`, by row, so the results are too.
Where rows are split along their length over c devices, each has 1/c of every expert's places
(`meshwright.train.row_parts`): C is C/c in the table, and tokens are gathered over that axis first.

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
pass, one matmul (gated: two) more. Capacity keeps the hidden layer. Both keep the tokens that came,
which dropless are e times a device's own; recomputing the layer sends them again instead.

**Gates** go to the experts and are multiplied in before the last matmul, as in `apply_experts`,
in the compute dtype; their gradients come home in float32. That is 2 + 4 bytes a slot beside the
tokens' 8·D, for bfloat16: 1/5000 of all at D = 4096. Dropless: 12(e-1)·k bytes a token, with
ragged 1.5·e/D of the bound (0.3% for e = 8, D = 4096). Applied at home instead, their gradient
needs the outputs there: kept, k·B·T·D of memory.

**Tensor axes** split M, and results are partial sums over them. They are summed at home, after a
token's experts are: B·T·D elements, where the buffers of the experts would be φ·k times that. The
gradient of x likewise, and that of the gates as k floats a token.

Rejected: each of t tensor devices sends 1/t of the buffers, which are gathered where they arrive
(DeepSpeed-MoE's coordination of parallelisms): 1/t of the bytes on this axis for as many on that of
tensor, which is the busier one, and one more launch each way. Transfers in pieces that overlap with
matmuls: more launches, and gains that only a profile can show.

Shape suffixes: B rows, T length, N tokens of a device = B·T, D embed, E experts, W experts of a
device = E/e, k choices of a token, C capacity, M width of an expert on this device, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from meshwright.sharding.expert_layout import DroplessWay, places_of_part
from meshwright.train.expert_carriers import Buffers, Carrier, Gather, Ragged
from meshwright.train.expert_work import Params, Work, batched, mlp, mlp_backward
from meshwright.train.row_parts import RowSplit

__all__ = ["EXPERTS", "ExpertExchange"]

EXPERTS = "experts"
"""Checkpoint name of what an exchange leaves for the backward pass."""


@dataclass(frozen=True)
class ExpertExchange:
    """Tokens to the experts of other devices and back: `apply_experts` over a mesh axis.

    Attributes:
        axis: the mesh axis, or axes, that the experts are dealt to.
        parts: devices along it.
        capacity: tokens that an expert takes from each whole row, as in `apply_experts`; None: all.
        tensor: axes that split M.
        way: without a capacity, how tokens travel.
        rows: how rows are split along their length, if they are.
    """

    axis: str | tuple[str, ...]
    parts: int
    capacity: int | None
    tensor: tuple[str, ...] = ()
    way: DroplessWay = "gather"
    rows: RowSplit | None = None

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
        split = 1 if self.rows is None else self.rows.parts
        slots = (self.parts * rows, experts, places_of_part(self.capacity, split))
        hidden = [like(x.dtype, *slots, width)] * (2 if "w_gate" in params else 1)
        return like(x.dtype, *slots, embed), like(x.dtype, *slots, 1), *hidden

    def _summed(self, x: Array) -> Array:
        return jax.lax.psum(x, self.tensor) if self.tensor else x

    def _forward_capacity(self, x: Array, ids: Array, gates: Array, params: Params) -> Any:
        buffers = self._buffers(ids, params)
        received = buffers.there(x), buffers.gates_there(gates.astype(x.dtype))
        out, hidden = mlp(batched, *received, params)
        return buffers.home(out), (*received, *hidden)

    def _backward_capacity(self, ids: Array, params: Params, kept: Any, y_grad: Array) -> Any:
        buffers = self._buffers(ids, params)
        x, gates, *hidden = kept
        out_grad = buffers.there(y_grad)
        grads = mlp_backward(batched, x, gates, hidden, params, out_grad)
        return buffers.home(grads.x), buffers.gates_home(grads.gates), grads.params

    def _buffers(self, ids: Array, params: Params) -> Buffers:
        assert self.capacity is not None
        experts = params["w_up"].shape[0]
        return Buffers.of(self.axis, self.parts, ids, experts, self.capacity, self.rows)

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

    def _carrier(self, all_ids: Array, params: Params) -> Carrier:
        if self.way == "gather":
            return Gather(self.axis)
        return Ragged.of(self.axis, self.parts, all_ids, params["w_up"].shape[0])

    def _work(self, carrier: Carrier, all_ids: Array, params: Params) -> Work:
        first = jax.lax.axis_index(self.axis) * params["w_up"].shape[0]
        return Work.of(carrier.arranged(all_ids) - first, params["w_up"].shape[0], self.parts)
