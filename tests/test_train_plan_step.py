"""What a step does with whatever optimizers, losses and states people bring."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adoption import compilations
from flax import linen as nn
from flax.core import freeze

import meshwright
from meshwright.sharding.errors import ConfigError

pytestmark = pytest.mark.usefixtures("devices")
MESH = "data=2,fsdp=4"
X, Y = (np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32) for seed in (1, 2))
BATCH = {"x": X, "y": Y}


def init(key: Any) -> dict[str, Any]:
    """Weights; a weakly typed scalar; a Python number; an integer array."""
    weights = {"up": jax.random.normal(key, (8, 64)), "down": jnp.zeros((64, 8))}
    return {**weights, "scale": jnp.asarray(1.0), "number": 1.0, "table": jnp.arange(64)}


def loss(model: Any, batch: Any) -> Any:
    hidden = (batch["x"] @ model["up"]) * (model["table"] > 3)[None]
    found = (hidden @ model["down"]) * model["scale"] * model["number"]
    return jnp.mean((found - batch["y"]) ** 2)


def trained(plan: Any, batch: Any = BATCH, steps: int = 3) -> tuple[list[float], Any]:
    """Losses, with the first step's compilation the last."""
    state, losses = plan.init(jax.random.key(0)), []
    with compilations() as seen:
        for number in range(steps):
            state, metrics = plan.step(state, plan.place(batch))
            losses.append(float(metrics["loss"]))
            if number == 0:
                seen.clear()
    assert not seen
    return losses, state


def check(plan: Any, batch: Any = BATCH) -> None:
    found, expected = trained(plan, batch)[0], trained(plan.one_device(), batch)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


ADAM = optax.adam(1e-3)
OPTIMIZERS = {
    "multi-steps": optax.MultiSteps(ADAM, 2),  # type: ignore[arg-type]
    "masked": optax.masked(optax.sgd(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi-transform": optax.multi_transform(
        {"matrix": ADAM, "other": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "other", p),
    ),
    "schedule in state": optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-3, 1e-4, 10)
    ),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "looks at the loss": optax.chain(ADAM, optax.contrib.reduce_on_plateau()),
    "extra arguments of its own": optax.contrib.sam(optax.sgd(1e-2), optax.sgd(1e-2)),
    "factored": optax.adafactor(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_compiles_once_and_equals_one_device(name: str) -> None:
    check(meshwright.plan(init, optimizer=OPTIMIZERS[name], loss=loss, batch=BATCH, mesh=MESH))


class Method:
    def loss(self, model: Any, batch: Any, key: Any) -> Any:
        del key
        return loss(model, batch), jnp.ones(())

    def __call__(self, model: Any, batch: Any) -> Any:
        return (loss(model, batch),)


def keyed(factor: float, model: Any, batch: Any, *, key: Any) -> Any:
    return factor * loss(model, batch) + 0.01 * jnp.mean(model["up"] * jax.random.normal(key))


LOSSES: dict[str, Callable[..., Any]] = {
    "method": Method().loss,
    "callable": Method(),
    "partial with a key by name": functools.partial(keyed, 2.0),
    "jitted": jax.jit(loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_whatever_can_be_called(name: str) -> None:
    check(meshwright.plan(init, optimizer=ADAM, loss=LOSSES[name], batch=BATCH, mesh=MESH))


def test_rest_keeps_its_dtypes() -> None:
    def make(key: Any) -> Any:
        return {"params": init(key), "seen": {"mean": jnp.zeros(8, jnp.bfloat16)}}

    def run(model: Any, batch: Any) -> Any:
        mean = 0.9 * model["seen"]["mean"] + 0.1 * batch["x"].mean(axis=0)  # float32
        return loss(model["params"], batch), {}, {"seen": {"mean": mean}}

    plan = meshwright.plan(
        make, optimizer=ADAM, loss=run, batch=BATCH, mesh=MESH, trainable="params/*"
    )
    _, state = trained(plan)
    assert plan.model(state)["seen"]["mean"].dtype == jnp.bfloat16
    assert float(jnp.abs(plan.model(state)["seen"]["mean"]).max()) > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda m: {"seen": jnp.zeros(9)}, "changes the shape of `seen`"),
        (lambda m: {"up": m["up"] + 1}, "returned `up` as changed, and it is trained"),
        (lambda m: {"number": jnp.ones(())}, "`number` as changed, and the model has no array"),
        (lambda m: {"unseen": m["seen"]}, "no such leaf; did you mean `seen`"),
    ],
    ids=["shape", "trained", "number", "unknown"],
)
def test_what_a_loss_changes_is_kept_or_refused(changed: Any, message: str) -> None:
    def make(key: Any) -> Any:
        return {**init(key), "seen": jnp.zeros(8)}

    def run(model: Any, batch: Any) -> Any:
        return loss(model, batch), {}, changed(model)

    plan = meshwright.plan(
        make,
        optimizer=ADAM,
        loss=run,
        batch=BATCH,
        mesh=MESH,
        trainable=lambda path: path in ("up", "down"),
    )
    with pytest.raises(ConfigError, match=message):
        trained(plan)


