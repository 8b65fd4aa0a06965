"""Arrays that the functions of a model have closed over, which no pytree shows.

A model may hold functions: activations, or closures that put an array back into a tree. Arrays
inside of those are constants of the step. Where a model was made in a trace they are that trace's
tracers, and using them later is an error of jax (`UnexpectedTracerError`). So what of a model is no
array is searched for tracers; if there are any, the model is made once in earnest, on the host, and
only its functions are kept. That is done twice with different keys: constants that differ came from
random numbers, belong to one seed, and are refused.

The alternative, jax's own leak checker, asks the garbage collector who refers to a trace, and
answers yes for references that never matter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from meshwright.sharding.errors import ConfigError
from meshwright.sharding.processes import fetch

__all__ = ["captured_arrays", "made_in_earnest"]

_ENOUGH = 100_000
_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, np.dtype)


def captured_arrays(*roots: Any) -> list[Any]:
    """Arrays and tracers that objects refer to, through closures, partials and attributes.

    >>> def scaled_by(scale):
    ...     return lambda x: scale * x
    >>> captured_arrays(scaled_by(np.ones(3)))
    [array([1., 1., 1.])]
    """
    found: list[Any] = []
    waiting, seen, kept = list(roots)[::-1], set[int](), list[Any]()
    while waiting and len(seen) < _ENOUGH:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _PLAIN):
            continue
        seen.add(id(one))
        kept.append(one)  # an id names one object only while that lives
        if isinstance(one, Tracer | jax.Array | np.ndarray):
            found.append(one)
        else:
            waiting.extend(list(_inside(one))[::-1])
    return found


def _inside(one: Any) -> Iterable[Any]:
    """What an object refers to, as far as a model's values go: no globals, nothing of jax's."""
    if isinstance(one, jax.tree_util.PyTreeDef):
        return (one.node_data(), *one.children())
    if isinstance(one, types.FunctionType):
        cells = [cell.cell_contents for cell in one.__closure__ or () if _is_full(cell)]
        defaults = (*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values())
        return (*cells, *defaults, getattr(one, "__wrapped__", None))
    if isinstance(one, types.MethodType):
        return (one.__self__, one.__func__)
    if isinstance(one, functools.partial):
        return (one.func, *one.args, *one.keywords.values())
    if isinstance(one, Mapping):
        return tuple(one.values())
    if isinstance(one, list | tuple | set | frozenset):
        return tuple(one)
    if type(one).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return (getattr(one, "__wrapped__", None), getattr(one, "fun", None))
    return _attributes(one)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _attributes(one: Any) -> tuple[Any, ...]:
    named = inspect.getattr_static(one, "__dict__", None)
    values = tuple(vars(one).values()) if named is not None and hasattr(one, "__dict__") else ()
    slots = [name for kind in type(one).__mro__ for name in _slots(kind)]
    return (*values, *(getattr(one, name, None) for name in slots))


def _slots(kind: type) -> tuple[str, ...]:
    found = kind.__dict__.get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def made_in_earnest(
    make: Callable[[Any], Any], of: Callable[[Any], Any], static_of: Callable[[Any], Any]
) -> Any:
    """What ``of`` makes of a model that was made outside of any trace.

    Args:
        make: key → model; run on the host, where there is a CPU backend.
        of: model → what is wanted of it; should keep no array of it.
        static_of: of that, what is no array.

    Raises:
        ConfigError: its functions hold arrays that depend on the key.
    """
    with _on_the_host():
        other, wanted = (of(make(jax.random.key(seed))) for seed in (1, 0))
    constants, others = (captured_arrays(static_of(one)) for one in (wanted, other))
    same = len(constants) == len(others) and all(
        np.array_equal(one, two) for one, two in zip(fetch(constants), fetch(others), strict=True)
    )
    if not same:
        raise ConfigError(
            "cannot make the model from a key",
            why="functions of it hold arrays that depend on the key, where no pytree shows them",
            fix="make it and pass the model itself, or keep these arrays in its fields",
        )
    return wanted


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a backend for accelerators alone was asked for
        yield
        return
    with jax.default_device(host):
        yield
