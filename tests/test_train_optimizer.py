"""Optimizers: schedules by their formulas, states by path and shape, updates by hand.

Whole state trees are written out: the layout of optimizer state is resolved from these paths.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.sharding.dims import describe, describe_optimizer
from meshwright.train.config import OptimizerConfig, OptimizerName, Schedule
from meshwright.train.optimizer import learning_rate_schedule, make_optimizer

pytestmark = pytest.mark.usefixtures("devices")

NAMES: tuple[OptimizerName, ...] = ("adamw", "adafactor", "lion", "muon", "sgd")
each_name = pytest.mark.parametrize("name", NAMES)

SHAPES: dict[str, Any] = {
    "embedding": (256, 128),
    "head": (128, 256),
    "layers": {
        "attn": {"bq": (2, 4, 16), "wo": (2, 4, 16, 128), "wq": (2, 128, 4, 16)},
        "mlp": {"b_up": (2, 256), "w_up": (2, 128, 256)},
        "norm": {"scale": (2, 128)},
    },
}
DIMS: dict[str, Any] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "layers": {
        "attn": {
            "bq": ("layers", "heads", "head_dim"),
            "wo": ("layers", "heads", "head_dim", "embed"),
            "wq": ("layers", "embed", "heads", "head_dim"),
        },
        "mlp": {"b_up": ("layers", "mlp"), "w_up": ("layers", "embed", "mlp")},
        "norm": {"scale": ("layers", "norm")},
    },
}
MATRICES = {"layers/attn/wo", "layers/attn/wq", "layers/mlp/w_up"}
DECAYED = MATRICES | {"embedding", "head"}


def is_leaf(node: Any) -> bool:
    return isinstance(node, tuple)


def abstract_params() -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=is_leaf)


def random_tree(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    normal = partial(draw.standard_normal, dtype=np.float32)
    return jax.tree.map(lambda shape: jnp.asarray(normal(shape)), SHAPES, is_leaf=is_leaf)


def by_path(tree: Any) -> dict[str, Any]:
    nodes = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in nodes}


def state_shapes(name: OptimizerName, **settings: Any) -> dict[str, tuple[int, ...]]:
    optimizer = make_optimizer(OptimizerConfig(name=name, **settings), 100, DIMS)
    state = jax.eval_shape(optimizer.init, abstract_params())
    return {path: leaf.shape for path, leaf in by_path(state).items()}


def under(prefix: str, paths: set[str] | None = None) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes under a prefix, those of ``paths`` if given."""
    shapes = {path: leaf.shape for path, leaf in by_path(abstract_params()).items()}
    return {
        f"{prefix}/{path}": shape
        for path, shape in shapes.items()
        if paths is None or path in paths
    }


# Schedules


def rates(steps: int, **settings: Any) -> list[float]:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **settings), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_cosine_warms_up_then_falls_to_the_final_fraction() -> None:
    got = rates(20, schedule="cosine", warmup_steps=4, final_fraction=0.25)
    wanted = [2.0 * (t + 1) / 5 for t in range(4)]
    for t in range(4, 21):
        cosine = math.cos(math.pi * (t - 4) / 16)
        wanted.append(2.0 * (0.25 + 0.75 * (1 + cosine) / 2))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_wsd_stays_then_falls_in_a_straight_line() -> None:
    got = rates(20, schedule="wsd", warmup_steps=1, decay_fraction=0.2, final_fraction=0.5)
    np.testing.assert_allclose(got, [1.0] + [2.0] * 16 + [1.75, 1.5, 1.25, 1.0], rtol=1e-6)


def test_constant_stays() -> None:
    assert rates(6, schedule="constant", warmup_steps=0) == [2.0] * 7


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 200),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_a_rate_is_never_negative_above_the_peak_or_zero_at_the_first_step(
    schedule: Schedule, steps: int, warmup: int, decay: float, final: float
) -> None:
    cfg = OptimizerConfig(
        schedule=schedule,
        learning_rate=2.0,
        warmup_steps=min(warmup, steps),
        decay_fraction=decay,
        final_fraction=final,
    )
    got = np.asarray(learning_rate_schedule(cfg, steps)(np.arange(210)))
    assert np.isfinite(got).all() and (got >= 0).all() and (got <= 2.0 * 1.000001).all()
    if schedule != "wsd" or round(decay * steps) + cfg.warmup_for(steps) < steps:
        assert got[0] > 0


