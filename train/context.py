"""The attention hook of a step whose rows are split along their length.

A model calls attention on its own tokens, under the maps of `meshwright.train.replicas`. Here the
call leaves the maps: one `jax.shard_map` runs an algorithm of `meshwright.train.ring` or
`meshwright.train.context_attention` on all devices, with the axis of the length by name, and heads
split as the rules split them. Everything else a step does, reductions of gradients included, treats
a context axis like a data axis.

Derivatives are written down at this level, as a function under a custom ``vmap`` has none of its
own: ring and gather bring their backward passes, and an exchange of heads for tokens is its own
transpose, with the kernel in between differentiated by jax.

Key heads that are laid out otherwise than query heads (fewer than the tensor axis, and so whole)
are repeated until both split alike: a device then has the key heads of its query heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from meshwright.models.hooks import ATTENTION
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.rules import Rules
from meshwright.sharding.token_layout import ContextKind, chunk_length
from meshwright.train.context_attention import Exchanged, Gathered
from meshwright.train.replicas import Replicas, real_axes
from meshwright.train.ring import CHUNK, ChunkKernel, Ring

__all__ = ["ContextAttention"]


@dataclass(frozen=True)
class ContextAttention:
    """Attention from the tokens of each device to those of all: an attention hook.

    Attributes:
        replicas: what the caller has mapped over; its ``length`` axes split the rows.
        kind: the algorithm.
        rules: the ``activations`` table says how heads are split.
        inside: attention hook of one device, for whole rows.
    """

    replicas: Replicas
    kind: ContextKind
    rules: Rules
    inside: Callable[..., jax.Array]

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        causal: bool,
        scale: float,
        segments: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """As `meshwright.models.hooks.dot_product`, on the tokens of one device.

        Raises:
            PlacementError: a mask of its own, or heads the axis does not divide.
        """
        if mask is not None:
            raise PlacementError(
                "cannot use a mask where rows are split along their length",
                why="a device has a part of its rows and of its columns only",
                fix="say with `segments` which tokens see each other, or use context=1",
            )
        k, v = self._alike(q, k), self._alike(q, v)
        if self.kind == "ulysses":
            return self._exchanged(q, k, v, segments, causal=causal, scale=scale)
        order, length = self.replicas.order, q.shape[1] * self.parts
        kernel = ChunkKernel(chunk_length(order, length, self.parts, CHUNK), causal, scale)
        how = Ring if self.kind == "ring" else Gathered
        algorithm = how(self.axis, self.parts, order, length, kernel)
        return self._crossed(algorithm, q, k, v, segments)

    @property
    def axis(self) -> Any:
        """The axis, or axes, that split the length."""
        length = self.replicas.length
        return length[0] if len(length) == 1 else length

    @property
    def parts(self) -> int:
        """Devices along it."""
        return self.replicas.size(self.replicas.length)

    def _crossed(
        self,
        algorithm: Ring | Gathered,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
    ) -> jax.Array:
        heads = self._heads
        log_total = PartitionSpec(None, heads)
        more = () if segments is None else (segments,)
        specs = [_tokens(heads)] * 3 + [PartitionSpec()] * len(more)

        def forward_like(q: jax.Array, k: jax.Array, *rest: jax.Array) -> Any:
            del rest
            *lead, length, queries, _width = q.shape
            grouped = (*lead, k.shape[-2], queries // k.shape[-2], length)
            return q, jax.ShapeDtypeStruct(grouped, jnp.float32)

        forward = self.replicas.on_devices(
            lambda q, k, v, *more: algorithm.forward(q, k, v, *(more or (None,))),
            specs,
            (_tokens(heads), log_total),
            forward_like,
        )
        backward = self.replicas.on_devices(
            lambda out, total, grad, q, k, v, *more: algorithm.backward(
                (q, k, v, *(more or (None,)), out, total), grad
            ),
            [_tokens(heads), log_total, _tokens(heads), *specs],
            (_tokens(heads),) * 3,
            lambda out, total, grad, q, k, v, *more: (q, k, v),
        )

        @jax.custom_vjp
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array) -> jax.Array:
            return forward(q, k, v, *more)[0]

        def keep(*inputs: jax.Array) -> tuple[jax.Array, Any]:
            # Named out here too: a policy sees the results of the map, not what is inside.
            out, total = (checkpoint_name(x, ATTENTION) for x in forward(*inputs))
            return out, (out, total, inputs)

        def back(saved: Any, grad: jax.Array) -> tuple[Any, ...]:
            out, total, inputs = saved
            return (*backward(out, total, grad, *inputs), *(None for _ in more))

        attend.defvjp(keep, back)
        return attend(q, k, v, *more)

    def _exchanged(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
        **how: Any,
    ) -> jax.Array:
        exchanged = Exchanged(self.axis, self.parts, self.replicas.order)
        split = self.replicas.size(self._heads)
        k, v = (exchanged.repeated(x, x.shape[2] // split) for x in (k, v))
        # Together, so that a policy sees more than one operand and keeps what was exchanged.
        q, k, v = self._transposed(exchanged.whole_rows, exchanged.own_tokens, q, k, v)
        if segments is not None:
            segments = self.replicas.on_devices(
                exchanged.all_segments,
                [PartitionSpec()],
                PartitionSpec(),
                lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] * self.parts), x.dtype),
            )(segments)
        out = self.inside(q, k, v, segments=segments, **how)
        return self._transposed(exchanged.own_tokens, exchanged.whole_rows, out)[0]

    def _transposed(self, there: Any, back: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """A linear map of each array between devices; its transpose is ``back``."""
        moves = [self._moved(local, local.__name__ == "whole_rows") for local in (there, back)]

        @jax.custom_vjp
        def move(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(map(moves[0], arrays))

        move.defvjp(lambda *xs: (move(*xs), None), lambda _, grads: tuple(map(moves[1], grads)))
        return move(*arrays)

    def _moved(self, local: Any, to_rows: bool) -> Callable[[jax.Array], jax.Array]:
        def like(x: jax.Array) -> jax.ShapeDtypeStruct:
            *lead, length, heads, size = x.shape
            if to_rows:
                shape = (*lead, length * self.parts, heads // self.parts, size)
            else:
                shape = (*lead, length // self.parts, heads * self.parts, size)
            return jax.ShapeDtypeStruct(shape, x.dtype)

        spec = _tokens(self._heads)
        return self.replicas.on_devices(local, [spec], spec, like)

    @functools.cached_property
    def _heads(self) -> tuple[str, ...]:
        return real_axes(self.rules, self.replicas.mesh, "heads")

    def _alike(self, q: jax.Array, keys: jax.Array) -> jax.Array:
        """Key heads repeated until the axes of the query heads split them too."""
        split = self.replicas.size(self._heads)
        if real_axes(self.rules, self.replicas.mesh, "kv_heads") == self._heads:
            return keys
        times = math.lcm(keys.shape[2], split) // keys.shape[2]
        if q.shape[2] % (keys.shape[2] * times):
            times = q.shape[2] // keys.shape[2]
        return jnp.repeat(keys, times, axis=2)


def _tokens(heads: tuple[str, ...]) -> PartitionSpec:
    """Layout of [B, T, heads, H] besides the mapped dims."""
    return PartitionSpec(None, None, heads or None)
