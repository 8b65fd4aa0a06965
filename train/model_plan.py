"""A plan for anybody's model: where everything lives, and one compiled step that keeps it there.

`plan` takes a model (nnx, linen, or any pytree), an optax optimizer, a loss function, the shapes of
a batch, a mesh and rules. What comes back decides every layout before anything is allocated, and
then makes state, places batches, steps, saves and restores::

    plan = meshwright.plan(
        Model, optimizer=optax.adamw(3e-4), loss=loss, batch=batch, mesh="data=2,fsdp=4"
    )
    state = plan.init(jax.random.key(0))
    state, metrics = plan.step(state, plan.place(batch))

**The step is the user's own.** Loss and model run as they would in ``jax.jit``, on global arrays.
What is added are shardings of arguments and results, and two layouts in between: a weight is
gathered over the axes that split tokens before the model reads it, and its gradient is put into its
layout where it appears, so that reductions land in shards. Without the first the partitioner may
move activations to the weights instead. A stack of layers (first dim ``layers``) is gathered in the
loop that takes it apart, as the compiler sees fit. Wrapping each layer, as our own trainer does,
would need the model's cooperation.

**Layouts between steps.** Parameters and other arrays of the model lie as the ``params`` table
says, moments as ``optimizer`` does. Under ZeRO-1 and -2 a parameter is cut for its update and
gathered after it: no second copy is kept. The accumulator over microbatches goes by ``gradients``.

**Microbatches** take every m-th row, so which rows meet does not depend on the mesh, and no row
changes its device. The loss is the mean over microbatches. Left to the compiler, gradients are
reduced over the data axes in each; for a loss that is a mean over rows that do not see one another,
``independent_rows`` keeps each device's sums apart and reduces once a step.

Nothing of a plan is hidden: ``state`` is a pytree, ``plan.jitted`` what ``jax.jit`` returned,
`meshwright.sharding.placer.Placer` places trees for those who keep their own step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.decisions import Decision, Decisions, resolve
from meshwright.sharding.dims import Dims, Leaf, describe_optimizer
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.logical import check_constraints
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import check_random
from meshwright.sharding.placer import Patterns, Placer, is_array, strong
from meshwright.sharding.process_rows import copy_to
from meshwright.sharding.rules import Rules, Table
from meshwright.sharding.strategies import Strategy
from meshwright.train.dialects import Dialect, Trainable, dialect_of
from meshwright.train.layout import compute_spec
from meshwright.train.plan_step import Accumulation, ModelState, StepParts

if TYPE_CHECKING:
    import optax

    from meshwright.sharding.planned import PlanReport
    from meshwright.sharding.topology import Topology

__all__ = ["Plan", "plan"]

_STACKED = ("layers", "dense_layers", "stage", "stages")


def plan(
    model: Any,
    *,
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    batch: Any,
    mesh: str | MeshSpec | Mesh,
    rules: Rules | Sequence[Strategy | str] | None = None,
    dims: Patterns | None = None,
    inputs: Callable[[Any], Any] | Sequence[Any] | None = None,
    trainable: Trainable = None,
    eval_loss: Callable[..., Any] | None = None,
    microbatches: int = 1,
    independent_rows: bool = False,
    regather: bool = False,
    batch_dims: Mapping[str, Dims] | None = None,
    topology: str | Topology = "local",
) -> Plan:
    """Resolve a model, its optimizer and its batch on a mesh.

    Args:
        model: an nnx module or its class, a linen module, a pytree of arrays (an equinox module),
            or a function of a key, of ``rngs`` or of nothing that returns one of these or linen's
            variables.
        optimizer: any optax transformation.
        loss: ``loss(model, batch)``, or ``loss(model, batch, rng)`` for a key of its own each step.
            The model is the nnx module, linen's variables, or the tree. Returns a scalar,
            ``(scalar, metrics)``, or ``(scalar, metrics, changed)``: of linen the collections that
            ``apply`` returned as mutated, of a tree the tree with its changed arrays. What nnx
            modules change of themselves is kept without that.
        batch: arrays or ``jax.ShapeDtypeStruct``; rows first.
        mesh: such as ``"data=2,fsdp=4"``, on the devices of ``topology``; or a built mesh.
        rules: Rules, or strategies and written rules; None for the strategy of each axis' name.
        dims: path patterns that name dims: ``{"*/kernel": ("embed", "mlp"), "*": None}``, None for
            leaves that need no names. Flax metadata is used without them.
        inputs: of a linen module, the arguments of its call: a function of the batch, or they
            themselves. By default the batch, or the first of a tuple.
        trainable: which leaves are trained: path patterns, a function of the path, an nnx filter.
            By default ``nnx.Param``, the collection ``params``, all floating-point arrays.
        eval_loss: for `Plan.eval_step`, where it is another.
        microbatches: to accumulate gradients over.
        independent_rows: see this module.
        regather: gather weights a second time in the backward pass instead of keeping them: under
            fsdp a device then holds its shards and a few layers.
        batch_dims: names of the dims of a batch's arrays by path pattern, where rows are not first
            or more than rows is split.
        topology: whose devices; ``local`` for those of this machine, ``v5p:4x4x4`` to decide and
            compile for hardware that is not here.

    Raises:
        ConfigError: a model, loss or batch that cannot be used so.
        MeshError, TopologyError, DimsError, RulesError, PlacementError: what cannot be placed.
    """
    placer = Placer.on(mesh, rules, dims=dims, batch_dims=batch_dims, topology=topology)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), batch)
    dialect = dialect_of(model, _inputs(inputs, shapes), trainable)
    losses = (loss, eval_loss or loss)
    how = Accumulation(microbatches, independent_rows, regather)
    parts = StepParts(dialect, optimizer, *losses, how, placer)
    return Plan.of(parts, shapes)


def _inputs(inputs: Any, batch: Any) -> Sequence[Any] | None:
    """What a linen module is called with to look at it, arrays as shapes; None if nobody says."""
    if callable(inputs):
        found: list[Any] = []

        def look(batch: Any) -> None:
            given = inputs(batch)
            # What is no array, such as a flag, is given to the call as it is.
            found.extend(given if isinstance(given, tuple | list) else (given,))

        jax.eval_shape(look, batch)
        return jax.tree.map(_shape_of, found)
    if inputs is not None:
        return jax.tree.map(_shape_of, list(inputs))
    if isinstance(batch, jax.ShapeDtypeStruct):
        return (batch,)
    return batch[:1] if isinstance(batch, tuple | list) and batch else None


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


@dataclass(frozen=True)
class Plan:
    """A model resolved on a mesh; see this module.

    Attributes:
        placer: mesh and rules.
        decisions: where the model's arrays live, trained ones first; table ``params``.
        gradients_at: where the accumulator of gradients lives; table ``gradients``.
        moments: where the optimizer's state lives; table ``optimizer``.
        updated_at: where parameters are updated; table ``optimizer``.
        batch: shapes of a batch.
        parts: what the step is made of.
        shapes: the state as ShapeDtypeStructs with their shardings.
    """

    placer: Placer
    decisions: Decisions
    gradients_at: Decisions
    moments: Decisions
    updated_at: Decisions
    batch: Any
    parts: StepParts
    shapes: ModelState

    @classmethod
    def of(cls, parts: StepParts, batch: Any) -> Plan:
        """Decide every layout."""
        placer, dialect = parts.placer, parts.dialect
        trained, rest = _named(placer, dialect)
        opt_shapes = jax.eval_shape(parts.optimizer.init, dialect.shapes[0])
        moments = describe_optimizer(opt_shapes, trained)
        everything = (*trained, *rest)
        # Of a model that is mostly frozen, what is trained may be too small to be split at all.
        mostly = 2 * _bytes(trained) >= _bytes(everything)

        def table(name: Table, leaves: Sequence[Leaf], *, check: bool) -> Decisions:
            return resolve(
                leaves, placer.rules, placer.spec, name, check_used=check, beside=everything
            )

        decisions = table("params", everything, check=True)
        reduced = table("gradients", trained, check=mostly)
        updated = table("optimizer", trained, check=mostly)
        moved = table("optimizer", moments, check=False)
        placer.batch_shardings(_microbatch(batch, parts.how.microbatches))
        shapes = _state_shapes(placer, decisions, moved, dialect, opt_shapes)
        return cls(placer, decisions, reduced, moved, updated, batch, parts, shapes)

    @property
    def spec(self) -> MeshSpec:
        """Names and sizes of the mesh."""
        return self.placer.spec

    @property
    def mesh(self) -> Mesh:
        """The built mesh."""
        return self.placer.mesh

    @property
    def rules(self) -> Rules:
        """The folded rules."""
        return self.placer.rules

    @property
    def shardings(self) -> ModelState:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.shapes)

    @property
    def batch_shapes(self) -> Any:
        """A batch as ShapeDtypeStructs with their shardings."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.batch,
            self.placer.batch_shardings(self.batch),
        )

    def init(self, key: Any = None) -> ModelState:
        """The first state, each array born in its layout.

        Random bits do not depend on the mesh; what initialisers compute from them in floating point
        may, in its last places (`meshwright.sharding.placement`).

        Args:
            key: an RNG key (or a seed); of a model that exists its values are taken, copied, and
                the key only serves losses that want one.

        Raises:
            ConfigError: a model made abstractly has no values.
        """
        self.placer.check_here()
        check_random(self.mesh)
        key = jax.random.key(key or 0) if key is None or isinstance(key, int) else key
        with self.placer.in_force():
            return self._init(self.placer.on_mesh(key))

    def _init(self, key: Any) -> ModelState:
        dialect, shardings = self.parts.dialect, self.shardings
        if dialect.make is not None:
            return self._jitted_build(key)
        if dialect.values is None:
            raise ConfigError(
                "cannot initialise the model",
                why="its arrays are shapes, without values or a function that makes them",
                fix="pass the class, or a function of a key; or restore a checkpoint",
            )
        params, rest = (
            jax.tree.map(lambda x, to: copy_to(strong(x), to), values, at)
            for values, at in zip(dialect.values, (shardings.params, shardings.rest), strict=True)
        )
        first = jax.jit(self._optimizer_state, out_shardings=shardings.opt_state)
        opt_state = first(params)
        step = copy_to(jnp.zeros((), jnp.int32), shardings.step)
        key = copy_to(key, shardings.key)
        return ModelState(step, params, rest, opt_state, key)

    @functools.cached_property
    def _jitted_build(self) -> Any:
        return jax.jit(self._build, out_shardings=self.shardings)

    def _build(self, key: Any) -> ModelState:
        assert self.parts.dialect.make is not None
        model_key, run_key = jax.random.split(key)
        params, rest = jax.tree.map(strong, self.parts.dialect.make(model_key))
        opt_state = self._optimizer_state(params)
        return ModelState(jnp.zeros((), jnp.int32), params, rest, opt_state, run_key)

    def _optimizer_state(self, params: Any) -> Any:
        return jax.tree.map(strong, self.parts.optimizer.init(params))

    def place(self, batch: Any) -> Any:
        """A host's batch onto the devices; see `Placer.place`."""
        return self.placer.place(batch)

    def step(self, state: ModelState, batch: Any) -> tuple[ModelState, dict[str, Any]]:
        """One optimizer step; the state is donated.

        Returns:
            The next state and metrics: ``loss``, and what the loss function returned beside it.
        """
        with self.placer.in_force():
            self._check(self.jitted, state, batch)
            return self.jitted(state, batch)

    def eval_step(self, state: ModelState, batch: Any) -> dict[str, Any]:
        """Metrics of a batch, nothing changed; nnx modules are in evaluation mode."""
        with self.placer.in_force():
            self._check(self._evaluated, state, batch)
            return self._evaluated(state, batch)

    def gradients(self, state: ModelState, batch: Any) -> tuple[Any, Any]:
        """(loss, gradients) of a batch, as the step would update with."""
        with self.placer.in_force():
            self._check(self._gradients, state, batch)
            return self._gradients(state, batch)

    def model(self, state: ModelState) -> Any:
        """The model with a state's arrays: the nnx module, linen's variables, or the tree."""
        return self.parts.dialect.build(state.params, state.rest)

    @functools.cached_property
    def jitted(self) -> Any:
        """The step as ``jax.jit`` returned it: (state, batch) → (state, metrics)."""
        return jax.jit(
            functools.partial(self.parts.step, self.held),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )

    @functools.cached_property
    def _evaluated(self) -> Any:
        return jax.jit(functools.partial(self.parts.evaluate, self.held))

    @functools.cached_property
    def _gradients(self) -> Any:
        def run(state: ModelState, batch: Any) -> tuple[Any, Any]:
            found, grads, _, _ = self.parts.gradients(self.held, state, batch)
            return found, grads

        return jax.jit(run)

    @functools.cached_property
    def held(self) -> dict[str, Any]:
        """Shardings by role: between steps, as the model reads arrays, as gradients are summed.

        ``params``, ``used`` (by the loss), ``gradients`` and ``updated`` (by the optimizer) have
        the structure of what is trained; ``rest`` and ``rest_used`` that of the model's other
        arrays.
        """
        params, rest = self.shapes.params, self.shapes.rest
        found = [NamedSharding(self.mesh, self.used_spec(decision)) for decision in self.decisions]
        used, rest_used = jax.tree.unflatten(jax.tree.structure((params, rest)), found)
        return {
            "params": self.shardings.params,
            "used": used,
            "gradients": self.gradients_at.shardings(params, self.mesh),
            "updated": self.updated_at.shardings(params, self.mesh),
            "rest": self.shardings.rest,
            "rest_used": rest_used,
        }

    def used_spec(self, decision: Decision) -> PartitionSpec:
        """How the model reads an array; a stack of layers is left to the loop over it."""
        dims = decision.leaf.dims
        if dims and dims[0] in _STACKED:
            return decision.spec
        return compute_spec(decision, self.rules, self.spec)

    @functools.cached_property
    def _checked(self) -> set[Any]:
        """Programs, each with the shapes of a batch, that `_check` has traced."""
        return set()

    def _check(self, jitted: Any, state: ModelState, batch: Any) -> None:
        """Once for each program and shape of batch: refuse constraints that jit would drop."""
        shapes = tuple((np.shape(x), getattr(x, "dtype", None)) for x in jax.tree.leaves(batch))
        if (jitted, shapes) not in self._checked:
            check_constraints(jitted.trace(state, batch).jaxpr)
            self._checked.add((jitted, shapes))

    def lower(self) -> Any:
        """The step lowered for the mesh's devices, from shapes."""
        with self.placer.in_force():
            traced = self.jitted.trace(self.shapes, self.batch_shapes)
            check_constraints(traced.jaxpr)
            return traced.lower()

    def report(self, topology: str | Topology | None = None, *, quick: bool = False) -> PlanReport:
        """What the compiled step holds, moves and computes; see `meshwright.analyze`.

        Args:
            topology: hardware to compile for, of as many devices as the mesh has; None for what
                the plan was made for, or simulated devices.
            quick: at low effort.
        """
        from meshwright.train.plan_report import report_of

        with self.placer.in_force():
            # A checker that is shown this file under two names sees two classes.
            return report_of(self, topology, quick=quick)  # type: ignore[arg-type]

    def explain(self, html: str | Path | None = None) -> str:
        """The decisions as a table of text; as a page, too, if ``html`` names a file.

        Raises:
            RunError: the file cannot be written.
        """
        from meshwright.train.plan_report import explained

        return explained(self, html)  # type: ignore[arg-type]

    def save(self, folder: str | Path, state: ModelState, *, keep_last: int = 3) -> None:
        """Save a state under its step's number; returns once it is on disk."""
        from meshwright.train.checkpoint import Checkpoints

        checkpoints = Checkpoints(Path(folder), keep_last, 0)
        try:
            checkpoints.save(int(state.step), state, {"mesh": str(self.spec)})
        finally:
            checkpoints.close()

    def restore(self, folder: str | Path) -> ModelState:
        """The newest state saved in a folder, on any mesh, each array straight into its layout.

        Raises:
            CheckpointError: none there, none usable, or of another model or optimizer.
        """
        self.placer.check_here()
        from meshwright.train.checkpoint import Checkpoints

        checkpoints = Checkpoints(Path(folder))
        try:
            return checkpoints.restore(self.shapes).state
        finally:
            checkpoints.close()

    def on(self, mesh: str | MeshSpec | Mesh, *, topology: str | Topology = "local") -> Plan:
        """The same plan on another mesh; see `Placer.on_other`."""
        parts = replace(self.parts, placer=self.placer.on_other(mesh, topology))
        return Plan.of(parts, self.batch)

    def one_device(self) -> Plan:
        """The same plan on the first device alone: what every mesh is held against."""
        self.placer.check_here()
        spec = MeshSpec(tuple((name, 1) for name in self.spec.names))
        return self.on(spec.build(list(self.mesh.devices.flat)[:1]))


