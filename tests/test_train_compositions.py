"""Every composition of parallelisms is one device: gradients, losses and initial values.

Single axes and pairs always, three and four axes with ``--all-compositions``. Four axes of two
devices take sixteen, and a process of their own: this one has eight.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_table import PROPERTY, Row, read
from test_train_parity import LIMIT, config

from meshwright.models.config import ExpertConfig
from meshwright.train.compositions import EXPERT_WAYS, WAYS, Composition, compositions
from meshwright.train.config import TrainConfig
from meshwright.train.parity import Case, Result, compare, run_case

STEPS = 10
HELD: list[list[tuple[Any, ...]]] = [[]]
"""Rows of the table that tests have earned; last are those of the test that runs."""


@pytest.fixture(autouse=True)
def left_in_the_report(record_property: Callable[[str, object], None]) -> None:
    HELD.append([])
    record_property(PROPERTY, HELD[-1])


def base() -> TrainConfig:
    """Grouped heads, and gradients that are clipped."""
    run = config()
    model = replace(run.model, heads=16, kv_heads=8, head_dim=2)
    return replace(run, model=model, optimizer=replace(run.optimizer, clip_norm=0.1))


def deepened(run: TrainConfig, composition: Composition) -> TrainConfig:
    """With layers enough for two stages of two chunks, and one more: a place stays empty."""
    if "stage" not in composition.case.mesh:
        return run
    first = run.model.experts.first_dense
    return replace(run, model=replace(run.model, layers=5 + first))


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
def on_one_device(run: TrainConfig) -> Result:
    return run_case(run, Case("data=1"), batches())


def check(composition: Composition, of: TrainConfig | None = None, *, starts: bool = False) -> None:
    """Against one device; where the composition does not start by itself, from its initial values,
    which saves half of the time."""
    run = deepened(of or base(), composition)
    alone = on_one_device(run)
    start = None if starts else alone.initial
    found = run_case(run, composition.case, batches(), start)
    difference = compare(alone, found)
    key = NAMES[of or base()], str(composition), str(composition.case)
    HELD[-1].append(astuple(Row(*key, difference.gradient, difference.loss)))
    assert difference.initial_equal
    assert difference.gradient < LIMIT
    assert difference.loss < LIMIT
    if run.model.experts.count:
        for name in ("dropped", "imbalance"):
            assert found.scalars[name] == pytest.approx(alone.scalars[name], rel=1e-6)


def staged(composition: Composition) -> bool:
    return "stage" in composition.case.mesh


def chosen(found: list[Composition]) -> list[Composition]:
    """Of pairs with stages one schedule each, another one for the next pair."""
    pairs = [pair for pair in found if staged(pair)]
    others = list(dict.fromkeys(pair.ways[1] for pair in pairs))
    mine = {(SCHEDULES[at % len(SCHEDULES)], other) for at, other in enumerate(others)}
    return [pair for pair in found if not staged(pair) or pair.ways in mine]


SCHEDULES = list(WAYS["stage"])
PAIRS = list(compositions(2))


@pytest.mark.parametrize("composition", [*compositions(1), *chosen(PAIRS)], ids=str)
def test_one_axis_and_pairs(composition: Composition) -> None:
    check(composition, starts=True)


@pytest.mark.every_composition
@pytest.mark.parametrize(
    "composition", [pair for pair in PAIRS if pair not in chosen(PAIRS)], ids=str
)
def test_every_schedule_in_pairs(composition: Composition) -> None:
    check(composition)


@pytest.mark.every_composition
@pytest.mark.parametrize("composition", list(compositions(3)), ids=str)
def test_three_axes(composition: Composition) -> None:
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


def mixtures(count: int) -> list[Composition]:
    """Of schedules with 1f1b only, where there are fewer than three axes."""
    found = compositions(count, EXPERT_WAYS)
    return [one for one in found if count > 2 or not {"gpipe", "interleaved"} & set(one.ways)]


def dealt(count: int) -> list[Composition]:
    """Those whose experts are dealt to devices."""
    return [one for one in mixtures(count) if "expert" in one.ways]


BESIDE = [one for one in dealt(2) if {"fsdp", "tensor"} & set(one.ways)]


@pytest.mark.parametrize(
    "composition", [*(one for one in mixtures(1) if not staged(one)), *BESIDE], ids=str
)
def test_mixtures_on_one_axis_and_dealt_beside_another(composition: Composition) -> None:
    check(composition, experts(), starts="expert" in composition.ways)


@pytest.mark.every_composition
@pytest.mark.parametrize(
    "composition", [*(one for one in mixtures(2) if one not in BESIDE), *dealt(3)], ids=str
)
def test_mixtures_on_more_axes(composition: Composition) -> None:
    check(composition, experts())


@pytest.mark.every_composition
@pytest.mark.parametrize(
    "composition", [one for one in mixtures(3) if "expert" not in one.ways], ids=str
)
def test_undealt_mixtures_on_three_axes(composition: Composition) -> None:
    check(composition, experts())


def fours(axes: str) -> list[tuple[Composition, TrainConfig]]:
    """Compositions of these four axes; where experts are dealt one, each time another."""
    dense = [(one, base()) for one in compositions(4) if axis_names(one) == axes]
    mixed = [(one, experts()) for one in dealt(4) if axis_names(one) == axes]
    return dense or [mixed[FOURS.index(axes) % len(mixed)]]


def axis_names(composition: Composition) -> str:
    return " ".join(part.partition("=")[0] for part in composition.case.mesh.split(","))


FOURS = sorted({axis_names(one) for one in mixtures(4)})


@pytest.mark.every_composition
@pytest.mark.parametrize("axes", FOURS)
def test_four_axes(axes: str) -> None:
    code = (
        "import test_train_compositions as here\n"
        f"for composition, run in here.fours({axes!r}):\n"
        "    here.check(composition, run)\n"
        "print(here.json.dumps(here.HELD[-1]))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "16"}
    folder = Path(__file__).parent
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    HELD[-1] += json.loads(done.stdout)
    assert len(HELD[-1]) == len(fours(axes))


SPLIT = [one for one in mixtures(1) if "context" in one.case.mesh]
"""Those whose rows are split along their length, alone."""


DEALT_AND_IN_PARTS = Composition(
    ("data", "expert", "context-ring"),
    Case("data=2,expert=2,context=2", order="contiguous", remat="full", grad_accum=2),
)


def test_dealt_mixtures_beside_rows_in_parts_and_replicas() -> None:
    """The devices that have the experts, those that have the length, and replicas of both."""
    check(DEALT_AND_IN_PARTS, experts())


@pytest.mark.every_composition
@pytest.mark.parametrize("composition", [*dealt(1), *dealt(2), *SPLIT], ids=str)
def test_mixtures_that_drop_nothing(composition: Composition) -> None:
    check(composition, dropless())


NAMES = {base(): "dense", experts(): "mixture", dropless(): "dropless mixture"}
"""Of the models in the table."""


def test_the_table_lists_every_composition_held() -> None:
    fours_of = [one for axes in FOURS for one, run in fours(axes) if run.model.experts.count]
    dense = [*compositions(1), *PAIRS, *compositions(3), *compositions(4)]
    alone = [one for one in mixtures(1) if not staged(one)]
    mixed = [*alone, *mixtures(2), *mixtures(3), *fours_of, DEALT_AND_IN_PARTS]
    even = [*dealt(1), *dealt(2), *SPLIT]
    held = {
        (name, str(one), str(one.case))
        for name, found in zip(NAMES.values(), (dense, mixed, even), strict=True)
        for one in found
    }
    page = read(Path(__file__).parents[1] / "docs" / "strategies" / "parity.md")
    assert {row.key for row in page} == held
    assert max(row.gradient for row in page) < LIMIT
    assert max(row.loss for row in page) < LIMIT


def test_the_mixture_drops() -> None:
    assert on_one_device(experts()).scalars["dropped"] > 0


@pytest.mark.every_composition
def test_the_dropless_mixture_does_not() -> None:
    scalars = on_one_device(dropless()).scalars
    assert scalars["dropped"] == 0 and scalars["imbalance"] > 1


def test_the_yardstick_is_clipped_and_the_losses_move() -> None:
    found = on_one_device(base())
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
