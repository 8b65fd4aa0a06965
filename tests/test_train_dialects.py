"""Anybody's model as two trees and two functions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from meshwright.sharding.errors import ConfigError
from meshwright.train.dialects import dialect_of


class Net(nnx.Module):
    def __init__(self, width: int = 4, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.tied = self.layers[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.tied(self.layers[1](self.dropout(self.norm(self.linear(x)))))


def paths(leaves: Any) -> list[str]:
    return [leaf.path for leaf in leaves]


@pytest.mark.parametrize(
    "model",
    [
        Net,
        functools.partial(Net, 4),
        lambda rngs: Net(4, rngs=rngs),
        lambda key: Net(rngs=nnx.Rngs(key)),
        lambda: Net(rngs=nnx.Rngs(0)),
    ],
    ids=["class", "partial", "rngs", "key", "nothing"],
)
def test_nnx_from_whatever_makes_a_module(model: Any) -> None:
    found = dialect_of(model, None)
    assert found.name == "nnx" and found.make is not None and found.values is None
    params, rest = found.leaves
    assert paths(params) == [
        "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel",
        "linear/bias", "linear/kernel", "norm/bias", "norm/scale",
    ]  # fmt: skip
    assert paths(rest) == ["dropout/rngs/count", "dropout/rngs/key", "norm/mean", "norm/var"]
    made = found.make(jax.random.key(0))
    module = found.build(*made)
    assert isinstance(module, Net) and module.tied is module.layers[0]
    module(jnp.ones((2, 3)))
    after = found.after(module, None, made[1])
    assert int(after["dropout"]["rngs"]["count"][...]) == 1
    assert int(made[1]["dropout"]["rngs"]["count"][...]) == 0
    assert jax.tree.structure(after) == jax.tree.structure(made[1])


def test_an_nnx_module_that_exists_brings_its_values() -> None:
    net = Net(rngs=nnx.Rngs(0))
    found = dialect_of(net, None)
    assert found.make is None and found.values is not None
    assert np.array_equal(found.values[0]["linear"]["kernel"][...], net.linear.kernel[...])
    shapes = dialect_of(nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0))), None)
    assert shapes.make is None and shapes.values is None


def test_what_is_trained_can_be_said_by_filter_pattern_or_function() -> None:
    def lora(key: jax.Array) -> nnx.Module:
        return nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(key))

    expected = ["lora/lora_a", "lora/lora_b"]
    for trainable in (
        nnx.LoRAParam,
        "*lora_?",
        ["*lora_a", "*lora_b"],
        lambda path, _: "lora" in path,
    ):
        params, rest = dialect_of(lora, None, trainable).leaves
        assert paths(params) == expected
        assert {"kernel", "bias"} <= set(paths(rest))
    with pytest.raises(ConfigError, match="nothing of `LoRALinear` is trained"):
        dialect_of(lora, None, "nothing*")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(4, kernel_init=init)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "seen", x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.mark.parametrize("how", ["module", "function", "frozen"])
def test_linen_variables(how: str) -> None:
    x = jnp.ones((2, 3))
    models: dict[str, Any] = {
        "module": Linen(),
        "function": lambda key: Linen().init(key, x),
        "frozen": lambda key: freeze(Linen().init(key, x)),
    }
    inputs = (jax.ShapeDtypeStruct((2, 3), jnp.float32),) if how == "module" else None
    found = dialect_of(models[how], inputs)
    assert found.name == "linen" and found.make is not None
    params, rest = found.leaves
    kernel = next(leaf for leaf in params if leaf.path == "Dense_0/kernel")
    assert kernel.dims == ("embed", "mlp")
    assert paths(rest) == ["batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"]
    made = found.make(jax.random.key(0))
    assert isinstance(made[0]["Dense_0"]["kernel"], jax.Array)  # no box
    variables = found.build(*made)
    _, changed = Linen().apply(
        variables, x, mutable=["batch_stats", "intermediates"], rngs={"dropout": jax.random.key(1)}
    )
    after = found.after(variables, changed, made[1])
    assert jax.tree.structure(after) == jax.tree.structure(made[1])
    assert not np.array_equal(after["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(4))


def test_a_linen_module_without_inputs_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r'inputs=lambda batch: \(batch\["x"\],\)'):
        dialect_of(Linen(), None)


def test_trees_keep_what_is_no_array() -> None:
    def make(key: jax.Array) -> dict[str, Any]:
        return {
            "w": jax.random.normal(key, (3, 4)),
            "table": jnp.arange(4),
            "activation": jnp.tanh,
            "width": 4,
            "name": "net",
        }

    found = dialect_of(make, None)
    assert found.name == "tree" and found.make is not None
    params, rest = found.leaves
    assert paths(params) == ["w"] and paths(rest) == ["table"]
    made = jax.jit(found.make)(jax.random.key(0))
    model = found.build(*made)
    assert model["activation"] is jnp.tanh and model["width"] == 4 and model["name"] == "net"
    assert model["table"].dtype == jnp.int32
    changed = {**model, "table": model["table"] + 1, "w": model["w"] * 0}
    after = found.after(model, changed, made[1])
    assert np.array_equal(after["table"], np.arange(1, 5)) and after["w"] is None
    partly = found.after(model, {"table": model["table"] + 2}, made[1])
    assert np.array_equal(partly["table"], np.arange(2, 6))
    assert found.after(model, None, made[1]) is made[1]
    with pytest.raises(ConfigError, match="cannot take what the loss returned as changed"):
        found.after(model, {"other": 1}, made[1])


def test_trees_may_say_what_is_trained() -> None:
    tree = {"w": jnp.ones((2, 2)), "frozen": {"w": jnp.ones((2, 2))}}
    params, rest = dialect_of(tree, None, lambda path: not path.startswith("frozen")).leaves
    assert paths(params) == ["w"] and paths(rest) == ["frozen/w"]
    found = dialect_of(tree, None, ["w"])
    assert found.values is not None
    assert found.build(*found.values).keys() == tree.keys()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "cannot plan a int"),
        ({"a": "text"}, "cannot plan a dict"),
        (lambda: {"steps": jnp.arange(3)}, "nothing of the dict is trained"),
        (lambda width, depth: None, "cannot make `<lambda>` from a key"),
        (type("Sized", (nnx.Module,), {"__init__": lambda self, width, *, rngs: None}),
         "it needs width, rngs"),
    ],
)  # fmt: skip
def test_what_is_no_model(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dialect_of(model, None)


def test_a_single_array_is_a_model() -> None:
    found = dialect_of(jnp.ones((4,)), None)
    assert found.name == "tree" and found.values is not None
    assert found.build(*found.values).shape == (4,)