def _named(placer: Placer, dialect: Dialect) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    """The model's leaves with the names that patterns give them."""
    trained, rest = dialect.leaves
    if placer.dims is None:
        return trained, rest
    named = placer.dims.apply((*trained, *rest))
    return named[: len(trained)], named[len(trained) :]


def _state_shapes(
    placer: Placer, model: Decisions, moments: Decisions, dialect: Dialect, opt_shapes: Any
) -> ModelState:
    """A state as ShapeDtypeStructs, each with its sharding."""
    specs = [decision.spec for decision in model]
    params, rest = jax.tree.unflatten(jax.tree.structure(dialect.shapes), specs)
    whole = PartitionSpec()
    layout = ModelState(whole, params, rest, moments.specs(opt_shapes), whole)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def placed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(placer.mesh, spec))

    return jax.tree.map(placed, ModelState(step, *dialect.shapes, opt_shapes, key), layout)


def _bytes(leaves: Sequence[Leaf]) -> int:
    return sum(leaf.size_bytes for leaf in leaves)


def _microbatch(batch: Any, microbatches: int) -> Any:
    """Shapes of one microbatch; of an array that does not divide, which the step refuses, whole."""

    def one(x: Any) -> Any:
        if not x.shape or x.shape[0] % microbatches:
            return x
        return jax.ShapeDtypeStruct((x.shape[0] // microbatches, *x.shape[1:]), x.dtype)

    return jax.tree.map(one, batch)
