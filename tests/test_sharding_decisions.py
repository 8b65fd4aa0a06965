"""Resolve: what it returns jax accepts, what it cannot place it refuses with the arithmetic."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.sharding.decisions import resolve
from meshwright.sharding.dims import Leaf, describe
from meshwright.sharding.errors import MeshError, PlacementError, RulesError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules
from meshwright.sharding.strategies import SMALL_LEAF_BYTES, data, fold, fsdp, tensor

F32 = jnp.dtype("float32")
NAMES = ("vocab", "embed", "norm", "heads", "mlp")
MESHES = ("data=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=3,tensor=2")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Leaf], Rules, MeshSpec]:
    mesh = MeshSpec.parse(draw(st.sampled_from(MESHES)))
    rules = Rules()
    for dim in NAMES:
        axes = draw(st.lists(st.sampled_from(mesh.names), unique=True, max_size=2))
        rules = rules.with_rule("params", dim, axes or None)
    leaves = []
    for index in range(draw(st.integers(1, 3))):
        dims = draw(st.lists(st.sampled_from((None, *NAMES)), max_size=4))
        shape = tuple(draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12, 24))) for _ in dims)
        leaves.append(Leaf(f"leaf{index}", shape, F32, tuple(dims)))
    return leaves, rules, mesh


@given(cases())
@settings(deadline=None)
def test_what_resolve_returns_jax_accepts(case: tuple[list[Leaf], Rules, MeshSpec]) -> None:
    leaves, rules, mesh = case
    built = mesh.build(jax.devices()[: mesh.device_count])
    for leaf in leaves:
        expected = _fits(leaf, rules, mesh)
        try:
            (decision,) = resolve([leaf], rules, mesh, "params", check_used=False)
        except PlacementError:
            assert not expected, f"{leaf} was refused"
            continue
        assert expected, f"{leaf} was placed as {decision.spec}"
        sharding = NamedSharding(built, decision.spec)
        shard = sharding.shard_shape(leaf.shape)
        assert math.prod(shard) * 4 == decision.bytes_per_device
        jax.eval_shape(
            jax.jit(lambda x: x, out_shardings=sharding),  # noqa: B023  called at once
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        )


def _fits(leaf: Leaf, rules: Rules, mesh: MeshSpec) -> bool:
    """The rules of jax, restated: an axis once a leaf, every split dim divisible."""
    used: list[str] = []
    for name, size in zip(leaf.dims or (), leaf.shape, strict=True):
        rule = rules.lookup("params", name) if name else None
        axes = rule.axes if rule else ()
        used += axes
        if size % math.prod(mesh.sizes[axis] for axis in axes):
            return False
    return len(used) == len(set(used))


@given(st.lists(st.integers(1, 48), min_size=1, max_size=4), st.sampled_from((2, 3, 4)))
@settings(deadline=None)
def test_undeclared_leaves_split_their_largest_dim_that_divides(shape: list[int], n: int) -> None:
    mesh = MeshSpec((("fsdp", n),))
    leaf = Leaf("w", tuple(shape), F32)
    rules = fold(fsdp(min_bytes=0))
    fitting = [index for index, size in enumerate(shape) if size % n == 0]
    if math.prod(shape) == 1:
        assert _spec(leaf, rules, mesh) == ()
    elif not fitting:
        with pytest.raises(PlacementError, match=f"is divisible by {n}"):
            _spec(leaf, rules, mesh)
    else:
        best = max(shape[index] for index in fitting)
        first = next(index for index in fitting if shape[index] == best)
        assert _spec(leaf, rules, mesh) == (None,) * first + ("fsdp",)


def _spec(leaf: Leaf, rules: Rules, mesh: MeshSpec) -> tuple:
    (decision,) = resolve([leaf], rules, mesh, "params", check_used=False)
    return tuple(decision.spec)


def test_small_leaves_and_scalars_stay_whole_and_say_so() -> None:
    tree = {"w": jnp.zeros((64, 256)), "b": jnp.zeros(64), "s": jnp.zeros(())}
    found = resolve(describe(tree), fold(fsdp()), MeshSpec.parse("fsdp=8"), "params")
    assert {d.leaf.path: tuple(d.spec) for d in found} == {"b": (), "s": (), "w": (None, "fsdp")}
    assert found["b"].reason == f"small: 256 bytes, under the {SMALL_LEAF_BYTES} of fsdp()"
    assert found["s"].reason == "scalar"


def test_a_really_weird_leaf_is_refused_or_kept_whole_on_request() -> None:
    tree = {"weird": jnp.zeros((97, 89)), "w": jnp.zeros((64, 256))}
    mesh = MeshSpec.parse("fsdp=8")
    with pytest.raises(PlacementError, match="none of 97, 89 is divisible by 8"):
        resolve(describe(tree), fold(fsdp()), mesh, "params")
    found = resolve(describe(tree), fold(fsdp(whole=("we*",))), mesh, "params")
    assert tuple(found["weird"].spec) == () and "kept whole" in found["weird"].reason


def test_undeclared_leaves_need_a_strategy_that_goes_by_shape() -> None:
    with pytest.raises(PlacementError, match="no rule matches `w`"):
        resolve(describe({"w": jnp.zeros((4, 4))}), fold(tensor()), _two(), "params")
    found = resolve(
        describe({"w": jnp.zeros((4, 4))}), fold(data()), MeshSpec.parse("data=2"), "params"
    )
    assert found["w"].reason == "kept whole by data()"
    both = MeshSpec.parse("data=2,tensor=2")
    with pytest.raises(PlacementError, match="no rule matches `w`"):
        resolve(describe({"w": jnp.zeros((4, 4))}), fold(data(), tensor()), both, "params")


def test_a_mesh_with_a_size_left_open_is_refused() -> None:
    with pytest.raises(MeshError, match="still -1"):
        resolve([], fold(data()), MeshSpec.parse("data=-1"), "params")


def _two() -> MeshSpec:
    return MeshSpec.parse("tensor=2")


def test_indivisible_dim_in_four_lines() -> None:
    leaf = Leaf("layers/attn/wk", (8, 128), F32, ("kv_heads", "head_dim"))
    with pytest.raises(PlacementError) as caught:
        resolve([leaf], fold(tensor()), MeshSpec.parse("tensor=16"), "params")
    assert str(caught.value).splitlines() == [
        "cannot split dim 0 of `layers/attn/wk` over axis `tensor`",
        "  where: shape 8×128, dims (kv_heads, head_dim), rule `params.kv_heads → tensor` of "
        "tensor(), mesh tensor=16",
        "  why:   kv_heads is 8 and the mesh asks for 16 parts: 8 is not divisible by 16",
        "  fix:   make `tensor` one of 1, 2, 4, 8, make kv_heads 16 (the next multiple of 16), "
        "or keep it whole: `kv_heads=none`",
    ]


def test_suggested_sizes_suit_every_leaf_the_axis_splits() -> None:
    leaves = [
        Leaf("embedding", (50257,), F32, ("vocab",)),
        Leaf("wq", (12,), F32, ("heads",)),
    ]
    with pytest.raises(PlacementError, match="make `tensor` 1, make vocab 50264"):
        resolve(leaves, fold(tensor()), MeshSpec.parse("tensor=8"), "params")
    leaves[0] = Leaf("embedding", (90,), F32, ("vocab",))
    with pytest.raises(PlacementError, match="make `tensor` one of 1, 2, 3, 6,"):
        resolve(leaves, fold(tensor()), MeshSpec.parse("tensor=8"), "params")


def test_axis_twice_in_a_leaf() -> None:
    leaf = Leaf("w", (8, 8), F32, ("heads", "mlp"))
    with pytest.raises(PlacementError, match="two dims of `w` over the same axis `tensor`"):
        resolve([leaf], fold(tensor()), _two(), "params")


def test_many_failures_are_counted() -> None:
    leaves = [Leaf(f"w{i}", (3,), F32, ("mlp",)) for i in range(6)]
    with pytest.raises(PlacementError, match=r"5 more leaves fail too \(w1, w2, w3, …\)"):
        resolve(leaves, fold(tensor()), _two(), "params")


def test_decisions_by_path_and_as_trees() -> None:
    tree = {"a": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    leaves = describe(tree, {"a": ("embed", "mlp"), "b": ("mlp",)})
    found = resolve(leaves, fold(tensor()), _two(), "params")
    assert found.specs(tree) == {
        "a": PartitionSpec(None, "tensor"),
        "b": PartitionSpec("tensor"),
    }
    assert found.bytes_per_device * 2 == found.size_bytes == 80
    with pytest.raises(PlacementError, match="did you mean `a`"):
        found["a/"]
    with pytest.raises(PlacementError, match="it has 1 leaves, 2 were decided"):
        found.specs({"a": jnp.zeros(1)})


def test_unused_rule_on_undeclared_leaves() -> None:
    rules = fold(data()).with_rule("params", "mlp", None)
    with pytest.raises(RulesError, match="matches nothing"):
        resolve(describe({"w": jnp.zeros(4)}), rules, MeshSpec.parse("data=2"), "params")
