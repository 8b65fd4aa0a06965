"""Any step analysed: golden programs read into reports, compiled once, never judged by a look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled_texts import ONE_SLICE, chip_of, golden, mesh_of
from hypothesis import given
from hypothesis import strategies as st

import meshwright
from meshwright.sharding import aot_step
from meshwright.sharding.analysis import (
    StepFacts,
    compile_once,
    compiled_memory,
    compute_and_time,
    judged,
    provenance_of,
    read_program,
    traffic_of,
)
from meshwright.sharding.aot_program import CompiledProgram, OutOfMemory
from meshwright.sharding.aot_wheels import wheels
from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import ConfigError, MeshError, MissingExtraError, TopologyError
from meshwright.sharding.links import axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.plan_json import report_from_json, report_json
from meshwright.sharding.planned import Collective, PlanReport
from meshwright.sharding.step_time import MeasuredRates
from meshwright.sharding.topology import Topology

MIB, GIB = 2**20, 2**30
EIGHT = {
    "v5e": Topology.parse("v5e:2x4"),
    "v5p": Topology.parse("v5p:2x2x2"),
    "tpu7x": Topology.parse("tpu7x:2x2x1"),
    "h100": Topology.parse("h100:1x8"),
    "cpu": Topology.parse("cpu:8"),
}
each_target = pytest.mark.parametrize("target", ONE_SLICE)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESHWRIGHT_PLAN_CACHE", str(tmp_path / "plans"))


def compiled(text: str | None, **changes: Any) -> CompiledProgram:
    fields: dict[str, Any] = {
        "argument_bytes": 3 * MIB,
        "output_bytes": 2 * MIB,
        "alias_bytes": 2 * MIB,
        "temp_bytes": 9 * MIB,
        "peak_bytes": 10 * MIB,
        "generated_code_bytes": 0,
        "compile_seconds": 1.0,
        "lower_seconds": 0.5,
        "versions": {"jax": "0.10.2"},
    }
    return CompiledProgram(text, **{**fields, **changes})


def step_of(target: str, program: str = "step, fsdp") -> CompiledProgram:
    return compiled(golden(target)[program])


@each_target
def test_golden_programs_are_read_whole(target: str) -> None:
    """Four layers of two 512×2048 bfloat16 weights: gathered twice, their gradients reduced."""
    topology, mesh = EIGHT[chip_of(target)], mesh_of(fsdp=8)
    reading = read_program(step_of(target), mesh, topology)
    assert not reading.unread
    assert reading.cost is not None and reading.cost.device_flops > 0
    assert (reading.cycles is not None) == (topology.kind == "tpu")
    links = None if topology.kind == "cpu" else axis_links(topology, mesh)
    traffic = traffic_of(reading.collectives, mesh, {"fsdp": 1e6}, links)
    wire = sum(found.wire_bytes for found in reading.collectives)
    assert traffic["fsdp"].wire_bytes == wire > 0
    assert traffic["fsdp"].ratio == pytest.approx(wire / 1e6)
    flops, time = compute_and_time(reading, StepFacts({}), mesh, topology, links)
    assert flops.device_flops == reading.cost.device_flops and flops.redundancy is None
    if topology.kind == "cpu":
        assert time.compute_seconds is None and time.step_seconds_low is None
    else:
        bandwidth = traffic["fsdp"].bandwidth
        assert links is not None and bandwidth is not None
        assert bandwidth == links["fsdp"].bandwidth
        assert traffic["fsdp"].seconds == pytest.approx(wire / bandwidth)
        assert time.step_seconds_low is not None and time.step_seconds_high is not None
        assert 0 < time.step_seconds_low <= time.step_seconds_high
        assert time.mfu is None  # nobody said what the model's own FLOPs are


def test_what_the_owner_knows_is_used() -> None:
    topology, mesh = EIGHT["v5e"], mesh_of(fsdp=8)
    reading = read_program(step_of("v5e-jax0.10"), mesh, topology)
    assert reading.cost is not None
    facts = StepFacts({}, tokens=4096, model_flops=8.0 * reading.cost.device_flops)
    links = axis_links(topology, mesh)
    flops, time = compute_and_time(reading, facts, mesh, topology, links)
    assert flops.redundancy == pytest.approx(1.0)
    assert time.mfu and 0 < time.mfu[1] <= time.mfu[0] < 1
    assert time.tokens_per_second_per_chip and time.step_seconds_low
    assert time.tokens_per_second_per_chip[0] == pytest.approx(4096 / 8 / time.step_seconds_low)
    slow = replace(facts, rates=MeasuredRates(links=0.5))
    _, slower = compute_and_time(reading, slow, mesh, topology, links)
    assert slower.communication_seconds["fsdp"] > 1.5 * time.communication_seconds["fsdp"]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (compiled(None, text_error="the parser is older"), "the parser is older"),
        (compiled(None), "the compiler gave no program"),
        (compiled("HloModule broken\nENTRY %main {\n  %x = f32["), "line"),
    ],
)
def test_what_cannot_be_read_is_said(program: CompiledProgram, why: str) -> None:
    reading = read_program(program, mesh_of(fsdp=8), EIGHT["v5e"])
    assert reading.collectives == () and reading.cost is None
    (line,) = reading.unread
    assert line.startswith("collectives, traffic, flops and time: ") and why in line
    flops, time = compute_and_time(
        reading, StepFacts({}, model_flops=7.0), mesh_of(fsdp=8), EIGHT["v5e"], None
    )
    assert (flops.device_flops, flops.model_flops) == (None, 7.0)
    assert time.step_seconds_low is None
    assert provenance_of(program, EIGHT["v5e"], reading)["traffic"][0] == "unknown"


sizes = st.sampled_from([1, 2, 4, 8])


@given(sizes, sizes, st.integers(0, 2**40))
def test_bytes_over_several_axes_are_shared_out(data: int, fsdp: int, wire: int) -> None:
    mesh = mesh_of(data=data, fsdp=fsdp, tensor=2)
    both = Collective("all-reduce", ("data", "fsdp"), 1, wire, wire, "backward")
    one = Collective("all-gather", ("fsdp",), 1, wire, wire, "forward")
    traffic = traffic_of([both, one], mesh)
    assert traffic["tensor"].wire_bytes == 0
    assert traffic["fsdp"].wire_bytes >= wire
    total = sum(found.wire_bytes for found in traffic.values())
    expected = wire + (wire if data * fsdp > 1 else 0)
    assert math.isclose(total, expected, abs_tol=2) or data * fsdp == 1
    assert all(found.ratio is None and found.seconds is None for found in traffic.values())


def test_memory_is_the_compilers() -> None:
    chip = CHIPS["v5e"]
    memory = compiled_memory(compiled(None), chip, simulated=False)
    assert (memory.peak_bytes, memory.limit_bytes) == (10 * MIB, chip.limit_bytes)
    assert memory.fits and memory.parameters_bytes + memory.temporaries_bytes == 10 * MIB
    refused = compiled(None, peak_bytes=None, out_of_memory=OutOfMemory(20 * GIB, 15 * GIB))
    memory = compiled_memory(refused, chip, simulated=False)
    assert memory.fits is False and memory.limit_bytes == 15 * GIB
    memory = compiled_memory(compiled(None), None, simulated=True)
    assert memory.peak_bytes is None and memory.fits is None


def test_a_look_gives_no_verdict() -> None:
    full = compiled_memory(compiled(None), CHIPS["v5e"], simulated=False)
    assert judged(full, compiled(None)) == (full, ())
    memory, said = judged(full, compiled(None, quick=True))
    assert memory.fits is None and memory.peak_bytes == full.peak_bytes
    assert "no verdict" in said[0] and "15.8 GiB" in said[0]
    over = compiled(None, quick=True, out_of_memory=OutOfMemory(20 * GIB, 15 * GIB))
    memory, _ = judged(compiled_memory(over, CHIPS["v5e"], simulated=False), over)
    assert memory.fits is None


def test_where_figures_come_from() -> None:
    mesh, measured = mesh_of(fsdp=8), MeasuredRates(links=0.9)
    for target, cycles in (("v5e", True), ("h100", False)):
        reading = read_program(step_of(f"{target}-jax0.10"), mesh, EIGHT[target])
        told = provenance_of(compiled(""), EIGHT[target], reading)
        assert told["memory.peak_bytes"] == ("compiler", "jax 0.10.2")
        assert told["time"][0] == "data sheet" and "unvalidated" in told["time"][1]
        assert told["time.compute_seconds"][0] == ("compiler" if cycles else "formula")
        told = provenance_of(compiled(""), EIGHT[target], reading, measured)
        assert told["time"][0] == "calibration"
        assert told["time.compute_seconds"][0] == ("compiler" if cycles else "calibration")
    quick = provenance_of(compiled("", quick=True), EIGHT["v5e"], reading)
    assert "low effort" in quick["memory.peak_bytes"][1]


@pytest.mark.parametrize("refused", [None, OutOfMemory(2 * GIB, GIB)])
def test_a_program_is_compiled_once(refused: OutOfMemory | None) -> None:
    calls: list[int] = []
    program = compiled("text", out_of_memory=refused, chatter="said")

    def compile_it() -> CompiledProgram:
        calls.append(1)
        return program

    question = {"step": "abc", "quick": False}
    assert compile_once(EIGHT["v5e"], question, compile_it) == program
    assert compile_once(EIGHT["v5e"], question, compile_it) == program
    assert len(calls) == 1
    compile_once(EIGHT["v5e"], {**question, "quick": True}, compile_it)
    compile_once(EIGHT["h100"], question, compile_it)
    assert len(calls) == 3


# --- analyze -----------------------------------------------------------------------------------


def user_step(*, scale: Any = None) -> tuple[Any, list[Any]]:
    """A step that this project's trainer did not write, on an abstract mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = MeshSpec.parse("fsdp=8").abstract()

    def step(w: Any, x: Any, scale: Any = 1.0) -> Any:
        return w - jax.grad(lambda w: jnp.mean((x @ w) ** 2) * scale)(w)

    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    w = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=split)
    more = [] if scale is None else [scale]
    return jax.jit(step, donate_argnums=0, out_shardings=split), [w, x, *more]


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[CompiledProgram], list[str]]:
    """Answer every compile with one program, as if each compiler were installed."""

    def install(program: CompiledProgram) -> list[str]:
        asked: list[str] = []

        def compile_it(step: Any, *, topology: Topology, quick: bool, **_: Any) -> CompiledProgram:
            asked.append(f"{topology} {'quick' if quick else 'full'}")
            return replace(program, quick=quick)

        monkeypatch.setattr(aot_step, "compile_lowered_step", compile_it)
        monkeypatch.setattr("meshwright.sharding.analysis.require_wheels", lambda topology: None)
        return asked

    return install


