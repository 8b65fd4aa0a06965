"""Rules and strategies: folding, overriding, and what is refused."""

import jax.numpy as jnp
import pytest

from meshwright.sharding.decisions import check_mesh, resolve
from meshwright.sharding.dims import Leaf
from meshwright.sharding.errors import PlacementError, RulesError
from meshwright.sharding.mesh import MeshSpec
from meshwright.sharding.rules import Rules
from meshwright.sharding.strategies import data, expert, fold, fsdp, tensor, zero1, zero2

F32 = jnp.dtype("float32")
MESH = MeshSpec.parse("data=2,fsdp=2,tensor=2")
LEAVES = (
    Leaf("embedding", (256, 128), F32, ("vocab", "embed")),
    Leaf("wq", (4, 128, 8, 16), F32, ("layers", "embed", "heads", "head_dim")),
    Leaf("up", (4, 128, 384), F32, ("layers", "embed", "mlp")),
    Leaf("norm", (128,), F32, ("norm",)),
)


def specs(rules: Rules, table: str = "params") -> dict[str, tuple]:
    axes = tuple((name, size) for name, size in MESH.axes if name in rules.axes())
    found = resolve(LEAVES, rules, MeshSpec(axes or MESH.axes[:1]), table)  # type: ignore[arg-type]
    return {decision.leaf.path: tuple(decision.spec) for decision in found}


def test_each_strategy_writes_what_its_table_says() -> None:
    assert specs(fold(data())) == {"embedding": (), "wq": (), "up": (), "norm": ()}
    assert specs(fold(fsdp())) == {
        "embedding": (None, "fsdp"),
        "wq": (None, "fsdp"),
        "up": (None, "fsdp"),
        "norm": (),
    }
    assert specs(fold(tensor())) == {
        "embedding": ("tensor",),
        "wq": (None, None, "tensor"),
        "up": (None, None, "tensor"),
        "norm": (),
    }


def test_the_hybrid_is_the_fold() -> None:
    assert specs(fold(data(), fsdp(), tensor())) == {
        "embedding": ("tensor", "fsdp"),
        "wq": (None, "fsdp", "tensor"),
        "up": (None, "fsdp", "tensor"),
        "norm": (),
    }
    rules = fold(data(), fsdp(), tensor())
    assert rules.token_axes() == ("data", "fsdp")


@pytest.mark.parametrize(
    ("strategy", "split"),
    [
        (zero1(), {"optimizer"}),
        (zero2(), {"optimizer", "gradients"}),
        (fsdp("data"), {"optimizer", "gradients", "params"}),
        (fsdp("data", accumulate="whole"), {"optimizer", "params"}),
    ],
)
def test_zero_stages_are_settings_of_the_tables(strategy, split: set[str]) -> None:
    rules = fold(strategy)
    for table in ("params", "gradients", "optimizer"):
        expected = (None, "data") if table in split else ()
        assert specs(rules, table)["wq"] == expected


def test_experts_split_rows_and_stacks_of_experts_alone() -> None:
    rules = fold(fsdp(), expert(), tensor())
    assert rules.token_axes() == ("fsdp", "expert") and rules.expert_axes() == ("expert",)
    leaves = (
        Leaf("w_up", (4, 8, 128, 384), F32, ("layers", "experts", "embed", "mlp")),
        Leaf("router", (4, 128, 8), F32, ("layers", "embed", "routes")),
    )
    mesh = MeshSpec.parse("fsdp=2,expert=4,tensor=2")
    for table in ("params", "gradients", "optimizer"):
        found = resolve(leaves, rules, mesh, table)
        assert tuple(found["w_up"].spec) == (None, "expert", "fsdp", "tensor")
        assert tuple(found["router"].spec) == (None, "fsdp")


def test_zero_joins_data_in_either_order() -> None:
    assert fold(zero1(), data()).optimizer == fold(data(), zero1()).optimizer


