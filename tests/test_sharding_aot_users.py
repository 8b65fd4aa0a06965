"""A user's own Flax model, compiled for hardware that is not here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import meshwright
from meshwright.sharding.aot_wheels import wheels


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(512, 2048, rngs=rngs)
        self.down = nnx.Linear(2048, 512, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(x)))


def loss(net: Net, x: jax.Array) -> jax.Array:
    return jnp.mean((net(x) - jnp.roll(x, 1, axis=1)) ** 2)


@pytest.mark.parametrize(("topology", "kind"), [("v5e:4x4", "tpu"), ("h100:2x8", "gpu")])
def test_gathers_scatters_and_memory_of_a_plan(topology: str, kind: Any) -> None:
    if wheels(kind).installed is None:
        pytest.skip(f"no compiler for {kind} is installed")
    plan = meshwright.plan(
        Net,
        optimizer=optax.adamw(1e-3),
        loss=loss,
        batch=jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        mesh="data=4,fsdp=4",
        topology=topology,
    )
    report = plan.report()
    assert report.topology == topology
    assert report.memory.parameters_bytes == plan.decisions.bytes_per_device
    assert report.memory.optimizer_bytes == plan.moments.bytes_per_device
    assert report.memory.fits and (report.memory.peak_bytes or 0) > report.memory.optimizer_bytes
    gathered = {
        found.leaf
        for found in report.collectives
        if found.kind == "all-gather" and found.axes == ("fsdp",)
    }
    assert any("up/kernel" in leaf for leaf in gathered)
    assert {found.kind for found in report.collectives} <= {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    }
    weights = 2 * 512 * 2048 * 4
    # A gather and a scatter of shards over fsdp; of a quarter of the gradients an all-reduce over
    # data. Half as many bytes where the compiler sends bfloat16.
    assert weights * 3 // 4 <= report.traffic["fsdp"].wire_bytes <= 1.2 * weights * 6 // 4
    assert report.traffic["data"].wire_bytes <= 1.2 * weights * 2 * 3 // 4 // 4
