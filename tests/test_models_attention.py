"""Rotations are relative, the scaling is Llama-3.1's, heads are grouped, caches are exact."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from meshwright.models import hooks
from meshwright.models.attention import Attention, Cache, Shared, rope_frequencies, rotate, rotation
from meshwright.models.config import named
from meshwright.models.hooks import Hooks, dot_product
from meshwright.models.layers import Init

SMALL = dataclasses.replace(named("tiny"), layers=1, embed=32, heads=4, kv_heads=2, head_dim=8)


_attend = jax.jit(functools.partial(dot_product, causal=True, scale=0.3))


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def _turn(x: jax.Array, positions: jax.Array) -> jax.Array:
    return rotate(x, rotation(SMALL, positions))


@settings(max_examples=20, deadline=None)
@given(query=st.integers(0, 200), key=st.integers(0, 200), shift=st.integers(0, 500))
def test_scores_depend_on_distance_alone(query: int, key: int, shift: int) -> None:
    q, k = _normal(0, 1, 1, 1, 8), _normal(1, 1, 1, 1, 8)

    def score(m: int, n: int) -> jax.Array:
        return jnp.sum(_turn(q, np.array([[m]])) * _turn(k, np.array([[n]])))

    # float32 angles near 700 radians carry an error near 1e-4.
    np.testing.assert_allclose(score(query, key), score(query + shift, key + shift), atol=2e-3)


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = _normal(0, 2, 5, 4, 8)
    turned = _turn(x, np.arange(5)[None])
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert _turn(jnp.asarray(x, jnp.bfloat16), np.arange(5)[None]).dtype == jnp.bfloat16


def test_frequency_scaling_is_the_piecewise_one() -> None:
    """Against the published definition, written with its three branches."""
    config = named("llama-1b")
    original, factor, low, high = 8192, 32.0, 1.0, 4.0
    expected = []
    for pair in range(config.head_dim // 2):
        frequency = 500_000.0 ** (-2 * pair / config.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
    unscaled = rope_frequencies(dataclasses.replace(config, rope_factor=1.0))
    assert unscaled[0] == 1 and unscaled[-1] / expected[-1] == pytest.approx(32)


def test_grouped_heads_equal_repeated_ones() -> None:
    q, k, v = _normal(0, 2, 6, 4, 8), _normal(1, 2, 6, 2, 8), _normal(2, 2, 6, 2, 8)
    repeated = _attend(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2))
    grouped = _attend(q, k, v)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-5, atol=1e-6)


def test_attention_is_its_formula() -> None:
    q, k, v = (np.asarray(_normal(seed, 1, 5, 1, 8), np.float64) for seed in range(3))
    scores = 0.3 * q[0, :, 0] @ k[0, :, 0].T
    scores[np.triu_indices(5, 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v[0, :, 0]
    got = _attend(*map(np.float32, (q, k, v)))
    np.testing.assert_allclose(got[0, :, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_cache_filled_in_pieces_gives_the_whole() -> None:
    attention = Attention(SMALL, Init(jax.random.key(0)))

    @jax.jit
    def whole(x: jax.Array, positions: jax.Array) -> jax.Array:
        shared = Shared(Hooks(), rotation(SMALL, positions), None, None, True, "length")
        return attention(x, shared)[0]

    @jax.jit
    def piece(x: jax.Array, at: jax.Array, cache: Cache) -> tuple[jax.Array, Cache | None]:
        mask = (jnp.arange(8)[None, None] <= at[:, :, None])[:, None]
        return attention(x, Shared(Hooks(), rotation(SMALL, at), None, mask, False, None), cache)

    x, positions = _normal(1, 2, 6, 32), np.arange(6)[None]
    cache, pieces = Cache.empty(SMALL, 2, 8, jnp.dtype(jnp.float32)), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        out, written = piece(x[:, start:stop], positions[:, start:stop], cache)
        assert written is not None and int(written.layer) == 1
        cache = written.after(stop - start)
        pieces.append(out)
    assert int(cache.filled) == 6 and int(cache.layer) == 0
    expected = whole(x, positions)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "head_dim", "serves"),
    [
        ("cpu", "9.0", jnp.bfloat16, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 64, True),
        ("gpu", "9.0", jnp.bfloat16, 256, True),
        ("gpu", "8.0", jnp.float16, 128, True),
        ("gpu", "8.0", jnp.bfloat16, 256, False),
        ("gpu", "9.0", jnp.bfloat16, 60, False),
        ("gpu", "9.0", jnp.float32, 64, False),
        ("gpu", "7.5", jnp.float16, 64, False),
        ("gpu", "gfx942", jnp.bfloat16, 64, False),
        ("tpu", "", jnp.bfloat16, 128, False),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel_is_asked_for_where_it_exists(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    capability: str,
    dtype: jnp.dtype,
    head_dim: int,
    serves: bool,
    masked: bool,
) -> None:
    asked = []

    def attend(q: jax.Array, *rest: jax.Array, **options: object) -> jax.Array:
        asked.append(options["implementation"])
        return q

    monkeypatch.setattr(hooks.jax, "default_backend", lambda: backend)
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(hooks.jax, "devices", lambda: [device])
    monkeypatch.setattr(hooks.jax.nn, "dot_product_attention", attend)
    q = np.zeros((1, 2, 1, head_dim), dtype)
    mask = np.ones((1, 1, 2, 2), bool) if masked else None
    dot_product(q, q, q, mask=mask, causal=True, scale=1.0)  # type: ignore[arg-type]
    assert asked == ["cudnn" if serves and not masked else "xla"]
