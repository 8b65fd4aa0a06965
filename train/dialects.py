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
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from meshwright.sharding.dims import Leaf, describe, format_path
from meshwright.sharding.errors import ConfigError, DimsError, did_you_mean
from meshwright.sharding.placer import is_array, unannotated
from meshwright.train.captured import captured_arrays, made_in_earnest
from meshwright.train.makers import linen_init, maker

__all__ = ["Dialect", "Trainable", "dialect_of"]

_NUMBERS = (bool, int, float, complex)

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
        after: (what the loss took, what it returned as changed, rest, params) → rest; without
            params it is not asked whether a loss changed what is trained.
        evaluated: what the loss takes, in evaluation mode.
        static: what of the model is no array.
    """

    name: str
    make: Callable[[Any], tuple[Any, Any]] | None
    values: tuple[Any, Any] | None
    shapes: tuple[Any, Any]
    leaves: tuple[tuple[Leaf, ...], tuple[Leaf, ...]]
    build: Callable[[Any, Any], Any]
    after: Callable[..., Any]
    evaluated: Callable[[Any], Any]
    static: Any = None


def dialect_of(model: Any, inputs: Sequence[Any] | None, trainable: Trainable = None) -> Dialect:
    """Find out what a model is.

    Args:
        model: an nnx module or its class, a linen module, a tree of arrays, or a function of a key
            (or of ``rngs``, or of nothing) that returns one of these or linen's variables.
        inputs: arguments of a linen module's call, arrays as ShapeDtypeStructs.
        trainable: which leaves are trained; None for what the dialect says.

    Raises:
        ConfigError: not a model, or one that cannot be made as asked.
    """
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if linen and isinstance(model, linen.Module):
        return _traced(linen_init(model, inputs), trainable)
    if nnx and isinstance(model, nnx.Module):
        return _of_nnx(model, None, trainable)
    if isinstance(model, type) or (callable(model) and _is_leaf(model)):
        return _traced(maker(model), trainable)
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

    def named(key: Any) -> Any:
        with unannotated():
            return make(key)

    def of(made: Any) -> Dialect:
        nnx = sys.modules.get("flax.nnx")
        is_nnx = nnx and isinstance(made, nnx.Module)
        return (_of_nnx if is_nnx else _of_tree)(made, make, trainable)

    jax.eval_shape(lambda key: found.append(of(named(key))), jax.random.key(0))
    if not any(isinstance(one, Tracer) for one in captured_arrays(found[0].static)):
        return found[0]
    return made_in_earnest(named, of, lambda dialect: dialect.static)


def _of_nnx(module: Any, make: Callable[[Any], Any] | None, trainable: Trainable) -> Dialect:
    """The dialect of an nnx module: its own values, or those of a trace of ``make``."""
    import flax.nnx as nnx

    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))]
    wanted = _nnx_filter(trainable, paths, nnx)
    # Numbers that variables hold are arrays of the state; names and functions stay as they are.
    graph, params, rest, others = nnx.split(module, wanted, _is_numeric, ...)
    if not jax.tree.leaves(params):
        raise ConfigError(
            f"nothing of `{type(module).__name__}` is trained",
            why="no floating-point variable of it is what `trainable` says, nnx.Param by default",
            fix="pass trainable= a filter of nnx, such as nnx.LoRAParam",
        )

    def parts(key: Any) -> tuple[Any, Any]:
        assert make is not None
        with unannotated():
            made = make(key)
        return _taken(made, params), _taken(made, rest)

    def after(module: Any, changed: Any, rest: Any, params: Any = None) -> Any:
        del changed, params
        # Variables that a loss adds (sown ones, caches) are not the state's.
        return _taken(module, rest)

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
        lambda params, rest: nnx.merge(graph, params, rest, others, copy=True),
        after,
        evaluated,
        (graph, others),
    )


def _taken(module: Any, like: Any) -> Any:
    """A module's values in the structure of a state.

    An array that is no variable is found where it lies: nnx counts it to a module's state, but not
    while it is a tracer.
    """
    import flax.nnx as nnx

    flat = dict(nnx.to_flat_state(nnx.state(module)))

    def at(path: Any) -> Any:
        return functools.reduce(
            lambda node, name: node[name] if isinstance(name, int) else getattr(node, name),
            path,
            module,
        )

    values = [flat[path] if path in flat else at(path) for path, _ in nnx.to_flat_state(like)]
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(values))


def _is_numeric(_: Any, variable: Any) -> bool:
    return all(is_array(leaf) or isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves(variable))


def _nnx_filter(trainable: Trainable, paths: Sequence[str], nnx: Any) -> Any:
    def is_float(_: Any, variable: Any) -> bool:
        return all(_is_float(leaf) or type(leaf) is float for leaf in jax.tree.leaves(variable))

    if trainable is None:
        return nnx.All(nnx.Param, is_float)
    if isinstance(trainable, str | list | tuple) and all(isinstance(one, str) for one in trainable):
        chosen = _by_path(trainable, paths)
        return nnx.All(lambda path, _: chosen("/".join(map(str, path))), is_float)
    return nnx.All(trainable, is_float)


def _by_path(trainable: Trainable, paths: Sequence[str]) -> Callable[[str], bool]:
    """Path patterns, each of which must match something, or a function of the path."""
    if callable(trainable):
        return lambda path: bool(trainable(path))
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    unused = [one for one in patterns if not any(fnmatchcase(path, one) for path in paths)]
    for pattern in unused:
        if len(unused) < len(patterns):  # otherwise nothing is trained, which is said elsewhere
            raise ConfigError(
                f"the pattern `{pattern}` of `trainable` matches nothing",
                where=f"{len(paths)} leaves",
                why="what it means to train would stay as it is",
                fix=did_you_mean(pattern, paths),
            )
    return lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)


def _of_tree(tree: Any, make: Callable[[Any], Any] | None, trainable: Trainable) -> Dialect:
    """The dialect of linen's variables and of any other tree."""
    boxed, tree = tree, _unboxed(tree)
    if _is_variables(tree) and trainable is None:
        return _of_variables(boxed, make)
    first, structure = jax.tree.flatten(tree)
    named = _described(boxed)
    paths = [leaf.path for leaf in named]
    chosen = _by_path(trainable, paths) if trainable is not None else lambda _: True
    trained = [_is_float(leaf) and chosen(path) for path, leaf in zip(paths, first, strict=True)]
    kept = [is_array(leaf) and not yes for leaf, yes in zip(first, trained, strict=True)]
    if not any(trained):
        raise ConfigError(
            f"nothing of the {type(tree).__name__} is trained",
            why="it has no floating-point array that `trainable` names",
            fix="pass a model with parameters, or path patterns that match them",
        )
    concrete = _concrete(tree)
    first = [None if is_array(leaf) else leaf for leaf in first]  # arrays are given to `build`
    of_trained, of_kept = _parting(structure, paths, (trained, kept))

    def parts(tree: Any) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(_unboxed(tree))
        return of_trained(leaves, trained), of_kept(leaves, kept)

    def joined(params: Any, rest: Any) -> list[Any]:
        one, two = iter(jax.tree.leaves(params)), iter(jax.tree.leaves(rest))
        return [
            next(one, None) if yes else next(two) if other else leaf
            for yes, other, leaf in zip(trained, kept, first, strict=True)
        ]

    def after(model: Any, changed: Any, rest: Any, params: Any = None) -> Any:
        del model  # it may be used up, as the states of equinox are
        if changed is None:
            return rest
        before = joined(params, rest)
        new = _changed(structure, paths, before, changed)
        for path, old, now, yes in zip(paths, before, new, kept, strict=True):
            known = old is not None or params is not None
            if known and not yes and now is not old and is_array(now):
                _refuse_changed(path, is_trained=is_array(old))
        return of_kept(new, kept)

    return Dialect(
        "tree",
        (lambda key: parts(make(key))) if make else None,
        None if make or not concrete else parts(tree),
        _shapes(parts(tree)),
        (
            tuple(leaf for leaf, yes in zip(named, trained, strict=True) if yes),
            tuple(leaf for leaf, yes in zip(named, kept, strict=True) if yes),
        ),
        lambda params, rest: jax.tree.unflatten(structure, joined(params, rest)),
        after,
        lambda model: model,
        (structure, first),
    )


