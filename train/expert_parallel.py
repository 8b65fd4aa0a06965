"""The experts hook of a step whose experts are dealt to devices: tokens go to them.

A model calls its experts on its own tokens, under the maps of `meshwright.train.replicas`. Here the
call leaves the maps: one `jax.shard_map` runs `meshwright.train.expert_exchange` on all devices,
with the axis of the experts by name and their width split as the rules split it. The axis splits
rows, so everything else treats it like a data axis.

Matrices are not mapped over replicas, as tokens are: a device of the axis has its own experts, and
devices along other axes have the same ones. Their gradients therefore come out of one replica whole
as far as the axis goes, and are summed over the other axes that are reduced at once before they
leave (`Weights.sums_of`), into the layout of the reduced gradient; what is kept apart stays apart.
The alternative, a gradient for each replica, summed where all others are, has no place to stand:
along the axis it would be zeros for all experts but a device's own.

Derivatives are written down at this level, as a function under a custom ``vmap`` has none. What a
forward pass keeps is named `EXPERTS`, for policies of rematerialisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from meshwright.models.pure import LAYERS
from meshwright.sharding.decisions import axes_of
from meshwright.sharding.expert_layout import dropless_way
from meshwright.train.expert_exchange import EXPERTS, ExpertExchange
from meshwright.train.replicas import Held, Replicas
from meshwright.train.row_parts import RowSplit
from meshwright.train.weights import Weights, scope_of

__all__ = ["ExpertParallel"]

_EXPERTS = "experts"
_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class ExpertParallel:
    """Experts on other devices: an experts hook.

    Attributes:
        replicas: what the caller has mapped over; experts are dealt to its ``expert`` axes.
        weights: how matrices are laid out where they are used, and their gradients.
    """

    replicas: Replicas
    weights: Weights

    def __call__(
        self,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        params: Mapping[str, jax.Array],
        *,
        capacity: int | None,
    ) -> jax.Array:
        """As `meshwright.models.experts.apply_experts`, on the tokens of one device."""
        names = tuple(params)
        exchange = self._exchange(params, ids.shape[-1], capacity)
        call = _Call(self, exchange, names)
        forward, backward = call.forward(), call.backward()

        @jax.custom_vjp
        def apply(x: Any, ids: Any, gates: Any, *matrices: Any) -> jax.Array:
            return forward(x, ids, gates, *matrices)[0]

        def keep(x: Any, ids: Any, gates: Any, *matrices: Any) -> tuple[jax.Array, Any]:
            y, kept = forward(x, ids, gates, *matrices)
            # Named out here too: a policy sees the results of the map, not what is inside.
            return y, (ids, tuple(checkpoint_name(leaf, EXPERTS) for leaf in kept), matrices)

        def back(saved: Any, y_grad: jax.Array) -> tuple[Any, ...]:
            ids, kept, matrices = saved
            x_grad, gates_grad, grads = backward(y_grad, ids, *matrices, *kept)
            return (x_grad, None, gates_grad, *grads)

        apply.defvjp(keep, back)
        return apply(x, ids, weights, *params.values())

    def _exchange(
        self, params: Mapping[str, jax.Array], choices: int, capacity: int | None
    ) -> ExpertExchange:
        axes = self.replicas.expert
        parts = self.replicas.size(axes)
        # XLA has no ragged all-to-all for CPUs, and what stands in for it sends more.
        ragged = self.replicas.mesh.devices.flat[0].platform != "cpu"
        way = dropless_way(params["w_up"].shape[0], choices, parts) if ragged else "gather"
        axis = axes[0] if len(axes) == 1 else axes
        split = capacity is not None and bool(self.replicas.length)
        rows = RowSplit.of(self.replicas) if split else None
        return ExpertExchange(axis, parts, capacity, self.width, way, rows)

    @property
    def width(self) -> tuple[str, ...]:
        """The axes that split the width of an expert."""
        spec = self._specs(self.weights.compute_specs, "w_down")
        axes = axes_of(spec[1]) if len(spec) > 1 else ()
        return tuple(axis for axis in axes if self.replicas.mesh.shape[axis] > 1)

    def layout(self, name: str) -> PartitionSpec:
        """Of a matrix where it is used: [E, D, M], or [E, M, D] of ``w_down``."""
        inner = (self.width, None) if name == "w_down" else (None, self.width)
        return PartitionSpec(self.replicas.expert, *(axes or None for axes in inner))

    def summed(self, name: str) -> tuple[Any, PartitionSpec]:
        """How a device's gradient of a matrix is summed, and laid out then."""
        axes = tuple(axis for axis in self.replicas.now if axis not in self.replicas.expert)
        reduced = self._specs(self.weights.reduced_specs, name)
        local, out = self.weights.sums_of(axes, self.layout(name), reduced, 3)

        def scoped(grad: jax.Array) -> jax.Array:
            with jax.named_scope(scope_of(f"{LAYERS}/{_EXPERTS}/{name}")):
                return local(grad)

        return scoped, out

    def _specs(self, specs: Any, name: str) -> PartitionSpec:
        """Without the dim of layers."""
        return PartitionSpec(*specs[LAYERS][_EXPERTS][name][1:])


