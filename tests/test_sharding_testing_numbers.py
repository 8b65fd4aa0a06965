"""The same numbers as on one device: planted bugs are caught, sound functions pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.linen.spmd import with_logical_constraint
from jax.sharding import PartitionSpec as P

from meshwright.sharding.errors import ConfigError, PlacementError, TopologyError
from meshwright.sharding.strategies import tensor
from meshwright.testing import assert_same_as_one_device
from meshwright.train.model_plan import Plan, plan

pytestmark = pytest.mark.usefixtures("devices")

RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": RANDOM.normal(size=(64, 32)).astype(np.float32),
    "b": np.zeros(32, np.float32),
    "scale": np.ones((), np.float32),
}
ROWS = RANDOM.normal(size=(16, 64)).astype(np.float32)


def loss(params: Any, x: Any) -> Any:
    y = jnp.tanh(x @ params["w"] + params["b"][None]) * params["scale"]
    return jnp.mean(y**2)


class Model(nnx.Module):
    """A bias before a normalisation, whose gradient is rounding and nothing else."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, rngs=rngs)
        self.outer = nnx.Linear(128, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(jax.nn.relu(self.norm(self.inner(x))))


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


def test_pytrees_on_the_default_meshes() -> None:
    assert_same_as_one_device(loss, PARAMS, ROWS)


def test_tensor_parallelism_by_patterns() -> None:
    assert_same_as_one_device(
        loss,
        PARAMS,
        ROWS,
        meshes="data=2,tensor=4",
        dims={"w": ("embed", "mlp"), "b": ("mlp",), "scale": None},
    )


def test_nnx_modules_and_what_they_hold_afterwards() -> None:
    def mean(model: Model, x: Any) -> Any:
        return model(x).mean(0)

    assert_same_as_one_device(mean, Model(nnx.Rngs(0)), ROWS, meshes="data=2,fsdp=4")


def test_linen_variables_and_arguments_after_the_batch() -> None:
    model = linen.Sequential([linen.Dense(32), linen.Dropout(0.5, deterministic=False)])
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, ROWS)

    def apply(variables: Any, x: Any, key: Any, scale: Any) -> Any:
        return scale * model.apply(variables, x, rngs={"dropout": key})

    assert_same_as_one_device(apply, variables, ROWS, jax.random.key(2), 3.0, meshes="data=8")


class Logical(linen.Module):
    """Names on weights and on an activation, which our rules resolve."""

    width: int = 128

    @linen.compact
    def __call__(self, x: Any) -> Any:
        def named(*dims: str) -> Any:
            return linen.with_logical_partitioning(linen.initializers.lecun_normal(), dims)

        hidden = linen.Dense(self.width, use_bias=False, kernel_init=named("embed", "mlp"))(x)
        hidden = with_logical_constraint(jnp.tanh(hidden), ("batch", "mlp"))
        return linen.Dense(16, use_bias=False, kernel_init=named("mlp", "embed"))(hidden)


def test_names_in_the_model_are_resolved() -> None:
    model = Logical()
    variables = model.init(jax.random.key(0), ROWS)
    assert_same_as_one_device(model.apply, variables, ROWS, meshes="data=2,fsdp=2,tensor=2")
    odd = Logical(width=6)
    with pytest.raises(
        PlacementError, match="cannot split dim 1 of .* over axis `tensor`"
    ) as error:
        variables = odd.init(jax.random.key(0), ROWS)
        assert_same_as_one_device(odd.apply, variables, ROWS, meshes="data=2,tensor=4")
    assert "6 is not divisible by 4" in message(error)


def test_constraints_that_jit_would_drop_are_refused() -> None:
    def constrained(params: Any, x: Any) -> Any:
        y = jax.lax.with_sharding_constraint(x @ params["w"][:, :6], P("data", "fsdp"))
        return y.sum()

    with pytest.raises(PlacementError) as error:
        assert_same_as_one_device(constrained, PARAMS, ROWS, meshes="data=2,fsdp=4")
    assert error.value.why.startswith("6 is not divisible by 4; jit would drop")
    assert error.value.__notes__ == ["on the mesh data=2,fsdp=4, to compare meshes with one device"]


