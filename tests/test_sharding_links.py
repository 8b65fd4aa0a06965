"""Axes on the torus: the same layout as jax's, and the bandwidth that follows from it."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.chips import CHIPS
from meshwright.sharding.errors import MeshError
from meshwright.sharding.links import (
    MOST_DRAWN,
    AxisLink,
    axis_links,
    lay_on_torus,
    physical_layout,
)
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.slices import slices_of
from meshwright.sharding.topology import Topology

NAMES = ("data", "fsdp", "context", "tensor")


def links(topology: str, mesh: str) -> dict[str, AxisLink]:
    return axis_links(Topology.parse(topology), MeshSpec.parse(mesh))


@st.composite
def laid(draw: st.DrawFn, chips: tuple[str, ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")):
    """A topology that exists and a mesh of all its devices, primes dealt out at random."""
    chip = draw(st.sampled_from(chips))
    shape = draw(st.sampled_from([s for s in slices_of(chip) if math.prod(s) <= 1024]))
    topology = Topology(chip, shape, draw(st.sampled_from([1, 1, 2, 4])))
    sizes = [1] * draw(st.integers(1, 4))
    for prime in prime_factors(topology.device_count or 1):
        sizes[draw(st.integers(0, len(sizes) - 1))] *= prime
    return topology, MeshSpec(tuple(zip(NAMES, sizes, strict=False)))


def prime_factors(number: int) -> list[int]:
    found = []
    for prime in range(2, number + 1):
        while number % prime == 0:
            found.append(prime)
            number //= prime
    return found


@given(laid())
def test_every_matching_mesh_can_be_laid_and_rates_are_sane(case) -> None:
    topology, mesh = case
    chip = CHIPS[topology.chip]
    most = max(2 * chip.torus_dims * chip.link_bandwidth, chip.die_bandwidth or 0)
    for name, link in axis_links(topology, mesh).items():
        assert link.participants == mesh.sizes[name]
        if mesh.sizes[name] == 1:
            assert link == AxisLink(math.inf, "none", source=link.source)
            continue
        assert 0 < link.bandwidth <= most * (1 + 1e-9)
        assert 0 < link.all_to_all_bandwidth <= link.bandwidth * (1 + 1e-9) or link.across > 1
        assert 0 < link.permute_bandwidth <= most
        assert link.hops >= 1 and link.latency_seconds > 0 and link.source


@given(laid())
def test_layout_is_jaxs(case) -> None:
    """jax's own assignment is the oracle: the same device at every place of the mesh."""
    mesh_utils = pytest.importorskip("jax._src.mesh_utils")
    oracle = getattr(mesh_utils, "_create_device_mesh_for_nd_torus", None)
    if oracle is None:
        pytest.skip("this jax has no _create_device_mesh_for_nd_torus")
    topology, mesh = case
    own = (2,) if topology.chip == "tpu7x" else ()
    dims = (*topology.shape, *own)
    axes = [within for _, _, within in mesh.split(topology.slices)]
    numbered = np.arange(math.prod(dims)).reshape(dims)
    with pytest.MonkeyPatch.context() as patch:
        # jax 0.10 loses prime factors of 28 and the like; later versions have this.
        patch.setattr(mesh_utils, "_get_prime_factors", prime_factors)
        expected, assigned = oracle(numbered, axes, allow_split_physical_axes=True)
    np.testing.assert_array_equal(lay_on_torus(dims, axes), assigned)
    placed = physical_layout(
        Topology(topology.chip, topology.shape),
        MeshSpec(tuple((name, axes[i]) for i, name in enumerate(mesh.names))),
    )
    assert placed is not None
    for entry in placed:
        assert numbered[tuple(entry["coordinates"])] == expected[tuple(entry["index"])]


@given(laid(("v5e", "v5p", "tpu7x")))
def test_every_device_is_drawn_once(case) -> None:
    topology, mesh = case
    placed = physical_layout(topology, mesh)
    if (topology.device_count or 0) > MOST_DRAWN:
        assert placed is None
        return
    assert placed is not None
    seats = {(entry["slice"], *entry["coordinates"]) for entry in placed}
    assert len(seats) == len(placed) == topology.device_count
    assert [tuple(entry["index"]) for entry in placed] == list(
        itertools.product(*map(range, mesh.sizes.values()))
    )
    assert json.loads(json.dumps(placed)) == placed


