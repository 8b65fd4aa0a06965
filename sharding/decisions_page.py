"""Sharding decisions as one HTML file: where each leaf lives and why, to search, sort and point at.

For any pytree: leaves need no dim names and come from no model of ours. The page holds a JSON
document (``<script id="decisions-data">``) and a script that draws it: the mesh, a legend of
which mesh axes split a leaf, totals by table, and the leaves. Tables that describe the same
leaves share a row, and those with equal layouts a column; what describes other leaves (the
moments of an optimizer) is a part of its own, closed until it is opened.

Cost: linear in the leaves; equal (spec, rule, reason) are written once. The browser makes elements
only for the rows in sight, so thousands of leaves scroll as smoothly as ten.

The document, ``schema`` first::

    title, topology, mesh: {axis: size, …}
    holds:    [{name, bytes, what}, …], if the caller says what a device holds together
    tables:   [{name, leaves, bytes, bytes_per_device}, …]
    layouts:  [{spec: [[axis, …] a dim, …], rule, reason}, …]
    groups:   [{tables: [index, …], leaves: [{path, shape, dtype, dims, bytes,
              layouts: [index a table], bytes_per_device: [bytes a table]}, …]}, …]

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
    from meshwright.sharding.decisions import Decisions

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
            ``optimizer``, and of the optimizer's state. Those of the same leaves, in the same
            order, share their rows. The first part is shown open.
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


def _groups(tables: _Tables) -> list[list[int]]:
    """The tables that describe the same leaves, by position, in the order given."""
    found: dict[Any, list[int]] = {}
    for index, (_, decisions) in enumerate(tables):
        leaves = ((d.leaf.path, d.leaf.shape, d.leaf.dtype, d.leaf.dims) for d in decisions)
        found.setdefault(tuple(leaves), []).append(index)
    return list(found.values())


def _leaves(group: Sequence[Decisions], layouts: dict[Any, int]) -> list[dict[str, Any]]:
    rows = []
    for made in zip(*group, strict=True):
        leaf = made[0].leaf
        keys = [(d.spec, d.rule, d.reason) for d in made]
        rows.append(
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "dims": None if leaf.dims is None else list(leaf.dims),
                "bytes": leaf.size_bytes,
                "layouts": [layouts.setdefault(key, len(layouts)) for key in keys],
                "bytes_per_device": [d.bytes_per_device for d in made],
            }
        )
    return rows


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
        line = f"{total['name']}: {total['leaves']} leaves, {size}, {part} a device"
        console.print(line, markup=False, highlight=False)
    for group in document["groups"]:
        shown = [(tables[i][0], _first(tables[i][1], _TEXT_LEAVES)) for i in group["tables"]]
        console.print()
        console.print(decisions_table("", shown))
        left = len(group["leaves"]) - _TEXT_LEAVES
        if left > 0:
            console.print(f"and {left} more leaves, which need scripts to be shown")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _first(decisions: Decisions, count: int) -> Decisions:
    return dataclasses.replace(decisions, decisions=decisions.decisions[:count])
