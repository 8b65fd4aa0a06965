"""Pipeline schedules, run unit by unit: everything is done once, in order, where there is room."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.sharding.bounds import bubble_fraction
from meshwright.sharding.errors import PlacementError
from meshwright.sharding.schedule import Schedule, ScheduleKind, Units, layer_slots


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(get_args(ScheduleKind)))
    stages = draw(st.integers(1, 6))
    chunks = draw(st.integers(2, 4)) if kind == "interleaved" else 1
    rounds, more = draw(st.integers(1, 5)), draw(st.integers(0, stages - 1))
    microbatches = stages * rounds + (0 if chunks > 1 else more)
    return Schedule(kind, stages, microbatches, chunks)


def unit(units: Units, tick: int, stage: int, stages: int) -> tuple[int, int, int]:
    """Microbatch, place in the model, and slot."""
    chunk = int(units.chunk[tick, stage])
    return int(units.microbatch[tick, stage]), chunk * stages + stage, int(units.slot[tick, stage])


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_every_unit_is_done_once_and_after_what_it_needs(schedule: Schedule) -> None:
    p, groups = schedule.stages, schedule.stages * schedule.chunks
    there, back = schedule.forward(), schedule.backward()
    done: dict[tuple[int, int], int] = {}
    returned: dict[tuple[int, int], int] = {}
    held: dict[tuple[int, int], tuple[int, int]] = {}
    for tick in range(schedule.ticks):
        for stage in range(p) if tick < schedule.forward_ticks else ():
            if there.valid[tick, stage]:
                microbatch, place, slot = unit(there, tick, stage, p)
                assert (microbatch, place) not in done
                if place:
                    # What a stage sends is there at the next tick, and not kept for later.
                    assert done[microbatch, place - 1] == tick - 1
                assert there.first[tick, stage] == (place == 0)
                assert there.last[tick, stage] == (place == groups - 1)
                assert held.setdefault((stage, slot), (microbatch, place)) == (microbatch, place)
                done[microbatch, place] = tick
        row = tick - schedule.delay
        for stage in range(p) if row >= 0 else ():
            if back.valid[row, stage]:
                microbatch, place, slot = unit(back, row, stage, p)
                assert held.pop((stage, slot)) == (microbatch, place)
                if place < groups - 1:
                    assert returned[microbatch, place + 1] == tick - 1
                elif schedule.returns_at_once:
                    assert done[microbatch, place] == tick
                returned[microbatch, place] = tick
    assert len(done) == len(returned) == schedule.microbatches * groups
    assert not held


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_idle_ticks_are_the_closed_form(schedule: Schedule) -> None:
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    expected = bubble_fraction(p, m, chunks=v)
    assert schedule.idle_fraction == pytest.approx(expected)
    for units in (schedule.forward(), schedule.backward()):
        # A tick with work for any stage lasts one unit; stages without work wait.
        lasting = int(units.valid.any(axis=1).sum())
        assert 1 - units.valid.sum() / (lasting * p) == pytest.approx(expected)


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_slots_are_as_many_as_the_first_stage_needs(schedule: Schedule) -> None:
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    most = m if schedule.kind == "gpipe" else (v + 1) * p - 1
    assert schedule.slots == min(m * v, most)


def test_interleaving_idles_less_than_gpipe_as_the_formula_says() -> None:
    gpipe, twice = Schedule("gpipe", 4, 8), Schedule("interleaved", 4, 8, 2)
    assert gpipe.idle_fraction == pytest.approx(3 / 11)
    assert twice.idle_fraction == pytest.approx(3 / 19)
    # In ticks of a whole stage.
    assert twice.forward_ticks / 2 < gpipe.forward_ticks


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_layer_has_one_place(layers: int, stages: int, chunks: int) -> None:
    if stages * chunks > layers:
        with pytest.raises(PlacementError, match="some group would have no layer"):
            layer_slots(layers, stages, chunks)
        return
    places = layer_slots(layers, stages, chunks)
    assert sorted(place for place in places if place is not None) == list(range(layers))
    assert len(places) == stages * chunks * -(-layers // (stages * chunks))
    grid = np.array([-1 if p is None else p for p in places]).reshape(stages, chunks, -1)
    # Chunk c of the model is on stage c mod p; within it layers are in order, empty places last.
    in_order = [x for x in grid.transpose(1, 0, 2).reshape(-1).tolist() if x >= 0]
    assert in_order == list(range(layers))
    live = grid >= 0
    assert (live[..., :-1] | ~live[..., 1:]).all() and live[..., 0].all()
    if stages * chunks > 1 and layers % (stages * chunks):
        assert not live[-1, -1, -1], "the last stage, which has the loss to wait for, has one less"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Schedule("1f1b", 4, 3), "4 stages with 3 microbatches"),
        (
            lambda: Schedule("interleaved", 4, 6, 2),
            "6 is not divisible by 4\n.*--grad-accum 4 or 8",
        ),
        (lambda: layer_slots(3, 2, 2), "4 is more than 3"),
    ],
)
def test_what_cannot_be_filled_is_refused(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(PlacementError, match=text):
        make()
