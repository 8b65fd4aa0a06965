"""What parallelism needs inside a model, handed in as functions with single-device defaults.

The models do mathematics and never see a mesh. The places where a layout matters are known
to the model, though, and nowhere else, so it calls a function there:

- ``constrain`` where an activation's layout may be fixed, with the names of its dims, and
  ``reshard`` where it may change;
- ``attention`` for the one operation that mixes positions, so that a ring or a kernel of
  another library can take its place;
- ``experts`` for the one that moves tokens, so that an exchange between devices can;
- ``rows`` for what is of whole rows, where a call may see parts of them only;
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
from jax.ad_checkpoint import checkpoint_name

from meshwright.models.config import Remat

__all__ = [
    "ATTENTION",
    "Hooks",
    "LayerBody",
    "RowParts",
    "constrain_nothing",
    "cudnn_serves",
    "dot_product",
    "keep_scored",
    "keep_whole",
    "project_all",
    "rematerialise",
    "reshard_nothing",
    "scan_layers",
    "take_rows",
]

ATTENTION = "attention"
"""Checkpoint name of what attention leaves for the backward pass."""

_STREAM = "stream"
"""Checkpoint name of a layer's input."""

LayerBody = Callable[[Any, Any], Any]
"""One layer: (x, the parameters of one layer as nested dicts) → x of the same structure."""


def constrain_nothing(x: Array, dims: tuple[str | None, ...]) -> Array:
    """Leave the layout of ``x`` to the compiler."""
    del dims
    return x


def reshard_nothing(
    x: Array,
    before: tuple[str | None, ...],
    after: tuple[str | None, ...],
    *,
    sums: bool = False,
) -> Array:
    """Leave the layout of ``x`` to the compiler."""
    del before, after, sums
    return x


def dot_product(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    segments: Array | None = None,
    mask: Array | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Array:
    """Attend with `jax.nn.dot_product_attention`; softmax in float32.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, S, K, H], N a multiple of K; query head n uses key head n // (N / K).
        v: values [B, S, K, H].
        causal: query t attends only to keys up to t.
        scale: factor on the products of queries and keys.
        segments: each token's document, int32 [B, T] with T = S; queries attend within their
            own only. None: each row is one document.
        mask: True where a query may attend, bool [B, 1, T, S], for what documents and order do
            not say; None for everywhere.
        implementation: ``xla`` for matmuls and softmax, ``cudnn`` for the fused kernel; None
            takes the kernel where this process's default device has it and nothing is masked.

    Returns:
        [B, T, N, H] in the dtype of ``q``.

    The kernel must be asked for by name: without one, `jax.nn.dot_product_attention` takes the
    XLA path on every backend (as of jax 0.10).
    """
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mask = same if mask is None else mask & same
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


def keep_scored(scored: Any, sums: Any) -> Any:
    """What ``score`` returned, without what the layers of experts report."""
    del sums
    return scored


def rematerialise(body: LayerBody, remat: Remat) -> LayerBody:
    """Wrap a layer so that the backward pass recomputes what ``remat`` does not keep.

    ``none`` keeps every intermediate. ``full`` keeps only the layer's input and costs a
    second forward pass. ``dots`` also keeps the outputs of matmuls with weights (no batch
    dim, so not attention's) and recomputes what is cheap. ``save-attention`` keeps, besides the
    input, what is named `ATTENTION`: the output of attention, and what its kernel needs to
    differentiate it where that says so, so that neither it nor what it sent is repeated.
    ``offload`` is ``full`` with the layers' inputs in the host's memory until they are needed:
    two transfers of each, which overlap with the layers between where the backend can; on
    backends without memory of the host's, it is ``full``.
    """
    if remat == "none":
        return body
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=(_STREAM,),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(_naming_input(body), policy=policy, prevent_cse=False)
    # The loop boundary of the scan already keeps the compiler from merging the recomputation
    # with the forward pass, so the barriers of prevent_cse would only block fusions.
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if remat == "save-attention":
        policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    else:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _naming_input(body: LayerBody) -> LayerBody:
    """``body`` that names the stream it reads, the first of what flows through the layers."""

    def named(x: Any, parameters: Any) -> Any:
        (stream, *rest), tree = jax.tree.flatten(x)
        x = jax.tree.unflatten(tree, [checkpoint_name(stream, _STREAM), *rest])
        return body(x, parameters)

    return named


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


def keep_whole(x: Any) -> Any:
    """Sums over the parts of a row that is one part."""
    return x


@dataclass(frozen=True)
class RowParts:
    """Rows whose length may be split: what a call knows of the other parts of its rows.

    Attributes:
        parts: equally long parts of a row; the call sees one of each row.
        total: a pytree of float32 or int32 arrays [B] or [B, N] → their sums over the parts, the
            same on all, differentiable. Integers are exact up to 2²⁴.
        once: an integer array that is the same on all parts → it on the first, zeros on the others,
            so that a sum over parts counts it once.
    """

    parts: int = 1
    total: Callable[[Any], Any] = keep_whole
    once: Callable[[Array], Array] = keep_whole


@dataclass(frozen=True)
class Hooks:
    """The functions a model calls where parallelism may step in.

    Attributes:
        constrain: (x, names of its dims, None for a dim that stays whole) → x.
        reshard: (x, names of its dims, their names from here on) → x, where a region begins, or
            with ``sums=True`` ends, that may split its dims otherwise; where it ends, x may be
            partial sums.
        attention: as `dot_product`.
        look_up: as `take_rows`.
        score: as `project_all`; what it returns, the model returns. A loss taken in here never
            needs the logits of all positions at once.
        run_layers: as `scan_layers`. Only ``body`` touches the parameters of a layer. The first,
            dense layers of a model with experts do not come this way.
        experts: as `meshwright.models.experts.apply_experts`, which None stands for.
        rows: the other parts of rows whose length is split.
        collect: (what ``score`` returned, the `meshwright.models.routing.ExpertSums` of all
            layers) → what the model returns, as `keep_scored`. Called by models with experts only.
    """

    constrain: Callable[[Array, tuple[str | None, ...]], Array] = constrain_nothing
    reshard: Callable[..., Array] = reshard_nothing
    attention: Callable[..., Array] = dot_product
    look_up: Callable[[Array, Array], Array] = take_rows
    score: Callable[[Array, Callable[[Array], Array]], Any] = project_all
    run_layers: Callable[[LayerBody, Any, Any, Remat], Any] = scan_layers
    experts: Callable[..., Array] | None = None
    rows: RowParts = RowParts()
    collect: Callable[[Any, Any], Any] = keep_scored
