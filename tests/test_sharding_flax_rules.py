"""Flax rule lists read in, with a note of every name that would mean something else."""

import pytest
from flax.linen import spmd
from jax.sharding import PartitionSpec

from meshwright.sharding.decisions import resolve
from meshwright.sharding.dims import Leaf
from meshwright.sharding.errors import PlacementError, RulesError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules, Table

MESH = MeshSpec.parse("data=2,fsdp=2,tensor=2")
LIST = [
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("layers", None),
]


def leaf(*dims: str | None, shape: tuple[int, ...] | None = None) -> Leaf:
    import numpy as np

    return Leaf("w", shape or (8,) * len(dims), np.dtype("float32"), dims)


@pytest.mark.parametrize("table", ["params", "gradients", "optimizer"])
@pytest.mark.parametrize(
    "dims", [("embed", "mlp"), ("layers", "embed", "heads"), ("mlp",), (None, "embed")]
)
def test_a_list_without_traps_means_what_linen_makes_of_it(
    dims: tuple[str | None, ...], table: Table
) -> None:
    (decision,) = resolve([leaf(*dims)], Rules.from_flax(LIST), MESH, table)
    theirs = spmd.logical_to_mesh_axes(dims, LIST)
    assert theirs is not None
    entries = list(theirs)
    while entries and entries[-1] is None:
        entries.pop()
    assert decision.spec == PartitionSpec(*entries)


def test_activations_go_by_the_list_too() -> None:
    rules = Rules.from_flax(LIST)
    assert rules.token_axes() == ("data", "fsdp")
    assert rules.axes_for("activations", "heads") == ("tensor",)


def test_a_name_given_twice_is_noted_in_both_dialects() -> None:
    twice = [("embed", "fsdp"), ("embed", "data")]
    linen = Rules.from_flax(twice)
    assert linen.axes_for("params", "embed") == ("fsdp",)
    assert linen.notes[0] == (
        "`embed` is given 2 times (fsdp, data): linen takes the first that the leaf has free, "
        "here it is always fsdp, and a clash is an error"
    )
    nnx = Rules.from_flax(twice, "nnx")
    assert nnx.axes_for("params", "embed") == ("data",)
    assert nnx.notes[0] == "`embed` is given 2 times (fsdp, data): the last, data, as nnx"


def test_an_axis_that_linen_would_pass_over_is_an_error() -> None:
    rules = Rules.from_flax([("embed", "fsdp"), ("mlp", "fsdp")])
    assert spmd.logical_to_mesh_axes(("embed", "mlp"), [("embed", "fsdp"), ("mlp", "fsdp")]) == (
        PartitionSpec("fsdp", None)
    )
    with pytest.raises(PlacementError, match="two dims of `w` over the same axis `fsdp`"):
        resolve([leaf("embed", "mlp")], rules, MeshSpec.parse("fsdp=4"), "params")


def test_a_name_that_is_not_in_the_list_is_an_error_where_linen_leaves_it_whole() -> None:
    assert spmd.logical_to_mesh_axes(("embed", "extra"), LIST) == PartitionSpec("fsdp", None)
    with pytest.raises(PlacementError, match="no rule knows the dim `extra`"):
        resolve([leaf("embed", "extra")], Rules.from_flax(LIST), MESH, "params")
    assert any("linen leaves its dim whole" in note for note in Rules.from_flax(LIST).notes)


def test_metadata_of_nnx_may_name_mesh_axes() -> None:
    rules = Rules.from_flax([("embed", "fsdp")], "nnx", mesh_axes=("data", "fsdp", "tensor"))
    (decision,) = resolve([leaf("embed", "tensor")], rules, MESH, "params")
    assert decision.spec == PartitionSpec("fsdp", "tensor")
    assert "`tensor` as a dim's name: the mesh axis `tensor`, as nnx takes it" in rules.notes


@pytest.mark.parametrize(
    ("rules", "dialect", "message"),
    [
        (LIST, "haiku", "there is no dialect `haiku`"),
        ([("embed", 3)], "linen", "cannot read the Flax rule for `embed`"),
        ([("embed", (3,))], "linen", "cannot read the Flax rule for `embed`"),
    ],
)
def test_what_cannot_be_read(rules: object, dialect: str, message: str) -> None:
    with pytest.raises(RulesError, match=message):
        Rules.from_flax(rules, dialect)  # type: ignore[arg-type]
