"""Checkpoints of one order of layers read into another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.sharding.schedule import layer_slots
from meshwright.train.relayout import Reordering


def stored(places: tuple[int | None, ...], layers: int) -> dict[str, Any]:
    """Layer number l holds l + 1, empty places 0."""
    held = [0 if place is None else place + 1 for place in places or range(layers)]
    stack = np.repeat(np.array(held, np.float32)[:, None], 3, axis=1)
    return {"params": {"layers": {"w": stack}, "head": np.ones(4)}, "step": np.int32(7)}


@given(st.integers(4, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_layers_are_where_the_run_wants_them(layers: int, data: st.DataObject) -> None:
    deals = st.sampled_from([(), *(layer_slots(layers, p, v, folded=folded)
                                   for p in (2, 4) for v in (1, 2) for folded in (False, v == 2)
                                   if p * v <= layers)])  # fmt: skip
    saved, wanted = data.draw(deals), data.draw(deals)
    order = Reordering(list(saved), wanted, layers)
    mesh = jax.make_mesh((2,), ("stage",), axis_types=(AxisType.Auto,))

    def described(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        split = leaf.ndim == 2 and leaf.shape[0] % 2 == 0
        spec = PartitionSpec("stage") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    want = stored(wanted, layers)
    abstract = jax.tree_util.tree_map_with_path(described, want)
    there = stored(saved, layers)
    read = order.as_saved(abstract)
    shapes = jax.tree.map(lambda leaf: leaf.shape, (read, there))
    assert shapes[0] == shapes[1]
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), there, read)
    found = order.to_run(abstract)(placed)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert order.needed == ((saved or tuple(range(layers))) != (wanted or tuple(range(layers))))


def test_places_that_do_not_divide_are_read_whole() -> None:
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("stage", None))
    abstract = {"layers": {"w": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding)}}
    read = Reordering((), layer_slots(5, 4), 5).as_saved(abstract)
    leaf = read["layers"]["w"]
    assert leaf.shape == (5, 3) and leaf.sharding.spec == PartitionSpec(None, None)
