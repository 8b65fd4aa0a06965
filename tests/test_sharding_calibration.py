"""Calibrations: what the table says of other shapes, which chip it serves, what fits a link."""

from __future__ import annotations

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
    check_matches,
    fit_link,
)
from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import ConfigError

positive = st.floats(1e-9, 1e18)


def exactly(value: float) -> Rate:
    return Rate(value, value, value)


def calibration(*matmuls: tuple[int, float], kind: str = "NVIDIA H100 80GB HBM3") -> Calibration:
    """One with square bf16 matmuls of these sides and rates."""
    entries = [MatmulRate("bf16", n, n, n, exactly(rate)) for n, rate in matmuls or [(64, 1e12)]]
    memory = MemoryRate(1 << 30, exactly(3e12))
    return Calibration(kind, "gpu", 1, "0.10.2", "2026-01-01", tuple(entries), memory)


def test_figures_are_those_of_the_tables() -> None:
    entries = (
        MatmulRate("bf16", 1, 2, 3, exactly(5e12)),
        MatmulRate("bf16", 2, 4, 6, exactly(4e12)),
        MatmulRate("f32", 2, 4, 6, Rate(1e12, 0.8e12, 1e12)),
    )
    attention = AttentionRate("cudnn", "bf16", 1, 2, 3, 4, exactly(7e11), Rate(6e11, 6e11, 9e11))
    links = (LinkRate("all-gather", 8, 4e11, 1e-5), LinkRate("all-reduce", 8, 3e11, 0.0))
    memory = MemoryRate(1 << 30, exactly(3e12))
    found = Calibration("TPU v4", "tpu", 8, "0.10", "now", entries, memory, attention, links)
    assert found.matmul_flops == {"bf16": 5e12, "f32": 1e12}
    assert found.memory_bandwidth == 3e12
    assert found.attention_flops == {"forward": 7e11, "backward": 6e11}
    assert found.link_bandwidth == {"all-gather": 4e11, "all-reduce": 3e11}
    assert found.noisy == ("f32 matmul of 2x4x6", "attention backward")
    assert calibration().attention_flops == calibration().link_bandwidth == {}


def test_a_tenth_is_not_noise() -> None:
    assert not Rate(100.0, 95.0, 105.0).noisy
    assert Rate(100.0, 95.0, 106.0).noisy


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True])
def test_numbers_that_cannot_be_measured(bad: float) -> None:
    makers = (
        lambda: Rate(bad, 1.0, 1.0),
        lambda: Rate(1.0, bad, 1.0),
        lambda: MatmulRate("bf16", 8, bad, 8, exactly(1.0)),  # type: ignore[arg-type]
        lambda: MemoryRate(bad, exactly(1.0)),  # type: ignore[arg-type]
        lambda: LinkRate("all-gather", 8, bad, 0.0),
        lambda: LinkRate("all-gather", 8, 1.0, 0.0, ((8, bad),)),
    )
    for make in makers:
        with pytest.raises(ConfigError, match="positive"):
            make()


def test_what_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="spread"):
        Rate(5.0, 6.0, 7.0)
    with pytest.raises(ConfigError, match="without matmuls"):
        Calibration("cpu", "cpu", 1, "", "", (), MemoryRate(8, exactly(1.0)))
    with pytest.raises(ConfigError, match="positive"):
        LinkRate("all-gather", 8, 1.0, -1e-6)


def test_matmuls_between_and_beyond_the_table() -> None:
    found = calibration((64, 1e12), (256, 4e12), (1024, 4e12))

    def rate(n: int) -> float:
        return found.matmul_rate("bf16", n, n, n)

    assert rate(64) == pytest.approx(1e12) and rate(256) == pytest.approx(4e12)
    assert rate(128) == pytest.approx(2e12)  # halfway in the logarithm
    assert rate(512) == rate(1024) == pytest.approx(4e12) == rate(10**5)
    # Below, along the line of the first two: work a 64th, rate a quarter.
    assert rate(16) == pytest.approx(0.25e12)
    assert found.matmul_rate("bf16", 64, 128, 256) == pytest.approx(2e12)
    with pytest.raises(ConfigError, match="cannot price a matmul of f32"):
        found.matmul_rate("f32", 8, 8, 8)


def test_no_matmul_is_faster_for_being_smaller() -> None:
    steep, falling = calibration((64, 1e9), (65, 1e12)), calibration((64, 2e12), (256, 1e12))
    seconds = [2 * n**3 / steep.matmul_rate("bf16", n, n, n) for n in (1, 8, 64)]
    assert seconds == pytest.approx([seconds[0]] * 3)  # starting one is all it costs
    assert falling.matmul_rate("bf16", 8, 8, 8) == pytest.approx(2e12)  # not faster than measured


@given(
    table=st.lists(st.tuples(st.integers(1, 10**5), positive), min_size=1, max_size=6),
    sizes=st.tuples(*[st.integers(1, 10**5)] * 3),
)
def test_rates_stay_within_the_table(table, sizes) -> None:
    found = calibration(*table)
    rates = [rate for _, rate in table]
    smallest = min(n for n, _ in table) ** 3
    rate = found.matmul_rate("bf16", *sizes)
    assert 0 < rate <= max(rates) * 1.000001
    if sizes[0] * sizes[1] * sizes[2] >= smallest:
        assert rate >= min(rates) * 0.999999


@given(
    latency=st.floats(1e-7, 1e-3),
    bandwidth=st.floats(1e8, 1e12),
    sizes=st.lists(st.integers(10**3, 10**9), min_size=2, max_size=6, unique=True),
)
def test_a_line_is_found_again(latency: float, bandwidth: float, sizes: list[int]) -> None:
    link = fit_link("all-gather", 8, [(size, latency + size / bandwidth) for size in sizes])
    for size, seconds in link.points:
        assert link.latency_seconds + size / link.bandwidth == pytest.approx(seconds, rel=1e-3)
    assert [size for size, _ in link.points] == sorted(sizes)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-6, 10)), min_size=1, max_size=6))
def test_no_points_give_a_nonsense_link(points: list[tuple[int, float]]) -> None:
    link = fit_link("all-reduce", 4, points)
    assert link.bandwidth > 0 and link.latency_seconds >= 0
    if len(points) == 1:
        assert link.bandwidth == pytest.approx(points[0][0] / points[0][1])


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_the_chip_must_be_the_one_measured(chip) -> None:
    kind = chip.device_kinds[0]
    for other in CHIPS.values():
        if other is chip:
            check_matches(calibration(kind=kind), chip)
        else:
            with pytest.raises(ConfigError) as error:
                check_matches(calibration(kind=kind), other)
            assert f"`{other.name}`" in str(error.value) and f"`{kind}`" in str(error.value)
            assert f"plan for {chip.name}" in error.value.fix


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "AMD Instinct MI300X"])
def test_boards_without_figures_serve_no_chip(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"`{kind}`") as error:
        check_matches(calibration(kind=kind), CHIPS["h100"])
    assert len(str(error.value).splitlines()) == 4 and error.value.exit_code == 2
