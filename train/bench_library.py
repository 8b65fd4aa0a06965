"""What the library costs those who bring their own model: a step, an import, a resolution.

Each figure is held against what a user would have without it: a step against the same mathematics
in their own ``jax.jit`` with the same shardings, an import against jax's. Steps of the two are
taken in turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshwright.sharding.decisions import resolve
from meshwright.sharding.dims import DimPatterns, describe
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.strategies import data, fold, fsdp, tensor
from meshwright.sharding.topology import Topology
from meshwright.train.bench import collective_counts, finish, say
from meshwright.train.config import TrainConfig
from meshwright.train.model_plan import Plan, plan

__all__ = ["library"]

_PAIRS = 60
_WIDTH, _HIDDEN, _LAYERS, _ROWS = 256, 1024, 6, 256
_LEAVES = 100_000


def library(config: TrainConfig) -> int:
    """`Plan.step` over a user's own jitted step; ``import``; `resolve` on 100,000 leaves."""
    del config  # the model is the user's
    Topology("cpu", (8,)).devices()
    found = {mesh: _overhead(mesh) for mesh in ("data=8", "data=2,fsdp=4", "data=2,tensor=4")}
    return finish(overhead=found, imports=_imports(), resolve=_resolve())


def _overhead(mesh: str) -> dict[str, Any]:
    """Median ratio of paired steps, and the collectives of both programs."""
    made = _plan(mesh)
    batch = made.place(_batch())
    own = _own_step(made)
    states = {"ours": made.init(0), "own": made.init(0)}
    steps = {"ours": made.step, "own": own}
    seconds: dict[str, list[float]] = {"ours": [], "own": []}
    for _ in range(_PAIRS):
        for name, step in steps.items():
            began = time.perf_counter()
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            seconds[name].append(time.perf_counter() - began)
    warm = {name: values[5:] for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(warm["ours"], warm["own"], strict=True))
    texts = {
        "ours": made.lower().compile().as_text(),
        "own": own.lower(made.shapes, made.batch_shapes).compile().as_text(),
    }
    counts = {name: collective_counts(text) for name, text in texts.items()}
    say(f"{mesh:<16} ratio {ratio:.3f}, {statistics.median(warm['own']) * 1e3:.1f} ms a step")
    for name in counts:
        say(f"  {name:<5} {counts[name]}")
    return {"ratio": ratio, "collectives": counts, "programs": made.jitted._cache_size()}


def _params(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 2 * _LAYERS)
    return {
        f"layer_{n}": {
            "up": jax.random.normal(keys[2 * n], (_WIDTH, _HIDDEN)) / 16,
            "down": jax.random.normal(keys[2 * n + 1], (_HIDDEN, _WIDTH)) / 32,
            "scale": jnp.ones((_WIDTH,)),
        }
        for n in range(_LAYERS)
    }


def _loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    x = batch["x"]
    for layer in params.values():
        x = x + jnp.tanh(x * layer["scale"] @ layer["up"]) @ layer["down"]
    return jnp.mean((x - batch["y"]) ** 2)


def _batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32) for name in ("x", "y")}


def _plan(mesh: str) -> Plan:
    dims = {"*/up": ("embed", "mlp"), "*/down": ("mlp", "embed"), "*": None}
    return plan(
        _params, optimizer=optax.adamw(1e-3), loss=_loss, batch=_batch(), mesh=mesh, dims=dims
    )


def _own_step(made: Plan) -> Any:
    """The same step as its owner would write it, with the plan's shardings."""
    optimizer = made.parts.optimizer

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(_loss)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = type(state)(state.step + 1, params, state.rest, opt_state, state.key)
        return after, {"loss": loss}

    return jax.jit(step, donate_argnums=0, out_shardings=(made.shardings, None))


def _imports() -> dict[str, float]:
    """Seconds of an import in a fresh process, after jax's; the least of five."""
    program = (
        "import time, jax; began = time.perf_counter(); {what}; print(time.perf_counter() - began)"
    )
    found = {}
    for name, what in (
        ("meshwright.sharding", "import meshwright.sharding"),
        ("the toolkit in use", "from meshwright.sharding import Placer, Rules, fold, resolve"),
    ):
        runs = [
            subprocess.run(
                [sys.executable, "-c", program.format(what=what)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout  # fmt: skip
            for _ in range(5)
        ]
        found[name] = min(map(float, runs))
        say(f"import of {name}: {found[name]:.3f} s beyond jax")
    return found


def _resolve() -> dict[str, float]:
    """Seconds to describe, name and resolve 100,000 leaves of a thousand shapes; least of three."""
    shapes = [jax.ShapeDtypeStruct((1024 + n % 97 * 8, 4096), np.float32) for n in range(997)]
    tree = {
        f"block_{n}": {
            "wq": shapes[n % 997],
            "wo": shapes[n * 7 % 997],
            "w1": shapes[n * 3 % 997],
            "w2": shapes[n * 5 % 997],
            "bias": jax.ShapeDtypeStruct((4096,), np.float32),
        }
        for n in range(_LEAVES // 5)
    }
    patterns = DimPatterns.of({"*/w?": ("embed", "mlp"), "*": None})
    rules, mesh = fold(data(), fsdp(), tensor()), MeshSpec.parse("data=2,fsdp=8,tensor=4")
    times: dict[str, list[float]] = {"describe": [], "resolve": []}
    for _ in range(3):
        began = time.perf_counter()
        leaves = patterns.apply(describe(tree))
        described = time.perf_counter()
        decisions = resolve(leaves, rules, mesh, "params")
        times["describe"].append(described - began)
        times["resolve"].append(time.perf_counter() - described)
        assert len(decisions) == _LEAVES
    least = {f"{name}_seconds": min(values) for name, values in times.items()}
    say(
        f"{_LEAVES:,} leaves: described in {least['describe_seconds']:.2f} s, "
        f"resolved in {least['resolve_seconds']:.2f} s"
    )
    return least
