"""Rows and tokens dealt to devices: which axes split a batch, and a step mapped over them.

GSPMD has no notion of "not yet reduced": left to itself it sums a gradient over all data axes at
once, where it appears, and sums twice a weight that is read twice. So each device's part of a batch
is made explicit: the axes that split rows (data, fsdp) and those that split the length of a row
(context) become a leading dim of the batch, mapped by ``vmap`` with ``spmd_axis_name``; locally it
is a dim of one. The model sees its own tokens only, and a gradient leaves the mapped region through
the reduction of `meshwright.train.weights`. With several microbatches the axes that no accumulator
is split over are mapped further out, and summed over once a step.

The length of a row is dealt in the order of `meshwright.sharding.token_layout`, so that causal
attention is equal work for every device. Rows arrive whole on all devices of a context group (4
bytes a token and array), and each takes its own tokens: nothing moves.

The alternative, ``shard_map`` around the loss, would make the axes of the layers manual too, and
nest badly with pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.rules import Rules
from meshwright.sharding.token_layout import TokenLayout, token_order
from meshwright.train.layout import Layout

__all__ = ["Batch", "Held", "Levels", "Replicas", "batch_shardings", "real_axes", "real_axes_of"]

Batch = dict[str, jax.Array]
"""``tokens``, ``targets`` int32 and ``weights`` float32, all [microbatches, rows, length]; with
masked documents also ``segments`` and ``positions`` int32 of that shape."""

Levels = tuple[tuple[str, ...], ...]
"""The axes of each map, outermost first."""


@dataclass(frozen=True)
class Held:
    """An array of `Replicas.on_devices` that is mapped over some levels only.

    Attributes:
        spec: layout without the mapped dims.
        over: the levels it is mapped over; along the others it is the same.
    """

    spec: PartitionSpec
    over: Levels

    def lead(self, levels: Levels) -> tuple[int, ...]:
        """Places of its mapped dims."""
        return tuple(range(sum(level in self.over for level in levels)))

    def spread(self, levels: Levels) -> PartitionSpec:
        """Its layout with the mapped dims."""
        return PartitionSpec(*(level for level in levels if level in self.over), *self.spec)


@dataclass(frozen=True)
class Replicas:
    """The axes that split the tokens of a batch, and when gradients are summed over them.

    Attributes:
        mesh: built mesh.
        rows: axes of more than one device that split rows, outermost first.
        length: axes of more than one device that split the length of rows.
        apart: of these, those over which a device's sums are kept apart until the end of the step.
        now: the others: gradients are reduced as soon as a layer's gradient is there.
        order: how the length is dealt.
        stage: axes of more than one device that split the layers. Not of the tokens; but a
            pipeline maps over its stages too, inside of the replicas.
        expert: of those that split rows, the ones that experts are dealt to; always in ``now``.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    length: tuple[str, ...]
    apart: tuple[str, ...]
    now: tuple[str, ...]
    order: TokenLayout
    stage: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()

    @classmethod
    def of(cls, layout: Layout, mesh: Mesh, order: TokenLayout, microbatches: int = 1) -> Replicas:
        """The replicas of a layout on its mesh, for a step of so many microbatches."""
        rows, length = (real_axes(layout.rules, mesh, dim) for dim in ("batch", "length"))
        unreduced = layout.unreduced_axes(layout.reduced) if microbatches > 1 else ()
        split, expert = (*rows, *length), real_axes_of(layout.rules.expert_axes(), mesh)
        # Experts have no sums of one replica that could be kept apart.
        unreduced = tuple(axis for axis in unreduced if axis not in expert)
        apart = tuple(axis for axis in split if axis in unreduced)
        now = tuple(axis for axis in split if axis not in unreduced)
        stage = real_axes_of(layout.rules.stage_axes(), mesh)
        return cls(mesh, rows, length, apart, now, order, stage, expert)

    @property
    def axes(self) -> tuple[str, ...]:
        """All mapped axes, outermost map first."""
        return (*self.apart, *self.now)

    @property
    def levels(self) -> Levels:
        """The axes of each map, outermost first; none of no axes."""
        return tuple(group for group in (self.apart, self.now) if group)

    def size(self, axes: Sequence[str]) -> int:
        """Devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def mapped(self, one: Callable[..., Any], out_axes: Any = 0) -> Callable[..., Any]:
        """``one`` over the replicas of what `deal` returns.

        Args:
            one: of the microbatch of one replica.
            out_axes: of its results over the axes ``now``; those kept apart always come first.
        """
        if self.now:
            one = jax.vmap(one, spmd_axis_name=self.now, out_axes=out_axes)
        if self.apart:
            one = jax.vmap(one, spmd_axis_name=self.apart)
        return one

    def total(self, tree: Any) -> Any:
        """Results of `mapped`, with a dim for every level, summed over the replicas."""
        lead = tuple(range(len(self.levels)))
        return jax.tree.map(lambda x: jnp.sum(x, axis=lead), tree)

    def on_devices(
        self,
        local: Callable[..., Any],
        in_specs: Sequence[PartitionSpec | Held],
        out_specs: Any,
        like: Callable[..., Any],
    ) -> Callable[..., Any]:
        """A function that runs ``local`` on each device's own part of its arguments.

        For code that talks to other replicas, called under the maps of `mapped`: all mesh axes are
        manual, and collectives go by name. It has no derivative; give it one by `jax.custom_vjp`.

        Args:
            local: of arrays as one device holds them, without the mapped dims.
            in_specs, out_specs: layouts of arguments and results over other axes than the mapped,
                without the mapped dims. An array that is mapped over some levels only, and the
                same along the others, says so by `Held`.
            like: arguments → `jax.ShapeDtypeStruct` of every result, for arguments with any number
                of leading dims, which the results have too.
        """
        levels = (*self.levels, self.stage) if self.stage else self.levels

        def held(spec: PartitionSpec | Held) -> Held:
            return spec if isinstance(spec, Held) else Held(spec, levels)

        is_spec = {"is_leaf": lambda node: isinstance(node, PartitionSpec | Held)}
        is_held = {"is_leaf": lambda node: isinstance(node, Held)}
        ins, outs = tuple(map(held, in_specs)), jax.tree.map(held, out_specs, **is_spec)

        def stripped(*args: jax.Array) -> Any:
            found = local(
                *(jax.lax.squeeze(x, held.lead(levels)) for x, held in zip(args, ins, strict=True))
            )
            return jax.tree.map(
                lambda held, x: jax.lax.expand_dims(x, held.lead(levels)), outs, found, **is_held
            )

        call: Callable[..., Any] = jax.shard_map(
            stripped,
            mesh=self.mesh,
            in_specs=tuple(held.spread(levels) for held in ins),
            out_specs=jax.tree.map(lambda held: held.spread(levels), outs, **is_held),
            check_vma=False,
        )
        for level in levels:
            mapped = [level in held.over for held in ins]
            made = jax.tree.map(lambda held, level=level: level in held.over, outs, **is_held)
            call = _lifted(call, like, mapped, made)
        return call

    def deal(self, batch: Batch) -> Batch:
        """[m, rows, length] → [m, replicas of each level, rows of one, length of one].

        Rows are split over all their axes, major to minor, and so is the length in its order. No
        row moves between devices. With a split length ``positions`` are added where there are
        none: the place of a token in its row can no longer be read off the place in the array.
        """
        if not self.axes:
            return batch
        if self.length and "positions" not in batch:
            tokens = batch["tokens"]
            places = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
            batch = {**batch, "positions": jnp.broadcast_to(places, tokens.shape)}
        return jax.tree.map(self._dealt, batch)

    def _dealt(self, x: jax.Array) -> jax.Array:
        microbatches, rows, length = x.shape
        if self.length:
            x = x[:, :, token_order(self.order, length, self.size(self.length))]
        sizes = [self.mesh.shape[axis] for axis in (*self.rows, *self.length)]
        split, parts = sizes[: len(self.rows)], sizes[len(self.rows) :]
        local = (rows // math.prod(split), length // math.prod(parts))
        cube = x.reshape(microbatches, *split, local[0], *parts, local[1])
        place = {axis: 1 + at for at, axis in enumerate(self.rows)}
        place |= {axis: 2 + len(split) + at for at, axis in enumerate(self.length)}
        moved = [place[axis] for axis in self.axes]
        cube = cube.transpose(0, *moved, 1 + len(split), cube.ndim - 1)
        out = cube.reshape(microbatches, *map(self.size, self.levels), *local)
        spec = PartitionSpec(None, *self.levels)
        return jax.lax.with_sharding_constraint(out, NamedSharding(self.mesh, spec))


def batch_shardings(layout: Layout, mesh: Mesh, names: Sequence[str]) -> dict[str, NamedSharding]:
    """Placed batches: rows split over the axes of the dim ``batch``, microbatches and length whole.

    A device reads the whole of its rows, also where a context axis splits their length: the order
    they are dealt in is the step's business, and a token is 4 bytes.
    """
    spec = PartitionSpec(None, layout.rules.axes_for("activations", "batch") or None)
    return {name: NamedSharding(mesh, spec) for name in names}


def _lifted(
    call: Callable[..., Any], like: Callable[..., Any], mapped_in: Sequence[bool], mapped_out: Any
) -> Callable[..., Any]:
    """A function that a ``vmap`` turns into ``call`` on what it maps over.

    Outside of a map there are no replicas to run on, so there it is nothing but NaN.

    Args:
        call, like: see `Replicas.on_devices`.
        mapped_in, mapped_out: which arguments and results are mapped.
    """

    @jax.custom_batching.custom_vmap
    def alone(*args: jax.Array) -> Any:
        return jax.tree.map(_nothing, like(*args))

    @alone.def_vmap
    def _(size: int, batched: Sequence[bool], *args: jax.Array) -> tuple[Any, Any]:
        assert not any(have and not want for have, want in zip(batched, mapped_in, strict=True))
        whole = [
            jnp.broadcast_to(x, (size, *x.shape)) if want and not have else x
            for x, have, want in zip(args, batched, mapped_in, strict=True)
        ]
        return call(*whole), mapped_out

    return alone


def _nothing(x: Any) -> jax.Array:
    """NaN of a shape, or 0 where the dtype has none."""
    fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0
    return jnp.full(x.shape, fill, x.dtype)


def real_axes_of(axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
    """Those of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def real_axes(rules: Rules, mesh: Mesh, dim: str) -> tuple[str, ...]:
    """The axes of more than one device that split an activation dim."""
    return real_axes_of(rules.axes_for("activations", dim), mesh)
