"""The decoder transformer: Llama-3, Qwen-3 or GPT-2 as its configuration says.

The layers are one block whose every parameter has a first dim ``layers``. Applying them is a
loop over that dim, so tracing and compiling take the same time for 4 layers as for 126, and
a sharding rule names a parameter once instead of once a layer. The cost: layers that differ
from each other cannot be expressed; a list of blocks could, at a compile time that grows.
The one exception, a model with experts whose first layers are dense, has a second, small stack
before the first. It counts as outside of the layers, as the embedding does: its parameters are
not gathered layer by layer.

Norms, softmax, rotations and logits are float32; all else is in the dtype of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from meshwright.models.attention import Attention, Cache, Shared, rotation
from meshwright.models.config import ExpertConfig, ModelConfig
from meshwright.models.experts import Experts
from meshwright.models.hooks import Hooks, LayerBody, scan_layers, take_rows
from meshwright.models.layers import Init, Mlp, Norm, float32_logits
from meshwright.models.routing import ExpertSums
from meshwright.sharding.errors import ConfigError

__all__ = ["Block", "Decoder"]


class Block(nnx.Module):
    """Attention and MLP or experts, each on a normed copy of the residual stream (pre-norm)."""

    def __init__(self, config: ModelConfig, init: Init) -> None:
        self.attn_norm = Norm(config, init.at("attn_norm"), config.embed)
        self.attn = Attention(config, init.at("attn"))
        self.mlp_norm = Norm(config, init.at("mlp_norm"), config.embed)
        sparse = config.experts.count > 0
        self.mlp = None if sparse else Mlp(config, init.at("mlp"))
        self.experts = Experts(config, init.at("experts")) if sparse else None

    def __call__(
        self,
        x: Array,
        shared: Shared,
        cache: Cache | None = None,
        sums: ExpertSums | None = None,
    ) -> tuple[Array, Cache | None, ExpertSums | None]:
        """Add one layer's work to the stream ``x`` [B, T, D].

        See `Attention` for the cache, and `Experts` for the sums.
        """
        hooks = shared.hooks
        read = hooks.reshard(self.attn_norm(x), shared.stream, shared.inside)
        mixed, cache = self.attn(read, shared, cache)
        x += hooks.reshard(mixed, shared.inside, shared.stream, sums=True)
        read = hooks.reshard(self.mlp_norm(x), shared.stream, shared.inside)
        if self.experts is not None:
            worked, sums = self.experts(read, hooks, shared.length, sums)
        else:
            assert self.mlp is not None
            worked = self.mlp(read, hooks, shared.length)
        worked = hooks.reshard(worked, shared.inside, shared.stream, sums=True)
        return x + worked, cache, sums


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
        first = config.experts.first_dense
        dense = dataclasses.replace(config, experts=ExpertConfig())
        self.dense_layers = Block(dense, init.at("dense_layers", layers=first)) if first else None
        self.layers = Block(config, init.at("layers", layers=config.layers - first))
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
            Logits float32 [B, T, V], or what ``hooks.score`` and, of a model with experts,
            ``hooks.collect`` make of them.

        Raises:
            ConfigError: more tokens than ``max_length``.
        """
        hooks = hooks or Hooks()
        length = tokens.shape[1]
        self._check_length(length)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        shared = self._shared(positions, hooks, segments=segments, causal=True, length="length")
        x, sums = self._run_layers(self._embed(tokens, positions, shared), shared)
        read = hooks.reshard(self.final_norm(x), shared.stream, shared.inside)
        scored = hooks.score(read, lambda x: self._logits(x, shared))
        return scored if sums is None else hooks.collect(scored, sums)

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

        def extend(block: Any, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            return block(carry[0], shared, carry[1])[:2]

        carry = (self._embed(tokens, positions, shared), cache)
        if self.dense_layers is not None:
            carry = scan_layers(*_each(self.dense_layers, extend), carry, "none")
        x, cache = hooks.run_layers(*_each(self.layers, extend), carry, "none")
        logits = self._logits(self.final_norm(x[:, -1:]), shared)
        return logits[:, 0], cache.after(tokens.shape[1])

    def _run_layers(self, x: Array, shared: Shared) -> tuple[Array, ExpertSums | None]:
        """All layers in order: the stream, and what those of experts report."""
        remat = self.config.remat

        def dense(block: Any, x: Array) -> Array:
            return block(x, shared)[0]

        def sparse(block: Any, carry: tuple[Array, ExpertSums]) -> tuple[Array, ExpertSums]:
            x, _, sums = block(carry[0], shared, sums=carry[1])
            return x, sums

        if self.dense_layers is not None:
            x = scan_layers(*_each(self.dense_layers, dense), x, remat)
        if not self.config.experts.count:
            return shared.hooks.run_layers(*_each(self.layers, dense), x, remat), None
        carry = (x, ExpertSums.zeros(self.config, x.shape[0]))
        return shared.hooks.run_layers(*_each(self.layers, sparse), carry, remat)

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
        causal: bool,
        length: str | None,
        segments: Array | None = None,
        mask: Array | None = None,
    ) -> Shared:
        rotated = self.config.positions == "rope"
        by = rotation(self.config, positions) if rotated else None
        return Shared(hooks, by, segments, mask, causal, length)

    def _embed(self, tokens: Array, positions: Array, shared: Shared) -> Array:
        x = shared.hooks.look_up(self.embedding[...], tokens)
        if self.positions is not None:
            x += take_rows(self.positions[...], positions)
        return shared.hooks.constrain(x, shared.stream)

    def _logits(self, x: Array, shared: Shared) -> Array:
        if self.head is None:
            equation, weights = "btd,vd->btv", self.embedding[...]
        else:
            equation, weights = "btd,dv->btv", self.head[...]
        logits = float32_logits(equation, x, weights)
        return shared.hooks.constrain(logits, ("batch", shared.length, "vocab"))


def _each(stack: Block, apply: Callable[[Any, Any], Any]) -> tuple[LayerBody, Any]:
    """What ``run_layers`` takes: one layer as a function, and the parameters of all."""
    graph, stacked = nnx.split(stack)

    def body(x: Any, layer: Any) -> Any:
        return apply(nnx.merge(graph, layer), x)

    return body, nnx.to_pure_dict(stacked)