def test_a_schedule_is_traced_into_the_step() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(), 100)
    traced = jax.jit(schedule)(jnp.int32(37))
    assert traced.dtype == jnp.float32
    assert float(traced) == pytest.approx(float(schedule(37)), rel=1e-6)


# State trees


def test_adamw_state() -> None:
    wanted = {"0/count": (), **under("0/mu"), **under("0/nu"), "2/count": ()}
    assert state_shapes("adamw") == wanted


def test_lion_state() -> None:
    assert state_shapes("lion") == {"0/count": (), **under("0/mu"), "2/count": ()}


def test_sgd_state() -> None:
    assert state_shapes("sgd") == {**under("0/trace"), "2/count": ()}
    assert state_shapes("sgd", momentum=0.0) == {"1/count": ()}


def test_muon_state_keeps_adamw_moments_for_all_but_matrices() -> None:
    others = set(by_path(abstract_params())) - MATRICES
    muon, adam = (f"inner_states/{label}/inner_state" for label in ("muon", "adam"))
    assert state_shapes("muon") == {
        f"{adam}/0/count": (),
        **under(f"{adam}/0/mu", others),
        **under(f"{adam}/0/nu", others),
        f"{adam}/2/count": (),
        f"{muon}/0/count": (),
        **under(f"{muon}/0/mu", MATRICES),
        f"{muon}/3/count": (),
    }


def test_adafactor_state_is_factored_where_two_dims_are_large() -> None:
    row = {"embedding": (128,), "head": (128,), "layers/mlp/w_up": (2, 128)}
    col = {"embedding": (256,), "head": (256,), "layers/mlp/w_up": (2, 256)}
    whole = {path: leaf.shape for path, leaf in by_path(abstract_params()).items()}
    wanted: dict[str, tuple[int, ...]] = {"0/count": ()}
    wanted |= {f"0/v_row/{path}": row.get(path, (1,)) for path in whole}
    wanted |= {f"0/v_col/{path}": col.get(path, (1,)) for path in whole}
    wanted |= {f"0/v/{path}": (1,) if path in row else whole[path] for path in whole}
    assert state_shapes("adafactor") == {**wanted, "2/count": (), "3/inner_state/count": ()}
    momentum = {"2/count": (), "3/count": (), **under("3/ema"), "4/inner_state/count": ()}
    assert state_shapes("adafactor", momentum=0.9) == {**wanted, **momentum}


@each_name
def test_every_moment_gets_its_parameters_dims(name: OptimizerName) -> None:
    """What the layout of the state is resolved from: no array of any size is left unnamed."""
    settings: dict[str, Any] = {"momentum": 0.9} if name == "adafactor" else {}
    optimizer = make_optimizer(OptimizerConfig(name=name, **settings), 100, DIMS)
    state = jax.eval_shape(optimizer.init, abstract_params())
    for leaf in describe_optimizer(state, describe(abstract_params(), DIMS)):
        assert leaf.dims is not None or math.prod(leaf.shape) == 1, leaf


# Updates


def updates_of(cfg: OptimizerConfig, grads: Any, params: Any, count: int = 1) -> Any:
    optimizer = make_optimizer(cfg, 100, DIMS)
    state, updates = optimizer.init(params), None
    for _ in range(count):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
    return updates


@each_name
def test_weight_decay_is_decoupled_and_reaches_matrices_and_tables_only(
    name: OptimizerName,
) -> None:
    params, grads = random_tree(0), random_tree(1)
    settings: dict[str, Any] = {"name": name, "learning_rate": 0.5, "schedule": "constant"}
    settings["warmup_steps"] = 0
    with_decay = updates_of(OptimizerConfig(weight_decay=0.25, **settings), grads, params)
    without = updates_of(OptimizerConfig(weight_decay=0.0, **settings), grads, params)
    for path, param in by_path(params).items():
        decay = -0.5 * 0.25 * param if path in DECAYED else jnp.zeros_like(param)
        got = by_path(with_decay)[path] - by_path(without)[path]
        np.testing.assert_allclose(got, decay, atol=2e-6, err_msg=path)


