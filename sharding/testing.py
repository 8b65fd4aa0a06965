"""Assertions for a project's own tests: what went wrong in a table, and the leaf or line at fault.

=============================  =============================================================
assertion                      what it holds
=============================  =============================================================
`assert_specs`                 leaves lie where patterns say
`assert_nothing_replicated`    nothing large is whole on every device, moments included
`assert_same_as_one_device`    a function, or a plan, gives one device's numbers on a mesh
`assert_collectives`           the compiled program moves what is allowed and nothing else
`assert_no_recompile`          one compilation serves all batches
=============================  =============================================================

They raise AssertionError where what is tested is at fault, and this library's four-line errors
where the test is: a pattern that matches no leaf, an axis that the mesh has not. A check that
cannot fail is refused, because it looks like one that passed. They need no pytest; with it the
plugin (`meshwright.sharding.pytest_plugin`) gives tests their devices.

Users import them from ``meshwright.testing``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import Decision, Decisions, axes_of
from meshwright.sharding.dims import format_shape
from meshwright.sharding.errors import ConfigError, MeshError, did_you_mean
from meshwright.sharding.report import format_spec
from meshwright.sharding.testing_collectives import assert_collectives
from meshwright.sharding.testing_compiles import assert_no_recompile
from meshwright.sharding.testing_numbers import assert_same_as_one_device
from meshwright.sharding.testing_plan import PlanLike, tables_of
from meshwright.sharding.testing_table import counted, format_table
from meshwright.sharding.units import format_bytes

__all__ = [
    "PlanLike",
    "assert_collectives",
    "assert_no_recompile",
    "assert_nothing_replicated",
    "assert_same_as_one_device",
    "assert_specs",
]

_WHOLE = ("·", ".", "-", "None")


def assert_specs(
    plan_or_decisions: PlanLike | Decisions, expected: Mapping[str, PartitionSpec | str]
) -> None:
    """Hold the layout of leaves against what is expected of them.

    Args:
        plan_or_decisions: a plan, whose model's leaves are looked at, or any decisions (of a
            plan's moments, say).
        expected: by path pattern, ``*`` matching any run of characters: a PartitionSpec, or the
            form that reports write, such as ``"(·, fsdp+data)"`` (a dot or hyphen will do) or
            ``"whole"``. The first pattern that matches a leaf counts; others are not looked at.

    Raises:
        AssertionError: leaves lie elsewhere; lists each with both layouts and the reason.
        ConfigError: a pattern that decides nothing, an axis that the mesh has not.
    """
    (decisions,) = tables_of(plan_or_decisions, moments=False)
    wanted = {pattern: _spec_of(pattern, spec, decisions) for pattern, spec in expected.items()}
    used: set[str] = set()
    rows = []
    for decision in decisions:
        path = decision.leaf.path
        pattern = next((one for one in wanted if fnmatch.fnmatchcase(path, one)), None)
        if pattern is None:
            continue
        used.add(pattern)
        if _trimmed(decision.spec) != _trimmed(wanted[pattern]):
            asked, found = format_spec(wanted[pattern]), format_spec(decision.spec)
            rows.append([path, format_shape(decision.leaf.shape), asked, found, _why(decision)])
    paths = [decision.leaf.path for decision in decisions]
    _check_patterns(wanted, used, paths, "is decided by an earlier pattern")
    if rows:
        raise AssertionError(
            f"{len(rows)} of {counted(len(decisions), 'leaf', 'leaves')} not where expected "
            f"(table {decisions.table}, mesh {decisions.mesh})\n"
            + format_table(["leaf", "shape", "expected", "found", "why"], rows)
        )


def assert_nothing_replicated(
    plan_or_decisions: PlanLike | Decisions,
    over_bytes: int = 1024,
    except_: Sequence[str] = (),
) -> None:
    """Hold that no leaf of some size is whole on every device, the optimizer's moments included.

    Args:
        plan_or_decisions: a plan, or decisions.
        over_bytes: leaves of at most this many bytes may be whole.
        except_: path patterns of leaves that may be whole; each must excuse one that is.

    Raises:
        AssertionError: lists the leaves, largest first, with the reason of each.
        ConfigError: a pattern in ``except_`` that excuses nothing.
        MeshError: a mesh of one device, on which everything is whole.
    """
    tables = tables_of(plan_or_decisions, moments=True)
    mesh = tables[0].mesh
    if mesh.device_count == 1:
        raise MeshError(
            f"cannot tell what is replicated on the mesh `{mesh}`",
            why="on one device everything is whole",
            fix="use a mesh of two devices or more",
        )
    patterns = dict.fromkeys((except_,) if isinstance(except_, str) else except_)
    used: set[str] = set()
    found: list[tuple[str, Decision]] = []
    for table in tables:
        for decision in table:
            size = decision.leaf.size_bytes
            if size <= over_bytes or decision.bytes_per_device < size:
                continue
            matching = [p for p in patterns if fnmatch.fnmatchcase(decision.leaf.path, p)]
            used.update(matching)
            if not matching:
                found.append((table.table, decision))
    paths = [decision.leaf.path for table in tables for decision in table]
    _check_patterns(patterns, used, paths, f"is split, or of {format_bytes(over_bytes)} or less")
    if not found:
        return
    found.sort(key=lambda one: -one[1].leaf.size_bytes)
    rows = [
        [
            table,
            one.leaf.path,
            format_shape(one.leaf.shape),
            format_bytes(one.leaf.size_bytes),
            _why(one),
        ]
        for table, one in found
    ]
    total = sum(one.leaf.size_bytes for _, one in found)
    raise AssertionError(
        f"{counted(len(found), 'leaf', 'leaves')} over {format_bytes(over_bytes)} whole on each "
        f"of {mesh.device_count} devices, {format_bytes(total)} in all (mesh {mesh})\n"
        + format_table(["table", "leaf", "shape", "bytes", "why"], rows, right=["bytes"])
    )


def _why(decision: Decision) -> str:
    return decision.rule if decision.spec else decision.reason


def _trimmed(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Axes of each dim, without whole dims at the end: equal for specs that place alike."""
    entries = [axes_of(entry) for entry in spec]
    while entries and not entries[-1]:
        entries.pop()
    return entries


