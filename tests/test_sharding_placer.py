"""Any tree onto a mesh: nnx objects, Flax train states, plain trees; born, put, held, dealt."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding.dims import DimPatterns
from meshwright.sharding.errors import PlacementError, RulesError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placer import Placer
from meshwright.sharding.strategies import data, fold, fsdp, zero1

P = PartitionSpec
BY_NAME = {"*kernel": ("embed", "mlp"), "*": None}


def placer(mesh: str, devices: list[Any], rules: Any = None, dims: Any = None) -> Placer:
    spec = MeshSpec.parse(mesh)
    return Placer.on(spec.build(devices[: spec.device_count]), rules, dims=dims)


class Net(nnx.Module):
    """Named and unnamed weights, one of them shared, and a stream of keys."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.first = nnx.Linear(16, 32, rngs=rngs, kernel_init=named)
        self.second = nnx.Linear(32, 32, rngs=rngs)
        self.again = self.second
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.again(self.dropout(self.second(self.first(x))))


def specs_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def test_an_nnx_module_and_its_optimizer_are_born_sharded(devices: list[Any]) -> None:
    place = placer("data=2,fsdp=4", devices, dims={"*": None})

    def build(key: jax.Array) -> tuple[Net, nnx.Optimizer]:
        net = Net(rngs=nnx.Rngs(key))
        return net, nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

    net, optimizer = place.init(build, jax.random.key(0))
    assert net.first.kernel[...].sharding.spec == P("fsdp")
    assert net.again is net.second
    moments = nnx.state(optimizer)["opt_state"][0]
    for name in ("mu", "nu"):
        kernel = moments[name]["first"]["kernel"][...]
        assert kernel.sharding.spec == P("fsdp") and kernel.addressable_shards[0].data.shape == (
            4,
            32,
        )
    with nnx.use_eager_sharding(False):
        plain = jax.jit(lambda key: nnx.state(build(key)[0], nnx.Param))(jax.random.key(0))
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(net, nnx.Param)), jax.tree.leaves(plain), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_a_users_own_nnx_step_keeps_its_layouts(devices: list[Any]) -> None:
    place = placer("data=2,fsdp=4", devices, dims={"*": None})
    x = np.ones((16, 16), np.float32)

    def losses(place: Placer) -> list[float]:
        def build(key: jax.Array) -> tuple[Net, nnx.Optimizer]:
            net = Net(rngs=nnx.Rngs(key))
            return net, nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

        net, optimizer = place.init(build, jax.random.key(0))

        @nnx.jit
        def step(net: Net, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
            loss, grads = nnx.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
            optimizer.update(net, grads)
            place.hold((net, optimizer))
            return loss

        found = [float(step(net, optimizer, place.place(x))) for _ in range(3)]
        expected = place.specs((net, optimizer))
        state = nnx.split((net, optimizer))[1]
        arrays = jax.tree.leaves(state)
        wanted = jax.tree.leaves(expected, is_leaf=lambda node: isinstance(node, P))
        assert all(
            array.sharding.is_equivalent_to(NamedSharding(place.mesh, spec), array.ndim)
            for array, spec in zip(arrays, wanted, strict=True)
        )
        return found

    alone = placer("data=1,fsdp=1", devices, dims={"*": None})
    np.testing.assert_allclose(losses(place), losses(alone), rtol=1e-5)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(8)(nn.relu(nn.Dense(64, kernel_init=init)(x)))


def test_a_flax_train_state_with_a_jitted_step(devices: list[Any]) -> None:
    model, x = Mlp(), np.ones((8, 16), np.float32)

    def build(key: jax.Array) -> TrainState:
        variables = model.init(key, jnp.ones((1, 16)))
        return TrainState.create(
            apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-2)
        )

    place = placer("fsdp=8", devices, dims={"*": None})
    state = place.init(build, jax.random.key(0))
    kernel = state.params["Dense_1"]["kernel"].value
    assert kernel.sharding.spec == P("fsdp")
    mu = state.opt_state[0].mu["Dense_1"]["kernel"].value
    assert mu.sharding.spec == P("fsdp")
    assert isinstance(state.step, jax.Array)

    @jax.jit
    def step(state: TrainState, x: jax.Array) -> TrainState:
        grads = jax.grad(lambda p: jnp.mean(state.apply_fn({"params": p}, x) ** 2))(state.params)
        return place.hold(state.apply_gradients(grads=grads))

    for _ in range(3):
        state = step(state, place.place(x))
    assert step._cache_size() == 1  # type: ignore[attr-defined]
    assert state.params["Dense_1"]["kernel"].value.sharding.spec == P("fsdp")


