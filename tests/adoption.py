"""What a package's model is held to once it is adopted: counted lines, one device's numbers.

A `Package` is two programs: ``before``, as its author's users write it, and ``after``, the same
with meshwright in it. Both call ``watch`` where a person would print. The lines that ``after`` adds
to ``before`` are counted, and what it does on a mesh is held against its own plan on one device:
initial values bit by bit, outputs, the gradients of the first step and the losses of all of them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.monitoring
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from meshwright.sharding import Decision, fetch
from meshwright.sharding.strategies import SMALL_LEAF_BYTES
from meshwright.train.model_plan import Plan
from meshwright.train.plan_step import ModelState

MOST_LINES = 10
TOLERANCE = 1e-5
LAST_PLACES = 8 * float(np.finfo(np.float32).eps)
STEPS = 3
B1 = 0.9  # of optax.adam: its first moment after one step is (1 - B1) × the gradient
MESHES = ("data=8", "data=2,fsdp=4", "data=2,tensor=4", "data=2,fsdp=2,tensor=2")
COMPILING = "/jax/core/compile/"  # events of tracing, lowering and compiling begin so

Watch = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Package:
    """A model of somebody else's, before and after adoption.

    Attributes:
        before: (watch) → None; calls ``watch(loss)`` after each step.
        after: (mesh, watch) → None; calls ``watch(metrics["loss"], plan, state, batch)``.
        splits: leaf path → spec that the axis ``tensor`` alone gives it; none, no such mesh.
        needs: module of the package, None for flax itself.
        exact: whether initial values are those of one device bit by bit.
    """

    before: Callable[[Watch], None]
    after: Callable[[str, Watch], None]
    splits: Mapping[str, PartitionSpec] = field(default_factory=dict)
    needs: str | None = None
    exact: bool = True

    def load(self) -> None:
        """Import the package or skip the test."""
        if self.needs:
            try:
                importlib.import_module(self.needs)
            except ModuleNotFoundError:
                pytest.skip(f"no module {self.needs}: pip install 'meshwright[adoption]'")

    @property
    def meshes(self) -> tuple[str, ...]:
        """The meshes it is held to."""
        return tuple(mesh for mesh in MESHES if self.splits or "tensor" not in mesh)


@dataclass
class Run:
    """What `watch` saw of a run of a plan.

    Attributes:
        plan: the plan.
        first: arrays of the initial state, by path.
        gradients: of the first step.
        losses: of all steps.
        evaluated: metrics of the batch before the first step.
        compiled: what steps after the first had to trace or compile.
    """

    plan: Plan
    first: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    losses: list[float]
    evaluated: dict[str, np.ndarray]
    compiled: list[str]


def plain(tree: Any) -> dict[str, np.ndarray]:
    """Leaves as numpy arrays by path; RNG keys as their data."""
    flat, _ = jax.tree_util.tree_flatten_with_path(fetch(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is traced, lowered or compiled in this context."""
    seen: list[str] = []

    def listen(event: str, duration: float, **more: Any) -> None:
        del duration
        if event.startswith(COMPILING):
            seen.append(f"{event} {more.get('fun_name', '')}")

    listener: Any = listen  # the declared type asks for another name of its argument
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def watched(run: Callable[[Watch], None]) -> Run:
    """Run a program with `plan` in it and keep what it shows."""
    states: list[dict[str, np.ndarray]] = []
    losses: list[float] = []
    found: list[tuple[Plan, Any]] = []
    with compilations() as seen:
        since = 0

        def watch(loss: Any, plan: Plan, state: ModelState, batch: Any) -> None:
            nonlocal since
            losses.append(float(loss))
            if len(losses) == 1:
                moments = optax.tree_utils.tree_get(state.opt_state, "mu")
                states.append({k: v / (1 - B1) for k, v in plain(moments).items()})
                found.append((plan, batch))
                since = len(seen)

        run(watch)
        later = seen[since:]
    plan, batch = found[0]
    state = plan.init(jax.random.key(0))
    return Run(
        plan,
        plain(state),
        states[0],
        losses,
        plain(plan.eval_step(state, plan.place(batch))),
        later,
    )


