"""The train step: one jitted, donated program from (state, batch) to (state, scalars).

Placement, forward, backward, reduction over the data axes, clipping and update are one
program; microbatches and layers are loops inside it. Nothing here has side effects.

**Weights** are cast and gathered where they are read, and their gradients reduced, as
`meshwright.train.weights` says.

**Replicas.** GSPMD has no notion of "not yet reduced": left to itself it sums a gradient over all
data axes at once, where it appears, and sums twice a weight that is read twice. So each device's
partial sums are made explicit: the rows of a batch get a leading dim of the size of the axes that
split them, mapped by ``vmap``; locally it is a dim of one. The model sees its own rows only, and
a gradient leaves the mapped region through the reduction of `meshwright.train.weights`. With
several microbatches the axes that no accumulator is split over are mapped further out, and summed
over once a step. The alternative, ``shard_map`` around the loss, would make the axes of the layers
manual too, and nest badly with ring attention and pipelines.

**Normalisation.** Sums are divided by the global weight of the batch, known before the loop, so
the result does not depend on how rows are dealt to devices or microbatches.

**Guard.** A non-finite loss or norm, or a norm that spikes, leaves parameters and moments as they
were; the decision is a select inside the program, not a read-back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.hooks import Hooks, take_rows
from meshwright.models.pure import Functional
from meshwright.sharding.placement import Constrain
from meshwright.train.attention import attention_of
from meshwright.train.config import GuardConfig, LossConfig
from meshwright.train.layout import Layout
from meshwright.train.loss import chunked_loss_sum
from meshwright.train.state import TrainState
from meshwright.train.weights import Reductions, Weights

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
_EMBEDDING = "embedding"


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
    once = microbatches == 1
    apart, now = _replica_axes(spec, microbatches)
    weights = _weights(spec, Reductions(now=now, apart=apart), final=once)
    working = weights.working(params)
    inner = constrain.without((*apart, *now))

    def one(rows: Batch) -> tuple[Any, jax.Array]:
        def scaled(working: Any) -> tuple[jax.Array, jax.Array]:
            train, plain = _loss_sums(spec, weights, inner, working, rows)
            return train * scale, plain

        grads, plain = jax.grad(scaled, has_aux=True)(working)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), plain

    if now:
        one = jax.vmap(one, spmd_axis_name=now, out_axes=(None, 0))
    if apart:
        one = jax.vmap(one, spmd_axis_name=apart)
    if apart or now:
        batch = _by_replica(spec, batch, (apart, now), rows)
    if once:
        grads, plain = one(jax.tree.map(lambda x: x[0], batch))
        return weights.into_masters(grads), jnp.sum(plain), tokens

    def add(totals: tuple[Any, jax.Array], rows: Batch) -> tuple[tuple[Any, jax.Array], None]:
        grads, plain = one(rows)
        summed = jax.tree.map(jnp.add, totals, (grads, plain))
        return (weights.accumulated(summed[0]), summed[1]), None

    zeros = weights.zero_accumulators(params)
    plain0 = jnp.zeros([_size(spec.mesh, axes) for axes in (apart, now) if axes], jnp.float32)
    (grads, plain), _ = jax.lax.scan(add, (zeros, plain0), batch)
    grads = weights.summed(grads) if apart else weights.into_masters(grads)
    return grads, jnp.sum(plain), tokens


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
    tokens = math.prod(rows["tokens"].shape)
    exchange = None if spec.model.config.tied else weights.exchange_for(_EMBEDDING, tokens)
    loss = spec.loss
    score = functools.partial(
        chunked_loss_sum,
        targets=rows["targets"],
        weights=rows["weights"],
        chunks=loss.chunks,
        z_loss=loss.z_loss,
        label_smoothing=loss.label_smoothing,
    )
    hooks = Hooks(
        constrain=constrain,
        attention=attention_of(spec.mesh, constrain.rules),
        look_up=exchange or take_rows,
        score=score,
        run_layers=weights.run_layers,
    )
    sums: Any = spec.model.apply(
        weights.use_all_but_layers(working, but=(_EMBEDDING,) if exchange else ()),
        rows["tokens"],
        positions=rows.get("positions"),
        segments=rows.get("segments"),
        hooks=hooks,
    )
    return sums


def _acceptable(guard: GuardConfig, loss: jax.Array, norm: jax.Array, mean: jax.Array) -> jax.Array:
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if guard.spike_factor:
        good &= (mean == 0) | (norm <= guard.spike_factor * mean)
    return good


def _replica_axes(spec: StepSpec, microbatches: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split rows, by when gradients are summed over them.

    Returns:
        (apart, now): over the first a device's sums are kept apart until the end of the step,
        over the second they are reduced as soon as a layer's gradient is there.
    """
    layout = spec.layout
    rows = layout.rules.lookup("activations", "batch")
    split = tuple(axis for axis in (rows.axes if rows else ()) if spec.mesh.shape[axis] > 1)
    apart = layout.unreduced_axes(layout.reduced) if microbatches > 1 else ()
    return (
        tuple(axis for axis in split if axis in apart),
        tuple(axis for axis in split if axis not in apart),
    )


def _size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _by_replica(
    spec: StepSpec, batch: Batch, groups: tuple[tuple[str, ...], tuple[str, ...]], rows: int
) -> Batch:
    """[m, rows, …] → [m, replicas of each group, rows of one, …], moving no row between devices.

    Rows are split over all batch axes, major to minor; every group's axes become one dim. A group
    of no axes gets no dim.
    """
    batch_rule, length = (
        spec.layout.rules.lookup("activations", dim) for dim in ("batch", "length")
    )
    axes = batch_rule.axes if batch_rule else ()
    sizes = [spec.layout.mesh.sizes[axis] for axis in axes]
    named = [group for group in groups if group]
    order = [axis for group in named for axis in group]
    rest = [axis for axis in axes if axis not in order]  # of size one
    moved = [1 + axes.index(axis) for axis in (*order, *rest)]
    replicas = [_size(spec.mesh, group) for group in named]

    def one(x: jax.Array) -> jax.Array:
        tail = x.shape[2:]
        local = rows // _size(spec.mesh, axes)
        cube = x.reshape(x.shape[0], *sizes, local, *tail)
        cube = cube.transpose(0, *moved, *range(1 + len(sizes), cube.ndim))
        out = cube.reshape(x.shape[0], *replicas, local, *tail)
        split = PartitionSpec(None, *named, None, length.axes or None if length else None)
        return jax.lax.with_sharding_constraint(out, NamedSharding(spec.mesh, split))

    return jax.tree.map(one, batch)


def _weights(
    spec: StepSpec, reductions: Reductions | None = None, *, final: bool = False
) -> Weights:
    shapes = spec.model.shapes
    how = reductions or Reductions()
    return Weights(spec.layout, shapes, spec.mesh, spec.compute_dtype, how, final=final)
