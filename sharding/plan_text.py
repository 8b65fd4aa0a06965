"""A plan in a terminal: the verdict in words first, then the tables it rests on.

Formatting only. It has to be read at 80 columns, in a log without colours, and through a pipe
that knows no Unicode; so the bars and rules are ASCII, names from the user's program keep their
own characters where the stream can carry them, and no figure is in colour alone. Long lists are
cut, largest first, and say how many rows are left and where those are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from meshwright.sharding.plan_json import origin_of
from meshwright.sharding.planned import Collective, PlanReport, PlanWarning
from meshwright.sharding.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["MEMORY_PARTS", "print_report", "report_text", "verdict_text"]

MEMORY_PARTS = ("parameters", "gradients", "optimizer", "batch", "activations", "temporaries")
"""The parts of `MemoryEstimate`, in the order they are shown."""

_MOST_COLLECTIVES = 15
_MOST_CONTRIBUTORS = 8
_MOST_DECISIONS = 30
_WHERE_ALL = "the JSON document (--json) and the page (--html) have all"


def print_report(report: PlanReport, console: Console) -> None:
    """Print a plan; characters that the console's encoding lacks are replaced, never an error."""
    from rich.console import Console

    parts = report_text(report, console.width)
    if console.encoding.lower().replace("-", "") == "utf8":
        console.print(*parts, sep="\n", highlight=False)
        return
    lines = Console(file=io.StringIO(), width=console.width, color_system=None)
    lines.print(*parts, sep="\n", highlight=False)
    assert isinstance(lines.file, io.StringIO)
    text = lines.file.getvalue().replace("→", "->").replace("×", "x").replace("·", "-")
    text = text.encode(console.encoding, "replace").decode(console.encoding)
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def report_text(report: PlanReport, width: int = 80) -> list[RenderableType]:
    """A plan as things rich prints, one below the other.

    Args:
        report: the plan.
        width: columns there are; bars use what the numbers leave.
    """
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(verdict_text(report), style="bold"),
        Text(_subject(report)),
        _heading(f"memory, a device{_peak_origin(report)}"),
        _memory(report, max(10, min(40, width - 42))),
    ]
    parts += _remedies(report)
    parts += [_heading("traffic, a device and step"), *_traffic(report)]
    parts += [_heading("collectives, largest first"), *_collectives(report)]
    parts += [_heading("compute and time, a step"), _time(report)]
    if report.warnings:
        parts.append(_heading(f"warnings ({len(report.warnings)})"))
        parts += [_warning(warning) for warning in report.warnings]
    if report.decisions:
        parts += [_heading("decisions"), *_decisions(report)]
    parts += [_heading("where the figures come from"), _provenance(report)]
    return parts


def verdict_text(report: PlanReport) -> str:
    """Whether it fits, in one sentence.

    >>> from meshwright.sharding.planned import *
    >>> memory = MemoryEstimate(0, 0, 0, 0, 0, 0, peak_bytes=33 * 2**30, limit_bytes=96 * 2**30)
    >>> flops, time = ComputeEstimate(None, None, None, None, None), StepEstimate(None, None)
    >>> verdict_text(PlanReport("v5p:2x2x1", {}, {}, memory, (), {}, flops, time, (), (), {}))
    'fits: 33.0 of 96.0 GiB a device, 63.0 GiB to spare'
    """
    peak, limit = report.memory.peak_bytes, report.memory.limit_bytes
    if limit is None and peak is not None and any("no verdict" in line for line in report.unread):
        return f"no verdict at low effort: a peak of about {format_bytes(peak)} a device"
    if peak is None or limit is None:
        missing = "the peak is" if limit is not None else "the limit is"
        missing = "peak and limit are" if peak is None and limit is None else missing
        return f"no verdict: {missing} not known for {_plain(report.topology)}"
    held, allowed = format_bytes(peak), format_bytes(limit)
    if held.split()[-1] == allowed.split()[-1]:
        held = held.split()[0]
    if report.fits:
        return f"fits: {held} of {allowed} a device, {format_bytes(limit - peak)} to spare"
    return f"does NOT fit: {held} of {allowed} a device, over by {format_bytes(peak - limit)}"


def _subject(report: PlanReport) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in report.mesh.items())
    name = report.model.get("name") or "a step"
    size = report.model.get("parameters")
    counted = f", {size:,} parameters" if isinstance(size, int) else ""
    return _plain(f"{name}{counted} on {report.topology}, mesh {mesh}")


def _peak_origin(report: PlanReport) -> str:
    found = origin_of(report, "memory.peak_bytes")
    known = found and report.memory.peak_bytes is not None
    return f" (peak: {found[0]}; % of the limit)" if found and known else ""


