"""Embedding rows by exchange: tokens travel to the table's columns, not the table to the tokens.

Under FSDP the embedding table [V, D] is split over D by axes that also split the rows of a batch.
Gathering it, as every other weight is, moves ρVD elements forward and as many back, and holds a
whole table and its whole gradient on every device. But a lookup reads no more than the T tokens of
a device. So each device sends its token ids (integers) to the others, everyone reads its columns of
everyone's rows, and one all-to-all brings each its own rows whole: ρTD elements, and ρTD back. At
8,192 tokens a device and 128,256 ids that is a sixteenth.

It is used where T < V, where the head has a table of its own (a tied head needs the table whole),
and where gradients are reduced as they appear. Elsewhere `meshwright.train.weights` gathers.

The gradient is summed in float32, over the tokens of all devices, in shards: one rounding at the
end in place of one a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from meshwright.sharding.decisions import axes_of

__all__ = ["Exchange"]


@dataclass(frozen=True)
class Exchange:
    """A lookup in a table whose columns are split over axes that split the rows of a batch.

    Attributes:
        mesh: built mesh.
        spec: layout of the table [V, D].
        now: the axes the caller has mapped over; those of D's entry among them.
        dtype: of the rows that are returned.
        scope: name scope of its collectives.
    """

    mesh: Mesh
    spec: PartitionSpec
    now: tuple[str, ...]
    dtype: Any
    scope: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Axes that split D."""
        return axes_of(self.spec[1]) if len(self.spec) > 1 else ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Axes that split V."""
        return axes_of(self.spec[0]) if self.spec else ()

    def __call__(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of ``table`` float32 [V, D] for ``tokens`` int32 [B, T]: [B, T, D].

        Call it under a ``vmap`` over ``now``. Ids past the table read its last row.
        """
        shape = table.shape

        @jax.custom_vjp
        def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
            return self._read(table, tokens)

        def backward(tokens: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
            return self._add(grad, tokens, shape), None

        look_up.defvjp(lambda table, tokens: (look_up(table, tokens), tokens), backward)
        return look_up(table, jnp.clip(tokens, 0, shape[0] - 1))

    def _read(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        @jax.custom_batching.custom_vmap
        def one(table: jax.Array, tokens: jax.Array) -> jax.Array:
            return jnp.take(table.astype(self.dtype), tokens, axis=0)

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            everyones = jax.lax.all_gather(tokens[0], self.columns)  # [n, B, T]
            rows, here = self._own(everyones, table.shape[0])
            read = jnp.take(table.astype(self.dtype), rows, axis=0, mode="clip")
            read = jnp.where(here[..., None], read, 0)  # [n, B, T, D / n]
            mine = jax.lax.all_to_all(read, self.columns, 0, 0, tiled=True)
            whole = jnp.moveaxis(mine, 0, 2).reshape(*tokens.shape[1:], -1)
            return (jax.lax.psum(whole, self.ids) if self.ids else whole)[None]

        @one.def_vmap
        def _(size: int, batched: Any, table: jax.Array, tokens: jax.Array) -> Any:
            del size, batched
            specs = (self.spec, PartitionSpec(self.now))
            with jax.named_scope(self.scope):
                return self._mapped(local, specs, PartitionSpec(self.now))(table, tokens), True

        return one(table, tokens)

    def _add(self, grad: jax.Array, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The transpose of `_read`: gradient of the table, float32, in the table's layout."""
        parts = math.prod(self.mesh.shape[axis] for axis in self.columns)
        held = math.prod(self.mesh.shape[axis] for axis in self.ids)
        others = tuple(axis for axis in self.now if axis not in self.columns)

        @jax.custom_batching.custom_vmap
        def one(grad: jax.Array, tokens: jax.Array) -> jax.Array:
            return jnp.zeros(shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))

        def local(grad: jax.Array, tokens: jax.Array) -> jax.Array:
            everyones = jax.lax.all_gather(tokens[0], self.columns)
            rows, here = self._own(everyones, shape[0] // held)
            split = jnp.moveaxis(grad[0].reshape(*grad.shape[1:3], parts, -1), 2, 0)
            theirs = jax.lax.all_to_all(split, self.columns, 0, 0, tiled=True)
            theirs = jnp.where(here[..., None], theirs, 0).astype(jnp.float32)
            table = jnp.zeros((shape[0] // held, shape[1] // parts), jnp.float32)
            table = table.at[rows].add(theirs, mode="clip")
            if others:
                table = jax.lax.psum(table.astype(self.dtype), others).astype(jnp.float32)
            return table

        @one.def_vmap
        def _(size: int, batched: Any, grad: jax.Array, tokens: jax.Array) -> Any:
            del size, batched
            specs = (PartitionSpec(self.now), PartitionSpec(self.now))
            with jax.named_scope(self.scope):
                return self._mapped(local, specs, self.spec)(grad, tokens), False

        return one(grad, tokens)

    def _own(self, tokens: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Ids relative to this device's part of the table, and which of them are in it."""
        if not self.ids:
            return tokens, jnp.ones(tokens.shape, bool)
        rows = tokens - jax.lax.axis_index(self.ids) * count
        here = (rows >= 0) & (rows < count)
        return jnp.where(here, rows, 0), here

    def _mapped(self, local: Any, in_specs: Any, out_specs: PartitionSpec) -> Any:
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
