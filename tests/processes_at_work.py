"""The program of two processes whose findings tests/test_sharding_processes.py checks.

It is read as text, and run after the prelude of tests/together.py.
"""

# ruff: noqa: E402, F821
# pyright: basic, reportUndefinedVariable=false

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding import PlacementError, Placer, fetch, rows_of_process

here = begin()
index = here.index
found: dict[str, Any] = {"place": [index, here.count, jax.device_count(), jax.local_device_count()]}

mesh = Placer.on("data=2,tensor=4").mesh


def array(values: np.ndarray, *spec: Any) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])


gathers = [0]
gather = multihost_utils.process_allgather


def counted(*args: Any, **options: Any) -> Any:
    gathers[0] += 1
    return gather(*args, **options)


multihost_utils.process_allgather = counted

rows = array(np.arange(16.0), ("data", "tensor"))
try:
    jax.device_get(rows)
except RuntimeError as error:
    found["device_get"] = str(error)
found["sharded"] = fetch(rows).tolist()
found["gathers_of_sharded"], gathers[0] = gathers[0], 0
tree = {
    "held": array(np.arange(32.0).reshape(4, 8), None, "tensor"),
    "key": jax.jit(jax.random.key, out_shardings=NamedSharding(mesh, PartitionSpec()))(7),
    "passed": [3, "text", None],
}
whole = fetch(tree)
found["gathers_of_held"] = gathers[0]
found["held_by_each"] = whole["held"].tolist()
found["key"], found["passed"] = whole["key"].tolist(), whole["passed"]
found["partly"] = fetch(array(np.arange(32.0).reshape(8, 4), "data", "tensor")).tolist()

batch = np.arange(16 * 8).reshape(16, 8)
found["rows"], found["placed"] = {}, {}
for name in ("data=8", "data=4,tensor=2", "data=2,context=4", "tensor=8", "context=8"):
    placer = Placer.on(name, batch_dims={"tokens": ("batch", "sequence")})
    mine = rows_of_process(16, placer)
    found["rows"][name] = [mine.start, mine.stop]
    found["placed"][name] = fetch(placer.place({"tokens": batch[mine]})["tokens"]).tolist()


def refusal(mesh: str, batch: np.ndarray) -> str:
    try:
        Placer.on(mesh).place(batch)
    except PlacementError as error:
        return str(error)
    return "placed"


found["uneven"] = refusal("data=8", np.zeros((4 + 4 * index, 8), np.float32))
found["differing"] = refusal("tensor=8", np.full((4, 8), index, np.float32))


# plan
from typing import Any

import jax
import numpy as np
import optax

import meshwright


def train(mine: slice) -> list[float]:
    batch = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    def loss(params: Any, batch: Any) -> Any:
        error = batch @ params["w"] - 1.0
        return (error**2).mean()

    plan = meshwright.plan(
        lambda key: {"w": jax.random.normal(key, (8, 8))},
        optimizer=optax.sgd(0.1),
        loss=loss,
        batch=jax.ShapeDtypeStruct((16, 8), "float32"),
        mesh="data=2,fsdp=4",
    )
    state = plan.init(0)
    losses = []
    for _ in range(3):
        state, metrics = plan.step(state, plan.place(batch[mine]))
        losses.append(float(metrics["loss"]))
    return losses


# end of plan
found["losses"] = train(rows_of_process(16, Placer.on("data=2,fsdp=4")))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.linear(x))


# A model that exists on each process, with RNG keys in it.
plan = meshwright.plan(
    Model(nnx.Rngs(0)),
    optimizer=optax.adam(0.01),
    loss=lambda model, batch: (model(batch) ** 2).mean(),
    batch=jax.ShapeDtypeStruct((16, 64), "float32"),
    mesh="data=2,fsdp=4",
)
rows = np.ones((16, 64), np.float32)[rows_of_process(16, plan)]
state, _ = plan.step(plan.init(0), plan.place(rows))
saved = Path(os.environ["SAVED_IN"])
plan.save(saved, state)
restored = fetch(plan.restore(saved))
same = jax.tree.map(np.array_equal, restored, fetch(state))
found["restored"] = [len(jax.tree.leaves(same)), sum(jax.tree.leaves(same))]
print(json.dumps(found))
