"""Sharding decisions as one HTML file: where each leaf lives and why, to search, sort and point at.

For any pytree: leaves need no dim names and come from no model of ours. The page holds a JSON
document (``<script id="decisions-data">``) and a script that draws it: the mesh, a legend of
which mesh axes split a leaf, totals by table, and the leaves. Tables that describe the same
leaves, or some of them (what is trained, of a model with batch statistics), share their rows, and
those with equal layouts a column; what describes other leaves (the moments of an optimizer) is a
part of its own, closed until it is opened.

Cost: linear in the leaves; equal (spec, rule, reason) are written once. The browser makes elements
only for the rows in sight, so thousands of leaves scroll as smoothly as ten.

The document, ``schema`` first::

    title, topology, mesh: {axis: size, …}
    holds:    [{name, bytes, what}, …], if the caller says what a device holds together
    tables:   [{name, leaves, bytes, bytes_per_device}, …]
    layouts:  [{spec: [[axis, …] a dim, …], rule, reason}, …]
    groups:   [{tables: [index, …], leaves: [{path, shape, dtype, dims, bytes,
              layouts: [index a table], bytes_per_device: [bytes a table]}, …]}, …]

Both lists of a leaf follow the tables of its group; null where a table is not about the leaf.

Joining a page to one file, and what keeps a user's strings from being markup, is
`meshwright.sharding.page`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meshwright.sharding.errors import MeshError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.page import assemble
from meshwright.sharding.units import format_bytes

if TYPE_CHECKING:
    from meshwright.sharding.decisions import Decision, Decisions

__all__ = ["decisions_html"]

_SCHEMA = "meshwright.decisions/1"
_TEXT_COLUMNS = 120
_TEXT_LEAVES = 200  # of a table in the text for browsers without scripts

_Tables = Sequence[tuple[str, "Decisions"]]


def decisions_html(
    tables: _Tables,
    *,
    title: str,
    mesh: MeshSpec,
    topology: str | None = None,
    holds: Sequence[tuple[str, int, str]] = (),
) -> str:
    """Write decisions as a self-contained page.

    Args:
        tables: (heading, decisions) pairs, such as those of ``params``, ``gradients`` and
            ``optimizer``, and of the optimizer's state. Those whose leaves are the same, or are
            among those of another, share their rows. The first part is shown open.
        title: what is sharded, such as a model's name.
        mesh: filled mesh that the decisions were resolved on.
        topology: the hardware, as it is written, or None.
        holds: (name, bytes a device, what it is) of what a device holds together, where that
            is known: layouts of one array are not several arrays, so no sum is taken here.

    Returns:
        The text of an HTML file, to be written as UTF-8.

    Raises:
        MeshError: a mesh with a size of -1, or decisions of another mesh.

    >>> from meshwright.sharding import describe, fold, fsdp, resolve
    >>> mesh = MeshSpec.parse("fsdp=4")
    >>> import jax
    >>> leaves = describe({"w": jax.ShapeDtypeStruct((8, 2), "float32")})
    >>> found = resolve(leaves, fold(fsdp(min_bytes=0)), mesh, "params")
    >>> decisions_html([("params", found)], title="one leaf", mesh=mesh)[:15]
    '<!doctype html>'
    """
    _check_mesh(tables, mesh)
    document = _document(tables, title, mesh, topology, holds)
    return assemble(
        "decisions_page",
        texts={"title": f"{title}: sharding decisions", "text": _as_text(tables, document)},
        documents={"data": document},
        scripts=("mesh_drawing.js",),
    )


def _check_mesh(tables: _Tables, mesh: MeshSpec) -> None:
    _ = mesh.device_count  # refuses a size that is still -1
    for heading, decisions in tables:
        if decisions.mesh.axes != mesh.axes:
            raise MeshError(
                f"cannot show the decisions `{heading}` on this mesh",
                where=f"mesh {mesh}",
                why=f"they were resolved on {decisions.mesh}",
                fix="pass the mesh that was given to `resolve`",
            )


def _document(
    tables: _Tables,
    title: str,
    mesh: MeshSpec,
    topology: str | None,
    holds: Sequence[tuple[str, int, str]],
) -> dict[str, Any]:
    layouts: dict[Any, int] = {}
    groups = [
        {"tables": indices, "leaves": _leaves([tables[i][1] for i in indices], layouts)}
        for indices in _groups(tables)
    ]
    return {
        "schema": _SCHEMA,
        "title": title,
        "topology": topology,
        "mesh": mesh.sizes,
        "holds": [{"name": name, "bytes": size, "what": what} for name, size, what in holds],
        "tables": [
            {
                "name": heading,
                "leaves": len(decisions),
                "bytes": decisions.size_bytes,
                "bytes_per_device": decisions.bytes_per_device,
            }
            for heading, decisions in tables
        ],
        "layouts": _layouts(layouts),
        "groups": groups,
    }


def _keys(decisions: Decisions) -> list[Any]:
    """What makes leaves of two tables the same leaf."""
    return [(d.leaf.path, d.leaf.shape, d.leaf.dtype, d.leaf.dims) for d in decisions]


def _groups(tables: _Tables) -> list[list[int]]:
    """Which tables share rows, by position: those whose leaves are among those of another.

    The first table of a group has all of its leaves.
    """
    keys = [_keys(decisions) for _, decisions in tables]
    found: list[list[int]] = []
    # Each after those that have more leaves, and otherwise as given.
    for index in sorted(range(len(tables)), key=lambda i: -len(keys[i])):
        home = next((group for group in found if _among(keys[index], keys[group[0]])), None)
        found.append([index]) if home is None else home.append(index)
    return sorted(([group[0], *sorted(group[1:])] for group in found), key=min)


def _among(part: Sequence[Any], leaves: Sequence[Any]) -> bool:
    if part == leaves:
        return True
    known = set(leaves)  # a leaf that is there twice cannot be told apart
    return (
        bool(part)
        and len(known) == len(leaves)
        and len(set(part)) == len(part)
        and known.issuperset(part)
    )


def _leaves(group: Sequence[Decisions], layouts: dict[Any, int]) -> list[dict[str, Any]]:
    first = group[0]
    columns = [
        list(decisions) if len(decisions) == len(first) else _spread(decisions, first)
        for decisions in group
    ]
    rows = []
    for decision, *made in zip(first, *columns, strict=True):
        leaf = decision.leaf
        keys = [d and (d.spec, d.rule, d.reason) for d in made]
        rows.append(
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "dims": None if leaf.dims is None else list(leaf.dims),
                "bytes": leaf.size_bytes,
                "layouts": [key and layouts.setdefault(key, len(layouts)) for key in keys],
                "bytes_per_device": [d and d.bytes_per_device for d in made],
            }
        )
    return rows


def _spread(decisions: Decisions, over: Decisions) -> list[Decision | None]:
    """The decisions beside all leaves of a larger table, None for those they are not about."""
    found = dict(zip(_keys(decisions), decisions, strict=True))
    return [found.get(key) for key in _keys(over)]


def _layouts(found: dict[Any, int]) -> list[dict[str, Any]]:
    from meshwright.sharding.report import spec_json  # brings jax, as decisions did

    return [
        {"spec": spec_json(spec), "rule": rule, "reason": reason} for spec, rule, reason in found
    ]


def _as_text(tables: _Tables, document: dict[str, Any]) -> str:
    """What a browser without scripts shows: the totals, and the tables up to a length."""
    from rich.console import Console

    from meshwright.sharding.report import decisions_table

    console = Console(file=io.StringIO(), width=_TEXT_COLUMNS, color_system=None)
    for total in document["tables"]:
        size, part = format_bytes(total["bytes"]), format_bytes(total["bytes_per_device"])
        leaves = "1 leaf" if total["leaves"] == 1 else f"{total['leaves']} leaves"
        line = f"{total['name']}: {leaves}, {size}, {part} a device"
        console.print(line, markup=False, highlight=False)
    alike: dict[Any, list[tuple[str, Decisions]]] = {}  # rows of text have no empty places
    for heading, decisions in tables:
        alike.setdefault(tuple(_keys(decisions)), []).append((heading, decisions))
    for keys, same in alike.items():
        shown = [(heading, _first(decisions, _TEXT_LEAVES)) for heading, decisions in same]
        console.print()
        console.print(decisions_table("", shown))
        left = len(keys) - _TEXT_LEAVES
        if left > 0:
            console.print(f"and {left} more leaves, which need scripts to be shown")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _first(decisions: Decisions, count: int) -> Decisions:
    return dataclasses.replace(decisions, decisions=decisions.decisions[:count])
