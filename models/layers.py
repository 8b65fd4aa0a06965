"""Parameters, and the parts of a block that treat each position alone: norm and MLP.

A parameter is declared once, by name and by its dims with their sizes in order::

    init.normal("wq", std, embed=128, heads=8, head_dim=16)

Its initial values depend on the key, its own path and, in a stack, its layer's number, and on
nothing else. The key is folded with a CRC of the path, so adding a module changes no other
parameter; splitting one key in order of construction, as nnx does, would. And `jax.random`
draws each element from the key and the element's row-major index alone
(`jax_threefry_partitionable`, the default), so neither the layout of the devices changes a
value nor, since layers are the first dim, does the number of layers that follow. Folding the key
with each layer's number would do as well and costs more to compile.

Shape suffixes in this folder: B batch, T query length, S key length, D embed, N heads,
K kv_heads, H head_dim, M mlp, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meshwright.models.config import ModelConfig
from meshwright.models.hooks import Hooks

__all__ = ["Init", "Mlp", "Norm", "add_bias", "draw_normal", "float32_logits", "residual_std"]

_WORDS = 4


@dataclass(frozen=True)
class Init:
    """Makes parameters at one place of a model; float32, dims in their metadata.

    Attributes:
        key: key of the whole model.
        path: names from the root to this place.
        stack: dim and number of layers stacked along it, a new first dim; None for no stack.

    >>> init = Init(jax.random.key(0)).at("layers", layers=3).at("attn")
    >>> wq = init.normal("wq", 0.02, embed=8, heads=2, head_dim=4)
    >>> wq.shape, wq.get_metadata()["dims"]
    ((3, 8, 2, 4), ('layers', 'embed', 'heads', 'head_dim'))
    """

    key: Array
    path: tuple[str, ...] = ()
    stack: tuple[str, int] | None = None

    def at(self, name: str, *, layers: int | None = None) -> Init:
        """The place ``name`` below this one; if given, of ``layers`` layers stacked along a dim
        of that name."""
        stack = self.stack if layers is None else (name, layers)
        return dataclasses.replace(self, path=(*self.path, name), stack=stack)

    def normal(self, name: str, std: float, /, **sizes: int) -> nnx.Param[Array]:
        """A parameter drawn from a normal distribution of deviation ``std``."""
        path = "/".join((*self.path, name))
        key = jax.random.fold_in(self.key, np.uint32(zlib.crc32(path.encode())))
        sizes = self._stacked(sizes)
        return nnx.Param(draw_normal(key, tuple(sizes.values()), std), dims=tuple(sizes))

    def constant(self, value: float, /, **sizes: int) -> nnx.Param[Array]:
        """A parameter that starts as ``value`` everywhere."""
        sizes = self._stacked(sizes)
        full = jnp.full(tuple(sizes.values()), value, jnp.float32)
        return nnx.Param(full, dims=tuple(sizes))

    def _stacked(self, sizes: dict[str, int]) -> dict[str, int]:
        return sizes if self.stack is None else {self.stack[0]: self.stack[1], **sizes}


def draw_normal(key: Array, shape: tuple[int, ...], std: float) -> Array:
    """Draw float32 numbers of a bell curve, bit for bit the same on any mesh and any hardware.

    The sum of eight 16-bit random integers, centred and scaled (Irwin 1927, Hall 1927): a normal
    distribution's density to 2% within one deviation, 4% at two, a fifth less at three, and
    nothing beyond 4.9.
    Integers add exactly and the scale is one multiplication, so nothing depends on how a
    compiler orders, fuses or vectorises it. `jax.random.normal` goes through logarithms and
    polynomials whose last bit on a CPU depends on the width of a device's shard: on jax 0.12 a
    mesh that splits the last dim into fours gives other values than one device.

    Args:
        key: randomness.
        shape: of the result.
        std: standard deviation.
    """

    def add(word: Array, total: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, word), shape, jnp.uint32)
        return total + ((bits & 0xFFFF) + (bits >> 16)).astype(jnp.int32)

    # A loop, so that one word an element is in memory at a time, on each device its own part.
    total = jax.lax.fori_loop(0, _WORDS, add, jnp.zeros(shape, jnp.int32))
    centred = total - _WORDS * 0xFFFF
    # A sum of n uniform integers below m has the variance n (m² - 1) / 12.
    deviation = np.sqrt(2 * _WORDS * (2.0**32 - 1) / 12)
    return centred.astype(jnp.float32) * np.float32(std / deviation)


def residual_std(config: ModelConfig) -> float:
    """Deviation for the projections that add to the residual stream: init_std / sqrt(2 L).

    The stream sums 2 L of them, so this keeps its variance independent of depth (GPT-2,
    Radford et al. 2019, section 2.3). Used for every family.
    """
    return config.init_std / float(np.sqrt(2 * config.layers))


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) of the last dim.

    Computed in float32, returned in the dtype of the input.
    """

    def __init__(self, config: ModelConfig, init: Init, size: int) -> None:
        self.config = config
        self.scale = init.constant(1.0, norm=size)
        biased = config.norm == "layer" and config.bias
        self.bias = init.constant(0.0, norm=size) if biased else None

    def __call__(self, x: Array) -> Array:
        """Normalise ``x`` [..., size]."""
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        # y * y, not square: its derivative would keep 2 y besides y for the backward pass.
        variance = jnp.mean(y * y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(variance + self.config.norm_eps)
        y *= _trailing(self.scale[...].astype(jnp.float32), y)
        if self.bias is not None:
            y += _trailing(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020) or a two-matrix MLP with tanh GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: ModelConfig, init: Init) -> None:
        embed, mlp = config.embed, config.mlp
        gated = config.activation == "swiglu"
        self.w_gate = (
            init.normal("w_gate", config.init_std, embed=embed, mlp=mlp) if gated else None
        )
        self.w_up = init.normal("w_up", config.init_std, embed=embed, mlp=mlp)
        self.w_down = init.normal("w_down", residual_std(config), mlp=mlp, embed=embed)
        self.b_gate = init.constant(0.0, mlp=mlp) if gated and config.bias else None
        self.b_up = init.constant(0.0, mlp=mlp) if config.bias else None
        self.b_down = init.constant(0.0, embed=embed) if config.bias else None

    def __call__(self, x: Array, hooks: Hooks, length: str | None) -> Array:
        """Map ``x`` [B, T, D] to [B, T, D]; ``length`` names its second dim."""
        up = add_bias(jnp.einsum("btd,dm->btm", x, self.w_up[...]), self.b_up)
        if self.w_gate is None:
            hidden = jax.nn.gelu(up, approximate=True)
        else:
            gate = add_bias(jnp.einsum("btd,dm->btm", x, self.w_gate[...]), self.b_gate)
            hidden = jax.nn.silu(gate) * up
        hidden = hooks.constrain(hidden, ("batch", length, "mlp"))
        return add_bias(jnp.einsum("btm,md->btd", hidden, self.w_down[...]), self.b_down)


