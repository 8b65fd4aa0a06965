"""Flax's rule lists read as Rules, saying where they would mean something else.

A Flax rule is a pair of a logical name and mesh axes. The two libraries read a list of them in two
ways, and this engine in a third, stricter one:

====================  =========================  ====================  =========================
of a list             linen                      nnx                   here
====================  =========================  ====================  =========================
a name given twice    the first whose axis the   the last              the first, and an axis
                      leaf has free                                    used twice is an error
a name not in it      its dim stays whole        it *is* a mesh axis   an error
an axis that does     dropped by jit             an error at creation  an error with the sizes
not divide
====================  =========================  ====================  =========================

So a list is never taken over in silence: each name whose meaning changes leaves a note
(`Rules.notes`), and what would have been replicated unnoticed is refused when leaves are resolved.
One list serves parameters and activations alike, so it goes into all four tables, and rules of it
that a table does not need are no error there. ZeRO is added by folding `zero1` or `zero2` on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from meshwright.sharding.errors import RulesError, did_you_mean
from meshwright.sharding.rules import FLAX, Rule, Rules, Table

__all__ = ["Dialect", "FlaxRule", "read_flax_rules"]

Dialect = Literal["linen", "nnx"]
FlaxRule = tuple[str, str | Sequence[str] | None]


def read_flax_rules(rules: Sequence[FlaxRule], dialect: Dialect, mesh_axes: Sequence[str]) -> Rules:
    """The rules of a Flax list; see `Rules.from_flax`, which this is.

    >>> read = read_flax_rules([("mlp", "tensor"), ("mlp", "fsdp")], "linen", ())
    >>> str(read.lookup("params", "mlp")), len(read.notes)
    ('mlp → tensor', 2)
    """
    if dialect not in get_args(Dialect):
        raise RulesError(
            f"there is no dialect `{dialect}`", fix=did_you_mean(dialect, get_args(Dialect))
        )
    given = [(name, _axes_of(name, axes)) for name, axes in rules]
    by_name: dict[str, list[tuple[str, ...]]] = {}
    for name, axes in given:
        by_name.setdefault(name, []).append(axes)
    chosen = {name: _choice(found, dialect) for name, found in by_name.items()}
    notes = [_note(name, found, dialect) for name, found in by_name.items() if len(set(found)) > 1]
    for axis in mesh_axes:
        if dialect == "nnx" and axis not in chosen:
            chosen[axis] = (axis,)
            notes.append(f"`{axis}` as a dim's name: the mesh axis `{axis}`, as nnx takes it")
    source = f"your {dialect} rules"
    read = tuple(Rule(name, axes, f"{FLAX} {source}") for name, axes in chosen.items())
    start = Rules()
    tables: dict[Table, tuple[Rule, ...]] = {
        name: (*read, *(rule for rule in start.table(name) if rule.dim not in chosen))
        for name in ("params", "gradients", "optimizer", "activations")
    }
    notes.append(
        "a name that is not in the list: "
        + ("linen leaves its dim whole" if dialect == "linen" else "nnx takes it for a mesh axis")
        + ", here it is an error"
    )
    splits = any(axes for axes in chosen.values())
    return replace(start, **tables, splits_parameters=splits, notes=tuple(notes))


def _axes_of(name: str, axes: str | Sequence[str] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    found = (axes,) if isinstance(axes, str) or not isinstance(axes, Sequence) else tuple(axes)
    if not all(isinstance(axis, str) for axis in found):
        raise RulesError(
            f"cannot read the Flax rule for `{name}`",
            where=repr((name, axes)),
            why="a rule is a name and a mesh axis, a tuple of mesh axes, or None",
            fix=f'write it like ("{name}", "fsdp")',
        )
    return found


def _choice(found: Sequence[tuple[str, ...]], dialect: Dialect) -> tuple[str, ...]:
    return found[0] if dialect == "linen" else found[-1]


def _note(name: str, found: Sequence[tuple[str, ...]], dialect: Dialect) -> str:
    options = [" + ".join(axes) or "none" for axes in found]
    here = " + ".join(_choice(found, dialect)) or "none"
    if dialect == "linen":
        return (
            f"`{name}` is given {len(found)} times ({', '.join(options)}): linen takes the first "
            f"that the leaf has free, here it is always {here}, and a clash is an error"
        )
    return f"`{name}` is given {len(found)} times ({', '.join(options)}): the last, {here}, as nnx"
