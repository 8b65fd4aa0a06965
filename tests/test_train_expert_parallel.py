"""Experts dealt to devices in whole steps: what moves.

Numbers are held by `test_train_compositions`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from test_train_parity import config

from meshwright.models.config import ExpertConfig, named
from meshwright.sharding.bounds import expert_layer_bytes, expert_rows_bytes
from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.mesh import MeshSpec
from meshwright.train.config import TrainConfig
from meshwright.train.estimate_placement import place
from meshwright.train.estimate_traffic import expected_collectives, lower_bounds
from meshwright.train.parallelism import choose_rules
from meshwright.train.parity import program_of
from meshwright.train.plan_leaves import leaf_namer

LAYERS, EMBED, WIDTH, EXPERTS, CHOICES, VOCAB = 2, 32, 64, 8, 2, 64
F32 = 4
MATRICES = LAYERS * EXPERTS * 3 * EMBED * WIDTH * F32
SCALAR = 512  # losses, norms, counts and loads


def run_of(mesh: str, *, capacity: float | None = 1.0, **changes: Any) -> TrainConfig:
    base = config()
    mixture = ExpertConfig(EXPERTS, CHOICES, mlp=WIDTH, capacity_factor=capacity)
    remat = changes.pop("remat", "none")
    model = replace(base.model, layers=LAYERS, experts=mixture, remat=remat)
    return replace(base, mesh=mesh, model=model, **changes)


@functools.cache
def moves(run: TrainConfig) -> tuple[Any, ...]:
    program = program_of(run)
    layout = program.spec.layout
    module = parse_module(program.lower_step().compile().as_text())
    found = collectives_of(module, layout.mesh, leaf_of=leaf_namer(run, layout))
    assert not found.unread
    return found.collectives


def of_experts(run: TrainConfig) -> Mapping[tuple[str, tuple[str, ...]], int]:
    """Full buffers of the experts' matrices, by kind and axes."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for found in moves(run):
        if "experts/w_" in found.leaf and found.bytes > SCALAR:
            total[found.kind, found.axes] += found.bytes
    return total


def test_experts_stay_where_they_are() -> None:
    """Neither they nor their gradients cross the axis; over others a device's own ones do, and
    sums over data wait for the end of the step."""
    run = run_of("data=2,fsdp=2,expert=2", grad_accum=2, accumulate="sharded")
    assert of_experts(run) == {
        ("all-gather", ("fsdp",)): 2 * 2 * MATRICES // 2,
        ("reduce-scatter", ("fsdp",)): 2 * MATRICES // 2,
        ("all-reduce", ("data",)): MATRICES // 4,
    }
    assert {f.loop_depth for f in moves(run) if f.axes == ("data",) and f.bytes > SCALAR} == {0}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_tokens_are_sent_as_often_as_the_bound_says(remat: Any) -> None:
    """Four times, and once more where they are recomputed; gates are a part in a thousand."""
    model = named("mixtral-8x7b")
    mixture = replace(model.experts, capacity_factor=1.25)
    model = replace(model, remat=remat, experts=mixture)
    run = replace(config(), model=model, batch_size=16, seq_len=4096)
    mesh = MeshSpec.parse("expert=8,fsdp=2")
    placement = place(run, mesh, choose_rules(run, mesh))
    found = expected_collectives(placement, 2)
    sent = sum(c.wire_bytes for c in found if c.kind == "all-to-all" and c.axes == ("expert",))
    bound = model.layers * expert_layer_bytes(
        placement.tokens,
        8,
        experts_per_token=2,
        width=model.embed,
        itemsize=2,
        capacity_factor=1.25,
    )
    assert sent == pytest.approx(bound * (1 if remat == "none" else 5 / 4), rel=1e-3)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("axes", ["context=4", "expert=8,context=4"])
def test_whole_rows_are_sent_as_often_as_the_bound_says(axes: str, remat: Any) -> None:
    """And to experts on other devices no more than of rows that are whole."""
    model = named("mixtral-8x7b")
    model = replace(model, remat=remat, experts=replace(model.experts, capacity_factor=1.25))
    run = replace(config(), model=model, batch_size=16, seq_len=4096)
    found: Counter[str] = Counter()
    mesh = MeshSpec.parse(axes)
    placement = place(run, mesh, choose_rules(run, mesh))
    for one in expected_collectives(placement, 2):
        if one.leaf in ("rows for experts", "sums of experts", "tokens of experts"):
            found[one.axes[0]] += one.wire_bytes
    stream = placement.tokens * model.embed * 2
    bound = model.layers * expert_rows_bytes(stream, 4, recompute=remat == "full")
    assert found["context"] == pytest.approx(bound)
    how = {"experts_per_token": 2, "width": model.embed, "itemsize": 2, "capacity_factor": 1.25}
    parts = mesh.sizes.get("expert", 1)
    dealt = model.layers * expert_layer_bytes(placement.tokens, parts, **how)
    assert found["expert"] == pytest.approx(dealt)


@pytest.mark.parametrize(("capacity", "remat"), [(1.0, "full"), (None, "none")])
def test_the_closed_form_says_what_crosses_the_axis(capacity: float | None, remat: str) -> None:
    """Tokens to experts and home; and gradients of what is no expert, as over a data axis."""
    run = run_of("expert=4", capacity=capacity, remat=remat)
    mesh = MeshSpec.parse("expert=4")
    sent = sum(found.wire_bytes for found in moves(run))
    bound = lower_bounds(run, mesh, choose_rules(run, mesh), F32)["expert"]
    assert sent == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize(
    ("axes", "capacity", "remat"),
    [("context=4", 1.0, "full"), ("expert=2,context=4", 1.0, "none"), ("context=4", None, "full")],
)
def test_the_closed_form_says_what_rows_in_parts_cost(
    axes: str, capacity: float | None, remat: str
) -> None:
    """Every kind over every axis in either pass, to what losses and norms send."""
    run, mesh = run_of(axes, capacity=capacity, remat=remat), MeshSpec.parse(axes)
    placed = place(run, mesh, choose_rules(run, mesh))
    off: Counter[tuple[str, ...]] = Counter()
    for sign, found in ((1, moves(run)), (-1, expected_collectives(placed, F32))):
        for one in found:
            off[one.kind, one.phase, *one.axes] += sign * one.wire_bytes
    assert {key: error for key, error in off.items() if abs(error) > SCALAR / 2} == {}
    names = {one.leaf for one in expected_collectives(placed, F32)}
    assert "sums over rows" in names and ("rows for experts" in names) == (capacity is not None)
