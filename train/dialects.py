"""Anybody's model as two trees and two functions: nnx, linen, or any pytree of arrays.

A `Dialect` says how a model is made from a key as (params, rest), how the two are put together into
what the user's loss function takes, and what of ``rest`` a loss has changed. ``params`` is what
gradients are taken of; ``rest`` is all other arrays: batch statistics, RNG streams, frozen weights,
tables. Both keep the structure their library gives them, so that optax masks and labels written for
the model fit:

=========  ==============================  ===============================  ====================
dialect    params                          rest                             the loss takes
=========  ==============================  ===============================  ====================
nnx        ``nnx.State`` of ``nnx.Param``  ``nnx.State`` of all others      the module
linen      the ``params`` collection       the other collections            the variables
tree       floating-point arrays, None     other arrays, None elsewhere     the tree
           elsewhere
=========  ==============================  ===============================  ====================

What is no array (functions, names, sizes of an equinox module) is kept aside and put back. Which
dialect a model is, is told by what it is or, of a function, by what it returns.

A model is never built to be looked at: its function is traced for shapes, once, and run under jit
with the shardings of its results. A model that exists already is taken with its values.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from meshwright.sharding.dims import Leaf, describe, format_path
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.placer import is_array, unannotated

__all__ = ["Dialect", "Trainable", "dialect_of"]

Trainable = Callable[[str], bool] | Sequence[str] | type | Any
"""Which leaves are trained: a function of the path, path patterns, or an nnx filter."""


@dataclass(frozen=True)
class Dialect:
    """A model as functions.

    Attributes:
        name: ``nnx``, ``linen`` or ``tree``.
        make: key → (params, rest), traceable; None for a model that exists.
        values: (params, rest) of a model that exists, else None.
        shapes: (params, rest) as ShapeDtypeStructs.
        leaves: of ``params`` and then of ``rest``, described with their own names.
        build: (params, rest) → what the loss takes.
        after: (what the loss took, what it returned as changed, rest) → rest.
        evaluated: what the loss takes, in evaluation mode.
    """

    name: str
    make: Callable[[Any], tuple[Any, Any]] | None
    values: tuple[Any, Any] | None
    shapes: tuple[Any, Any]
    leaves: tuple[tuple[Leaf, ...], tuple[Leaf, ...]]
    build: Callable[[Any, Any], Any]
    after: Callable[[Any, Any, Any], Any]
    evaluated: Callable[[Any], Any]


def dialect_of(model: Any, inputs: Sequence[Any] | None, trainable: Trainable = None) -> Dialect:
    """Find out what a model is.

    Args:
        model: an nnx module or its class, a linen module, a tree of arrays, or a function of a key
            (or of ``rngs``, or of nothing) that returns one of these or linen's variables.
        inputs: arguments of a linen module's call, as ShapeDtypeStructs.
        trainable: which leaves are trained; None for what the dialect says.

    Raises:
        ConfigError: not a model, or one that cannot be made as asked.
    """
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if linen and isinstance(model, linen.Module):
        return _traced(_linen_init(model, inputs), trainable)
    if nnx and isinstance(model, nnx.Module):
        return _of_nnx(model, None, trainable)
    if isinstance(model, type) or (callable(model) and _is_leaf(model)):
        return _traced(_maker(model), trainable)
    if not any(is_array(leaf) for leaf in jax.tree.leaves(model)):
        raise ConfigError(
            f"cannot plan a {type(model).__name__}",
            why="it is no Flax module, no tree of arrays and no function that makes one",
            fix="pass an nnx or linen module, a pytree of arrays, or a function of a key",
        )
    return _of_tree(model, None, trainable)


def _traced(make: Callable[[Any], Any], trainable: Trainable) -> Dialect:
    """The dialect of what a function makes, from one abstract trace of it."""
    found: list[Dialect] = []

    def look(key: Any) -> None:
        with unannotated():
            made = make(key)
        nnx = sys.modules.get("flax.nnx")
        if nnx and isinstance(made, nnx.Module):
            found.append(_of_nnx(made, make, trainable))
        else:
            found.append(_of_tree(made, make, trainable))

    jax.eval_shape(look, jax.random.key(0))
    return found[-1]


def _maker(model: Any) -> Callable[[Any], Any]:
    """A class or function as a function of a key."""
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
    if by_name and not others:
        return lambda key: model(**{by_name: _rngs(key) if by_name == "rngs" else key})
    if not needed:
        return lambda key: model()
    if len(needed) == 1 and not by_name and parameters[needed[0]].kind in plain:
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


def _linen_init(model: Any, inputs: Sequence[Any] | None) -> Callable[[Any], Any]:
    if inputs is None:
        raise ConfigError(
            f"cannot initialise the linen module `{type(model).__name__}`",
            why="it takes its shapes from the arguments of a call, and the batch does not say "
            "which of its arrays these are",
            fix='say so: inputs=lambda batch: (batch["x"],), or pass '
            "model=lambda key: module.init(key, x)",
        )

    def make(key: Any) -> Any:
        arguments = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one) for one in inputs]
        return model.init(key, *arguments)

    return make


def _of_nnx(module: Any, make: Callable[[Any], Any] | None, trainable: Trainable) -> Dialect:
    """The dialect of an nnx module: its own values, or those of a trace of ``make``."""
    import flax.nnx as nnx

    wanted = _nnx_filter(trainable, nnx)
    graph, params, rest = nnx.split(module, wanted, ...)
    if not jax.tree.leaves(params):
        raise ConfigError(
            f"nothing of `{type(module).__name__}` is trained",
            why="no floating-point variable of it is what `trainable` says, nnx.Param by default",
            fix="pass trainable= a filter of nnx, such as nnx.LoRAParam",
        )

    def parts(key: Any) -> tuple[Any, Any]:
        assert make is not None
        with unannotated():
            _, *both = nnx.split(make(key), wanted, ...)
        return both[0], both[1]

    def after(module: Any, _: Any, rest: Any) -> Any:
        # Variables that a loss adds (sown ones, caches) are not the state's.
        flat = dict(nnx.to_flat_state(nnx.state(module)))
        kept = [jax.tree.leaves(flat[path]) for path, _ in nnx.to_flat_state(rest)]
        return jax.tree.unflatten(jax.tree.structure(rest), [leaf for one in kept for leaf in one])

    def evaluated(module: Any) -> Any:
        module.eval()
        return module

    return Dialect(
        "nnx",
        parts if make else None,
        None if make or not _concrete((params, rest)) else (params, rest),
        _shapes((params, rest)),
        (describe(params), describe(rest)),
        # Copied: variables of an outer trace could not be changed by the loss.
        lambda params, rest: nnx.merge(graph, params, rest, copy=True),
        after,
        evaluated,
    )


def _nnx_filter(trainable: Trainable, nnx: Any) -> Any:
    def is_float(_: Any, variable: Any) -> bool:
        return all(_is_float(leaf) for leaf in jax.tree.leaves(variable))

    if trainable is None:
        return nnx.All(nnx.Param, is_float)
    if isinstance(trainable, str | list | tuple) and all(isinstance(one, str) for one in trainable):
        chosen = _by_path(trainable)
        return nnx.All(lambda path, _: chosen("/".join(map(str, path))), is_float)
    return nnx.All(trainable, is_float)


def _by_path(trainable: Trainable) -> Callable[[str], bool]:
    if callable(trainable):
        return lambda path: bool(trainable(path))
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    return lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)


def _of_tree(tree: Any, make: Callable[[Any], Any] | None, trainable: Trainable) -> Dialect:
    """The dialect of linen's variables and of any other tree."""
    boxed, tree = tree, _unboxed(tree)
    if _is_variables(tree) and trainable is None:
        return _of_variables(boxed, make)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    chosen = _by_path(trainable) if trainable is not None else lambda _: True
    trained = [_is_float(leaf) and chosen(format_path(path)) for path, leaf in paths]
    others = [None if is_array(leaf) else leaf for _, leaf in paths]
    if not any(trained):
        raise ConfigError(
            f"nothing of the {type(tree).__name__} is trained",
            why="it has no floating-point array that `trainable` names",
            fix="pass a model with parameters, or path patterns that match them",
        )

    def parts(tree: Any) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(_unboxed(tree))
        params = [leaf if yes else None for leaf, yes in zip(leaves, trained, strict=True)]
        rest = [
            leaf if is_array(leaf) and not yes else None
            for leaf, yes in zip(leaves, trained, strict=True)
        ]
        return jax.tree.unflatten(structure, params), jax.tree.unflatten(structure, rest)

    def build(params: Any, rest: Any) -> Any:
        one, two = iter(jax.tree.leaves(params)), iter(jax.tree.leaves(rest))
        leaves = [
            next(one) if yes else next(two) if other is None else other
            for yes, other in zip(trained, others, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    def after(model: Any, changed: Any, rest: Any) -> Any:
        return rest if changed is None else parts(_changed(model, changed))[1]

    named = describe(_arrays_of(boxed))
    flags = [yes for yes, (_, leaf) in zip(trained, paths, strict=True) if is_array(leaf)]
    return Dialect(
        "tree",
        (lambda key: parts(make(key))) if make else None,
        None if make or not _concrete(tree) else parts(tree),
        _shapes(parts(tree)),
        (
            tuple(leaf for leaf, yes in zip(named, flags, strict=True) if yes),
            tuple(leaf for leaf, yes in zip(named, flags, strict=True) if not yes),
        ),
        build,
        after,
        lambda model: model,
    )


def _of_variables(boxed: Any, make: Callable[[Any], Any] | None) -> Dialect:
    """The dialect of linen's collections, ``params`` and others."""

    def parts(variables: Any) -> tuple[Any, Any]:
        plain = dict(_unboxed(variables))
        return plain.pop("params"), plain

    def after(variables: Any, changed: Any, rest: Any) -> Any:
        del variables
        new = {**rest, **_unboxed(dict(changed or {}))}
        return {name: _like(old, new[name], name) for name, old in rest.items()}

    others = {name: tree for name, tree in boxed.items() if name != "params"}
    return Dialect(
        "linen",
        (lambda key: parts(make(key))) if make else None,
        None if make or not _concrete(_unboxed(boxed)) else parts(boxed),
        _shapes(parts(boxed)),
        (describe(boxed["params"]), describe(others)),
        lambda params, rest: {"params": params, **rest},
        after,
        lambda variables: variables,
    )


def _like(old: Any, new: Any, name: str) -> Any:
    """A collection's new arrays in the structure it had: ``apply`` may return other mappings."""
    leaves, structure = jax.tree.leaves(new), jax.tree.structure(old)
    if len(leaves) != structure.num_leaves:
        raise ConfigError(
            f"cannot take the collection `{name}` that the loss returned",
            why=f"it has {len(leaves)} arrays, the model's has {structure.num_leaves}",
            fix="return it as `apply` does with mutable=, or make it in init already",
        )
    return jax.tree.unflatten(structure, leaves)


def _changed(model: Any, changed: Any) -> Any:
    """A model with what a loss returned as changed: all of it, or some entries of a mapping."""
    if jax.tree.structure(changed) == jax.tree.structure(model):
        return changed
    known = isinstance(model, Mapping) and isinstance(changed, Mapping)
    if known and set(changed) <= set(model):
        return {**model, **changed}
    raise ConfigError(
        "cannot take what the loss returned as changed",
        where=f"{jax.tree.structure(changed)}",
        why="it is neither a tree like the model nor, of a mapping, some of its entries",
        fix="return (loss, metrics, the model with its changed arrays)",
    )


def _is_variables(tree: Any) -> bool:
    """Whether a tree is what linen's init returns: collections, ``params`` among them."""
    return (
        isinstance(tree, Mapping)
        and "params" in tree
        and all(isinstance(collection, Mapping) for collection in tree.values())
    )


def _unboxed(tree: Any) -> Any:
    meta = sys.modules.get("flax.core.meta")
    if meta is None:
        return tree
    return jax.tree.map(
        lambda node: (
            node.unbox(apply_constraint=False)
            if isinstance(node, meta.Partitioned)
            else meta.unbox(node)
            if isinstance(node, meta.AxisMetadata)
            else node
        ),
        tree,
        is_leaf=lambda node: isinstance(node, meta.AxisMetadata),
    )


def _is_leaf(node: Any) -> bool:
    leaves = jax.tree.leaves(node)
    return len(leaves) == 1 and leaves[0] is node


def _arrays_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree)


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _concrete(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
    return not any(isinstance(leaf, jax.ShapeDtypeStruct | Tracer) for leaf in leaves)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
