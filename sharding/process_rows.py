"""Which rows of a batch each process loads, and how they become one array over all of them.

A batch is one thing, the same on any number of processes: row ``r`` of it lies on the devices that
the mesh gives it to, and a process has to load the rows that lie on its own. Usually these are
equal blocks in the order of the processes. Where the axes that rows are dealt over do not
separate two processes, as with a tensor axis across hosts, both hold the same rows, and both must
load them.

Only the dim ``batch`` is dealt over processes. The other dims of a host's array are whole, also
those that the mesh splits: a process has its rows, not pieces of rows. This is where we differ
from ``jax.make_array_from_process_local_data``, which takes what a process passes as its part of
every dim that is split across processes, and cannot notice when it is not.

Cost: the first time that arrays of some shape are placed, the processes compare what they pass, a
few numbers each. Comparing every batch would make every step wait for its transfer.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Sequence
from typing import Any

from meshwright.sharding.errors import PlacementError

__all__ = [
    "block_of",
    "blocks_of",
    "check_agreement",
    "copy_to",
    "from_own_rows",
    "rows_of_process",
]

_PATIENCE_SECONDS = 20.0


def rows_of_process(batch_rows: int, placer: Any, process: int | None = None) -> slice:
    """Which rows of a batch a process has to load for `Placer.place`.

    Args:
        batch_rows: rows of the whole batch, over all processes.
        placer: a Placer, a Plan, or a sharding whose first dim is the rows.
        process: its number; this one by default.

    Raises:
        PlacementError: the axes do not divide the rows; or the mesh orders the devices so that
            a process's rows do not lie together.

    >>> from meshwright.sharding import Placer
    >>> rows_of_process(16, Placer.on("data=2,fsdp=4"))
    slice(0, 16, None)
    """
    import jax

    if isinstance(placer, jax.sharding.Sharding):
        sharding = placer
    else:
        placer = getattr(placer, "placer", placer)
        sharding = placer.batch_shardings(jax.ShapeDtypeStruct((batch_rows,), "int32"))
    return block_of(sharding, (batch_rows,), 0, process)


def block_of(sharding: Any, shape: Sequence[int], dim: int, process: int | None = None) -> slice:
    """The part of one dim that a process's devices hold together.

    Args:
        sharding: of the whole array.
        shape: of the whole array.
        dim: the dim of the rows.
        process: its number; this one by default.

    Raises:
        PlacementError: it is not one piece, or the process has no device in the mesh.
    """
    import jax

    size = shape[dim]
    process = jax.process_index() if process is None else process
    parts = {
        index[dim].indices(size)[:2]
        for device, index in sharding.devices_indices_map(tuple(shape)).items()
        if device.process_index == process
    }
    if not parts:
        raise PlacementError(
            f"cannot deal rows to process {process}",
            where=f"sharding {sharding}",
            why="none of the mesh's devices is its own",
            fix="build the mesh from the devices of all processes",
        )
    first, last = min(start for start, _ in parts), max(stop for _, stop in parts)
    if sum(stop - start for start, stop in parts) != last - first:
        raise PlacementError(
            f"cannot deal rows to process {process}",
            where=f"{size} rows, sharding {sharding}",
            why=f"its devices hold rows {', '.join(f'{a} to {b - 1}' for a, b in sorted(parts))}, "
            "which do not lie together",
            fix="order the mesh so that each process's devices follow each other on the axes of "
            "the dim `batch`",
        )
    return slice(first, last)


def blocks_of(mesh: Any, axes: Any, process: int | None = None) -> tuple[int, int]:
    """(which block of rows a process has, how many there are) for rows dealt over mesh axes.

    Raises:
        PlacementError: its rows are not one of so many equal blocks.
    """
    from jax.sharding import NamedSharding, PartitionSpec

    rows = mesh.size  # any number that all axes divide
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    mine = block_of(sharding, (rows,), 0, process)
    length = mine.stop - mine.start
    if rows % length or mine.start % length:
        raise PlacementError(
            "cannot deal rows to the processes in equal blocks",
            where=f"mesh {dict(mesh.shape)}, axes {axes}",
            why=f"of {rows} rows this process holds {mine.start} to {mine.stop - 1}",
            fix="give every process as many devices, in a mesh that they follow each other in",
        )
    return mine.start // length, rows // length


def from_own_rows(x: Any, sharding: Any, shape: Sequence[int], dim: int | None) -> Any:
    """The whole array of which this process holds ``x``.

    Args:
        x: this process's rows; all other dims whole.
        sharding: of the whole array.
        shape: of the whole array.
        dim: the dim of the rows; None for an array that every process has whole.

    Raises:
        PlacementError: these are not as many rows as lie on this process's devices.
    """
    import jax

    if dim is None:
        return jax.make_array_from_callback(tuple(shape), sharding, lambda index: x[index])
    mine = block_of(sharding, shape, dim)
    if x.shape[dim] != mine.stop - mine.start:
        raise PlacementError(
            f"cannot place {x.shape[dim]} rows of process {jax.process_index()}",
            where=f"batch of {shape[dim]} rows, {jax.process_count()} processes",
            why=f"rows {mine.start} to {mine.stop - 1} lie on this process's devices",
            fix="load the rows that rows_of_process gives; leave out a last batch that is not full",
        )

    def part(index: Any) -> Any:
        start, stop, _ = index[dim].indices(shape[dim])
        return x[(*index[:dim], slice(start - mine.start, stop - mine.start), *index[dim + 1 :])]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def copy_to(leaf: Any, sharding: Any) -> Any:
    """A copy of an array that every process has whole, in its place; RNG keys too.

    ``jax.device_put`` refuses RNG keys where the devices are not all this process's (0.10, 0.12).
    And ``may_alias=False`` is not enough of a promise: a replicated result still shares the buffer
    of the device that the array was on, and a step that donates it deletes the original (0.10.2).
    """
    import jax
    import jax.numpy as jnp

    leaf = jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if sharding.is_fully_addressable or not is_key:
        return jax.device_put(leaf, sharding, may_alias=False)
    numbers = jax.device_put(jax.random.key_data(leaf), sharding, may_alias=False)
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(leaf))


def check_agreement(arrays: Sequence[Any], block: int) -> None:
    """Compare with the other processes what all are about to place; every process must call it.

    Args:
        arrays: this process's.
        block: which block of rows it has; processes with the same one pass the same rows.

    Raises:
        PlacementError: not the same shapes on all, or not the same rows where they must be.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    shapes = "; ".join(f"{x.dtype}{list(x.shape)}" for x in arrays)
    content = 0
    for x in arrays:
        content = zlib.crc32(np.ascontiguousarray(x).tobytes(), content)
    rows = max((x.shape[0] for x in arrays if x.ndim), default=0)
    mine = np.array([zlib.crc32(shapes.encode()), content, block, rows], np.uint32)
    patience = threading.Timer(_PATIENCE_SECONDS, _say_waiting, [shapes])
    patience.daemon = True
    patience.start()
    try:
        others = np.asarray(multihost_utils.process_allgather(mine))
    finally:
        patience.cancel()
    index = jax.process_index()
    for other, (shape, numbers, place, count) in enumerate(others):
        if shape != mine[0]:
            raise PlacementError(
                f"cannot place the batch: process {index} and process {other} pass other shapes",
                where=f"process {index}: {shapes}",
                why=f"process {index} has {rows} rows, process {other} has {count}"
                if rows != count
                else "each process passes as many rows, of the same shape and dtype",
                fix="load the rows that rows_of_process gives; leave out a last batch that is not "
                "full",
            )
        if place == block and numbers != content:
            raise PlacementError(
                f"cannot place the batch: process {index} and process {other} pass other rows",
                where=f"process {index}: {shapes}",
                why="the mesh puts the same rows on both, as its other axes separate them",
                fix="load the rows that rows_of_process gives, in the same order on both",
            )


def _say_waiting(shapes: str) -> None:
    print(
        f"waiting for all processes to place a batch of the shapes {shapes}; if it hangs, another "
        "one has a batch of other shapes, or none",
        file=sys.stderr,
        flush=True,
    )
