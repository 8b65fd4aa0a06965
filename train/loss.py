"""The language-model loss: weighted cross-entropy that never needs whole logits.

With logits l over the vocabulary, target y, ε label smoothing and weight w a token::

    loss = Σ w [ lse(l) - (1-ε) l_y - ε mean(l) + ζ lse(l)² ] / Σ w

The target's logit is picked by a masked sum over the vocabulary instead of an indexed read: when
the vocabulary is split over a mesh axis, a masked sum stays split and ends in one scalar a token
on the wire, where an indexed read makes the partitioner gather the logits. The z-loss term is
that of PaLM (Chowdhery et al., 2022, section 5); label smoothing of Szegedy et al., 2016.

Sums are returned, not means: the caller divides by the weight of the *global* batch, so padded
or masked rows do not bias the mean however they fall on devices and microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["chunked_loss_sum", "token_loss_sum"]


def chunked_loss_sum(
    x: jax.Array,
    project: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunks: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """As `token_loss_sum` of ``project(x)``, with the logits of one chunk in memory at a time.

    The backward pass projects each chunk again: one more matmul with the head in exchange for
    logits and their gradient of length / chunks.

    Args:
        x: the stream [batch, length, embed].
        project: [batch, part, embed] → float32 logits.
        targets, weights: [batch, length].
        chunks: parts of the length; divides it.
        z_loss, label_smoothing: see `token_loss_sum`.
    """
    how = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    if chunks == 1:
        return token_loss_sum(project(x), targets, weights, **how)
    length = x.shape[1] // chunks

    def cut(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y.reshape(y.shape[0], chunks, length, *y.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_loss_sum(project(x), targets, weights, **how)

    def add(totals: tuple[jax.Array, jax.Array], part: Any) -> Any:
        return tuple(a + b for a, b in zip(totals, one(*part), strict=True)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), (cut(x), cut(targets), cut(weights)))[0]


def token_loss_sum(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sum the weighted loss of all tokens.

    Args:
        logits: float32 [batch, length, vocab].
        targets: int32 [batch, length].
        weights: float32 [batch, length], 0 for tokens that must not count.
        z_loss: ζ of the formula above.
        label_smoothing: ε of the formula above.

    Returns:
        (training loss, plain cross-entropy), both summed, float32 scalars. They are equal
        without z-loss and smoothing; evaluations report the plain one.

    >>> logits = jnp.zeros((1, 2, 4))
    >>> ones = jnp.ones((1, 2))
    >>> total, plain = token_loss_sum(logits, jnp.zeros((1, 2), int), ones)
    >>> bool(jnp.allclose(total, 2 * jnp.log(4.0)))
    True
    """
    vocab = logits.shape[-1]
    lse = jax.nn.logsumexp(logits, axis=-1)
    classes = jnp.arange(vocab, dtype=targets.dtype)[None, None]
    hit = classes == targets[..., None]
    label = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    plain = jnp.sum(weights * (lse - label))
    if not (z_loss or label_smoothing):
        return plain, plain
    token = lse - (1 - label_smoothing) * label
    if label_smoothing:
        token = token - label_smoothing * jnp.mean(logits, axis=-1)
    if z_loss:
        token = token + z_loss * jnp.square(lse)
    return jnp.sum(weights * token), plain
