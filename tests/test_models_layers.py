"""Initial values depend on key, path and layer alone; norms are their formulas."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.config import ModelConfig, named
from meshwright.models.hooks import Hooks
from meshwright.models.layers import Init, Mlp, Norm, draw_normal, float32_logits, residual_std
from meshwright.models.pure import functional

TINY = dataclasses.replace(named("tiny"), layers=2, embed=32, mlp=64, heads=4, kv_heads=2)
GPT2 = dataclasses.replace(
    named("gpt2-124m"), layers=2, embed=32, mlp=64, heads=4, kv_heads=4, head_dim=8, vocab_size=64
)


@functools.cache
def _init(config: ModelConfig) -> dict[str, Any]:
    return jax.jit(functional(config).init)(jax.random.key(3))


@pytest.mark.smoke
def test_drawn_values_are_these_on_any_jax() -> None:
    drawn = [float(value).hex() for value in draw_normal(jax.random.key(0), (3,), 1.0)]
    assert drawn == ["0x1.785c3c0000000p-2", "-0x1.caf43a0000000p+0", "-0x1.6092ce0000000p-4"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "spec", [jax.P("a"), jax.P("b"), jax.P("a", "b"), jax.P(None, ("a", "b"))], ids=str
)
def test_drawn_values_do_not_depend_on_the_shape_of_a_shard(spec: jax.P) -> None:
    """The last split leaves 4 elements a row: narrower than a CPU's vectors."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=axes)
    draw = functools.partial(draw_normal, shape=(64, 32), std=0.02)
    split = jax.jit(draw, out_shardings=jax.NamedSharding(mesh, spec))(jax.random.key(5))
    np.testing.assert_array_equal(split, jax.jit(draw)(jax.random.key(5)))


def test_drawn_values_are_a_bell_curve() -> None:
    drawn = np.asarray(draw_normal(jax.random.key(1), (400, 500), 2.0), np.float64) / 2
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    assert abs((drawn**3).mean()) < 0.03  # symmetric
    assert abs((drawn**4).mean() - 2.85) < 0.05  # 3 - 6 / (5 * 8): eight summed uniforms
    assert np.abs(drawn).max() < 4.9
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.01


def test_a_layer_does_not_depend_on_how_many_follow() -> None:
    deep, shallow = _init(dataclasses.replace(TINY, layers=5)), _init(TINY)
    first = jax.tree.map(lambda leaf: np.array(leaf[:2]), deep["layers"])
    # The output projections are scaled by depth, and by nothing else.
    for part, name in (("attn", "wo"), ("mlp", "w_down")):
        first[part][name] *= np.sqrt(5 / 2)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(shallow["layers"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(first["attn"]["wq"], shallow["layers"]["attn"]["wq"])
    np.testing.assert_array_equal(deep["embedding"], shallow["embedding"])


def test_adding_a_module_changes_no_other_parameter() -> None:
    plain = _init(TINY)
    more = _init(dataclasses.replace(TINY, qk_norm=True, tied=False, bias=True))
    np.testing.assert_array_equal(plain["embedding"], more["embedding"])
    np.testing.assert_array_equal(plain["layers"]["mlp"]["w_up"], more["layers"]["mlp"]["w_up"])


def test_no_two_parameters_or_layers_share_values() -> None:
    layers = _init(TINY)["layers"]
    assert not np.array_equal(layers["attn"]["wq"][0], layers["attn"]["wq"][1])
    assert not np.array_equal(layers["attn"]["wk"], layers["attn"]["wv"])
    assert not np.array_equal(layers["mlp"]["w_gate"], layers["mlp"]["w_up"])


def test_deviations_are_the_stated_ones() -> None:
    params = _init(TINY)
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["layers"]["mlp"]["w_down"]) == pytest.approx(0.02 / 2, rel=0.05)
    assert residual_std(TINY) == pytest.approx(0.02 / 2)


def test_gpt2_starts_with_ones_and_zeros() -> None:
    norm, mlp = Norm(GPT2, Init(jax.random.key(0)), 32), Mlp(GPT2, Init(jax.random.key(0)))
    assert norm.bias is not None and mlp.b_up is not None and mlp.b_down is not None
    assert np.all(norm.scale[...] == 1)
    assert not any(np.any(bias[...]) for bias in (norm.bias, mlp.b_up, mlp.b_down))


def test_norms_are_their_formulas() -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 32))
    rms = Norm(TINY, Init(jax.random.key(0)), 32)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + TINY.norm_eps)
    np.testing.assert_allclose(rms(jnp.float32(x)), expected, rtol=1e-5)

    layer = Norm(GPT2, Init(jax.random.key(0)), 32)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + GPT2.norm_eps)
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


def test_norm_computes_in_float32_and_keeps_the_dtype() -> None:
    x = (300 + jnp.arange(32.0)).astype(jnp.bfloat16)[None, None]
    norm = Norm(TINY, Init(jax.random.key(0)), 32)
    wide = norm(x.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), wide.astype(jnp.bfloat16))


def test_the_mlp_names_its_hidden_dim() -> None:
    seen: list[tuple[str | None, ...]] = []

    def constrain(x: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
        seen.append(dims)
        return x

    for config in (TINY, GPT2):
        mlp = Mlp(config, Init(jax.random.key(0)))
        hooks = Hooks(constrain=constrain)
        jax.eval_shape(lambda mlp=mlp, hooks=hooks: mlp(jnp.ones((1, 2, 32)), hooks, "length"))
    assert seen == [("batch", "length", "mlp")] * 2


def test_gradients_of_logits_are_made_together() -> None:
    # Else a compiler may put that of the weights off, and the logits stay in memory.
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(float32_logits("btd,dv->btv", x, weights))

    x, weights = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)
    (barrier,) = [eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier"]
    assert barrier.outvars == program.jaxpr.outvars
    assert [made.aval.shape for made in barrier.invars] == [x.shape, weights.shape]