@dataclass(frozen=True)
class _Call:
    """The two halves of one call, on all devices.

    Attributes:
        hook: layouts.
        exchange: what runs on a device.
        names: of the matrices, in the order they are handed over.
    """

    hook: ExpertParallel
    exchange: ExpertExchange
    names: tuple[str, ...]

    def forward(self) -> Any:
        """x, ids, gates, matrices → y and what is kept."""

        def local(x: Any, ids: Any, gates: Any, *matrices: Any) -> Any:
            return self.exchange.forward(x, ids, gates, self._named(matrices))

        def like(x: Any, ids: Any, gates: Any, *matrices: Any) -> Any:
            del gates
            return x, self.exchange.kept_like(x, ids, self._local_shapes(matrices))

        specs = [_WHOLE] * 3 + self._matrices()
        return self.hook.replicas.on_devices(local, specs, (_WHOLE, self._kept()), like)

    def backward(self) -> Any:
        """Gradient of y, ids, matrices, kept → gradients of x, gates and matrices."""
        count = len(self.names)
        sums = [self.hook.summed(name) for name in self.names]

        def local(y_grad: Any, ids: Any, *rest: Any) -> Any:
            params, kept = self._named(rest[:count]), rest[count:]
            x_grad, gates_grad, grads = self.exchange.backward(ids, params, kept, y_grad)
            found = zip(self.names, sums, strict=True)
            return x_grad, gates_grad, tuple(summed(grads[name]) for name, (summed, _) in found)

        def like(y_grad: Any, ids: Any, *rest: Any) -> Any:
            gates = jax.ShapeDtypeStruct(ids.shape, "float32")
            return y_grad, gates, rest[:count]

        replicas = self.hook.replicas
        over = tuple(level for level in (replicas.apart, replicas.stage) if level)
        grads = tuple(Held(spec, over) for _, spec in sums)
        specs = [_WHOLE, _WHOLE, *self._matrices(), *self._kept()]
        return replicas.on_devices(local, specs, (_WHOLE, _WHOLE, grads), like)

    def _named(self, matrices: Any) -> dict[str, jax.Array]:
        return dict(zip(self.names, matrices, strict=True))

    def _matrices(self) -> list[Held]:
        """Each stage has its own, and all replicas of it the same."""
        stage = (self.hook.replicas.stage,)
        return [Held(self.hook.layout(name), stage) for name in self.names]

    def _local_shapes(self, matrices: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """A device's experts, with their whole width."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            experts = x.shape[-3] // self.exchange.parts
            return jax.ShapeDtypeStruct((experts, *x.shape[-2:]), x.dtype)

        return {name: one(x) for name, x in self._named(matrices).items()}

    def _kept(self) -> tuple[PartitionSpec, ...]:
        """Layouts of what is kept: the hidden layer's width is split."""
        if self.exchange.capacity is None:
            return (_WHOLE,) * 3
        hidden = PartitionSpec(None, None, None, self.hook.width or None)
        return (_WHOLE, _WHOLE, *[hidden] * (len(self.names) - 1))
