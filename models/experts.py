"""A mixture of experts in place of the MLP: the layer, and how tokens get to experts and back.

Each token is scored by a router and goes to its `top_k` best experts, whose outputs are summed,
weighted by their scores (Shazeer et al. 2017). Parameters grow with the number of experts, work
only with `top_k`.

**Dispatch** on one device has two forms that agree while nothing is dropped:

- *dropless*: the choices of all tokens are sorted by expert, and each matmul is one grouped
  matmul over the sorted rows (Gale et al. 2022, MegaBlocks). No work is wasted and no token
  lost, where the backend has a kernel for `jax.lax.ragged_dot`; where it has none (CPU), it is
  a dense matmul over all experts, for small sizes only.
- *capacity*: every expert takes the first C tokens of a row, in the row's order, into a buffer of
  fixed size (Lepikhin et al. 2021, GShard). Plain batched matmuls on any backend, at the price
  of C × count / (length × top_k) times the work, and of dropped tokens, which only the residual
  stream carries on.

Rows move between tokens and experts by gathers in both directions: the transpose of a gather is
a scatter-add, but the inverse of the permutation is known here, so the backward pass gathers
too, which is faster and adds in one order. The alternative, one-hot matmuls as in GShard, costs
as much as the experts themselves once there are many.

**Row by row** tokens are taken, and the load is evened: see `meshwright.models.routing`, which is
the router's side.

Shape suffixes: B rows, T length, D embed, E experts, k choices of a token, C capacity, M width of
an expert, S rows sorted by expert, or slots of the experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from meshwright.models.config import ModelConfig
from meshwright.models.hooks import Hooks
from meshwright.models.layers import Init, Mlp, float32_logits, residual_std
from meshwright.models.routing import ExpertSums, hits_of, report, route

__all__ = [
    "Experts",
    "activate",
    "apply_experts",
    "collect_rows",
    "expert_slots",
    "grouped_matmul",
    "spread_rows",
]


class Experts(nnx.Module):
    """Router, experts and shared experts of one layer.

    `Hooks.experts` may move tokens to experts in its own way; all else is here.
    """

    def __init__(self, config: ModelConfig, init: Init) -> None:
        self.settings = settings = config.experts
        sizes = {"experts": settings.count}
        embed, mlp = {"embed": config.embed}, {"mlp": config.expert_mlp}
        std = config.init_std
        # A name of their own: every device routes, also where the experts are dealt to several.
        routes = {"routes": settings.count}
        self.router = init.normal("router", std, **embed, **routes)
        self.bias = init.constant(0.0, **routes) if settings.balance == "bias" else None
        gated = config.activation == "swiglu"
        self.w_gate = init.normal("w_gate", std, **sizes, **embed, **mlp) if gated else None
        self.w_up = init.normal("w_up", std, **sizes, **embed, **mlp)
        self.w_down = init.normal("w_down", residual_std(config), **sizes, **mlp, **embed)
        # As wide as all of them together: one MLP is the sum of narrower ones.
        wide = dataclasses.replace(config, mlp=max(settings.shared, 1) * config.expert_mlp)
        self.shared = Mlp(wide, init.at("shared")) if settings.shared else None

    def __call__(
        self, x: Array, hooks: Hooks, length: str | None, sums: ExpertSums | None
    ) -> tuple[Array, ExpertSums | None]:
        """Map ``x`` [B, T, D] to [B, T, D].

        Args:
            x: activations.
            hooks: ``constrain``, ``experts`` and ``rows`` are used.
            length: names the second dim.
            sums: of the layers before. None in generation: nothing is reported, and nothing
                dropped, as what is dropped would depend on how many tokens are read at a time.

        Returns:
            [B, T, D], and the sums with this layer's.
        """
        bias = None if self.bias is None else self.bias[...]
        logits = float32_logits("btd,de->bte", x, self.router[...])
        logits = hooks.constrain(logits, ("batch", length, None))
        routing = route(self.settings, logits, bias)
        length_of_row = x.shape[1] * hooks.rows.parts
        capacity = None if sums is None else self.settings.capacity(length_of_row)
        weights = {"w_up": self.w_up[...], "w_down": self.w_down[...]}
        if self.w_gate is not None:
            weights["w_gate"] = self.w_gate[...]
        apply = hooks.experts or apply_experts
        y = apply(x, routing.ids, routing.weights, weights, capacity=capacity)
        if self.shared is not None:
            y += self.shared(x, hooks, length)
        if sums is not None:
            sums = sums.plus(*report(self.settings, logits, routing, bias, hooks.rows))
        return y, sums


def apply_experts(
    x: Array, ids: Array, weights: Array, params: Mapping[str, Array], *, capacity: int | None
) -> Array:
    """Send tokens through their experts and sum what comes back, on one device.

    Args:
        x: activations [B, T, D].
        ids: the experts of each token, all different, int32 [B, T, k].
        weights: of their outputs, float32 [B, T, k].
        params: ``w_up`` [E, D, M], ``w_down`` [E, M, D] and, if gated, ``w_gate`` [E, D, M].
        capacity: tokens that an expert takes from each row, the first in the row's order; the
            others' part of the sum is 0. None: all.

    Returns:
        [B, T, D] in the dtype of ``x``.
    """
    if capacity is None:
        return _dropless(x, ids, weights, params)
    rows, _, embed = x.shape
    count = params["w_up"].shape[0]
    take, back = jax.vmap(functools.partial(expert_slots, count=count, capacity=capacity))(ids)
    spread, choices = jax.vmap(spread_rows), ids.shape[-1]
    gates = spread(weights.reshape(rows, -1, 1), take, back.reshape(rows, -1, 1))
    sent = spread(x, take // choices, back)

    def matmul(x: Array, w: Array) -> Array:
        return jnp.einsum("becd,edm->becm", x, w)

    slots = (rows, count, capacity)
    out = _mlp(matmul, sent.reshape(*slots, embed), gates.reshape(*slots, 1), params)
    return jax.vmap(collect_rows)(out.reshape(rows, -1, embed), take // choices, back)


def _dropless(x: Array, ids: Array, weights: Array, params: Mapping[str, Array]) -> Array:
    choices, count = ids.shape[-1], params["w_up"].shape[0]
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order).reshape(-1, choices)
    sizes = jnp.sum(hits_of(flat, count), axis=0, dtype=jnp.int32)
    gates = spread_rows(weights.reshape(-1, 1), order, back.reshape(-1, 1))
    sent = spread_rows(x.reshape(-1, x.shape[-1]), order // choices, back)
    matmul = functools.partial(grouped_matmul, sizes=sizes)
    out = _mlp(matmul, sent, gates, params)
    return collect_rows(out, order // choices, back).reshape(x.shape)


def _mlp(
    matmul: Callable[[Array, Array], Array], x: Array, gates: Array, params: Mapping[str, Array]
) -> Array:
    """The experts' MLPs, their outputs times ``gates`` [..., 1].

    Multiplied in before the last matmul, which commutes with it: backward then needs the hidden
    layer, which is kept anyway, and not the outputs.
    """
    up = matmul(x, params["w_up"])
    hidden = activate(up, matmul(x, params["w_gate"]) if "w_gate" in params else None)
    return matmul(hidden * gates.astype(hidden.dtype), params["w_down"])


def activate(up: Array, gate: Array | None) -> Array:
    """The hidden layer of an expert [..., M], from x @ w_up and, if gated, x @ w_gate."""
    return jax.nn.gelu(up, approximate=True) if gate is None else jax.nn.silu(gate) * up


def expert_slots(ids: Array, *, count: int, capacity: int) -> tuple[Array, Array]:
    """The buffers of one row: what each slot holds, and where each choice went.

    Args:
        ids: [T, k].
        count: E.
        capacity: C.

    Returns:
        (choice in each slot of expert 0, expert 1, …, [E * C], T * k in an empty one; slot of
        each choice, [T, k], E * C where it found no room).
    """
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    hits = hits_of(flat, count)
    counts = jnp.sum(hits, axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(counts) - counts
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    held = jnp.take(order, starts[:, None] + place, mode="clip").astype(jnp.int32)
    take = jnp.where(place < counts[:, None], held, flat.size).reshape(-1)
    rank = jnp.argsort(order).astype(jnp.int32) - jnp.sum(jnp.where(hits, starts[None], 0), axis=1)
    back = jnp.where(rank < capacity, flat * capacity + rank, count * capacity)
    return take, back.reshape(ids.shape)


@jax.custom_vjp
def spread_rows(x: Array, take: Array, back: Array) -> Array:
    """Rows of ``x`` [N, D] at ``take`` [S]: [S, D], zeros where that is N.

    ``back`` [N, k] holds the inverse: where in the result row n is, S for nowhere.
    """
    del back
    return jnp.take(x, take, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def collect_rows(y: Array, take: Array, back: Array) -> Array:
    """The transpose of `spread_rows`: row n of the result is the sum of ``y`` [S, D] at back[n]."""
    del take
    found = jnp.take(y, back, axis=0, mode="fill", fill_value=0)
    return jnp.sum(found.astype(jnp.float32), axis=1).astype(y.dtype)


spread_rows.defvjp(
    lambda x, take, back: (spread_rows(x, take, back), (take, back)),
    lambda kept, grad: (collect_rows(grad, *kept), None, None),
)
collect_rows.defvjp(
    lambda y, take, back: (collect_rows(y, take, back), (take, back)),
    lambda kept, grad: (spread_rows(grad, *kept), None, None),
)


@jax.custom_vjp
def grouped_matmul(x: Array, w: Array, sizes: Array) -> Array:
    """Multiply each group of rows with its own matrix, by `jax.lax.ragged_dot`.

    Args:
        x: [S, D], the rows of group 0 first, then those of group 1, …
        w: [E, D, M].
        sizes: rows of each group, int32 [E]; they sum to S.

    Returns:
        [S, M]. May be mapped by vmap over any of its arguments, which ragged_dot may not: it
        wants all or none to be. Where the mapped dim is split over devices, TPU's compiler
        gathers it whole: the kernel knows no batches. Call this inside `jax.shard_map` there, or
        use the capacity form.
    """
    return _ragged("forward")(x, w, sizes)


def _grouped_forward(x: Array, w: Array, sizes: Array) -> Any:
    return grouped_matmul(x, w, sizes), (x, w, sizes)


def _grouped_backward(kept: Any, grad: Array) -> tuple[Array, Array, None]:
    x, w, sizes = kept
    return _ragged("inputs")(grad, w, sizes), _ragged("weights")(x, grad, sizes), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)

# Contracting dims, ragged dim of the first operand, group dims of the second.
_RAGGED = {
    "forward": ((1,), (1,), [0], [0]),
    "inputs": ((1,), (2,), [0], [0]),
    "weights": ((0,), (0,), [0], []),
}


@functools.cache
def _ragged(form: str) -> Callable[[Array, Array, Array], Array]:
    """One of the three products of a grouped matmul, for any number of mapped dims."""
    left, right, ragged, groups = _RAGGED[form]
    numbers = jax.lax.RaggedDotDimensionNumbers(((left, right), ((), ())), ragged, groups)

    def plain(a: Array, b: Array, sizes: Array) -> Array:
        return jax.lax.ragged_dot_general(a, b, sizes, numbers)

    def flat(a: Array, b: Array, sizes: Array) -> Array:
        # The TPU's kernel takes no batch dim; the groups of all members are groups, though.
        found = plain(*(arg.reshape(-1, *arg.shape[2:]) for arg in (a, b, sizes)))
        return found.reshape(a.shape[0], -1, *found.shape[1:])

    @jax.custom_batching.custom_vmap
    def batched(a: Array, b: Array, sizes: Array) -> Array:
        return jax.lax.platform_dependent(a, b, sizes, tpu=flat, default=jax.vmap(plain))

    single = jax.custom_batching.custom_vmap(plain)

    def whole(size: int, mapped: list[bool], args: tuple[Array, ...]) -> list[Array]:
        return [
            arg if is_mapped else jnp.broadcast_to(arg, (size, *arg.shape))
            for arg, is_mapped in zip(args, mapped, strict=True)
        ]

    @single.def_vmap
    def _(size: int, mapped: list[bool], *args: Array) -> tuple[Array, bool]:
        return batched(*whole(size, mapped, args)), True

    @batched.def_vmap
    def _(size: int, mapped: list[bool], *args: Array) -> tuple[Array, bool]:
        args = tuple(arg.reshape(-1, *arg.shape[2:]) for arg in whole(size, mapped, args))
        found = batched(*args)
        return found.reshape(size, -1, *found.shape[1:]), True

    return single
