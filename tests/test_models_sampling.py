"""What the cached loop writes is what the whole forward pass would have chosen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.config import ModelConfig, named
from meshwright.models.pure import functional
from meshwright.models.sampling import generate, sample
from meshwright.sharding.errors import ConfigError

SIZES = {"layers": 2, "embed": 32, "heads": 4, "head_dim": 8, "mlp": 48, "vocab_size": 64}
FAMILIES: dict[str, ModelConfig] = {
    "llama": dataclasses.replace(named("llama-1b"), **SIZES, kv_heads=2, rope_original_length=8),
    "qwen": dataclasses.replace(named("qwen3-0.6b"), **SIZES, kv_heads=2, tied=False),
    "gpt2": dataclasses.replace(named("gpt2-124m"), **SIZES, kv_heads=4, max_length=32),
}
PROMPT = np.random.default_rng(1).integers(0, 64, (2, 5), np.int32)


@functools.cache
def _params(config: ModelConfig) -> dict[str, Any]:
    # Larger than initial ones, so that the likeliest token is not just the last one again.
    random = np.random.default_rng(0)
    shapes = functional(config).shapes
    return jax.tree.map(lambda leaf: np.float32(random.normal(0, 0.3, leaf.shape)), shapes)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_greedy_tokens_are_those_of_the_whole_forward_pass(config: ModelConfig) -> None:
    model, params = functional(config), _params(config)
    written = generate(model, params, PROMPT, steps=9)
    assert written.shape == (2, 14) and written.dtype == jnp.int32
    np.testing.assert_array_equal(written[:, :5], PROMPT)
    # Causal: the logits of the whole text hold every choice at once.
    logits = jax.jit(model.apply)(params, written)
    np.testing.assert_array_equal(written[:, 5:], jnp.argmax(logits[:, 4:-1], axis=-1))
    assert len(np.unique(written[:, 5:])) > 2


def test_one_step_and_one_token_of_prompt() -> None:
    model = functional(FAMILIES["gpt2"])
    params = _params(FAMILIES["gpt2"])
    one = generate(model, params, PROMPT[:, :1], steps=1)
    np.testing.assert_array_equal(one, generate(model, params, PROMPT[:, :1], steps=6)[:, :2])


def test_up_to_the_longest_sequence() -> None:
    model = functional(FAMILIES["gpt2"])
    assert generate(model, _params(FAMILIES["gpt2"]), PROMPT, steps=27).shape == (2, 32)


def test_sampling_is_repeatable_and_follows_the_key() -> None:
    model, params = functional(FAMILIES["llama"]), _params(FAMILIES["llama"])

    def draw(seed: int) -> jax.Array:
        return generate(
            model, params, PROMPT, steps=9, key=jax.random.key(seed), temperature=1.0, top_k=20
        )

    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))


def test_the_likeliest_of_one_is_greedy() -> None:
    model, params = functional(FAMILIES["llama"]), _params(FAMILIES["llama"])
    sampled = generate(
        model, params, PROMPT, steps=9, key=jax.random.key(0), temperature=2.0, top_k=1
    )
    np.testing.assert_array_equal(sampled, generate(model, params, PROMPT, steps=9))


def test_samples_follow_the_cut_distribution() -> None:
    logits = jnp.tile(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), (20_000, 1))
    drawn = sample(logits, jax.random.key(0), jnp.float32(1.0), top_k=2)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0, 0, 3 / 7, 4 / 7], atol=0.02)
    drawn = sample(logits, jax.random.key(0), jnp.float32(0.5), top_k=None)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(shares, np.array([1, 4, 9, 16]) / 30, atol=0.02)


def test_sharded_parameters_write_the_same_text() -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    config = FAMILIES["qwen"]
    model, params = functional(config), _params(config)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    split = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda dims: NamedSharding(
            mesh, PartitionSpec(*("data" if dim == "embed" else split.get(dim) for dim in dims))
        ),
        model.dims,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    sharded = generate(model, jax.device_put(params, shardings), PROMPT, steps=9)
    np.testing.assert_array_equal(sharded, generate(model, params, PROMPT, steps=9))


def test_the_cache_takes_the_dtype_of_the_parameters() -> None:
    config = FAMILIES["llama"]
    half = jax.tree.map(jnp.bfloat16, _params(config))
    assert functional(config).empty_cache(half, 2, 8).keys.dtype == jnp.bfloat16
    assert generate(functional(config), half, PROMPT, steps=3).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 0}, "use 1 or more"),
        ({"steps": 28}, r"5 \+ 28 = 33 tokens[^!]*use at most 27 steps"),
        ({"temperature": -1.0}, "not a number of 0 or more"),
        ({"temperature": float("nan")}, "not a number of 0 or more"),
        ({"temperature": 1.0}, "sampling needs randomness"),
        ({"top_k": 0}, "no token left"),
        ({"prompt": PROMPT[0]}, "add a dim for the rows"),
        ({"prompt": PROMPT[:, :0]}, "at least one token"),
    ],
)
def test_what_cannot_be_generated_is_refused(change: dict[str, Any], text: str) -> None:
    config = FAMILIES["gpt2"]
    arguments = {"prompt": PROMPT, "steps": 3} | change
    with pytest.raises(ConfigError, match=text):
        generate(functional(config), {}, **arguments)
