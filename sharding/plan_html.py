"""A plan as one HTML file: it opens anywhere, needs no network, and holds its own data.

The page is a skeleton, a style sheet and a script beside this module, joined to one file with the
JSON document of the plan inside; the script draws everything from that document, so page and
document cannot disagree, and other tools can read it back (``<script id="plan-data">``). What
does not fit a browser without scripts is there as text.

Nothing of a user's program is ever markup. The document is escaped so that no string can end
its element, the script sets text only (never ``innerHTML``), and a content security policy with
the hashes of our own script and style makes the browser refuse anything else: a leaf called
``</script>`` is a leaf with a strange name. The page asks for nothing, by the same policy.

Rejected: a chart library (half a megabyte in each report, and a licence), and drawing in Python
(sorting and filtering need the data in the page anyway, so every table would be written twice).
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from meshwright.sharding.errors import TopologyError
from meshwright.sharding.links import MOST_DRAWN
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
    style, script = _asset("css"), _asset("js")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}"
    )
    name = str(report.model.get("name") or "step")
    parts = {
        "policy": html.escape(policy),
        "title": _text(f"{name} on {report.topology}: {verdict_text(report)}"),
        "style": style,
        "text": _text(_as_text(report)),
        "data": _embedded(report_json(report)),
        "layout": _embedded(_drawing(report, layout)),
        "script": script,
    }
    page = _asset("html")
    for key, value in parts.items():
        before, mark, after = page.partition(f"<!--{key}-->")
        assert mark, f"the skeleton has no place for {key}"
        # Only the part behind is searched on: a value may hold the next mark.
        parts[key] = before + value
        page = after
    return "".join(parts.values()) + page


@cache
def _asset(suffix: str) -> str:
    return Path(__file__).with_name(f"plan_page.{suffix}").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A content security policy's name for an inline element."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that no HTML parser takes for the end of its element or for a comment."""
    text = json.dumps(value, allow_nan=False)  # ASCII only, so lone surrogates stay escapes
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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


def _text(text: str) -> str:
    """Escaped, and without the lone surrogates that UTF-8 cannot hold."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
