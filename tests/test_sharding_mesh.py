"""Meshes and topologies: written forms, arithmetic, devices."""

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from meshwright.sharding.errors import MeshError, TopologyError
from meshwright.sharding.mesh import AXES, MeshSpec
from meshwright.sharding.topology import GPU_CHIPS, TPU_CHIPS, Topology


@st.composite
def specs(draw: st.DrawFn) -> MeshSpec:
    names = draw(st.lists(st.sampled_from(AXES), min_size=1, unique=True))
    sizes, across = [], []
    for name in sorted(names, key=AXES.index):
        outer, inner = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        sizes.append((name, outer * inner))
        if draw(st.booleans()):
            across.append((name, outer))
    return MeshSpec(tuple(sizes), tuple(across))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    chip = draw(st.sampled_from(["auto", "local", "cpu", *TPU_CHIPS, *GPU_CHIPS]))
    if chip in ("auto", "local"):
        return Topology(chip)
    rank = {"cpu": 1, **TPU_CHIPS}.get(chip, 2)
    shape = tuple(draw(st.lists(st.integers(1, 64), min_size=rank, max_size=rank)))
    return Topology(chip, shape, 1 if chip == "cpu" else draw(st.integers(1, 4)))


@given(specs())
def test_mesh_written_form_round_trips(spec: MeshSpec) -> None:
    assert MeshSpec.parse(str(spec)) == spec


@given(topologies())
def test_topology_written_form_round_trips(topology: Topology) -> None:
    assert Topology.parse(str(topology)) == topology


@given(specs(), st.integers(1, 64))
def test_fill_multiplies_to_the_devices_or_refuses(spec: MeshSpec, count: int) -> None:
    free = MeshSpec((*spec.axes[:-1], (spec.axes[-1][0], -1)))
    known = math.prod(size for _, size in spec.axes[:-1])
    if count % known:
        with pytest.raises(MeshError, match="does not divide"):
            free.fill(count)
    else:
        assert free.fill(count).device_count == count


@given(specs(), st.integers(1, 16))
def test_split_multiplies_back(spec: MeshSpec, groups: int) -> None:
    try:
        rows = spec.split(groups)
    except MeshError:
        return
    assert [(name, across * within) for name, across, within in rows] == list(spec.axes)
    assert math.prod(across for _, across, _ in rows) == groups
    stated = dict(spec.across)
    assert all(across == stated.get(name, across) for name, across, _ in rows)


def test_order_is_canonical_however_it_is_written() -> None:
    assert MeshSpec.parse("tensor=2,data=2,fsdp=2").names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta=2", "did you mean `data`"),
        ("data=2,data=4", "axis `data` is given twice"),
        ("data=-1,fsdp=-1", "only one can be what is left"),
        ("data=0", "data=0 is not a size"),
        ("data=-2", "data=-2 is not a size"),
        ("data", "is not an axis with a size"),
        ("", "is not an axis with a size"),
        ("data=two", "write it like data=2"),
    ],
)
def test_bad_meshes_are_refused(text: str, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        MeshSpec.parse(text)


def test_wrong_product_names_meshes_that_work() -> None:
    with pytest.raises(MeshError) as caught:
        MeshSpec.parse("data=3,fsdp=2,tensor=2").fill(8, "cpu:8")
    text = str(caught.value)
    assert "cpu:8 has 8 devices; 3 × 2 × 2 = 12 is not 8" in text
    assert "data=2,fsdp=2,tensor=2" in text and "--topology cpu:12" in text


@given(specs())
def test_every_suggested_mesh_works(spec: MeshSpec) -> None:
    if spec.device_count == 24:
        return
    with pytest.raises(MeshError) as caught:
        spec.fill(24)
    for suggestion in caught.value.fix.removeprefix("use ").split(" or "):
        if not suggestion.endswith("alone"):
            assert MeshSpec.parse(suggestion).fill(24).device_count == 24


def test_built_mesh_has_auto_axes_and_the_sizes() -> None:
    mesh = MeshSpec.parse("data=2,fsdp=-1,tensor=2").build(jax.devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert MeshSpec.of(mesh) == MeshSpec.parse("data=2,fsdp=2,tensor=2")


def test_abstract_mesh_has_auto_axes() -> None:
    mesh = MeshSpec.parse("data=512").abstract()
    assert dict(mesh.shape) == {"data": 512} and set(mesh.axis_types) == {AxisType.Auto}


class _Device:
    """A device of a described machine: what laying a mesh reads of one."""

    def __init__(self, number: int, host: int) -> None:
        self.id, self.process_index, self.platform = number, host, "gpu"


def test_outer_axes_cross_hosts_and_inner_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    laid = {}
    monkeypatch.setattr("jax.sharding.Mesh", lambda array, *_, **__: laid.update(mesh=array))
    devices = [_Device(number, number % 2) for number in range(8)]
    MeshSpec.parse("data=4,tensor=2").build(devices)  # type: ignore[arg-type]
    hosts = [[device.process_index for device in row] for row in laid["mesh"]]
    assert hosts == [[0, 0], [0, 0], [1, 1], [1, 1]]
    MeshSpec.parse("data=2,tensor=2*2").build(devices)  # type: ignore[arg-type]
    hosts = [[device.process_index for device in row] for row in laid["mesh"]]
    assert hosts == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5z:4x4", "did you mean `v5"),
        ("v5e:4x4x4", "`v5e` takes 2 number"),
        ("cpu:8*2", "write cpu:16"),
        ("cpu:0", "must be at least 1"),
        ("cpu", "a colon and a shape"),
        ("locall", "did you mean `local`"),
    ],
)
def test_bad_topologies_are_refused(text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.parse(text)


def test_hardware_that_is_not_here_counts_but_has_no_devices() -> None:
    topology = Topology.parse("v5p:4x4x8*2")
    assert (topology.device_count, topology.groups, topology.kind) == (256, 2, "tpu")
    assert Topology.parse("h100:2x8").groups == 2
    with pytest.raises(TopologyError, match="comes with `meshwright plan`"):
        topology.devices()


def test_simulated_devices_after_the_backend_started() -> None:
    assert len(Topology.parse("cpu:4").devices()) == 4
    with pytest.raises(TopologyError, match="already started in this process with 8"):
        Topology.parse("cpu:16").devices()


def test_more_simulated_devices_than_a_process_bears() -> None:
    assert Topology.parse("cpu:100000").device_count == 100000
    with pytest.raises(TopologyError, match="1024 is the limit"):
        Topology.parse("cpu:100000").devices()