class Strict:
    """A node that takes arrays only."""

    def __init__(self, one: Any, two: Any) -> None:
        assert one is not None and two is not None
        self.one, self.two = jnp.asarray(one), jnp.asarray(two)


jax.tree_util.register_pytree_with_keys(
    Strict,
    lambda s: (((jax.tree_util.GetAttrKey("one"), s.one), ("two", s.two)), None),
    lambda _, children: Strict(*children),
)


def test_nodes_that_refuse_none_are_models_too() -> None:
    def make(key: Any) -> Any:
        return {"box": Strict(jax.random.normal(key, (8, 64)), jnp.ones(64, jnp.int32))}

    def run(model: Any, batch: Any) -> Any:
        found = (batch["x"] @ (model["box"].one * model["box"].two[None]))[:, :8]
        return jnp.mean((found - batch["y"]) ** 2)

    plan = meshwright.plan(make, optimizer=ADAM, loss=run, batch=BATCH, mesh=MESH)
    assert [leaf.leaf.path for leaf in plan.decisions] == ["box/one", "box/two"]
    check(plan)


def test_values_that_exist_are_copied_however_they_are_placed() -> None:
    model = {**init(jax.random.key(0)), "bias": jnp.ones(8)}  # bias is small, so it stays whole

    def run(model: Any, batch: Any) -> Any:
        return loss(model, batch) + jnp.mean(model["bias"] ** 2)

    for mesh in ("data=8", MESH):
        trained(meshwright.plan(model, optimizer=ADAM, loss=run, batch=BATCH, mesh=mesh))
    np.testing.assert_array_equal(model["bias"], np.ones(8))


def test_what_keeps_a_parameter_whole_keeps_its_moments_whole() -> None:
    def make(key: Any) -> Any:
        return {**init(key), "odd": jnp.ones((101, 103))}

    def run(model: Any, batch: Any) -> Any:
        return loss(model, batch) + jnp.mean(model["odd"] ** 2)

    rules = [meshwright.sharding.fsdp(whole=("odd",), min_bytes=1024)]
    plan = meshwright.plan(make, optimizer=ADAM, loss=run, batch=BATCH, mesh="fsdp=8", rules=rules)
    assert plan.moments["0/mu/odd"].reason == "`odd` kept whole by fsdp()"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        calls = self.variable("calls", "count", lambda: 0)
        calls.value = calls.value + 1
        self.sow("intermediates", "hidden", x)
        return nn.Dense(8)(x)


def net_loss(variables: Any, batch: Any, key: Any) -> Any:
    mutable = ["batch_stats", "calls", "intermediates"]
    found, after = Net().apply(variables, batch["x"], True, mutable=mutable, rngs={"dropout": key})
    return jnp.mean((found - batch["y"]) ** 2), {}, after


@pytest.mark.parametrize("how", ["module with a flag", "frozen", "values"])
def test_linen_with_collections_numbers_and_sown_values(how: str) -> None:
    def make(key: Any) -> Any:
        return freeze(Net().init({"params": key, "dropout": key}, X, True))

    model: Any = {
        "module with a flag": Net(),
        "frozen": make,
        "values": make(jax.random.key(0)),
    }[how]
    plan = meshwright.plan(
        model,
        optimizer=ADAM,
        loss=net_loss,
        batch=BATCH,
        mesh="data=8",
        inputs=lambda batch: (batch["x"], False),
    )
    losses, state = trained(plan)
    assert sorted(state.rest) == ["batch_stats", "calls"]
    assert int(state.rest["calls"]["count"]) == 4 and losses[-1] < losses[0]