@functools.cache
def on_one_device(package: Package) -> Run:
    """The package's plan on one device, the same number of steps."""
    made: list[tuple[Plan, Any]] = []

    class Enough(Exception):
        pass

    def first(_: Any, plan: Plan, state: ModelState, batch: Any) -> None:
        del state
        made.append((plan.one_device(), batch))
        raise Enough

    with contextlib.suppress(Enough):
        package.after("data=8", first)
    plan, batch = made[0]

    def run(watch: Watch) -> None:
        state = plan.init(jax.random.key(0))
        for _ in range(STEPS):
            state, metrics = plan.step(state, plan.place(batch))
            watch(metrics["loss"], plan, state, batch)

    return watched(run)


def added_lines(package: Package) -> list[str]:
    """Lines of ``after`` that ``before`` has not, and the import."""
    one, two = (
        textwrap.dedent(inspect.getsource(function)).splitlines()[1:]
        for function in (package.before, package.after)
    )
    compared = difflib.ndiff(one, two)
    return ["import meshwright", *(line[2:] for line in compared if line.startswith("+ "))]


def check_before(package: Package) -> None:
    """The author's own usage trains, and adopting costs at most ten lines."""
    package.load()
    losses: list[float] = []
    package.before(lambda loss: losses.append(float(loss)))
    assert len(losses) == STEPS and losses[-1] < losses[0], losses
    lines = added_lines(package)
    assert len(lines) <= MOST_LINES, "\n".join(lines)


def check_mesh(package: Package, mesh: str) -> None:
    """On a mesh: split, compiled once, and equal to one device."""
    package.load()
    one = on_one_device(package)
    run = watched(lambda watch: package.after(mesh, watch))
    check_split(package, run.plan, mesh)
    assert not run.compiled, f"later steps made programs: {run.compiled}"
    if package.exact:
        assert_exact(run.first, one.first)
    else:
        assert_close(run.first, one.first)
    assert_close(run.gradients, one.gradients)
    assert_close(run.evaluated, one.evaluated)
    np.testing.assert_allclose(run.losses, one.losses, rtol=TOLERANCE)


def assert_exact(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Within TOLERANCE of each leaf's largest entry.

    A gradient that is zero in exact arithmetic (of a bias before batch statistics) is rounding,
    of the size of the rounding of the others: so no leaf is asked for more than some of float32's
    last places of the largest entry of the tree.
    """
    assert list(found) == list(expected)
    largest = {path: float(np.max(np.abs(one), initial=0)) for path, one in expected.items()}
    floor = LAST_PLACES * max(largest.values(), default=0.0)
    for path, array in found.items():
        apart = float(np.max(np.abs(array.astype(float) - expected[path]), initial=0))
        assert apart <= TOLERANCE * largest[path] + floor, (path, apart, largest[path])


def check_split(package: Package, plan: Plan, mesh: str) -> None:
    """Nothing large is whole where parameters are split; leaves lie where they were decided."""
    state = plan.init(jax.random.key(0))
    trained = jax.tree.leaves(state.params)
    decided = list(plan.decisions)
    for decision, array in zip(decided[: len(trained)], trained, strict=True):
        assert array.sharding.spec == decision.spec, decision.leaf.path
    if "fsdp" in mesh:
        largest = max(one.leaf.size_bytes for one in decided)
        small = SMALL_LEAF_BYTES if largest >= SMALL_LEAF_BYTES else largest // 8
        for one in (*decided, *plan.moments):
            is_large = one.leaf.size_bytes >= small
            assert _is_split(one) or not is_large, f"{one.leaf.path} {one.reason}"
    if mesh == "data=2,tensor=4":
        for path, spec in package.splits.items():
            assert plan.decisions[path].spec == spec, (path, plan.decisions[path].spec)


def _is_split(decision: Decision) -> bool:
    return decision.bytes_per_device < decision.leaf.size_bytes
