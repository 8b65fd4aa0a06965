"""linen models that others wrote: brax's networks, nano-moe-jax; held as `adoption` says."""

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


def observed() -> dict[str, Any]:
    obs, act = jax.random.split(jax.random.key(1))
    shape = (16, 28)
    return {"obs": jax.random.normal(obs, shape), "act": jax.random.normal(act, (16, 8))}


def policy_before(watch: Watch) -> None:
    from brax.training import networks
    from brax.training.acme import running_statistics, specs

    normalize = running_statistics.normalize
    policy = networks.make_policy_network(8, 28, normalize, (128, 128), layer_norm=True)
    value = networks.make_value_network(28, normalize, (128, 128))

    def init(key: Any) -> Any:
        one, two = jax.random.split(key)
        seen = running_statistics.init_state(specs.Array((28,), jnp.dtype("float32")))
        return {"policy": policy.init(one), "value": value.init(two)}, seen

    def loss(model: Any, batch: Any) -> Any:
        params, seen = model
        seen = running_statistics.update(seen, batch["obs"])
        actions = policy.apply(seen, params["policy"], batch["obs"])[:, :8]
        values = value.apply(seen, params["value"], batch["obs"])
        found = jnp.mean((actions - batch["act"]) ** 2) + jnp.mean((values - 1.0) ** 2)
        return found, seen

    batch = observed()
    adam = optax.adam(1e-3)
    params, seen = init(jax.random.key(0))
    opt_state = adam.init(params)

    @jax.jit
    def step(params: Any, seen: Any, opt_state: Any, batch: Any) -> Any:
        graded = jax.value_and_grad(lambda params: loss((params, seen), batch), has_aux=True)
        (found, seen), grads = graded(params)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), seen, opt_state, found

    for _ in range(STEPS):
        params, seen, opt_state, found = step(params, seen, opt_state, batch)
        watch(found)


def policy_after(mesh: str, watch: Watch) -> None:
    from brax.training import networks
    from brax.training.acme import running_statistics, specs

    normalize = running_statistics.normalize
    policy = networks.make_policy_network(8, 28, normalize, (128, 128), layer_norm=True)
    value = networks.make_value_network(28, normalize, (128, 128))

    def init(key: Any) -> Any:
        one, two = jax.random.split(key)
        seen = running_statistics.init_state(specs.Array((28,), jnp.dtype("float32")))
        return {"policy": policy.init(one), "value": value.init(two)}, seen

    def loss(model: Any, batch: Any) -> Any:
        params, seen = model
        seen = running_statistics.update(seen, batch["obs"])
        actions = policy.apply(seen, params["policy"], batch["obs"])[:, :8]
        values = value.apply(seen, params["value"], batch["obs"])
        found = jnp.mean((actions - batch["act"]) ** 2) + jnp.mean((values - 1.0) ** 2)
        return found, {}, (None, seen)

    batch = observed()
    adam = optax.adam(1e-3)
    dims = {"*hidden_0/kernel": ("embed", "mlp"), "*hidden_1/kernel": ("mlp", "embed"), "*": None}
    plan = meshwright.plan(
        init, optimizer=adam, loss=loss, batch=batch, mesh=mesh, dims=dims, trainable="0/*"
    )
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


def spectral_before(watch: Watch) -> None:
    from brax.training.networks import SNMLP

    batch, model = observed(), SNMLP(layer_sizes=(128, 128, 8))

    def init(key: Any) -> Any:
        one, two = jax.random.split(key)
        return model.init({"params": one, "sing_vec": two}, batch["obs"])

    def loss(variables: Any, batch: Any, key: Any) -> Any:
        rngs = {"sing_vec": key}
        found, after = model.apply(variables, batch["obs"], mutable=["sing_vec"], rngs=rngs)
        return jnp.mean((found - batch["act"]) ** 2), after

    adam = optax.adam(1e-3)
    variables = init(jax.random.key(0))
    opt_state = adam.init(variables["params"])

    @jax.jit
    def step(variables: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        params = variables["params"]
        graded = jax.value_and_grad(
            lambda params: loss({**variables, "params": params}, batch, key), has_aux=True
        )
        (found, after), grads = graded(params)
        updates, opt_state = adam.update(grads, opt_state)
        return {"params": optax.apply_updates(params, updates), **after}, opt_state, found

    for number in range(STEPS):
        key = jax.random.key(number)
        variables, opt_state, found = step(variables, opt_state, batch, key)
        watch(found)


def spectral_after(mesh: str, watch: Watch) -> None:
    from brax.training.networks import SNMLP

    batch, model = observed(), SNMLP(layer_sizes=(128, 128, 8))

    def init(key: Any) -> Any:
        one, two = jax.random.split(key)
        return model.init({"params": one, "sing_vec": two}, batch["obs"])

    def loss(variables: Any, batch: Any, key: Any) -> Any:
        rngs = {"sing_vec": key}
        found, after = model.apply(variables, batch["obs"], mutable=["sing_vec"], rngs=rngs)
        return jnp.mean((found - batch["act"]) ** 2), {}, after

    adam = optax.adam(1e-3)
    dims = {"hidden_0/kernel": ("embed", "mlp"), "hidden_1/kernel": ("mlp", "embed"), "*": None}
    plan = meshwright.plan(init, optimizer=adam, loss=loss, batch=batch, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


def pictured() -> dict[str, Any]:
    pixels = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3))
    obs = {"pixels/a": pixels, "state": jnp.ones((16, 9))}
    return {"obs": obs, "act": jax.random.normal(jax.random.key(2), (16, 8))}


