"""The same numbers on every mesh: a function, or a plan, held against one device.

Sharding may change where numbers are and never what they are. What goes wrong is seldom the
layout: a ``psum`` where a mean was meant, a gradient summed twice, a random number drawn for each
device. So the function runs on one device and on each mesh, from the same arguments, and every
leaf of what comes out is compared.

**What is compared how.** The difference of a leaf is its largest absolute difference over the
largest entry of one device's leaf: entries that ought to be zero have no relative error worth the
name. A gradient's scale is at least a hundredth of the largest gradient's, as some are zero but
for rounding, such as a bias before a normalisation. Integers, booleans and keys must be equal.
Floating point under 32 bits is allowed two units in its last place, whatever tolerance is asked
for. NaN equals NaN.

**Under which conditions.** On one device the mesh has the same axes, each of size 1, and the
function is traced with the rules in force: it may name axes (``jax.lax.psum(x, "data")`` inside
``jax.shard_map``), constrain by bare specs, and use Flax's logical constraints. Comparing with a
function that has no mesh at all was rejected: these could not run there.

Cost: one compilation for one device and one for each mesh; all results are fetched to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.sharding.dims import describe, format_shape
from meshwright.sharding.errors import ConfigError, TopologyError
from meshwright.sharding.logical import check_constraints, resolving
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.placement import Constrain
from meshwright.sharding.placer import Placer, is_array, merge_nnx, split_nnx, unannotated
from meshwright.sharding.processes import fetch
from meshwright.sharding.testing_plan import PlanLike, is_plan
from meshwright.sharding.testing_table import format_table

if TYPE_CHECKING:
    from meshwright.sharding.placer import Patterns
    from meshwright.sharding.rules import Rules
    from meshwright.sharding.strategies import Strategy

__all__ = ["MESHES", "assert_same_as_one_device"]

MESHES = ("data=8", "data=2,fsdp=4")
"""Meshes that a function is tried on if nobody says."""

_WORST = 5  # leaves shown of a mesh
_NOISE = 0.01


def assert_same_as_one_device(
    fn: Callable[..., Any] | PlanLike,
    *args: Any,
    meshes: Sequence[str | MeshSpec | Mesh] | str | None = None,
    rules: Rules | Sequence[Strategy | str] | None = None,
    dims: Patterns | None = None,
    rtol: float = 1e-5,
    gradients: bool = True,
    key: Any = None,
    steps: int = 3,
) -> None:
    """Hold what a function, or a plan, computes on meshes against one device.

    A function ``fn(params, batch, ...)`` is jitted. ``params``, any pytree or an nnx module, is
    placed by the rules; the rows of ``batch`` are dealt over the data axes; what follows stays
    whole. Compared are all outputs, what an nnx module holds afterwards, and the gradients with
    respect to ``params`` of the output if that is a scalar, else of the sum of all floating-point
    outputs.

    A plan is compared with ``plan.one_device()``: initial values, the first batch's loss and
    gradients, and the losses of a few steps.

    Args:
        fn: the function, or a plan.
        args: its arguments; of a plan one batch or more, taken in turn.
        meshes: such as ``"data=2,fsdp=4"``, a spec, or a built mesh; `MESHES` by default.
        rules: Rules; strategies and written rules; None for the strategy of each axis' name.
        dims: path patterns that name the dims of ``params``.
        rtol: largest difference over a leaf's largest entry.
        gradients: compare them too.
        key: of a plan's initial values; ``jax.random.key(0)`` by default.
        steps: of a plan.

    Raises:
        AssertionError: names the first leaf that differs, and the worst of each mesh.
        ConfigError: nothing to differentiate; arguments for a function given with a plan.
        TopologyError: fewer devices than a mesh has.
        RulesError, PlacementError: rules that do not suit ``params``, rows that do not divide.
    """
    if is_plan(fn):
        if meshes is not None or rules is not None or dims is not None:
            raise ConfigError(
                "a plan has its mesh, rules and dims already",
                why="meshes, rules and dims are for functions",
                fix="leave them out, and make a plan for each mesh",
            )
        _need(args, "a batch or more", "assert_same_as_one_device(plan, batch)")
        one, other = (_steps(plan, args, key, steps, gradients) for plan in (fn.one_device(), fn))
        _judge("the plan", {str(fn.spec): _differences(one, other, rtol)})
        return
    found = _on_meshes(fn, args, MESHES if meshes is None else meshes, rules, dims, rtol, gradients)
    _judge(f"`{getattr(fn, '__name__', 'the function')}`", found)


def _on_meshes(
    fn: Any,
    args: Sequence[Any],
    meshes: Sequence[str | MeshSpec | Mesh] | str,
    rules: Any,
    dims: Any,
    rtol: float,
    gradients: bool,
) -> dict[str, list[_Difference]]:
    """What of a function differs, by mesh; one device is computed once for the same axes."""
    _need(args, "the parameters, then the batch", "assert_same_as_one_device(fn, params, batch)")
    function = _Function.of(fn, args[0])
    found: dict[str, list[_Difference]] = {}
    alone: dict[tuple[str, ...], dict[str, Any]] = {}
    for written in (meshes,) if isinstance(meshes, str) else meshes:
        placer = Placer.on(_built(written), rules, dims=dims)
        names = placer.spec.names
        if names not in alone:
            alone[names] = _run(function, args[1:], _single(placer), gradients)
        ran = _run(function, args[1:], placer, gradients)
        found[str(placer.spec)] = _differences(alone[names], ran, rtol)
    return found


def _single(placer: Placer) -> Placer:
    """The same axes, each of size 1, on the first device."""
    spec = MeshSpec(tuple((name, 1) for name in placer.spec.names))
    return replace(placer, mesh=spec.build(list(placer.mesh.devices.flat)[:1]))


def _built(mesh: str | MeshSpec | Mesh) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    devices = jax.devices()
    if -1 in spec.sizes.values():
        return spec.build(devices)
    count = spec.device_count
    if count > len(devices):
        raise TopologyError(
            f"cannot compare on the mesh `{spec}`",
            why=f"it has {count} devices, and jax has {len(devices)}",
            fix=f"run pytest --meshwright-devices {count}, or mark the test "
            f"@pytest.mark.devices({count})",
        )
    return spec.build(devices[:count])


def _need(args: Sequence[Any], what: str, form: str) -> None:
    if not args:
        raise ConfigError(
            "there is nothing to compute with",
            why=f"arguments follow: {what}",
            fix=f"write {form}",
        )


@dataclass(frozen=True)
class _Function:
    """A function whose first argument is taken apart into what jit and gradients can take.

    Attributes:
        fn: the user's.
        graph: what nnx needs to put its objects together again; None without any.
        trained: floating-point arrays, None in the places of all else.
        fixed: the other arrays.
        static: what is no array.
    """

    fn: Callable[..., Any]
    graph: Any
    trained: Any
    fixed: Any
    static: Any

    @classmethod
    def of(cls, fn: Callable[..., Any], first: Any) -> _Function:
        graph, state = split_nnx(first)
        return cls(
            fn,
            graph,
            _only(state, _is_float),
            _only(state, lambda leaf: is_array(leaf) and not _is_float(leaf)),
            _only(state, lambda leaf: not is_array(leaf)),
        )

    def __call__(self, trained: Any, fixed: Any, *rest: Any) -> tuple[Any, Any]:
        """What the function returns, and what nnx objects hold afterwards."""
        first = merge_nnx(self.graph, _joined(_joined(trained, fixed), self.static))
        out = self.fn(first, *rest)
        return out, None if self.graph is None else _only(split_nnx(first)[1], is_array)


def _only(tree: Any, keep: Callable[[Any], bool]) -> Any:
    return jax.tree.map(lambda leaf: leaf if keep(leaf) else None, tree)


def _joined(tree: Any, other: Any) -> Any:
    """A tree, with the leaves of another where it has None."""
    return jax.tree.map(
        lambda leaf, instead: instead if leaf is None else leaf,
        tree,
        other,
        is_leaf=lambda node: node is None,
    )


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _run(
    function: _Function, rest: Sequence[Any], placer: Placer, gradients: bool
) -> dict[str, Any]:
    """Outputs and gradients on one mesh, by path, on the host."""
    arrays = _joined(function.trained, function.fixed)
    whole = NamedSharding(placer.mesh, PartitionSpec())
    if placer.spec.device_count == 1:
        placed = jax.device_put((arrays, *rest), whole)
    else:
        dealt = [jax.device_put(batch, placer.batch_shardings(batch)) for batch in rest[:1]]
        params = jax.device_put(arrays, placer.shardings(arrays))
        placed = (params, *dealt, *jax.device_put(tuple(rest[1:]), whole))
    trained = _only(placed[0], _is_float)
    fixed = _only(placed[0], lambda leaf: not _is_float(leaf))
    constrain = Constrain(placer.rules, placer.mesh)

    def run(trained: Any, fixed: Any, *rest: Any) -> tuple[Any, Any]:
        with resolving(constrain), unannotated():
            found = function(trained, fixed, *rest)
        return _total(found[0]) if gradients else None, found

    if gradients and not jax.tree.leaves(trained):
        _nothing_to_differentiate("the first argument has no array of floating point")
    jitted = jax.jit(jax.value_and_grad(run, has_aux=True) if gradients else run)
    given = (trained, fixed, *placed[1:])
    try:
        check_constraints(jitted.trace(*given).jaxpr)
        found = jitted(*given)
    except Exception as error:
        error.add_note(f"on the mesh {placer.spec}, to compare meshes with one device")
        raise
    (_, (out, after)), grads = found if gradients else (found, None)
    return _named(output=out, after=after, gradients=grads)


def _total(out: Any) -> jax.Array:
    """The scalar to differentiate: the output, or the sum of all of its floating point."""
    leaves = [leaf for leaf in jax.tree.leaves(out) if _is_float(leaf)]
    if not leaves:
        _nothing_to_differentiate("the function returns no array of floating point")
    if len(leaves) == 1 and leaves[0].ndim == 0:
        return leaves[0]
    return sum((jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves), jnp.zeros(()))


def _nothing_to_differentiate(why: str) -> None:
    raise ConfigError("there is nothing to differentiate", why=why, fix="say gradients=False")


def _steps(
    plan: PlanLike, batches: Sequence[Any], key: Any, steps: int, gradients: bool
) -> dict[str, Any]:
    """What a plan begins with, and its first steps, by path, on the host."""
    state = plan.init(jax.random.key(0) if key is None else key)
    found = _named(initial=state.params)
    placed = [plan.place(batch) for batch in batches]
    if gradients:
        loss, grads = plan.gradients(state, placed[0])
        found |= _named(loss=loss, gradients=grads)
    for number in range(steps):
        state, metrics = plan.step(state, placed[number % len(placed)])
        found |= {f"loss of step {number + 1}": fetch(metrics["loss"])}
    return found


def _named(**sections: Any) -> dict[str, Any]:
    """Leaves by path below the name of their section, on the host."""
    return {
        leaf.path: value
        for name, tree in sections.items()
        for leaf, value in zip(describe({name: tree}), jax.tree.leaves(fetch(tree)), strict=True)
    }


@dataclass(frozen=True)
class _Difference:
    """How far one leaf is from one device's.

    Attributes:
        path: such as ``gradients/layers/0/w``.
        kind: shape and dtype.
        relative: largest difference over the largest entry; of exact leaves the share of entries
            that differ.
        allowed: tolerance; 0 for exact leaves.
        at: where the largest difference is.
        one, other: the entries there, of one device and of the mesh.
    """

    path: str
    kind: str
    relative: float
    allowed: float
    at: str
    one: str
    other: str

    @property
    def fails(self) -> bool:
        return not self.relative <= self.allowed

    @classmethod
    def of(
        cls, path: str, one: np.ndarray, other: np.ndarray, rtol: float, least: float
    ) -> _Difference:
        kind = f"{format_shape(one.shape)} {one.dtype}"
        if one.shape != other.shape or one.dtype != other.dtype:
            now = f"{format_shape(other.shape)} {other.dtype}"
            return cls(path, kind, np.inf, 0.0, "shape", kind, now)
        exact = not jnp.issubdtype(one.dtype, jnp.inexact)
        if exact:
            off, allowed = (one != other).astype(np.float64), 0.0
            relative = float(off.sum()) / max(one.size, 1)
        else:
            allowed = max(rtol, 2 * float(jnp.finfo(one.dtype).eps) if one.itemsize < 4 else 0.0)
            wide = np.complex128 if jnp.issubdtype(one.dtype, jnp.complexfloating) else np.float64
            a, b = one.astype(wide), other.astype(wide)
            with np.errstate(invalid="ignore"):
                off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            off = np.where(np.isnan(off), np.inf, off)
            relative = float(np.max(off, initial=0.0) / (max(_largest(one), least) or 1.0))
        at = np.unravel_index(int(np.argmax(off)), off.shape) if off.size else ()
        where = str([int(n) for n in at]) if at else ""
        return cls(path, kind, relative, allowed, where, _entry(one, at), _entry(other, at))


def _entry(array: np.ndarray, at: Any) -> str:
    if not array.size:
        return ""
    value = array[at]
    return f"{float(value):.6g}" if jnp.issubdtype(array.dtype, jnp.floating) else str(value)


def _differences(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], rtol: float
) -> list[_Difference]:
    assert list(one) == list(other)  # one function, one structure
    gradients = [path for path in one if path.partition("/")[0] == "gradients"]
    least = _NOISE * max((_largest(one[path]) for path in gradients), default=0.0)
    return [
        _Difference.of(path, one[path], other[path], rtol, least if path in gradients else 0.0)
        for path in one
    ]


def _largest(array: np.ndarray) -> float:
    """The largest finite magnitude of floating point or complex numbers."""
    wide = np.abs(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
    return float(np.max(wide, initial=0.0, where=np.isfinite(wide)))


def _judge(what: str, found: dict[str, list[_Difference]]) -> None:
    """Raise for the first leaf that differs, with the worst of each mesh."""
    failing = [(mesh, leaf) for mesh, leaves in found.items() for leaf in leaves if leaf.fails]
    if not failing:
        return
    mesh, first = failing[0]
    rows = []
    for name, leaves in found.items():
        bad = sorted((leaf for leaf in leaves if leaf.fails), key=lambda leaf: -leaf.relative)
        for leaf in bad[:_WORST]:
            off, allowed = f"{leaf.relative:.1e}", f"{leaf.allowed:.1e}"
            rows.append([name, leaf.path, off, allowed, leaf.at, leaf.one, leaf.other])
        if len(bad) > _WORST:
            rows.append([name, f"and {len(bad) - _WORST} more", "", "", "", "", ""])
        if not bad:
            worst = max((leaf.relative for leaf in leaves), default=0.0)
            rows.append([name, f"all {len(leaves)} agree", f"{worst:.1e}", "", "", "", ""])
    raise AssertionError(
        f"{what} gives other numbers on a mesh than on one device\n"
        f"first: `{first.path}` ({first.kind}) on the mesh {mesh}, off by {first.relative:.1e} of "
        f"its largest entry\n"
        + format_table(
            ["mesh", "leaf", "off by", "allowed", "at", "one device", "mesh gives"],
            rows,
            right=["off by", "allowed", "one device", "mesh gives"],
            most=40,
        )
    )
