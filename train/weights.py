"""Weights on their way into a matmul, and gradients on their way back.

The state holds float32 masters in the optimizer's layout. Where the working layout differs
(ZeRO-1 and -2) a step starts by casting to the compute dtype and gathering once. Then each weight
is *used* where it is read: cast, gathered over the axes that split tokens, and on the way back its
gradient is put into its reduced layout at once, which makes the partitioner emit a reduce-scatter
and not an all-reduce. Writing the transpose by hand matters: jax's own transpose of a sharding
constraint is the same constraint, the *gathered* layout. Per-layer weights are used inside the
layer loop, inside rematerialisation, so a gathered layer lives for one layer only and is gathered
again in the backward pass.

**Reductions.** A gradient is reduce-scattered over the axes that split its weight, and only those
shards are all-reduced over the others, layer by layer: ρ(s)Ψ + 2ρ(r)Ψ/s bytes an element, where
reducing over all of them at once moves 2ρ(rs)Ψ. The sums of separate devices arrive here as a
mapped dim of the caller's, so the reduction can be written down as the collectives it should be;
left to the partitioner, some weights were all-reduced and then sliced.

**Experts** that are dealt to devices are used where they are, gathered over other axes only, and
tokens go to them (`meshwright.train.expert_parallel`). What comes back is reduced already: of what
is mapped, only that code knows which gradient is whose, and calls `Weights.sums_of` itself.

Each use carries a name scope, so that whoever reads the compiled program knows whose bytes move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.config import Remat
from meshwright.models.hooks import scan_layers
from meshwright.models.pure import LAYERS
from meshwright.sharding.decisions import axes_of, entry_of
from meshwright.train.embedding import Exchange
from meshwright.train.layout import Layout
from meshwright.train.torus import Torus

__all__ = ["Reductions", "Weights", "scope_of"]


@dataclass(frozen=True)
class Reductions:
    """Axes that split the rows of a batch and that a step maps over.

    Attributes:
        now: gradients are summed over these where they appear.
        apart: each device's sums are kept apart along these until the end of the step.
        stage: each device has layers of its own along these, and its own sums of the rest.
    """

    now: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()


class Weights:
    """The layouts applied to parameters: working copy, use, accumulators, masters.

    Args:
        layout: resolved layouts; held as one tree of PartitionSpecs a role.
        shapes: the parameters' shapes, of their structure.
        mesh: built mesh.
        dtype: compute dtype.
        reductions: which axes the caller has mapped over, and which gradients are summed over.
        final: gradients go straight into the masters' layout (a step of one microbatch).
    """

    def __init__(
        self,
        layout: Layout,
        shapes: Any,
        mesh: Mesh,
        dtype: Any,
        reductions: Reductions,
        *,
        final: bool = False,
    ) -> None:
        self.mesh, self.dtype, self.reductions = mesh, dtype, reductions
        self.torus = Torus.of(mesh)
        self.rows = {
            name: leaf.shape[0]
            for name, leaf in shapes.items()
            if name != LAYERS and hasattr(leaf, "shape")
        }
        self.splits_stream = bool(layout.rules.stream_axes())
        self.working_specs = layout.working.specs(shapes)
        self.master_specs = layout.masters.specs(shapes)
        self.reduced_specs = self.master_specs if final else layout.reduced.specs(shapes)
        structure = jax.tree.structure(shapes)
        compute = [layout.compute_spec(decision) for decision in layout.working]
        self.compute_specs = jax.tree.unflatten(structure, compute)
        self.dealt = frozenset(d.leaf.path for d in layout.working if layout.is_dealt(d.leaf))

    def working(self, masters: Any) -> Any:
        """Masters as the step keeps them: gathered once, in the compute dtype, where that differs.

        A weight whose two layouts agree stays the float32 master, cast where it is used: a cast
        copy of all of it would only take memory.
        """

        def one(
            path: Any, master: jax.Array, spec: PartitionSpec, held: PartitionSpec
        ) -> jax.Array:
            if spec == held:
                return master
            with jax.named_scope(scope_of(jax.tree_util.keystr(path, simple=True, separator="/"))):
                return self._gathered(master.astype(self.dtype), held, spec)

        specs = (self.working_specs, self.master_specs)
        return jax.tree_util.tree_map_with_path(one, masters, *specs)

    def exchange_for(self, name: str, tokens: int) -> Exchange | None:
        """A lookup that moves rows and not the table; None where gathering is as good.

        Args:
            name: a parameter [V, D] outside of the layers.
            tokens: looked up by one device, in one microbatch.
        """
        working, reduced = self.working_specs[name], self.reduced_specs[name]
        now = self.reductions.now
        if working != reduced or working != self.master_specs[name] or tokens >= self.rows[name]:
            return None
        found = Exchange(self.mesh, working, now, self.dtype, scope_of(name))
        ours = (
            set(found.columns) and set(found.columns) <= set(now) and not set(found.ids) & set(now)
        )
        return found if ours else None

    def use_all_but_layers(self, params: Any, but: Sequence[str] = ()) -> Any:
        """Cast and gather what is not inside the layer loop, except what ``but`` names."""
        outside = {key: tree for key, tree in params.items() if key not in (LAYERS, *but)}
        roles = (self.working_specs, self.compute_specs, self.reduced_specs)
        working, compute, reduced = ({key: specs[key] for key in outside} for specs in roles)
        used = self._use(outside, working, compute, reduced)
        return {**params, **used}

    def run_layers(
        self, body: Callable, stacked: Any, x: Any, remat: Remat, live: jax.Array | None = None
    ) -> Any:
        """Scan the layers, using each layer's weights inside the rematerialised body.

        Args:
            body, stacked, x, remat: as `meshwright.models.hooks.scan_layers`.
            live: bool [layers], False for a place that holds no layer; None where all do.
        """
        roles = (self.working_specs, self.compute_specs, self.reduced_specs)
        specs = [_map_specs(_drop_first, specs[LAYERS]) for specs in roles]

        def using(x: jax.Array, layer: Any) -> jax.Array:
            weights, here = layer
            y = body(x, self._use(weights, *specs, parent=LAYERS))
            if here is None:
                return y
            return jax.tree.map(lambda new, old: jnp.where(here, new, old), y, x)

        gathers = self.compute_specs[LAYERS] != self.working_specs[LAYERS]
        if remat == "none" and (gathers or self.splits_stream or self.reductions.stage):
            # Without this, the backward pass would keep every layer's gathered weights, and the
            # gathered inputs of its regions.
            using = jax.checkpoint(using, policy=_save_all_but_gathered, prevent_cse=False)
        return scan_layers(using, (stacked, live), x, remat)

    def zero_accumulators(self, params: Any) -> Any:
        """Float32 zeros in the accumulators' layout, with leading dims of replicas and stages."""

        def one(path: Any, param: jax.Array) -> jax.Array:
            shape = param.shape if _is_layered(path) else (*self._stages, *param.shape)
            return jnp.zeros([*map(self._size, self.lead), *shape], jnp.float32)

        return self.accumulated(jax.tree_util.tree_map_with_path(one, params))

    def accumulated(self, grads: Any, *, by_chunk: bool = False) -> Any:
        """Hold accumulators to their layout inside the loop.

        Args:
            grads: accumulators.
            by_chunk: whether layers are [lead, stages, chunks, layers of a chunk, …].
        """

        def one(path: Any, grad: jax.Array, spec: PartitionSpec) -> jax.Array:
            if by_chunk and _is_layered(path):
                spec = PartitionSpec(self.reductions.stage, None, None, *spec[1:])
            return self._put(grad, self._accumulator(path, spec))

        return jax.tree_util.tree_map_with_path(one, grads, self.reduced_specs)

    def into_masters(self, grads: Any) -> Any:
        """Reduced gradients in the layout the optimizer updates in."""
        return jax.tree.map(self._put, grads, self.master_specs)

    def summed(self, grads: Any) -> Any:
        """Accumulators summed once over what was kept apart, straight into the optimizer's layout.

        The layers' have no dim of stages, as each is on one stage only.
        """

        def one(path: Any, grad: jax.Array, reduced: PartitionSpec, master: PartitionSpec) -> Any:
            stage = () if _is_layered(path) else self.reductions.stage
            apart = (*self.reductions.apart, *stage)
            if not apart:
                return self._put(grad, master)
            lead = len(self.lead) + bool(stage)
            grad = grad.reshape(-1, *grad.shape[lead:])
            return self._put(self._collect(grad, apart, reduced, master), master)

        roles = (self.reduced_specs, self.master_specs)
        return jax.tree_util.tree_map_with_path(one, grads, *roles)

    def _accumulator(self, path: Any, spec: PartitionSpec) -> PartitionSpec:
        stage = [self.reductions.stage] * bool(self.reductions.stage)
        return PartitionSpec(*self.lead, *([] if _is_layered(path) else stage), *spec)

    @property
    def lead(self) -> list[tuple[str, ...]]:
        """The axes of an accumulator's dim of replicas; no item where it has none."""
        return [self.reductions.apart] if self.reductions.apart else []

    @property
    def _stages(self) -> list[int]:
        return [self._size(self.reductions.stage)] if self.reductions.stage else []

    def _size(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _use(self, weights: Any, working: Any, compute: Any, reduced: Any, parent: str = "") -> Any:
        def one(path: Any, weight: jax.Array, *specs: PartitionSpec) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self._use_one(weight, specs, f"{parent}/{name}" if parent else name)

        return jax.tree_util.tree_map_with_path(one, weights, working, compute, reduced)

    def _use_one(self, weight: jax.Array, specs: Sequence[PartitionSpec], path: str) -> jax.Array:
        working, compute, reduced = specs
        stored, scope = weight.dtype, scope_of(path)

        @jax.custom_vjp
        def use(weight: jax.Array) -> jax.Array:
            with jax.named_scope(scope):
                return self._gathered(weight.astype(self.dtype), working, compute)

        def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
            # Through the compute layout first: the partitioner then sums what is left to it
            # where the gradient is, and does not reshard what it is computed from.
            with jax.named_scope(scope):
                if path in self.dealt:
                    return (self._put(grad, reduced).astype(stored),)
                held = self._put(grad, compute)
                return (self._reduced(held, compute, reduced, scope).astype(stored),)

        use.defvjp(lambda weight: (use(weight), None), backward)
        return use(weight)

    def _reduced(
        self, grad: jax.Array, compute: PartitionSpec, reduced: PartitionSpec, scope: str
    ) -> jax.Array:
        """Sum a gradient over the mapped axes and the rest, into its reduced layout."""
        now, stage = self.reductions.now, self.reductions.stage
        if not now:
            return self._put(grad, reduced)

        def collect(grads: jax.Array) -> jax.Array:
            with jax.named_scope(scope):
                return self._put(self._collect(grads, now, compute, reduced), reduced)

        if not stage:
            return _mapped(collect, stays=False)(grad)
        # The map over stages is inside of the one over replicas, and comes first.
        of_stages = jax.vmap(collect, in_axes=1, spmd_axis_name=stage)
        return _mapped(_mapped(of_stages, stays=False), stays=True)(grad)

    def _collect(
        self,
        grads: jax.Array,
        now: tuple[str, ...],
        compute: PartitionSpec,
        reduced: PartitionSpec,
    ) -> jax.Array:
        """Sum [replicas over ``now``, …] laid out as ``compute``, into ``reduced``."""
        local, out = self.sums_of(now, compute, reduced, grads.ndim - 1)
        return jax.shard_map(
            lambda grads: local(jax.lax.squeeze(grads, (0,))),
            mesh=self.mesh,
            in_specs=PartitionSpec(now, *compute),
            out_specs=out,
            check_vma=False,
        )(grads)

    def sums_of(
        self, axes: Sequence[str], compute: PartitionSpec, reduced: PartitionSpec, ndim: int
    ) -> tuple[Callable[[jax.Array], jax.Array], PartitionSpec]:
        """How a device's part of a gradient is summed over axes: scattered over those that split a
        dim of ``reduced``, all-reduced over the others.

        Args:
            axes: to sum over.
            compute: layout of the gradient over other axes.
            reduced: layout wanted.
            ndim: of the gradient.

        Returns:
            A function of the local array, inside of a `jax.shard_map`; and its result's layout.
        """
        scattered = {
            dim: found
            for dim, entry in enumerate(reduced)
            if (found := tuple(axis for axis in axes_of(entry) if axis in axes))
        }
        whole = tuple(axis for axis in axes if not any(axis in a for a in scattered.values()))
        # Over the fastest links first: what crosses the others is then a part of it.
        order = list(self.mesh.axis_names)
        fastest = sorted(scattered, key=lambda dim: -max(map(order.index, scattered[dim])))

        def local(grad: jax.Array) -> jax.Array:
            for dim in fastest:
                grad = self.torus.scatter(grad, scattered[dim], dim)
            return jax.lax.psum(grad, whole) if whole else grad

        split = _axes_by_dim(compute, ndim)
        for dim, found in scattered.items():
            split[dim] = (*split[dim], *found)
        return local, PartitionSpec(*(found or None for found in split))

    def _gathered(self, x: jax.Array, held: PartitionSpec, spec: PartitionSpec) -> jax.Array:
        """Take ``x`` from one layout to another that splits less.

        It is held where it is first: the partitioner may otherwise gather before a cast, at twice
        the bytes.
        """
        x = self._put(x, held)
        rows = _split_dims(x.ndim, held, spec)
        kept = math.prod(self.mesh.shape[axis] for *_, kept in rows for axis in kept)
        apart = {
            dim: axes[len(kept_axes) :]
            for dim, axes, kept_axes in rows
            if axes[: len(kept_axes)] == kept_axes
            and self.torus.gathers_apart(axes[len(kept_axes) :], x.nbytes // kept)
        }
        if not apart:
            return self._put(x, spec)
        entries = [entry_of(axes[: len(axes) - len(apart.get(dim, ()))]) for dim, axes, _ in rows]

        def local(x: jax.Array) -> jax.Array:
            for dim, axes in apart.items():
                x = self.torus.gather(x, axes, dim)
            return x

        out = PartitionSpec(*entries)
        mapped: Callable[..., Any] = jax.shard_map(
            local, mesh=self.mesh, in_specs=held, out_specs=out, check_vma=False
        )
        gather = jax.custom_batching.custom_vmap(mapped)

        @gather.def_vmap
        def _(size: int, batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
            # The same for all replicas; stages have their own.
            del size
            if not batched[0]:
                return gather(x), False
            return jax.vmap(mapped, spmd_axis_name=self.reductions.stage)(x), True

        return self._put(gather(x), spec)

    def _put(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def scope_of(path: str) -> str:
    """The name scope a parameter's cast, gather and reduction carry in the compiled program.

    >>> scope_of("layers/attn/wq")
    'weight:layers.attn.wq'
    """
    return "weight:" + path.replace("/", ".")


def _mapped(call: Callable[[jax.Array], jax.Array], *, stays: bool) -> Callable[..., jax.Array]:
    """The identity, which a ``vmap`` turns into ``call`` on all that it maps over.

    Args:
        call: of an array with the mapped dim first.
        stays: whether its result has that dim too.
    """

    @jax.custom_batching.custom_vmap
    def one(x: jax.Array) -> jax.Array:
        return x

    @one.def_vmap
    def _(size: int, batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
        return call(x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))), stays

    return one


def _is_layered(path: Any) -> bool:
    """Whether a leaf is of the stacked layers."""
    return path[0].key == LAYERS


def _save_all_but_gathered(primitive: Any, *operands: Any, **_: Any) -> bool:
    """Rematerialisation policy: keep activations, cast and gather weights again.

    Constraints and casts are cheap to repeat on activations. `_use_one` and the gathers of
    `meshwright.sharding.placement.Constrain.reshard` appear as custom derivatives of one operand;
    those with more (attention) are kept.
    """
    if primitive.name == "custom_vjp_call":
        return len(operands) > 1
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def _split_dims(
    ndim: int, held: PartitionSpec, spec: PartitionSpec
) -> list[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """(dim, axes that split it in ``held``, axes that split it in ``spec``) of every dim."""
    before, after = _axes_by_dim(held, ndim), _axes_by_dim(spec, ndim)
    return [(dim, before[dim], after[dim]) for dim in range(ndim)]


def _axes_by_dim(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The axes that split each dim, also those that a spec leaves out at its end."""
    return [axes_of(entry) for entry in (*spec, *[None] * (ndim - len(spec)))]


def _map_specs(fn: Callable[[PartitionSpec], PartitionSpec], specs: Any) -> Any:
    return jax.tree.map(fn, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _drop_first(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*spec[1:])
