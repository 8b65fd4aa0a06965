"""The train step: one jitted, donated program from (state, batch) to (state, scalars).

Placement, forward, backward, reduction over the data axes, clipping and update are one
program; microbatches and layers are loops inside it. Nothing here has side effects.

**Weights** are cast and gathered where they are read, and their gradients reduced, as
`meshwright.train.weights` says.

**Microbatches.** With gradient accumulation every device keeps the partial sums of its own
tokens and they are reduced once a step, over all axes no accumulator is split over. GSPMD has no
notion of "not yet reduced", so the partial sums are made explicit: a leading dim of the size of
those axes, split over them, mapped by ``vmap``. Locally it is a dim of one. The alternative,
``shard_map`` around the loss, would change the meaning of user code (every mean becomes a local
mean) and nest badly with the manual regions of ring attention and pipelines.

**Normalisation.** Sums are divided by the global weight of the batch, known before the loop, so
the result does not depend on how rows are dealt to devices or microbatches.

**Guard.** A non-finite loss or norm, or a norm that spikes, leaves parameters and moments as they
were; the decision is a select inside the program, not a read-back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.hooks import Hooks
from meshwright.models.pure import Functional
from meshwright.sharding.placement import Constrain
from meshwright.train.attention import attention_of
from meshwright.train.config import GuardConfig, LossConfig
from meshwright.train.layout import Layout
from meshwright.train.loss import token_loss_sum
from meshwright.train.state import TrainState
from meshwright.train.weights import Weights

__all__ = [
    "Batch",
    "StepSpec",
    "apply_gradients",
    "batch_shardings",
    "eval_step",
    "gradients",
    "sampling_hooks",
    "sampling_params",
    "train_step",
]

Batch = dict[str, jax.Array]
"""``tokens``, ``targets`` int32 and ``weights`` float32, all [microbatches, rows, length]; with
masked documents also ``segments`` and ``positions`` int32 of that shape."""

_NORM_MEAN_DECAY = 0.95


@dataclass(frozen=True)
class StepSpec:
    """All that the step's program depends on besides its arguments.

    Attributes:
        model: the model as functions.
        layout: resolved layouts.
        mesh: built mesh.
        optimizer: optax transformation, without clipping.
        schedule: optimizer step → learning rate, for the metrics.
        compute_dtype: dtype of matmuls and of weights on the wire.
        clip_norm: global gradient norm to clip to; 0 for none.
        loss: z-loss and label smoothing.
        guard: spike factor.
    """

    model: Functional
    layout: Layout
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    compute_dtype: Any
    clip_norm: float
    loss: LossConfig
    guard: GuardConfig

    def constrain(self) -> Constrain:
        """Activation constraints of this run."""
        return Constrain(self.layout.rules, self.mesh)


def train_step(
    spec: StepSpec, constrain: Constrain, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step.

    Args:
        spec: the program's constants.
        constrain: activation constraints; records the dims it is asked for.
        state: donated by the caller's jit.
        batch: see `Batch`.

    Returns:
        The next state and float32 scalars: ``loss`` (plain cross-entropy, mean over counted
        tokens), ``grad_norm`` before clipping, ``learning_rate``, ``tokens`` counted,
        ``skipped`` (1.0 if the update was refused) and ``bad_in_row``.
    """
    return apply_gradients(spec, state, *gradients(spec, constrain, state.params, batch))


