"""The step of a plan: the user's loss, gradients into their layouts, the user's optimizer.

Everything here is traced: it is handed a dialect, a loss, an optimizer and shardings, and is the
same mathematics on any mesh. Losses are traced with the rules in force for Flax's own logical
constraints (`meshwright.sharding.logical`).

Under ``independent_rows`` the rows of a microbatch are mapped by ``vmap`` over the axes that split
rows and no accumulator, each device's gradients stay apart in a leading dim of the accumulator, and
one sum ends the step: m microbatches cost one reduction instead of m. It is asked for and not
found out, because only the user knows that a loss is a mean over rows; batch statistics and keys,
which tie rows together, are refused with it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding.decisions import axes_of
from meshwright.sharding.dims import format_path, format_shape
from meshwright.sharding.errors import ConfigError, PlacementError
from meshwright.sharding.logical import resolving
from meshwright.sharding.placement import Constrain
from meshwright.sharding.placer import Placer
from meshwright.train.dialects import Dialect
from meshwright.train.lookups import looked_up
from meshwright.train.weights import scope_of

__all__ = ["Accumulation", "ModelState", "StepParts", "kept"]

_KEYS = ("key", "rng", "rngs")  # what a loss may call the RNG key that it takes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelState:
    """What a plan carries from step to step.

    Attributes:
        step: int32, steps finished.
        params: what is trained, in the structure of the user's library.
        rest: the model's other arrays: statistics, RNG streams, frozen weights.
        opt_state: the optax state.
        key: for losses that take one; a step folds its number into it.
    """

    step: Any
    params: Any
    rest: Any
    opt_state: Any
    key: Any


@dataclass(frozen=True)
class Accumulation:
    """How a step goes through its batch.

    Attributes:
        microbatches: it accumulates gradients over.
        independent_rows: the loss is a mean over rows that do not see one another.
        regather: gather weights again in the backward pass.
    """

    microbatches: int = 1
    independent_rows: bool = False
    regather: bool = False

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise ConfigError(
                f"cannot accumulate over {self.microbatches} microbatches", fix="use 1 or more"
            )


@dataclass(frozen=True)
class StepParts:
    """What a step is made of.

    Attributes:
        dialect: the model.
        optimizer: an optax transformation.
        loss, eval_loss: see `meshwright.train.model_plan.plan`.
        how: microbatches, and what is gathered and reduced when.
        placer: mesh and rules.
    """

    dialect: Dialect
    optimizer: Any
    loss: Callable[..., Any]
    eval_loss: Callable[..., Any]
    how: Accumulation
    placer: Placer

    def __post_init__(self) -> None:
        if not self.how.independent_rows:
            return
        tied = "the loss takes a key" if _takes_key(self.loss) else ""
        if jax.tree.leaves(self.dialect.shapes[1]):
            tied = "the model carries arrays that are not trained"
        if tied:
            raise ConfigError(
                "cannot treat rows as independent",
                why=f"{tied}, which rows would share",
                fix="leave independent_rows out: gradients are then reduced every microbatch",
            )

    def step(
        self, held: Mapping[str, Any], state: ModelState, batch: Any
    ) -> tuple[ModelState, dict[str, Any]]:
        """One optimizer step; see `meshwright.train.model_plan.Plan.step`.

        Args:
            held: shardings by role; see `meshwright.train.model_plan.Plan.held`.
            state: before the step.
            batch: the rows of all microbatches.
        """
        loss, grads, metrics, rest = self.gradients(held, state, batch)
        params = _put(state.params, held["updated"])
        # Those that look at the loss, as reduce_on_plateau does, find it.
        seen = {"value": loss} if _takes_value(self.optimizer) else {}
        updates, opt_state = self.optimizer.update(grads, state.opt_state, params, **seen)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        after = replace(
            state,
            step=state.step + 1,
            params=_put(params, held["params"]),
            opt_state=kept(opt_state, state.opt_state, "the optimizer's state"),
            rest=rest,
        )
        return after, {"loss": loss, **metrics}

    def gradients(
        self, held: Mapping[str, Any], state: ModelState, batch: Any
    ) -> tuple[Any, Any, dict[str, Any], Any]:
        """(loss, gradients in the layout of the update, metrics, what is not trained, after)."""
        key = jax.random.fold_in(state.key, state.step) if _takes_key(self.loss) else None
        if self.how.microbatches == 1:
            # Nothing is accumulated: gradients go to where the update is at once.
            final = {**held, "gradients": held["updated"]}
            return self._one(final, state.params, state.rest, batch, key)
        if self.how.independent_rows:
            found = self._apart(held, state, batch)
        else:
            found = self._accumulated(held, state, batch, key)
        loss, grads, metrics, rest = found
        return loss, _put(grads, held["updated"]), metrics, rest

    def evaluate(self, held: Mapping[str, Any], state: ModelState, batch: Any) -> dict[str, Any]:
        """Metrics of a batch."""
        key = jax.random.fold_in(state.key, state.step) if _takes_key(self.eval_loss) else None
        params = self._used(state.params, held["params"], held["used"], held["gradients"])
        rest = self._used(state.rest, held["rest"], held["rest_used"], held["rest"])
        model = self.dialect.evaluated(self.dialect.build(params, rest))
        loss, metrics, _ = self._called(self.eval_loss, model, batch, key)
        return {"loss": loss, **metrics}

    def _one(
        self, held: Mapping[str, Any], params: Any, rest: Any, batch: Any, key: Any
    ) -> tuple[Any, Any, dict[str, Any], Any]:
        """Loss, gradients, metrics and other arrays of one microbatch."""
        used_rest = self._used(rest, held["rest"], held["rest_used"], held["rest"])
        tables = self._tables(held, params, used_rest, batch, key)

        def scalar(params: Any) -> tuple[Any, Any]:
            used = self._used(params, held["params"], held["used"], held["gradients"], tables)
            model = self.dialect.build(used, used_rest)
            loss, metrics, changed = self._called(self.loss, model, batch, key)
            after = self.dialect.after(model, changed, used_rest, used)
            after = kept(after, rest, "what the loss changes")
            return loss, (metrics, _put(after, held["rest"]))

        if self.how.regather:
            scalar = jax.checkpoint(scalar, policy=_keep_all_but_gathered)
        (loss, (metrics, after)), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return loss, _put(grads, held["gradients"]), metrics, after

    def _tables(self, held: Mapping[str, Any], params: Any, rest: Any, batch: Any, key: Any) -> Any:
        """Which parameters rows are looked up in, if any is gathered; see `looked_up`."""
        pairs = zip(jax.tree.leaves(held["params"]), jax.tree.leaves(held["used"]), strict=True)
        if all(at.spec == used.spec for at, used in pairs):
            return None

        def forward(params: Any, rest: Any, batch: Any) -> Any:
            return self._called(self.loss, self.dialect.build(params, rest), batch, key)[0]

        found = looked_up(forward, params, rest, batch)
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def _used(self, tree: Any, at: Any, used: Any, reduced: Any, tables: Any = None) -> Any:
        """Arrays gathered over the axes that split tokens; gradients go into their layout at once.

        Left to itself the partitioner may reshard activations to where weights are, which nobody
        asked for, and on meshes of three axes XLA then computed wrong numbers (a repeat between two
        matmuls; jax 0.10.2 and 0.12.0).

        Args:
            tree: arrays of the model, trained or not.
            at: their shardings between steps.
            used: as the model reads them.
            reduced: of their gradients.
            tables: which of them rows are looked up in; None for none.
        """
        put = jax.lax.with_sharding_constraint

        def one(path: Any, x: Any, at: Any, used: Any, reduced: Any, is_table: bool) -> Any:
            if at.spec == used.spec:
                return x
            # Whoever reads the compiled program knows whose bytes move.
            with jax.named_scope(scope_of(format_path(path))):
                if not jnp.issubdtype(x.dtype, jnp.inexact):
                    return put(x, used)
                return gathered(x, used, reduced, is_table)

        def gathered(x: Any, used: Any, reduced: Any, is_table: bool) -> Any:
            @jax.custom_vjp
            def gather(x: jax.Array) -> jax.Array:
                return put(x, used)

            def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
                return (put(put(grad, used) if is_table else grad, reduced),)

            gather.defvjp(lambda x: (gather(x), None), backward)
            return gather(x)

        if tables is None:
            tables = jax.tree.map(lambda _: False, tree)
        return jax.tree_util.tree_map_with_path(one, tree, at, used, reduced, tables)

    def _called(
        self, loss: Callable[..., Any], model: Any, batch: Any, key: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        """(scalar, metrics, changed) of a loss function, whichever of these it returns."""
        constrain = Constrain(self.placer.rules, self.placer.mesh, {"batch"})
        word = _key_word(loss)
        given = (key,) if key is not None and not word else ()
        named = {word: key} if key is not None and word else {}
        with resolving(constrain):
            found = loss(model, batch, *given, **named)
        parts: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
        scalar: Any = parts[0] if parts else ()
        metrics, changed = (*parts[1:], None, None)[:2]
        if not 0 < len(parts) < 4 or jnp.shape(scalar) != ():
            raise ConfigError(
                "cannot use what the loss function returned",
                where=f"{len(parts)} values, the first of shape {jnp.shape(scalar)}",
                why="a scalar, (scalar, metrics) or (scalar, metrics, changed) is needed",
                fix="return the mean over the batch",
            )
        if metrics is None:
            metrics = {}
        return scalar, dict(metrics) if isinstance(metrics, Mapping) else {"aux": metrics}, changed

    def _accumulated(
        self, held: Mapping[str, Any], state: ModelState, batch: Any, key: Any
    ) -> tuple[Any, Any, dict[str, Any], Any]:
        """Gradients summed over microbatches, reduced in each."""
        numbers = jnp.arange(self.how.microbatches)

        def one(carry: tuple[Any, Any], item: tuple[Any, Any]) -> tuple[tuple[Any, Any], Any]:
            total, rest = carry
            rows, number = item
            mine = None if key is None else jax.random.fold_in(key, number)
            loss, grads, metrics, rest = self._one(held, state.params, rest, rows, mine)
            total = _put(jax.tree.map(jnp.add, total, grads), held["gradients"])
            return (total, rest), (loss, metrics)

        zeros = _put(jax.tree.map(jnp.zeros_like, state.params), held["gradients"])
        items = (self._dealt(batch, ()), numbers)
        (total, rest), found = jax.lax.scan(one, (zeros, state.rest), items)
        grads = jax.tree.map(lambda g: g / self.how.microbatches, total)
        loss, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), found)
        return loss, grads, metrics, rest

    def _apart(
        self, held: Mapping[str, Any], state: ModelState, batch: Any
    ) -> tuple[Any, Any, dict[str, Any], Any]:
        """Gradients summed over microbatches on each device, reduced once."""
        axes = self.replica_axes(held["gradients"])
        sizes = self.placer.spec.sizes
        parts = math.prod(sizes[axis] for axis in axes)

        def one(total: Any, rows: Any) -> tuple[Any, Any]:
            def mine(rows: Any) -> Any:
                loss, grads, metrics, _ = self._one(held, state.params, state.rest, rows, None)
                return loss, grads, metrics

            mapped = jax.vmap(mine, spmd_axis_name=axes) if axes else jax.vmap(mine)
            loss, grads, metrics = mapped(rows)
            return self._spread(jax.tree.map(jnp.add, total, grads), held, axes), (loss, metrics)

        zeros = jax.tree.map(lambda p: jnp.zeros((parts, *p.shape), p.dtype), state.params)
        zeros = self._spread(zeros, held, axes)
        total, found = jax.lax.scan(one, zeros, self._dealt(batch, axes))
        count = parts * self.how.microbatches
        grads = jax.tree.map(lambda g: jnp.sum(g, axis=0) / count, total)
        loss, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=(0, 1)), found)
        return loss, grads, metrics, state.rest

    def _spread(self, grads: Any, held: Mapping[str, Any], axes: tuple[str, ...]) -> Any:
        """Hold sums with a leading dim of replicas to their layout."""

        def one(x: Any, sharding: NamedSharding) -> Any:
            spec = PartitionSpec(axes or None, *sharding.spec)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.placer.mesh, spec))

        return jax.tree.map(one, grads, held["gradients"])

    def replica_axes(self, gradients: Any) -> tuple[str, ...]:
        """Axes of more than one device that split rows and no accumulator."""
        split = {
            axis
            for sharding in jax.tree.leaves(gradients)
            for entry in sharding.spec
            for axis in axes_of(entry)
        }
        rows = self.placer.rules.axes_for("activations", "batch")
        sizes = self.placer.spec.sizes
        return tuple(axis for axis in rows if axis not in split and sizes[axis] > 1)

    def _dealt(self, batch: Any, apart: tuple[str, ...]) -> Any:
        """[rows, …] → [microbatches, (replicas,) rows of one, …], every m-th row together."""
        count = self.how.microbatches
        rows_axes = self.placer.rules.axes_for("activations", "batch")
        left = tuple(axis for axis in rows_axes if axis not in apart)
        parts = math.prod(self.placer.spec.sizes[axis] for axis in apart)

        def one(x: Any) -> Any:
            shape = jnp.shape(x)
            if not shape or shape[0] % (count * parts):
                raise PlacementError(
                    f"cannot deal an array of the batch to {count} microbatches",
                    where=f"shape {shape}, mesh {self.placer.spec}",
                    why=f"its rows are not divisible by {count} × {parts}",
                    fix=f"make the batch a multiple of {count * parts} rows",
                )
            rows = shape[0] // count
            x = jnp.swapaxes(x.reshape(rows, count, *shape[1:]), 0, 1)
            if self.how.independent_rows:
                x = x.reshape(count, parts, rows // parts, *shape[1:])
                spec = PartitionSpec(None, apart or None, left or None)
            else:
                spec = PartitionSpec(None, rows_axes or None)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.placer.mesh, spec))

        return jax.tree.map(one, batch)


def _keep_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Rematerialisation policy: constraints and what holds nothing but them are made again."""
    if primitive.name == "sharding_constraint":
        return False
    inner = getattr(params.get("call_jaxpr"), "jaxpr", None)
    if primitive.name.startswith("custom_vjp_call") and inner is not None:
        return any(eqn.primitive.name != "sharding_constraint" for eqn in inner.eqns)
    return True