def test_moments_go_by_the_optimizer_table_wherever_they_lie(devices: list[Any]) -> None:
    rules = fold(data(), zero1())
    place = placer("data=8", devices, rules, dims={"*w": ("embed", "mlp"), "*": None})
    params = {"layer": {"w": jnp.ones((16, 32)), "b": jnp.ones((32,))}}
    state = {
        "model": params,
        "extra": {"optimizer": optax.adam(1e-3).init(params)},
        "name": "run",
        "number": 3,
    }
    specs = place.specs(state)
    assert specs["model"]["layer"]["w"] == P()
    assert specs["extra"]["optimizer"][0].mu["layer"]["w"] == P("data")
    assert specs["name"] == P() and specs["number"] == P()
    put = place.put(state)
    assert put["name"] == "run" and put["number"] == 3
    assert put["extra"]["optimizer"][0].nu["layer"]["w"].sharding.spec == P("data")


def test_factored_moments_keep_the_dim_that_is_left(devices: list[Any]) -> None:
    place = placer("fsdp=4", devices, dims=BY_NAME)
    params = {"kernel": jnp.ones((256, 128))}
    state = {
        "params": params,
        "opt_state": optax.adafactor(1e-3, min_dim_size_to_factor=64).init(params),
    }
    found = {decision.leaf.path: decision.spec for decision in place.layout(state).moments}
    rows = next(spec for path, spec in found.items() if "v_row" in path)
    columns = next(spec for path, spec in found.items() if "v_col" in path)
    assert {rows, columns} == {P("fsdp"), P()}


def test_putting_a_tree_copies_it(devices: list[Any]) -> None:
    tree = {"kernel": jnp.ones((8, 8)), "flags": np.array([True, False])}
    place = placer("fsdp=1", devices, dims=BY_NAME)
    put = place.put(tree)
    jax.jit(lambda x: jax.tree.map(lambda a: a, x), donate_argnums=0)(put)
    assert float(tree["kernel"].sum()) == 64.0
    assert put["flags"].dtype == bool


def test_shardings_serve_jax_jit(devices: list[Any]) -> None:
    place = placer("fsdp=8", devices, dims=BY_NAME)
    shapes = jax.eval_shape(lambda: {"kernel": jnp.ones((64, 8)), "scale": jnp.ones(())})
    shardings = place.shardings(shapes)
    made = jax.jit(
        lambda: {"kernel": jnp.ones((64, 8)), "scale": jnp.ones(())}, out_shardings=shardings
    )()
    assert specs_of(made) == {"kernel": P("fsdp"), "scale": P()}


def test_batches_are_dealt_by_rows_or_by_their_names(devices: list[Any]) -> None:
    place = placer("data=2,fsdp=4", devices)
    batch = place.place({"x": np.arange(32.0).reshape(16, 2), "count": np.float32(3)})
    assert batch["x"].sharding.spec == P(("data", "fsdp")) and batch["count"].sharding.spec == P()
    named = Placer.on(
        place.mesh, batch_dims={"x": (None, "batch"), "deep/*": ("batch",)}, dims=None
    )
    batch = named.place({"x": np.ones((3, 16)), "deep": {"y": np.ones((8, 5))}})
    assert batch["x"].sharding.spec == P(None, ("data", "fsdp"))
    assert batch["deep"]["y"].sharding.spec == P(("data", "fsdp"))
    with pytest.raises(PlacementError, match="12 is not divisible by 8"):
        place.place(np.ones((12, 2)))
    with pytest.raises(PlacementError, match="3 names for 2 dims"):
        Placer.on(place.mesh, batch_dims={"*": ("batch", None, None)}).place({"x": np.ones((8, 2))})


