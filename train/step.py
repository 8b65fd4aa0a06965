"""The train step: one jitted, donated program from (state, batch) to (state, scalars).

Placement, forward, backward, reduction over the data axes, clipping and update are one
program; microbatches and layers are loops inside it. Nothing here has side effects.

**Weights** are cast and gathered where they are read, and their gradients reduced, as
`meshwright.train.weights` says.

**Replicas.** Rows, and the length of rows, are mapped over the axes that split them, as
`meshwright.train.replicas` says, so that each device's partial sums are explicit.

**Normalisation.** Sums are divided by the global weight of the batch, known before the loop, so
the result does not depend on how rows are dealt to devices or microbatches.

**Guard.** A non-finite loss or norm, or a norm that spikes, leaves parameters and moments as they
were; the decision is a select inside the program, not a read-back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from meshwright.models.hooks import Hooks, take_rows
from meshwright.models.pure import Functional
from meshwright.models.routing import ExpertSums, expert_loss, load_imbalance, load_of
from meshwright.sharding.placement import Constrain
from meshwright.train.attention import attention_of
from meshwright.train.config import ContextConfig, GuardConfig, LossConfig, PipelineConfig
from meshwright.train.expert_parallel import ExpertParallel
from meshwright.train.expert_rows import RowExperts
from meshwright.train.layout import Layout
from meshwright.train.loss import chunked_loss_sum
from meshwright.train.parallelism import choose_schedule
from meshwright.train.pipeline import Pipeline
from meshwright.train.replicas import Batch, Replicas
from meshwright.train.row_parts import parts_of
from meshwright.train.stages import StageModel
from meshwright.train.state import TrainState
from meshwright.train.stored_order import in_stored_order
from meshwright.train.weights import Reductions, Weights

__all__ = [
    "StepSpec",
    "Sums",
    "apply_gradients",
    "eval_step",
    "gradients",
    "sampling_hooks",
    "sampling_params",
    "train_step",
]

Sums = dict[str, jax.Array]
"""Sums over a batch: ``plain``, the plain cross-entropy; of a model with experts also ``load`` and
``dropped`` of `meshwright.models.routing.ExpertSums`."""

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
        context: how attention crosses the axes that split the length of rows.
        pipeline: how microbatches cross the axes that split the layers.
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
    context: ContextConfig
    pipeline: PipelineConfig

    def replicas(self, microbatches: int = 1) -> Replicas:
        """What a batch of so many microbatches is mapped over."""
        return Replicas.of(self.layout, self.mesh, self.context.order, microbatches)

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
        ``skipped`` (1.0 if the update was refused) and ``bad_in_row``. Of a model with experts
        also ``dropped``, the fraction of choices that found no room, and ``imbalance``, see
        `meshwright.models.routing.load_imbalance`; both of the whole batch.
    """
    return apply_gradients(spec, state, *gradients(spec, constrain, state.params, batch))


