"""What each chip can hold, compute and move: the numbers behind every estimate of a plan.

One frozen `Chip` a generation, all figures per device as jax counts devices, in bytes, FLOP/s,
bytes a second and seconds. A figure is the maker's own (data sheet, documentation, paper), not
what a benchmark reached: what a program reaches is a matter for a calibration, and a mixture of
the two could be checked against neither. Each figure names its source in ``sources``, and those
that nobody publishes say ``inferred`` or ``assumed`` there.

The rates of links are one way, of one link, since that is what hardware has: how many links a
collective can use depends on the mesh and is worked out in `meshwright.sharding.links`. (The
later editions of "How to Scale Your Model" take 10% less than the data sheets for ICI; that is
again calibration.)

What a program may use of the memory is not what is soldered on. On TPU it is the limit the
compiler enforces, read from its own refusals. On GPU nobody enforces anything, so it is the
memory less `GPU_RESERVE` for the CUDA context, library workspaces and NCCL's buffers, which
live outside jax's pool; jax takes 75% by default, so such a run sets XLA_CLIENT_MEM_FRACTION.

This module imports nothing outside the standard library when it runs, so that looking up a
number never costs a second of start-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from meshwright.sharding.topology import Topology

__all__ = ["CHIPS", "GPU_RESERVE", "Chip", "chip_of", "chip_of_device_kind"]

GPU_RESERVE = 0.1
"""Part of a GPU's memory that a program should not count on.

