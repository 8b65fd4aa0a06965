"""GPU descriptions: complete, consistent with the chips, and read by XLA."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import TopologyError
from meshwright.sharding.gpu_targets import GPU_TARGETS, target_config
from meshwright.sharding.topology import GPU_CHIPS

# Without one of these a compile dies or is refused.
NEEDED = (
    "threads_per_warp",
    "block_dim_limit_x",
    "block_dim_limit_y",
    "block_dim_limit_z",
    "shared_memory_per_block_optin",
    "cuda_compute_capability",
    "device_memory_size",
)

COMPILE = """
import sys
import jax, numpy
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
target = topologies.get_topology_desc(
    platform="cuda", target_config=sys.stdin.read(), topology="1x2x8"
)
mesh = Mesh(numpy.array(target.devices).reshape(2, 8), ("data", "tensor"))
rows, both = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("data", "tensor"))
matmul = jax.jit(lambda x, w: x @ w, in_shardings=(rows, both), out_shardings=both)
size = jax.ShapeDtypeStruct((256, 256), "bfloat16")
compiled = matmul.lower(size, size).compile()
print(target.devices[0].device_kind, len(target.devices), "all-gather" in compiled.as_text())
"""


def test_every_gpu_has_a_description() -> None:
    assert tuple(GPU_TARGETS) == GPU_CHIPS


@pytest.mark.parametrize("chip", GPU_CHIPS)
def test_description_is_complete_and_agrees_with_the_chip(chip: str) -> None:
    text = target_config(chip)
    assert text.count("{") == text.count("}")
    for field in NEEDED:
        assert text.count(f" {field}") == 1, field
    assert all(float(n) > 0 for n in re.findall(r"_(?:limit|size|count|warp)\w*: (\S+)", text))
    assert f"device_memory_size: {CHIPS[chip].memory_bytes}\n" in text
    assert f"major: {GPU_TARGETS[chip].compute_capability[0]}\n" in text
    # One data sheet rounds, the other is clock × width: within 5%.
    assert GPU_TARGETS[chip].memory_bandwidth == pytest.approx(
        CHIPS[chip].memory_bandwidth, rel=0.05
    )
    assert GPU_TARGETS[chip].name.startswith(CHIPS[chip].device_kinds)


@pytest.mark.parametrize("chip", ["a100", "h100", "b200"])
def test_float32_rate_is_below_the_tensor_cores(chip: str) -> None:
    """Units × clock × 2 is the maker's float32 rate, to 3%."""
    target = GPU_TARGETS[chip]
    vector = target.core_count * target.fpus_per_core * target.clock_rate_ghz * 2e9
    sheet = {"a100": 19.5e12, "h100": 67e12, "b200": 75e12}[chip]
    assert vector == pytest.approx(sheet, rel=0.03)
    assert vector < CHIPS[chip].peak_flops["f32"]


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(TopologyError, match="did you mean `h100`"):
        target_config("h10")


def test_xla_compiles_for_a_described_gpu() -> None:
    """In a child process, since a bad description kills the process."""
    found = [name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if _is_there(name)]
    if not found:
        pytest.skip("jax's CUDA plugin is not installed")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=target_config("h100"),
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "NVIDIA H100 80GB HBM3 16 True"


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