def apply_gradients(
    spec: StepSpec, state: TrainState, grads: Any, sums: Sums, tokens: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The second half of a step: clip, guard, update.

    Args:
        spec: the program's constants.
        state: before the step.
        grads, sums, tokens: as `gradients` returns them.

    Returns:
        As `train_step`.
    """
    grads = _as_stored(spec, grads)
    loss = sums["plain"] / jnp.maximum(tokens, 1.0)
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
    if "load" in sums:
        chosen = jnp.sum(sums["load"]).astype(jnp.float32)
        metrics["dropped"] = jnp.sum(sums["dropped"]).astype(jnp.float32) / chosen
        metrics["imbalance"] = load_imbalance(sums["load"])
    return after, metrics


def eval_step(
    spec: StepSpec, constrain: Constrain, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Plain cross-entropy of a batch: (sum over counted tokens, their weight), no gradients."""
    replicas = spec.replicas()
    weights = _weights(spec, Reductions(now=replicas.axes, stage=replicas.stage))
    working = weights.working(params)
    inner = constrain.without(replicas.axes)
    if replicas.stage:
        pipeline = _pipeline(spec, replicas, weights, inner, batch)
        plain = pipeline.plain_sum(working, replicas.deal(batch))
        return plain, jnp.sum(batch["weights"])

    def plain_sum(rows: Batch) -> jax.Array:
        return _loss_sums(spec, replicas, weights, inner, working, rows)[1]["plain"]

    def one(total: jax.Array, rows: Batch) -> tuple[jax.Array, None]:
        return total + jnp.sum(replicas.mapped(plain_sum)(rows)), None

    plain, _ = jax.lax.scan(one, jnp.zeros((), jnp.float32), replicas.deal(batch))
    return plain, jnp.sum(batch["weights"])


def gradients(
    spec: StepSpec, constrain: Constrain, params: Any, batch: Batch
) -> tuple[Any, Sums, jax.Array]:
    """Gradients of the mean training loss over a global batch.

    Args:
        spec, constrain: as `train_step`.
        params: float32 masters.
        batch: see `Batch`.

    Returns:
        (gradients, sums over the batch, counted tokens): gradients float32 in the masters' layout,
        already divided by the counted tokens.
    """
    microbatches, model = batch["tokens"].shape[0], spec.model.config
    tokens = jnp.sum(batch["weights"])
    scale = 1.0 / jnp.maximum(tokens, 1.0)
    replicas = spec.replicas(microbatches)
    once = microbatches == 1 and not replicas.stage
    reductions = Reductions(now=replicas.now, apart=replicas.apart, stage=replicas.stage)
    weights = _weights(spec, reductions, final=once)
    working = weights.working(params)
    inner = constrain.without(replicas.axes)
    if replicas.stage:
        pipeline = _pipeline(spec, replicas, weights, inner, batch)
        grads, sums = pipeline.gradients(working, replicas.deal(batch), scale)
        return weights.summed(grads), sums, tokens

    def one(rows: Batch) -> tuple[Any, Sums]:
        def scaled(working: Any) -> tuple[jax.Array, Sums]:
            train, sums = _loss_sums(spec, replicas, weights, inner, working, rows)
            return train * scale, sums

        grads, sums = jax.grad(scaled, has_aux=True)(working)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    one = replicas.mapped(one, out_axes=(None, 0))
    batch = replicas.deal(batch)
    if once:
        grads, sums = one(jax.tree.map(lambda x: x[0], batch))
        return weights.into_masters(grads), replicas.total(sums), tokens

    def add(totals: tuple[Any, Sums], rows: Batch) -> tuple[tuple[Any, Sums], None]:
        summed = jax.tree.map(jnp.add, totals, one(rows))
        return (weights.accumulated(summed[0]), summed[1]), None

    lead = tuple(map(replicas.size, replicas.levels))
    start = {"plain": jnp.zeros(lead, jnp.float32)}
    if model.experts.count:
        none = load_of(ExpertSums.zeros(model, 0))
        start |= {name: jnp.zeros((*lead, *x.shape), x.dtype) for name, x in none.items()}
    (grads, sums), _ = jax.lax.scan(add, (weights.zero_accumulators(params), start), batch)
    grads = weights.summed(grads) if replicas.apart else weights.into_masters(grads)
    return grads, replicas.total(sums), tokens


def sampling_params(spec: StepSpec, params: Any) -> Any:
    """Masters as generation reads them: layers in their working layout, the rest ready for use."""
    weights = _weights(spec)
    return spec.model.in_order(weights.use_all_but_layers(weights.working(params)))


def sampling_hooks(spec: StepSpec) -> Hooks:
    """Hooks for generation: as in training, but a batch of prompts stays whole."""
    constrain = spec.constrain().without(spec.layout.rules.token_axes())
    return Hooks(constrain=constrain, run_layers=_weights(spec).run_layers)


def _loss_sums(
    spec: StepSpec,
    replicas: Replicas,
    weights: Weights,
    constrain: Constrain,
    working: Any,
    rows: Batch,
) -> tuple[jax.Array, Sums]:
    """The training loss of one replica's rows, and what is counted of them."""
    tokens = math.prod(rows["tokens"].shape)
    exchange = None if spec.model.config.tied else weights.exchange_for(_EMBEDDING, tokens)
    hooks = _hooks(spec, replicas, weights, constrain, rows)
    found: Any = spec.model.apply(
        weights.use_all_but_layers(working, but=(_EMBEDDING,) if exchange else ()),
        rows["tokens"],
        positions=rows.get("positions"),
        segments=rows.get("segments"),
        hooks=replace(hooks, look_up=exchange or take_rows),
    )
    train, plain, *experts = found
    return train, {"plain": plain, **(experts[0] if experts else {})}


def _hooks(
    spec: StepSpec, replicas: Replicas, weights: Weights, constrain: Constrain, rows: Batch
) -> Hooks:
    """Where parallelism steps into the model, and what it makes of logits: sums of losses."""
    loss = spec.loss
    score = functools.partial(
        chunked_loss_sum,
        targets=rows["targets"],
        weights=rows["weights"],
        chunks=loss.chunks,
        z_loss=loss.z_loss,
        label_smoothing=loss.label_smoothing,
    )
    return Hooks(
        constrain=constrain,
        reshard=constrain.reshard,
        attention=attention_of(spec.mesh, constrain.rules, replicas, spec.context.kind),
        experts=_experts(spec, replicas, weights),
        rows=parts_of(replicas),
        score=score,
        collect=lambda sums, experts: (
            sums[0] + expert_loss(experts, rows["weights"]),
            sums[1],
            load_of(experts),
        ),
        run_layers=weights.run_layers,
    )


def _experts(spec: StepSpec, replicas: Replicas, weights: Weights) -> Callable[..., Any] | None:
    """How tokens get to experts where that takes more than one device; None where it does not."""
    if replicas.expert:
        return ExpertParallel(replicas, weights)
    return RowExperts(replicas) if spec.model.config.experts.count and replicas.length else None


def _pipeline(
    spec: StepSpec, replicas: Replicas, weights: Weights, constrain: Constrain, batch: Batch
) -> Pipeline:
    """The pipeline of a mesh whose stages the layers are split over."""
    stages = replicas.size(replicas.stage)
    schedule = choose_schedule(spec.pipeline, stages, batch["tokens"].shape[0])

    def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
        # Asked for parts of the stream at once, the partitioner takes ids apart too and gathers the
        # whole table over the axis that splits it.
        return constrain(take_rows(table, tokens), ("batch", "length", "embed"))

    def hooks(rows: Batch) -> Hooks:
        found = _hooks(spec, replicas, weights, constrain, rows)
        return replace(found, look_up=look_up) if constrain.rules.stream_axes() else found

    model = StageModel(spec.model, weights, hooks)
    stream = replicas.size(constrain.rules.stream_axes())
    return Pipeline(schedule, replicas, model, spec.model.live, stream)


def _as_stored(spec: StepSpec, grads: dict[str, Any]) -> dict[str, Any]:
    """The embedding's gradient as its master lies in memory."""
    layout = spec.layout.masters.specs(spec.model.shapes)[_EMBEDDING]
    held = NamedSharding(spec.mesh, layout)
    return {**grads, _EMBEDDING: in_stored_order(grads[_EMBEDDING], held)}


def _acceptable(guard: GuardConfig, loss: jax.Array, norm: jax.Array, mean: jax.Array) -> jax.Array:
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if guard.spike_factor:
        good &= (mean == 0) | (norm <= guard.spike_factor * mean)
    return good


def _weights(
    spec: StepSpec, reductions: Reductions | None = None, *, final: bool = False
) -> Weights:
    shapes = spec.model.shapes
    how = reductions or Reductions()
    return Weights(spec.layout, shapes, spec.mesh, spec.compute_dtype, how, final=final)
