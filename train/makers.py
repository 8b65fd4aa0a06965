"""Whatever makes a model, as a function of a key: classes, partials, functions, linen modules.

People pass ``Model``, ``functools.partial(Model, config)``, ``lambda rngs: Model(rngs=rngs)``,
``net.init`` or ``jax.nn.initializers``-like functions, and call the one argument that changes from
run to run by one of three names. What is to be called how is read from signatures, once, and what
cannot be told is refused with the line to write. Trying calls until one works, the alternative,
would hide errors inside of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.sharding.errors import ConfigError
from meshwright.sharding.placer import is_array

__all__ = ["linen_init", "maker"]


def maker(model: Any) -> Callable[[Any], Any]:
    """A class or function as a function of a key.

    The key goes to an argument called ``rngs`` (as ``nnx.Rngs``), ``key`` or ``rng``, or else to
    the only one there is; a function without arguments is called without it.

    Raises:
        ConfigError: arguments that only the user can give.
    """
    name = getattr(model, "__name__", type(model).__name__)
    try:
        parameters = _parameters_of(model)
    except (TypeError, ValueError):
        return model
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (*plain, inspect.Parameter.KEYWORD_ONLY)
    ]
    by_name = next((word for word in ("rngs", "key", "rng") if word in parameters), None)
    others = [word for word in needed if word != by_name]
    if by_name and not others and parameters[by_name].kind is not inspect.Parameter.POSITIONAL_ONLY:
        return lambda key: model(**{by_name: _rngs(key) if by_name == "rngs" else key})
    if [p.kind for p in parameters.values()][:1] == [inspect.Parameter.VAR_POSITIONAL]:
        return model  # a wrapper, which says nothing of what it wraps
    if not needed:
        return lambda key: model()
    if len(needed) == 1 and parameters[needed[0]].kind in plain:
        return model
    raise ConfigError(
        f"cannot make `{name}` from a key",
        where=f"it needs {', '.join(needed)}",
        why="only a key (or rngs) is there to give",
        fix=f"pass a function of the key: lambda rngs: {name}(…, rngs=rngs)",
    )


def _parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of a call; of a class its own constructor's, as a metaclass' takes anything."""
    if isinstance(model, type):
        return inspect.signature(functools.partial(model.__init__, None)).parameters
    if isinstance(model, functools.partial) and isinstance(model.func, type):
        bound = functools.partial(model.func.__init__, None, *model.args, **model.keywords)
        return inspect.signature(bound).parameters
    return inspect.signature(model).parameters


def _rngs(key: Any) -> Any:
    import flax.nnx as nnx

    return nnx.Rngs(key)


def linen_init(model: Any, inputs: Sequence[Any] | None) -> Callable[[Any], Any]:
    """The ``init`` of a linen module as a function of a key.

    Args:
        model: the module.
        inputs: arguments of its call: ShapeDtypeStructs, of which zeros are made, and whatever is
            no array, which is given as it is.

    Raises:
        ConfigError: no inputs.
    """
    if inputs is None:
        raise ConfigError(
            f"cannot initialise the linen module `{type(model).__name__}`",
            why="it takes its shapes from the arguments of a call, and the batch does not say "
            "which of its arrays these are",
            fix='say so: inputs=lambda batch: (batch["x"],), or pass '
            "model=lambda key: module.init(key, x)",
        )

    def zeros(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype) if is_array(leaf) else leaf

    def make(key: Any) -> Any:
        return model.init(key, *[jax.tree.map(zeros, one) for one in inputs])

    return make