@pytest.mark.parametrize(
    "strategies",
    [
        (data(), data()),
        (data(), fsdp("data")),
        (fsdp(), tensor("fsdp")),
        (zero1(), zero2()),
        (fsdp("data"), zero1("data")),
        (zero1("data"), fsdp("data")),
    ],
)
def test_strategies_that_exclude_each_other(strategies: tuple) -> None:
    with pytest.raises(RulesError, match="has that axis already"):
        fold(*strategies)


def test_a_rule_of_ones_own_goes_first() -> None:
    rules = fold(data(), fsdp(), tensor()).with_rule("params", "mlp", None)
    assert specs(rules)["up"] == (None, "fsdp")
    assert specs(rules.with_text("params.head_dim=data"))["wq"] == (None, "fsdp", "tensor", "data")


def test_patterns_match_the_whole_name() -> None:
    rules = fold(fsdp()).with_rule("params", "vo*", "fsdp").with_rule("params", "embed", None)
    assert specs(rules)["embedding"] == ("fsdp",)


def test_shadowed_rule() -> None:
    rules = Rules().with_rule("params", "m*", "tensor")
    with pytest.raises(RulesError, match="shadowed(.|\n)*matches all of `mlp`"):
        rules.with_rule("params", "mlp", "data")


@pytest.mark.parametrize(
    "text", ["params.mlp", "params.mlp=", "=tensor", ".mlp=tensor", "params mlp tensor"]
)
def test_unreadable_rules(text: str) -> None:
    with pytest.raises(RulesError, match="write it like params.mlp=tensor"):
        Rules().with_text(text)


def test_a_rule_without_a_table_goes_into_all_that_know_the_dim() -> None:
    rules = fold(data(), fsdp(), tensor()).with_text("vocab=none")
    for table in ("params", "gradients", "optimizer"):
        assert specs(rules, table)["embedding"] == (None, "fsdp")
    assert rules.lookup("activations", "vocab").axes == ()  # type: ignore[union-attr]
    assert not rules.with_text("length=data").user_rules("params")[1:]
    with pytest.raises(RulesError, match="no table knows the dim `vocabb`(.|\n)*`vocab`"):
        rules.with_text("vocabb=none")


def test_unknown_table() -> None:
    with pytest.raises(RulesError, match="did you mean `params`"):
        Rules().with_text("parms.mlp=tensor")


def test_unused_rule() -> None:
    rules = fold(data(), fsdp(), tensor()).with_rule("params", "mlpp", "data")
    with pytest.raises(RulesError, match="matches nothing(.|\n)*did you mean `mlp`"):
        specs(rules)


def test_strategy_that_splits_nothing() -> None:
    leaves = [Leaf("norm", (128,), F32, ("norm",))]
    with pytest.raises(RulesError, match=r"tensor\(\) splits nothing over axis `tensor`"):
        resolve(leaves, fold(tensor()), MeshSpec.parse("tensor=2"), "params")


def test_axis_the_mesh_has_not() -> None:
    with pytest.raises(RulesError, match="the mesh has no axis `tensor`"):
        resolve(LEAVES, fold(tensor()), MeshSpec.parse("data=8"), "params")


def test_axis_no_rule_uses() -> None:
    with pytest.raises(RulesError, match="no rule uses the mesh axis `fsdp`"):
        check_mesh(fold(data(), tensor()), MESH)
    with pytest.raises(RulesError, match="no rule uses the mesh axis `fsdp`"):
        resolve(LEAVES, fold(data(), tensor()), MESH, "params")
    check_mesh(fold(data(), tensor()), MeshSpec.parse("data=4,fsdp=1,tensor=2"))


def test_unknown_dim_names_are_refused_once_anything_is_split() -> None:
    leaf = Leaf("x", (4, 8), F32, ("embed", "mpl"))
    with pytest.raises(PlacementError, match="no rule knows the dim `mpl`(.|\n)*`mlp`"):
        resolve([leaf], fold(fsdp()), MeshSpec.parse("fsdp=2"), "params")
    (decision,) = resolve([leaf], fold(data()), MeshSpec.parse("data=2"), "params")
    assert tuple(decision.spec) == () and decision.reason == "no strategy splits its dims"
