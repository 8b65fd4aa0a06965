"""A plan as one HTML file: it opens anywhere, needs no network, and holds its own data.

The page is drawn by a script from the JSON document of the plan inside it, which other tools can
read back (``<script id="plan-data">``); `meshwright.sharding.page` joins the parts and keeps the
strings of a user's program from ever being markup. What does not fit a browser without scripts is
there as text.

Rejected: drawing in Python (sorting and filtering need the data in the page anyway, so every
table would be written twice).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.sharding.errors import TopologyError
from meshwright.sharding.links import MOST_DRAWN
from meshwright.sharding.page import assemble
from meshwright.sharding.plan_json import report_json
from meshwright.sharding.plan_text import report_text, verdict_text
from meshwright.sharding.planned import PlanReport
from meshwright.sharding.topology import Topology

__all__ = ["report_html"]

_LINE = 16  # simulated devices in a row of the drawing
_TEXT_COLUMNS = 100


def report_html(report: PlanReport, layout: Sequence[Mapping[str, Any]] | None = None) -> str:
    """A plan as a self-contained page.

    Args:
        report: the plan.
        layout: where each device is, from `meshwright.sharding.links.physical_layout`: ``index``
            (position on each axis of the report's mesh), ``slice`` and ``coordinates``. None
            where that is not known; a sentence stands in the drawing's place, as it does for
            more than `meshwright.sharding.links.MOST_DRAWN` devices.

    Returns:
        The text of an HTML file, to be written as UTF-8.
    """
    name = str(report.model.get("name") or "step")
    return assemble(
        "plan_page",
        texts={
            "title": f"{name} on {report.topology}: {verdict_text(report)}",
            "text": _as_text(report),
        },
        documents={"data": report_json(report), "layout": _drawing(report, layout)},
    )


def _drawing(report: PlanReport, layout: Sequence[Mapping[str, Any]] | None) -> Any:
    """The devices to draw, or their number where there are too many, or None."""
    count = math.prod(report.mesh.values()) if layout is None else len(layout)
    if count > MOST_DRAWN:
        return {"count": count, "most": MOST_DRAWN}
    if layout is None:
        return None
    try:
        hosts = Topology.parse(report.topology).kind == "gpu"
    except TopologyError:
        hosts = False
    slices = len({device["slice"] for device in layout}) > 1
    drawn = []
    for device in layout:
        plane, x, y, words = _place(device["coordinates"], hosts)
        where = f"slice {device['slice']}" if slices else ""
        drawn.append(
            {
                "plane": ", ".join(filter(None, (where, plane))),
                "x": x,
                "y": y,
                "where": ", ".join(filter(None, (where, words))),
                "mesh": dict(zip(report.mesh, device["index"], strict=True)),
            }
        )
    return drawn


def _place(at: Sequence[int], hosts: bool) -> tuple[str, int, int, str]:
    """(drawing it belongs to, column, row, in words) of a device's coordinates."""
    if hosts:
        return f"host {at[0]}", at[1], 0, f"host {at[0]}, GPU {at[1]}"
    if len(at) == 1:
        return "", at[0] % _LINE, at[0] // _LINE, f"device {at[0]}"
    x, y, *rest = at
    chip = f"chip ({', '.join(map(str, at[:3]))})"
    device = f", device {rest[1]}" if len(rest) > 1 else ""
    return f"z = {rest[0]}" if rest else "", x, y, chip + device


def _as_text(report: PlanReport) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=_TEXT_COLUMNS, color_system=None)
    console.print(*report_text(report, _TEXT_COLUMNS), sep="\n", highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
