"""Arrays in closures of a model: found, kept as constants, refused where they are random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.sharding.errors import ConfigError
from meshwright.train.captured import captured_arrays
from meshwright.train.dialects import dialect_of


def scaled(scale: Any) -> Callable[[Any], Any]:
    return lambda x: x * scale


class Holder:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def method(self) -> None: ...


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: scaled(x),
        lambda x: functools.partial(max, x),
        lambda x: functools.wraps(max)(scaled([x])),
        lambda x: Holder({"deep": (x,)}),
        lambda x: Holder(x).method,
        lambda x: jax.jit(scaled(x)),
        lambda x: jax.tree.structure(jax.tree_util.Partial(scaled(x))),
    ],
    ids=["closure", "partial", "list", "slots", "method", "jit", "structure"],
)
def test_arrays_are_found_wherever_a_function_keeps_them(wrap: Callable[[Any], Any]) -> None:
    array = np.ones(3)
    assert [one is array for one in captured_arrays(wrap(array))] == [True]


def test_functions_without_arrays_hold_none() -> None:
    looped: list[Any] = [jax.nn.relu, nnx.Linear, jnp.sin, "name", 3]
    looped.append(looped)
    assert captured_arrays(looped) == []


def loss(dialect: Any, key: Any) -> Any:
    """A use of the model in a trace other than the one it was made in."""
    params, rest = dialect.make(key)
    return jax.jit(lambda params, rest: (m := dialect.build(params, rest))["f"](m["w"]).sum())(
        params, rest
    )


def test_a_closure_over_a_constant_outlives_the_trace_that_made_it() -> None:
    def make(key: Any) -> Any:
        return {"w": jax.random.normal(key, (4,)), "f": scaled(jnp.arange(4.0))}

    found = dialect_of(make, None)
    key = jax.random.key(7)
    expected = (make(key)["w"] * np.arange(4.0)).sum()
    np.testing.assert_allclose(loss(found, key), expected, rtol=1e-6)


def test_a_closure_over_random_numbers_is_refused() -> None:
    def make(key: Any) -> Any:
        return {"w": jnp.ones(4), "f": scaled(jax.random.normal(key, (4,)))}

    with pytest.raises(ConfigError, match="depend on the key"):
        dialect_of(make, None)
    made = make(jax.random.key(0))
    found = dialect_of(made, None)
    assert found.values is not None and found.build(*found.values)["f"] is made["f"]


class Raw(nnx.Module):
    """Arrays that are no variables, numbers and a name in variables."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.table = jnp.arange(4.0)
        self.count = nnx.Variable(0)
        self.scale = nnx.Param(2.0)
        self.name = nnx.Variable("raw")

    def __call__(self, x: Any) -> Any:
        self.count[...] = self.count[...] + 1
        return self.linear(x + self.table[None]) * self.scale[...]


@pytest.mark.parametrize("model", [Raw, Raw(rngs=nnx.Rngs(0))], ids=["class", "instance"])
def test_nnx_modules_may_hold_arrays_numbers_and_names_as_they_like(model: Any) -> None:
    found = dialect_of(model, None)
    trained, rest = ([leaf.path for leaf in leaves] for leaves in found.leaves)
    assert trained == ["linear/bias", "linear/kernel", "scale"]
    assert rest == ["count", "table"]
    parts = found.values or jax.jit(found.make)(jax.random.key(0))  # type: ignore[arg-type]

    @jax.jit
    def run(params: Any, rest: Any) -> Any:
        module = found.build(params, rest)
        module(jnp.ones((2, 4)))
        assert module.name.get_value() == "raw"
        return found.after(module, None, rest)

    after = run(*parts)
    assert int(after["count"][...]) == 1
    np.testing.assert_array_equal(after["table"], np.arange(4.0))
