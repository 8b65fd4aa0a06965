"""Gradients of tables in the order of dims that a device stores them in.

No device here stores an array otherwise than last dim last, so the tests say what one would.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.train import stored_order as module
from meshwright.train.stored_order import in_stored_order, stored_order


class Client:
    """A runtime that answers with a layout."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def get_default_layout(self, dtype: np.dtype, shape: tuple[int, ...], device: Any) -> object:
        assert isinstance(dtype, np.dtype)
        assert device.client is self
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Device:
    def __init__(self, answer: object) -> None:
        self.client = Client(answer)


@pytest.mark.parametrize(
    ("answer", "shape", "order"),
    [
        ("{0,1:T(8,128)}", (4096, 64), (1, 0)),
        ("{1,0:T(8,128)}", (4096, 128), (0, 1)),
        ("{1,2,0:T(8,128)}", (4, 2048, 64), (0, 2, 1)),
        ("{0}", (512,), (0,)),
        ("{}", (), ()),
    ],
)
def test_a_layout_is_read_from_its_minor_end(
    answer: str, shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    assert stored_order(Device(answer), jnp.float32, shape) == order


@pytest.mark.parametrize(
    "answer",
    [AttributeError("no such method"), TypeError("other arguments"), "opaque", "{0,0}", "{3,1}"],
)
def test_a_runtime_that_does_not_say_is_taken_to_do_the_usual(answer: object) -> None:
    assert stored_order(Device(answer), jnp.float32, (4096, 64)) == (0, 1)


def sharded() -> NamedSharding:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(None, "fsdp"))


def test_nothing_is_asked_for_where_the_order_is_the_usual() -> None:
    array = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    program = jax.make_jaxpr(lambda x: in_stored_order(x, sharded()))(array)
    assert not program.eqns


def test_the_shard_decides_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def by_columns(device: Any, dtype: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        del device, dtype
        seen.append(shape)
        return (1, 0)

    monkeypatch.setattr(module, "stored_order", by_columns)
    held = sharded()
    table = jax.device_put(jnp.arange(4096 * 512, dtype=jnp.float32).reshape(4096, 512), held)
    step = jax.jit(lambda x: in_stored_order(2 * x, held), out_shardings=held)
    asked = step.lower(table).as_text()
    assert "LayoutConstraint" in asked
    assert seen == [(4096, 64)]
    np.testing.assert_array_equal(step(table), 2 * table)
