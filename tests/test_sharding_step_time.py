"""Seconds of a step: what overlaps, what is added, which rate applies to which work."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.calibration import (
    AttentionRate,
    Calibration,
    LinkRate,
    MatmulRate,
    MemoryRate,
    Rate,
)
from meshwright.sharding.chips import CHIPS
from meshwright.sharding.hlo_cost import ProgramCost
from meshwright.sharding.hlo_cycles import CycleCount
from meshwright.sharding.links import AxisLink, axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.planned import Collective, ComputeEstimate, StepEstimate
from meshwright.sharding.step_time import (
    ATTENTION_FRACTION,
    PUBLISHED,
    MeasuredRates,
    collective_seconds,
    step_estimate,
    step_time_of,
)
from meshwright.sharding.topology import Topology

V5P, H100 = CHIPS["v5p"], CHIPS["h100"]
COST = ProgramCost({"bf16": 4.59e14}, 0.0, 2765e9)
LINK = AxisLink(
    100e9, "ici", 3e-6, 3, 4, all_to_all_bandwidth=50e9, permute_bandwidth=25e9, source="test"
)


def gather(**changes: object) -> Collective:
    found = Collective("all-gather", ("fsdp",), 1, 0, 100_000_000_000, "forward", True)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def timed(
    cost: ProgramCost = COST,
    cycles: CycleCount | None = None,
    collectives: tuple[Collective, ...] = (),
    chip: str | None = "v5p",
    *,
    devices: int = 4,
    model_flops: float | None = 4.59e14,
    tokens: int | None = 1000,
    dtype: str = "bf16",
    rates: MeasuredRates = PUBLISHED,
) -> tuple[ComputeEstimate, StepEstimate]:
    return step_time_of(
        cost,
        cycles,
        collectives,
        CHIPS[chip] if chip else None,
        {"fsdp": LINK, "alone": AxisLink(math.inf, "none")},
        model_flops=model_flops,
        model_flops_causal=model_flops,
        tokens=tokens,
        devices=devices,
        dtype=dtype,
        rates=rates,
    )


def test_without_cycles_compute_is_flops_over_peak() -> None:
    compute, step = timed()
    assert compute.device_flops == 4.59e14
    assert compute.redundancy == 4.0
    assert compute.memory_traffic_bytes == 2765e9
    assert step.compute_seconds == step.roofline_seconds == 1.0
    assert step.memory_seconds == 1.0
    assert (step.step_seconds_low, step.step_seconds_high) == (1.0, 2.0)
    assert step.mfu == (0.25, 0.125)
    assert step.tokens_per_second_per_chip == (250.0, 125.0)
    assert not step.validated


def test_cycles_replace_flops_and_contain_memory() -> None:
    cycles = CycleCount(int(3 * 1.75e9), 10, 0, {})
    _, step = timed(cycles=cycles)
    assert step.compute_seconds == 3.0
    assert step.roofline_seconds == 1.0
    # Streaming operands is part of the cycles: not added once more.
    assert (step.step_seconds_low, step.step_seconds_high) == (3.0, 3.0)
    # A chip without cycles, and a program without estimates, go by FLOPs.
    assert timed(cycles=dataclasses.replace(cycles, estimated=0))[1].compute_seconds == 1.0
    assert timed(cycles=cycles, chip="h100")[1].compute_seconds == 4.59e14 / 989e12


def test_attention_kernels_are_added_to_cycles_at_their_own_rate() -> None:
    cost = dataclasses.replace(COST, attention_flops=4.59e13)
    cycles = CycleCount(int(2 * 1.75e9), 10, 0, {})
    compute, step = timed(cost, cycles)
    assert compute.device_flops == pytest.approx(5.049e14)
    assert step.compute_seconds == pytest.approx(2.0 + 0.1 / ATTENTION_FRACTION)
    assert step.roofline_seconds == pytest.approx(1.1)
    measured = timed(cost, cycles, rates=MeasuredRates(attention_flops=4.59e14))[1]
    assert measured.compute_seconds == pytest.approx(2.1)


def test_each_operand_type_has_its_peak() -> None:
    cost = ProgramCost({"bf16": 989e12, "f32": 494.5e12, "fp8": 1979e12}, 0.0, 0.0)
    _, step = timed(cost, chip="h100")
    assert step.compute_seconds == pytest.approx(3.0)
    assert timed(cost, chip="h100", dtype="f32")[1].peak_flops == 494.5e12
    # TPU v5p has no units for fp8: it runs as bfloat16.
    assert timed(ProgramCost({"fp8": 459e12}, 0.0, 0.0))[1].compute_seconds == 1.0


def test_measured_rates_replace_published_ones() -> None:
    rates = MeasuredRates({"bf16": 459e12 / 2}, None, 2765e9 / 4, links=0.5)
    _, step = timed(collectives=(gather(),), rates=rates)
    assert step.compute_seconds == 2.0
    assert step.memory_seconds == 4.0
    assert step.communication_seconds["fsdp"] == pytest.approx(2.0, rel=1e-4)
    assert step.roofline_seconds == 1.0
    assert step.bound_by == "memory"


def test_two_devices_of_a_chip_share_its_tokens() -> None:
    _, one = timed(chip="v5p")
    _, two = timed(chip="tpu7x")
    assert one.tokens_per_second_per_chip and two.tokens_per_second_per_chip
    assert one.step_seconds_low and two.step_seconds_low
    assert one.tokens_per_second_per_chip[0] * one.step_seconds_low == pytest.approx(250)
    assert two.tokens_per_second_per_chip[0] * two.step_seconds_low == pytest.approx(500)


def test_what_is_unknown_stays_unknown() -> None:
    compute, step = timed(chip=None, model_flops=None, collectives=(gather(),))
    assert (compute.model_flops, compute.redundancy) == (None, None)
    assert (step.compute_seconds, step.step_seconds_low, step.mfu) == (None, None, None)
    assert step.communication_seconds == {"fsdp": pytest.approx(1.0, rel=1e-4)}
    assert timed(model_flops=None)[1].mfu is None
    assert timed(tokens=None)[1].tokens_per_second_per_chip is None
    nothing = timed(ProgramCost({}, 0.0, 0.0))[1]
    assert (nothing.step_seconds_low, nothing.mfu) == (0.0, None)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 1.0 + 3e-6),
        ({"count": 10}, 1.0 + 30e-6),
        ({"kind": "reduce-scatter"}, 1.0 + 3e-6),
        ({"kind": "all-reduce", "count": 10}, 1.0 + 60e-6),
        ({"kind": "all-to-all"}, 2.0 + 3e-6),
        ({"kind": "collective-permute"}, 4.0 + 1e-6),
        ({"axes": ("other",)}, None),
        ({"axes": ("alone",)}, None),
        ({"axes": ()}, None),
        ({"axes": ("alone", "fsdp")}, 1.0 + 3e-6),
    ],
)
def test_seconds_of_each_kind_of_collective(
    changes: dict[str, object], seconds: float | None
) -> None:
    links = {"fsdp": LINK, "alone": AxisLink(math.inf, "none")}
    total, exposed = collective_seconds([gather(**changes)], links)
    assert total == ({} if seconds is None else {"fsdp": pytest.approx(seconds, rel=1e-12)})
    assert exposed == {}


def test_a_collective_over_two_axes_is_shared_out() -> None:
    links = {"data": dataclasses.replace(LINK, participants=2, bandwidth=10e9), "fsdp": LINK}
    total, _ = collective_seconds([gather(axes=("data", "fsdp"))], links)
    # ρ(2) / 4 and ρ(4) of a buffer: 1/7 and 6/7 of the bytes.
    assert total["data"] == pytest.approx(100 / 7 / 10 + 3e-6)
    assert total["fsdp"] == pytest.approx(6 / 7 + 3e-6)


def test_what_runs_alone_is_added_even_where_all_else_overlaps() -> None:
    hidden, alone = gather(), gather(overlaps=False, wire_bytes=50_000_000_000)
    _, step = timed(collectives=(hidden, alone, gather(overlaps=None)))
    latency = 3 * 3e-6
    assert step.communication_seconds["fsdp"] == pytest.approx(2.5 + latency)
    # The others take longer than compute; what may overlap counts as if it did.
    assert step.step_seconds_low == pytest.approx(2.0 + 0.5 + latency)
    assert step.step_seconds_high == pytest.approx(1.0 + 1.0 + 2.5 + latency)
    assert step.bound_by == "fsdp"


seconds = st.floats(0, 100)


@given(
    compute=seconds,
    memory=seconds,
    axes=st.lists(st.tuples(seconds, st.floats(0, 1)), max_size=3),
    streams=st.booleans(),
)
def test_the_range_holds_every_part_and_is_ordered(
    compute: float, memory: float, axes: list[tuple[float, float]], streams: bool
) -> None:
    communication = {f"axis{n}": total for n, (total, _) in enumerate(axes)}
    exposed = {f"axis{n}": total * part for n, (total, part) in enumerate(axes)}
    found = step_estimate(
        compute,
        memory,
        communication,
        exposed,
        streams=streams,
        model_flops=1e12,
        tokens=100,
        devices=8,
        chips=8,
        peak_flops=1e12,
        roofline_seconds=None,
    )
    low, high = found.step_seconds_low, found.step_seconds_high
    assert low is not None and high is not None
    parts = [compute, memory, *communication.values()]
    assert low <= high
    assert low >= max(parts) * (1 - 1e-9)
    assert high <= sum(parts) * (1 + 1e-9)
    assert low >= sum(exposed.values()) * (1 - 1e-9)
    if not streams:
        assert high == pytest.approx(sum(parts))
    if low > 0:
        assert found.mfu is not None and found.mfu[0] >= found.mfu[1]
    named = {"compute": compute, "memory": memory, **communication}
    assert named[found.bound_by] == max(parts)


def calibration(chip: str, kernel: str = "cudnn", links: bool = True) -> Calibration:
    def rate(value: float) -> Rate:
        return Rate(value, value, value)

    gpu = chip == "h100"
    return Calibration(
        device_kind=CHIPS[chip].device_kinds[0],
        platform="gpu" if gpu else "tpu",
        device_count=8,
        jax="0.10",
        date="2026-01-01",
        matmuls=(
            MatmulRate("bf16", 1024, 1024, 1024, rate(3e14)),
            MatmulRate("bf16", 8192, 8192, 8192, rate(7e14)),
        ),
        memory=MemoryRate(10**9, rate(2.5e12)),
        attention=AttentionRate(kernel, "bf16", 1, 4096, 16, 128, rate(4e14), rate(4e14)),
        links=(LinkRate("all-gather", 8, 300e9, 1e-5), LinkRate("all-reduce", 8, 330e9, 1e-5))
        if links
        else (),
    )


def test_rates_of_a_calibration() -> None:
    found = MeasuredRates.of(calibration("h100"), H100)
    assert found.matmul(H100, "bf16") == 7e14
    assert found.matmul(H100, "fp8") == 1979e12
    assert found.memory(H100) == 2.5e12
    assert found.links == pytest.approx(315 / 450)
    # Of 3 useful FLOPs cuDNN runs 3.5: its rate in FLOPs it runs is that much higher.
    assert found.attention(H100) == pytest.approx(4e14 * 3.5 / 3)


def test_splash_attention_runs_whole_blocks_and_scores_twice() -> None:
    found = MeasuredRates.of(calibration("v5p", "splash"), V5P)
    assert found.attention(V5P) == pytest.approx(4e14 * 4.5 / 3 * (1 + 512 / 4096))
    assert found.links == 1.0  # an axis' rate depends on its place on the torus
    plain = MeasuredRates.of(calibration("v5p", "matmul", links=False), V5P)
    assert plain.attention(V5P) == ATTENTION_FRACTION * 459e12


def test_with_the_links_of_a_real_mesh() -> None:
    topology, mesh = Topology.parse("v5p:4x4x4"), MeshSpec.parse("fsdp=64")
    links = axis_links(topology, mesh)
    total, _ = collective_seconds([gather()], links)
    assert total["fsdp"] == pytest.approx(100e9 / links["fsdp"].bandwidth, rel=1e-3)