def _parting(
    structure: Any, paths: Sequence[str], masks: Sequence[Sequence[bool]]
) -> tuple[Callable[[Sequence[Any], Sequence[bool]], Any], ...]:
    """For each mask a function of (leaves, mask) that returns a tree of these leaves alone.

    The tree has the model's structure with None elsewhere, so that masks written for the model fit
    it. Nodes of some libraries refuse None or forget what lay beside it: of a model with such nodes
    it is a flat mapping by path.
    """

    def alike(leaves: Sequence[Any], which: Sequence[bool]) -> Any:
        left = [leaf if yes else None for leaf, yes in zip(leaves, which, strict=True)]
        return jax.tree.unflatten(structure, left)

    def flat(leaves: Sequence[Any], which: Sequence[bool]) -> Any:
        found = zip(paths, leaves, which, strict=True)
        return OrderedDict((path, leaf) for path, leaf, yes in found if yes)

    marks = [object() for _ in paths]

    def is_open(which: Sequence[bool]) -> bool:
        """Whether the model's nodes take None, and whatever else, and give it back."""
        try:
            found = jax.tree.leaves(jax.tree.map(lambda leaf: leaf, alike(marks, which)))
        except Exception:  # whatever a library's own node raises
            return False
        wanted = [mark for mark, yes in zip(marks, which, strict=True) if yes]
        return len(found) == len(wanted) and all(map(operator.is_, found, wanted))

    return tuple(alike if is_open(which) else flat for which in masks)