def looked_at(topology: str = "v5e:2x4", **how: Any) -> PlanReport:
    jitted, arguments = user_step(scale=how.pop("scale", None))
    return meshwright.analyze(
        jitted, *arguments, mesh=how.pop("mesh", MeshSpec.parse("fsdp=8")), topology=topology, **how
    )


def test_analyze_reports_and_asks_once(instead: Callable[[CompiledProgram], list[str]]) -> None:
    asked = instead(step_of("v5e-jax0.10"))
    report = looked_at()
    assert report.fits is True and report.topology == "v5e:2x4" and report.mesh == {"fsdp": 8}
    assert report.model == {"name": "step"}
    assert report.collectives and report.traffic["fsdp"].wire_bytes > 0
    assert report.warnings == () and report.unread == ()
    assert report_from_json(report_json(report)) == report
    assert asked.pop() == "v5e:2x4 full"
    # In one line: the lines of the callers are in a program, and so in its key.
    reports = [looked_at(quick=quick) for quick in (False, False, True, True)]
    assert reports[0] == reports[1] and reports[2] == reports[3] and reports[0].fits
    assert asked == ["v5e:2x4 full", "v5e:2x4 quick"]


def test_a_quick_analysis_has_no_verdict(instead: Callable[[CompiledProgram], list[str]]) -> None:
    instead(step_of("v5e-jax0.10"))
    report = looked_at(quick=True)
    assert report.fits is None and report_json(report)["fits"] is None
    assert any("no verdict" in line for line in report.unread)


