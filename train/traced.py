"""A differentiable function, traced once, whose forward and backward halves run apart.

`jax.grad` runs both halves of a function together and decides itself what is kept in between. A
pipeline runs them at different times, with other microbatches in between, so what one half leaves
for the other is data here: arrays to store and to bring back. `jax.vjp` returns a pytree of them;
what it does not say is which of them depend on the microbatch. Weights, and casts and gathers of
weights, need not be stored for every microbatch: they are made again, at the price of what makes
them. Which they are is read off the traced program: what can be reached from the parameters alone.

The alternative, storing the input only and running the forward half again before the backward one,
needs no tracing and costs a third more FLOPs, whatever the policy of rematerialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval

__all__ = ["Halves", "Picked"]


@dataclass(frozen=True)
class Picked:
    """The parameters that a function reads, as a list.

    Attributes:
        shapes: of all parameters.
        used: which leaves are read.
    """

    shapes: Any
    used: tuple[bool, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], params: Any, *args: Any) -> Picked:
        """What ``function`` of params and args reads; arguments are arrays or shapes.

        >>> both = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> Picked.of(lambda params: params["a"] + 1, both).used
        (True, False)
        """
        closed = jax.make_jaxpr(function)(params, *args)
        used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))[1]
        return cls(params, tuple(used[: len(jax.tree.leaves(params))]))

    def pick(self, params: Any) -> list[Any]:
        """The leaves that are read."""
        leaves = jax.tree.leaves(params)
        return [leaf for leaf, used in zip(leaves, self.used, strict=True) if used]

    def put(self, params: Any, leaves: Sequence[Any]) -> Any:
        """``params`` with other leaves in place of those that are read."""
        old, tree = jax.tree.flatten(params)
        mine = iter(leaves)
        return jax.tree.unflatten(
            tree, [next(mine) if used else x for x, used in zip(old, self.used, strict=True)]
        )

    def whole(self, leaves: Sequence[Any]) -> Any:
        """All parameters; those that are not read are zeros."""
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), self.shapes)
        return self.put(zeros, leaves)

    def taking_a_list(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of what `pick` returns, in place of all parameters."""
        return lambda leaves, *args: function(self.whole(leaves), *args)


class Halves:
    """The two halves of a function's derivative.

    Args:
        function: (params, x, data) → (result, loss), rest; result and x are trees of floats, loss
            a float32 scalar. Differentiated by params and x.
        params, x, data: arrays or their shapes, for tracing.

    Attributes:
        kept: shapes of what the forward half leaves for the backward half.

    >>> halves = Halves(lambda w, x, data: ((w * jnp.sin(x), data * x), None), 2.0, 1.0, 3.0)
    >>> result, _, kept = halves.forward(2.0, 1.0, 3.0)
    >>> [float(grad) for grad in halves.backward(2.0, kept, 1.0, 1.0)]
    [0.8414709568023682, 4.080604553222656]
    """

    def __init__(self, function: Callable[..., Any], params: Any, x: Any, data: Any) -> None:
        structure: list[Any] = []

        def forward(params: Any, x: Any, data: Any) -> Any:
            def of_floats(params: Any, x: Any) -> Any:
                return function(params, x, data)

            (result, _), vjp, rest = jax.vjp(of_floats, params, x, has_aux=True)
            leaves, tree = jax.tree.flatten(vjp)
            structure.append(tree)
            return (result, rest), leaves

        closed, shapes = jax.make_jaxpr(forward, return_shape=True)(params, x, data)
        self._structure = structure[-1]
        self._result = jax.tree.structure(shapes[0])
        self._params = len(jax.tree.leaves(params))
        count = self._result.num_leaves
        depends = _depends(closed, self._params)
        self._stored = depends[count:]
        self.kept = [x for x, there in zip(shapes[1], self._stored, strict=True) if there]
        stored = [True] * count + self._stored
        self._forward = _part(closed, stored)
        self._again = _part(closed, [False] * count + [not there for there in self._stored])

    def forward(self, params: Any, x: Any, data: Any) -> tuple[Any, Any, list[jax.Array]]:
        """The result, the rest, and the arrays that the backward half needs of this call."""
        found = self._forward(jax.tree.leaves((params, x, data)))
        count = self._result.num_leaves
        result, rest = jax.tree.unflatten(self._result, found[:count])
        return result, rest, found[count:]

    def backward(self, params: Any, kept: Sequence[Any], grad: Any, loss_grad: Any) -> Any:
        """Gradients of params and x, for gradients of result and loss.

        Args:
            params: as in the forward half.
            kept: what it returned.
            grad, loss_grad: of its result and its loss.
        """
        mine, theirs = iter(self._again(jax.tree.leaves(params))), iter(kept)
        leaves = [next(theirs if stored else mine) for stored in self._stored]
        return jax.tree.unflatten(self._structure, leaves)((grad, loss_grad))


def _depends(closed: Any, params: int) -> list[bool]:
    """Which results of a program depend on more than its first ``params`` arguments."""
    jaxpr = closed.jaxpr
    found = set(jaxpr.invars[params:])
    for equation in jaxpr.eqns:
        if any(var in found for var in equation.invars if _is_variable(var)):
            found.update(equation.outvars)
    return [_is_variable(var) and var in found for var in jaxpr.outvars]


def _is_variable(var: Any) -> bool:
    return not hasattr(var, "val")


def _part(closed: Any, wanted: list[bool]) -> Callable[[list[Any]], list[Any]]:
    """A program cut down to some of its results, of a list that begins with what it needs."""
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, wanted)
    call = jaxpr_as_fun(closed.replace(jaxpr=jaxpr))

    def run(args: list[Any]) -> list[Any]:
        return call(*(jnp.asarray(arg) for arg, use in zip(args, used, strict=False) if use))

    return run
