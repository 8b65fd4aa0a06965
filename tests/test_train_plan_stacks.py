"""Stacks of layers, scanned and rematerialised, of both Flax libraries: gathered in their loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.spmd import with_logical_constraint
from jax.sharding import PartitionSpec

import meshwright
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.model_plan import Plan

LAYERS, EMBED, WIDTH = 3, 32, 64
RNG = np.random.default_rng(0)
BATCH = {name: RNG.normal(size=(16, 8, EMBED)).astype(np.float32) for name in ("x", "y")}


def named(*dims: str) -> Any:
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), dims)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h: Any = nn.Dense(WIDTH, use_bias=False, kernel_init=named("embed", "mlp"))(x)
        h = with_logical_constraint(nn.gelu(h), ("batch", "length", "mlp"))
        h = nn.Dropout(0.1, deterministic=False)(h)
        return x + nn.Dense(EMBED, use_bias=False, kernel_init=named("mlp", "embed"))(h), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack: Any = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(name="stack")(x, None)[0]


def linen_loss(variables: Any, batch: Any, rng: jax.Array) -> jax.Array:
    out: Any = LinenStack().apply(variables, batch["x"], rngs={"dropout": rng})
    return jnp.mean((out - batch["y"]) ** 2)


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        def kernel(*dims: str) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), dims)

        self.up = nnx.Linear(
            EMBED, WIDTH, use_bias=False, rngs=rngs, kernel_init=kernel("embed", "mlp")
        )
        self.down = nnx.Linear(
            WIDTH, EMBED, use_bias=False, rngs=rngs, kernel_init=kernel("mlp", "embed")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(x)))


class NnxStack(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs=rngs)

        self.stack = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x: jax.Array, block: NnxBlock) -> jax.Array:
            return block(x)

        return run(x, self.stack)


def nnx_loss(model: NnxStack, batch: Any) -> jax.Array:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def plan_of(which: str, devices: list[Any]) -> Plan:
    models: dict[str, Any] = {"linen": (LinenStack(), linen_loss), "nnx": (NnxStack, nnx_loss)}
    model, loss = models[which]
    return meshwright.plan(
        model,
        optimizer=optax.adam(1e-2),
        loss=loss,
        batch=BATCH,
        inputs=lambda batch: batch["x"],
        mesh=MeshSpec.parse("data=2,fsdp=2,tensor=2").build(devices),
        # Keys of streams that nnx splits over the layers need no names.
        dims={"*": None},
    )


def losses(plan: Plan) -> list[float]:
    state, found = plan.init(0), []
    for _ in range(3):
        state, metrics = plan.step(state, plan.place(BATCH))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_a_stack_is_split_and_gathered_layer_by_layer(which: str, devices: list[Any]) -> None:
    plan = plan_of(which, devices)
    kernels = [decision for decision in plan.decisions if decision.leaf.path.endswith("kernel")]
    assert {decision.leaf.dims for decision in kernels} == {
        ("layers", "embed", "mlp"),
        ("layers", "mlp", "embed"),
    }
    assert {decision.spec for decision in kernels} == {
        PartitionSpec(None, "fsdp", "tensor"),
        PartitionSpec(None, "tensor", "fsdp"),
    }
    np.testing.assert_allclose(losses(plan), losses(plan.one_device()), rtol=1e-5)
    gathers = [found for found in plan.report().collectives if found.kind == "all-gather"]
    assert gathers and all(found.loop_depth == 1 for found in gathers)
    layer_bytes = EMBED * WIDTH // 2 * 4  # what tensor leaves of one matrix
    assert all(found.bytes <= found.count * layer_bytes for found in gathers)
