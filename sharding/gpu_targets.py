"""Full descriptions of NVIDIA GPUs, so that XLA can compile for one that is not here.

`jax.experimental.topologies.get_topology_desc(platform="cuda", target_config=...)` takes a
GpuTargetConfigProto in text form. A field that is missing is not refused but read as 0: some
then divide by it and kill the process, others change what fits and is rematerialised
(``device_memory_size``). So every field that matters is written, from one dataclass of numbers a
chip.

Source of the figures: OpenXLA's own specifications (openxla/xla, Apache-2.0,
``xla/backends/gpu/target_config/specs``: a100_sxm_80, h100_sxm, h200, b200), which list what the
CUDA driver reports; memory is that of `meshwright.sharding.chips`, from the same place but for
H200. Limits that are equal on all of these generations (threads, blocks, registers) are in CUDA
C++ Programming Guide, "Compute Capabilities".

The remaining fields of those files are left out. jax 0.10 does not know one of them
(``collective_memory_granularity``) and refuses the whole text for it; the others (rates of
execution units, interconnect, versions, names) feed XLA's cost model, which a plan does not
use: with and without them a sharded train step compiles to the same peak and the same number of
fusions and collectives, on jax 0.10 and 0.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import TopologyError, did_you_mean

__all__ = ["GPU_TARGETS", "GpuTarget", "target_config"]


@dataclass(frozen=True)
class GpuTarget:
    """What XLA wants to know of a GPU, bytes and counts a device.

    Attributes:
        name: as jax shows it in ``device_kind``.
        compute_capability: (major, minor).
        accelerated: whether code for exactly this architecture is generated (``sm_90a``).
        core_count: streaming multiprocessors.
        fpus_per_core: float32 units of each.
        clock_rate_ghz: boost clock.
        memory_bandwidth: bytes a second, memory clock × bus width.
        l2_cache_size: bytes.
        shared_memory_per_core: bytes.
        shared_memory_per_block_optin: bytes one block may ask for.
    """

    name: str
    compute_capability: tuple[int, int]
    accelerated: bool
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    memory_bandwidth: int
    l2_cache_size: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int


GPU_TARGETS: dict[str, GpuTarget] = {
    "a100": GpuTarget(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        accelerated=False,
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        memory_bandwidth=2_039_040_000_000,
        l2_cache_size=40 * 1024**2,
        shared_memory_per_core=164 * 1024,
        shared_memory_per_block_optin=163 * 1024,
    ),
    "h100": GpuTarget(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        accelerated=True,
        core_count=132,
        fpus_per_core=128,
        clock_rate_ghz=1.98,
        memory_bandwidth=3_352_320_000_000,
        l2_cache_size=50 * 1024**2,
        shared_memory_per_core=228 * 1024,
        shared_memory_per_block_optin=227 * 1024,
    ),
    "h200": GpuTarget(
        name="NVIDIA H200",
        compute_capability=(9, 0),
        accelerated=True,
        core_count=132,
        fpus_per_core=128,
        clock_rate_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        l2_cache_size=50 * 1024**2,
        shared_memory_per_core=228 * 1024,
        shared_memory_per_block_optin=227 * 1024,
    ),
    "b200": GpuTarget(
        name="NVIDIA B200",
        compute_capability=(10, 0),
        accelerated=True,
        core_count=148,
        fpus_per_core=128,
        clock_rate_ghz=1.965,
        memory_bandwidth=7_672_320_000_000,
        l2_cache_size=132_644_864,
        shared_memory_per_core=228 * 1024,
        shared_memory_per_block_optin=227 * 1024,
    ),
}
"""By the chip names of topologies."""

# Equal on compute capabilities 8.0, 9.0 and 10.0.
_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 48 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
}
# The cuDNN that XLA may assume: 9.10, the first it runs attention with on all of these chips.
_CUDNN = {"major": 9, "minor": 10, "patch": 0}


def target_config(chip_name: str) -> str:
    """The text-format GpuTargetConfigProto of a chip.

    Args:
        chip_name: a key of `GPU_TARGETS`.

    Raises:
        TopologyError: no such GPU.

    >>> print(target_config("h100").splitlines()[0])
    gpu_device_info {
    """
    if chip_name not in GPU_TARGETS:
        raise TopologyError(
            f"cannot describe the GPU `{chip_name}` to the compiler",
            why="its figures are not known",
            fix=did_you_mean(chip_name, GPU_TARGETS),
        )
    target = GPU_TARGETS[chip_name]
    major, minor = target.compute_capability
    feature = "ACCELERATED_FEATURES" if target.accelerated else "NONE"
    capability = [f"major: {major}", f"minor: {minor}", f"feature_extension: {feature}"]
    figures = {
        **_LIMITS,
        "core_count": target.core_count,
        "fpus_per_core": target.fpus_per_core,
        "clock_rate_ghz": target.clock_rate_ghz,
        "memory_bandwidth": target.memory_bandwidth,
        "l2_cache_size": target.l2_cache_size,
        "shared_memory_per_core": target.shared_memory_per_core,
        "shared_memory_per_block_optin": target.shared_memory_per_block_optin,
        "device_memory_size": CHIPS[chip_name].memory_bytes,
    }
    device = [*_lines(figures), *_block("cuda_compute_capability", capability)]
    whole = [
        *_block("gpu_device_info", device),
        'platform_name: "CUDA"',
        *_block("dnn_version_info", _lines(_CUDNN)),
        f'device_description_str: "{target.name}"',
    ]
    return "\n".join(whole) + "\n"


def _lines(figures: Mapping[str, int | float]) -> list[str]:
    return [f"{name}: {value}" for name, value in figures.items()]


def _block(name: str, lines: list[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]