def test_leaves_that_are_no_arrays() -> None:
    def apply(params: Any, x: Any) -> Any:
        return params["activation"](x @ params["w"]) * params["power"], params["count"] + 1

    params = {
        **PARAMS,
        "activation": jnp.tanh,
        "power": 2,
        "count": np.arange(3),
        "key": jax.random.key(0),
    }
    assert_same_as_one_device(apply, params, ROWS, meshes="data=8")


def summed(params: Any, x: Any) -> Any:
    """A bug: a sum over devices where a mean was meant."""

    def local(params: Any, x: Any) -> Any:
        return jax.lax.psum(jnp.mean((x @ params["w"]) ** 2), "data")

    return jax.shard_map(local, in_specs=(P(), P("data")), out_specs=P())(params, x)


@jax.custom_vjp
def used(w: Any) -> Any:
    return w


# A bug in the backward pass alone: jax sums over the devices once more.
used.defvjp(lambda w: (w, None), lambda _, grad: (jax.lax.psum(grad, "data"),))


def wrong_gradient(params: Any, x: Any) -> Any:
    def local(params: Any, x: Any) -> Any:
        return jax.lax.pmean(jnp.mean((x @ used(params["w"])) ** 2), "data")

    return jax.shard_map(local, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)(
        params, x
    )


def test_a_wrong_output_is_named() -> None:
    params = {"w": np.full((4, 4), 0.5, np.float32)}
    with pytest.raises(AssertionError) as error:
        assert_same_as_one_device(summed, params, np.ones((8, 4), np.float32), meshes="data=8")
    assert message(error) == (
        "`summed` gives other numbers on a mesh than on one device\n"
        "first: `output` (scalar float32) on the mesh data=8, off by 7.0e+00 of its largest "
        "entry\n"
        "mesh    leaf          off by  allowed  at      one device  mesh gives\n"
        "data=8  output       7.0e+00  1.0e-05                   4          32\n"
        "data=8  gradients/w  7.0e+00  1.0e-05  [0, 0]           1           8"
    )


def test_a_wrong_gradient_is_caught_on_each_mesh() -> None:
    params = {"w": np.full((4, 4), 0.5, np.float32)}
    rows = np.ones((8, 4), np.float32)
    assert_same_as_one_device(
        wrong_gradient, params, rows, meshes=["data=8", "data=2"], gradients=False
    )
    with pytest.raises(AssertionError) as error:
        assert_same_as_one_device(wrong_gradient, params, rows, meshes=["data=1", "data=2"])
    assert message(error) == (
        "`wrong_gradient` gives other numbers on a mesh than on one device\n"
        "first: `gradients/w` (4×4 float32) on the mesh data=2, off by 1.0e+00 of its largest "
        "entry\n"
        "mesh    leaf          off by  allowed  at      one device  mesh gives\n"
        "data=1  all 2 agree  0.0e+00\n"
        "data=2  gradients/w  1.0e+00  1.0e-05  [0, 0]           1           2"
    )


