"""Pure functions of a plain tree; the same initial values on any layout of devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshwright.models.config import named
from meshwright.models.pure import Functional, functional

SMALL = dataclasses.replace(named("tiny"), layers=2, embed=32, mlp=64, tied=False, bias=True)
TOKENS: Any = np.random.default_rng(9).integers(0, 256, (4, 16), np.int32)
SPLIT = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "data",
}


@functools.cache
def _params() -> dict[str, Any]:
    return jax.jit(functional(SMALL).init)(jax.random.key(0))


def _shardings(model: Functional, shape: tuple[int, int]) -> Any:
    count = shape[0] * shape[1]
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "tensor"))
    return jax.tree.map(
        lambda dims: NamedSharding(mesh, PartitionSpec(*(SPLIT.get(dim) for dim in dims))),
        model.dims,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def test_init_gives_the_described_tree() -> None:
    model = functional(SMALL)
    params = _params()
    assert type(params) is dict and type(params["layers"]["attn"]) is dict
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == described


def test_equal_configurations_share_one_description() -> None:
    again = functional(dataclasses.replace(SMALL))
    assert again == functional(SMALL) and hash(again) == hash(functional(SMALL))
    assert again.shapes is functional(SMALL).shapes


@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (1, 8)])
def test_initial_values_are_bitwise_the_same_on_any_mesh(shape: tuple[int, int]) -> None:
    model = functional(SMALL)
    shardings = _shardings(model, shape)
    split = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(split):
        expected: Any = _params()
        for entry in path:
            expected = expected[entry.key]
        np.testing.assert_array_equal(leaf, expected, err_msg=jax.tree_util.keystr(path))


def test_each_device_draws_its_own_part_only() -> None:
    model = functional(dataclasses.replace(SMALL, embed=256, mlp=512))
    shardings = _shardings(model, (2, 4))
    compiled = jax.jit(model.init, out_shardings=shardings).lower(jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(model.shapes))
    assert memory.output_size_in_bytes < whole / 4
    # Sums and one word of bits for each element of a device's own part, and little more.
    assert memory.temp_size_in_bytes < 3 * memory.output_size_in_bytes < whole


def test_sharded_parameters_give_the_same_logits() -> None:
    model = functional(SMALL)
    params = _params()
    alone = jax.jit(model.apply)(params, TOKENS)
    split = jax.device_put(params, _shardings(model, (2, 4)))
    np.testing.assert_allclose(jax.jit(model.apply)(split, TOKENS), alone, atol=1e-5)


def test_gradients_are_a_plain_tree_too() -> None:
    model = functional(SMALL)
    params = _params()
    gradients = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, TOKENS) ** 2)))(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients["layers"]["mlp"]))