@pytest.mark.parametrize(
    ("topology", "mesh", "axis", "gigabytes"),
    [
        ("v5p:4x4x4", "fsdp=64", "fsdp", 600),  # three closed dimensions
        ("v5p:2x2x4", "fsdp=16", "fsdp", 300),  # below a cube nothing closes
        ("v5p:2x2x1", "fsdp=4", "fsdp", 200),
        ("v5p:4x4x4", "fsdp=16,tensor=4", "fsdp", 400),
        ("v5p:4x4x4", "fsdp=16,tensor=4", "tensor", 200),
        ("v5p:4x4x8", "fsdp=64,tensor=2", "tensor", 100),  # a part never closes
        ("v4:4x4x4", "fsdp=64", "fsdp", 300),
        ("v5e:16x16", "fsdp=256", "fsdp", 200),
        ("v5e:16x16", "fsdp=16,tensor=16", "tensor", 100),
        ("v5e:8x8", "fsdp=8,tensor=8", "tensor", 50),
        ("v5e:16x16", "data=2,fsdp=8,tensor=16", "fsdp", 50),
        ("v5e:16x16", "data=2,fsdp=8,tensor=16", "data", 12.5),  # eight rings share the links
        ("v6e:16x16", "fsdp=256", "fsdp", 400),
        ("tpu7x:4x4x4", "fsdp=64,tensor=2", "tensor", 600),  # the two devices of a chip
        ("tpu7x:4x4x4", "fsdp=64,tensor=2", "fsdp", 300),  # share its links
        ("tpu7x:4x4x4", "fsdp=128", "fsdp", 600),  # or use them together
        ("h100:1x8", "fsdp=8", "fsdp", 450),
        ("h100:2x8", "fsdp=2,tensor=8", "fsdp", 50),
        ("h100:2x8", "fsdp=2,tensor=8", "tensor", 450),
        ("h100:2x8", "fsdp=4,tensor=4", "fsdp", 100),
        ("a100:4x8", "fsdp=32", "fsdp", 200),
        ("b200:4x8", "fsdp=32", "fsdp", 400),
        ("h100:1x8*2", "fsdp=16", "fsdp", 400),
        ("v5e:4x4*2", "data=2,fsdp=16", "data", 3.125),
        ("v5p:4x4x4*2", "data=2,fsdp=64", "data", 6.25),
    ],
)
def test_rates_by_hand(topology: str, mesh: str, axis: str, gigabytes: float) -> None:
    assert links(topology, mesh)[axis].bandwidth == pytest.approx(gigabytes * 1e9)


def test_networks_are_named() -> None:
    assert links("v5e:4x4*2", "data=2,fsdp=16")["data"].network == "dcn"
    assert links("v5e:4x4*2", "data=2,fsdp=16")["fsdp"].network == "ici"
    assert links("h100:2x8", "fsdp=2,tensor=8")["fsdp"].network == "nic"
    assert links("h100:2x8", "fsdp=2,tensor=8")["tensor"].network == "nvlink"
    assert links("h100:1x8", "data=1,tensor=8")["data"].network == "none"
    assert links("cpu:8", "data=8") == {}


def test_an_axis_over_slices_takes_turns_with_the_torus() -> None:
    """Gathering S over 2 × 256: a 512th over the network, the rest over the torus."""
    link = links("v5e:16x16*2", "fsdp=512")["fsdp"]
    seconds = 1 / 512 / 3.125e9 + 510 / 512 / 200e9
    assert link.bandwidth == pytest.approx(511 / 512 / seconds)
    assert (link.across, link.network, link.permute_bandwidth) == (2, "dcn", 3.125e9)


def test_exchanges_are_bound_by_the_middle_of_the_torus() -> None:
    """On a closed ring of n half of nX crosses 2 × 2 one-way links: 8/n of a link a device."""
    link = links("v5e:16x16", "fsdp=16,expert=16")["expert"]
    assert link.all_to_all_bandwidth == pytest.approx(8 / 16 * 50e9)
    assert link.permute_bandwidth == 50e9
    assert link.closed and link.hops == 8


def test_stated_parts_decide_what_crosses_hosts() -> None:
    both = links("h100:2x8", "data=1*2,fsdp=2*4")
    assert (both["data"].network, both["fsdp"].across) == ("nvlink", 2)
    assert both["fsdp"].bandwidth == pytest.approx(4 * 50e9)


def test_gpu_layout_has_hosts_and_slices() -> None:
    placed = physical_layout(Topology.parse("h100:2x8*2"), MeshSpec.parse("data=4,tensor=8"))
    assert placed is not None
    assert placed[8] == {"index": [1, 0], "slice": 0, "coordinates": [1, 0]}
    assert placed[17] == {"index": [2, 1], "slice": 1, "coordinates": [0, 1]}
    assert physical_layout(Topology.parse("v5p:16x16x24"), MeshSpec.parse("fsdp=-1")) is None
    assert physical_layout(Topology("local"), MeshSpec.parse("fsdp=-1")) is None
    placed = physical_layout(Topology.parse("cpu:4"), MeshSpec.parse("data=2,tensor=2"))
    assert placed is not None and placed[3]["coordinates"] == [3]


def test_a_mesh_of_other_size_is_refused() -> None:
    with pytest.raises(MeshError, match="v5p:4x4x4 has 64 devices"):
        links("v5p:4x4x4", "fsdp=32")
