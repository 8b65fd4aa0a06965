"""Gradients of tables in the order of dims that a device stores the tables in, before the update.

A TPU keeps arrays in tiles of (8, 128), so a shard whose last dim is short would be mostly
padding, and the runtime stores such a shard with another dim last: [4096, 64] by columns. Masters
and moments come into a step and leave it like that. The gradient of a table that rows are looked up
in is made by a scatter, by rows, and the compiler then does the whole update by rows: it copies
master and both moments into padded buffers, and what becomes of them back again. One copy of the
gradient does instead, which is what a layout constraint asks for. Four layers of width 512 with
FSDP over 8 v5e hold 12.4 MiB of temporaries and not 17.1; with one table for both ends 13.5, not
20.1.

Other gradients come out of matmuls, whose results the compiler orders as it likes; there the
constraint saves nothing, and has been seen to cost (libtpu 0.0.42). Nothing is asked for where the
order is the usual one, last dim last: on GPU and CPU everywhere.

Rejected: choosing the order of the masters ourselves (``Format`` on the step's arguments): every
program that reads the state, a checkpoint's too, would have to know. The cost is one method of
jaxlib's client that jax itself calls to learn the runtime's choice; without it nothing is asked
for.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

__all__ = ["in_stored_order", "stored_order"]

_MINOR_TO_MAJOR = re.compile(r"\{([\d,]*)")


def in_stored_order(arrays: Any, shardings: Any) -> Any:
    """The same arrays, their dims ordered in memory as the runtime orders new ones.

    Args:
        arrays: a tree, inside of ``jax.jit``.
        shardings: NamedShardings on built meshes, of its structure.
    """

    def one(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        device = next(iter(sharding.device_set))
        order = stored_order(device, x.dtype, sharding.shard_shape(x.shape))
        if order == tuple(range(x.ndim)):
            return x
        return with_layout_constraint(x, Layout(major_to_minor=order))

    return jax.tree.map(one, arrays, shardings)


def stored_order(device: Any, dtype: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dims of a new array on a device, the one whose neighbours lie farthest apart first.

    >>> import jax
    >>> stored_order(jax.devices()[0], "float32", (4096, 64))
    (0, 1)
    """
    usual = tuple(range(len(shape)))
    try:
        layout = device.client.get_default_layout(np.dtype(dtype), shape, device)
    except (AttributeError, TypeError, jax.errors.JaxRuntimeError):
        return usual
    found = _MINOR_TO_MAJOR.match(str(layout))
    order = tuple(int(dim) for dim in found[1].split(",") if dim)[::-1] if found else ()
    return order if sorted(order) == list(usual) else usual
