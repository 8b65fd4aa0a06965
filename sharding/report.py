"""Decisions as a table for people and as JSON for programs.

Formatting only: what is shown was decided elsewhere. The table has a row a parameter; layouts
that agree are printed once. Bytes are binary (1 KiB = 1024 bytes) and per device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import Decision, Decisions
from meshwright.sharding.dims import format_dims, format_shape
from meshwright.sharding.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["decision_json", "decisions_table", "format_spec", "spec_json"]


def format_spec(spec: PartitionSpec) -> str:
    """Write a spec in short: ``(·, fsdp, tensor)``; ``whole`` if nothing is split.

    >>> format_spec(PartitionSpec(None, ("fsdp", "data"), "tensor"))
    '(·, fsdp+data, tensor)'
    """
    entries = [
        "·" if entry is None else entry if isinstance(entry, str) else "+".join(entry)
        for entry in spec
    ]
    return f"({', '.join(entries)})" if entries else "whole"


def spec_json(spec: PartitionSpec) -> list[list[str]]:
    """A spec as JSON: for each dim the list of its axes, trailing whole dims left out.

    >>> spec_json(PartitionSpec(None, "fsdp"))
    [[], ['fsdp']]
    """
    return [
        [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
        for entry in spec
    ]


def decision_json(decision: Decision) -> dict[str, Any]:
    """A decision as JSON."""
    leaf = decision.leaf
    return {
        "path": leaf.path,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "dims": None if leaf.dims is None else list(leaf.dims),
        "spec": spec_json(decision.spec),
        "rule": decision.rule,
        "reason": decision.reason,
        "bytes": leaf.size_bytes,
        "bytes_per_device": decision.bytes_per_device,
    }


def decisions_table(title: str, tables: Sequence[tuple[str, Decisions]]) -> Table:
    """A rich table with a row for each leaf and a column for each layout that differs.

    Args:
        title: heading.
        tables: (column heading, decisions) of the same leaves; the last one gives the bytes
            and, where the first keeps a leaf whole, the reason.
    """
    from rich.markup import escape
    from rich.table import Table

    columns = [(name, found) for name, found in tables]
    first, last = columns[0][1], columns[-1][1]
    shown = [columns[0]] + [
        (name, found)
        for name, found in columns[1:]
        if any(a.spec != b.spec for a, b in zip(found, first, strict=True))
    ]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("leaf", "shape", "dims", *(name for name, _ in shown), "why"):
        table.add_column(heading, overflow="fold")
    table.add_column("a device", justify="right", no_wrap=True)
    for index, decision in enumerate(first):
        deciding = decision if decision.spec else last.decisions[index]
        why = deciding.rule if deciding.spec else deciding.reason
        cells = (
            decision.leaf.path,
            format_shape(decision.leaf.shape),
            format_dims(decision.leaf.dims),
            *(format_spec(found.decisions[index].spec) for _, found in shown),
            why,
            format_bytes(last.decisions[index].bytes_per_device),
        )
        table.add_row(*map(escape, cells))  # a path may look like rich's markup
    return table