jax's own allocator took 90% until its default was lowered (jax-ml/jax#788), and 0.9 is what
users raise it to again; at more, NCCL fails to allocate (NVIDIA/JAX-Toolbox#455 lowers the
fraction further for that reason).
"""

_GIB = 1024**3


@dataclass(frozen=True)
class Chip:
    """The figures of one kind of chip, per device unless said otherwise.

    Attributes:
        name: as in a topology's written form.
        kind: ``tpu`` or ``gpu``.
        device_kinds: how jax names its devices; for GPUs the start of the name.
        devices_per_chip: devices jax shows for one chip.
        chips_per_host: chips of one full host, which share its network cards.
        memory_bytes: what is there.
        limit_bytes: what one program may use; see the module.
        peak_flops: dense FLOP/s by operand type: ``bf16``, ``int8``, ``fp8`` and ``f32``, the
            last at jax's default matmul precision: one bfloat16 pass on TPU, TF32 on GPU.
        memory_bandwidth: bytes a second between device memory and chip.
        mxu: side of the matrix unit: operand sizes should be multiples of it. 64 on GPUs, the
            128 bytes of 16-bit operands that NVIDIA recommends.
        clock_hz: cycles a second that the compiler's estimates count; None on GPU.
        torus_dims: dimensions of the torus that links make; 0 on GPU, where a switch joins all
            GPUs of a host.
        wraps: when a torus dimension closes: ``cubes`` if the slice is made of whole 4×4×4
            cubes, ``sixteen`` if the dimension has all 16 chips, ``switch`` on GPU.
        link_bandwidth: bytes a second one way over one ICI link of a chip, or from one GPU into
            the NVLink switch.
        die_bandwidth: bytes a second one way between the devices of one chip; None where there
            is but one.
        network_bandwidth: bytes a second one way into the network between slices or hosts, the
            share of one device.
        hop_seconds: latency of one step over a link.
        network_hop_seconds: latency of one step over the network.
        sources: field → where its figure is from.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    device_kinds: tuple[str, ...]
    devices_per_chip: int
    chips_per_host: int
    memory_bytes: int
    limit_bytes: int
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float
    mxu: int
    clock_hz: float | None
    torus_dims: int
    wraps: Literal["cubes", "sixteen", "switch"]
    link_bandwidth: float
    die_bandwidth: float | None
    network_bandwidth: float
    hop_seconds: float
    network_hop_seconds: float
    sources: Mapping[str, str] = field(hash=False, repr=False)

    def tile(self, itemsize: int) -> tuple[int, int]:
        """Rows and columns that the last two dims of an array are padded to, or should be.

        On TPU the compiler lays arrays out in tiles of 8 sublanes of 32 bits by 128 lanes, and
        pads (JAX documentation, "Pallas TPU: array layouts"). On GPU nothing is padded, but the
        tensor cores are used fully only if both dims are multiples of 16 bytes (NVIDIA, "Matrix
        multiplication background", requirements for tensor cores).

        Args:
            itemsize: bytes of an element.

        >>> CHIPS["v5p"].tile(2), CHIPS["v5p"].tile(4), CHIPS["h100"].tile(2)
        ((16, 128), (8, 128), (8, 8))
        """
        if self.kind == "tpu":
            return max(8, 32 // itemsize), 128
        return max(1, 16 // itemsize), max(1, 16 // itemsize)

    def closed_dims(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which torus dimensions of a slice of this shape have links from end to end.

        Source: "How to Scale Your Model" (Austin et al., 2025), part 2, TPU networking: v5e and
        v6e close a dimension of 16, so an 8×16 closes the longer one; the optical switches of
        the others serve whole cubes, so a 2×2×4 closes none and a 4×4×8 all.

        >>> CHIPS["v5e"].closed_dims((8, 16)), CHIPS["v5p"].closed_dims((2, 4, 4))
        ((False, True), (False, False, False))
        """
        if self.wraps == "cubes":
            return (all(size % 4 == 0 for size in shape),) * len(shape)
        return tuple(self.wraps == "sixteen" and size == 16 for size in shape)


_BOOK = "How to Scale Your Model (Austin et al., 2025)"
_V4_PAPER = "Jouppi et al., TPU v4, ISCA 2023, table 4"
_LIMIT = "the limit in the compiler's out-of-memory errors, GiB a device: "
_CLOCK = "peak over (matrix units × side² × 2), which is the clock of public reports"
_CLOCK_INFERRED = "inferred: peak over (4 × 256² × 2); the number of units is a guess that makes"
_ICI_HOP = f"{_BOOK}, part 3: about 1 µs a hop"
_DCN_HOP = "assumed: NCCL's network hop stands in, since none is published for this network"
_TF32 = "TF32 where operands are float32: jax's default matmul precision"
_RESERVED = "memory less GPU_RESERVE"
_XLA = "openxla/xla, xla/backends/gpu/target_config/specs/"
_NVLINK_HOP = "NCCL, src/graph/tuning.cc: ring, simple protocol, NVLink"
_NIC_HOP = "NCCL, src/graph/tuning.cc: ring, simple protocol, network"
_GUIDE = "NVIDIA, Matrix multiplication background: 128 bytes on A100 and later"


def _cloud(page: str) -> str:
    return f"Google Cloud TPU documentation, {page}"


def _tpu_sources(page: str, **others: str) -> dict[str, str]:
    """Where a generation's figures are from, its own page unless stated."""
    shared = dict.fromkeys(
        ("memory_bytes", "peak_flops", "memory_bandwidth", "mxu", "chips_per_host"), _cloud(page)
    )
    return {
        **shared,
        "link_bandwidth": f"{_cloud(page)}: bidirectional ICI bandwidth a chip / links / 2",
        "network_bandwidth": f"{_cloud(page)}: data centre network bandwidth a chip",
        "wraps": f"{_BOOK}, part 2, TPU networking",
        "clock_hz": _CLOCK,
        "hop_seconds": _ICI_HOP,
        "network_hop_seconds": _DCN_HOP,
        **others,
    }


def _gpu_sources(sheet: str, spec: str, **others: str) -> dict[str, str]:
    """Where a GPU's figures are from, its data sheet unless stated."""
    return {
        "memory_bytes": f"{_XLA}{spec}.txtpb: what the driver reports",
        "limit_bytes": _RESERVED,
        "peak_flops": f"{sheet}, dense; f32 is {_TF32}",
        "memory_bandwidth": sheet,
        "mxu": _GUIDE,
        "chips_per_host": sheet,
        "link_bandwidth": f"{sheet}: NVLink both ways / 2",
        "wraps": f"{sheet}: NVSwitch joins the GPUs of a host",
        "network_bandwidth": f"{sheet}: one network card a GPU",
        "hop_seconds": _NVLINK_HOP,
        "network_hop_seconds": _NIC_HOP,
        **others,
    }


_V4 = Chip(
    name="v4",
    kind="tpu",
    device_kinds=("TPU v4",),
    devices_per_chip=1,  # its two cores as one device (megacore)
    chips_per_host=4,
    memory_bytes=32 * _GIB,
    limit_bytes=int(30.75 * _GIB),
    peak_flops={"bf16": 275e12, "f32": 275e12, "int8": 275e12},
    memory_bandwidth=1200e9,
    mxu=128,
    clock_hz=1.05e9,
    torus_dims=3,
    wraps="cubes",
    link_bandwidth=50e9,
    die_bandwidth=None,
    network_bandwidth=25e9 / 4,
    hop_seconds=1e-6,
    network_hop_seconds=9.6e-6,
    sources=_tpu_sources(
        "TPU v4",
        limit_bytes=_LIMIT + "30.75, megacore",
        link_bandwidth=_V4_PAPER,
        network_bandwidth=f"{_BOOK}, part 2: 2.5e10 a host of 4 chips",
    ),
)

_V5E = Chip(
    name="v5e",
    kind="tpu",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=16 * _GIB,
    limit_bytes=int(15.75 * _GIB),
    peak_flops={"bf16": 197e12, "f32": 197e12, "int8": 393e12},
    memory_bandwidth=819e9,
    mxu=128,
    clock_hz=1.5e9,
    torus_dims=2,
    wraps="sixteen",
    link_bandwidth=50e9,
    die_bandwidth=None,
    network_bandwidth=2 * 100e9 / 8 / 8,
    hop_seconds=1e-6,
    network_hop_seconds=9.6e-6,
    sources=_tpu_sources(
        "TPU v5e",
        limit_bytes=_LIMIT + "15.75",
        network_bandwidth=f"{_cloud('TPU v5e')}: 2 cards of 100 Gb/s a host of 8 chips",
    ),
)

_V5P = Chip(
    name="v5p",
    kind="tpu",
    device_kinds=("TPU v5", "TPU v5p"),
    devices_per_chip=1,
    chips_per_host=4,
    memory_bytes=96 * _GIB,
    limit_bytes=int(95.74 * _GIB),
    peak_flops={"bf16": 459e12, "f32": 459e12, "fp8": 459e12, "int8": 918e12},
    memory_bandwidth=2765e9,
    mxu=128,
    clock_hz=1.75e9,
    torus_dims=3,
    wraps="cubes",
    link_bandwidth=100e9,
    die_bandwidth=None,
    network_bandwidth=50e9 / 8,
    hop_seconds=1e-6,
    network_hop_seconds=9.6e-6,
    sources=_tpu_sources(
        "TPU v5p",
        limit_bytes=_LIMIT + "95.74",
        peak_flops=f"{_cloud('TPU v5p')}; int8 from {_BOOK}, part 2",
    ),
)

_V6E = Chip(
    name="v6e",
    kind="tpu",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=32 * _GIB,
    limit_bytes=int(31.25 * _GIB),
    peak_flops={"bf16": 918e12, "f32": 918e12, "fp8": 918e12, "int8": 1836e12},
    memory_bandwidth=1638e9,
    mxu=256,
    clock_hz=1.75e9,
    torus_dims=2,
    wraps="sixteen",
    link_bandwidth=100e9,
    die_bandwidth=None,
    network_bandwidth=4 * 200e9 / 8 / 8,
    hop_seconds=1e-6,
    network_hop_seconds=9.6e-6,
    sources=_tpu_sources(
        "TPU v6e",
        limit_bytes=_LIMIT + "31.25",
        clock_hz=f"{_CLOCK_INFERRED} the compiler's cycles plausible",
        network_bandwidth=f"{_cloud('TPU v6e')}: 4 cards of 200 Gb/s a host of 8 chips",
    ),
)

_TPU7X = Chip(
    name="tpu7x",
    kind="tpu",
    device_kinds=("TPU7x", "TPU7"),
    devices_per_chip=2,  # a device is one of the two chiplets: half of every figure of a chip
    chips_per_host=4,
    memory_bytes=192 * _GIB // 2,
    limit_bytes=int(94.75 * _GIB),
    peak_flops={"bf16": 2307e12 / 2, "f32": 2307e12 / 2, "fp8": 4614e12 / 2},
    memory_bandwidth=7380e9 / 2,
    mxu=256,
    clock_hz=2.2e9,
    torus_dims=3,
    wraps="cubes",
    link_bandwidth=100e9,  # of the chip: its devices share it
    die_bandwidth=6 * 100e9,
    network_bandwidth=100e9 / 8 / 2,
    hop_seconds=1e-6,
    network_hop_seconds=9.6e-6,
    sources=_tpu_sources(
        "TPU7x",
        limit_bytes=_LIMIT + "94.75",
        mxu="assumed as on TPU v6e",
        clock_hz=f"{_CLOCK_INFERRED} the compiler's cycles plausible",
        die_bandwidth=f"{_cloud('TPU7x')}: six times one ICI link",
    ),
)

_A100_SHEET = "NVIDIA A100 80GB SXM and DGX A100 data sheets"
_A100 = Chip(
    name="a100",
    kind="gpu",
    device_kinds=("NVIDIA A100",),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=85_100_068_864,
    limit_bytes=int(85_100_068_864 * (1 - GPU_RESERVE)),
    peak_flops={"bf16": 312e12, "f32": 156e12, "int8": 624e12},
    memory_bandwidth=2039e9,
    mxu=64,
    clock_hz=None,
    torus_dims=0,
    wraps="switch",
    link_bandwidth=600e9 / 2,
    die_bandwidth=None,
    network_bandwidth=200e9 / 8,
    hop_seconds=3.4e-6,
    network_hop_seconds=9.6e-6,
    sources=_gpu_sources(_A100_SHEET, "a100_sxm_80"),
)

_H100_SHEET = "NVIDIA H100 SXM and DGX H100 data sheets"
_H100 = Chip(
    name="h100",
    kind="gpu",
    device_kinds=("NVIDIA H100",),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=84_942_979_072,
    limit_bytes=int(84_942_979_072 * (1 - GPU_RESERVE)),
    peak_flops={"bf16": 989e12, "f32": 494.5e12, "fp8": 1979e12, "int8": 1979e12},
    memory_bandwidth=3350e9,
    mxu=64,
    clock_hz=None,
    torus_dims=0,
    wraps="switch",
    link_bandwidth=900e9 / 2,
    die_bandwidth=None,
    network_bandwidth=400e9 / 8,
    hop_seconds=3.4e-6,
    network_hop_seconds=9.6e-6,
    sources=_gpu_sources(_H100_SHEET, "h100_sxm"),
)

_H200_SHEET = "NVIDIA H200 SXM and DGX H200 data sheets"
_H200 = Chip(
    name="h200",
    kind="gpu",
    device_kinds=("NVIDIA H200",),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=int(139.80 * _GIB),
    limit_bytes=int(139.80 * _GIB * (1 - GPU_RESERVE)),
    peak_flops={"bf16": 989e12, "f32": 494.5e12, "fp8": 1979e12, "int8": 1979e12},
    memory_bandwidth=4800e9,
    mxu=64,
    clock_hz=None,
    torus_dims=0,
    wraps="switch",
    link_bandwidth=900e9 / 2,
    die_bandwidth=None,
    network_bandwidth=400e9 / 8,
    hop_seconds=3.4e-6,
    network_hop_seconds=9.6e-6,
    sources=_gpu_sources(
        _H200_SHEET,
        "h200",
        # XLA's specification has 141 GiB, which is the data sheet's 141 GB misread.
        memory_bytes="total capacity in PyTorch's out-of-memory messages on this GPU: 139.80 GiB",
    ),
)

_B200_SHEET = "NVIDIA HGX B200 and DGX B200 data sheets"
_B200 = Chip(
    name="b200",
    kind="gpu",
    device_kinds=("NVIDIA B200",),
    devices_per_chip=1,
    chips_per_host=8,
    memory_bytes=191_514_411_008,
    limit_bytes=int(191_514_411_008 * (1 - GPU_RESERVE)),
    peak_flops={"bf16": 2250e12, "f32": 1100e12, "fp8": 4500e12, "int8": 4500e12},
    memory_bandwidth=64e12 / 8,
    mxu=64,
    clock_hz=None,
    torus_dims=0,
    wraps="switch",
    link_bandwidth=1800e9 / 2,
    die_bandwidth=None,
    network_bandwidth=400e9 / 8,
    hop_seconds=3.4e-6,
    network_hop_seconds=9.6e-6,
    sources=_gpu_sources(_B200_SHEET, "b200"),
)

CHIPS: dict[str, Chip] = {
    chip.name: chip for chip in (_V4, _V5E, _V5P, _V6E, _TPU7X, _A100, _H100, _H200, _B200)
}
"""Every chip with known figures, by the name a topology writes."""

_OTHER_BOARDS = ("PCIe", "PCIE", "NVL", "40GB", "64GB", "MIG")
"""Parts of a GPU's name that mean other figures than those of the SXM board with all memory."""


def chip_of(topology: Topology) -> Chip | None:
    """The chip of a topology; None for ``auto``, ``local`` and ``cpu``."""
    return CHIPS.get(topology.chip)


def chip_of_device_kind(kind: str) -> Chip | None:
    """The chip behind a device's ``device_kind``; None if its figures are not known.

    Boards of the same name with other figures (PCIe, NVL, less memory, a MIG part) are not
    known: a wrong number is worse than none.

    >>> chip_of_device_kind("TPU v5 lite").name, chip_of_device_kind("NVIDIA H100 80GB HBM3").name
    ('v5e', 'h100')
    >>> chip_of_device_kind("NVIDIA H100 PCIe") is None
    True
    """
    for chip in CHIPS.values():
        if chip.kind == "tpu":
            if kind in chip.device_kinds:
                return chip
        elif kind.startswith(chip.device_kinds):
            return None if any(part in kind for part in _OTHER_BOARDS) else chip
    return None
