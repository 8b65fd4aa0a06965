"""Grouped-query self-attention with rotary positions, and the cache that generation keeps.

Positions are an explicit [B, T] array, never implied by the place in the row, so that packed
documents, and sequences split over devices, rotate by the right angle.

One code path serves training and generation: with a cache, the new keys and values are first
written into it and the queries then attend to the cache instead. The cache holds all layers in
one array and travels through the stack of layers with the activations, each layer updating its
own slice; a separate cache a layer would need a second form of the layer loop.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from meshwright.models.config import ModelConfig
from meshwright.models.hooks import ATTENTION, Hooks
from meshwright.models.layers import Init, Norm, add_bias, residual_std

__all__ = ["Attention", "Cache", "Shared", "rope_frequencies", "rotate", "rotation"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, of every layer.

    Attributes:
        keys: [L, B, S, K, H].
        values: [L, B, S, K, H].
        filled: tokens written so far, int32 scalar.
        layer: the layer that reads and writes next, int32 scalar.
    """

    keys: Array
    values: Array
    filled: Array
    layer: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """A cache with room for ``length`` tokens in each of ``batch`` rows."""
        shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
        start = jnp.zeros((), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), start, start)

    def after(self, tokens: int) -> Cache:
        """The cache once every layer has written ``tokens`` tokens."""
        start = jnp.zeros_like(self.layer)
        return dataclasses.replace(self, filled=self.filled + tokens, layer=start)

    def write(self, k: Array, v: Array) -> Cache:
        """Put ``k`` and ``v`` [B, T, K, H] after the tokens so far, in the current layer."""
        start = (self.layer, 0, self.filled, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k[None], start),
            values=jax.lax.dynamic_update_slice(self.values, v[None], start),
        )

    def read(self) -> tuple[Array, Array]:
        """Keys and values [B, S, K, H] of the current layer."""
        return tuple(
            jax.lax.dynamic_index_in_dim(stacked, self.layer, keepdims=False)
            for stacked in (self.keys, self.values)
        )


@dataclass(frozen=True)
class Shared:
    """What every layer of one forward pass uses alike.

    Attributes:
        hooks: see `Hooks`.
        rotation: cosines and sines, each [B or 1, T, 1, H / 2] float32; None without RoPE.
        segments: each token's document, int32 [B, T]; None where each row is one.
        mask: True where a query may attend, [B, 1, T, S], besides; None for everywhere.
        causal: no query attends to what comes after it.
        length: name of the activations' second dim where heads, MLP or vocabulary may be split;
            None where it must stay whole.
    """

    hooks: Hooks
    rotation: tuple[Array, Array] | None
    segments: Array | None
    mask: Array | None
    causal: bool
    length: str | None

    @property
    def stream(self) -> tuple[str | None, ...]:
        """Dims of the residual stream, between the regions where ``inside`` holds."""
        return ("batch", self.length and "sequence", "embed")

    @property
    def inside(self) -> tuple[str | None, ...]:
        """Dims of what attention, MLP and head read."""
        return ("batch", self.length, "embed")


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each rotated pair, [H / 2] float32.

    ``rope_theta ** (-2 i / H)`` (Su et al. 2021, section 3.2.2), then the frequency scaling of
    Llama-3.1: wavelengths over ``original / low`` are stretched by ``factor``, those under
    ``original / high`` are kept, those between are interpolated in frequency (Meta,
    llama-models, `apply_scaling` in models/llama3/model.py, 2024).
    """
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_factor != 1:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_length * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies *= kept + (1 - kept) / config.rope_factor
    return frequencies.astype(np.float32)


def rotation(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H / 2] of ``positions`` [B, T], float32."""
    frequencies = rope_frequencies(config)[None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, by: tuple[Array, Array]) -> Array:
    """Rotate the heads ``x`` [B, T, N, H] by the angles of their positions.

    The pairs are (i, i + H / 2), as in the published Llama and Qwen weights for transformers;
    the paper's neighbouring pairs are the same model with permuted columns.
    """
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023); heads are dims of their own in the weights."""

    def __init__(self, config: ModelConfig, init: Init) -> None:
        self.config = config
        std, embed = config.init_std, config.embed
        queries = {"heads": config.heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        self.wq = init.normal("wq", std, embed=embed, **queries)
        self.wk = init.normal("wk", std, embed=embed, **keys)
        self.wv = init.normal("wv", std, embed=embed, **keys)
        self.wo = init.normal("wo", residual_std(config), **queries, embed=embed)
        self.bq = init.constant(0.0, **queries) if config.bias else None
        self.bk = init.constant(0.0, **keys) if config.bias else None
        self.bv = init.constant(0.0, **keys) if config.bias else None
        self.bo = init.constant(0.0, embed=embed) if config.bias else None
        self.q_norm = Norm(config, init.at("q_norm"), config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, init.at("k_norm"), config.head_dim) if config.qk_norm else None

    def __call__(
        self, x: Array, shared: Shared, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """Mix the positions of ``x`` [B, T, D].

        Args:
            x: activations [B, T, D].
            shared: rotation, mask and hooks.
            cache: where to put this layer's keys and values, and what to attend to.

        Returns:
            [B, T, D], and the cache with the new tokens written, at the next layer.
        """
        q, k, v = self._project(x, shared)
        if cache is not None:
            cache = cache.write(k, v)
            k, v = cache.read()
            cache = dataclasses.replace(cache, layer=cache.layer + 1)
        mixed = shared.hooks.attention(
            q,
            k,
            v,
            causal=shared.causal,
            scale=self.config.head_dim**-0.5,
            segments=shared.segments,
            mask=shared.mask,
        )
        mixed = shared.hooks.constrain(mixed, ("batch", shared.length, "heads", "head_dim"))
        mixed = checkpoint_name(mixed, ATTENTION)
        return add_bias(jnp.einsum("btnh,nhd->btd", mixed, self.wo[...]), self.bo), cache

    def _project(self, x: Array, shared: Shared) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normed and rotated."""
        q = add_bias(jnp.einsum("btd,dnh->btnh", x, self.wq[...]), self.bq)
        k = add_bias(jnp.einsum("btd,dkh->btkh", x, self.wk[...]), self.bk)
        v = add_bias(jnp.einsum("btd,dkh->btkh", x, self.wv[...]), self.bv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if shared.rotation is not None:
            q, k = rotate(q, shared.rotation), rotate(k, shared.rotation)
        constrain, length = shared.hooks.constrain, shared.length
        return (
            constrain(q, ("batch", length, "heads", "head_dim")),
            constrain(k, ("batch", length, "kv_heads", "head_dim")),
            constrain(v, ("batch", length, "kv_heads", "head_dim")),
        )
