"""equinox models that others wrote: equimo, flowjax, equinox's own; held as `adoption` says."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from adoption import STEPS, Package, Watch, check_before, check_mesh
from jax.sharding import PartitionSpec as P

import meshwright

# Their code is theirs: what it deprecates or promotes is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_authors_run() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def images(size: int) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(1), (16, 3, size, size))
    return {"x": x, "y": jax.random.randint(jax.random.key(2), (16,), 0, 10)}


def vit() -> Any:
    """Its class lies elsewhere in the release that Python 3.11 resolves to."""
    try:
        module = importlib.import_module("equimo.vision.models.vit")
    except ModuleNotFoundError:
        module = importlib.import_module("equimo.models.vit")
    return module.VisionTransformer


def vit_before(watch: Watch) -> None:
    import equinox as eqx

    sizes = {"img_size": 16, "patch_size": 4, "dim": 64, "num_heads": 4, "depths": [2]}
    drops = {"pos_drop_rate": 0.1, "proj_drop": 0.1, "drop_path_rate": 0.1}
    batch, make = images(16), functools.partial(vit(), in_channels=3, num_classes=10)

    def loss(model: Any, batch: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(batch["x"]))
        found = jax.vmap(lambda x, key: model(x, key=key, inference=False))(batch["x"], keys)
        return optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]).mean()

    adam = optax.adam(1e-3)
    model = make(**sizes, **drops, key=jax.random.key(0))
    opt_state = adam.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        found, grads = eqx.filter_value_and_grad(loss)(model, batch, key)
        updates, opt_state = adam.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, found

    for number in range(STEPS):
        model, opt_state, found = step(model, opt_state, batch, jax.random.key(number))
        watch(found)


def vit_after(mesh: str, watch: Watch) -> None:
    sizes = {"img_size": 16, "patch_size": 4, "dim": 64, "num_heads": 4, "depths": [2]}
    drops = {"pos_drop_rate": 0.1, "proj_drop": 0.1, "drop_path_rate": 0.1}
    batch, make = images(16), functools.partial(vit(), in_channels=3, num_classes=10)

    def loss(model: Any, batch: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(batch["x"]))
        found = jax.vmap(lambda x, key: model(x, key=key, inference=False))(batch["x"], keys)
        return optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]).mean()

    adam = optax.adam(1e-3)
    model = functools.partial(make, **sizes, **drops)
    dims = {"*fc1/weight": ("mlp", "embed"), "*fc2/weight": ("embed", "mlp"), "*": None}
    plan = meshwright.plan(model, optimizer=adam, loss=loss, batch=batch, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


def flow_before(watch: Watch) -> None:
    import equinox as eqx
    import paramax
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    def make(key: Any) -> Any:
        base = Normal(jnp.zeros(8))
        return masked_autoregressive_flow(key, base_dist=base, nn_width=64, flow_layers=3)

    def loss(flow: Any, x: Any) -> Any:
        return -paramax.unwrap(flow).log_prob(x).mean()

    x = jax.random.normal(jax.random.key(1), (16, 8))
    adam = optax.adam(1e-3)
    flow = make(jax.random.key(0))
    opt_state = adam.init(eqx.filter(flow, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(flow: Any, opt_state: Any, x: Any) -> Any:
        found, grads = eqx.filter_value_and_grad(loss)(flow, x)
        updates, opt_state = adam.update(grads, opt_state)
        return eqx.apply_updates(flow, updates), opt_state, found

    for _ in range(STEPS):
        flow, opt_state, found = step(flow, opt_state, x)
        watch(found)


def flow_after(mesh: str, watch: Watch) -> None:
    import paramax
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    def make(key: Any) -> Any:
        base = Normal(jnp.zeros(8))
        return masked_autoregressive_flow(key, base_dist=base, nn_width=64, flow_layers=3)

    def loss(flow: Any, x: Any) -> Any:
        return -paramax.unwrap(flow).log_prob(x).mean()

    x = jax.random.normal(jax.random.key(1), (16, 8))
    adam = optax.adam(1e-3)
    plan = meshwright.plan(make, optimizer=adam, loss=loss, batch=x, mesh=mesh)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(x))
        watch(metrics["loss"], plan, state, x)


@functools.cache
def own() -> Any:
    """A model of equinox's own modules; made here, as without equinox there is no class to be."""
    import equinox as eqx

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        attn: eqx.nn.MultiheadAttention
        cell: eqx.nn.LSTMCell
        drop: eqx.nn.Dropout
        mlp: eqx.nn.MLP

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
            self.attn = eqx.nn.MultiheadAttention(4, 64, key=keys[1])
            self.cell = eqx.nn.LSTMCell(64, 64, key=keys[2])
            self.drop = eqx.nn.Dropout(0.1)
            self.mlp = eqx.nn.MLP(64, 10, 128, 2, key=keys[3])

        def __call__(self, x: Any, state: Any, key: Any) -> Any:
            x, state = self.norm(self.conv(x), state)
            x = jax.nn.relu(x).transpose(1, 2, 0).reshape(8, 64)
            x = self.attn(x, x, x)
            start = (jnp.zeros(64), jnp.zeros(64))
            (h, _), _ = jax.lax.scan(lambda carry, v: (self.cell(v, carry), None), start, x)
            return self.mlp(self.drop(h, key=key)), state

    return Net


