"""Which parameters are tables that rows are looked up in: known from a trace, not from a name.

The gradient of a lookup is a scatter of the tokens' gradients into the table. Asked to appear split
over an axis that also splits the tokens, it makes the partitioner move every token's gradient to
where its column lives, by way of a whole copy on each device ("involuntary full
rematerialization"). So such a gradient is summed in the table's own layout first and cut then;
gradients of matmuls go straight into their shards.

A table is an input of the program that reaches the operand of a gather without more than a change
of type, shape or layout on its way. The trace is of the forward pass alone, and abstract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["looked_up"]

_PASS = frozenset(
    ("convert_element_type", "sharding_constraint", "reshape", "squeeze", "copy", "transpose")
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def looked_up(run: Callable[..., Any], params: Any, *others: Any) -> list[bool]:
    """Whether each leaf of ``params`` is a table, in flattening order.

    Args:
        run: the forward pass, of ``params`` and the others; what it returns does not matter.
        params, others: arrays or ShapeDtypeStructs.

    >>> import jax.numpy as jnp
    >>> def forward(params, tokens):
    ...     return jnp.take(params["table"], tokens, axis=0) @ params["w"]
    >>> shapes = {"table": jnp.ones((9, 4)), "w": jnp.ones((4, 2))}
    >>> looked_up(forward, shapes, jnp.zeros((3,), int))
    [True, False]
    """
    closed = jax.make_jaxpr(run)(params, *others)
    count = len(jax.tree.leaves(params))
    found: set[int] = set()
    _walk(closed.jaxpr, list(range(count)) + [None] * (len(closed.jaxpr.invars) - count), found)
    return [number in found for number in range(count)]


def _walk(jaxpr: Any, origins: Sequence[int | None], found: set[int]) -> list[int | None]:
    """Follow inputs through a program; returns which input each output is, if any."""
    origin: dict[Any, int | None] = dict(zip(jaxpr.invars, origins, strict=True))

    def of(atom: Any) -> int | None:
        return None if hasattr(atom, "val") else origin.get(atom)

    for equation in jaxpr.eqns:
        sources = [of(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name == "gather" and sources[0] is not None:
            found.add(sources[0])
        elif name in _PASS:
            origin[equation.outvars[0]] = sources[0]
        elif any(source is not None for source in sources):
            inner = _inner_of(equation)
            # Loops and branches pair their inputs otherwise; nothing is followed into them.
            if inner is not None and len(inner.invars) == len(sources):
                origin |= dict(zip(equation.outvars, _walk(inner, sources, found), strict=False))
    return [of(atom) for atom in jaxpr.outvars]


def _inner_of(equation: Any) -> Any:
    for name in _INNER:
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None