def test_meshes_and_rules_as_people_write_them(devices: list[Any]) -> None:
    assert Placer.on("data=8").rules.strategies == (("data", "data"),)
    written = Placer.on("fsdp=8", ["params.embed=none"])
    assert written.rules.strategies == (("fsdp", "fsdp"),)
    assert written.rules.axes_for("params", "embed") == ()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(8), ("rows",))
    with pytest.raises(RulesError, match="no strategy is named after the mesh axis `rows`"):
        Placer.on(mesh)
    assert Placer.on(mesh, [data("rows")]).rules.token_axes() == ("rows",)
    patterns = DimPatterns.of(BY_NAME)
    assert Placer.on("data=8", dims=patterns).dims is patterns


def test_a_tensor_axis_wants_names_or_a_word_that_none_are_needed(devices: list[Any]) -> None:
    tree = {"kernel": jnp.ones((8, 16)), "bias": jnp.ones((16,))}
    with pytest.raises(RulesError, match="no rule matches `bias`"):
        placer("tensor=4", devices).specs(tree)
    found = placer("tensor=4", devices, dims=BY_NAME).layout(tree)
    assert found.params["kernel"].spec == P(None, "tensor")
    assert found.params["bias"].reason == "no names asked for, and no strategy splits by shape"


def test_in_tests_where_all_is_small_the_largest_leaves_are_split(devices: list[Any]) -> None:
    tree = {"w": jnp.ones((16, 16)), "b": jnp.ones((8,))}
    found = placer("fsdp=8", devices, [fsdp()]).layout(tree).params
    assert found["w"].spec == P("fsdp") and found["b"].spec == P()
    assert found["b"].reason == "small: 32 bytes, under the 128 of fsdp()"


def test_another_mesh_has_the_strategies_of_its_own_axes_unless_others_were_given(
    devices: list[Any],
) -> None:
    by_names = Placer.on("data=2,fsdp=4", ["activations.length=none"], dims=BY_NAME)
    other = by_names.on_other("fsdp=8")
    assert other.rules.strategies == (("fsdp", "fsdp"),) and other.dims is by_names.dims
    assert other.rules.user_rules("activations") == by_names.rules.user_rules("activations")
    given = Placer.on("data=2,fsdp=4", [data(), fsdp()])
    with pytest.raises(RulesError, match="the mesh has no axis `data`"):
        given.on_other("fsdp=8").specs({"w": jnp.ones((64, 64))})


def test_a_split_nnx_state_goes_through_jax_jit(devices: list[Any]) -> None:
    place = placer("data=2,fsdp=4", devices, dims={"*": None})
    net = place.init(lambda key: Net(rngs=nnx.Rngs(key)), jax.random.key(0))
    graph, state = nnx.split(net)
    shardings = place.shardings(state)

    def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        net = nnx.merge(graph, state, copy=True)
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean(net(x) ** 2))(net)
        nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(net, nnx.Param), grads))
        return nnx.state(net), loss

    jitted = jax.jit(step, in_shardings=(shardings, None), out_shardings=(shardings, None))
    after, first = jitted(state, place.place(np.ones((16, 16), np.float32)))
    assert after["first"]["kernel"][...].sharding.spec == P("fsdp")
    assert int(after["dropout"]["rngs"]["count"][...]) == 1
    _, second = jitted(after, place.place(np.ones((16, 16), np.float32)))
    assert float(second) < float(first)
