"""A checkpoint whose layers were stored in another order than this run stores them.

A pipeline stores the stacked layers as its stages hold them (`meshwright.sharding.schedule`): in
order, unless chunks are interleaved or the layers do not divide evenly. A checkpoint says which
layer each of its places holds. One that was saved in another order is read as it was saved and then
reordered, on the devices, once, with room for it twice; zeros fill places without a layer. The
alternative, saving always in order, would move the whole state between devices at every save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.models.pure import LAYERS, Places, reordered

__all__ = ["Reordering"]


class Reordering:
    """From the places of a checkpoint to those of a run.

    Args:
        saved, wanted: layers by place; empty for all in order.
        layers: of the model's stack.
    """

    def __init__(self, saved: Places, wanted: Places, layers: int) -> None:
        order = list(range(layers))
        self._saved, self._wanted = list(saved) or order, list(wanted) or order

    @property
    def needed(self) -> bool:
        """Whether the two differ."""
        return self._saved != self._wanted

    def as_saved(self, abstract: Any) -> Any:
        """The state as it was saved: ShapeDtypeStructs, with shardings that it can have."""
        count = len(self._saved)

        def one(path: Any, leaf: Any) -> Any:
            if not _is_stacked(path, leaf):
                return leaf
            sharding, shape = leaf.sharding, (count, *leaf.shape[1:])
            try:
                sharding.shard_shape(shape)
            except ValueError:  # these places do not divide over the stages
                rest = sharding.spec[1:]
                sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *rest))
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(one, abstract)

    def reordered(self, state: Any) -> Any:
        """A state as it was saved, as the run stores it."""

        def one(path: Any, leaf: Any) -> Any:
            stacked = self.needed and _is_stacked(path, leaf)
            return reordered(leaf, self._saved, self._wanted) if stacked else leaf

        return jax.tree_util.tree_map_with_path(one, state)

    def to_run(self, abstract: Any) -> Callable[[Any], Any]:
        """`reordered` as a program, whose results are laid out as ``abstract``."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(self.reordered, out_shardings=shardings)


def _is_stacked(path: Any, leaf: Any) -> bool:
    """Whether a leaf of a state has a dim of layers: of parameters and moments below that key."""
    return leaf.ndim > 0 and any(getattr(key, "key", None) == LAYERS for key in path)
