"""The experts hook of a step whose rows are split along their length, and whose experts are not.

Without a capacity tokens are treated alone, and each device serves its own. With one, places in the
experts' buffers are dealt over the axis of the length, as `meshwright.train.row_parts` says: tokens
come to a device's places, go through the experts there, and their sums go home. The two moves are
on devices, by hand, and each is the other's transpose; the matmuls between them are the compiler's,
under the maps of `meshwright.train.replicas`, so that their weights are gathered, and gradients
reduced, as all others are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from meshwright.models.experts import apply_experts
from meshwright.sharding.expert_layout import places_of_part
from meshwright.train.expert_carriers import Buffers
from meshwright.train.expert_work import batched, mlp
from meshwright.train.replicas import Replicas
from meshwright.train.row_parts import RowSplit

__all__ = ["RowExperts"]

_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class RowExperts:
    """Experts that take tokens by whole rows, of which devices have parts: an experts hook.

    Attributes:
        replicas: what the caller has mapped over; its ``length`` axes split the rows.
    """

    replicas: Replicas

    def __call__(
        self,
        x: Array,
        ids: Array,
        weights: Array,
        params: Mapping[str, Array],
        *,
        capacity: int | None,
    ) -> Array:
        """As `meshwright.models.experts.apply_experts`; ``capacity`` is of the whole row."""
        if capacity is None:
            return apply_experts(x, ids, weights, params, capacity=None)
        moves = _Moves(self.replicas, params["w_up"].shape[0], capacity)
        slots = moves.slots()(ids)
        tokens_there, tokens_home = moves.tokens()
        gates_there, gates_home = moves.gates(ids.shape[-1])
        sent = _linear(tokens_there, tokens_home)(x, *slots)
        gates = _linear(gates_there, gates_home)(weights.astype(x.dtype), *slots)
        out, _ = mlp(batched, sent, gates, params)
        return _linear(tokens_home, tokens_there)(out, *slots)


def _linear(there: Callable[..., Array], home: Callable[..., Array]) -> Callable[..., Array]:
    """A linear map of its first argument, and its transpose."""

    @jax.custom_vjp
    def move(x: Array, take: Array, back: Array) -> Array:
        return there(x, take, back)

    move.defvjp(
        lambda x, *slots: (move(x, *slots), slots),
        lambda slots, grad: (home(grad, *slots), None, None),
    )
    return move


@dataclass(frozen=True)
class _Moves:
    """What happens on devices.

    Attributes:
        replicas: of the step.
        count: E.
        capacity: C.
    """

    replicas: Replicas
    count: int
    capacity: int

    def slots(self) -> Any:
        """ids → (take, back) of `RowSplit.slots`."""

        def local(ids: Array) -> tuple[Array, Array]:
            return self._split.slots(ids, self.count, self.capacity)

        def like(ids: Array) -> Any:
            *lead, rows, length, choices = ids.shape
            take = (*lead, rows, self.count * self._each)
            back = (*lead, rows, length * self._split.parts, choices)
            return tuple(jax.ShapeDtypeStruct(shape, "int32") for shape in (take, back))

        return self.replicas.on_devices(local, [_WHOLE], (_WHOLE, _WHOLE), like)

    def tokens(self) -> tuple[Any, Any]:
        """[B, t, D] → [B, E, C/c, D], and its transpose."""
        return self._both(Buffers.there, Buffers.home, lambda x: x.shape[-1])

    def gates(self, choices: int) -> tuple[Any, Any]:
        """[B, t, k] → [B, E, C/c, 1], and its transpose, in the dtype of what is sent."""
        return self._both(Buffers.gates_there, Buffers.gates_home, lambda _: 1, choices)

    def _both(
        self, there: Any, home: Any, width: Callable[[Array], int], choices: int | None = None
    ) -> tuple[Any, Any]:
        def there_like(x: Array, *_: Array) -> Any:
            shape = (*x.shape[:-2], self.count, self._each, width(x))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        def home_like(out: Array, take: Array, back: Array) -> Any:
            del take
            length = back.shape[-2] // self._split.parts
            shape = (*out.shape[:-3], length, choices or out.shape[-1])
            return jax.ShapeDtypeStruct(shape, out.dtype)

        return self._moved(there, there_like), self._moved(home, home_like)

    def _moved(self, method: Any, like: Any) -> Any:
        def local(x: Array, take: Array, back: Array) -> Array:
            slots = (self.count, self._each)
            return method(Buffers((), 1, slots, take, back, self._split), x)

        return self.replicas.on_devices(local, [_WHOLE] * 3, _WHOLE, like)

    @property
    def _split(self) -> RowSplit:
        return RowSplit.of(self.replicas)

    @property
    def _each(self) -> int:
        return places_of_part(self.capacity, self._split.parts)
