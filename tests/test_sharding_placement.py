"""Arrays born sharded, and constraints that cannot be dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import resolve
from meshwright.sharding.dims import describe
from meshwright.sharding.errors import PlacementError, RulesError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import Constrain, init_sharded, shardings_of
from meshwright.sharding.strategies import data, fold, fsdp, tensor

DIMS = {"w": ("embed", "mlp"), "e": ("vocab", "embed")}


def _init(key: jax.Array) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {
        "w": jax.random.uniform(first, (48, 96)),
        "e": jax.random.bits(second, (64, 48), "uint32"),
    }


@pytest.mark.parametrize("text", ["data=8", "fsdp=8", "tensor=4", "data=2,fsdp=2,tensor=2"])
def test_arrays_are_born_in_their_layout_with_the_same_bits(text: str) -> None:
    spec = MeshSpec.parse(text)
    mesh = spec.build(jax.devices()[: spec.device_count])
    by_axis = {"data": data(), "fsdp": fsdp(), "tensor": tensor()}
    rules = fold(*(by_axis[axis] for axis in spec.names))
    shapes = jax.eval_shape(_init, jax.random.key(3))
    decisions = resolve(describe(shapes, DIMS), rules, spec, "params")
    shardings = shardings_of(decisions, shapes, mesh)
    state = init_sharded(_init, jax.random.key(3), shardings=shardings)
    expected = jax.jit(_init)(jax.random.key(3))
    for name, array in state.items():
        assert array.sharding == shardings[name]
        shard = array.addressable_shards[0].data
        assert shard.nbytes == decisions[name].bytes_per_device
        assert np.array_equal(np.asarray(array), np.asarray(expected[name]))


def _constrain(text: str = "data=2,tensor=4") -> Constrain:
    spec = MeshSpec.parse(text)
    return Constrain(fold(data(), tensor()), spec.build(jax.devices()[: spec.device_count]))


def test_constraint_by_names() -> None:
    constrain = _constrain()
    x = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))(jnp.ones((4, 3, 8)))
    assert x.sharding.spec == PartitionSpec("data", None, "tensor")
    assert constrain.used == {"batch", "length", "mlp"}


def test_constraint_that_jit_would_drop_is_an_error() -> None:
    constrain = _constrain()
    with pytest.raises(PlacementError, match="6 is not divisible by 4"):
        jax.eval_shape(lambda x: constrain(x, ("batch", "mlp")), jnp.ones((4, 6)))
    with pytest.raises(PlacementError, match="did you mean `length`"):
        jax.eval_shape(lambda x: constrain(x, ("batch", "lenght")), jnp.ones((4, 6)))


def test_constraint_without_axes() -> None:
    inner = _constrain().without(("data",))
    x = jax.jit(lambda x: inner(x, ("batch", "mlp")))(jnp.ones((3, 8)))
    assert x.sharding.spec == PartitionSpec(None, "tensor")


def test_unused_activation_rule() -> None:
    constrain = _constrain()
    mine = Constrain(constrain.rules.with_rule("activations", "lenght", None), constrain.mesh)
    jax.eval_shape(lambda x: mine(x, ("batch", "length")), jnp.ones((4, 8)))
    with pytest.raises(RulesError, match="did you mean `length`"):
        mine.check_used()
