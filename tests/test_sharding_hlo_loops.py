"""Trip counts: loops of every form against arithmetic, and None where nobody can know."""

from __future__ import annotations

import math

import pytest
from compiled_texts import golden
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.hlo import parse_module
from meshwright.sharding.hlo_loops import (
    conditional_computations,
    executions,
    trip_count,
    while_depth,
)

HEADER = "HloModule test, is_scheduled=true, num_partitions=4\n"
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module_of(body: str) -> str:
    return HEADER + body


def loop_text(condition: str, body: str, state: str = "(s32[], f32[8])", init: str = "0") -> str:
    """A while over (counter, data) whose condition and next counter are given."""
    return (
        ADD
        + f"""
%cond (c: {state}) -> pred[] {{
  %c = {state} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
{condition}
}}

%body (b: {state}) -> {state} {{
  %b = {state} parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{{0}} get-tuple-element(%b), index=1
{body}
  ROOT %t = {state} tuple(%next, %x)
}}

ENTRY %main (p: f32[8], n: s32[]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant({init})
  %start = {state} tuple(%zero, %p)
  %loop = {state} while(%start), condition=%cond, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""
    )


BELOW = "  %n = s32[] constant({})\n  ROOT %r = pred[] compare(%i, %n), direction={}"
PLUS = "  %k = s32[] constant({})\n  %next = s32[] {}(%i, %k)"


@given(st.integers(-20, 60), st.integers(1, 7), st.integers(-20, 60), st.sampled_from(["LT", "LE"]))
def test_loops_with_a_step(first: int, step: int, bound: int, direction: str) -> None:
    text = loop_text(BELOW.format(bound, direction), PLUS.format(step, "add"), init=str(first))
    module = parse_module(module_of(text))
    loop = module.computations["main"].instructions["loop"]
    end = bound + (direction == "LE")
    expected = max(0, math.ceil((end - first) / step))
    assert trip_count(module, loop) == expected
    assert executions(module)["body"] == expected
    assert executions(module)["cond"] == expected + 1
    assert while_depth(module) == {"add": 0, "cond": 1, "body": 1, "main": 0}


@pytest.mark.parametrize(
    ("condition", "body", "init", "trips"),
    [
        (BELOW.format(1, "GT"), PLUS.format(2, "divide"), "64", 6),
        (BELOW.format(100, "LT"), PLUS.format(3, "multiply"), "1", 5),
        (BELOW.format(0, "GE"), PLUS.format(1, "subtract"), "9", 10),
        (BELOW.format(5, "NE"), PLUS.format(1, "add"), "5", 0),
        # 32-bit counters wrap around, as on the device.
        (BELOW.format(0, "GT"), PLUS.format(1 << 30, "add"), "1", 2),
    ],
)
def test_loops_of_other_forms(condition: str, body: str, init: str, trips: int) -> None:
    module = parse_module(module_of(loop_text(condition, body, init=init)))
    assert executions(module)["body"] == trips


def test_a_condition_in_a_fusion_is_followed() -> None:
    fused = """
%less (x: s32[], y: s32[]) -> pred[] {
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %l = pred[] compare(%x, %y), direction=LT
}
"""
    condition = (
        "  %n = s32[] constant(6)\n  ROOT %r = pred[] fusion(%i, %n), kind=kLoop, calls=%less"
    )
    text = fused + loop_text(condition, PLUS.format(2, "add"))
    assert executions(parse_module(module_of(text)))["body"] == 3


@pytest.mark.parametrize(
    ("condition", "body"),
    [
        ("  ROOT %r = pred[] constant(true)", PLUS.format(1, "add")),  # for ever
        (BELOW.format(9, "LT"), "  %next = s32[] reduce(%x, %i), dimensions={0}, to_apply=%add"),
        (BELOW.format(9, "LT"), PLUS.format(0, "divide")),
        (BELOW.format(9, "LT"), "  %next = s32[] custom-call(%i)"),
    ],
)
def test_loops_that_depend_on_data_have_no_count(
    condition: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.sharding.hlo_loops._MAX_STEPS", 1000)
    module = parse_module(module_of(loop_text(condition, body)))
    assert executions(module)["body"] is None
    assert executions(module)["main"] == 1


def test_a_written_count_is_taken() -> None:
    text = loop_text("  ROOT %r = pred[] constant(true)", PLUS.format(1, "add")).replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    )
    assert executions(parse_module(module_of(text)))["body"] == 12


@pytest.mark.parametrize("target", ["cpu-jax0.10", "h100-jax0.12", "v5e-jax0.10"])
def test_counts_multiply_down_the_call_graph(target: str) -> None:
    module = parse_module(golden(target)["scan 3 of scan 5"])
    counts, depths = executions(module), while_depth(module)
    assert {counts[name] for name in depths if depths[name] == 2} >= {15}
    assert None not in counts.values()
    module = parse_module(golden(target)["branch"])
    assert conditional_computations(module)
    assert None in executions(parse_module(golden(target)["while on data"])).values()
