"""Dims from metadata, patterns and parameters, for every kind of pytree."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from meshwright.sharding.dims import (
    DimPatterns,
    Leaf,
    describe,
    describe_optimizer,
    dims_of,
)
from meshwright.sharding.errors import DimsError

F32 = jnp.dtype("float32")


class _Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(jnp.ones((4, 8)), dims=("embed", "mlp"))
        self.down = nnx.Param(jnp.ones((8, 4)), out_sharding=("mlp", "embed"), eager_sharding=False)
        self.plain = nnx.Linear(4, 4, rngs=rngs)


def test_nnx_metadata_ours_and_flaxs() -> None:
    found = dims_of(_Pair(nnx.Rngs(0)))
    assert found == {
        "down": ("mlp", "embed"),
        "plain/bias": None,
        "plain/kernel": None,
        "up": ("embed", "mlp"),
    }


def test_nnx_module_and_its_abstract_state_are_described_alike() -> None:
    module = _Pair(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: _Pair(nnx.Rngs(0)))
    assert describe(module) == describe(nnx.state(abstract))


def test_linen_metadata_both_boxes() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.initializers.ones
            x = nn.Dense(8, kernel_init=nn.with_partitioning(init, ("embed", "mlp")))(x)
            logical = nn.with_logical_partitioning(init, ("mlp", "embed"))
            return nn.Dense(4, kernel_init=logical, use_bias=False)(x)

    variables = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.ones((1, 4))))
    assert dims_of(variables) == {
        "params/Dense_0/bias": None,
        "params/Dense_0/kernel": ("embed", "mlp"),
        "params/Dense_1/kernel": ("mlp", "embed"),
    }


@jax.tree_util.register_dataclass
@dataclass
class _Layer:
    weight: jax.Array
    bias: jax.Array


def test_patterns_on_dataclasses_lists_and_dicts() -> None:
    tree = {"layers": [_Layer(jnp.ones((4, 8)), jnp.ones(8)) for _ in range(2)]}
    patterns = DimPatterns((("*/weight", ("embed", "mlp")), ("*/bias", ("mlp",))))
    assert {leaf.path: leaf.dims for leaf in describe(tree, patterns)} == {
        "layers/0/weight": ("embed", "mlp"),
        "layers/0/bias": ("mlp",),
        "layers/1/weight": ("embed", "mlp"),
        "layers/1/bias": ("mlp",),
    }


def test_first_pattern_wins_and_says_so() -> None:
    patterns = DimPatterns((("a", ("embed",)), ("*", ("mlp",))))
    first, second = describe({"a": jnp.ones(2), "b": jnp.ones(2)}, patterns)
    assert (first.dims, second.dims) == (("embed",), ("mlp",))
    assert first.source == "pattern `a`"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((("w", ("embed", "mlp")),), "no dims pattern matches `v`"),
        ((("*", ("embed", "mlp")), ("wx", ("mlp",))), "`wx` decides nothing(.|\n)*matches no leaf"),
        ((("*", ("embed", "mlp")), ("w", ("embed", "mlp"))), "shadowed(.|\n)*earlier `\\*`"),
        ((("*", ("embed",)),), "1 names for 2 dimensions"),
    ],
)
def test_bad_patterns_are_refused(patterns: tuple, message: str) -> None:
    tree = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}
    with pytest.raises(DimsError, match=message):
        describe(tree, DimPatterns(patterns))


def test_dims_tree_must_pair_with_the_leaves() -> None:
    tree = {"w": jnp.ones((2, 2)), "v": jnp.ones(3)}
    leaves = describe(tree, {"w": ("embed", "mlp"), "v": None})
    assert [leaf.dims for leaf in leaves] == [None, ("embed", "mlp")]
    with pytest.raises(DimsError, match="1 tuples of names for 2 leaves; `v` has none"):
        describe(tree, {"w": ("embed", "mlp")})
    with pytest.raises(DimsError, match="`v` has none; `x` is no leaf"):
        describe(tree, {"w": ("embed", "mlp"), "x": ("embed",)})
    with pytest.raises(DimsError, match="one name, or None, for each dimension"):
        describe(tree, {"w": "embed", "v": None})


def test_leaves_that_are_no_arrays_are_refused_by_path() -> None:
    with pytest.raises(DimsError, match="`net/act` is not an array"):
        describe({"net": {"act": jnp.tanh, "w": jnp.ones(2)}})


def test_rng_keys_have_bytes() -> None:
    (leaf,) = describe({"key": jax.random.key(0)})
    assert leaf.shape == () and leaf.size_bytes == 8


PARAMS = {"wq": jnp.ones((4, 6)), "b": jnp.ones(6)}
LEAVES = describe(PARAMS, {"wq": ("embed", "mlp"), "b": ("mlp",)})


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.lion(1e-3), optax.sgd(0.1, 0.9)])
def test_moments_have_their_parameters_dims(optimizer: optax.GradientTransformation) -> None:
    state = jax.eval_shape(optimizer.init, PARAMS)
    found = describe_optimizer(state, LEAVES)
    for leaf in found:
        if leaf.shape:
            expected = ("embed", "mlp") if leaf.path.endswith("/wq") else ("mlp",)
            assert leaf.dims == expected and leaf.source.startswith("moment of")


def test_moments_through_masks_chains_and_partitions() -> None:
    masked = optax.masked(optax.scale_by_adam(), {"wq": True, "b": False})
    split = optax.partition(
        {"m": optax.adam(1e-3), "s": optax.sgd(1e-3, 0.9)}, {"wq": "m", "b": "s"}
    )
    for optimizer in (optax.chain(optax.clip(1.0), masked), split):
        found = describe_optimizer(jax.eval_shape(optimizer.init, PARAMS), LEAVES)
        named = [leaf for leaf in found if leaf.shape]
        assert named and all(leaf.dims is not None for leaf in named)


@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (128, 128), (2, 128, 128)])
def test_factored_moments_have_the_dims_that_remain(shape: tuple[int, ...]) -> None:
    dims = ("layers", "embed", "mlp")[-len(shape) :]
    params = {"w": jnp.zeros(shape)}
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    found = describe_optimizer(
        jax.eval_shape(optimizer.init, params), describe(params, {"w": dims})
    )
    # The update tells which dim was summed: a gradient that varies along one dim only.
    state = optimizer.init(params)
    sizes = {name: {} for name in ("v_row", "v_col")}
    for index, name in enumerate(dims):
        ramp = jnp.arange(1.0, shape[index] + 1).reshape(
            [-1 if i == index else 1 for i in range(len(shape))]
        )
        _, after = optimizer.update({"w": jnp.broadcast_to(ramp, shape)}, state, params)
        for field in sizes:
            moment = getattr(after, field)["w"]
            varies = bool(jnp.ptp(moment) > 0)
            sizes[field][name] = varies
    for leaf in found:
        for field in sizes:
            if f"{field}/w" in leaf.path:
                kept = tuple(name for name in dims if sizes[field][name])
                assert leaf.dims == kept, (leaf, sizes[field])


def test_factored_moments_of_flax_variables() -> None:
    state = nnx.state(_Pair(nnx.Rngs(0)), nnx.Param)
    del state["plain"]
    moments = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=2).init, state)
    found = {leaf.path: leaf.dims for leaf in describe_optimizer(moments, describe(state))}
    assert found["v_row/up"] == ("embed",) and found["v_col/up"] == ("mlp",)


def test_leaf_counts_bytes() -> None:
    assert Leaf("w", (3, 5), F32).size_bytes == 60
