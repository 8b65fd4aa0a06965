"""The decoder transformer: Llama-3, Qwen-3 or GPT-2 as its configuration says.

The layers are one block whose every parameter has a first dim ``layers``. Applying them is a
loop over that dim, so tracing and compiling take the same time for 4 layers as for 126, and
a sharding rule names a parameter once instead of once a layer. The cost: layers that differ
from each other cannot be expressed; a list of blocks could, at a compile time that grows.

Norms, softmax, rotations and logits are float32; all else is in the dtype of the parameters.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from meshwright.models.attention import Attention, Cache, Shared, rotation
from meshwright.models.config import ModelConfig
from meshwright.models.hooks import Hooks, take_rows
from meshwright.models.layers import Init, Mlp, Norm, float32_logits
from meshwright.sharding.errors import ConfigError

__all__ = ["Block", "Decoder"]


class Block(nnx.Module):
    """Attention and MLP, each on a normed copy of the residual stream (pre-norm)."""

    def __init__(self, config: ModelConfig, init: Init) -> None:
        self.attn_norm = Norm(config, init.at("attn_norm"), config.embed)
        self.attn = Attention(config, init.at("attn"))
        self.mlp_norm = Norm(config, init.at("mlp_norm"), config.embed)
        self.mlp = Mlp(config, init.at("mlp"))

    def __call__(
        self, x: Array, shared: Shared, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """Add one layer's work to the stream ``x`` [B, T, D]; see `Attention` for the cache."""
        dims = ("batch", shared.length, "embed")
        mixed, cache = self.attn(self.attn_norm(x), shared, cache)
        x = shared.hooks.constrain(x + mixed, dims)
        worked = self.mlp(self.mlp_norm(x), shared.hooks, shared.length)
        return shared.hooks.constrain(x + worked, dims), cache


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: sizes and choices.
        rngs: one ``params`` key is drawn from it; see `Init` for how it spreads.

    >>> from meshwright.models.config import named
    >>> decoder = Decoder(named("tiny"), nnx.Rngs(0))
    >>> decoder(jnp.zeros((2, 16), jnp.int32)).shape
    (2, 16, 256)
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        init = Init(rngs.params())
        std, embed = config.init_std, config.embed
        self.embedding = init.normal("embedding", std, vocab=config.vocab_size, embed=embed)
        learned = config.positions == "learned"
        self.positions = (
            init.normal("positions", std, positions=config.max_length, embed=embed)
            if learned
            else None
        )
        self.layers = Block(config, init.at("layers", layers=config.layers))
        self.final_norm = Norm(config, init.at("final_norm"), embed)
        self.head = (
            None if config.tied else init.normal("head", std, embed=embed, vocab=config.vocab_size)
        )

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        hooks: Hooks | None = None,
    ) -> Array:
        """Score every possible next token at every position.

        Args:
            tokens: int32 [B, T], T at most ``max_length``; ids past the vocabulary are read
                as its last.
            positions: int32 [B, T], each token's place in its document; 0, 1, 2, … if None.
            segments: int32 [B, T], each token's document; tokens attend within their own
                only. None: each row is one document, and no mask is built, so that a fused
                causal kernel can serve.
            hooks: where parallelism steps in; the single-device defaults if None.

        Returns:
            Logits float32 [B, T, V], or what ``hooks.score`` makes of them.

        Raises:
            ConfigError: more tokens than ``max_length``.
        """
        hooks = hooks or Hooks()
        length = tokens.shape[1]
        self._check_length(length)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        mask = None
        if segments is not None:
            mask = segments[:, None, :, None] == segments[:, None, None, :]
        shared = self._shared(positions, hooks, mask=mask, causal=True, length="length")

        graph, stacked = nnx.split(self.layers)

        def body(x: Array, layer: Any) -> Array:
            return nnx.merge(graph, layer)(x, shared)[0]

        x = self._embed(tokens, positions, shared)
        x = hooks.run_layers(body, nnx.to_pure_dict(stacked), x, self.config.remat)
        return hooks.score(self.final_norm(x), lambda x: self._logits(x, shared))

    def extend(
        self, tokens: Array, cache: Cache, *, hooks: Hooks | None = None
    ) -> tuple[Array, Cache]:
        """Read more tokens after those in the cache, and score what comes next.

        Args:
            tokens: int32 [B, T]; the cache must have room for them.
            cache: of the tokens before.
            hooks: as in the call; the dim of new tokens is constrained to stay whole.

        Returns:
            Logits float32 [B, V] after the last token, and the cache with the new tokens.
        """
        hooks = hooks or Hooks()
        batch, room = cache.keys.shape[1:3]
        self._check_length(room)
        positions = (cache.filled + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
        mask = jnp.arange(room)[None, None] <= positions[:, :, None]
        mask = jnp.broadcast_to(mask[:, None], (batch, 1, tokens.shape[1], room))
        shared = self._shared(positions, hooks, mask=mask, causal=False, length=None)

        graph, stacked = nnx.split(self.layers)

        def body(carry: tuple[Array, Cache], layer: Any) -> tuple[Array, Cache | None]:
            x, cache = carry
            return nnx.merge(graph, layer)(x, shared, cache)

        carry = (self._embed(tokens, positions, shared), cache)
        x, cache = hooks.run_layers(body, nnx.to_pure_dict(stacked), carry, "none")
        logits = self._logits(self.final_norm(x[:, -1:]), shared)
        return logits[:, 0], cache.after(tokens.shape[1])

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ConfigError(
                f"cannot read {length} tokens with the model `{self.config.name}`",
                where=f"max_length={self.config.max_length}",
                why=f"{length} is more than {self.config.max_length}",
                fix=f"use at most {self.config.max_length} tokens, or max_length={length}",
            )

    def _shared(
        self,
        positions: Array,
        hooks: Hooks,
        *,
        mask: Array | None,
        causal: bool,
        length: str | None,
    ) -> Shared:
        rotated = self.config.positions == "rope"
        by = rotation(self.config, positions) if rotated else None
        return Shared(hooks=hooks, rotation=by, mask=mask, causal=causal, length=length)

    def _embed(self, tokens: Array, positions: Array, shared: Shared) -> Array:
        x = shared.hooks.look_up(self.embedding[...], tokens)
        if self.positions is not None:
            x += take_rows(self.positions[...], positions)
        return shared.hooks.constrain(x, ("batch", shared.length, "embed"))

    def _logits(self, x: Array, shared: Shared) -> Array:
        if self.head is None:
            equation, weights = "btd,vd->btv", self.embedding[...]
        else:
            equation, weights = "btd,dv->btv", self.head[...]
        logits = float32_logits(equation, x, weights)
        return shared.hooks.constrain(logits, ("batch", shared.length, "vocab"))
