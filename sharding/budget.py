"""Limits on the figures of a plan, kept in a file: a project's CI fails when a plan outgrows them.

A budget is YAML. Keys are figures of the JSON document (`meshwright.sharding.plan_json`), dotted
or nested; a value is one limit::

    memory.peak_bytes: 14GiB            # at most; B, KB to PB, KiB to PiB
    traffic:
      fsdp.ratio: 1.05                  # by mesh axis
    time:
      step_seconds_high: 2.5            # seconds, or with us, ms, s, min, h
      mfu: ">= 40%"                     # at least; quoted, since YAML reads a bare > otherwise
    collectives.all-to-all.count: 0     # all of one kind: count, bytes, wire_bytes
    warnings.undeclared-collective: 0   # warnings of one code; warnings.count: of any

    limit    = ["<=" | ">="] number [unit]            (no sign means at most)

A figure given as a range (``time.mfu``, ``time.tokens_per_second_per_chip``) is judged by its
worse end, and one that nobody knows breaks every limit on it: a budget that passes because a
figure went missing guards nothing. The same holds for figures that a part of the program
touches which could not be read (``provenance.unread``).

Scalars are read from YAML's syntax tree as they are written, so that none of YAML 1.1's ideas
about ``1e-3``, ``no`` or ``12:30`` come between the file and the limit. A language of expressions
was rejected: what needs one reads the JSON document.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from meshwright.sharding.errors import ConfigError, did_you_mean
from meshwright.sharding.mesh import AXES
from meshwright.sharding.plan_json import origin_of
from meshwright.sharding.planned import (
    AxisTraffic,
    Collective,
    ComputeEstimate,
    Kind,
    MemoryEstimate,
    PlanReport,
    StepEstimate,
)
from meshwright.sharding.units import (
    BYTE_UNITS,
    SECOND_UNITS,
    format_bytes,
    format_count,
    format_seconds,
    parse_quantity,
)

__all__ = ["Breach", "Budget", "Figure", "Limit", "check", "figures", "load_budget"]

Figure = float | tuple[float, float] | None
"""A number, the two ends of a range, or None where nobody knows."""

_LARGEST_BYTES = 1 << 20
_EXAMPLE = "memory.peak_bytes: 14GiB"
_COUNTED = ("count", "bytes", "wire_bytes")
_TRAFFIC = (*(field.name for field in fields(AxisTraffic)), "ratio")
_NO_FIGURES = ("contributors", "changes", "communication_seconds", "bound_by", "validated")
_GROUPS = ("collectives", "traffic", "memory", "flops", "time")


@dataclass(frozen=True)
class Limit:
    """One line of a budget.

    Attributes:
        figure: dotted key, such as ``traffic.fsdp.ratio``.
        relation: which side of the value is allowed.
        value: in bytes, seconds, FLOPs, or a plain number.
        text: the limit as the file has it.
        line: of the file, from 1.
    """

    figure: str
    relation: Literal["<=", ">="]
    value: float
    text: str
    line: int


@dataclass(frozen=True)
class Budget:
    """The limits of one file, in its order.

    Attributes:
        path: of the file, for errors.
        limits: one a figure.
    """

    path: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Breach:
    """A limit that a plan does not keep.

    Attributes:
        figure: dotted key.
        limit: as the file has it.
        actual: the figure, its worse end if it is a range; None where it is not known.
        text: all of it in one sentence.
    """

    figure: str
    limit: str
    actual: float | None
    text: str


def load_budget(path: str | Path) -> Budget:
    """Read a budget file.

    Raises:
        ConfigError: no such file, not YAML, a figure that no plan has, a figure given twice, or
            a limit that is no quantity of the figure's kind. Axes and codes of warnings are
            checked by `check`, which sees the plan.
    """
    file = str(path)
    text = _read(Path(path))
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(file, _summary(error), _fix_of(error)) from None
    if tree is None or not isinstance(tree, yaml.MappingNode) or not tree.value:
        raise _unreadable(file, "it states no limits", f"write a line such as {_EXAMPLE}")
    limits: dict[str, Limit] = {}
    for figure, node in _leaves(tree, "", file, set()):
        line = node.start_mark.line + 1
        if figure in limits:
            raise ConfigError(
                f"the limit on `{figure}` is given twice",
                where=f"{file}, lines {limits[figure].line} and {line}",
                fix="keep one of them",
            )
        _check_name(figure, _anywhere(), f"{file}, line {line}", by_plan=True)
        limits[figure] = _limit(figure, node.value, line, file)
    return Budget(file, tuple(limits.values()))


def check(budget: Budget, report: PlanReport, codes: Collection[str] = ()) -> tuple[Breach, ...]:
    """Compare a plan with a budget.

    Args:
        budget: from `load_budget`.
        report: the plan.
        codes: every code a warning may have; where given, a limit on another one is an error.

    Returns:
        The limits that do not hold, in the budget's order; empty if all do.

    Raises:
        ConfigError: a limit on an axis, or on a code of warning, that does not exist.
    """
    found = figures(report)
    known = set(found) | {f"warnings.{code}" for code in codes}
    breaches = []
    for limit in budget.limits:
        group, _, rest = limit.figure.partition(".")
        if limit.figure not in known:
            free = group == "warnings" and not codes
            if not free and not _on_absent_axis(group, rest, report):
                where = f"{budget.path}, line {limit.line}"
                _check_name(limit.figure, known, where, by_plan=False)
        breach = _breach(limit, found.get(limit.figure, 0.0), _doubt(report, limit.figure))
        if breach:
            breaches.append(breach)
    return tuple(breaches)


def figures(report: PlanReport) -> dict[str, Figure]:
    """Every figure a limit can name, by its dotted key; the warnings' codes as far as they occur.

    Counts are 0 where nothing of the kind occurs, and a ratio is 1 where nothing moves and
    nothing has to, infinite where something moves and nothing has to.
    """
    found: dict[str, Figure] = {}
    for group in ("memory", "flops", "time"):
        values = getattr(report, group)
        for name in (field.name for field in fields(values)):
            if name not in _NO_FIGURES:
                found[f"{group}.{name}"] = getattr(values, name)
    for axis in {**report.mesh, **report.traffic}:
        whole = report.mesh.get(axis) == 1  # nothing can move over it
        seconds = report.time.communication_seconds.get(axis, 0.0 if whole else None)
        found[f"time.communication_seconds.{axis}"] = seconds
        moved = report.traffic.get(axis, AxisTraffic(0, 0.0, None, 0.0) if whole else None)
        for name in _TRAFFIC:
            value = _ratio(moved) if name == "ratio" else getattr(moved, name, None)
            found[f"traffic.{axis}.{name}"] = value
    for kind in ("", *get_args(Kind)):
        chosen = [c for c in report.collectives if not kind or c.kind == kind]
        for name in _COUNTED:
            found[".".join(filter(None, ("collectives", kind, name)))] = _sum(chosen, name)
    found["warnings.count"] = len(report.warnings)
    counted = Counter(f"warnings.{warning.code}" for warning in report.warnings)
    return found | counted


def _sum(collectives: list[Collective], name: str) -> int:
    return sum(getattr(collective, name) for collective in collectives)


def _ratio(moved: AxisTraffic | None) -> float | None:
    if moved is None or moved.lower_bound_bytes is None:
        return None
    if moved.lower_bound_bytes:
        return moved.ratio
    return math.inf if moved.wire_bytes else 1.0


def _anywhere() -> set[str]:
    """Every figure there can be, on meshwright's own axes, but for the warnings' codes."""
    memory = MemoryEstimate(0, 0, 0, 0, 0, 0, None, None)
    flops, time = ComputeEstimate(None, None, None, None, None), StepEstimate(None, None)
    mesh: dict[str, int] = dict.fromkeys(AXES, 1)
    return set(figures(PlanReport("", mesh, {}, memory, (), {}, flops, time, (), (), {})))


def _check_name(figure: str, known: Collection[str], where: str, *, by_plan: bool) -> None:
    """Refuse a figure that is not known; with ``by_plan``, let pass what only a plan can tell."""
    group, *rest = figure.split(".")
    if figure in known:
        return
    if by_plan and group == "warnings" and len(rest) == 1 and rest[0]:
        return
    if by_plan and group == "traffic" and len(rest) == 2 and rest[1] in _TRAFFIC:
        return
    if by_plan and figure.startswith("time.communication_seconds.") and len(rest) == 2:
        return
    inside = [name for name in known if name.split(".")[0] == group]
    raise ConfigError(
        f"there is no figure `{figure}` to limit",
        where=where,
        fix=did_you_mean(figure, inside) if inside else did_you_mean(group, _groups(known)),
    )


def _groups(known: Collection[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in known})


def _on_absent_axis(group: str, rest: str, report: PlanReport) -> bool:
    """Whether a figure is of an axis meshwright knows and this mesh does without: nothing moves.

    So one budget serves several meshes.
    """
    parts = rest.split(".")
    axis = parts[0] if group == "traffic" else parts[-1]
    timed = group == "time" and parts[0] == "communication_seconds"
    return (group == "traffic" or timed) and axis in AXES and axis not in report.mesh


def _doubt(report: PlanReport, figure: str) -> str:
    """Why a figure cannot be trusted, or empty: what of the program was not read, or its origin."""
    group = figure.split(".")[0]
    for line in report.unread:
        named = [name for name in _GROUPS if name in line]
        if group in (named or ["collectives", "traffic"]):
            return f"a part of the program was not read: {line}"
    origin = origin_of(report, figure)
    return origin[1] if origin and origin[0] == "unknown" else ""


def _breach(limit: Limit, figure: Figure, doubt: str) -> Breach | None:
    side = "at most" if limit.relation == "<=" else "at least"
    allowed = f"{side} {_shown(limit.figure, limit.value)}"
    worst = max if limit.relation == "<=" else min
    actual = worst(figure) if isinstance(figure, tuple) else figure
    if actual is not None:
        over = actual > limit.value if limit.relation == "<=" else actual < limit.value
        if over and not (doubt and limit.relation == ">="):
            end = "" if not isinstance(figure, tuple) else " at its worse end"
            text = f"{limit.figure} is {_shown(limit.figure, actual)}{end}"
            return Breach(limit.figure, limit.text, actual, f"{text}, the budget allows {allowed}")
    if actual is None or doubt:
        why = doubt or "this plan does not give it"
        text = f"{limit.figure} is unknown ({why}), the budget allows {allowed}"
        return Breach(limit.figure, limit.text, None, text)
    return None


def _shown(figure: str, value: float) -> str:
    match _units_of(figure):
        case "bytes":
            return format_bytes(value)
        case "seconds":
            return format_seconds(value)
        case "ratio":
            return f"{value:.4g}"
        case _:
            return f"{value:g}" if value < 1e5 else format_count(value)


def _units_of(figure: str) -> Literal["bytes", "seconds", "ratio", "count"]:
    name = figure.rpartition(".")[2]
    if name.endswith("bytes"):
        return "bytes"
    if "seconds" in figure and "per_second" not in figure:
        return "seconds"
    return "ratio" if name in ("ratio", "mfu", "redundancy") else "count"


def _limit(figure: str, written: str, line: int, file: str) -> Limit:
    """Read one limit by the grammar of the module."""
    text = written.strip()
    relation: Literal["<=", ">="] = ">=" if text.startswith(">=") else "<="
    quantity = parse_quantity(text[2:] if text[:2] in ("<=", ">=") else text)
    units: Mapping[str, float] = {
        "bytes": {"": 1, **BYTE_UNITS},
        "seconds": {"": 1, **SECOND_UNITS},
        "ratio": {"": 1, "%": 0.01},
        "count": {"": 1},
    }[_units_of(figure)]
    why = "a limit is a number, with >= before it if it is the least that will do"
    if quantity and quantity[1] in units and math.isfinite(quantity[0]):
        return Limit(figure, relation, quantity[0] * units[quantity[1]], written, line)
    if quantity and quantity[1] not in units:
        why = f"`{quantity[1]}` is no unit of this figure"
    named = [unit for unit in units if unit]
    tail = f", with one of {', '.join(named)} or without a unit" if named else ", without a unit"
    raise ConfigError(
        f"cannot limit `{figure}` to '{text[:60]}'",
        where=f"{file}, line {line}",
        why=why,
        fix=f"write a number such as {_example(figure)}{tail}",
    )


def _example(figure: str) -> str:
    return {"bytes": "14GiB", "seconds": "2.5s", "ratio": "1.05", "count": "0"}[_units_of(figure)]


def _leaves(
    node: Any, prefix: str, file: str, seen: set[int]
) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """(dotted key, value) of every scalar under a mapping."""
    if id(node) in seen:  # an alias; one that holds itself would never end
        raise _unreadable(file, "it uses YAML aliases", "write each limit out")
    seen.add(id(node))
    for key, value in node.value:
        where = f"{file}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError("a budget's keys are names of figures", where=where, fix=_EXAMPLE)
        path = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, f"{path}.", file, seen)
        elif isinstance(value, yaml.ScalarNode):
            yield path, value
        else:
            raise ConfigError(
                f"cannot limit `{path}` to a list or nothing",
                where=where,
                why="a figure has one limit",
                fix=f"write one, such as {_EXAMPLE}",
            )


def _read(path: Path) -> str:
    advice = f"give a YAML file with lines such as {_EXAMPLE}"
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise _unreadable(str(path), "there is no such file", advice) from None
    except IsADirectoryError:
        raise _unreadable(str(path), "it is a folder", advice) from None
    except UnicodeDecodeError:
        raise _unreadable(str(path), "it is not UTF-8 text", advice) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        why = getattr(error, "strerror", None) or str(error)
        raise _unreadable(str(path), why, "give a file that you may read") from None
    if len(content) > _LARGEST_BYTES:
        raise _unreadable(str(path), "it is over 1 MiB", advice)
    return text


def _unreadable(path: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"cannot read the budget file `{path}`", why=why, fix=fix)


def _summary(error: Exception) -> str:
    """One line of what PyYAML says in several."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _fix_of(error: Exception) -> str:
    # `mfu: >= 0.4` opens a block of folded text in YAML, and the parser's words do not say so.
    if "block scalar" in str(getattr(error, "context", "")):
        return 'put the limit in quotes: ">= 0.4"'
    return "correct it there"