def float32_logits(equation: str, x: Array, weights: Array) -> Array:
    """The einsum of two arrays of one dtype, summed and returned in float32.

    Its gradients are computed in that dtype. Left to jax, the float32 gradient of the logits
    would make both matmuls of the backward pass float32 ones, several times slower on
    accelerators, and the gradient of the weights would cross the wire at twice the bytes.

    Both gradients are made before either is read. Left to the compilers, that of the head's
    weights, which nothing waits for, may come after the backward pass of all layers, and the logits
    stay until then: an eighth of an 8B model's peak on v5p.
    """
    return _float32_logits(equation, x, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float32_logits(equation: str, x: Array, weights: Array) -> Any:
    return jnp.einsum(equation, x, weights, preferred_element_type=jnp.float32)


def _float32_logits_forward(equation: str, x: Array, weights: Array) -> Any:
    return _float32_logits(equation, x, weights), (x, weights)


def _float32_logits_backward(equation: str, kept: Any, grad: Array) -> tuple[Array, Array]:
    x, weights = kept
    left, right = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    grad = grad.astype(x.dtype)
    both = (
        jnp.einsum(f"{out},{right}->{left}", grad, weights),
        jnp.einsum(f"{left},{out}->{right}", x, grad),
    )
    return jax.lax.optimization_barrier(both)


_float32_logits.defvjp(_float32_logits_forward, _float32_logits_backward)


def add_bias(x: Array, bias: nnx.Param[Array] | None) -> Array:
    """Add a bias to the last dims of ``x`` where the model has one."""
    return x if bias is None else x + _trailing(bias[...], x)


def _trailing(value: Array, like: Array) -> Array:
    """``value`` with dims of 1 put before its own, so that they are the last of ``like``."""
    return jax.lax.expand_dims(value, range(like.ndim - value.ndim))
