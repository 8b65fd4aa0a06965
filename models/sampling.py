"""Continue a prompt: one compiled program that reads it, then loops over the new tokens.

The prompt is read in one pass that fills a cache of keys and values; each new token is then
one pass over a single position. Both go through the model's own blocks, so what is sampled is
what was trained. All rows have prompts of one length: rows of unequal length would need
left-padding and a mask, and the samples that a training run prints do not.

The parameters may be sharded: the program is an ordinary jitted function of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meshwright.models.attention import Cache
from meshwright.models.hooks import Hooks
from meshwright.models.pure import Functional
from meshwright.sharding.errors import ConfigError

__all__ = ["generate", "sample"]


def generate(
    functional: Functional,
    params: dict[str, Any],
    prompt: Array | np.ndarray,
    *,
    steps: int,
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    hooks: Hooks | None = None,
) -> Array:
    """Extend every row of ``prompt`` by ``steps`` tokens.

    Args:
        functional: the model.
        params: its parameters; the cache takes their dtype.
        prompt: int32 [B, P], P at least 1.
        steps: new tokens a row, at least 1.
        key: randomness; needed where the temperature is above 0.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens; None for all.
        hooks: where parallelism steps in; the single-device defaults if None.

    Returns:
        int32 [B, P + steps], the prompt included.

    Raises:
        ConfigError: a value out of range, a sequence longer than the model reads, or sampling
            without a key.

    >>> from meshwright.models.config import named
    >>> from meshwright.models.pure import functional
    >>> model = functional(named("tiny"))
    >>> params = model.init(jax.random.key(0))
    >>> generate(model, params, jnp.ones((1, 3), jnp.int32), steps=5).shape
    (1, 8)
    """
    _check(functional, prompt, steps=steps, key=key, temperature=temperature, top_k=top_k)
    return _generate(
        params,
        jnp.asarray(prompt, jnp.int32),
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        functional=functional,
        steps=steps,
        greedy=temperature == 0,
        top_k=top_k,
        hooks=hooks or Hooks(),
    )


def sample(logits: Array, key: Array, temperature: Array, *, top_k: int | None) -> Array:
    """Draw token ids int32 [B] from ``logits`` [B, V], among the ``top_k`` likeliest.

    Equally likely tokens at the edge of ``top_k`` all stay in.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        edge = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < edge, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("functional", "steps", "greedy", "top_k", "hooks"))
def _generate(
    params: dict[str, Any],
    prompt: Array,
    key: Array,
    temperature: Array,
    *,
    functional: Functional,
    steps: int,
    greedy: bool,
    top_k: int | None,
    hooks: Hooks,
) -> Array:
    def choose(logits: Array, step: Array | int) -> Array:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(logits, jax.random.fold_in(key, step), temperature, top_k=top_k)

    def advance(carry: tuple[Array, Cache], step: Array) -> tuple[tuple[Array, Cache], Array]:
        token, cache = carry
        logits, cache = functional.extend(params, token[:, None], cache, hooks=hooks)
        following = choose(logits, step)
        return (following, cache), following

    batch, length = prompt.shape
    # The last token is returned unread, so the cache needs no room for it.
    cache = functional.empty_cache(params, batch, length + steps - 1)
    logits, cache = functional.extend(params, prompt, cache, hooks=hooks)
    first = choose(logits, 0)
    _, rest = jax.lax.scan(advance, (first, cache), jnp.arange(1, steps))
    return jnp.concatenate((prompt, first[:, None], rest.T), axis=1)


def _check(
    functional: Functional,
    prompt: Array | np.ndarray,
    *,
    steps: int,
    key: Array | None,
    temperature: float,
    top_k: int | None,
) -> None:
    what, config = f"cannot generate with the model `{functional.config.name}`", functional.config
    shape = "×".join(str(size) for size in prompt.shape)
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ConfigError(
            what,
            where=f"prompt of shape {shape or 'scalar'}",
            why="a prompt is [rows, tokens] with at least one token a row",
            fix="add a dim for the rows, or begin with a newline",
        )
    if steps < 1:
        raise ConfigError(what, where=f"steps={steps}", why="no new token", fix="use 1 or more")
    length = prompt.shape[1] + steps
    if length > config.max_length:
        raise ConfigError(
            what,
            where=f"prompt {shape}, steps={steps}, max_length={config.max_length}",
            why=f"{prompt.shape[1]} + {steps} = {length} tokens are more than the model reads",
            fix=f"use at most {max(config.max_length - prompt.shape[1], 0)} steps",
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            what, where=f"temperature={temperature}", why="not a number of 0 or more", fix="use 0.8"
        )
    if temperature > 0 and key is None:
        raise ConfigError(
            what,
            where=f"temperature={temperature}, no key",
            why="sampling needs randomness",
            fix="pass key=jax.random.key(0), or temperature=0",
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(what, where=f"top_k={top_k}", why="no token left", fix="use 1 or more")
