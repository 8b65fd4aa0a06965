"""A plan as JSON, which reads back to the same plan, and as text for a terminal."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from typing import Any, get_args

import plan_samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from meshwright.sharding.errors import ConfigError
from meshwright.sharding.plan_json import origin_of, report_from_json, report_json
from meshwright.sharding.plan_text import print_report, verdict_text
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

SAMPLES = {
    "fitting": plan_samples.fitting(),
    "too_large": plan_samples.too_large(),
    "formulas_only": plan_samples.formulas_only(),
}
each_sample = pytest.mark.parametrize("report", SAMPLES.values(), ids=SAMPLES)

# What other tools read: keys may be added, never taken away or renamed.
CONTRACT = (
    "schema topology mesh model fits memory collectives traffic flops time warnings decisions "
    "provenance"
)
MEMORY = (
    "parameters_bytes gradients_bytes optimizer_bytes activations_bytes temporaries_bytes "
    "peak_bytes limit_bytes"
)
COLLECTIVE = "kind axes count bytes wire_bytes phase overlaps source leaf"
TIME = "compute_seconds memory_seconds communication_seconds step_seconds_low step_seconds_high mfu"


def shown(report: PlanReport, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_report(report, Console(file=stream, width=width))
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


# ---- JSON ------------------------------------------------------------------------------------


@each_sample
def test_documents_keep_the_contract(report: PlanReport) -> None:
    document = json.loads(json.dumps(report_json(report), allow_nan=False))
    assert list(document) == CONTRACT.split()
    assert document["schema"] == SCHEMA == "meshwright.plan/1"
    assert set(MEMORY.split()) <= set(document["memory"])
    for collective in document["collectives"]:
        assert set(COLLECTIVE.split()) <= set(collective)
    for moved in document["traffic"].values():
        assert {"wire_bytes", "lower_bound_bytes", "ratio"} <= set(moved)
    assert set(TIME.split()) <= set(document["time"])
    assert list(document["mesh"]) == list(report.mesh)


def test_documents_say_what_the_report_says() -> None:
    fits, over, unknown = (report_json(report) for report in SAMPLES.values())
    assert (fits["fits"], over["fits"], unknown["fits"]) == (True, False, None)
    assert over["traffic"]["fsdp"]["ratio"] == pytest.approx(69_793_218_560 / 62.5e9)
    assert unknown["traffic"]["tensor"]["ratio"] is None
    assert over["collectives"][1]["axes"] == ["data", "fsdp"]
    assert over["memory"]["changes"][0]["flags"] == "--model.remat full"
    assert over["memory"]["contributors"][0]["bytes"] == 70_553_706_496
    assert over["provenance"]["memory"]["origin"] == "compiler"
    assert over["provenance"]["unread"] == list(SAMPLES["too_large"].unread)
    assert fits["time"]["mfu"] == [0.681, 0.672]
    assert fits["time"]["communication_seconds"]["fsdp"] == fits["traffic"]["fsdp"]["seconds"]


def test_numbers_that_json_lacks_become_null() -> None:
    report = SAMPLES["fitting"]
    time = dataclasses.replace(report.time, compute_seconds=float("nan"), mfu=(float("inf"), 0.0))
    document = report_json(dataclasses.replace(report, time=time))
    assert document["time"]["compute_seconds"] is None
    assert document["time"]["mfu"] == [None, 0.0]


TEXT = st.text(max_size=8)
SIZE = st.integers(0, 2**62)
NUMBER = st.floats(0, 1e30, allow_nan=False, allow_infinity=False)
MAYBE = st.none() | NUMBER
RANGE = st.none() | st.tuples(NUMBER, NUMBER)
ORIGIN = st.sampled_from(get_args(Origin))
JSON = st.recursive(
    st.none() | st.booleans() | SIZE | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIGURES = TEXT.filter(lambda name: name != "unread")
REPORTS = st.builds(
    PlanReport,
    topology=TEXT,
    mesh=st.dictionaries(TEXT, st.integers(1, 2**20), max_size=3),
    model=st.dictionaries(TEXT, JSON, max_size=3),
    memory=st.builds(
        MemoryEstimate,
        *[SIZE] * 6,
        st.none() | SIZE,
        st.none() | SIZE,
        st.lists(st.tuples(TEXT, SIZE), max_size=2).map(tuple),
        st.lists(st.builds(Change, TEXT, SIZE, st.booleans(), ORIGIN), max_size=2).map(tuple),
    ),
    collectives=st.lists(
        st.builds(
            Collective,
            kind=st.sampled_from(get_args(Kind)),
            axes=st.lists(TEXT, max_size=2).map(tuple),
            count=SIZE,
            bytes=SIZE,
            wire_bytes=SIZE,
            phase=st.sampled_from(get_args(Phase)),
            overlaps=st.none() | st.booleans(),
            source=TEXT,
            leaf=TEXT,
            participants=SIZE,
            dtype=TEXT,
            emitted=TEXT,
            partial=st.booleans(),
            loop_depth=st.integers(0, 4),
            operation=TEXT,
        ),
        max_size=3,
    ).map(tuple),
    traffic=st.dictionaries(TEXT, st.builds(AxisTraffic, SIZE, MAYBE, MAYBE, MAYBE), max_size=2),
    flops=st.builds(ComputeEstimate, MAYBE, MAYBE, MAYBE, MAYBE, MAYBE),
    time=st.builds(
        StepEstimate,
        MAYBE,
        MAYBE,
        st.dictionaries(TEXT, NUMBER, max_size=2),
        MAYBE,
        MAYBE,
        RANGE,
        RANGE,
        MAYBE,
        TEXT,
        MAYBE,
        st.booleans(),
    ),
    warnings=st.lists(
        st.builds(PlanWarning, TEXT, TEXT, TEXT, TEXT, st.none() | SIZE, MAYBE, TEXT), max_size=2
    ).map(tuple),
    decisions=st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=2).map(tuple),
    provenance=st.dictionaries(FIGURES, st.tuples(ORIGIN, TEXT), max_size=3),
    unread=st.lists(TEXT, max_size=2).map(tuple),
)


@given(REPORTS)
def test_documents_read_back(report: PlanReport) -> None:
    text = json.dumps(report_json(report), allow_nan=False)
    back = report_from_json(json.loads(text))
    assert back == report
    assert json.dumps(report_json(back), allow_nan=False) == text


@settings(max_examples=40)
@given(REPORTS, st.integers(20, 200), st.sampled_from(["utf-8", "ascii", "cp1252"]))
def test_any_report_prints(report: PlanReport, width: int, encoding: str) -> None:
    text = shown(report, width, encoding)
    assert text.startswith(("fits:", "does NOT fit:", "no verdict:"))
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def test_unknown_keys_are_left_alone() -> None:
    document = report_json(SAMPLES["fitting"])
    document["more"] = document["memory"]["more"] = document["collectives"][0]["more"] = 1
    assert report_from_json(document) == SAMPLES["fitting"]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = list(value.items()) if isinstance(value, dict) else []
    items += list(enumerate(value)) if isinstance(value, list) else []
    return [prefix] * bool(prefix) + [
        path for key, inner in items for path in paths(inner, (*prefix, key))
    ]


def test_damaged_documents_are_refused_or_read() -> None:
    """Whatever is put in the place of any one value: a plan or a ConfigError, nothing else."""
    whole = report_json(SAMPLES["too_large"])
    refused = 0
    for path in paths(whole):
        for value in (None, "x", -1, [], {}, [[]], True):
            damaged = copy.deepcopy(whole)
            inside = damaged
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = value
            try:
                report_from_json(damaged)
            except ConfigError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({}, "its schema is None"),
        ({"schema": "meshwright.plan/0"}, "meshwright.plan/0"),
        ([], "its schema is None"),
        (None, "its schema is None"),
        ({"schema": SCHEMA}, "the key 'memory' is missing"),
    ],
)
def test_other_documents_are_refused(document: Any, why: str) -> None:
    with pytest.raises(ConfigError, match="cannot read this document as a plan") as error:
        report_from_json(document)
    assert why in str(error.value)


@pytest.mark.parametrize("key", ["kind", "phase"])
def test_words_outside_the_contract_are_refused(key: str) -> None:
    document = report_json(SAMPLES["fitting"])
    document["collectives"][0][key] = "sideways"
    with pytest.raises(ConfigError, match="'sideways' is not one of"):
        report_from_json(document)


def test_groups_stand_for_their_figures() -> None:
    report = SAMPLES["fitting"]
    assert origin_of(report, "memory.peak_bytes") == report.provenance["memory"]
    assert origin_of(report, "memory.limit_bytes") == report.provenance["memory.limit_bytes"]
    assert origin_of(report, "warnings.count") is None


# ---- text ------------------------------------------------------------------------------------


def test_the_verdict_comes_first() -> None:
    first = [shown(report).splitlines()[0].rstrip() for report in SAMPLES.values()]
    assert first == [
        "fits: 33.1 of 95.7 GiB a device, 62.6 GiB to spare",
        "does NOT fit: 201.7 of 15.8 GiB a device, over by 185.9 GiB",
        "no verdict: peak and limit are not known for cpu:8",
    ]


@pytest.mark.parametrize(
    ("peak", "limit", "said"),
    [
        (2**30, None, "no verdict: the limit is not known"),
        (None, 2**30, "no verdict: the peak is not known"),
        (2**30, 2**30, "fits: 1.0 of 1.0 GiB a device, 0 B to spare"),
        (2**20, 2**30, "fits: 1.0 MiB of 1.0 GiB a device, 1023.0 MiB to spare"),
        (2**30 + 1, 2**30, "does NOT fit: 1.0 of 1.0 GiB a device, over by 1 B"),
    ],
)
def test_verdicts(peak: int | None, limit: int | None, said: str) -> None:
    report = SAMPLES["fitting"]
    memory = dataclasses.replace(report.memory, peak_bytes=peak, limit_bytes=limit)
    assert said in verdict_text(dataclasses.replace(report, memory=memory))


@each_sample
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_text_keeps_to_its_columns(report: PlanReport, width: int, encoding: str) -> None:
    text = shown(report, width, encoding)
    # A replaced character may be one longer: → becomes ->.
    assert max(map(len, text.splitlines())) <= width + (encoding != "utf-8")
    assert "\x1b" not in text


def test_what_a_reader_needs_is_there() -> None:
    text = shown(SAMPLES["too_large"])
    for said in (
        "unvalidated",
        "undeclared-collective",
        "where: models/attention.py:88, (batch, seq, embed)",
        "costs: 3.8 GiB and 44.7 ms",
        "--model.remat full",
        "does not fit",
        "bound by",
        "12.4 s (what can overlap does) to 22.6 s (nothing does)",
        "data+fsdp*",
        "1.117",
        "NOT READ  collective `ragged-foo`",
        "17.0% to 31.0%",
    ):
        assert said in text, said


def test_long_lists_are_cut_and_say_so() -> None:
    text = shown(SAMPLES["fitting"], 100)
    rows = [line for line in text.splitlines() if line.startswith(("all-gather", "reduce-scat"))]
    assert len(rows) == 15 and "layers/mlp/gate" in rows[0]
    assert "and 12 more groups, 7.3 GiB sent by them; the JSON document (--json)" in text


def test_names_are_neither_markup_nor_orders_to_the_terminal() -> None:
    name = "[bold]a[/bold][/x]\x1b[31m\r\u202e"
    report = SAMPLES["too_large"]
    warning = PlanWarning("x", name, name, name, None, None, name)
    collective = dataclasses.replace(report.collectives[0], leaf=name)
    report = dataclasses.replace(report, warnings=(warning,), collectives=(collective,))
    text = shown(report, 120)
    assert "[bold]a[/bold][/x]?[31m" in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