def _spec_of(pattern: str, spec: Any, decisions: Decisions) -> PartitionSpec:
    """What is expected of a pattern's leaves, its axes checked against the mesh."""
    if isinstance(spec, str):
        spec = _read_spec(pattern, spec)
    if not isinstance(spec, PartitionSpec) or PartitionSpec.UNCONSTRAINED in tuple(spec):
        raise ConfigError(
            f"cannot expect `{spec}` of `{pattern}`",
            why="a layout is a PartitionSpec that says where each dim lies, or its written form",
            fix='write P("fsdp", None), "(fsdp, ·)" or "whole"',
        )
    for axis in (axis for entry in spec for axis in axes_of(entry)):
        if axis not in decisions.mesh.sizes:
            raise ConfigError(
                f"cannot expect `{pattern}` to be split over `{axis}`",
                where=f"mesh {decisions.mesh}",
                why=f"it has no axis `{axis}`",
                fix=did_you_mean(axis, decisions.mesh.names),
            )
    return spec


def _read_spec(pattern: str, text: str) -> PartitionSpec:
    """A spec from the form that reports write."""
    written = text.strip()
    if written == "whole":
        return PartitionSpec()
    inside = written[1:-1].strip().rstrip(",")
    entries = [entry.strip() for entry in inside.split(",")]
    if not (written.startswith("(") and written.endswith(")") and all(entries)):
        raise ConfigError(
            f"cannot read the layout `{text}`",
            where=f"expected of `{pattern}`",
            why="it is neither `whole` nor an entry for each dim in parentheses",
            fix="write it like (·, fsdp+data, tensor), with a dot for a dim that is whole",
        )
    return PartitionSpec(
        *(
            None if entry in _WHOLE else tuple(axis.strip() for axis in entry.split("+"))
            for entry in entries
        )
    )


def _check_patterns(
    patterns: Iterable[str], used: set[str], paths: Sequence[str], otherwise: str
) -> None:
    for pattern in patterns:
        if pattern in used:
            continue
        hits = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        raise ConfigError(
            f"the pattern `{pattern}` decides nothing",
            where=f"{len(paths)} leaves",
            why=f"`{hits[0]}` {otherwise}" if hits else "it matches no leaf",
            fix="remove it" if hits else f"mend it; {did_you_mean(pattern, paths[:20])}",
        )
