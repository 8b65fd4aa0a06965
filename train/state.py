"""Everything a run carries from step to step, as one pytree.

The state is an ordinary frozen dataclass registered with jax, so users can build, inspect,
donate and checkpoint it with jax's own tools. It is born sharded: `init_state` runs under jit
with the layout's shardings as outputs, so a 70B model's masters never exist whole anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.placement import init_sharded
from meshwright.train.layout import Layout

__all__ = ["TrainState", "abstract_state", "init_state", "state_shardings"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Master parameters, optimizer state and counters: arrays, their shapes or their shardings.

    Attributes:
        step: int32, optimizer steps finished, skipped ones included.
        params: float32 master parameters, nested dicts.
        opt_state: the optax state.
        key: the run's RNG key; steps fold their number into it.
        grad_norm_mean: float32, running mean of accepted gradient norms (0 before the first).
        skipped: int32, steps whose update was skipped, in all.
        bad_in_row: int32, skipped steps in a row, up to now.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any
    grad_norm_mean: Any
    skipped: Any
    bad_in_row: Any


def _build(
    init_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params_key, run_key = jax.random.split(key)
    params = init_params(params_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=run_key,
        grad_norm_mean=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
        bad_in_row=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    init_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state as ShapeDtypeStructs; computes and allocates nothing."""
    return jax.eval_shape(lambda: _build(init_params, optimizer, jax.random.key(0)))


def state_shardings(state: TrainState, layout: Layout, mesh: Mesh) -> TrainState:
    """The NamedSharding of every leaf of a state.

    Args:
        state: a state or its shapes.
        layout: resolved layouts of the same parameters and optimizer.
        mesh: built mesh.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=whole,
        params=layout.masters.shardings(state.params, mesh),
        opt_state=layout.moments.shardings(state.opt_state, mesh),
        key=whole,
        grad_norm_mean=whole,
        skipped=whole,
        bad_in_row=whole,
    )


def init_state(
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """Build the first state, born in ``shardings``; values depend on the seed alone.

    Args:
        init_params: key → nested dict of float32 parameters.
        optimizer: its ``init`` builds the moments.
        seed: of the whole run.
        shardings: from `state_shardings`.
    """
    key = jax.random.key(seed)
    return init_sharded(lambda key: _build(init_params, optimizer, key), key, shardings=shardings)
