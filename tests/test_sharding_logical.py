"""Flax's own logical constraints resolved by our rules; constraints that jit would drop refused."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import spmd
from flax.linen.spmd import with_logical_constraint
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding.errors import PlacementError
from meshwright.sharding.logical import check_constraints, resolving
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import Constrain
from meshwright.sharding.strategies import data, fold, fsdp, tensor

SPEC = MeshSpec.parse("data=2,fsdp=2,tensor=2")


@pytest.fixture(name="constrain")
def _constrain(devices: list) -> Constrain:
    return Constrain(fold(data(), fsdp(), tensor()), SPEC.build(devices))


def traced(constrain: Constrain, fn, *args):
    def inside(*args):
        with resolving(constrain):
            return fn(*args)

    return jax.jit(inside).trace(*args).jaxpr


def specs(jaxpr) -> list[PartitionSpec]:
    return [
        eqn.params["sharding"].spec
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "sharding_constraint"
    ]


class Block(nn.Module):
    names: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return with_logical_constraint(nn.Dense(8)(x), self.names)


def test_a_linen_model_with_logical_constraints_goes_by_the_activations_table(
    constrain: Constrain,
) -> None:
    model, x = Block(("batch", "mlp")), jnp.ones((8, 4))
    variables = model.init(jax.random.key(0), x)
    assert specs(jax.make_jaxpr(model.apply)(variables, x)) == []  # Flax alone: nothing
    found = specs(traced(constrain, model.apply, variables, x))
    assert found == [PartitionSpec(("data", "fsdp"), "tensor")]


def test_names_are_as_strict_as_ours(constrain: Constrain) -> None:
    x = jnp.ones((8, 4))
    for names, message in (
        (("batch", "width"), "no rule knows the dim `width`"),
        (("batch", "batch"), "two dims of `activations \\(batch, batch\\)` over the same axis"),
    ):
        model = Block(names)
        variables = model.init(jax.random.key(0), x)
        with pytest.raises((PlacementError, ValueError), match=message):
            traced(constrain, model.apply, variables, x)
    model = Block(("batch", "mlp"))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(PlacementError, match="6 is not divisible by 4"):
        traced(constrain, model.apply, variables, jnp.ones((6, 4)))


def test_none_and_unconstrained_dims_and_rules_of_its_own(constrain: Constrain) -> None:
    x = jnp.ones((8, 4))
    assert specs(traced(constrain, lambda x: with_logical_constraint(x, None), x)) == []
    found = specs(traced(constrain, lambda x: with_logical_constraint(x, ("batch", None)), x))
    assert found == [PartitionSpec(("data", "fsdp"))]
    own = (("batch", "tensor"),)
    found = specs(
        traced(
            constrain,
            lambda x: with_logical_constraint(x, ("batch", None), rules=own),
            x,
        )
    )
    assert found == [PartitionSpec("tensor", None)]


def test_bare_specs_find_the_mesh(constrain: Constrain) -> None:
    found = specs(
        traced(
            constrain,
            lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec("data")),
            jnp.ones((8, 4)),
        )
    )
    assert found == [PartitionSpec("data")]


def test_nothing_is_left_behind(constrain: Constrain) -> None:
    before = spmd.get_logical_axis_rules()
    with pytest.raises(RuntimeError, match="planted"), resolving(constrain):
        raise RuntimeError("planted")
    assert spmd.get_logical_axis_rules() == before
    x = jnp.ones((8, 4))
    found = specs(jax.make_jaxpr(lambda x: with_logical_constraint(x, ("batch", "mlp")))(x))
    assert found == []
    assert jax.sharding.get_abstract_mesh().empty


def dropped(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x * 2, sharding)


@pytest.mark.parametrize("where", ["top", "scan", "remat", "grad", "cond"])
def test_a_constraint_that_jit_would_drop_is_refused_wherever_it_is(
    where: str, constrain: Constrain
) -> None:
    sharding = NamedSharding(constrain.mesh, PartitionSpec(None, ("data", "fsdp")))

    def one(x: jax.Array) -> jax.Array:
        return dropped(x, sharding)

    programs = {
        "top": one,
        "scan": lambda x: jax.lax.scan(lambda c, _: (one(c), None), x, None, length=2)[0],
        "remat": jax.checkpoint(one),
        "grad": jax.grad(lambda x: jnp.sum(one(x) ** 2)),
        "cond": lambda x: jax.lax.cond(x[0, 0] > 0, one, lambda x: x, x),
    }
    jaxpr = jax.jit(programs[where]).trace(jnp.ones((4, 6))).jaxpr
    jax.jit(programs[where])(jnp.ones((4, 6)))  # jax itself says nothing
    with pytest.raises(PlacementError) as caught:
        check_constraints(jaxpr)
    text = str(caught.value)
    assert text.startswith("cannot split dim 1 of an activation over axis `data+fsdp`")
    assert "shape 4×6" in text and "6 is not divisible by 4" in text
    line = re.search(r"test_sharding_logical\.py:(\d+)", text)
    assert line is not None
    source = Path(__file__).read_text().splitlines()[int(line.group(1)) - 1]
    assert "with_sharding_constraint(x * 2" in source
    check_constraints(jax.jit(programs[where]).trace(jnp.ones((4, 8))).jaxpr)
