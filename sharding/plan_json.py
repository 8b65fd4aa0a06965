"""A plan as a JSON document that other tools read, and back.

The document is a contract: it carries a version (`planned.SCHEMA`), keys are only added, and
whoever reads it needs no meshwright. Sizes are bytes a device, FLOPs and seconds are those of one
optimizer step, and ``null`` says that nobody knows. Fields of `meshwright.sharding.planned` keep
their names; what that module derives (``fits``, ``ratio``) is written out here and derived again
when it is read.

================  ======================================================================
key               what it holds
================  ======================================================================
``schema``        ``meshwright.plan/1``
``topology``      written form, such as ``v5p:4x4x4``
``mesh``          axis → size, slowest axis first
``model``         name, parameter count and settings, as the planner was given them
``fits``          true, false, or null where peak or limit is unknown
``memory``        bytes a device: ``parameters_bytes``, ``gradients_bytes``,
                  ``optimizer_bytes``, ``batch_bytes``, ``activations_bytes``,
                  ``temporaries_bytes``, ``peak_bytes``, ``limit_bytes``;
                  ``contributors`` [{what, bytes}], largest first;
                  ``changes`` [{flags, peak_bytes, fits, origin}], as tried
``collectives``   one entry a communication: ``kind``, ``axes`` [name], ``count`` (executions
                  a step), ``bytes`` (full buffers), ``wire_bytes`` (sent by a device),
                  ``phase``, ``overlaps`` (true, false, null), ``source`` (``file:line``),
                  ``leaf``, ``participants``, ``dtype``, ``emitted``, ``partial``,
                  ``loop_depth``, ``operation``
``traffic``       axis → ``wire_bytes``, ``lower_bound_bytes``, ``ratio`` (of the two),
                  ``bandwidth`` (bytes a second), ``seconds``
``flops``         FLOPs: ``device_flops``, ``model_flops`` (all devices),
                  ``model_flops_causal``; ``redundancy`` (a ratio);
                  ``memory_traffic_bytes``
``time``          seconds: ``compute_seconds``, ``memory_seconds``,
                  ``communication_seconds`` (axis → seconds), ``step_seconds_low``,
                  ``step_seconds_high``, ``roofline_seconds``; ``mfu`` and
                  ``tokens_per_second_per_chip`` [at the low, at the high step time];
                  ``peak_flops`` (FLOP/s), ``bound_by``, ``validated``
``warnings``      [{code, what, source, leaf, ``cost_bytes``, ``cost_seconds``, fix}]
``decisions``     as ``meshwright explain --json`` writes them
``provenance``    figure → {origin, how}, figures by dotted key, a group's key standing for all
                  in it; ``unread`` [text]: what was not understood of the compiled program,
                  ``notes`` [text]: what a reader should know
================  ======================================================================

Origins are ``compiler``, ``formula``, ``calibration``, ``data sheet`` and ``unknown``.

A serializer (msgspec, cattrs) would save some lines and cost a dependency; the shape of the
document would then be a by-product of the classes, where it ought to be a promise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from meshwright.sharding.errors import ConfigError
from meshwright.sharding.planned import (
    SCHEMA,
    AxisTraffic,
    Change,
    Collective,
    ComputeEstimate,
    Kind,
    MemoryEstimate,
    Origin,
    Phase,
    PlanReport,
    PlanWarning,
    StepEstimate,
)

__all__ = ["origin_of", "report_from_json", "report_json"]

_UNREAD, _NOTES = "unread", "notes"  # beside the figures in `provenance`; no figure has such a name
_T = TypeVar("_T")


def origin_of(report: PlanReport, figure: str) -> tuple[Origin, str] | None:
    """Where a figure comes from and how: its own entry, else the nearest one of its groups.

    Args:
        report: the plan.
        figure: dotted key, such as ``traffic.fsdp.seconds``, which ``traffic.fsdp`` and
            ``traffic`` may stand for.
    """
    while figure:
        if figure in report.provenance:
            return report.provenance[figure]
        figure = figure.rpartition(".")[0]
    return None


def report_json(report: PlanReport) -> dict[str, Any]:
    """The document of the module's table: dicts, lists, text, finite numbers, booleans, None.

    A number that is not finite becomes None, since JSON cannot say it.
    """
    memory = _plain(report.memory)
    memory["contributors"] = [{"what": w, "bytes": b} for w, b in report.memory.contributors]
    provenance: dict[str, Any] = {
        figure: {"origin": origin, "how": how}
        for figure, (origin, how) in report.provenance.items()
    }
    return {
        "schema": SCHEMA,
        "topology": report.topology,
        "mesh": _plain(report.mesh),
        "model": _plain(report.model),
        "fits": report.fits,
        "memory": memory,
        "collectives": _plain(report.collectives),
        "traffic": {axis: _traffic(moved) for axis, moved in report.traffic.items()},
        "flops": _plain(report.flops),
        "time": _plain(report.time),
        "warnings": _plain(report.warnings),
        "decisions": _plain(report.decisions),
        "provenance": provenance | {_UNREAD: list(report.unread), _NOTES: list(report.notes)},
    }


def report_from_json(document: Mapping[str, Any]) -> PlanReport:
    """Make the report of a document; keys that are not known are left alone.

    Raises:
        ConfigError: another schema, a key that is missing, or a value of another type.
    """
    found = document.get("schema") if isinstance(document, Mapping) else None
    if found != SCHEMA:
        raise ConfigError(
            "cannot read this document as a plan",
            why=f"its schema is {found!r}, not {SCHEMA!r}",
            fix="write it again with: meshwright plan ... --json FILE",
        )
    try:
        return _report(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        missing = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            "cannot read this document as a plan",
            why=missing,
            fix="write it again with: meshwright plan ... --json FILE",
        ) from None


def _traffic(moved: AxisTraffic) -> dict[str, Any]:
    return _plain(
        {
            "wire_bytes": moved.wire_bytes,
            "lower_bound_bytes": moved.lower_bound_bytes,
            "ratio": moved.ratio,
            "bandwidth": moved.bandwidth,
            "seconds": moved.seconds,
        }
    )


def _plain(value: Any) -> Any:
    """The same value made of what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _report(document: Mapping[str, Any]) -> PlanReport:
    memory = dict(document["memory"])
    memory["contributors"] = tuple(
        (str(p["what"]), int(p["bytes"])) for p in memory["contributors"]
    )
    memory["changes"] = tuple(_made(Change, change) for change in memory["changes"])
    time = dict(document["time"])
    time["communication_seconds"] = dict(time["communication_seconds"])
    for name in ("mfu", "tokens_per_second_per_chip"):
        time[name] = None if time[name] is None else _pair(time[name])
    provenance = dict(document["provenance"])
    unread, notes = provenance.pop(_UNREAD), provenance.pop(_NOTES, ())
    return PlanReport(
        topology=document["topology"],
        mesh={axis: int(size) for axis, size in document["mesh"].items()},
        model=dict(document["model"]),
        memory=_made(MemoryEstimate, memory),
        collectives=tuple(_collective(entry) for entry in document["collectives"]),
        traffic={axis: _made(AxisTraffic, row) for axis, row in document["traffic"].items()},
        flops=_made(ComputeEstimate, document["flops"]),
        time=_made(StepEstimate, time),
        warnings=tuple(_made(PlanWarning, entry) for entry in document["warnings"]),
        decisions=tuple(dict(entry) for entry in document["decisions"]),
        provenance={
            figure: (_one_of(entry["origin"], Origin), entry["how"])
            for figure, entry in provenance.items()
        },
        unread=tuple(unread),
        notes=tuple(notes),
    )


def _made(cls: type[_T], entry: Mapping[str, Any]) -> _T:
    """An instance of a dataclass from the keys it knows; its figures must be numbers or None."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # _T is always a dataclass
        value = values[field.name] = entry[field.name]
        numeric = "int" in str(field.type) or "float" in str(field.type)
        if numeric and isinstance(value, str | bool):
            raise ValueError(f"`{field.name}` is {value!r}, not a number")
    return cls(**values)


def _collective(entry: Mapping[str, Any]) -> Collective:
    kind, phase = _one_of(entry["kind"], Kind), _one_of(entry["phase"], Phase)
    return _made(Collective, {**entry, "kind": kind, "phase": phase, "axes": tuple(entry["axes"])})


def _pair(values: Any) -> tuple[float, float]:
    first, second = values
    return first, second


def _one_of(value: Any, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{value!r} is not one of {', '.join(get_args(choices))}")
    return value