def test_numbers_among_the_arguments_are_warned_of(
    instead: Callable[[CompiledProgram], list[str]],
) -> None:
    instead(step_of("v5e-jax0.10"))
    (warning,) = looked_at(scale=0.5).warnings
    assert (warning.code, warning.leaf) == ("recompilation", "[2]")


def test_wheels_that_do_not_pair_are_named_where_they_cost_figures(
    instead: Callable[[CompiledProgram], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(step_of("v5e-jax0.10"))
    note = "libtpu 0.0.51 is installed, and jax 0.10.2 pairs with 0.0.42.*"
    monkeypatch.setattr("meshwright.sharding.analysis.require_wheels", lambda topology: note)
    assert looked_at().unread == ()
    instead(compiled(None, text_error="RET_CHECK failure"))
    monkeypatch.setattr("meshwright.sharding.analysis.require_wheels", lambda topology: note)
    report = looked_at(scale=1.0)
    assert report.unread[0] == note and "RET_CHECK" in report.unread[1]
    assert report.fits is True and report.time.step_seconds_low is None


def test_a_cpu_program_proves_collectives_alone() -> None:
    """Really compiled: simulated devices are at hand everywhere."""
    report = looked_at("cpu:8")
    assert {found.axes for found in report.collectives} == {("fsdp",)}
    assert report.fits is None and report.memory.peak_bytes is None
    assert report.traffic == {} and report.time.step_seconds_low is None
    assert report.provenance["traffic"][0] == "unknown"
    assert report_from_json(report_json(report)) == report


def test_bad_questions() -> None:
    for topology in ("v5e:3x5", "v5p:4x4x5", "z9:2x2", "v5e"):
        with pytest.raises(TopologyError, match="fix:"):
            looked_at(topology)
    with pytest.raises(MeshError, match="8"):
        looked_at(mesh=MeshSpec.parse("fsdp=4"))
    with pytest.raises(MeshError, match="name the hardware"):
        looked_at("local")
    with pytest.raises(ConfigError, match="not what jax.jit returns"):
        meshwright.analyze(len, 1, mesh=MeshSpec.parse("fsdp=8"), topology="cpu:8")


def test_without_the_wheel_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for topology in ("v5e:2x4", "h100:1x8"):
        monkeypatch.setattr(
            "meshwright.sharding.aot_wheels._version",
            lambda name: "0.10.2" if name in ("jax", "jaxlib") else None,
        )
        with pytest.raises(MissingExtraError, match="pip install 'meshwright"):
            looked_at(topology)


@pytest.mark.skipif(wheels("tpu").installed is None, reason="the libtpu wheel is not installed")
def test_analyze_for_a_tpu() -> None:
    report = looked_at("v5e:2x4")
    assert report.fits is True and report.memory.limit_bytes == CHIPS["v5e"].limit_bytes
    assert {found.axes for found in report.collectives} == {("fsdp",)}
    assert report.time.step_seconds_low
    assert report.provenance["time.compute_seconds"][0] == "compiler"


@pytest.mark.skipif(wheels("gpu").installed is None, reason="jax's CUDA plugin is not installed")
def test_analyze_for_a_gpu() -> None:
    report = looked_at("h100:1x8")
    assert report.fits is True and report.time.step_seconds_low
    assert {found.axes for found in report.collectives} == {("fsdp",)}
