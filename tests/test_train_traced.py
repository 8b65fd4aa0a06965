"""The two halves of a derivative against `jax.grad`, and what lies between them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.train.traced import Halves, Picked


def layers(params: dict[str, jax.Array], x: list[jax.Array], data: jax.Array) -> Any:
    """A scan of recomputed layers, with a cast of each weight, and a loss."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)) * data, None

    y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x[0], params["w"])
    return ([y], jnp.sum(y**2)), jnp.sum(data)


def arguments() -> tuple[dict[str, jax.Array], list[jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 5, 5)), "unread": rng.normal(size=(7,))}
    floats = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    return floats, [jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)], jnp.float32(0.7)


def test_halves_are_the_gradient() -> None:
    params, x, data = arguments()
    halves = Halves(layers, params, x, data)
    result, rest, kept = jax.jit(halves.forward)(params, x, data)
    (expected, _), same = layers(params, x, data)
    np.testing.assert_allclose(result[0], expected[0], rtol=1e-6)
    assert rest == same

    def total(params: Any, x: Any) -> jax.Array:
        (y, loss), _ = layers(params, x, data)
        return jnp.sum(2.0 * y[0]) + 3.0 * loss

    found = jax.jit(halves.backward)(params, kept, [jnp.full((4, 5), 2.0)], jnp.float32(3.0))
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.grad(total, (0, 1))(params, x)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_weights_are_not_kept_with_each_microbatch() -> None:
    params, x, data = arguments()
    halves = Halves(layers, params, x, data)
    assert [leaf.shape for leaf in halves.kept if leaf.shape[-2:] == (5, 5)] == []
    assert (3, 4, 5) in [leaf.shape for leaf in halves.kept], "inputs of the layers"


def test_what_is_not_read_is_left_out() -> None:
    params, x, data = arguments()
    picked = Picked.of(layers, params, x, data)
    assert picked.used == (False, True)
    assert [leaf.shape for leaf in picked.pick(params)] == [(3, 5, 5)]
    whole = picked.whole([params["w"] * 2])
    np.testing.assert_array_equal(whole["w"], params["w"] * 2)
    assert not whole["unread"].any()
    assert picked.put(params, [0])["unread"] is params["unread"]
