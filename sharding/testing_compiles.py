"""One compilation for all batches: a step that compiles again is caught, and told from what.

A step compiles again when the type of an argument changes: a shape, a dtype, a sharding, a Python
number where an array was (jax calls that a weak type), the structure or a static part of a tree.
Mostly nothing is printed; the step takes a minute instead of a second, sometimes at every call.
The usual cause is the second call: the state that a step returns is not laid out as the state
that it was given.

Compilations are counted by jax's own events (`jax.monitoring`), so a step may be anything that can
be called: what ``jax.jit`` returned, a method around it, a function with several jits inside.
Asking a jitted function for the size of its cache was rejected: it is private, and knows nothing of
what surrounds it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.sharding import NamedSharding

from meshwright.sharding.dims import format_path, format_shape
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.placer import has_nnx
from meshwright.sharding.testing_plan import PlanLike, is_plan
from meshwright.sharding.testing_table import format_table, shortened

__all__ = ["assert_no_recompile"]

_COMPILED = "/jax/core/compile/backend_compile_duration"
_TREES = "the trees"
_SHOWN = 40  # characters of a fact
_Facts = dict[str, dict[str, str]]


def assert_no_recompile(
    step: Callable[..., Any] | PlanLike, batches: Iterable[Any], *, state: Any = None
) -> None:
    """Run a step over batches and hold that nothing compiles after the first of them.

    Args:
        step: a function of (state, batch) that returns the next state, alone or first of a tuple,
            or changes nnx objects in place; of a batch alone, if there is no state; or a plan.
        batches: two or more, as they come in training, the last and smaller one included.
        state: the first one; of a plan, ``plan.init`` of a key by default.

    Raises:
        AssertionError: something compiled at a later batch; lists what of the arguments differs
            from the call before that is most like it.
        ConfigError: fewer than two batches.
    """
    call: Any = step
    if is_plan(step):
        state = step.init(jax.random.key(0)) if state is None else state
        call = functools.partial(_placed_step, step)
    has_state = state is not None
    before: list[_Facts] = []
    for number, batch in enumerate(batches):
        facts = _facts({"state": state, "batch": batch} if has_state else {"batch": batch})
        with _compilations() as counted:
            out = call(state, batch) if has_state else call(batch)
        if has_state:
            state = _next(state, out)
        del out
        if before and counted:
            raise AssertionError(_told(number, len(counted), before, facts))
        before.append(facts)
    if len(before) < 2:
        raise ConfigError(
            "cannot tell whether the step compiles again",
            why=f"there {'is one batch' if before else 'are no batches'}, and the first call "
            "always compiles",
            fix="pass two batches or more",
        )


def _next(state: Any, out: Any) -> Any:
    """The next state in what a step returned; of nnx objects, which change in place, the same."""
    first = out[0] if type(out) is tuple and out else out
    for one in (out, first):
        if jax.tree.structure(one) == jax.tree.structure(state):
            return one
    return state if has_nnx(state) else first


def _placed_step(plan: PlanLike, state: Any, batch: Any) -> Any:
    return plan.step(state, plan.place(batch))


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """Names of what is compiled within, one for each compilation."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event == _COMPILED:
            found.append(str(details.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@dataclass(frozen=True)
class _Change:
    """One thing that is not as in an earlier call."""

    argument: str
    what: str
    before: str
    now: str


def _told(number: int, compiled: int, before: list[_Facts], facts: _Facts) -> str:
    """The message: what differs from the earlier call that is most like this one."""
    changes = [_changes(earlier, facts) for earlier in before]
    nearest = min(range(len(before)), key=lambda n: (len(changes[n]), -n))
    programs = f", {compiled} programs" if compiled > 1 else ""
    head = f"the step compiled again at batch {number}{programs}; only batch 0 may compile"
    if not changes[nearest]:
        return (
            f"{head}\nno argument differs from those of batch {nearest} in shape, dtype, sharding "
            "or structure:\nthe step makes a new function at each call (jax.jit, a lambda or a "
            "partial inside of it),\nor depends on something that is not an argument"
        )
    rows = [[one.argument, one.what, one.before, one.now] for one in changes[nearest]]
    headings = ["argument", "what", f"batch {nearest}", f"batch {number}"]
    return f"{head}\n{format_table(headings, rows)}"


def _changes(earlier: _Facts, now: _Facts) -> list[_Change]:
    found = []
    for path in dict.fromkeys((*earlier, *now)):
        if path not in earlier or path not in now:
            a, b = ("there" if path in facts else "absent" for facts in (earlier, now))
            found.append(_Change(path, "structure", a, b))
            continue
        for what in dict.fromkeys((*earlier[path], *now[path])):
            a, b = earlier[path].get(what, "none"), now[path].get(what, "none")
            if a != b:
                found.append(_Change(path, what, *_apart(a, b)))
    # Where a leaf came or went, the trees differ anyway.
    told = [change for change in found if change.argument != _TREES]
    return told if any(change.what == "structure" for change in told) else found


def _apart(a: str, b: str) -> tuple[str, str]:
    """Two long texts from shortly before the first place where they differ."""
    if max(len(a), len(b)) <= _SHOWN:
        return a, b
    same = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), 0)
    start = max(same - _SHOWN // 4, 0)
    head = "…" if start else ""
    return shortened(head + a[start:], _SHOWN), shortened(head + b[start:], _SHOWN)


def _facts(arguments: dict[str, Any]) -> _Facts:
    """What of each argument decides whether a compiled program serves it."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(arguments)
    found = {format_path(path): _leaf_facts(leaf) for path, leaf in leaves}
    found[_TREES] = {"static parts": str(structure)}
    return found


def _leaf_facts(leaf: Any) -> dict[str, str]:
    if isinstance(leaf, bool | int | float | complex):
        return {"shape": "scalar", "dtype": f"Python {type(leaf).__name__}", "weak type": "yes"}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return {"value": repr(leaf)}
    facts = {"shape": format_shape(leaf.shape), "dtype": str(leaf.dtype)}
    if not isinstance(leaf, jax.Array):
        return {**facts, "weak type": "no", "sharding": "on the host"}
    weak = getattr(leaf, "weak_type", False)
    return {**facts, "weak type": "yes" if weak else "no", "sharding": _sharding(leaf)}


def _sharding(leaf: jax.Array) -> str:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = ", ".join(map(repr, sharding.spec))
        mesh = ",".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
        written = f"P({spec}) on {mesh}"
    else:
        written = f"on {len(sharding.device_set)} devices: {sharding}"
        if len(sharding.device_set) == 1:
            written = "on one device" if leaf.committed else "on one device, as it happens"
    kind = sharding.memory_kind
    return written if kind in (None, "device", "unpinned_host") else f"{written}, in {kind}"
