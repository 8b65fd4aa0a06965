"""The fused attention kernel of a mesh's hardware, split as the activations are.

Attention written as matmuls holds scores of length × length for every head: at 8,192 tokens more
than all else a layer keeps. Fused kernels never write them to memory:

==========  ====================================================  ============================
hardware    kernel                                                where
==========  ====================================================  ============================
NVIDIA GPU  cuDNN's, through `jax.nn.dot_product_attention`       jax partitions it itself
TPU         splash attention, a Pallas kernel that ships in jax   in a `shard_map`: compilers
                                                                  cannot split a custom kernel
elsewhere   none: matmuls and softmax                             the compiler partitions it
==========  ====================================================  ============================

Rows and heads are independent, so the kernel runs on each device's own rows and heads and moves
nothing. What it does not serve falls back to matmuls: masks (packed documents), lengths that are
no multiple of its smallest block, key heads laid out otherwise than query heads. The choice goes
by the devices of the mesh, not by this process's default backend, so that a program compiled for
absent hardware is the one that hardware would run. Rejected: a kernel of our own. Those that
ship with jax are tuned and maintained by their vendors.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from meshwright.models.hooks import ATTENTION, cudnn_serves, dot_product
from meshwright.sharding.rules import Rules
from meshwright.sharding.token_layout import ContextKind
from meshwright.train.config import TrainConfig
from meshwright.train.context import ContextAttention
from meshwright.train.replicas import Replicas

__all__ = ["attention_of", "has_cudnn_wheel", "kernel_of", "splash_attention"]

_LANES = 128  # the kernel's smallest block of queries or keys
_BLOCK = 512  # its blocks where the length allows; a compromise of on-chip memory and reuse


def attention_of(
    mesh: Mesh,
    rules: Rules,
    replicas: Replicas | None = None,
    kind: ContextKind = "ring",
    *,
    interpret: bool = False,
) -> Callable[..., jax.Array]:
    """The attention hook for a mesh: as `meshwright.models.hooks.dot_product`.

    Args:
        mesh: built mesh; its devices decide the kernel.
        rules: the ``activations`` table says how rows and heads are split.
        replicas: what the caller has mapped over; where they split the length of rows, attention
            crosses their axes.
        kind: how it does; see `meshwright.train.context`.
        interpret: run the TPU kernel in Pallas's interpreter, for tests on CPU devices.
    """
    if replicas is not None and replicas.length:
        inside = attention_of(mesh, rules, interpret=interpret)
        return ContextAttention(replicas, kind, rules, inside)
    device = mesh.devices.flat[0]
    if interpret or device.platform == "tpu":
        specs = [_spec(rules, heads) for heads in ("heads", "kv_heads")]
        if specs[0] == specs[1]:
            return functools.partial(
                splash_attention, mesh=mesh, split=specs[0], interpret=interpret
            )
    return functools.partial(_by_platform, device=device)


def _by_platform(q: jax.Array, k: jax.Array, v: jax.Array, *, device: Any, **how: Any) -> jax.Array:
    unmasked = how.get("mask") is None and how.get("segments") is None
    fused = unmasked and _has_cudnn(device) and cudnn_serves(q, device)
    return dot_product(q, k, v, **how, implementation="cudnn" if fused else "xla")


def _has_cudnn(device: Any) -> bool:
    """Whether cuDNN calls can be compiled here: a live device has it, a plan needs the wheel."""
    return device in jax.devices() or has_cudnn_wheel()


def has_cudnn_wheel() -> bool:
    """Whether cuDNN is installed as a Python package, as the extra `cuda` does."""
    find = importlib.util.find_spec
    return find("nvidia") is not None and find("nvidia.cudnn") is not None


def kernel_of(
    config: TrainConfig, rules: Rules, kind: str, context: int = 1
) -> Literal["splash", "cudnn", "matmuls", "ring", "gather"]:
    """The kernel a run uses on a family of hardware (`Topology.kind`); no jax devices needed.

    Args:
        config, rules: of the run.
        kind: of hardware.
        context: parts that the length of rows is split into. Ring and gathered keys are attended
            to in chunks, whose scores are never all in memory.
    """
    if context > 1 and config.context.kind != "ulysses":
        return config.context.kind
    if config.data.mask_documents:
        return "matmuls"
    head_dim = config.model.head_dim
    if kind == "tpu" and config.seq_len % _LANES == 0:
        return "splash" if _spec(rules, "heads") == _spec(rules, "kv_heads") else "matmuls"
    if kind == "gpu" and config.dtype != "float32" and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "matmuls"


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    scale: float,
    segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    mesh: Mesh,
    split: PartitionSpec,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention with the TPU's splash kernel on each device's rows and heads.

    Args:
        q, k, v, causal, scale, segments, mask: as `meshwright.models.hooks.dot_product`.
        mesh: built mesh.
        split: how [B, T, N, H] is laid out; rows and heads may be split.
        interpret: see `attention_of`.

    Returns:
        [B, T, N, H]. Calls the kernel does not serve are computed with matmuls.
    """
    length = q.shape[1]
    masked = segments is not None or mask is not None
    if masked or not causal or length % _LANES or k.shape[1] != length:
        how: dict[str, Any] = {"causal": causal, "scale": scale, "segments": segments, "mask": mask}
        return dot_product(q, k, v, **how, implementation="xla")
    block = math.gcd(length, _BLOCK)

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # The kernel takes [heads, T, H], does not scale, and shares keys among query heads itself.
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
        kernel = _kernel(q.shape[1], length, block, interpret)
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False
    )
    return mapped(q.astype(v.dtype), k, v)


def _kernel(heads: int, length: int, block: int, interpret: bool) -> Any:
    # Pallas takes half a second to import and most runs do not need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        causal,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def _spec(rules: Rules, heads: str) -> PartitionSpec:
    """How [batch, length, heads, head_dim] is split; the length stays whole."""
    rows, split = (rules.axes_for("activations", dim) or None for dim in ("batch", heads))
    return PartitionSpec(rows, None, split)