def apply_gradients(
    spec: StepSpec, state: TrainState, grads: Any, plain: jax.Array, tokens: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The second half of a step: clip, guard, update.

    Args:
        spec: the program's constants.
        state: before the step.
        grads, plain, tokens: as `gradients` returns them.

    Returns:
        As `train_step`.
    """
    loss = plain / jnp.maximum(tokens, 1.0)
    norm = optax.tree.norm(grads)
    good = _acceptable(spec.guard, loss, norm, state.grad_norm_mean)
    if spec.clip_norm:
        scale = spec.clip_norm / jnp.maximum(norm, spec.clip_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    kept = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    bad = 1 - good.astype(jnp.int32)
    seeded = jnp.where(state.grad_norm_mean == 0, norm, state.grad_norm_mean)
    mean = _NORM_MEAN_DECAY * seeded + (1 - _NORM_MEAN_DECAY) * norm
    after = replace(
        state,
        step=state.step + 1,
        params=kept[0],
        opt_state=kept[1],
        grad_norm_mean=jnp.where(good, mean, state.grad_norm_mean),
        skipped=state.skipped + bad,
        bad_in_row=(state.bad_in_row + bad) * bad,
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(spec.schedule(state.step - state.skipped), jnp.float32),
        "tokens": tokens,
        "skipped": bad.astype(jnp.float32),
        "bad_in_row": after.bad_in_row.astype(jnp.float32),
    }
    return after, metrics


def eval_step(
    spec: StepSpec, constrain: Constrain, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Plain cross-entropy of a batch: (sum over counted tokens, their weight), no gradients."""
    weights = _weights(spec)
    working = weights.working(params)

    def one(totals: jax.Array, rows: Batch) -> tuple[jax.Array, None]:
        _, plain = _loss_sums(spec, weights, constrain, working, rows)
        return totals + plain, None

    plain, _ = jax.lax.scan(one, jnp.zeros((), jnp.float32), batch)
    return plain, jnp.sum(batch["weights"])


def gradients(
    spec: StepSpec, constrain: Constrain, params: Any, batch: Batch
) -> tuple[Any, jax.Array, jax.Array]:
    """Gradients of the mean training loss over a global batch.

    Args:
        spec, constrain: as `train_step`.
        params: float32 masters.
        batch: see `Batch`.

    Returns:
        (gradients, summed plain cross-entropy, counted tokens): gradients float32 in the
        masters' layout, already divided by the counted tokens.
    """
    microbatches, rows = batch["tokens"].shape[:2]
    tokens = jnp.sum(batch["weights"])
    scale = 1.0 / jnp.maximum(tokens, 1.0)
    deferred = _deferred(spec, microbatches)
    once = microbatches == 1
    weights = _weights(spec, deferred, final=once)
    working = weights.working(params)
    inner = constrain.without(deferred) if deferred else constrain

    def one(rows: Batch) -> tuple[Any, jax.Array]:
        def scaled(working: Any) -> tuple[jax.Array, jax.Array]:
            train, plain = _loss_sums(spec, weights, inner, working, rows)
            return train * scale, plain

        grads, plain = jax.grad(scaled, has_aux=True)(working)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), plain

    if deferred:
        one = jax.vmap(one, spmd_axis_name=deferred, out_axes=(None, 0) if once else 0)
        batch = _by_replica(spec, batch, deferred, rows)
    if once:
        grads, plain = one(jax.tree.map(lambda x: x[0], batch))
        return weights.into_masters(grads), jnp.sum(plain), tokens

    def add(totals: tuple[Any, jax.Array], rows: Batch) -> tuple[tuple[Any, jax.Array], None]:
        grads, plain = one(rows)
        summed = jax.tree.map(jnp.add, totals, (grads, plain))
        return (weights.accumulated(summed[0]), summed[1]), None

    zeros = weights.zero_accumulators(params)
    plain0 = jnp.zeros([_size(spec.mesh, deferred)] if deferred else [], jnp.float32)
    (grads, plain), _ = jax.lax.scan(add, (zeros, plain0), batch)
    if deferred:
        grads, plain = jax.tree.map(lambda x: jnp.sum(x, axis=0), (grads, plain))
    return weights.into_masters(grads), plain, tokens


def batch_shardings(spec: StepSpec, names: Sequence[str]) -> dict[str, NamedSharding]:
    """Rows split over the axes of the dim ``batch``, microbatches and length whole or as ruled."""
    rules = [spec.layout.rules.lookup("activations", dim) for dim in ("batch", "length")]
    axes = [rule.axes if rule and rule.axes else None for rule in rules]
    return {name: NamedSharding(spec.mesh, PartitionSpec(None, *axes)) for name in names}


