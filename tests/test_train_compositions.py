"""Every composition of parallelisms is one device: gradients, losses and initial values.

Single axes and pairs always, three and four axes with ``--all-compositions``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from test_train_parity import LIMIT, config

from meshwright.models.config import ExpertConfig
from meshwright.train.compositions import EXPERT_WAYS, WAYS, Composition, compositions
from meshwright.train.config import TrainConfig
from meshwright.train.parity import Case, Result, compare, run_case

STEPS = 10


def base() -> TrainConfig:
    """Grouped heads, and gradients that are clipped."""
    run = config()
    model = replace(run.model, heads=16, kv_heads=8, head_dim=2)
    return replace(run, model=model, optimizer=replace(run.optimizer, clip_norm=0.1))


@functools.cache
def batches() -> tuple[dict[str, np.ndarray], ...]:
    """Random tokens; rows of very different weight, so that a mean of means would show."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 64, (16, 17)).astype(np.int32)
        counted = rng.random((16, 16)) < np.linspace(0.05, 1.0, 16)[:, None]
        rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        found.append({**rows, "weights": counted.astype(np.float32)})
    return tuple(found)


@functools.cache
def one_device() -> Result:
    return run_case(base(), Case("data=1"), batches())


def check(composition: Composition) -> None:
    found = compare(one_device(), run_case(base(), composition.case, batches()))
    assert found.initial_equal
    assert found.gradient < LIMIT
    assert found.loss < LIMIT


@pytest.mark.parametrize("composition", [*compositions(1), *compositions(2)], ids=str)
def test_one_axis_and_pairs(composition: Composition) -> None:
    check(composition)


@pytest.mark.every_composition
@pytest.mark.parametrize("composition", [*compositions(3), *compositions(4)], ids=str)
def test_three_and_four_axes(composition: Composition) -> None:
    check(composition)


@functools.cache
def experts() -> TrainConfig:
    """A mixture that drops tokens, with a shared expert and a dense first layer."""
    run = base()
    mixture = ExpertConfig(count=8, top_k=2, mlp=32, shared=1, capacity_factor=1.0, first_dense=1)
    return replace(run, model=replace(run.model, layers=3, experts=mixture))


@functools.cache
def dropless() -> TrainConfig:
    """As `experts`; nothing is dropped, and a bias evens the load."""
    run = experts()
    mixture = replace(run.model.experts, capacity_factor=None, balance="bias")
    return replace(run, model=replace(run.model, experts=mixture))


@functools.cache
def on_one_device(mixture: Callable[[], TrainConfig]) -> Result:
    return run_case(mixture(), Case("data=1"), batches())


def check_experts(composition: Composition, mixture: Callable[[], TrainConfig] = experts) -> None:
    alone, run = on_one_device(mixture), run_case(mixture(), composition.case, batches())
    found = compare(alone, run)
    assert found.initial_equal and found.gradient < LIMIT and found.loss < LIMIT
    for name in ("dropped", "imbalance"):
        assert run.scalars[name] == pytest.approx(alone.scalars[name], rel=1e-6)


@pytest.mark.parametrize("composition", list(compositions(1, EXPERT_WAYS)), ids=str)
def test_experts_on_one_axis(composition: Composition) -> None:
    check_experts(composition)


def dealt(count: int) -> list[Composition]:
    return [found for found in compositions(count, EXPERT_WAYS) if "expert" in found.ways]


BESIDE = [found for found in dealt(2) if {"fsdp", "tensor"} & set(found.ways)]


@pytest.mark.parametrize("composition", BESIDE, ids=str)
def test_experts_dealt_to_devices(composition: Composition) -> None:
    check_experts(composition)


@pytest.mark.every_composition
@pytest.mark.parametrize("mixture", [experts, dropless])
@pytest.mark.parametrize("composition", [*dealt(1), *dealt(2), *dealt(3)], ids=str)
def test_experts_dealt_to_devices_and_more(
    composition: Composition, mixture: Callable[[], TrainConfig]
) -> None:
    check_experts(composition, mixture)


@pytest.mark.every_composition
@pytest.mark.parametrize(
    "composition",
    [c for n in (2, 3) for c in compositions(n, EXPERT_WAYS) if "expert" not in c.ways],
    ids=str,
)
def test_experts_on_more_axes(composition: Composition) -> None:
    check_experts(composition)


def test_the_mixture_drops() -> None:
    assert on_one_device(experts).scalars["dropped"] > 0


@pytest.mark.every_composition
def test_the_dropless_mixture_does_not() -> None:
    scalars = on_one_device(dropless).scalars
    assert scalars["dropped"] == 0 and scalars["imbalance"] > 1


def test_the_yardstick_is_clipped_and_the_losses_move() -> None:
    found = one_device()
    squares = [float(np.sum(leaf**2)) for leaf in np_leaves(found.gradients)]
    assert np.sqrt(sum(squares)) > base().optimizer.clip_norm
    assert len(found.losses) == STEPS and len(set(found.losses)) == STEPS


def test_every_pair_of_ways_meets_in_a_pair() -> None:
    met = {frozenset(found.ways) for found in compositions(2)}
    for axis, ways in WAYS.items():
        for other, others in WAYS.items():
            if axis != other:
                assert all({way, more} in met for way in ways for more in others)


def test_settings_vary_over_the_list() -> None:
    cases = [found.case for count in (2, 3) for found in compositions(count)]
    for field in ("remat", "order", "grad_accum", "accumulate"):
        assert len({getattr(case, field) for case in cases}) > 1
    assert all(np.prod([int(part.split("=")[1]) for part in c.mesh.split(",")]) == 8 for c in cases)


def np_leaves(tree: object) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in np_leaves(value)]
    return [np.asarray(tree)]
