"""The table of chips: complete, sourced, and consistent with itself and with public figures."""

import dataclasses
import math

import pytest

from meshwright.sharding.chips import CHIPS, GPU_RESERVE, Chip, chip_of, chip_of_device_kind
from meshwright.sharding.topology import GPU_CHIPS, TPU_CHIPS, Topology
from meshwright.train.flops import peak_flops

each_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
GIB = 1024**3
# What names a chip, or follows from its name, needs no source.
PLAIN = {"name", "kind", "device_kinds", "devices_per_chip", "torus_dims", "sources"}


@each_chip
def test_every_figure_is_positive_and_sourced(chip: Chip) -> None:
    figures = {field.name for field in dataclasses.fields(chip)} - PLAIN
    known = {name for name in figures if getattr(chip, name) is not None}
    assert set(chip.sources) >= known, f"{chip.name}: without source: {known - set(chip.sources)}"
    assert all(len(source) > 10 for source in chip.sources.values())
    assert set(chip.sources) <= figures
    for name in known - {"wraps", "peak_flops"}:
        assert getattr(chip, name) > 0, name
    assert all(rate > 0 for rate in chip.peak_flops.values())
    assert {"bf16", "f32"} <= set(chip.peak_flops)


@each_chip
def test_orders_of_magnitude(chip: Chip) -> None:
    assert chip.limit_bytes < chip.memory_bytes
    assert chip.network_bandwidth < chip.link_bandwidth < chip.memory_bandwidth
    assert 100 < chip.peak_flops["bf16"] / chip.memory_bandwidth < 700
    narrow = [chip.peak_flops.get(kind, math.inf) for kind in ("int8", "fp8")]
    assert min(narrow) >= chip.peak_flops["bf16"] >= chip.peak_flops["f32"]


def test_names_are_those_of_topologies() -> None:
    assert set(CHIPS) == {*TPU_CHIPS, *GPU_CHIPS}
    assert all(name == chip.name for name, chip in CHIPS.items())
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("name", "teraflops", "gigabytes_a_second", "limit_gib"),
    [
        ("v4", 275, 1200, 30.75),
        ("v5e", 197, 819, 15.75),
        ("v5p", 459, 2765, 95.74),
        ("v6e", 918, 1638, 31.25),
        ("tpu7x", 2307 / 2, 7380 / 2, 94.75),
        ("a100", 312, 2039, 71.3),
        ("h100", 989, 3350, 71.2),
        ("h200", 989, 4800, 125.8),
        ("b200", 2250, 8000, 160.5),
    ],
)
def test_public_figures(
    name: str, teraflops: float, gigabytes_a_second: float, limit_gib: float
) -> None:
    chip = CHIPS[name]
    assert chip.peak_flops["bf16"] == pytest.approx(teraflops * 1e12)
    assert chip.memory_bandwidth == pytest.approx(gigabytes_a_second * 1e9)
    assert chip.limit_bytes / GIB == pytest.approx(limit_gib, abs=0.06)


@pytest.mark.parametrize("name", TPU_CHIPS)
def test_clock_times_matrix_units_is_the_peak(name: str) -> None:
    """A whole number of matrix units, a power of two, each side² multiply-adds a cycle."""
    chip = CHIPS[name]
    assert chip.clock_hz is not None
    units = chip.peak_flops["bf16"] / (2 * chip.mxu**2 * chip.clock_hz)
    assert units == pytest.approx(2 ** round(math.log2(units)), rel=0.01)


@pytest.mark.parametrize("name", TPU_CHIPS)
def test_links_add_up_to_the_published_total(name: str) -> None:
    """Bidirectional gigabytes a second of all links of a chip."""
    chip = CHIPS[name]
    total = {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200}[name]
    assert chip.link_bandwidth * 2 * 2 * chip.torus_dims == total * 1e9


def test_gpus_keep_a_reserve() -> None:
    for name in GPU_CHIPS:
        chip = CHIPS[name]
        assert chip.limit_bytes == pytest.approx(chip.memory_bytes * (1 - GPU_RESERVE))


def test_tiles() -> None:
    assert CHIPS["v5e"].tile(1) == (32, 128)
    assert CHIPS["v5e"].tile(8) == (8, 128)
    assert CHIPS["a100"].tile(1) == (16, 16)
    assert CHIPS["a100"].tile(4) == (4, 4)


def test_closed_dimensions() -> None:
    assert CHIPS["v6e"].closed_dims((16, 16)) == (True, True)
    assert CHIPS["v5e"].closed_dims((4, 4)) == (False, False)
    assert CHIPS["v4"].closed_dims((4, 4, 8)) == (True, True, True)
    assert CHIPS["tpu7x"].closed_dims((2, 2, 4)) == (False, False, False)


def test_chip_of_topologies() -> None:
    assert chip_of(Topology.parse("v5p:4x4x4*2")) is CHIPS["v5p"]
    assert chip_of(Topology.parse("h200:1x8")) is CHIPS["h200"]
    for text in ("auto", "local", "cpu:8"):
        assert chip_of(Topology.parse(text)) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("TPU v4 lite", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_chip_of_device_kinds(kind: str, name: str | None) -> None:
    found = chip_of_device_kind(kind)
    assert (found.name if found else None) == name


def test_peaks_of_devices() -> None:
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert peak_flops("NVIDIA H100 PCIe") is None


def test_devices_and_chips_of_topologies() -> None:
    ironwood = Topology.parse("tpu7x:4x4x4*2")
    assert (ironwood.chip_count, ironwood.device_count) == (128, 256)
    assert Topology.parse("v4:4x4x4").device_count == 64
    assert Topology.parse("local").chip_count is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("H100:1x8", "h100"),
        ("V5P:4x4x4", "v5p"),
        ("v7x:4x4x4", "tpu7x"),
        ("v5litepod:4x4", "v5e"),
        ("v5litepod-16", "v5e"),
        ("trillium:4x4", "v6e"),
        ("h10:1x8", "h100"),
    ],
)
def test_other_names_of_chips_are_understood(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean `{meant}`"):
        Topology.parse(text)