@each_name
def test_the_learning_rate_of_the_schedule_is_used(name: OptimizerName) -> None:
    params, grads = random_tree(0), random_tree(1)
    settings: dict[str, Any] = {"name": name, "learning_rate": 0.5, "weight_decay": 0.0}
    first = updates_of(OptimizerConfig(warmup_steps=3, **settings), grads, params)
    full = updates_of(
        OptimizerConfig(warmup_steps=0, schedule="constant", **settings), grads, params
    )
    for path, update in by_path(full).items():
        np.testing.assert_allclose(by_path(first)[path], update / 4, rtol=1e-5, err_msg=path)


def test_muon_orthogonalises_each_layer_and_matches_the_size_of_adamw() -> None:
    params, grads = random_tree(0), random_tree(1)
    cfg = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0
    )
    updates = by_path(updates_of(cfg, grads, params))
    for path, fan_in, fan_out in (
        ("layers/attn/wq", 128, 64),
        ("layers/attn/wo", 64, 128),
        ("layers/mlp/w_up", 128, 256),
    ):
        for layer in range(2):
            matrix = np.asarray(updates[path][layer]).reshape(fan_in, fan_out)
            # Newton-Schulz in five steps leaves singular values within about 0.7 and 1.2 of 1.
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(fan_in, fan_out) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.3, path
            assert 0.12 < np.sqrt(np.mean(matrix**2)) < 0.25, path
    # Layers do not mix: the second layer's gradient leaves the first layer's update alone.
    other = jax.tree.map(lambda g: g.at[1].multiply(7.0) if g.shape[0] == 2 else g, grads)
    again = by_path(updates_of(cfg, other, params))
    np.testing.assert_allclose(again["layers/attn/wq"][0], updates["layers/attn/wq"][0], atol=1e-6)
    # The rest is AdamW, whose first update is the gradient over its own size.
    grad = grads["embedding"]
    wanted = -grad / (jnp.abs(grad) + 1e-8)
    np.testing.assert_allclose(updates["embedding"], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("adamw", {}, optax.scale_by_adam(0.9, 0.95, 1e-8)),
        ("adamw", {"b1": 0.8, "b2": 0.9, "eps": 0.1}, optax.scale_by_adam(0.8, 0.9, 0.1)),
        ("lion", {"b2": 0.9}, optax.scale_by_lion(0.9, 0.9)),
        ("sgd", {"momentum": 0.5}, optax.trace(0.5)),
    ],
    ids=["defaults of adamw", "adamw", "lion", "sgd"],
)
def test_settings_reach_optax(name: OptimizerName, settings: Any, wanted: Any) -> None:
    params, grads = random_tree(0), random_tree(1)
    cfg = OptimizerConfig(
        name=name,
        learning_rate=0.5,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        **settings,
    )
    oracle = optax.chain(wanted, optax.scale(-0.5))
    state = oracle.init(params)
    updates: Any = None
    for _ in range(2):
        updates, state = oracle.update(grads, state, params)
    got = updates_of(cfg, grads, params, count=2)
    for path, update in by_path(updates).items():
        np.testing.assert_allclose(by_path(got)[path], update, rtol=2e-5, atol=1e-7, err_msg=path)


@each_name
def test_updates_do_not_depend_on_the_layout(name: OptimizerName) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def placed(leaf: jax.Array) -> NamedSharding:
        dim = max(range(leaf.ndim), key=lambda dim: leaf.shape[dim])
        spec = [("fsdp", "data") if at == dim else None for at in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    optimizer = make_optimizer(OptimizerConfig(name=name), 100, DIMS)
    params, grads = random_tree(0), random_tree(1)

    @jax.jit
    def step(grads: Any, params: Any) -> Any:
        return optimizer.update(grads, optimizer.init(params), params)[0]

    whole = step(grads, params)
    split = step(*(jax.device_put(tree, jax.tree.map(placed, tree)) for tree in (grads, params)))
    for path, update in by_path(whole).items():
        scale = float(jnp.abs(update).max())
        np.testing.assert_allclose(by_path(split)[path], update, atol=1e-4 * scale, err_msg=path)
