"""What parallelism needs inside a model, handed in as functions with single-device defaults.

The models do mathematics and never see a mesh. The places where a layout matters are known
to the model, though, and nowhere else, so it calls a function there:

- ``constrain`` where an activation's layout may be fixed, with the names of its dims;
- ``attention`` for the one operation that mixes positions, so that a ring or a kernel of
  another library can take its place;
- ``run_layers`` for the stack of layers, so that the caller may gather, cast or pipeline
  each layer's parameters inside the recomputed region.

With the defaults a model is a plain single-device function. The alternative, a context that
carries a mesh, would make the same call mean different things in different places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from meshwright.models.config import Remat

__all__ = [
    "Hooks",
    "LayerBody",
    "constrain_nothing",
    "cudnn_serves",
    "dot_product",
    "project_all",
    "rematerialise",
    "scan_layers",
    "take_rows",
]

LayerBody = Callable[[Any, Any], Any]
"""One layer: (x, the parameters of one layer as nested dicts) → x of the same structure."""


def constrain_nothing(x: Array, dims: tuple[str | None, ...]) -> Array:
    """Leave the layout of ``x`` to the compiler."""
    del dims
    return x


def dot_product(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None,
    causal: bool,
    scale: float,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Array:
    """Attend with `jax.nn.dot_product_attention`; softmax in float32.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, S, K, H], N a multiple of K; query head n uses key head n // (N / K).
        v: values [B, S, K, H].
        mask: True where a query may attend, bool [B, 1, T, S]; None for everywhere.
        causal: additionally, query t attends only to keys up to t.
        scale: factor on the products of queries and keys.
        implementation: ``xla`` for matmuls and softmax, ``cudnn`` for the fused kernel; None
            takes the kernel where this process's default device has it and no mask is given.

    Returns:
        [B, T, N, H] in the dtype of ``q``.

    The kernel must be asked for by name: without one, `jax.nn.dot_product_attention` takes the
    XLA path on every backend (as of jax 0.10).
    """
    if implementation is None:
        live = jax.default_backend() == "gpu"
        fused = mask is None and live and cudnn_serves(q, jax.devices()[0])
        implementation = "cudnn" if fused else "xla"
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, scale=scale, implementation=implementation
    )


def cudnn_serves(q: Array, device: Any) -> bool:
    """Whether cuDNN's flash attention takes this dtype and head size on a device.

    Decided while tracing. Flash attention needs compute capability 8.0, and 9.0 for heads
    over 128 (the checks of jax's own cuDNN wrapper, which raises where this returns False).

    Args:
        q: queries [B, T, N, H].
        device: a live device, or one compiled for; anything but an NVIDIA GPU is refused.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    # Only NVIDIA devices describe themselves as major.minor; AMD's say gfx and a number.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= (256 if int(major) >= 9 else 128)


def take_rows(table: Array, tokens: Array) -> Array:
    """Rows of ``table`` [V, D] for ``tokens`` int32 [B, T]: [B, T, D]; ids past the end read the
    last row.

    Clipping needs no comparison of every gathered row with the bounds, which the default (NaN for
    ids past the end) does; the compiler then splits it over a sharded vocabulary.
    """
    return jnp.take(table, tokens, axis=0, mode="clip")


def project_all(x: Array, project: Callable[[Array], Array]) -> Array:
    """Logits of all positions at once.

    Args:
        x: the normed stream [B, T, D].
        project: [B, t, D] → float32 logits [B, t, V], for any t.
    """
    return project(x)


def rematerialise(body: LayerBody, remat: Remat) -> LayerBody:
    """Wrap a layer so that the backward pass recomputes what ``remat`` does not keep.

    ``none`` keeps every intermediate. ``full`` keeps only the layer's input and costs a
    second forward pass. ``dots`` also keeps the outputs of matmuls with weights (no batch
    dim, so not attention's) and recomputes what is cheap.
    """
    if remat == "none":
        return body
    # The loop boundary of the scan already keeps the compiler from merging the recomputation
    # with the forward pass, so the barriers of prevent_cse would only block fusions.
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def scan_layers(body: LayerBody, stacked: Any, x: Any, remat: Remat) -> Any:
    """Apply the layers in order: one trace of ``body`` and one loop, however many there are.

    Args:
        body: one layer.
        stacked: nested dicts of arrays [layers, ...].
        x: what flows through the layers; any pytree of arrays.
        remat: see `rematerialise`.

    Returns:
        ``x`` after the last layer.
    """
    layer = rematerialise(body, remat)

    def step(x: Any, parameters: Any) -> tuple[Any, None]:
        return layer(x, parameters), None

    return jax.lax.scan(step, x, stacked)[0]


@dataclass(frozen=True)
class Hooks:
    """The functions a model calls where parallelism may step in.

    Attributes:
        constrain: (x, names of its dims, None for a dim that stays whole) → x.
        attention: as `dot_product`.
        look_up: as `take_rows`.
        score: as `project_all`; what it returns, the model returns. A loss taken in here never
            needs the logits of all positions at once.
        run_layers: as `scan_layers`. Only ``body`` touches the parameters of a layer.
    """

    constrain: Callable[[Array, tuple[str | None, ...]], Array] = constrain_nothing
    attention: Callable[..., Array] = dot_product
    look_up: Callable[[Array, Array], Array] = take_rows
    score: Callable[[Array, Callable[[Array], Array]], Any] = project_all
    run_layers: Callable[[LayerBody, Any, Any, Remat], Any] = scan_layers