def _described(tree: Any) -> tuple[Leaf, ...]:
    """A description of each leaf, those that are no arrays as scalars."""
    try:
        return describe(jax.tree.map(lambda leaf: leaf if is_array(leaf) else np.zeros(()), tree))
    except DimsError:
        raise
    except Exception:  # a library's own node, which takes nothing but what it was made with
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        named = ((format_path(path), leaf) for path, leaf in flat)
        return describe(
            OrderedDict((path, leaf if is_array(leaf) else np.zeros(())) for path, leaf in named)
        )


def _of_variables(boxed: Any, make: Callable[[Any], Any] | None) -> Dialect:
    """The dialect of linen's collections, ``params`` and others."""

    def parts(variables: Any) -> tuple[Any, Any]:
        plain = dict(_unboxed(variables))
        return plain.pop("params"), plain

    def after(variables: Any, changed: Any, rest: Any, params: Any = None) -> Any:
        del variables, params
        # Collections that an apply adds (sown values) are not the state's.
        mine = {name: one for name, one in dict(changed or {}).items() if name in rest}
        flat, structure = jax.tree_util.tree_flatten_with_path(rest)
        paths, before = [format_path(path) for path, _ in flat], [leaf for _, leaf in flat]
        return jax.tree.unflatten(structure, _changed(structure, paths, before, mine))

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


def _changed(
    structure: Any, paths: Sequence[str], before: Sequence[Any], changed: Any
) -> list[Any]:
    """Leaves after a loss: those it returned as changed, found by their paths, and the others."""
    flat, found = jax.tree_util.tree_flatten_with_path(_unboxed(changed))
    new = {format_path(path): leaf for path, leaf in flat}
    if found == structure:
        return [leaf for _, leaf in flat]
    strange = [path for path in new if path not in paths]
    if not strange:
        return [new.get(path, leaf) for path, leaf in zip(paths, before, strict=True)]
    raise ConfigError(
        "cannot take what the loss returned as changed",
        where=f"`{strange[0]}`" + (f" and {len(strange) - 1} more" if len(strange) > 1 else ""),
        why=f"the model has no such leaf; {did_you_mean(strange[0], paths)}",
        fix="return (loss, metrics, the model with its changed arrays), or a part of it in its "
        "place, such as {name: changed} of a mapping",
    )


def _refuse_changed(path: str, *, is_trained: bool) -> NoReturn:
    if is_trained:
        raise ConfigError(
            f"the loss returned `{path}` as changed, and it is trained",
            why="what is trained is changed by the optimizer alone; the new value would be lost",
            fix='say what is trained, such as trainable="0/*" for the first of a pair, or return '
            "only what is not",
        )
    raise ConfigError(
        f"the loss returned `{path}` as changed, and the model has no array there",
        why="a Python number is a constant of the compiled step; the new value would be lost",
        fix="make it an array where the model is made: jnp.asarray(…)",
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


def _is_float(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _concrete(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
    return not any(isinstance(leaf, jax.ShapeDtypeStruct | Tracer) for leaf in leaves)


def _shapes(tree: Any) -> Any:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if is_array(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct((), jnp.result_type(leaf))

    return jax.tree.map(shape, tree)
