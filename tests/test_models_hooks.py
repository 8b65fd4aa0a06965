"""The layer loop equals a Python loop; what backward keeps does not change its numbers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from meshwright.models.config import Remat, named
from meshwright.models.hooks import Hooks, LayerBody, rematerialise, scan_layers
from meshwright.models.pure import functional

SMALL = dataclasses.replace(
    named("tiny"), layers=3, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64
)
TOKENS: Any = np.random.default_rng(9).integers(0, 256, (2, 12), np.int32)


def _params() -> Any:
    random = np.random.default_rng(0)
    shapes = functional(SMALL).shapes
    return jax.tree.map(lambda leaf: np.float32(random.normal(0, 0.1, leaf.shape)), shapes)


def _loop(body: LayerBody, stacked: Any, x: Any, remat: Remat) -> Any:
    del remat
    for layer in range(jax.tree.leaves(stacked)[0].shape[0]):
        x = body(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
    return x


def _loss(config: Any, params: Any, hooks: Hooks) -> jax.Array:
    return jnp.mean(jnp.square(functional(config).apply(params, TOKENS, hooks=hooks)))


def _assert_close(a: Any, b: Any, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(np.abs(y).max()))


def test_the_scan_equals_a_python_loop() -> None:
    model = functional(SMALL)
    params = _params()
    looping = functools.partial(model.apply, hooks=Hooks(run_layers=_loop))
    scanned, looped = jax.jit(model.apply)(params, TOKENS), jax.jit(looping)(params, TOKENS)
    np.testing.assert_allclose(scanned, looped, atol=1e-6)


def test_recomputing_gives_the_same_gradients() -> None:
    params = _params()
    gradient = jax.jit(jax.grad(_loss, argnums=1), static_argnums=(0, 2))
    kept = gradient(SMALL, params, Hooks())
    for remat in ("full", "dots"):
        recomputed = gradient(dataclasses.replace(SMALL, remat=remat), params, Hooks())
        _assert_close(recomputed, kept, 1e-6)


def test_each_policy_keeps_less_than_the_one_before() -> None:
    params = functional(SMALL).shapes

    def kept(remat: Remat) -> int:
        config = dataclasses.replace(SMALL, remat=remat)

        def outputs(params: Any) -> Any:
            return jax.vjp(lambda params: _loss(config, params, Hooks()), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(outputs, params)))

    sizes = {remat: kept(remat) for remat in get_args(Remat)}
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def _equations(jaxpr: Any) -> int:
    inner = [sub for eqn in jaxpr.eqns for sub in core.jaxprs_in_params(eqn.params)]
    return len(jaxpr.eqns) + sum(map(_equations, inner))


@pytest.mark.parametrize("remat", get_args(Remat))
def test_the_traced_program_does_not_grow_with_the_layers(remat: Remat) -> None:
    def traced(layers: int) -> int:
        config = dataclasses.replace(SMALL, layers=layers, remat=remat)
        loss = lambda params: _loss(config, params, Hooks())  # noqa: E731
        return _equations(jax.make_jaxpr(jax.grad(loss))(functional(config).shapes).jaxpr)

    assert traced(64) == traced(2)


def test_the_loop_carries_any_tree() -> None:
    def body(x: dict[str, jax.Array], scale: jax.Array) -> dict[str, jax.Array]:
        return {"sum": x["sum"] + scale, "count": x["count"] + 1}

    start = {"sum": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
    end = scan_layers(body, jnp.arange(4.0), start, "full")
    assert float(end["sum"]) == 6 and int(end["count"]) == 4


def test_no_recomputation_is_the_body_itself() -> None:
    def body(x: Any, layer: Any) -> Any:
        return x + layer

    assert rematerialise(body, "none") is body
