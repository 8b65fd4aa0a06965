"""Weights on their way into a matmul, and gradients on their way back.

The state holds float32 masters in the optimizer's layout. Where the working layout differs
(ZeRO-1 and -2) a step starts by casting to the compute dtype and gathering once. Then each weight
is *used* where it is read: cast, gathered over the axes that split tokens, and on the way back its
gradient is put into its reduced layout at once, which makes the partitioner emit a reduce-scatter
and not an all-reduce. Writing the transpose by hand matters: jax's own transpose of a sharding
constraint is the same constraint, the *gathered* layout. Per-layer weights are used inside the
layer loop, inside rematerialisation, so a gathered layer lives for one layer only and is gathered
again in the backward pass.

**Hybrid data axes.** A gradient is reduce-scattered over the axes that split its weight, and only
those shards are all-reduced over the others, layer by layer: ρ(s)Ψ + 2ρ(r)Ψ/s bytes an element,
where reducing over all of them at once, as the partitioner does by itself, moves 2ρ(rs)Ψ.

Each use carries a name scope, so that whoever reads the compiled program knows whose bytes move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.config import Remat
from meshwright.models.hooks import scan_layers
from meshwright.train.layout import Layout

__all__ = ["LAYERS", "Weights", "scope_of"]

LAYERS = "layers"
"""The key of the parameters that are stacked and scanned."""


class Weights:
    """The layouts applied to parameters: working copy, use, accumulators, masters.

    Args:
        layout: resolved layouts; held as one tree of PartitionSpecs a role.
        shapes: the parameters' shapes, of their structure.
        mesh: built mesh.
        dtype: compute dtype.
        deferred: axes whose partial gradients are kept apart, a mapped dim of the caller's.
        final: gradients go straight into the masters' layout (a step of one microbatch).
    """

    def __init__(
        self,
        layout: Layout,
        shapes: Any,
        mesh: Mesh,
        dtype: Any,
        deferred: tuple[str, ...] = (),
        *,
        final: bool = False,
    ) -> None:
        self.mesh, self.dtype, self.deferred = mesh, dtype, deferred
        self.reduce_shards = bool(deferred) and final
        self.working_specs = layout.working.specs(shapes)
        self.master_specs = layout.masters.specs(shapes)
        self.reduced_specs = self.master_specs if final else layout.reduced.specs(shapes)
        self.compute_specs = _map_specs(layout.compute_spec, self.working_specs)

    def working(self, masters: Any) -> Any:
        """Masters as the step keeps them: gathered once, in the compute dtype, where that differs.

        A weight whose two layouts agree stays the float32 master, cast where it is used: a cast
        copy of all of it would only take memory.
        """

        def one(master: jax.Array, spec: PartitionSpec, held: PartitionSpec) -> jax.Array:
            return master if spec == held else self._put(master.astype(self.dtype), spec)

        return jax.tree.map(one, masters, self.working_specs, self.master_specs)

    def use_all_but_layers(self, params: Any) -> Any:
        """Cast and gather what is not inside the layer loop."""
        outside = {key: tree for key, tree in params.items() if key != LAYERS}
        roles = (self.working_specs, self.compute_specs, self.reduced_specs)
        working, compute, reduced = ({key: specs[key] for key in outside} for specs in roles)
        used = self._use(outside, working, compute, reduced)
        return {**params, **used}

    def run_layers(self, body: Callable, stacked: Any, x: Any, remat: Remat) -> Any:
        """Scan the layers, using each layer's weights inside the rematerialised body."""
        roles = (self.working_specs, self.compute_specs, self.reduced_specs)
        specs = [_map_specs(_drop_first, specs[LAYERS]) for specs in roles]

        def using(x: jax.Array, layer: Any) -> jax.Array:
            return body(x, self._use(layer, *specs, parent=LAYERS))

        gathers = self.compute_specs[LAYERS] != self.working_specs[LAYERS]
        if remat == "none" and gathers:
            # Without this, the backward pass would keep every layer's gathered weights.
            using = jax.checkpoint(using, policy=_save_all_but_weights, prevent_cse=False)
        return scan_layers(using, stacked, x, remat)

    def zero_accumulators(self, params: Any) -> Any:
        """Float32 zeros in the accumulators' layout, with the leading dim of replicas."""

        def one(param: jax.Array) -> jax.Array:
            replicas = math.prod(self.mesh.shape[axis] for axis in self.deferred)
            lead = [replicas] if self.deferred else []
            return jnp.zeros([*lead, *param.shape], jnp.float32)

        return self.accumulated(jax.tree.map(one, params))

    def accumulated(self, grads: Any) -> Any:
        """Hold accumulators to their layout inside the loop."""

        def one(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
            full = PartitionSpec(self.deferred, *spec) if self.deferred else spec
            return self._put(grad, full)

        return jax.tree.map(one, grads, self.reduced_specs)

    def into_masters(self, grads: Any) -> Any:
        """Reduced gradients in the layout the optimizer updates in."""
        return jax.tree.map(self._put, grads, self.master_specs)

    def _use(self, weights: Any, working: Any, compute: Any, reduced: Any, parent: str = "") -> Any:
        def one(path: Any, *leaf: Any) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            name = f"{parent}/{name}" if parent else name
            # The name goes into the compiled program, where a plan reads whose bytes move.
            with jax.named_scope(scope_of(name)):
                return self._use_one(*leaf)

        return jax.tree_util.tree_map_with_path(one, weights, working, compute, reduced)

    def _use_one(
        self,
        weight: jax.Array,
        working: PartitionSpec,
        compute: PartitionSpec,
        reduced: PartitionSpec,
    ) -> jax.Array:
        stored = weight.dtype

        @jax.custom_vjp
        def use(weight: jax.Array) -> jax.Array:
            # Held where it is first: the partitioner may otherwise gather before the cast, at
            # twice the bytes.
            return self._put(self._put(weight.astype(self.dtype), working), compute)

        def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
            # Through the compute layout first: the partitioner then sums each device's partial
            # gradient and keeps its part of the sum, a reduce-scatter. Asked for the reduced
            # layout alone, it may instead reshard what the gradient is computed from.
            shard = self._put(self._put(grad, compute), reduced)
            return (self._over_replicas(shard, reduced).astype(stored),)

        use.defvjp(lambda weight: (use(weight), None), backward)
        return use(weight)

    def _over_replicas(self, shard: jax.Array, reduced: PartitionSpec) -> jax.Array:
        """Sum a gradient's shards over the deferred axes here, inside the layer loop."""
        if not self.reduce_shards:
            return shard

        @jax.custom_batching.custom_vmap
        def one(shard: jax.Array) -> jax.Array:
            return shard

        @one.def_vmap
        def _(size: int, batched: Any, shards: jax.Array) -> tuple[jax.Array, bool]:
            del size, batched
            # jnp.sum would widen to float32 first, and so double what crosses the wire.
            return self._put(jax.lax.reduce_sum(shards, (0,)), reduced), False

        return one(shard)

    def _put(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def scope_of(path: str) -> str:
    """The name scope a parameter's cast, gather and reduction carry in the compiled program.

    >>> scope_of("layers/attn/wq")
    'weight:layers.attn.wq'
    """
    return "weight:" + path.replace("/", ".")


def _save_all_but_weights(primitive: Any, *operands: Any, **_: Any) -> bool:
    """Rematerialisation policy: keep activations, cast and gather weights again.

    Constraints and casts are cheap to repeat on activations. `_use_one` appears as a custom
    derivative of one operand; those with more (fused attention) are kept.
    """
    if primitive.name == "custom_vjp_call":
        return len(operands) > 1
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def _map_specs(fn: Callable[[PartitionSpec], PartitionSpec], specs: Any) -> Any:
    return jax.tree.map(fn, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def _drop_first(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*spec[1:])
