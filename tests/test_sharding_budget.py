"""Budgets: what the file may say, which plans keep it, and what each mistake is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import plan_samples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.budget import check, figures, load_budget
from meshwright.sharding.errors import ConfigError
from meshwright.sharding.plan_json import report_json
from meshwright.sharding.units import BYTE_UNITS, SECOND_UNITS, parse_quantity

FITTING = plan_samples.fitting()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "budget.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def breaches(tmp_path: Path, text: str, report=FITTING, codes=()) -> list[str]:
    return [found.text for found in check(load_budget(written(tmp_path, text)), report, codes)]


@pytest.mark.parametrize(
    "text",
    [
        "memory.peak_bytes: 34GiB",
        "memory.peak_bytes: 34 GiB  # with room",
        "memory: {peak_bytes: 36_000_000_000}",
        "memory:\n  peak_bytes: <= 3.6e10",
        "traffic.fsdp.ratio: 1.05",
        "traffic.fsdp.ratio: 105%",
        "traffic.tensor.wire_bytes: 0  # an axis this mesh does without",
        "time.step_seconds_high: 6.6s",
        "time.step_seconds_high: 6600 ms",
        "time.communication_seconds.fsdp: 0.1",
        'time.mfu: ">= 40%"',
        "time.mfu: '>=0.672'",
        "time.mfu: 0.681",
        "collectives.all-to-all.count: 0",
        "collectives.all-gather.count: 460",
        "collectives.count: 1000",
        "warnings.undeclared-collective: 0",
        "warnings: {count: 1, fp32-on-the-wire: 1}",
        "flops.redundancy: 1.34",
    ],
)
def test_kept(tmp_path: Path, text: str) -> None:
    assert breaches(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory.peak_bytes: 14GiB", "is 33.1 GiB, the budget allows at most 14.0 GiB"),
        ("memory.peak_bytes: 33.1GB", "is 33.1 GiB, the budget allows at most 30.8 GiB"),
        ("traffic.fsdp.ratio: 0.99", "traffic.fsdp.ratio is 1, the budget allows at most 0.99"),
        ("time.step_seconds_high: 300ms", "is 6.50 s, the budget allows at most 300 ms"),
        ('time.mfu: ">= 0.68"', "time.mfu is 0.672 at its worse end, the budget allows at least"),
        ("time.mfu: 0.68", "time.mfu is 0.681 at its worse end, the budget allows at most 0.68"),
        ("collectives.all-gather.count: 0", "is 452, the budget allows at most 0"),
        ("warnings.fp32-on-the-wire: 0", "is 1, the budget allows at most 0"),
    ],
)
def test_broken(tmp_path: Path, text: str, said: str) -> None:
    (sentence,) = breaches(tmp_path, text)
    assert said in sentence


@pytest.mark.parametrize(
    "text",
    [
        "memory.peak_bytes: 1PiB",
        "traffic.tensor.ratio: 100",
        "traffic.data.seconds: 100",
        "time.step_seconds_high: 1000h",
        'time.mfu: ">= 0"',
        "collectives.all-to-all.count: 0",
    ],
)
def test_unknown_figures_break_every_limit(tmp_path: Path, text: str) -> None:
    (found,) = check(load_budget(written(tmp_path, text)), plan_samples.formulas_only())
    assert found.actual is None and "is unknown (" in found.text


def test_ratios_without_a_bound(tmp_path: Path) -> None:
    """Nothing that has to move and does not is fine; what moves without need is not."""
    report = plan_samples.formulas_only()
    assert breaches(tmp_path, "traffic.fsdp.ratio: 1.05", report) == []
    idle = report.traffic["fsdp"]
    busy = {**report.traffic, "fsdp": dataclasses.replace(idle, wire_bytes=1)}
    (said,) = breaches(
        tmp_path, "traffic.fsdp.ratio: 1.05", dataclasses.replace(report, traffic=busy)
    )
    assert "is inf" in said


def test_what_was_not_read_casts_doubt_on_what_it_touches(tmp_path: Path) -> None:
    report = plan_samples.too_large()
    (said,) = breaches(tmp_path, "collectives.all-reduce.count: 0", report)
    assert "ragged-foo" in said
    # A figure that is over its limit already only grows: that is said, not the doubt.
    (said,) = breaches(tmp_path, "collectives.all-to-all.count: 0", report)
    assert "is 80" in said
    assert breaches(tmp_path, "memory.batch_bytes: 1MiB", report) == []


def test_order_and_fields(tmp_path: Path) -> None:
    text = "traffic.fsdp.ratio: 0.5\nmemory:\n  limit_bytes: 1TiB\n  peak_bytes: 1 GiB\n"
    first, second = check(load_budget(written(tmp_path, text)), FITTING)
    assert (first.figure, second.figure) == ("traffic.fsdp.ratio", "memory.peak_bytes")
    assert (second.limit, second.actual) == ("1 GiB", FITTING.memory.peak_bytes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory.peek_bytes: 1", "did you mean `memory.peak_bytes`"),
        ("memroy: {peak_bytes: 1}", "did you mean `memory`?"),
        ("peak_bytes: 1", "known: collectives, flops, memory, time, traffic, warnings"),
        ("fits: true", "there is no figure `fits`"),
        ("traffic.fsdp.ration: 1", "did you mean `traffic.fsdp.ratio`"),
        ("collectives.all-togather.count: 1", "`collectives.all-gather.count`"),
        ("memory: 14GiB", "there is no figure `memory`"),
        ("memory.peak_bytes: 1\nmemory:\n  peak_bytes: 2", "lines 1 and 3"),
        ("time.mfu: 1\ntime.mfu: 2", "lines 1 and 2"),
        ("memory.peak_bytes: 14 GibiB", "`GibiB` is no unit of this figure"),
        ("memory.peak_bytes: 3 s", "with one of B, KB"),
        ("time.step_seconds_low: 3 GiB", "with one of us, ms, s"),
        ("collectives.count: 5%", "write a number such as 0, without a unit"),
        ("memory.peak_bytes: -1", "cannot limit `memory.peak_bytes` to '-1'"),
        ("memory.peak_bytes: '> 1'", "a limit is a number, with >= before it"),
        ("memory.peak_bytes: .inf", "cannot limit"),
        ("memory.peak_bytes: 1e999", "cannot limit"),
        ("memory.peak_bytes: ''", "cannot limit"),
        ("memory.peak_bytes:", "cannot limit"),
        ("memory.peak_bytes: [1]", "to a list or nothing"),
        ("memory: {}", "to a list or nothing"),
        ("? [a]\n: 1", "keys are names"),
        ("time.mfu: >= 0.4", 'put the limit in quotes: ">= 0.4"'),
        ("a: b: c", "line 1, column 5"),
        ("", "it states no limits"),
        ("# nothing", "it states no limits"),
        ("just words", "it states no limits"),
        ("- 1", "it states no limits"),
        ("a: &x {b: *x}", "aliases"),
        ("memory: &x {peak_bytes: 1}\ntime: *x", "aliases"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("\x00", "cannot read the budget file"),
        ("[" * 2000, "cannot read the budget file"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_budget(written(tmp_path, text))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 4 and error.value.exit_code == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {
        tmp_path / "absent.yaml": "there is no such file",
        tmp_path: "it is a folder",
        tmp_path / "a\0b": "null",
    }
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (2**20 + 1))
    for path, said in {**cases, binary: "not UTF-8", large: "over 1 MiB"}.items():
        with pytest.raises(ConfigError, match=said):
            load_budget(path)


def test_names_only_a_plan_can_judge(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `traffic\.fsdp\.ratio`"):
        breaches(tmp_path, "traffic.fspd.ratio: 1")
    codes = ("undeclared-collective", "tile-padding")
    assert breaches(tmp_path, "warnings.tile-padding: 0", codes=codes) == []
    with pytest.raises(ConfigError, match=r"did you mean `warnings\.tile-padding`"):
        breaches(tmp_path, "warnings.tile-paddin: 0", codes=codes)


@pytest.mark.parametrize("name", ["fitting", "too_large", "formulas_only"])
def test_figures_are_those_of_the_document(name: str) -> None:
    report = getattr(plan_samples, name)()
    document = report_json(report)
    for key, value in figures(report).items():
        group, *path = key.split(".")
        if group in ("collectives", "warnings") or path[-1] == "ratio":
            continue
        there = document[group]
        for part in path:
            there = there.get(part) if isinstance(there, dict) else None
        assert there == (list(value) if isinstance(value, tuple) else value), key


@given(
    number=st.floats(0, 1e15, allow_nan=False),
    unit=st.sampled_from(["", *BYTE_UNITS, *SECOND_UNITS, "%"]),
    space=st.sampled_from(["", " ", "   "]),
)
def test_quantities_read_back(number: float, unit: str, space: str) -> None:
    assert parse_quantity(f"{number!r}{space}{unit}") == (number, unit)


@given(st.text(max_size=30))
def test_quantities_never_raise(text: str) -> None:
    found = parse_quantity(text)
    assert found is None or found[0] >= 0
