"""Pipelines beyond parity: documents, evaluation, what a compiled step sends and keeps."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from test_train_compositions import base

from meshwright.sharding.collectives import collectives_of
from meshwright.sharding.hlo import parse_module
from meshwright.sharding.schedule import Schedule, ScheduleKind
from meshwright.train.config import PipelineConfig, TrainConfig
from meshwright.train.parity import program_of
from meshwright.train.program import Program
from meshwright.train.step import eval_step, gradients


def config(mesh: str, schedule: ScheduleKind = "1f1b", micro: int = 4) -> TrainConfig:
    run = base()
    data = replace(run.data, mask_documents=True)
    model = replace(run.model, layers=5)
    pipeline = PipelineConfig(schedule)
    return replace(run, mesh=mesh, model=model, data=data, grad_accum=micro, pipeline=pipeline)


def batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents each."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 64, (16, 17)).astype(np.int32)
    starts = rng.random((16, 16)) < 0.15
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(16), 0), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": rng.random((16, 16)).astype(np.float32),
        "segments": segments,
        "positions": (np.arange(16) - first).astype(np.int32),
    }


def found(run: TrainConfig) -> tuple[Any, float, float]:
    """Gradients in the order of layers, loss of the step, loss of an evaluation."""
    program = program_of(run)
    state, rows = program.init(), program.place(batch())
    spec = program.spec
    grads, sums, _ = jax.jit(functools.partial(gradients, spec, spec.constrain()))(
        state.params, rows
    )
    scored = jax.jit(functools.partial(eval_step, spec, spec.constrain()))(state.params, rows)
    return jax.device_get(spec.model.in_order(grads)), float(sums["plain"]), float(scored[0])


@functools.cache
def alone() -> tuple[Any, float, float]:
    return found(config("data=1"))


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [("stage=2,data=2", "1f1b"), ("stage=2,tensor=2", "interleaved")],
)
def test_documents_and_evaluation_are_one_device_s(mesh: str, schedule: ScheduleKind) -> None:
    grads, plain, scored = found(config(mesh, schedule))
    expected = alone()
    assert plain == pytest.approx(expected[1], rel=1e-5)
    assert scored == pytest.approx(expected[2], rel=1e-5)
    assert scored == pytest.approx(plain, rel=1e-5)
    for one, other in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(grads), strict=True):
        assert np.max(np.abs(one - other)) < 1e-5 * np.max(np.abs(one))


def test_chunks_go_down_four_stages_and_up_again() -> None:
    """With nine layers in eight chunks, most of whose places are empty."""
    staged = config("stage=4,data=2", "v-shape")
    deep = replace(staged, model=replace(staged.model, layers=9))
    grads, plain, scored = found(deep)
    expected = found(replace(deep, mesh="data=1", pipeline=PipelineConfig()))
    assert plain == pytest.approx(expected[1], rel=1e-5)
    assert scored == pytest.approx(plain, rel=1e-5)
    for one, other in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(grads), strict=True):
        assert np.max(np.abs(one - other)) < 1e-5 * np.max(np.abs(one))


@functools.cache
def compiled(schedule: ScheduleKind) -> tuple[Program, Any]:
    program = program_of(config("stage=2", schedule, micro=8))
    return program, program.lower_step().compile()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_step_has_the_ticks_of_its_schedule(schedule: ScheduleKind) -> None:
    """Counted in the compiled program: each tick passes one activation on, or back."""
    program, step = compiled(schedule)
    plan = Schedule(schedule, 2, 8)
    hop = 4 * 16 // 8 * 16 * program.config.model.embed
    moves = collectives_of(parse_module(step.as_text()), program.spec.layout.mesh).collectives
    permutes = [move for move in moves if move.kind == "collective-permute"]
    hops = [move for move in permutes if move.bytes == hop * move.count]
    # A compiler may leave out the very last, which nobody reads.
    assert 2 * plan.forward_ticks - sum(move.count for move in hops) in (0, 1)
    assert 1 - plan.units / plan.forward_ticks == pytest.approx(plan.idle_fraction)


def test_1f1b_keeps_less_than_gpipe() -> None:
    """8 microbatches over 2 stages: 3 kept where gpipe keeps 8."""
    sizes = [compiled(kind)[1].memory_analysis().temp_size_in_bytes for kind in ("1f1b", "gpipe")]
    assert Schedule("1f1b", 2, 8).slots == 3 and Schedule("gpipe", 2, 8).slots == 8
    assert sizes[0] < 0.7 * sizes[1]


def test_at_the_turn_of_a_v_shape_nothing_is_sent() -> None:
    """Of two stages both send at every other tick, and between them one has turned, one ended."""
    program, step = compiled("v-shape")
    hop = 4 * 16 // 8 * 16 * program.config.model.embed
    moves = collectives_of(parse_module(step.as_text()), program.spec.layout.mesh).collectives
    permutes = [move for move in moves if move.kind == "collective-permute"]
    hops = [move for move in permutes if move.bytes == hop * move.count]
    # Forwards and backwards; a compiler may leave out the very last, which nobody reads.
    sent = sum(move.wire_bytes for move in hops) / hop
    assert 2 * (8 + 2) - 1 - sent in (0, 1)


def test_what_the_last_chunk_makes_does_not_go_round() -> None:
    """Of two stages in a ring both send at a tick, but one where the head takes over."""
    program, step = compiled("interleaved")
    plan = Schedule("interleaved", 2, 8, chunks=2)
    hop = 4 * 16 // 8 * 16 * program.config.model.embed
    moves = collectives_of(parse_module(step.as_text()), program.spec.layout.mesh).collectives
    permutes = [move for move in moves if move.kind == "collective-permute"]
    hops = [move for move in permutes if move.bytes == hop * move.count]
    around = plan.forward_ticks - plan.microbatches
    assert sum(move.wire_bytes for move in hops) == 2 * hop * (around + plan.microbatches / 2)