def kept(new: Any, old: Any, whose: str) -> Any:
    """A part of the state after a step with the dtypes it had: the next is to be the same program.

    Another precision is taken back, and so are weak types.

    Raises:
        ConfigError: other leaves or shapes, or another kind of number.
    """
    before, structure = jax.tree_util.tree_flatten_with_path(old)
    after = jax.tree.leaves(new)
    if len(after) != len(before):
        raise ConfigError(
            f"a step changes how many arrays {whose} has",
            where=f"{len(before)} before, {len(after)} after",
            why="the state of a compiled step keeps its structure",
            fix="make all arrays where the model or the optimizer is made",
        )

    def one(path: Any, x: Any, now: Any) -> Any:
        if jnp.shape(now) != x.shape:
            raise ConfigError(
                f"a step changes the shape of `{format_path(path)}` of {whose}",
                where=f"{format_shape(x.shape)} before, {format_shape(jnp.shape(now))} after",
                why="the state of a compiled step keeps its shapes",
                fix="make it in its final shape, or keep it out of the model",
            )
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return now
        found = jnp.result_type(now)
        kinds = (jnp.bool_, jnp.integer, jnp.inexact)
        if any(jnp.issubdtype(found, k) != jnp.issubdtype(x.dtype, k) for k in kinds):
            raise ConfigError(
                f"cannot keep `{format_path(path)}` from step to step",
                where=whose,
                why=f"it was {x.dtype} and a step makes it {found}: the next would be "
                "another program",
                fix=f"give it the type it has after a step, or .astype({x.dtype}) there",
            )
        return jax.lax.convert_element_type(now, x.dtype)

    pairs = zip(before, after, strict=True)
    return jax.tree.unflatten(structure, [one(path, x, now) for (path, x), now in pairs])


def _put(tree: Any, shardings: Any) -> Any:
    """Each array constrained to its sharding."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _takes_key(loss: Callable[..., Any]) -> bool:
    """Whether a loss function has a third argument that must be given, or one called for a key."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [p for p in _parameters(loss) if p.kind in plain][2:3]
    by_place = any(p.default is p.empty or p.name in _KEYS for p in third)
    return by_place or _key_word(loss) is not None


def _key_word(loss: Callable[..., Any]) -> str | None:
    """The name by which alone a loss function takes its key, if it does."""
    only = [p.name for p in _parameters(loss) if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return next((name for name in only if name in _KEYS), None)


def _takes_value(optimizer: Any) -> bool:
    """Whether an optimizer can be told the loss, by optax's name for it."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return False
    parameters = _parameters(optimizer.update)
    return any(p.name == "value" or p.kind is p.VAR_KEYWORD for p in parameters)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
