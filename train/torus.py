"""Gathers and scatters over an axis that spans several dimensions of a TPU's torus.

The TPU compiler has a ring for one dimension of the torus and, for several, an all-reduce that
drives the links of all of them. It has no such reduce-scatter: over two or three dimensions it
emits the all-reduce and drops what is not wanted, 2ρS bytes in place of ρS; and so it does with
all-gathers over three dimensions that close, and with those of up to 16 MiB over two. No option of
the compiler changes that (libtpu 0.0.42). So the step writes such a collective as several, one
after another, each over a part that the compiler serves as it is:

- a scatter goes dimension by dimension, outermost first, the buffer shrinking as it goes; one of
  less than 24 MiB, which even along one dimension may become an all-reduce, as blocks of a tile;
- a gather over three dimensions goes over all but two while the buffer is small, then over the
  two that are left at once; a small one goes dimension by dimension.

Together they move (1 - 1/n)S, the bound, whatever the dimensions. By the data sheet's links, cubes
of 4: gathers 0.26 of S over the rate of a ring against 0.33 for the compiler's all-reduce, a
scatter 0.49 against 0.33; a step of FSDP, two gathers and a scatter, is the same 1.0 and moves half
the bytes. Not measured.

Where the links are a switch's, or devices have no coordinates, an axis is one ring and nothing
changes. Rejected: one mesh axis a torus dimension. It gives every rule and every report three names
for one idea, and the partitioner gathers over all three at once just the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

__all__ = ["TILE", "Torus", "rings_along"]

_AT_ONCE = 2
"""Dimensions over which the compiler gathers as it is asked to."""

_SMALL_BYTES = 24 * 2**20
"""Between 16 MiB, which the compiler gathers over two dimensions by all-reduce, and 32, which it
does not."""

TILE = (8, 128)
"""Of a TPU's registers. In this shape every small scatter tried stayed one; as the weights have
it, it depended on their dims (libtpu 0.0.42)."""

_SHORT = 2
"""A dimension of this size does not close; cubes with one are gathered as asked."""


@dataclass(frozen=True)
class Torus:
    """The parts of each mesh axis that lie along one dimension of a torus.

    Attributes:
        rings: axis → sizes, outermost first, whose product is the axis' size; an axis that is
            not laid on a torus is left out.
    """

    rings: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh) -> Torus:
        """The torus under a mesh, from its devices' coordinates; none without devices."""
        return _torus_of(mesh) if isinstance(mesh, Mesh) else cls({})

    def gathers_apart(self, axes: Sequence[str], whole_bytes: int) -> bool:
        """Whether a gather over these axes is better written down than left to the compiler.

        Args:
            axes: to gather over.
            whole_bytes: of the result, on one device.
        """
        long = sum(size > _SHORT for axis in axes for size in self.rings.get(axis, ()))
        return long > _AT_ONCE or (long == _AT_ONCE and whole_bytes < _SMALL_BYTES)

    def scatter(self, x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
        """``psum_scatter`` over axes, major to minor, tiled along ``dim``; in a ``shard_map``."""
        if not any(axis in self.rings for axis in axes):
            return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
        for axis in axes:
            part = x.size // jax.lax.axis_size(axis)
            if axis in self.rings and x.nbytes < _SMALL_BYTES and part % math.prod(TILE) == 0:
                x = self._scatter_tiles(x, axis, dim)
            else:
                x = self._scatter_rings(x, axis, dim)
        return x

    def _scatter_rings(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        for groups in self._scatters(axis):
            x = jax.lax.psum_scatter(
                x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups
            )
        return x

    def _scatter_tiles(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        first = jnp.moveaxis(x, dim, 0)
        part = self._scatter_rings(first.reshape(-1, *TILE), axis, 0)
        return jnp.moveaxis(part.reshape(-1, *first.shape[1:]), 0, dim)

    def gather(self, x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
        """``all_gather`` over axes, major to minor, tiled along ``dim``; in a ``shard_map``."""
        whole = x.nbytes * math.prod(jax.lax.axis_size(axis) for axis in axes)
        if not self.gathers_apart(axes, whole):
            return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
        for axis in reversed(axes):
            for groups in self._gathers(axis, whole):
                x = jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def _scatters(self, axis: str) -> list[list[list[int]] | None]:
        """Groups of every scatter over an axis, in order; None for the whole axis."""
        rings = self.rings.get(axis, ())
        if len(rings) < 2:
            return [None]
        return [_groups(rings, at, at + 1) for at in range(len(rings))]

    def _gathers(self, axis: str, whole_bytes: int) -> list[list[list[int]] | None]:
        """Groups of every gather over an axis, in order; None for the whole axis."""
        if not self.gathers_apart((axis,), whole_bytes):
            return [None]
        if whole_bytes < _SMALL_BYTES:
            return self._scatters(axis)[::-1]
        rings = self.rings[axis]
        return [_groups(rings, _AT_ONCE, len(rings)), _groups(rings, 0, _AT_ONCE)]


def _groups(rings: Sequence[int], first: int, last: int) -> list[list[int]]:
    """Indices on an axis that differ only in the rings ``first`` to ``last``.

    >>> _groups((2, 3), 0, 1)
    [[0, 3], [1, 4], [2, 5]]
    """
    inside = list(range(first, last))
    outside = [at for at in range(len(rings)) if at not in inside]
    places = np.arange(math.prod(rings)).reshape(rings).transpose(*outside, *inside)
    return places.reshape(-1, math.prod(rings[first:last])).tolist()


@lru_cache(maxsize=64)
def _torus_of(mesh: Mesh) -> Torus:
    devices = mesh.devices
    if not all(hasattr(device, "coords") for device in devices.flat):
        return Torus({})
    where = np.array(
        [
            (
                getattr(device, "slice_index", 0) or 0,
                *device.coords,
                getattr(device, "core_on_chip", 0) or 0,
            )
            for device in devices.flat
        ]
    ).reshape(*devices.shape, -1)
    found = {}
    for at, axis in enumerate(mesh.axis_names):
        lines = np.moveaxis(where, at, 0).reshape(devices.shape[at], -1, where.shape[-1])
        rings = rings_along(lines)
        if rings:
            found[axis] = rings
    return Torus(found)


def rings_along(where: np.ndarray) -> tuple[int, ...]:
    """The sizes, outermost first, of the rings that an axis is made of.

    Args:
        where: [positions on the axis, lines, coordinates]; the first coordinate is the slice.

    Returns:
        Empty where the axis crosses slices, or is not laid in rows along dimensions.

    >>> rings_along(np.array([[[0, x, y]] for x in range(2) for y in range(4)]))
    (2, 4)
    """
    count = len(where)
    if (where[:, :, 0] != where[:1, :, 0]).any():
        return ()
    strides = []
    for dim in range(1, where.shape[-1]):
        moved = np.flatnonzero((where[:, :, dim] != where[:1, :, dim]).any(axis=1))
        if moved.size:
            strides.append((int(moved[0]), dim))
    strides.sort(reverse=True)
    sizes, outer = [], count
    for stride, dim in strides:
        if outer % stride:
            return ()
        size, outer = outer // stride, stride
        line = where[:, :, dim]
        cube = line.reshape(-1, size, stride, line.shape[1])
        first = cube[:1, :, :1]
        distinct = (np.diff(np.sort(first, axis=1), axis=1) != 0).all()
        if not distinct or (cube != first).any():
            return ()
        sizes.append(size)
    return tuple(sizes) if math.prod(sizes) == count else ()
