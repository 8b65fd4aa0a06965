"""Weights and their gradients on the wire: each step moves what the module says, no more.

The programs are compiled for simulated CPU devices: which collectives there are, over which axes
and on how many bytes is written down in the step, so a CPU program proves it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from test_train_parity import LIMIT, batches, config

from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.planned import Collective
from meshwright.train.config import TrainConfig
from meshwright.train.parity import Case, compare, program_of, run_case
from meshwright.train.plan_leaves import leaf_namer
from meshwright.train.weights import scope_of

LAYERS, EMBED, MLP, VOCAB = 2, 32, 64, 64
F32 = 4
# What the tables of a small model come to, in bytes: matrices of all layers, and an embedding.
MATRICES = LAYERS * (4 * EMBED * EMBED + 3 * EMBED * MLP) * F32
TABLE = VOCAB * EMBED * F32
SCALES = (2 * LAYERS + 1) * EMBED * F32
SCALAR = 64  # losses, norms and counts


def run_of(mesh: str, *, tied: bool = True, remat: Any = "full", **changes: Any) -> TrainConfig:
    base = config()
    model = replace(base.model, remat=remat, tied=tied)
    return replace(base, mesh=mesh, model=model, **changes)


@functools.cache
def moves(run: TrainConfig) -> tuple[Collective, ...]:
    """The collectives of a step."""
    program = program_of(run)
    text = program.lower_step().compile().as_text()
    layout = program.spec.layout
    found = collectives_of(parse_module(text), layout.mesh, leaf_of=leaf_namer(run, layout))
    assert not found.unread
    return found.collectives


def weights_of(run: TrainConfig) -> Mapping[tuple[str, tuple[str, ...]], int]:
    """Full buffers by kind and axes, scalars left out."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for found in moves(run):
        if found.bytes > SCALAR * found.count:
            total[found.kind, found.axes] += found.bytes
    return total


def test_gradients_are_scattered_and_only_shards_reduced() -> None:
    """data=2, fsdp=4: the docstring's ρ(s)Ψ + 2ρ(r)Ψ/s, and each layer gathered twice."""
    assert weights_of(run_of("data=2,fsdp=4")) == {
        ("all-gather", ("fsdp",)): 2 * MATRICES + TABLE,
        ("reduce-scatter", ("fsdp",)): MATRICES + TABLE,
        ("all-reduce", ("data",)): (MATRICES + TABLE) // 4,
        ("all-reduce", ("data", "fsdp")): SCALES,
    }


def test_a_tied_table_is_gathered_and_reduced_once() -> None:
    """Though it is read twice, as embedding and as head."""
    table = [found for found in moves(run_of("data=2,fsdp=4")) if found.leaf == "embedding"]
    assert sorted((found.kind, found.axes, found.count) for found in table) == [
        ("all-gather", ("fsdp",), 1),
        ("all-reduce", ("data",), 1),
        ("reduce-scatter", ("fsdp",), 1),
    ]


def test_pure_data_reduces_each_gradient_once() -> None:
    assert weights_of(run_of("data=8")) == {("all-reduce", ("data",)): MATRICES + TABLE + SCALES}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_each_layer_is_gathered_twice_whatever_is_kept(remat: str) -> None:
    gathers = [f for f in moves(run_of("fsdp=8", remat=remat)) if f.kind == "all-gather"]
    counted: Counter[str] = Counter()
    for found in gathers:
        counted[found.leaf] += found.count
    layers = {leaf: count for leaf, count in counted.items() if leaf.startswith("layers/")}
    assert len(layers) == 7 and set(layers.values()) == {2 * LAYERS}
    assert {found.phase for found in gathers} == {"forward", "backward"}


def test_zero1_scatters_gradients_and_gathers_the_working_copy_once() -> None:
    found = weights_of(run_of("data=8", zero=1))
    assert found == {
        ("reduce-scatter", ("data",)): MATRICES + TABLE,
        ("all-gather", ("data",)): MATRICES + TABLE,
        ("all-reduce", ("data",)): SCALES,
    }
    outside = [f for f in moves(run_of("data=8", zero=1)) if f.kind == "all-gather"]
    assert {(f.loop_depth, f.phase) for f in outside} == {(0, "update")}


def test_zero1_beside_fsdp_scatters_over_both() -> None:
    assert weights_of(run_of("data=2,fsdp=4", zero=1)) == {
        ("all-gather", ("fsdp",)): 2 * MATRICES + TABLE,
        ("all-gather", ("data",)): (MATRICES + TABLE) // 4,
        ("reduce-scatter", ("data", "fsdp")): MATRICES + TABLE,
        ("all-reduce", ("data", "fsdp")): SCALES,
    }


def test_whole_accumulation_keeps_every_reduction_out_of_the_loops() -> None:
    found = moves(run_of("data=2,fsdp=4", grad_accum=2))
    assert {f.loop_depth for f in found if f.kind in ("all-reduce", "reduce-scatter")} == {0}
    assert weights_of(run_of("data=2,fsdp=4", grad_accum=2))["all-gather", ("fsdp",)] == (
        2 * 2 * MATRICES + TABLE
    )


def test_sharded_accumulation_scatters_each_microbatch() -> None:
    """Over data, of which no accumulator is split, sums still wait for the end."""
    run = run_of("data=2,fsdp=4", grad_accum=2, accumulate="sharded")
    found = weights_of(run)
    assert found["reduce-scatter", ("fsdp",)] == 2 * (MATRICES + TABLE)
    assert found["all-reduce", ("data",)] == (MATRICES + TABLE) // 4 + SCALES
    assert {f.loop_depth for f in moves(run) if f.axes == ("data",)} == {0}


def test_zero2_scatters_each_microbatch_over_data() -> None:
    run = run_of("data=8", grad_accum=2, zero=2)
    assert weights_of(run)["reduce-scatter", ("data",)] == 2 * (MATRICES + TABLE)


@pytest.mark.parametrize("case", [Case("data=2,fsdp=4"), Case("data=8", zero=1)], ids=str)
def test_gradients_of_untied_tables_equal_one_device(case: Case) -> None:
    """`test_train_parity` holds the same for a tied table, on every mesh."""
    alone = run_case(run_of("data=1", tied=False), Case("data=1"), batches())
    found = compare(alone, run_case(run_of(case.mesh, tied=False), case, batches()))
    assert found.initial_equal and found.gradient < LIMIT and found.loss < LIMIT


def test_scopes_reach_the_program() -> None:
    run = run_of("fsdp=8")
    text = program_of(run).lower_step().compile().as_text()
    for leaf in ("layers/attn/wq", "layers/mlp/w_down", "embedding"):
        assert scope_of(leaf) in text
