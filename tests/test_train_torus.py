"""Axes over several torus dimensions: the same numbers, in parts that a compiler serves.

Simulated devices have no torus, so the tests say where one would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from test_train_parity import LIMIT, batches, config, one_device

from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.train import torus
from meshwright.train.parity import Case, compare, program_of, run_case
from meshwright.train.torus import Torus, rings_along


def laid(dims: Sequence[int], lines: int = 1, slice_index: int = 0) -> np.ndarray:
    """Coordinates of an axis over all of some dimensions, beside ``lines`` - 1 others."""
    places = [
        [(slice_index, *place, line) for line in range(lines)]
        for place in product(*map(range, dims))
    ]
    return np.array(places)


@pytest.mark.parametrize("dims", [(2,), (4, 4), (16, 16), (4, 4, 8), (4, 4, 4, 2), (2, 1, 3)])
def test_an_axis_has_a_ring_for_each_dimension(dims: tuple[int, ...]) -> None:
    assert rings_along(laid(dims, lines=3)) == tuple(size for size in dims if size > 1)


def test_the_outer_part_of_a_dimension_is_a_ring_too() -> None:
    # jax lays v5e:16x16 as data=32, fsdp=8: both have a part of the second dimension.
    where = np.array([[(0, x, 8 * y + z) for z in range(8)] for y in range(2) for x in range(16)])
    assert rings_along(where) == (2, 16)


def test_what_is_not_laid_in_rows_is_left_to_the_compiler() -> None:
    snake = np.array([[(0, x, y if x % 2 == 0 else 3 - y)] for x in range(2) for y in range(4)])
    slices = np.concatenate([laid((2, 2), slice_index=at) for at in range(2)])
    repeated = np.array([[(0, x, y)] for x in (0, 1, 0) for y in range(2)])
    bent = laid((2, 4), lines=2)
    bent[:, 1] = bent[::-1, 1][:, [0, 2, 1, 3]]
    for where in (snake, slices, repeated, bent):
        assert rings_along(where) == ()


def test_simulated_and_absent_devices_have_no_torus() -> None:
    auto = (AxisType.Auto,)
    assert Torus.of(jax.make_mesh((8,), ("fsdp",), axis_types=auto)).rings == {}
    assert Torus.of(AbstractMesh((8,), ("fsdp",), axis_types=auto)).rings == {}


@pytest.mark.parametrize("tile", [(2, 4), (8, 128)], ids=["tiles", "plain"])
@pytest.mark.parametrize("rings", [(8,), (2, 2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, rings: tuple[int, ...], dim: int, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(torus, "_SHORT", 1)
    monkeypatch.setattr(torus, "TILE", tile)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(*[None] * dim, "fsdp")
    x = jax.random.normal(jax.random.key(0), (8, 16, 16))

    def both(found: Torus) -> tuple[np.ndarray, np.ndarray]:
        def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            part = found.scatter(x[0], ("fsdp",), dim)
            return part, found.gather(part, ("fsdp",), dim)

        out = (split, PartitionSpec())
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=out, check_vma=False
        )
        part, whole = jax.jit(mapped)(x)
        return np.asarray(part), np.asarray(whole)

    asked, plain = both(Torus({"fsdp": rings})), both(Torus({}))
    np.testing.assert_allclose(asked[0], jnp.sum(x, 0), rtol=1e-5, atol=1e-5)
    for one, other in zip(asked, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def on_torus(monkeypatch: pytest.MonkeyPatch, rings: tuple[int, ...]) -> None:
    monkeypatch.setattr(torus, "_SHORT", 1)
    monkeypatch.setattr(torus, "TILE", (2, 4))
    monkeypatch.setattr(torus, "_torus_of", lambda mesh: Torus({"fsdp": rings}))


CASES = [
    (Case("fsdp=8"), (2, 2, 2)),
    (Case("data=2,fsdp=4", 2, accumulate="sharded"), (2, 2)),
    (Case("fsdp=4,tensor=2", 2), (2, 2)),
]


@pytest.mark.parametrize(("case", "rings"), CASES, ids=lambda value: str(value))
def test_a_step_on_a_torus_is_that_of_one_device(
    monkeypatch: pytest.MonkeyPatch, case: Case, rings: tuple[int, ...]
) -> None:
    one = one_device()
    on_torus(monkeypatch, rings)
    found = compare(one, run_case(config(), case, batches()))
    assert found.initial_equal and found.gradient < LIMIT and found.loss < LIMIT


def test_the_parts_move_what_the_whole_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def wire(rings: tuple[int, ...]) -> Counter[str]:
        on_torus(monkeypatch, rings)
        program = program_of(replace(config(), mesh="fsdp=8"))
        text = program.lower_step().compile().as_text()
        total: Counter[str] = Counter()
        for found in collectives_of(parse_module(text), program.spec.layout.mesh).collectives:
            total[found.kind] += found.wire_bytes
        return total

    plain, parts = wire(()), wire((2, 2, 2))
    assert plain["reduce-scatter"] and plain["all-gather"]
    assert parts == plain