def test_numbers_that_depend_on_the_device_are_caught() -> None:
    """Random bits drawn by each device alone, integers, and a shape."""

    def drawn(params: Any, x: Any) -> Any:
        def local(x: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data"))
            return jax.random.randint(key, x.shape[:1], 0, 100), x[:1]

        found = jax.shard_map(local, in_specs=P("data"), out_specs=P("data"))(x)
        return {"labels": found[0], "rows": found[1] * params["scale"]}

    with pytest.raises(AssertionError) as error:
        assert_same_as_one_device(drawn, PARAMS, ROWS, meshes="data=4", gradients=False)
    said = message(error).splitlines()
    assert said[1].startswith("first: `output/labels` (16 int32) on the mesh data=4, off by ")
    assert said[3].split() == (
        ["data=4", "output/rows", "inf", "0.0e+00", "shape", "1×64", "float32", "4×64", "float32"]
    )


def test_narrow_types_have_two_units_in_the_last_place() -> None:
    def narrow(params: Any, x: Any) -> Any:
        return (x @ params["w"]).astype(jnp.bfloat16).sum(0)

    assert_same_as_one_device(narrow, PARAMS, ROWS, gradients=False, rtol=0)


def test_nan_is_nan_and_not_a_number() -> None:
    def holed(params: Any, x: Any) -> Any:
        on_many = jax.lax.psum(1, "data")
        out = jnp.where(jnp.arange(3) == 0, jnp.nan, params["scale"])
        return jnp.where((jnp.arange(3) == 2) & (on_many > 1), jnp.nan, out) + 0 * x.sum()

    def mapped(params: Any, x: Any) -> Any:
        specs = (P(), P(None))
        return jax.shard_map(holed, in_specs=specs, out_specs=P(), check_vma=False)(params, x)

    assert_same_as_one_device(mapped, PARAMS, ROWS, meshes="data=1", gradients=False)
    with pytest.raises(AssertionError, match=r"data=2  output     inf  1.0e-05  \[2\]"):
        assert_same_as_one_device(mapped, PARAMS, ROWS, meshes="data=2", gradients=False)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="there is nothing to compute with"):
        assert_same_as_one_device(loss)
    with pytest.raises(ConfigError) as error:
        assert_same_as_one_device(lambda p, x: x @ p["w"] > 0, PARAMS, ROWS)
    assert message(error) == (
        "there is nothing to differentiate\n"
        "  why:   the function returns no array of floating point\n"
        "  fix:   say gradients=False"
    )
    with pytest.raises(ConfigError, match="the first argument has no array of floating point"):
        assert_same_as_one_device(lambda p, x: x.sum() + p, np.arange(3), ROWS)
    with pytest.raises(TopologyError) as error:
        assert_same_as_one_device(loss, PARAMS, ROWS, meshes="data=16")
    assert message(error) == (
        "cannot compare on the mesh `data=16`\n"
        "  why:   it has 16 devices, and jax has 8\n"
        "  fix:   run pytest --meshwright-devices 16, or mark the test @pytest.mark.devices(16)"
    )
    with pytest.raises(PlacementError, match="3 is not divisible by 8"):
        assert_same_as_one_device(loss, PARAMS, ROWS[:3])
    with pytest.raises(PlacementError, match="no rule matches `b`"):
        assert_same_as_one_device(loss, PARAMS, ROWS, meshes="tensor=8", rules=[tensor()])


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return {"x": ROWS, "y": np.ones((16, 16), np.float32)}


def planned(batch: Any, mesh: str) -> Plan:
    return plan(
        lambda rngs: Model(rngs),
        optimizer=optax.adamw(1e-3),
        loss=lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2),
        batch=batch,
        mesh=mesh,
    )


def test_a_plan_on_a_hybrid(batch: Any) -> None:
    assert_same_as_one_device(planned(batch, "data=2,fsdp=4"), batch, steps=2)


class _Wrong:
    def __init__(self, inner: Plan, **wrong: Any) -> None:
        self.inner, self.wrong = inner, wrong

    def __getattr__(self, name: str) -> Any:
        return self.wrong.get(name) or getattr(self.inner, name)


def with_wrong(inner: Plan, **wrong: Any) -> Any:
    """A plan with an error in one part of it."""
    return _Wrong(inner, **wrong)


def test_a_plan_whose_initial_values_depend_on_the_mesh(batch: Any) -> None:
    inner = planned(batch, "data=8")
    other = with_wrong(inner, init=lambda key: inner.init(jax.random.fold_in(key, 1)))
    with pytest.raises(AssertionError) as error:
        assert_same_as_one_device(other, batch, steps=1)
    said = message(error).splitlines()
    assert said[0] == "the plan gives other numbers on a mesh than on one device"
    assert said[1].startswith("first: `initial/inner/kernel` (64×128 float32) on the mesh data=8,")


def test_a_plan_whose_step_is_wrong_while_its_gradients_are_not(batch: Any) -> None:
    inner = planned(batch, "data=8")

    def step(state: Any, batch: Any) -> Any:
        return inner.step(state, jax.tree.map(lambda x: x * 1.01, batch))

    with pytest.raises(AssertionError, match="first: `loss of step 1` "):
        assert_same_as_one_device(with_wrong(inner, step=step), batch, steps=1, gradients=False)


def test_a_plan_has_its_mesh(batch: Any) -> None:
    with pytest.raises(ConfigError) as error:
        assert_same_as_one_device(planned(batch, "data=8"), batch, meshes="data=8")
    assert message(error) == (
        "a plan has its mesh, rules and dims already\n"
        "  why:   meshes, rules and dims are for functions\n"
        "  fix:   leave them out, and make a plan for each mesh"
    )
    with pytest.raises(ConfigError, match="there is nothing to compute with"):
        assert_same_as_one_device(planned(batch, "data=8"))