def _memory(report: PlanReport, bar: int) -> Table:
    """Each part with a bar on the scale of the limit, or of the peak where that is larger."""
    memory = report.memory
    parts = [(name, getattr(memory, f"{name}_bytes")) for name in MEMORY_PARTS]
    whole = max(memory.peak_bytes or 0, memory.limit_bytes or 0, sum(size for _, size in parts), 1)
    table = _table(("", "left"), ("", "right"), ("", "left"))
    rows: list[tuple[str, int | None]] = [
        *parts, ("peak", memory.peak_bytes), ("limit", memory.limit_bytes)
    ]  # fmt: skip
    for name, size in rows:
        drawn = "" if size is None else "#" * max(int(size > 0), round(bar * size / whole))
        share = ""
        if size is not None and memory.limit_bytes and name != "limit":
            share = f" {_percent(size / memory.limit_bytes)}"
        _row(table, name, _bytes(size), f"|{drawn}{share}" if size is not None else "")
    return table


def _remedies(report: PlanReport) -> Iterator[RenderableType]:
    """The largest contributors, and what was tried to make it fit."""
    from rich.text import Text

    found = report.memory.contributors
    if found:
        yield _heading("largest in memory")
        table = _table(("", "right"), ("", "left"))
        for what, size in found[:_MOST_CONTRIBUTORS]:
            _row(table, format_bytes(size), what)
        yield table
        yield from _left_out(len(found) - _MOST_CONTRIBUTORS, "parts")
    if report.memory.changes:
        yield _heading("changes tried")
        table = _table(("", "left"), ("", "right"), ("", "left"), ("", "left"))
        for change in report.memory.changes:
            verdict = "fits" if change.fits else "does not fit"
            _row(table, change.flags, format_bytes(change.peak_bytes), verdict, change.origin)
        yield table
    elif report.fits is False:
        yield Text("no change was tried")


def _traffic(report: PlanReport) -> Iterator[RenderableType]:
    from rich.text import Text

    if not report.traffic:
        yield Text("not known: no program was compiled and no closed form applies")
        return
    table = _table(
        ("axis", "left"), ("sent", "right"), ("at least", "right"), ("ratio", "right"),
        ("rate", "right"), ("seconds", "right"),
    )  # fmt: skip
    for axis, moved in report.traffic.items():
        size = report.mesh.get(axis)
        sends = moved.bandwidth is not None and math.isfinite(moved.bandwidth)
        rate = f"{format_count(moved.bandwidth or 0.0)}B/s" if sends else None
        _row(
            table,
            axis if size is None else f"{axis}={size}",
            format_bytes(moved.wire_bytes),
            _bytes(moved.lower_bound_bytes),
            "?" if moved.ratio is None else f"{moved.ratio:.3f}",
            rate or "?",
            _seconds(moved.seconds),
        )
    yield table


def _collectives(report: PlanReport) -> Iterator[RenderableType]:
    """Grouped by kind, axes, phase and leaf: a row for what a reader would change as one."""
    from rich.text import Text

    if not report.collectives:
        unknown = report.provenance.get("collectives", ("", ""))
        why = f"not known: {_plain(unknown[1])}" if unknown[0] == "unknown" else "none"
        yield Text(why)
        return
    groups: dict[tuple[object, ...], list[Collective]] = {}
    for collective in report.collectives:
        key = (collective.kind, collective.axes, collective.phase, collective.leaf)
        groups.setdefault(key, []).append(collective)
    rows = sorted(groups.values(), key=lambda group: -_sum(group, "wire_bytes"))
    table = _table(
        ("kind", "left"), ("axes", "left"), ("phase", "left"), ("times", "right"),
        ("sent", "right"), ("overlaps", "left"), ("of", "left"),
    )  # fmt: skip
    for group in rows[:_MOST_COLLECTIVES]:
        first = group[0]
        _row(
            table,
            first.kind,
            "+".join(first.axes) + ("*" if any(c.partial for c in group) else ""),
            first.phase,
            str(_sum(group, "count")),
            format_bytes(_sum(group, "wire_bytes")),
            _overlap(group),
            first.leaf or first.source or first.operation,
        )
    yield table
    if any(collective.partial for group in rows[:_MOST_COLLECTIVES] for collective in group):
        yield Text("* within parts of an axis")
    hidden = rows[_MOST_COLLECTIVES:]
    sent = sum(_sum(group, "wire_bytes") for group in hidden)
    yield from _left_out(len(hidden), f"groups, {format_bytes(sent)} sent by them")


def _overlap(group: Iterable[Collective]) -> str:
    words = {True: "yes", False: "no", None: "?"}
    return "/".join(dict.fromkeys(words[collective.overlaps] for collective in group))


