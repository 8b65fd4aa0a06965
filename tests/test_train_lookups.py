"""Tables that rows are looked up in: found in a trace, their gradients not moved about."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import meshwright
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.lookups import looked_up

TOKENS = jax.ShapeDtypeStruct((2, 3), jnp.int32)
SHAPES = {
    "table": jax.ShapeDtypeStruct((9, 4), jnp.float32),
    "w": jax.ShapeDtypeStruct((4, 4), jnp.float32),
}


def rows(params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.take(params["table"].astype(jnp.bfloat16), tokens, axis=0)


def direct(params: Any, tokens: jax.Array) -> jax.Array:
    return rows(params, tokens) @ params["w"]


def in_jit(params: Any, tokens: jax.Array) -> jax.Array:
    return jax.jit(direct)(params, tokens)


def in_remat(params: Any, tokens: jax.Array) -> jax.Array:
    return jax.checkpoint(direct)(params, tokens)


def in_vmap(params: Any, tokens: jax.Array) -> jax.Array:
    return jax.vmap(lambda one: direct(params, one))(tokens)


def in_scan(params: Any, tokens: jax.Array) -> Any:
    return jax.lax.scan(lambda carry, one: (carry, direct(params, one)), 0, tokens)


def indexed(params: Any, tokens: jax.Array) -> jax.Array:
    return params["table"][tokens] @ params["w"]


@pytest.mark.parametrize("forward", [direct, in_jit, in_remat, in_vmap, in_scan, indexed])
def test_a_table_is_found_wherever_it_is_read(forward: Any) -> None:
    assert looked_up(forward, SHAPES, TOKENS) == [True, False]


def test_what_is_computed_first_is_no_table() -> None:
    def scaled(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.take(params["table"] @ params["w"], tokens, axis=0)

    assert looked_up(scaled, SHAPES, TOKENS) == [False, False]
    assert looked_up(lambda params, _: params["table"] @ params["w"], SHAPES, TOKENS) == [False] * 2


def test_embeddings_of_both_libraries_are_tables() -> None:
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.Embed(10, 4, rngs=nnx.Rngs(0))))
    assert looked_up(lambda s, t: nnx.merge(graph, s)(t), state, TOKENS) == [True]
    model = nn.Embed(10, 4)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    assert looked_up(model.apply, variables, TOKENS) == [True]


class Language(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.up(self.embed(tokens))


def test_a_plan_moves_no_token_gradients_to_a_tables_columns(
    devices: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = np.arange(16 * 8, dtype=np.int32).reshape(16, 8) % 64
    plan = meshwright.plan(
        Language,
        optimizer=optax.sgd(0.1),
        loss=lambda model, tokens: jnp.mean(model(tokens) ** 2),
        batch=tokens,
        mesh=MeshSpec.parse("data=2,fsdp=2,tensor=2").build(devices),
        dims={"embed/*": ("vocab", "embed"), "up/kernel": ("embed", "mlp"), "*": None},
    )
    kinds = {found.kind for found in plan.report().collectives}
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"}
    plan.lower().compile()
    assert "rematerialization" not in capfd.readouterr().err
    ours, alone = (
        jax.device_get(made.gradients(made.init(0), made.place(tokens))[1])
        for made in (plan, plan.one_device())
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