def vision_before(watch: Watch) -> None:
    from brax.training.networks import make_policy_network_vision

    batch = pictured()
    sizes = {"pixels/a": (16, 16, 3), "state": (9,)}
    net = make_policy_network_vision(sizes, 8, hidden_layer_sizes=(64, 64), state_obs_key="")

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((net.apply(None, params, batch["obs"])[:, :8] - batch["act"]) ** 2)

    adam = optax.adam(1e-3)
    params = net.init(jax.random.key(0))
    opt_state = adam.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        found, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, found

    for _ in range(STEPS):
        params, opt_state, found = step(params, opt_state, batch)
        watch(found)


def vision_after(mesh: str, watch: Watch) -> None:
    from brax.training.networks import make_policy_network_vision

    batch = pictured()
    sizes = {"pixels/a": (16, 16, 3), "state": (9,)}
    net = make_policy_network_vision(sizes, 8, hidden_layer_sizes=(64, 64), state_obs_key="")

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((net.apply(None, params, batch["obs"])[:, :8] - batch["act"]) ** 2)

    adam = optax.adam(1e-3)
    plan = meshwright.plan(net.init, optimizer=adam, loss=loss, batch=batch, mesh=mesh)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(batch))
        watch(metrics["loss"], plan, state, batch)


def moe_before(watch: Watch) -> None:
    from flax.training.train_state import TrainState
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(vocab_size=64, n_layers=1, n_heads=4, d_model=32, d_ff=64, n_experts=4)
    model = NanoMoE(config)
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, 64)

    def loss(variables: Any, tokens: Any, key: Any) -> Any:
        rngs = {"dropout": key}
        logits, extra = model.apply(variables, tokens, deterministic=False, rngs=rngs)
        right = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return right.mean() + 0.01 * extra

    adam = optax.adam(1e-2)
    params = model.init(jax.random.key(0), tokens)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=adam)

    @jax.jit
    def step(state: Any, tokens: Any, key: Any) -> Any:
        found, grads = jax.value_and_grad(loss)(state.params, tokens, key)
        return state.apply_gradients(grads=grads), found

    for number in range(STEPS):
        state, found = step(state, tokens, jax.random.key(number))
        watch(found)


def moe_after(mesh: str, watch: Watch) -> None:
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(vocab_size=64, n_layers=1, n_heads=4, d_model=32, d_ff=64, n_experts=4)
    model = NanoMoE(config)
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, 64)

    def loss(variables: Any, tokens: Any, key: Any) -> Any:
        rngs = {"dropout": key}
        logits, extra = model.apply(variables, tokens, deterministic=False, rngs=rngs)
        right = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return right.mean() + 0.01 * extra

    adam = optax.adam(1e-2)
    up, down = ("embed", "mlp"), ("mlp", "embed")
    dims = {"*expert_*/Dense_0/kernel": up, "*expert_*/Dense_1/kernel": down, "*": None}
    plan = meshwright.plan(model, optimizer=adam, loss=loss, batch=tokens, mesh=mesh, dims=dims)
    state = plan.init(jax.random.key(0))
    for _ in range(STEPS):
        state, metrics = plan.step(state, plan.place(tokens))
        watch(metrics["loss"], plan, state, tokens)


PACKAGES = {
    "brax-policy": Package(
        policy_before,
        policy_after,
        splits={"0/policy/params/hidden_0/kernel": P(None, "tensor")},
        needs="brax",
    ),
    "brax-spectral": Package(
        spectral_before,
        spectral_after,
        splits={"hidden_0/kernel": P(None, "tensor"), "hidden_1/kernel": P("tensor")},
        needs="brax",
        exact=False,  # its init multiplies weights for their largest singular values
    ),
    "brax-vision": Package(vision_before, vision_after, needs="brax"),
    "nano-moe-jax": Package(
        moe_before,
        moe_after,
        splits={
            "block_0/MoELayer_0/expert_0/Dense_0/kernel": P(None, "tensor"),
            "block_0/MoELayer_0/expert_0/Dense_1/kernel": P("tensor"),
        },
        needs="nano_moe",
    ),
}
CASES = [(name, mesh) for name, package in PACKAGES.items() for mesh in package.meshes]


@pytest.mark.parametrize("name", PACKAGES)
def test_adopting_costs_ten_lines(name: str) -> None:
    check_before(PACKAGES[name])


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_same_as_one_device(name: str, mesh: str) -> None:
    check_mesh(PACKAGES[name], mesh)