def sampling_params(spec: StepSpec, params: Any) -> Any:
    """Masters as generation reads them: layers in their working layout, the rest ready for use."""
    weights = _weights(spec)
    return weights.use_all_but_layers(weights.working(params))


def sampling_hooks(spec: StepSpec) -> Hooks:
    """Hooks for generation: as in training, but a batch of prompts stays whole."""
    constrain = spec.constrain().without(spec.layout.rules.token_axes())
    return Hooks(constrain=constrain, run_layers=_weights(spec).run_layers)


def _loss_sums(
    spec: StepSpec, weights: Weights, constrain: Constrain, working: Any, rows: Batch
) -> tuple[jax.Array, jax.Array]:
    hooks = Hooks(
        constrain=constrain,
        attention=attention_of(spec.mesh, constrain.rules),
        run_layers=weights.run_layers,
    )
    logits = spec.model.apply(
        weights.use_all_but_layers(working),
        rows["tokens"],
        positions=rows.get("positions"),
        segments=rows.get("segments"),
        hooks=hooks,
    )
    return token_loss_sum(
        logits,
        rows["targets"],
        rows["weights"],
        z_loss=spec.loss.z_loss,
        label_smoothing=spec.loss.label_smoothing,
    )


def _acceptable(guard: GuardConfig, loss: jax.Array, norm: jax.Array, mean: jax.Array) -> jax.Array:
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if guard.spike_factor:
        good &= (mean == 0) | (norm <= guard.spike_factor * mean)
    return good


def _deferred(spec: StepSpec, microbatches: int) -> tuple[str, ...]:
    """Axes whose partial gradients are kept apart; none where there is nothing to save.

    With several microbatches, until the end of the step. With one, until a layer's gradient is
    reduce-scattered over the other axes that split tokens: the rest then reduces shards only,
    where the partitioner by itself would all-reduce whole gradients over all axes at once.
    """
    layout = spec.layout
    if microbatches > 1:
        axes = layout.unreduced_axes(layout.reduced)
        return axes if _size(spec.mesh, axes) > 1 else ()
    axes = layout.unreduced_axes(layout.masters)
    others = [axis for axis in layout.rules.token_axes() if axis not in axes]
    return axes if _size(spec.mesh, axes) > 1 and _size(spec.mesh, others) > 1 else ()


def _size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _by_replica(spec: StepSpec, batch: Batch, deferred: tuple[str, ...], rows: int) -> Batch:
    """[m, rows, …] → [m, replicas, rows/replicas, …] without moving a row between devices.

    Rows are split over all batch axes, major to minor; the deferred ones become the new dim.
    """
    axes, length = (
        rule.axes if rule else ()
        for rule in (spec.layout.rules.lookup("activations", dim) for dim in ("batch", "length"))
    )
    sizes = [spec.layout.mesh.sizes[axis] for axis in axes]
    order = [axis for axis in axes if axis in deferred]
    kept = [axis for axis in axes if axis not in deferred]
    moved = [1 + axes.index(axis) for axis in (*order, *kept)]

    def one(x: jax.Array) -> jax.Array:
        tail = x.shape[2:]
        local = rows // _size(spec.mesh, axes)
        cube = x.reshape(x.shape[0], *sizes, local, *tail)
        rank = cube.ndim
        rest = range(1 + len(sizes), rank)
        cube = cube.transpose(0, *moved, *rest)
        replicas = _size(spec.mesh, order)
        out = cube.reshape(x.shape[0], replicas, rows // replicas, *tail)
        split = PartitionSpec(None, tuple(order), tuple(kept) or None, length or None)
        return jax.lax.with_sharding_constraint(out, NamedSharding(spec.mesh, split))

    return jax.tree.map(one, batch)


def _weights(spec: StepSpec, deferred: tuple[str, ...] = (), *, final: bool = False) -> Weights:
    shapes = spec.model.shapes
    return Weights(spec.layout, shapes, spec.mesh, spec.compute_dtype, deferred, final=final)
