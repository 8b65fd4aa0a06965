"""Constraints in a user's model: Flax's logical ones resolved by our rules, dropped ones refused.

**Logical names.** A linen module that says ``nn.with_logical_constraint(x, ("batch", "embed"))``
means what the rules in force make of these names. While `resolving` is entered they are the
``activations`` table, with this engine's strictness: an unknown name, an axis used twice or a dim
that does not divide is an error that names it. Flax alone would leave the first whole, take the
next free axis for the second, and have jit drop the third. A constraint with rules of its own
keeps them.

**Dropped constraints.** jax drops ``with_sharding_constraint`` on a dim that the axes do not
divide, without a word (jax issue 26946). The traced program still has it, so `check_constraints`
reads the jaxpr, whoever wrote the constraint, and raises with the line it is on.

Flax has no hook for the first, so one private function of it is replaced, once, by one that asks
whether a table is in force; where a release of Flax has no such function, Flax resolves the names
itself, by the same rules. The alternative, to have users call our `Constrain`, would leave models
that are there already as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding.decisions import axes_of
from meshwright.sharding.dims import format_shape
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.placement import Constrain

__all__ = ["check_constraints", "resolving"]

_ONE = "_with_sharding_constraint_one_fallback"
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "optax")


class _Active(threading.local):
    constrain: Constrain | None = None
    rules: tuple[Any, ...] = ()


_active = _Active()


@contextlib.contextmanager
def resolving(constrain: Constrain) -> Iterator[None]:
    """While tracing in this context, Flax's logical constraints go by ``constrain``'s rules.

    Bare ``PartitionSpec`` constraints find its mesh, as under ``jax.set_mesh``.
    """
    table = tuple((rule.dim, rule.axes or None) for rule in constrain.rules.activations)
    before = _active.constrain, _active.rules
    with contextlib.ExitStack() as stack:
        if "flax" in sys.modules:
            spmd = importlib.import_module("flax.linen.spmd")
            core = importlib.import_module("flax.core.spmd")
            _replace_once(spmd)
            stack.enter_context(core.logical_axis_rules(table))
        stack.enter_context(jax.sharding.use_abstract_mesh(constrain.mesh.abstract_mesh))
        _active.constrain, _active.rules = constrain, table
        try:
            yield
        finally:
            _active.constrain, _active.rules = before


def _replace_once(spmd: Any) -> None:
    original = getattr(spmd, _ONE, None)
    if original is None or getattr(original, "asks_meshwright", False):
        return

    def asking(
        names: Any, x: Any, fallback: Any = None, rules: Any = None, mesh: Any = None
    ) -> Any:
        constrain = _active.constrain
        if constrain is None or rules is not _active.rules or names is None:
            kept = {} if fallback is None else {"fallback": fallback}
            return original(names, x, rules=rules, mesh=mesh, **kept)
        return constrain(x, tuple(name if isinstance(name, str) else None for name in names))

    asking.asks_meshwright = True  # type: ignore[attr-defined]
    setattr(spmd, _ONE, asking)


def check_constraints(jaxpr: Any) -> None:
    """Refuse a traced program with a constraint that jit would drop.

    Args:
        jaxpr: a ``ClosedJaxpr`` or ``Jaxpr``, such as ``jax.jit(f).trace(*args).jaxpr``.

    Raises:
        PlacementError: names the shape, the spec, the sizes and the line of the constraint.
    """
    seen: set[int] = set()
    waiting = [jaxpr]
    while waiting:
        current = waiting.pop()
        current = getattr(current, "jaxpr", current)
        if id(current) in seen:
            continue
        seen.add(id(current))
        for equation in current.eqns:
            if equation.primitive.name == "sharding_constraint":
                _check_one(equation)
            for value in equation.params.values():
                parts = value if isinstance(value, tuple | list) else (value,)
                waiting += [part for part in parts if hasattr(part, "eqns") or _is_closed(part)]


def _is_closed(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", None), "eqns")


def _check_one(equation: Any) -> None:
    sharding = equation.params.get("sharding")
    shape = tuple(equation.invars[0].aval.shape)
    if not isinstance(sharding, NamedSharding):
        return
    sizes = dict(sharding.mesh.shape)
    for dim, entry in enumerate(sharding.spec):
        axes = () if entry is PartitionSpec.UNCONSTRAINED else axes_of(entry)
        parts = math.prod(sizes[axis] for axis in axes)
        if shape[dim] % parts:
            named = "+".join(axes)
            raise PlacementError(
                f"cannot split dim {dim} of an activation over axis `{named}`",
                where=f"shape {format_shape(shape)}, constraint {sharding.spec}, "
                f"{_line_of(equation)}",
                why=f"{shape[dim]} is not divisible by {parts}; jit would drop the constraint "
                "without a word",
                fix=f"make the dim {-(-shape[dim] // parts) * parts}, make `{named}` divide "
                f"{shape[dim]}, or leave the dim out of the constraint",
            )


def _line_of(equation: Any) -> str:
    """The line of the user's program that made an equation."""
    traceback = getattr(equation.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        folders = frame.file_name.replace("\\", "/").split("/")
        if not any(library in folders for library in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return "line unknown"