def own_before(watch: Watch) -> None:
    import equinox as eqx

    make, batch = eqx.nn.make_with_state(own()), images(8)

    def loss(model: Any, batch: Any, key: Any) -> Any:
        net, state = model
        keys = jax.random.split(key, len(batch["x"]))
        axes = {"in_axes": (0, None, 0), "out_axes": (0, None), "axis_name": "batch"}
        found, state = jax.vmap(net, **axes)(batch["x"], state, keys)
        right = optax.softmax_cross_entropy_with_integer_labels(found, batch["y"])
        return right.mean(), state

    adam = optax.adam(1e-3)
    net, state = make(jax.random.key(0))
    opt_state = adam.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(net: Any, state: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        graded = eqx.filter_value_and_grad(lambda net: loss((net, state), batch, key), has_aux=True)
        (found, after), grads = graded(net)
        updates, opt_state = adam.update(grads, opt_state)
        return eqx.apply_updates(net, updates), after, opt_state, found

    for number in range(STEPS):
        key = jax.random.key(number)
        net, state, opt_state, found = step(net, state, opt_state, batch, key)
        watch(found)


def own_after(mesh: str, watch: Watch) -> None:
    import equinox as eqx

    make, batch = eqx.nn.make_with_state(own()), images(8)

    def loss(model: Any, batch: Any, key: Any) -> Any:
        net, state = model
        keys = jax.random.split(key, len(batch["x"]))
        axes = {"in_axes": (0, None, 0), "out_axes": (0, None), "axis_name": "batch"}
        found, state = jax.vmap(net, **axes)(batch["x"], state, keys)
        right = optax.softmax_cross_entropy_with_integer_labels(found, batch["y"])
        return right.mean(), {}, (None, state)

    adam = optax.adam(1e-3)
    dims = {"*layers/0/weight": ("mlp", "embed"), "*layers/1/weight": ("embed", "mlp"), "*": None}
    plan = meshwright.plan(
        make, optimizer=adam, loss=loss, batch=batch, mesh=mesh, dims=dims, trainable="0/*"
    )
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


PACKAGES = {
    "equimo-vit": Package(
        vit_before,
        vit_after,
        splits={
            "blocks/0/blocks/0/mlp/fc1/weight": P("tensor"),
            "blocks/0/blocks/1/mlp/fc2/weight": P(None, "tensor"),
        },
        needs="equimo",
    ),
    "flowjax": Package(flow_before, flow_after, needs="flowjax"),
    "equinox": Package(
        own_before,
        own_after,
        splits={
            "0/mlp/layers/0/weight": P("tensor"),
            "0/mlp/layers/1/weight": P(None, "tensor"),
        },
        needs="equinox",
    ),
}
CASES = [(name, mesh) for name, package in PACKAGES.items() for mesh in package.meshes]


@pytest.mark.parametrize("name", PACKAGES)
def test_adopting_costs_ten_lines(name: str) -> None:
    check_before(PACKAGES[name])


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_same_as_one_device(name: str, mesh: str) -> None:
    check_mesh(PACKAGES[name], mesh)
