"""The baseline of the overhead benchmark: the tiny Llama and its step, written by hand.

One plain `jax.jit` function for one model family and one mesh, as a careful engineer would write
it without this library: `jax.numpy` and optax only, shardings spelled out where they matter.
It shares no code with `models/` or `step.py`, so it is also an oracle: tests hold that both give
the same loss and the same new parameters. It knows nothing of rules, ZeRO, microbatches,
documents, refused updates or other models; that is what it saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meshwright.models.config import ModelConfig

__all__ = ["handwritten_step"]

_ROWS = ("data", "fsdp")
_GATHERED = {
    "attn": {
        "wq": P(None, "tensor"),
        "wk": P(None, "tensor"),
        "wv": P(None, "tensor"),
        "wo": P("tensor"),
    },
    "attn_norm": {"scale": P()},
    "mlp": {"w_gate": P(None, "tensor"), "w_up": P(None, "tensor"), "w_down": P("tensor")},
    "mlp_norm": {"scale": P()},
}


def handwritten_step(
    config: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    dtype: Any,
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """Build the step for a tied, RoPE, SwiGLU model on a mesh with data, fsdp and tensor axes.

    Args:
        config: sizes; only the choices of ``tiny`` are honoured.
        mesh: with the three axes.
        optimizer: an optax transformation.
        clip_norm: global norm to clip to.
        dtype: compute dtype.

    Returns:
        (params, opt_state, tokens, targets) → (params, opt_state, loss), to be jitted.
    """

    def step(params: Any, opt_state: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        loss = functools.partial(_loss, config, mesh, dtype)
        value, grads = jax.value_and_grad(loss)(params, tokens, targets)
        scale = clip_norm / jnp.maximum(optax.tree.norm(grads), clip_norm)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def _loss(
    config: ModelConfig, mesh: Mesh, dtype: Any, params: Any, tokens: jax.Array, targets: jax.Array
) -> jax.Array:
    table = _put(mesh, params["embedding"].astype(dtype), P("tensor"))
    x = _put(mesh, jnp.take(table, tokens, axis=0, mode="clip"), P(_ROWS))
    layer = functools.partial(_layer, config, mesh, dtype)
    again = jax.checkpoint(layer, policy=_keep_activations, prevent_cse=False)
    x, _ = jax.lax.scan(again, x, params["layers"])
    x = _norm(x, params["final_norm"]["scale"].astype(dtype), config.norm_eps)
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
    logits = _put(mesh, logits, P(_ROWS, None, "tensor"))
    hit = jnp.arange(config.vocab_size)[None, None] == targets[..., None]
    label = jnp.sum(jnp.where(hit, logits, 0.0), -1)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - label)


def _layer(
    config: ModelConfig, mesh: Mesh, dtype: Any, x: jax.Array, weights: Any
) -> tuple[jax.Array, None]:
    w = jax.tree.map(lambda leaf, spec: _put(mesh, leaf.astype(dtype), spec), weights, _GATHERED)
    h = _norm(x, w["attn_norm"]["scale"], config.norm_eps)
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, w["attn"][name]) for name in ("wq", "wk", "wv"))
    mixed = jax.nn.dot_product_attention(
        _rope(q, config.rope_theta), _rope(k, config.rope_theta), v, is_causal=True
    )
    x = _put(mesh, x + jnp.einsum("btnh,nhd->btd", mixed, w["attn"]["wo"]), P(_ROWS))
    h = _norm(x, w["mlp_norm"]["scale"], config.norm_eps)
    hidden = jax.nn.silu(h @ w["mlp"]["w_gate"]) * (h @ w["mlp"]["w_up"])
    return _put(mesh, x + hidden @ w["mlp"]["w_down"], P(_ROWS)), None


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * scale[None, None].astype(jnp.float32)).astype(x.dtype)


def _rope(x: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _put(mesh: Mesh, x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _keep_activations(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("sharding_constraint", "convert_element_type")
