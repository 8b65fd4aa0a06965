"""Plain pytrees that others made: dm-haiku, jax's own stax; held as `adoption` says."""

from __future__ import annotations

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


def network(tokens: Any, is_training: bool) -> Any:
    """Embedding, attention, batch statistics and dropout of haiku."""
    import haiku as hk

    x = hk.Embed(64, 64)(tokens)
    attend = hk.MultiHeadAttention(4, 16, w_init=hk.initializers.VarianceScaling(1.0))
    x = hk.LayerNorm(-1, True, True)(x + attend(x, x, x))
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    h = jax.nn.gelu(hk.Linear(256, name="up")(x))
    h = hk.dropout(hk.next_rng_key(), 0.1, h) if is_training else h
    return hk.Linear(64)(x + hk.Linear(64, name="down")(h))


def haiku_before(watch: Watch) -> None:
    import haiku as hk

    net = hk.transform_with_state(network)
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, 64)

    def init(key: Any) -> Any:
        return net.init(key, tokens, True)

    def loss(model: Any, tokens: Any, key: Any) -> Any:
        found, after = net.apply(*model, key, tokens, True)
        right = optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], tokens[:, 1:])
        return right.mean(), after

    adam = optax.adam(1e-3)
    params, after = init(jax.random.key(0))
    opt_state = adam.init(params)

    @jax.jit
    def step(params: Any, after: Any, opt_state: Any, tokens: Any, key: Any) -> Any:
        graded = jax.value_and_grad(lambda p: loss((p, after), tokens, key), has_aux=True)
        (found, after_all), grads = graded(params)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), after_all, opt_state, found

    for number in range(STEPS):
        key = jax.random.key(number)
        params, after, opt_state, found = step(params, after, opt_state, tokens, key)
        watch(found)


def haiku_after(mesh: str, watch: Watch) -> None:
    import haiku as hk

    net = hk.transform_with_state(network)
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, 64)

    def init(key: Any) -> Any:
        return net.init(key, tokens, True)

    def loss(model: Any, tokens: Any, key: Any) -> Any:
        found, after = net.apply(*model, key, tokens, True)
        right = optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], tokens[:, 1:])
        return right.mean(), {}, (None, after)

    adam = optax.adam(1e-3)
    dims = {"0/up/w": ("embed", "mlp"), "0/down/w": ("mlp", "embed"), "*": None}
    plan = meshwright.plan(
        init, optimizer=adam, loss=loss, batch=tokens, mesh=mesh, dims=dims, trainable="0/*"
    )
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(tokens))
        watch(metrics["loss"], plan, state, tokens)


def stax_network() -> Any:
    from jax.example_libraries import stax

    convolved = (stax.Conv(16, (3, 3), padding="SAME"), stax.BatchNorm(), stax.Relu, stax.Flatten)
    dense = (stax.Dense(256), stax.Relu, stax.Dropout(0.9), stax.Dense(16), stax.LogSoftmax)
    return stax.serial(*convolved, *dense)


def stax_before(watch: Watch) -> None:
    init_fun, apply_fun = stax_network()
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    batch = (x, jax.nn.one_hot(jnp.arange(16), 16))

    def init(key: Any) -> Any:
        return init_fun(key, (-1, 8, 8, 3))[1]

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x, y = batch
        return -jnp.mean(jnp.sum(apply_fun(params, x, rng=key) * y, axis=-1))

    adam = optax.adam(1e-3)
    params = init(jax.random.key(0))
    opt_state = adam.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        found, grads = jax.value_and_grad(loss)(params, batch, key)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, found

    for number in range(STEPS):
        params, opt_state, found = step(params, opt_state, batch, jax.random.key(number))
        watch(found)


def stax_after(mesh: str, watch: Watch) -> None:
    init_fun, apply_fun = stax_network()
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 3))
    batch = (x, jax.nn.one_hot(jnp.arange(16), 16))

    def init(key: Any) -> Any:
        return init_fun(key, (-1, 8, 8, 3))[1]

    def loss(params: Any, batch: Any, key: Any) -> Any:
        x, y = batch
        return -jnp.mean(jnp.sum(apply_fun(params, x, rng=key) * y, axis=-1))

    adam = optax.adam(1e-3)
    dims = {"4/0": ("embed", "mlp"), "7/0": ("mlp", "embed"), "*": None}
    plan = meshwright.plan(init, optimizer=adam, loss=loss, batch=batch, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


PACKAGES = {
    "dm-haiku": Package(
        haiku_before,
        haiku_after,
        splits={"0/up/w": P(None, "tensor"), "0/down/w": P("tensor")},
        needs="haiku",
        exact=False,  # its init averages the batch into its statistics: a sum over tokens
    ),
    "stax": Package(stax_before, stax_after, splits={"4/0": P(None, "tensor"), "7/0": P("tensor")}),
}
CASES = [(name, mesh) for name, package in PACKAGES.items() for mesh in package.meshes]


@pytest.mark.parametrize("name", PACKAGES)
def test_adopting_costs_ten_lines(name: str) -> None:
    check_before(PACKAGES[name])


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_same_as_one_device(name: str, mesh: str) -> None:
    check_mesh(PACKAGES[name], mesh)