def _time(report: PlanReport) -> Table:
    time, flops = report.time, report.flops
    table = _table(("", "left"), ("", "left"))
    rated = " of peak" if time.peak_flops is None else f" of {format_count(time.peak_flops)}FLOP/s"
    span = "not known"
    if time.step_seconds_low is not None or time.step_seconds_high is not None:
        low, high = _seconds(time.step_seconds_low), _seconds(time.step_seconds_high)
        checked = "validated" if time.validated else "unvalidated: not measured on this hardware"
        span = f"{low} (what can overlap does) to {high} (nothing does); {checked}"
    moved = [f"{axis} {_seconds(value)}" for axis, value in time.communication_seconds.items()]
    compute = _seconds(time.compute_seconds)
    if time.roofline_seconds is not None:
        compute += f", roofline {_seconds(time.roofline_seconds)}"
    model = _count(flops.model_flops, "FLOP")
    if flops.model_flops_causal is not None:
        model += f", {_count(flops.model_flops_causal, 'FLOP')} with causal attention"
    rows = (
        ("step", span),
        ("bound by", time.bound_by or "?"),
        ("compute", compute),
        ("memory", _seconds(time.memory_seconds)),
        ("memory traffic", _bytes(flops.memory_traffic_bytes)),
        ("communication", ", ".join(moved) or "?"),
        ("tokens/s a chip", _range(time.tokens_per_second_per_chip, ",.0f")),
        ("model FLOP utilisation", _range(time.mfu, ".1%") + rated * (time.mfu is not None)),
        ("FLOPs a device", _count(flops.device_flops, "FLOP")),
        ("FLOPs of the model", model),
        ("redundancy", "?" if flops.redundancy is None else f"{flops.redundancy:.3f}"),
    )
    for name, said in rows:
        _row(table, name, said)
    return table


def _warning(warning: PlanWarning) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    costs = []
    if warning.cost_bytes is not None:
        costs.append(format_bytes(warning.cost_bytes))
    if warning.cost_seconds is not None:
        costs.append(format_seconds(warning.cost_seconds))
    where = ", ".join(filter(None, (warning.source, warning.leaf)))
    lines = [
        f"{warning.code}: {warning.what}",
        *(f"  {label:<6} {text}" for label, text in
          (("where:", where), ("costs:", " and ".join(costs)), ("fix:", warning.fix)) if text),
    ]  # fmt: skip
    return Padding(Text("\n".join(_plain(line) for line in lines)), (0, 0, 0, 2))


def _decisions(report: PlanReport) -> Iterator[RenderableType]:
    """Where each leaf lives and which rule decided; ``meshwright explain`` says more."""
    table = _table(("leaf", "left"), ("shape", "left"), ("rule", "left"), ("a device", "right"))
    for row in report.decisions[:_MOST_DECISIONS]:
        shape = "×".join(str(size) for size in row.get("shape", ()))
        _row(
            table,
            str(row.get("path")),
            shape,
            str(row.get("rule")),
            _bytes(row.get("bytes_per_device")),
        )
    yield table
    yield from _left_out(len(report.decisions) - _MOST_DECISIONS, "leaves")


def _provenance(report: PlanReport) -> Table:
    """One line for each origin, with the figures it gives; then what could not be read."""
    table = _table(("", "left"), ("", "left"))
    by_origin: dict[str, list[str]] = {}
    for figure, (origin, _) in report.provenance.items():
        by_origin.setdefault(origin, []).append(figure)
    for origin, named in by_origin.items():
        _row(table, origin, ", ".join(named))
    for line in report.unread:
        _row(table, "NOT READ", line)
    for line in report.notes:
        _row(table, "note", line)
    if not by_origin and not report.unread:
        _row(table, "unknown", "nothing was recorded")
    return table


def _left_out(count: int, what: str) -> Iterator[RenderableType]:
    from rich.text import Text

    if count > 0:
        yield Text(f"and {count} more {what}; {_WHERE_ALL}")


def _heading(words: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{words}", style="bold")


def _table(*columns: tuple[str, Any]) -> Table:
    from rich.table import Table

    named = any(name for name, _ in columns)
    table = Table(box=None, show_header=named, header_style="bold", pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for index, (name, justify) in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not last and not index)
    return table


def _row(table: Table, *cells: str) -> None:
    """Add a row without markup: a leaf may be called ``[bold]``."""
    from rich.text import Text

    table.add_row(*(Text(_plain(cell)) for cell in cells))


def _plain(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _sum(group: Sequence[Collective], name: str) -> int:
    return sum(getattr(collective, name) for collective in group)


def _bytes(count: float | None) -> str:
    return "?" if count is None else format_bytes(count)


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else format_seconds(seconds)


def _count(count: float | None, unit: str) -> str:
    return "?" if count is None else f"{format_count(count)}{unit}"


def _range(pair: tuple[float, float] | None, form: str) -> str:
    return "?" if pair is None else f"{pair[1]:{form}} to {pair[0]:{form}}"
