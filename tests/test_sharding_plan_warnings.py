"""The ten warnings: for each one plan that must have it and others, nearly alike, that must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.sharding.links import axis_links
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.plan_warnings import (
    SMALL,
    WARNING_CODES,
    PlacedLeaf,
    PlanFacts,
    warnings_of,
)
from meshwright.sharding.planned import Collective, PlanWarning
from meshwright.sharding.topology import Topology

MIB, GIB = 2**20, 2**30
MESH = MeshSpec.parse("data=2,fsdp=4")
SLICE = Topology.parse("v5e:2x4")
LEAF = "layers/mlp/w_up"

# What XLA writes, of two generations: the partitioner's words changed, the first ones did not.
REMATERIALIZED = (
    "W0901 spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler was "
    "not able to go from sharding {devices=[8,1]<=[8]} to {devices=[1,8]<=[8]} without doing a "
    "full rematerialization of the tensor for HLO operation: %dot.1 = bf16[64,64] dot(...), "
    'metadata={op_name="jit(step)/dot" source_file="model.py" source_line=12}.\n'
    "W0901 other.cc:1] nothing of interest\n"
    "W0902 spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {replicated} to {devices=[8]<=[8]} efficiently for HLO operation "
    '%gather, metadata={op_name="jit(step)/gather"}.\n'
)


def moved(**changes: Any) -> Collective:
    """A weight gathered for the forward pass in the layer loop, which nobody need worry about."""
    fields: dict[str, Any] = {
        "kind": "all-gather",
        "axes": ("fsdp",),
        "count": 4,
        "bytes": 128 * MIB,
        "wire_bytes": 96 * MIB,
        "phase": "forward",
        "source": "model.py:7",
        "leaf": LEAF,
        "participants": 4,
        "dtype": "bf16",
        "loop_depth": 1,
    }
    return Collective(**{**fields, **changes})


def facts(*collectives: Collective, **changes: Any) -> PlanFacts:
    fields: dict[str, Any] = {
        "links": axis_links(SLICE, MESH),
        "compute_seconds": 1.0,
        "gathers": {LEAF: 8},
        "scattered": frozenset({"fsdp"}),
    }
    return PlanFacts(collectives, MESH, SLICE, **{**fields, **changes})


def placed(**changes: Any) -> PlacedLeaf:
    """Split four ways, in whole tiles."""
    fields: dict[str, Any] = {
        "path": LEAF,
        "shape": (4, 1024, 512),
        "itemsize": 4,
        "size_bytes": GIB,
        "parts": 4,
    }
    return PlacedLeaf(**{**fields, **changes})


def hosts(mesh: str, network_axis: Collective) -> PlanFacts:
    """On two hosts of eight GPUs, the first axis between them."""
    topology, spec = Topology.parse("h100:2x8"), MeshSpec.parse(mesh)
    return replace(
        facts(network_axis), topology=topology, mesh=spec, links=axis_links(topology, spec)
    )


TRIGGERS: dict[str, Callable[[], PlanFacts]] = {
    "involuntary-rematerialization": lambda: facts(chatter=REMATERIALIZED),
    "replicated-leaf": lambda: facts(leaves=[placed(parts=1)]),
    "float32-on-the-wire": lambda: facts(moved(dtype="f32")),
    "undeclared-collective": lambda: facts(moved(kind="all-to-all", leaf="")),
    "emulated-collective": lambda: facts(moved(kind="all-reduce", phase="backward")),
    "gathered-again": lambda: facts(moved(count=12)),
    "reduced-every-microbatch": lambda: facts(
        moved(kind="reduce-scatter", phase="backward", loop_depth=2), accumulates=True
    ),
    "slow-axis": lambda: hosts(
        "data=2,fsdp=8", moved(axes=("data",), kind="all-reduce", wire_bytes=20 * GIB)
    ),
    "tile-padding": lambda: facts(leaves=[placed(shape=(4096, 3, 5), itemsize=4096)]),
    "recompilation": lambda: facts(changing=("[1]['scale']",)),
}

QUIET: dict[str, list[Callable[[], PlanFacts]]] = {
    "involuntary-rematerialization": [lambda: facts(chatter="all is well\n")],
    "replicated-leaf": [
        lambda: facts(leaves=[placed()]),
        lambda: facts(leaves=[placed(parts=1, size_bytes=MIB)]),  # too small to matter
        lambda: replace(facts(leaves=[placed(parts=1)]), mesh=MeshSpec.parse("fsdp=1")),
    ],
    "float32-on-the-wire": [
        lambda: facts(moved()),
        lambda: facts(moved(dtype="f32"), compute_itemsize=4),  # asked for
        lambda: facts(moved(dtype="f32", phase="update")),  # gradients into their masters
        lambda: facts(moved(), moved(dtype="f32", wire_bytes=MIB // 2)),
    ],
    "undeclared-collective": [
        lambda: facts(moved()),
        lambda: facts(moved(kind="all-reduce", leaf="activations 8×128×512", axes=("data",))),
        lambda: facts(moved(), moved(kind="all-to-all", wire_bytes=MIB // 2)),
        lambda: facts(moved(kind="all-to-all"), exchanged=frozenset({LEAF})),
    ],
    "emulated-collective": [
        lambda: facts(moved(kind="reduce-scatter", phase="backward")),
        lambda: facts(moved(kind="all-reduce", phase="backward", axes=("data",))),
        lambda: facts(moved(kind="all-reduce", phase="update", leaf="")),  # a norm
        lambda: facts(moved(kind="all-reduce", phase="backward", leaf="activations 8×128")),
    ],
    "gathered-again": [
        lambda: facts(moved(count=8)),
        lambda: facts(moved(count=12), gathers={}),  # a stranger's step
    ],
    "reduced-every-microbatch": [
        lambda: facts(moved(kind="reduce-scatter", phase="backward", loop_depth=2)),
        lambda: facts(moved(kind="reduce-scatter", phase="backward"), accumulates=True),
        lambda: facts(moved(phase="backward", loop_depth=2), accumulates=True),
    ],
    "slow-axis": [
        lambda: hosts("data=2,fsdp=8", moved(axes=("fsdp",), wire_bytes=20 * GIB)),
        lambda: hosts("data=2,fsdp=8", moved(axes=("data",), wire_bytes=20 * GIB, loop_depth=0)),
        lambda: hosts("data=2,fsdp=8", moved(axes=("data",), wire_bytes=MIB)),
        lambda: facts(moved(wire_bytes=20 * GIB)),  # links of the torus
        lambda: hosts(
            "data=2,fsdp=8",
            moved(axes=("data",), kind="all-reduce", phase="backward", wire_bytes=20 * GIB),
        ),  # of gradients
    ],
    "tile-padding": [
        lambda: facts(leaves=[placed()]),
        lambda: facts(leaves=[placed(shape=(4096 * 4096,))]),  # a vector has no second dim
        lambda: replace(
            facts(leaves=[placed(shape=(4096, 3, 5), itemsize=4096)]),
            topology=Topology.parse("h100:1x8"),
            links=None,
        ),
    ],
    "recompilation": [lambda: facts()],
}


def found(known: PlanFacts, code: str) -> list[PlanWarning]:
    return [warning for warning in warnings_of(known) if warning.code == code]


def test_every_code_is_tried_both_ways() -> None:
    assert set(TRIGGERS) == set(QUIET) == set(WARNING_CODES)


@pytest.mark.parametrize("code", WARNING_CODES)
def test_triggers(code: str) -> None:
    warnings = found(TRIGGERS[code](), code)
    assert warnings
    for warning in warnings:
        assert warning.what and warning.fix
        assert not warning.what.endswith(".")
        assert warning.cost_bytes is None or warning.cost_bytes > 0


@pytest.mark.parametrize(
    ("code", "known"), [(code, known) for code, cases in QUIET.items() for known in cases]
)
def test_stays_quiet(code: str, known: Callable[[], PlanFacts]) -> None:
    assert not found(known(), code)


def test_rematerialisations_say_where_and_each_once() -> None:
    first, second = found(facts(chatter=REMATERIALIZED * 3), "involuntary-rematerialization")
    assert first.source == "model.py:12" and first.leaf == "jit(step)/dot"
    assert "{devices=[8,1]<=[8]} to {devices=[1,8]<=[8]}" in first.what
    assert second.source == "" and "{replicated} to {devices=[8]<=[8]}" in second.what


def test_costs_are_what_mending_saves() -> None:
    wide = found(facts(moved(dtype="f32")), "float32-on-the-wire")[0]
    assert wide.cost_bytes == 48 * MIB and wide.leaf == LEAF and wide.source == "model.py:7"
    links = axis_links(SLICE, MESH)
    assert wide.cost_seconds == pytest.approx(48 * MIB / links["fsdp"].bandwidth)
    assert found(facts(moved(dtype="f32"), links=None), wide.code)[0].cost_seconds is None
    again = found(facts(moved(count=12)), "gathered-again")[0]
    assert again.cost_bytes == 32 * MIB and "gathered 12 times a step; 8 would do" in again.what
    # Two thirds of the gathers were needed; forward and backward are added up.
    halves = [moved(count=6), moved(count=6, phase="backward")]
    assert found(facts(*halves), "gathered-again")[0].cost_bytes == 64 * MIB
    whole = found(facts(leaves=[placed(parts=1)]), "replicated-leaf")[0]
    assert whole.cost_bytes == GIB * 7 // 8


def test_sums_kept_whole_and_then_split_could_have_been_scattered() -> None:
    late = moved(kind="all-reduce", phase="update", axes=("data", "fsdp"))
    (warning,) = found(facts(late), "emulated-collective")
    assert warning.cost_bytes == 48 * MIB and "--accumulate sharded" in warning.fix


def test_padding_counts_the_better_order_of_the_dims() -> None:
    # 128 lanes and 8 rows of float32: 512×3 is stored as 3×512 with 5 rows of padding.
    many = 16 * 4096
    waste = found(facts(leaves=[placed(shape=(many, 512, 3))]), "tile-padding")[0]
    assert waste.cost_bytes == many * 512 * 5 * 4
    assert "512×3" in waste.what and "8×128" in waste.what


def test_small_things_are_left_out_and_large_ones_come_first() -> None:
    known = facts(
        moved(wire_bytes=GIB),
        moved(kind="all-to-all", leaf="a", wire_bytes=int(2 * SMALL * GIB)),
        moved(kind="all-to-all", leaf="b", wire_bytes=int(9 * SMALL * GIB)),
        moved(kind="all-to-all", leaf="c", wire_bytes=int(0.5 * SMALL * GIB)),
    )
    assert [warning.leaf for warning in warnings_of(known)] == ["b", "a"]


def test_leaves_of_one_cause_are_one_warning() -> None:
    leaves = [moved(kind="all-reduce", phase="backward", leaf=f"layers/{n}") for n in "abcde"]
    (warning,) = found(facts(*leaves), "emulated-collective")
    assert warning.leaf == "layers/a, layers/b, layers/c and 2 more"


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
any_collective = st.builds(
    moved,
    kind=st.sampled_from(KINDS),
    axes=st.sampled_from([(), ("data",), ("fsdp",), ("data", "fsdp"), ("elsewhere",)]),
    count=st.integers(0, 1000),
    wire_bytes=st.integers(0, 2**50),
    phase=st.sampled_from(["forward", "backward", "update"]),
    leaf=st.sampled_from(["", LEAF, "activations 8×128"]),
    dtype=st.sampled_from(["", "f32", "bf16"]),
    loop_depth=st.integers(0, 3),
)


@given(st.lists(any_collective, max_size=6), st.booleans(), st.text(max_size=80))
def test_any_plan_can_be_looked_through(
    collectives: list[Collective], accumulates: bool, chatter: str
) -> None:
    chatter = f"{REMATERIALIZED[:90]}{chatter}"
    warnings = warnings_of(facts(*collectives, accumulates=accumulates, chatter=chatter))
    costs = [warning.cost_bytes or 0 for warning in warnings]
    assert costs == sorted(costs, reverse=True)
    assert {warning.code for warning in warnings} <= set(WARNING_CODES)
    for warning in warnings:
        assert warning.cost_bytes is None or 0 <= warning.cost_bytes <= sum(
            c.wire_bytes for c in collectives
        )
