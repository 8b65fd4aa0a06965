"""The experts of one device at work on tokens that came from all, and the derivative by hand.

In buffers of a fixed size (`mlp` with `batched`), or on as many rows as there are (`Work`): sorted
by expert, chunk by chunk, in a loop with as many trips as this device has chunks. Nothing in here
crosses devices, so single steps are left to jax to differentiate; what is kept is not.

Shape suffixes as in `meshwright.train.expert_exchange`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from meshwright.models.experts import activate, collect_rows, grouped_matmul
from meshwright.models.routing import hits_of

__all__ = ["Chunk", "Grads", "Matmul", "Params", "Work", "batched", "mlp", "mlp_backward"]

Params = Mapping[str, Array]
"""``w_up`` [W, D, M], ``w_down`` [W, M, D] and, if gated, ``w_gate`` [W, D, M]."""

Matmul = Callable[[Array, Array], Array]
"""Rows of experts [..., D] and a matrix for each expert [W, D, M] → [..., M]."""

_CHUNKS = 4
"""Chunks that an even load fills. The last is padded: more of them waste less, but each reads all
matrices and adds to all their gradients."""


class Grads(NamedTuple):
    """Gradients of an MLP's input, of its gates (float32) and of its matrices."""

    x: Array
    gates: Array
    params: dict[str, Array]


def mlp(matmul: Matmul, x: Array, gates: Array, params: Params) -> tuple[Array, list[Array]]:
    """The experts' MLPs, times ``gates`` before the last matmul.

    Args:
        matmul: of rows with the matrices of their experts.
        x: [..., D].
        gates: [..., 1], in the dtype of ``x``.
        params: the matrices.

    Returns:
        [..., D], and the hidden layer before activation: x @ w_up and, if gated, x @ w_gate.
    """
    hidden = _hidden(matmul, x, params)
    return matmul(_activated(hidden) * gates, params["w_down"]), hidden


def _hidden(matmul: Matmul, x: Array, params: Params) -> list[Array]:
    return [matmul(x, params[name]) for name in ("w_up", "w_gate") if name in params]


def _activated(hidden: Sequence[Array]) -> Array:
    return activate(hidden[0], hidden[1] if len(hidden) > 1 else None)


def mlp_backward(
    matmul: Matmul,
    x: Array,
    gates: Array,
    hidden: Sequence[Array],
    params: Params,
    out_grad: Array,
) -> Grads:
    """Gradients of the arguments of `mlp`.

    Args:
        matmul, x, gates, params: as given to it.
        hidden: as returned by it.
        out_grad: gradient of its output [..., D].
    """
    active, through = jax.vjp(_activated, list(hidden))
    scaled_grad, down_grad = _pull(matmul, active * gates, params["w_down"], out_grad)
    products = active.astype(jnp.float32) * scaled_grad.astype(jnp.float32)
    found, x_grads = {"w_down": down_grad}, []
    (hidden_grads,) = through(scaled_grad * gates)
    for name, grad in zip(("w_up", "w_gate"), hidden_grads, strict=False):
        x_grad, found[name] = _pull(matmul, x, params[name], grad)
        x_grads.append(x_grad)
    return Grads(sum(x_grads[1:], x_grads[0]), jnp.sum(products, -1, keepdims=True), found)


def _pull(matmul: Matmul, x: Array, w: Array, grad: Array) -> tuple[Array, Array]:
    """Gradients of the operands of a matmul; its result is not computed, as nobody reads it."""
    return jax.vjp(matmul, x, w)[1](grad)


def batched(x: Array, w: Array) -> Array:
    """Buffers [B, W, C, D] with the matrices of their experts [W, D, M]: [B, W, C, M]."""
    return jnp.einsum("becd,edm->becm", x, w)


@dataclass(frozen=True)
class Work:
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
    def of(cls, ids: Array, experts: int, parts: int) -> Work:
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
            found, _ = mlp(chunk.matmul, chunk.tokens(held), g, params)
            return jax.lax.dynamic_update_slice_in_dim(out, found, start, 0)

        empty = jnp.zeros((len(self.take), held.shape[1]), held.dtype)
        return collect_rows(self._loop(step, empty), self._tokens, self.back)

    def backward(self, held: Array, gates: Array, params: Params, out_grad: Array) -> Grads:
        """Gradients of the arguments of `forward`."""

        def step(start: Array, sums: Grads) -> Grads:
            chunk = self._chunk(start)
            x, g = chunk.tokens(held), chunk.gates(gates).astype(held.dtype)
            hidden = _hidden(chunk.matmul, x, params)
            grad = chunk.tokens(out_grad)
            found = mlp_backward(chunk.matmul, x, g, hidden, params, grad)
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
            )
            added = {name: sums.params[name] + found.params[name] for name in params}
            return Grads(write(sums.x, found.x), write(sums.gates, found.gates), added)

        zeros = jnp.zeros((len(self.take), held.shape[1]), held.dtype)
        wide = {name: jnp.zeros(w.shape, jnp.float32) for name, w in params.items()}
        start = Grads(zeros, jnp.zeros((len(self.take), 1), jnp.float32), wide)
        sums = self._loop(step, start)
        found = {name: total.astype(params[name].dtype) for name, total in sums.params.items()}
        x = collect_rows(sums.x, self._tokens, self.back)
        gates_grad = jnp.take(sums.gates[:, 0], self.back, mode="fill", fill_value=0)
        return Grads(x, gates_grad, found)

    @property
    def _tokens(self) -> Array:
        return self.take // self.back.shape[-1]

    def _loop(self, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """As many trips as this device has work for; nothing in them waits for another's."""
        trips = -(-self.ends[-1] // self.chunk)
        return jax.lax.fori_loop(0, trips, lambda at, x: step(at * self.chunk, x), start)

    def _chunk(self, start: Array) -> Chunk:
        taken = jax.lax.dynamic_slice_in_dim(self.take, start, self.chunk)
        used = jnp.arange(self.chunk, dtype=jnp.int32) < self.ends[-1] - start
        # Kernels want every row in a group: those that pad are the last one's.
        ends = jnp.clip(self.ends - start, 0, self.chunk).at[-1].set(self.chunk)
        return Chunk(taken, self.back.shape[-1], used[:, None], jnp.diff(ends, prepend=0))


class Chunk(NamedTuple):
    """Some slots of `Work`.

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
        # One group is no group: the TPU compiler of jax 0.10.2 fails on that.
        return x @ w[0] if len(w) == 1 else grouped_matmul(x, w, self.sizes)

    def tokens(self, x: Array) -> Array:
        """The rows of [e·N, D] that are in the slots, 0 in unused ones."""
        rows = jnp.take(x, self.taken // self.choices, axis=0, mode="clip")
        return jnp.where(self.used, rows, 0)

    def gates(self, gates: Array) -> Array:
        """Those of [e·N, k] that belong to the slots [chunk, 1]."""
        return jnp.where(self.used, jnp.take(gates.reshape(-1, 1), self.taken, axis=0), 0)
