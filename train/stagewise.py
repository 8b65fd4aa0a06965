"""What the stages of a pipeline do with arrays besides the model: pass on, store, pick, deal.

Arrays have a dim for the stage, split over its axis, after the dims of the replicas. Within a
`jax.shard_map` over the stage axis alone (all others stay the compiler's) each stage sees its own
part, so that reading the slot, or the layers, that *this* stage is at now is a slice with one
index. As an operation on the whole array it would be a gather with an index for each stage, which
compilers turn into something general, and copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.train.replicas import Replicas

__all__ = ["Stagewise"]


@dataclass(frozen=True)
class Stagewise:
    """Operations along the stage axis.

    Attributes:
        replicas: mesh, stage axis and the levels that arrays have dims for.
        end: the stage with the model's last chunk.
    """

    replicas: Replicas
    end: int

    @property
    def at(self) -> int:
        """The place of the stage's dim."""
        return len(self.replicas.levels)

    @property
    def count(self) -> int:
        """Stages."""
        return self.replicas.size(self.replicas.stage)

    def hold(self, x: jax.Array) -> jax.Array:
        """Split the dims of replicas and stages as they are; the others as the compiler likes."""
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - self.at - 1)
        spec = PartitionSpec(*self.replicas.levels, self.replicas.stage, *free)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.replicas.mesh, spec))

    def mask(self, flags: jax.Array, x: jax.Array, other: Any) -> jax.Array:
        """``x`` on the stages with a flag, ``other`` elsewhere."""
        return jnp.where(flags.reshape(-1, *[1] * (x.ndim - self.at - 1)), x, other)

    def send(self, tree: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        """What each stage has, on the stage that it is paired with; zeros where none sends.

        Args:
            tree: arrays [R, p, …].
            pairs: of a stage and where its part goes, which may be where it is.
        """
        stay = [stage for stage, to in pairs if stage == to]
        between = [pair for pair in pairs if pair[0] != pair[1]]

        def local(x: jax.Array) -> jax.Array:
            return jax.lax.ppermute(x, self.replicas.stage, between)

        sent = jax.tree.map(self._local(local, self.at), tree)
        if not stay:
            return sent
        stays = jnp.isin(jnp.arange(self.count), jnp.array(stay))
        return jax.tree.map(lambda mine, came: self.mask(stays, mine, came), tree, sent)

    def store(self, held: jax.Array, x: jax.Array, slot: jax.Array, valid: jax.Array) -> jax.Array:
        """Put ``x`` [R, p, …] into slots of ``held`` [R, p, slots, …], where valid."""
        at = self.at

        def local(held: jax.Array, x: jax.Array, slot: jax.Array, valid: jax.Array) -> jax.Array:
            held = jax.lax.squeeze(held, (at,))
            before = jax.lax.dynamic_index_in_dim(held, slot[0], at)
            x = jnp.where(valid[0], x, before)
            after = jax.lax.dynamic_update_index_in_dim(held, x, slot[0], at)
            return jax.lax.expand_dims(after, (at,))

        return self._local(local, at, at, 0, 0)(held, x, slot, valid)

    def load(self, held: jax.Array, slot: jax.Array) -> jax.Array:
        """What is in slots of ``held`` [R, p, slots, …]: [R, p, …]."""
        return self.pick(held, slot, self.at)

    def pick(self, x: jax.Array, index: jax.Array, at: int) -> jax.Array:
        """Each stage's ``index`` along the dim after the stage's, which is at ``at``."""

        def local(x: jax.Array, index: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(x, index[0], at + 1, keepdims=False)

        return self._local(local, at, 0)(x, index)

    def add(self, total: jax.Array, x: jax.Array, index: jax.Array, at: int) -> jax.Array:
        """Add ``x`` [lead, p, …] to ``total`` [lead, p, n, …] at each stage's index."""

        def local(total: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
            before = jax.lax.dynamic_index_in_dim(total, index[0], at + 1, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(total, before + x, index[0], at + 1)

        return self._local(local, at, at, 0)(total, x, index)

    def deal(self, x: jax.Array, parts: int) -> jax.Array:
        """The tokens of the end's ``x`` [R, p, B, T, …], a p-th on each stage: [R, p, B, t, …].

        Rows whose length is split into ``parts`` already are cut within each of them. Padded with
        zeros where the tokens do not divide.
        """
        end, others = self.end, self._others()

        def local(x: jax.Array, stage: jax.Array) -> jax.Array:
            cut = [self.part(x, parts, index) for index in range(self.count)]
            found = jnp.where(stage[0] == end, cut[end], 0)
            for index in others:
                found += jax.lax.ppermute(cut[index], self.replicas.stage, [(end, index)])
            return found

        return self._local(local, self.at, 0)(x, jnp.arange(self.count))

    def collect(self, x: jax.Array, parts: int, length: int) -> jax.Array:
        """Undo `deal` on the end, for rows of ``length``; others get nothing of use."""
        at, end, others = self.at + 2, self.end, self._others()

        def local(x: jax.Array) -> jax.Array:
            sent = {i: jax.lax.ppermute(x, self.replicas.stage, [(i, end)]) for i in others}
            whole = [sent.get(i, x) for i in range(self.count)]
            cut = [y.reshape(*y.shape[:at], parts, -1, *y.shape[at + 1 :]) for y in whole]
            tokens = jnp.concatenate(cut, axis=at + 1)
            tokens = jax.lax.slice_in_dim(tokens, 0, length // parts, axis=at + 1)
            return tokens.reshape(*x.shape[:at], length, *x.shape[at + 1 :])

        return self._local(local, self.at)(x)

    def dealt(self, x: jax.Array, parts: int) -> jax.Array:
        """As `deal`, of what all stages have: [R, B, T, …] → [R, p, B, t, …]."""
        x = jnp.expand_dims(x, self.at)
        cut = [self.part(x, parts, index) for index in range(self.count)]
        return self.hold(jnp.concatenate(cut, axis=self.at))

    def part(self, x: jax.Array, parts: int, index: int) -> jax.Array:
        """The index-th p-th of the tokens of ``x`` [R, 1, B, T, …]; see `deal`."""
        at = self.at + 2
        length = x.shape[at] // parts
        each = -(-length // self.count)
        x = x.reshape(*x.shape[:at], parts, length, *x.shape[at + 1 :])
        start, stop = (min(place * each, length) for place in (index, index + 1))
        x = jax.lax.slice_in_dim(x, start, stop, axis=at + 1)
        missing = each - (stop - start)
        if missing:
            pad = [(0, 0)] * x.ndim
            pad[at + 1] = (0, missing)
            x = jnp.pad(x, pad)
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    def _others(self) -> list[int]:
        """The stages besides the end."""
        return [stage for stage in range(self.count) if stage != self.end]

    def _local(self, local: Callable[..., jax.Array], *at: int) -> Callable[..., jax.Array]:
        """``local`` on each stage's part of its arguments, whose dims of stages are at ``at``; the
        result's is where the first argument's is."""
        specs = [PartitionSpec(*[None] * place, self.replicas.stage) for place in at]
        return jax.shard_map(
            local,
            mesh=self.replicas.mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            axis_names=set(self.replicas.stage),
            check_vma=False,
        )
